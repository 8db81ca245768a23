"""Two levels of exchange: one copy of a unit crosses to a node, and one sum of its gradients goes back."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import Plan, Sharding, distributed_attention, make_plan
from sparsetile.distributed.exchange import Exchange
from sparsetile.distributed.ranks import Ranks
from sparsetile.errors import ArgumentError, MismatchError, RankLostError
from spread_calls import BLOCK, Case, alone, on_rank


def over_nodes(seed: int, node: int) -> list[Case]:
    """Units of all kv heads and of each, kept tiles and tiles that are sent again, one stage and several."""
    draw = random.Random(seed)
    patterns = (
        st.Local(40) | st.Global(20),
        st.Random(0.3, seed=seed, by_head=True),
        st.Anchored(96, 4, group_size=2) | st.Global(17),
        st.Full(),
    )
    return [
        Case(
            draw.getrandbits(30),
            pattern,
            draw.randrange(200, 300),
            heads=4,
            kv_heads=2,
            is_causal=draw.random() < 0.5,
            order=draw.choice(["contiguous", "balanced"]),
            most=most,
            padded=draw.random() < 0.5,
            dropout=draw.choice([0.0, 0.2]),
            biased=draw.random() < 0.3,
            options={"ranks_per_node": node, "keep": draw.random() < 0.5},
        )
        for pattern in patterns
        for most in (None, draw.choice([BLOCK, 3 * BLOCK]))
    ]


@pytest.mark.parametrize(("world", "node"), [(4, 2), (8, 2), (8, 4), (6, 3)])
def test_nodes_compute_what_one_process_does(world: int, node: int) -> None:
    cases = over_nodes(random.getrandbits(30), node)
    expected = [alone(case) for case in cases]
    for rank, found in enumerate(run_ranks(on_rank, world, cases)):
        for case, want, got in zip(cases, expected, found, strict=True):
            for name, value in want.items():
                close = torch.allclose(got[name], value, rtol=1e-10, atol=1e-10)
                assert close, f"rank {rank}, {name}, {case}: off by {(got[name] - value).abs().max():.3g}"


def bits_over_nodes(rank: int, world: int) -> list[list[Tensor]]:
    options = {"ranks_per_node": 2}
    pattern = st.Random(0.4, seed=2, by_head=True) | st.Global(16)
    case = Case(12, pattern, 333, 4, 2, dtype=torch.float32, most=3 * BLOCK, padded=True, options=options)
    return [list(on_rank(rank, world, [case])[0].values()) for _ in range(2)]


def test_the_same_bits_every_time_over_nodes() -> None:
    first, *others = run_ranks(bits_over_nodes, 4)
    for found in (first[1], *(run[0] for run in others)):
        assert all(torch.equal(a, b) for a, b in zip(first[0], found, strict=True))


class Traffic:
    """Counts the bytes that collectives bring this rank from ranks of other nodes."""

    def __init__(self, rank: int, node: int) -> None:
        self.crossed = self.passed = 0
        self.plain, self.rank, self.node = torch.distributed.all_to_all_single, rank, node

    def __call__(self, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        unit = output.nbytes // max(1, output.shape[0])
        for sender, units in enumerate(args[1]):
            if sender // self.node != self.rank // self.node:
                self.crossed += unit * units
            elif sender != self.rank:
                self.passed += unit * units
        return self.plain(output, *args, **kwargs)

    def taken(self) -> tuple[int, int]:
        """(across nodes, within) since the last time."""
        found = self.crossed, self.passed
        self.crossed = self.passed = 0
        return found


def across_nodes(rank: int, world: int, case: Case, node: int) -> dict[str, tuple[int, int]]:
    """Bytes of a forward and of a backward, at two levels and at one."""
    made, traffic = case.tensors(), Traffic(rank, node)
    torch.distributed.all_to_all_single = traffic
    where = Sharding.contiguous(case.length, world, BLOCK)
    mine = where.positions_of(rank)
    q, k, v = (made[name].index_select(2, mine).requires_grad_() for name in "qkv")
    mask = case.mask()
    found = {}
    for level, ranks_per_node in ("two", node), ("one", None):
        out, _ = distributed_attention(
            q, k, v, case.pattern, max_remote_tokens=case.most, ranks_per_node=ranks_per_node,
            key_padding_mask=None if mask is None else mask[:, mine], **case.common(),
        )  # fmt: skip
        found[f"{level} forward"] = traffic.taken()
        torch.autograd.grad((out * made["grad"].index_select(2, mine)).sum(), (q, k, v))
        found[f"{level} backward"] = traffic.taken()
    return found


@pytest.mark.parametrize(("world", "node"), [(4, 2), (8, 4), (6, 3)])
@pytest.mark.parametrize("most", [None, 4 * BLOCK])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_one_copy_of_a_unit_crosses_to_a_node(
    world: int, node: int, most: int | None, by_head: bool, padded: bool
) -> None:
    seed = random.getrandbits(30)
    pattern = st.Random(0.4, seed=seed, by_head=by_head) | st.Global(20)
    case = Case(seed, pattern, 300, 4, 2, padded=padded, most=most)
    plan = Plan.from_pattern(
        pattern,
        Sharding.contiguous(case.length, world, BLOCK),
        kv_heads=2,
        group_size=2,
        ranks_per_node=node,
        max_remote_tokens=most,
    )
    report = plan.report(head_dim=8, itemsize=8, batch=2)
    # A byte a token and sequence beside keys and values of 8 float64, of one kv head or of both.
    marks = report.crossing // (2 * 8 * 8 * (1 if by_head else 2)) if padded else 0
    found = run_ranks(across_nodes, world, case, node)
    assert [each["two forward"][0] for each in found] == (report.crossing + marks).tolist()
    assert sum(each["two forward"][1] for each in found) > sum(each["one forward"][1] for each in found)
    # Each sum goes the way back of its unit: so many bytes in all as came, but for the mask.
    assert sum(each["two backward"][0] for each in found) == int(report.crossing.sum())
    for direction in ("forward", "backward"):
        two, one = (sum(each[f"{level} {direction}"][0] for each in found) for level in ("two", "one"))
        assert two < one


def order_of_stages(rank: int, world: int) -> list[str]:
    """When stages are begun, passed on and waited for."""
    said: list[str] = []

    def noted(name: str, plain: Any, number: Any) -> Any:
        def call(exchange: Exchange, *args: Any) -> Any:
            said.append(f"{name} {number(exchange, *args)}")
            return plain(exchange, *args)

        return call

    def of_stage(exchange: Exchange, _: Any, stage: Any) -> int:
        return exchange.plan.stages.index(stage)

    Exchange.start = noted("start", Exchange.start, lambda _, number: number)
    Exchange._pass_on = noted("pass on", Exchange._pass_on, of_stage)
    Exchange.finish = noted("finish", Exchange.finish, of_stage)
    x = torch.randn(1, 2, 2 * BLOCK, 8)
    distributed_attention(x, x, x, st.Full(), block_size=BLOCK, ranks_per_node=2, max_remote_tokens=3 * BLOCK)
    return said


def test_the_next_stage_does_not_wait_for_what_is_passed_on() -> None:
    for said in run_ranks(order_of_stages, 4):
        assert said == ["start 0", "pass on 0", "start 1", "finish 0", "pass on 1", "start 2", "finish 1"]


def wrong_nodes(rank: int, world: int, each: tuple[Any, ...]) -> str:
    x = torch.randn(1, 2, BLOCK, 8)
    try:
        distributed_attention(x, x, x, st.Full(), block_size=BLOCK, ranks_per_node=each[rank])
    except (MismatchError, ArgumentError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("each", "says"),
    [
        ((3, 3, 3, 3), "ArgumentError: ranks_per_node: expected a divisor of 4 ranks, got 3"),
        ((8, 8, 8, 8), "ArgumentError: ranks_per_node: expected a divisor of 4 ranks, got 8"),
        ((0, 0, 0, 0), "ArgumentError: ranks_per_node: expected None or an integer"),
        ((True, True, True, True), "ArgumentError: ranks_per_node: expected None or an integer"),
        ((2, 2, 4, 2), "MismatchError: distributed call: expected the same"),
        ((2, None, 2, 2), "MismatchError: distributed call: expected the same"),
        ((2, "2", 2, 2), "MismatchError: distributed call: expected arguments that all 4"),
    ],
)
def test_all_ranks_refuse_nodes_that_cannot_be(each: tuple[Any, ...], says: str) -> None:
    texts = run_ranks(wrong_nodes, 4, each, seconds=60)
    assert len(set(texts)) == 1 and texts[0].startswith(says), texts


def summed(rank: int, world: int, by_head: bool) -> Tensor:
    """What comes back if a unit's receiver from another node returns 256, and those it passed it on to 1."""
    where = Sharding.contiguous(2 * world * BLOCK, world, BLOCK)
    pattern = st.Random(1.0, seed=0, by_head=True) if by_head else st.Full()
    layout = st.BlockLayout.from_pattern(pattern, where.length, block_size=BLOCK, heads=2)
    plan = make_plan(layout, where, kv_heads=2, ranks_per_node=world // 2).for_rank(rank)
    x = torch.zeros(1, 2, 2 * BLOCK, 8, dtype=torch.bfloat16)
    exchange = Exchange(plan, Ranks.of(None), BLOCK, x, x, None)
    (stage,) = plan.stages
    exchange.advance(exchange.start(0), 0)
    assert stage.forward is not None and stage.tiles.shape[0] == 1 + by_head
    each = torch.zeros(stage.tiles.numel(), dtype=torch.bfloat16)
    far = where.tile_owner()[stage.recv_units[:, 0]] // (world // 2) != rank // (world // 2)
    each[stage.slots[far]], each[stage.forward.slots] = 256.0, 1.0
    dk = each.view(-1, stage.width).repeat_interleave(BLOCK, 1)[None, :, :, None].expand(1, 2, -1, 8)
    exchange.send_back(stage, dk, -dk)
    exchange.send_on()
    total = exchange.zeros()
    exchange.add_back(total)
    return total


@pytest.mark.parametrize("by_head", [False, True])
def test_gradients_of_a_node_are_added_in_fp32(by_head: bool) -> None:
    """256 + 1 is 256 in bf16; 256 + 1 + 1 + 1, rounded once, is 260."""
    for total in run_ranks(summed, 8, by_head):
        assert total.dtype == torch.float32
        assert (total[:, :, 0] == 260).all() and (total[:, :, 1] == -260).all()


def lost(rank: int, world: int, phase: str) -> str:
    """Rank 1 is killed in one of the exchanges within nodes; what the others raise."""
    x = torch.randn(1, 2, 2 * BLOCK, 8, requires_grad=True)
    if rank == 1:
        setattr(Exchange, phase, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RankLostError, match="start again") as raised:
        out = distributed_attention(x, x, x, st.Full(), block_size=BLOCK, ranks_per_node=2)
        out.sum().backward()
    return str(raised.value)


@pytest.mark.parametrize("phase", ["_pass_on", "send_on"])
def test_survivors_of_a_rank_that_was_to_pass_on_raise(phase: str) -> None:
    texts = run_ranks(lost, 4, phase, seconds=60, killed={1})
    assert [text is None for text in texts] == [False, True, False, False]
