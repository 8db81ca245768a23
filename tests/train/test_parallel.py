"""Training over ranks is training in one process: the same losses, weights and checkpoints."""

from __future__ import annotations

import functools
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import run_ranks
from sparsetile.distributed.ranks import Ranks
from sparsetile.errors import ArgumentError, CheckpointError, MismatchError, RankLostError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.patterns import Causal, parse_pattern
from sparsetile.train.arms import Arm
from sparsetile.train.checkpoint import load_checkpoint
from sparsetile.train.data import Corpus, Planting
from sparsetile.train.loop import Settings, Trainer
from sparsetile.train.model import ModelConfig, token_shift
from sparsetile.train.parallel import Parallel, Tokens, grid, joined

SEED = random.SystemRandom().randrange(1 << 32)
CPU = torch.device("cpu")
# A window is dealt in order, attention to everything an early and a late chunk to each rank.
WINDOW = Arm("pattern", "Local(20)")
FULL = Arm("pattern", "Full()")
STRIDED = Arm("pattern", "Local(16) | Strided(32, head_shift=16)")
SETTINGS = Settings(
    model=ModelConfig(2, 32, 2, 1),
    context=250,
    batch=4,
    block=16,
    lr=0.01,
    seed=SEED,
    device="cpu",
    dtype="fp32",
    planting=Planting(16, 40, 0.25),
    held_out_sequences=2,
    steps=30,
)
CORPUS = Corpus(
    torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 200), dtype=torch.uint8),
    torch.frombuffer(bytearray(b"pack my box with five dozen liquor jugs. " * 50), dtype=torch.uint8),
    "a fox",
    "fox",
)
# Sums of float32 in another order; the worst of twelve seeds and patterns was 8e-7 over 30 steps.
CLOSE = 1e-5


def silent(event: dict[str, Any]) -> None:
    pass


def bits_of(trainer: Trainer) -> list[float]:
    return [bits for _, _, bits in trainer.losses]


@functools.cache
def alone(arm: Arm, settings: Settings) -> tuple[list[float], dict[str, Any]]:
    trainer = Trainer(arm, settings, CORPUS)
    result = trainer.run(silent)
    return bits_of(trainer), result["held_out"]


def assert_close(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_close(got[name], want[name])
    else:
        assert got == pytest.approx(want, rel=CLOSE, abs=1e-6), SEED


def over_ranks(
    rank: int, world: int, cp: int, arm: Arm, settings: Settings
) -> tuple[list[float], dict[str, Any], list[torch.Tensor], bool]:
    parallel = grid(cp)
    trainer = Trainer(arm, settings, CORPUS, parallel)
    trainer.resume()
    result = trainer.run(silent)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    dealt = trainer.tokens is not None and trainer.tokens.where.order is not None
    assert result["tokens_per_second"] > 0 and result["peak_memory"] > 0
    assert parallel.first == (rank == 0)
    return bits_of(trainer), result["held_out"], weights, dealt


@pytest.mark.parametrize(
    ("world", "cp", "arm", "dealt"),
    [
        (2, 2, WINDOW, False),
        (2, 2, FULL, True),
        (3, 3, STRIDED, None),
        (4, 2, FULL, True),
        (2, 1, STRIDED, False),
        # More rows than held-out sequences.
        (4, 1, Arm("dense", "dense"), False),
    ],
    ids=lambda value: value.attention if isinstance(value, Arm) else str(value),
)
def test_ranks_train_what_one_process_trains(world: int, cp: int, arm: Arm, dealt: bool | None) -> None:
    losses, held_out = alone(arm, SETTINGS)
    ranks = run_ranks(over_ranks, world, cp, arm, SETTINGS)
    for of_rank in ranks:
        assert_close(of_rank[0], losses)
        assert_close(of_rank[1], held_out)
        assert all(map(torch.equal, of_rank[2], ranks[0][2])), SEED
        assert dealt is None or of_rank[3] == dealt
    # It learns, so the losses are of more than the start.
    assert losses[-1] < 0.8 * losses[0], SEED


def test_bfloat16_travels() -> None:
    settings = replace(SETTINGS, dtype="bf16", steps=5)
    losses, _ = alone(STRIDED, settings)
    for of_rank in run_ranks(over_ranks, 2, 2, STRIDED, settings):
        assert of_rank[0] == pytest.approx(losses, rel=0.02), SEED


def over_nodes(rank: int, world: int, nodes: list[int], cp: int) -> tuple[int | None, list[float]]:
    """``nodes``: what torchrun says to each rank of how many its node holds."""
    os.environ["LOCAL_WORLD_SIZE"] = str(nodes[rank])
    parallel = grid(cp)
    trainer = Trainer(STRIDED, replace(SETTINGS, steps=5), CORPUS, parallel)
    assert trainer.tokens is not None and trainer.tokens.node == parallel.node
    trainer.run(silent)
    return parallel.node, bits_of(trainer)


@pytest.mark.parametrize(
    ("nodes", "cp", "node"),
    [
        ([2, 2, 2, 2], 4, 2),  # a row covers two nodes
        ([2, 2, 2, 2], 2, None),  # a row is a node
        ([4, 4, 4, 4], 2, None),
        ([1, 3, 3, 3], 4, None),  # nodes of unlike sizes
    ],
)
def test_a_row_that_covers_several_nodes_knows_them(nodes: list[int], cp: int, node: int | None) -> None:
    losses, _ = alone(STRIDED, replace(SETTINGS, steps=5))
    for found, of_rank in run_ranks(over_nodes, 4, nodes, cp):
        assert found == node
        assert_close(of_rank, losses)


def shifted_over_ranks(rank: int, world: int, text: str, length: int) -> bool:
    layout = BlockLayout.from_pattern(parse_pattern(text) & Causal(), q_len=length, block_size=16)
    here = Tokens(layout, Ranks.of(None), CPU)
    assert torch.equal(here.positions, here.where.positions_of(rank))
    torch.manual_seed(SEED)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 2, length, 8, dtype=torch.float64)
    want = token_shift(x)
    expected = torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, want, strict=True)), x)[0]
    got = here.shifted(here.own(x))
    for mine, whole in zip(got, want, strict=True):
        assert torch.equal(mine, here.own(whole)), SEED
    loss = sum((here.own(w) * y).sum() for w, y in zip(weights, got, strict=True))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, rtol=1e-12, atol=1e-12)
    return here.where.order is not None


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("text", ["Local(20)", "Full()"])
def test_the_token_shift_reaches_tokens_of_other_ranks(world: int, text: str) -> None:
    least = 16 * (world - 1) + 1
    for length in (least, random.Random(SEED).randrange(least, 300)):
        run_ranks(shifted_over_ranks, world, text, length)


@pytest.mark.parametrize("first", [1, 2])
def test_checkpoints_go_on_with_another_number_of_ranks(tmp_path: Path, first: int) -> None:
    losses, _ = alone(STRIDED, SETTINGS)
    path = str(tmp_path / "run.pt")
    settings = replace(SETTINGS, checkpoint=path)
    for ranks, resume, stop in ((first, False, 11), (3 - first, True, None)):
        saved = run_ranks(part_of_a_run, ranks, replace(settings, resume=resume), stop)
    assert_close(saved[0], losses)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"] and load_checkpoint(Path(path))["step"] == 30


def part_of_a_run(rank: int, world: int, settings: Settings, stop: int | None) -> list[float]:
    parallel = grid(world)
    trainer = Trainer(STRIDED, settings, CORPUS, parallel)
    trainer.resume()
    trainer.run(silent, stop)
    return bits_of(trainer)


def resumed_bit_by_bit(rank: int, world: int, path: str) -> None:
    settings = replace(SETTINGS, steps=8, checkpoint=path)
    parallel = grid(2)
    whole = Trainer(STRIDED, settings, CORPUS, parallel)
    whole.run(silent)
    Trainer(STRIDED, settings, CORPUS, parallel).run(silent, 4)
    # The file is read by the first rank alone: it may be on that rank's disk.
    again = replace(settings, resume=True, checkpoint=path if rank == 0 else "/nowhere/run.pt")
    parts = Trainer(STRIDED, again, CORPUS, parallel)
    parts.resume()
    assert parts.step == 4
    parts.run(silent)
    assert bits_of(parts) == bits_of(whole), SEED


def test_a_resumed_run_over_ranks_is_the_run(tmp_path: Path) -> None:
    run_ranks(resumed_bit_by_bit, 2, str(tmp_path / "run.pt"))


def by_the_clock(rank: int, world: int) -> list[list[float]]:
    parallel = grid(1)
    trainer = Trainer(STRIDED, replace(SETTINGS, steps=None, seconds=0.5), CORPUS, parallel)
    if rank == 1:
        # Its own clock is behind; all go by the slowest.
        train_step = trainer.train_step
        trainer.train_step = lambda: (time.sleep(0.05), train_step())[1]  # type: ignore[method-assign]
    trainer.run(silent)
    return trainer.losses


def test_ranks_with_clocks_of_their_own_stop_together() -> None:
    first, second = run_ranks(by_the_clock, 2)
    assert first == second and first[-1][1] >= 0.5 and first[0][1] >= 0.05


def lost(rank: int, world: int) -> str:
    parallel = grid(2)
    trainer = Trainer(STRIDED, SETTINGS, CORPUS, parallel)
    trainer.train_step()
    if rank == 1:
        os._exit(1)
    with pytest.raises(RankLostError) as raised:
        trainer.run(silent)
    return str(raised.value)


def test_a_rank_that_dies_ends_the_others() -> None:
    start = time.monotonic()
    assert "expected all ranks" in run_ranks(lost, 2, killed=[1])[0]
    assert time.monotonic() - start < 50


def unwritable(rank: int, world: int, path: str) -> None:
    parallel = grid(2)
    trainer = Trainer(STRIDED, replace(SETTINGS, steps=1, checkpoint=path), CORPUS, parallel)
    with pytest.raises(CheckpointError if rank == 0 else RankLostError):
        trainer.run(silent)


def test_a_checkpoint_that_cannot_be_written_ends_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run_ranks(unwritable, 2, str(tmp_path / "file" / "run.pt"))


def not_finite(rank: int, world: int) -> None:
    parallel = grid(2)
    trainer = Trainer(STRIDED, SETTINGS, CORPUS, parallel)
    if rank == 1:
        with torch.no_grad():
            trainer.model.embed.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.run(silent)


def test_a_loss_that_is_no_number_on_one_rank_ends_all() -> None:
    run_ranks(not_finite, 2)


def told(rank: int, world: int, path: str) -> tuple[str, str, str]:
    parallel = grid(2)
    with pytest.raises(CheckpointError) as missing:
        parallel.of_first(lambda: load_checkpoint(Path(path)))

    def make() -> int:
        if rank == 1:
            raise PermissionError("not here")
        return 3

    with pytest.raises(MismatchError, match="rank 1: PermissionError") as one:
        parallel.agreed(make, lambda made: {"made": made})
    with pytest.raises(MismatchError, match="made: 0 on rank 0, 1 on rank 1") as other:
        parallel.agreed(lambda: rank, lambda made: {"made": made})
    assert parallel.agreed(lambda: 5, lambda made: {"made": made}) == 5
    assert parallel.of_first(lambda: rank) == 0 and parallel.most(rank) == 1
    return str(missing.value), str(one.value), str(other.value)


def test_what_one_rank_knows_all_are_told() -> None:
    first, second = run_ranks(told, 2, "/nowhere/run.pt")
    assert first == second and "/nowhere/run.pt" in first[0]


LEARNED = Arm("adaptive", "adaptive(…)", AdaptiveConfig(0.6, block_size=16))


@pytest.mark.parametrize(
    ("arm", "grid", "change", "says"),
    [
        (LEARNED, (2, 1), {}, r"one process, got 2.*--attention PATTERN"),
        (Arm("dense", "dense"), (1, 2), {}, r"got dense attention.*Full\(\)"),
        (WINDOW, (1, 3), {"context": 32}, r"got 2 in 32 bytes with tiles of 16"),
        (WINDOW, (3, 1), {"batch": 4}, r"--batch 4: expected a multiple of 3.*--batch 6"),
    ],
)
def test_what_cannot_be_spread_says_what_can(
    arm: Arm, grid: tuple[int, int], change: dict[str, Any], says: str
) -> None:
    dp, cp = grid
    parallel = Parallel(Ranks(None, 0, dp * cp), Ranks(None, 0, dp), Ranks(None, 0, cp))
    with pytest.raises(ArgumentError, match=says):
        Trainer(arm, replace(SETTINGS, **change), CORPUS, parallel)


def three(rank: int, world: int) -> int:
    with pytest.raises(SystemExit) as stop:
        joined(2, "cpu", lambda _: None)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_number_of_processes_that_does_not_fit(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(three, 3) == [2, 2, 2]
    said = capfd.readouterr().err
    assert said.count("--context-parallel 2: expected a number of processes that 2 divides, got 3") == 1
    with pytest.raises(ArgumentError, match=r"got 1\. Start torchrun --nproc-per-node 2 -m sparsetile train"):
        joined(2, "cpu", lambda _: None)


def test_one_process_is_a_grid_of_one() -> None:
    parallel = joined(1, "cpu", lambda parallel: parallel)
    assert parallel.first and parallel.rows(4) == range(4)
    assert parallel.most(2.5) == 2.5 and parallel.of_first(lambda: 7) == 7
