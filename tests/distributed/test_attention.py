"""A sequence over several ranks against the single process: outputs, log-sum-exp and every gradient."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import Sharding, distributed_attention
from sparsetile.errors import ArgumentError, BackendError, MismatchError, RankLostError
from sparsetile.kernels import cpu, triton_backend
from sparsetile.kernels.select import BACKENDS
from spread_calls import BLOCK, Case, alone, on_rank
from witness import Witness


def drawn(seed: int) -> list[Case]:
    """Patterns × features, lengths that no number of ranks divides."""
    draw = random.Random(seed)
    patterns = [
        st.Local(20),
        st.Local(30) | st.Global(5),
        st.Random(0.2, seed=3, by_head=True),
        st.Full(),
        st.Strided(48, head_shift=16),
    ]
    cases = [
        Case(
            draw.getrandbits(30),
            pattern,
            draw.randrange(90, 260),
            heads=4,
            kv_heads=draw.choice([1, 2, 4]),
            is_causal=is_causal,
            order=draw.choice(["contiguous", "balanced"]),
            most=draw.choice([None, None, BLOCK, 3 * BLOCK]),
            padded=draw.random() < 0.4,
            dropout=draw.choice([0.0, 0.0, 0.3]),
            biased=draw.random() < 0.4,
        )
        for pattern in patterns
        for is_causal in (False, True)
    ]
    cases.append(Case(draw.getrandbits(30), st.Dilated(64, 2), draw.randrange(90, 200), 4, 2, most=BLOCK))
    return cases


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_world_size_computes_what_one_process_does(world: int) -> None:
    seed = random.getrandbits(30)
    cases = drawn(seed) if world < 8 else drawn(seed)[::4]
    expected = [alone(case) for case in cases]
    for rank, found in enumerate(run_ranks(on_rank, world, cases)):
        for case, want, got in zip(cases, expected, found, strict=True):
            for name, value in want.items():
                where = f"rank {rank}, {name}, {case}"
                close = torch.allclose(got[name], value, rtol=1e-10, atol=1e-10)
                assert close, f"{where}: off by {(got[name] - value).abs().max():.3g}"


def with_dropout(seed: int) -> list[Case]:
    """Key heads that share their tiles and that do not, kept tiles and tiles that are sent again."""
    again = {"keep": False}
    by_head = st.Random(0.3, seed=seed, by_head=True)
    return [
        Case(seed, st.Local(30) | st.Global(5), 200, 4, 2, is_causal=True, dropout=0.3, options=again),
        Case(seed, by_head, 230, 4, 2, order="balanced", most=2 * BLOCK, dropout=0.4),
        Case(seed, by_head, 230, 4, 4, padded=True, biased=True, dropout=0.2, options=again),
        Case(seed, by_head, 170, 4, 1, padded=True, is_causal=True, most=BLOCK, dropout=0.5),
        Case(seed, st.Anchored(96, 4, group_size=2), 211, 4, 2, padded=True, most=3 * BLOCK),
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_world_size_drops_and_pads_what_one_process_does(world: int) -> None:
    cases = with_dropout(random.getrandbits(30))
    expected = [alone(case) for case in cases]
    for case, want in zip(cases, expected, strict=True):
        plain = alone(replace(case, dropout=0.0, padded=False))
        assert all(not torch.equal(plain[name], value) for name, value in want.items() if name != "lse")
    for rank, found in enumerate(run_ranks(on_rank, world, cases)):
        for case, want, got in zip(cases, expected, found, strict=True):
            for name, value in want.items():
                close = torch.allclose(got[name], value, rtol=1e-10, atol=1e-10)
                assert close, f"rank {rank}, {name}, {case}"


def by_triton(rank: int, world: int, seed: int) -> None:
    """Its kernels, in their interpreter."""
    case = Case(seed, st.Anchored(64, 2, group_size=2), 60, 4, 2, padded=True, biased=True, dropout=0.4)
    case.dtype = torch.float32
    expected = alone(case)
    case.options["backend"] = "triton"
    for name, got in on_rank(rank, world, [case])[0].items():
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, for GPUs")
def test_triton_drops_and_pads_over_ranks() -> None:
    run_ranks(by_triton, 2, random.getrandbits(30))


def dropped_twice(rank: int, world: int) -> bool:
    x = torch.randn(1, 2, 2 * BLOCK, 8)
    one, other = (distributed_attention(x, x, x, st.Full(), block_size=BLOCK, dropout_p=0.5) for _ in "ab")
    return torch.equal(one, other)


def test_every_call_draws_anew() -> None:
    assert run_ranks(dropped_twice, 2) == [False, False]


def test_sixty_four_ranks() -> None:
    """In threads of one process; the tensors are drawn before, because threads share a generator."""
    case = Case(
        random.getrandbits(30), st.Local(60) | st.Global(10), 2000, 4, 2, True, "balanced", padded=True
    )
    expected, made, mask = alone(case), case.tensors(), case.mask()
    case.tensors = lambda: {name: x.detach().clone() for name, x in made.items()}  # type: ignore[method-assign]
    case.mask = lambda: mask  # type: ignore[method-assign]
    wrong: list[tuple[int, str]] = []

    def one(_: Any) -> None:
        rank = torch.distributed.get_rank()
        found = on_rank(rank, 64, [case])[0]
        wrong.extend(
            (rank, name)
            for name, want in expected.items()
            if not torch.allclose(found[name], want, rtol=1e-10, atol=1e-10)
        )

    spawn_threads_and_init_comms(one, world_size=64)(None)
    assert not wrong, f"{case.seed}: {wrong[:5]}"


def few_tokens(rank: int, world: int) -> None:
    """Ranks that hold nothing take part."""
    for options in ({}, {"ranks_per_node": 2}):
        case = Case(5, st.Local(40), 2 * BLOCK + 3, is_causal=True, padded=True, options=options)
        expected = alone(case)
        for name, got in on_rank(rank, world, [case])[0].items():
            torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10)


def test_ranks_without_tokens() -> None:
    run_ranks(few_tokens, 4)


def bits(rank: int, world: int) -> list[list[Tensor]]:
    case = Case(11, st.Local(40) | st.Global(16), 333, 4, 2, dtype=torch.float32, most=2 * BLOCK)
    return [list(on_rank(rank, world, [case])[0].values()) for _ in range(2)]


def test_the_same_bits_every_time_and_on_every_rank() -> None:
    first, *others = run_ranks(bits, 3)
    for found in (first[1], *(run[0] for run in others)):
        assert all(torch.equal(a, b) for a, b in zip(first[0], found, strict=True))


def half_precision(rank: int, world: int) -> None:
    options = {"ranks_per_node": 2} if world > 2 else {}
    case = Case(7, st.Local(60), 400, 4, 2, True, dtype=torch.bfloat16, most=BLOCK, options=options)
    expected = alone(case)
    for name, got in on_rank(rank, world, [case])[0].items():
        want = expected[name]
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < 2**-7, f"{name}: {error:.3g}"


@pytest.mark.parametrize("world", [2, 4])
def test_half_precision(world: int) -> None:
    run_ranks(half_precision, world)


def counted(rank: int, world: int, most: int | None) -> tuple[int, int]:
    """Bytes that the collectives of a forward brought this rank from others, and what the plan says."""
    received, plain = 0, torch.distributed.all_to_all_single

    def all_to_all(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal received
        splits = args[1]
        unit = output.nbytes // max(1, output.shape[0])
        received += unit * (sum(splits) - splits[rank])
        return plain(output, *args, **kwargs)

    torch.distributed.all_to_all_single = all_to_all
    case = Case(3, st.Local(40) | st.Global(16), 500, 4, 2, is_causal=True)
    made = case.tensors()
    where = Sharding.contiguous(case.length, world, BLOCK)
    q, k, v = (made[name].index_select(2, where.positions_of(rank)) for name in "qkv")
    distributed_attention(
        q, k, v, case.pattern, is_causal=True, block_size=BLOCK, enable_gqa=True, max_remote_tokens=most
    )
    # By hand: key tiles that this rank's rows attend and do not own, keys and values of all heads.
    layout = st.BlockLayout.from_pattern(case.pattern & st.Causal(), case.length, block_size=BLOCK)
    row, column = layout.rows_and_columns()
    owner = where.tile_owner()
    needed = column[(owner[row] == rank) & (owner[column] != rank)].unique().numel()
    return received, needed * 2 * 2 * 2 * BLOCK * 8 * 8


@pytest.mark.parametrize("most", [None, BLOCK])
def test_a_rank_receives_the_tiles_that_its_rows_attend_and_no_more(most: int | None) -> None:
    for received, needed in run_ranks(counted, 4, most):
        assert received == needed


def disagreeing(rank: int, world: int, what: str) -> str:
    case = Case(1, st.Local(40), 30 * BLOCK, 2, 2, dtype=torch.float32)
    where = Sharding.contiguous(case.length, world, BLOCK)
    made = case.tensors()
    q, k, v = (made[name].index_select(2, where.positions_of(rank)) for name in "qkv")
    pattern: Any = case.pattern
    settings: dict[str, Any] = {}
    if what == "backend":
        settings["backend"] = "cpu"
    if what == "bias":
        pattern = st.BlockLayout.from_pattern(st.Local(40), case.length, block_size=BLOCK)
        settings["tile_bias"] = torch.zeros(pattern.capacity).to([torch.float32, torch.float64][rank % 2])
    if rank == 1:
        if what == "pattern":
            pattern = st.Local(41)
        elif what == "layout":
            pattern = st.BlockLayout.from_pattern(st.Local(40), case.length, block_size=BLOCK)
        elif what == "shape":
            k = k[:, :, :-1]
        elif what == "dtype":
            q, k, v = q.double(), k.double(), v.double()
        elif what == "gradient":
            q = q.requires_grad_()
        elif what == "value gradient":
            v = v.requires_grad_()
        elif what == "setting":
            settings["scale"] = 0.3
        elif what == "dropout":
            settings["dropout_p"] = 0.3
        elif what == "no share":
            settings["dropout_p"] = 1.0
        elif what == "spelling":
            settings["block_size"] = str(BLOCK)
        elif what == "flag":
            settings["enable_gqa"] = torch.ones(2)
        elif what == "backend":
            cpu.why_not = lambda *_: "it is not here."
        elif what == "tokens":
            q, k, v = (x[:, :, :-BLOCK] for x in (q, k, v))
    try:
        distributed_attention(q, k, v, pattern, **{"block_size": BLOCK} | settings)
    except (MismatchError, ArgumentError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


_DIFFERENT = [
    "pattern",
    "layout",
    "shape",
    "dtype",
    "gradient",
    "value gradient",
    "setting",
    "dropout",
    "no share",
    "spelling",
    "flag",
]


@pytest.mark.parametrize("what", [*_DIFFERENT, "backend", "bias", "tokens"])
def test_ranks_that_differ_all_raise_the_same(what: str) -> None:
    texts = run_ranks(disagreeing, 3, what, seconds=60)
    assert len(set(texts)) == 1
    assert texts[0].startswith("ArgumentError: tokens" if what == "tokens" else "MismatchError"), texts[0]
    if what != "tokens":
        assert "rank 1" in texts[0] and "Nothing was sent" in texts[0]


def unserved(rank: int, world: int) -> str:
    """A backend that serves nobody here, in stages, and ranks without tokens."""
    x = torch.randn(1, 2, Sharding.contiguous(2 * BLOCK, world, BLOCK).tokens_of(rank), 8)
    with pytest.raises(BackendError) as raised:
        distributed_attention(x, x, x, st.Full(), block_size=BLOCK, backend="triton", max_remote_tokens=BLOCK)
    return str(raised.value)


def test_what_no_rank_can_do_is_the_error_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "why_not", lambda *_: "it is not here.")
    assert len(set(run_ranks(unserved, 4, seconds=60))) == 1


def named_reference(rank: int, world: int) -> None:
    """The dense backend, too, gives each part its share of the gradients."""
    plain = Case(9, st.Local(40), 150, 4, 2, padded=True, biased=True, most=2 * BLOCK)
    for case in (plain, *with_dropout(9)):
        expected = alone(case)
        case.options["backend"] = "reference"
        for name, got in on_rank(rank, world, [case])[0].items():
            torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10)


def test_the_reference_over_ranks() -> None:
    run_ranks(named_reference, 2)


def asked_of_backends(rank: int, world: int) -> list[set[bool]]:
    """In eager calls and in a compiled one, each of two parts: own tiles and received ones."""
    witness = Witness()
    BACKENDS["cpu"] = witness  # this process is a fork
    q, k, v = (torch.randn(1, 2, 2 * BLOCK, 8, requires_grad=True) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return distributed_attention(q, k, v, "Full()", block_size=BLOCK).square().sum()

    said = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.autograd.grad(call(q, k, v), (q, k, v))
        said.append(witness.said(parts=2))
    return said


def test_ranks_ask_for_gradients_that_are_the_same_bits_every_run() -> None:
    assert run_ranks(asked_of_backends, 2) == [[{True}] * 2] * 2


def first_in_inference_mode(rank: int, world: int) -> None:
    x = torch.randn(1, 2, 2 * BLOCK, 8, requires_grad=True)
    layout = st.BlockLayout.from_pattern(st.Full(), world * 2 * BLOCK, block_size=BLOCK)
    bias = torch.zeros(layout.capacity, requires_grad=True)
    with torch.inference_mode():
        distributed_attention(x, x, x, layout, tile_bias=bias, block_size=BLOCK)
    out = distributed_attention(x, x, x, layout, tile_bias=bias, block_size=BLOCK)
    assert all(grad.any() for grad in torch.autograd.grad(out.square().sum(), [x, bias]))


def test_training_after_a_call_in_inference_mode() -> None:
    run_ranks(first_in_inference_mode, 2)


def twice_derived(rank: int, world: int) -> None:
    x = torch.randn(1, 2, 2 * BLOCK, 8, dtype=torch.float64, requires_grad=True)
    out = distributed_attention(x, x, x, st.Full(), block_size=BLOCK)
    with pytest.raises(BackendError, match="no second derivative"):
        torch.autograd.grad(out.sum(), [x], create_graph=True)


def test_a_second_derivative_is_refused() -> None:
    run_ranks(twice_derived, 2)


def test_a_world_of_one_refuses_the_same_settings() -> None:
    x = torch.randn(1, 2, BLOCK, 8)
    for settings in ({"order": "ring"}, {"keep": 1}, {"ranks_per_node": 0}, {"ranks_per_node": 2.0}):
        with pytest.raises(ArgumentError, match=next(iter(settings))):
            distributed_attention(x, x, x, st.Full(), block_size=BLOCK, **settings)


def lost(rank: int, world: int, phase: str) -> str:
    """Rank 1 is killed; what the others raise."""
    case = Case(1, st.Full(), 6 * BLOCK, 2, 2, dtype=torch.float32)
    where = Sharding.contiguous(case.length, world, BLOCK)
    made = case.tensors()
    q, k, v = (made[name].index_select(2, where.positions_of(rank)).requires_grad_() for name in "qkv")
    if rank == 1:
        if phase == "exchange":
            torch.distributed.all_to_all_single = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        elif phase == "agreement":
            os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankLostError, match="start again") as raised:
        out = distributed_attention(q, k, v, case.pattern, block_size=BLOCK)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out.sum().backward()
    return str(raised.value)


@pytest.mark.parametrize("phase", ["agreement", "exchange", "backward"])
def test_survivors_of_a_killed_rank_raise(phase: str) -> None:
    texts = run_ranks(lost, 3, phase, seconds=60, killed={1})
    assert all("rank" in text for text in texts if text is not None)
    assert [text is None for text in texts] == [False, True, False]
