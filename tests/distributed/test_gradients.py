"""Compressed gradients on 2 and 4 processes: bytes, equality, nothing lost, resumed bit for bit.

The processes run ``gradient_worker.py``; each test looks at what one scenario there has left.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What every rank has seen, in the order of ranks."""
    world, seed = request.param, random.randrange(10**6)
    folder = tmp_path_factory.mktemp(f"ranks{world}-seed{seed}")
    command = [sys.executable, str(Path(__file__).parent / "gradient_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), str(seed), *DTYPES],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, f"seed {seed}: {error[-3000:]}"
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def same_bits(first, second):
    """Two dictionaries of tensors, NaN equal to NaN."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(7e7), second[name].nan_to_num(7e7)) for name in first
    )


def mean_of(owns, name):
    return sum(own[name].double() for own in owns) / len(owns)


def assert_nothing_lost(runs, steps, name, rounding):
    """ranks · applied + residuals = gradients, over the first ``steps`` steps, in float64.

    ``rounding`` is relative to the magnitudes that were added up.
    """
    true = sum(run["own"][t][name].double() for run in runs for t in range(steps) if name in run["own"][t])
    size = sum(
        run["own"][t][name].double().abs() for run in runs for t in range(steps) if name in run["own"][t]
    )
    applied = sum(g[name].double() for g in runs[0]["applied"][:steps] if g[name] is not None) * len(runs)
    stays = sum(run["stays"][steps - 1][name].double() for run in runs).view_as(true)
    assert ((applied + stays - true).abs() <= rounding * (size + applied.abs() + stays.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_lost(ranks, dtype):
    runs = [rank[f"nothing_lost {dtype}"] for rank in ranks]
    # Means have the 8 bits of bf16, which fp32 and fp16 hold exactly (fp16 above its subnormals).
    for name in "abcdef":
        for steps in range(1, 7):
            assert_nothing_lost(runs, steps, name, 1e-6)
    sent_of_c = (runs[0]["applied"][-1]["c"] != 0).double().mean()
    assert 0.02 < sent_of_c < 0.2, "some of it is sent, and by far not all"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_has_the_same_bits(ranks, dtype):
    runs = [rank[f"nothing_lost {dtype}"] for rank in ranks]
    for step in range(6):
        for run in runs:
            assert same_bits(run["applied"][step], runs[0]["applied"][step])


def test_bytes_at_the_collectives(ranks):
    for rank in ranks:
        run = rank["nothing_lost float32"]
        assert run["sent"] == [run["promised"]] * 6
        assert 0.09 * run["ring"] < run["promised"] <= 0.1 * run["ring"]


@pytest.mark.parametrize("way", ["ratio", "warmup", "all"])
def test_whole_gradients_are_the_mean(ranks, way):
    owns = [rank["whole"]["own"] for rank in ranks]
    for name in "abcdef":
        mean = mean_of(owns, name)
        # Each gradient is rounded to bf16 once, their mean once more.
        bound = 2**-8 * (sum(own[name].double().abs() for own in owns) / len(owns) + mean.abs())
        for rank in ranks:
            assert ((rank["whole"][way]["applied"][name].double() - mean).abs() <= bound).all()
    if way != "all":
        for rank in ranks:
            got = rank["whole"][way]
            assert got["ring"] <= got["sent"] <= got["ring"] + 4 * len(ranks) ** 2 * 6  # shards are padded


def test_a_resumed_run_equals_one_that_never_stopped(ranks):
    for rank in ranks:
        runs = rank["resumed"]
        for other in ("again", "resumed"):
            for states in zip(runs["once"][:2], runs[other][:2], strict=True):
                assert same_bits(*states)
            assert runs[other][2] == 7
        assert same_bits(runs["once"][0], ranks[0]["resumed"]["once"][0])


def test_a_network_learns(ranks):
    for rank in ranks:
        (dense, start), (topk, _) = rank["learned"]["dense"], rank["learned"]["topk"]
        assert dense < start / 3 and topk < start / 2


def test_accumulated_gradients_are_sent_once(ranks):
    for rank in ranks:
        (apart, stays), (together, also) = rank["accumulated"]
        for name in apart:
            torch.testing.assert_close(apart[name], together[name])
            torch.testing.assert_close(stays[name], also[name])


def test_unused_parameters(ranks):
    runs = [rank["unused"] for rank in ranks]
    for run in runs:
        assert run["applied"][2]["c"] is None and run["applied"][1]["c"] is not None
        assert torch.equal(run["stays"][2]["c"], run["stays"][1]["c"])
    for rank, run in enumerate(runs[1:], 1):
        # Used elsewhere: nothing of this rank's is sent, though its own shard may be sent on.
        changed = (run["stays"][1]["c"] != run["stays"][0]["c"]).nonzero()
        assert len(changed) < run["stays"][0]["c"].numel() / len(runs) + len(runs), rank
    for name in "abcdef":
        for steps in range(1, 5):
            assert_nothing_lost(runs, steps, name, 1e-6)


def test_options_of_ddp_change_nothing(ranks):
    for rank in ranks:
        plain, *others = rank["static"]
        for other in others:
            assert same_bits(plain[0], other[0]) and same_bits(plain[1], other[1])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_broken_gradient_is_seen_by_all(ranks, value):
    runs = []
    for rank in ranks:
        steps = rank["broken"][value]
        for step, (_, applied, stays) in enumerate(steps):
            for name in "abcdef":
                hit = step == 1 and name == "c"
                assert applied[name].isnan().all() if hit else applied[name].isfinite().all()
                assert stays[name].isfinite().all()
        runs.append(
            {"own": [s[0] for s in steps], "applied": [s[1] for s in steps], "stays": [s[2] for s in steps]}
        )
        # Only the offending gradient is gone: drop it, and that step's NaN, from the sum.
        runs[-1]["applied"][1]["c"] = None
    del runs[-1]["own"][1]["c"]
    for name in "abcdef":
        assert_nothing_lost(runs, 4, name, 1e-6)


def test_ranks_that_disagree(ranks):
    first = ranks[0]["disagreement"]
    assert "gradient_compression_ratio: 0.1 on rank 0, 0.2 on rank 1" in first[0] and "float64" in first[1]
    assert all(rank["disagreement"] == first for rank in ranks)


def test_hooks_of_pytorch(ranks):
    owns = [rank["others"]["own"] for rank in ranks]
    for rank in ranks:
        assert "deadlocks over gloo" in rank["others"]["powersgd"]
        for name in "abcdef":
            mean = mean_of(owns, name)
            assert torch.equal(rank["others"]["bf16"][name], rank["others"]["bf16"][name].bfloat16().float())
            torch.testing.assert_close(rank["others"]["bf16"][name].double(), mean, rtol=0.05, atol=0.05)
