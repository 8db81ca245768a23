"""Training over ranks that fail, stall and die: steps count on all ranks or on none, nobody hangs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsetile as st
from processes import run_ranks
from recovery_runs import BLOCK, CONFIG, LENGTH, Fault, Run, Tiny, alike, runs, schedule, survived
from sparsetile.distributed import Sharding
from sparsetile.distributed.recovery import Supervisor, _remote_tokens
from sparsetile.errors import ArgumentError, MismatchError

UNTIL = 5


@cache
def undisturbed(world: int = 3) -> list[Any]:
    return runs(world, Run(UNTIL))


def as_undisturbed(found: Sequence[Any], world: int = 3) -> bool:
    """Whether all ranks end with the very bits of a run without faults."""
    wanted = undisturbed(world)
    return len(found) == world and all(
        alike(a["last"], b["last"]) and a["loss"] == b["loss"] for a, b in zip(found, wanted, strict=True)
    )


def test_without_faults_it_is_plain_training() -> None:
    found = undisturbed()
    assert [each["step"] for each in found] == [UNTIL] * 3
    assert [each["attempts"] for each in found] == [[(step, 3) for step in range(UNTIL)]] * 3
    torch.manual_seed(100)
    before = Tiny().state_dict()
    for each in found:
        assert alike(each["last"]["model"], found[0]["last"]["model"])
        assert not any(torch.equal(before[name], x) for name, x in each["last"]["model"].items())


# A rank is lost.


@pytest.mark.parametrize(
    ("rank", "phase", "step"),
    [
        (0, "plan", 3),
        (1, "forward", 3),
        (2, "backward", 3),
        (0, "gradients", 3),
        (1, "vote", 3),
        (2, "after the vote", 3),
        (0, "optimizer", 3),
        (1, "state", 2),
        (2, "end", UNTIL - 1),
        (0, "forward", 0),
    ],
)
def test_survivors_of_a_killed_rank_go_on_as_a_smaller_world(rank: int, phase: str, step: int) -> None:
    survived(3, Run(UNTIL, [Fault(rank, step, phase, "kill")], every=2, timeout=3.0))


def test_the_last_survivor_goes_on_alone() -> None:
    faults = [Fault(0, 1, "backward", "kill"), Fault(1, 1, "forward", "kill"), Fault(3, 2, "forward", "kill")]
    survived(4, Run(4, faults, timeout=3.0))


def test_nodes_are_counted_anew_and_half_a_node_is_the_end() -> None:
    faults = [Fault(rank, 2, "forward", "kill") for rank in (1, 2)]
    survived(4, Run(4, faults, timeout=3.0, node=2))
    found = runs(4, Run(4, faults[:1], timeout=3.0, node=2))
    texts = {each["error"] for each in found if each is not None}
    assert len(texts) == 1 and "ranks_per_node: expected a divisor of 3 ranks, got 2" in texts.pop()


def test_a_rank_that_stalls_is_left_behind() -> None:
    run = Run(UNTIL, [Fault(1, 3, "forward", "stop", seconds=13.0)], every=2, timeout=3.0)
    late = survived(3, run)[1]
    assert late["error"].startswith("RankLostError") and "rank 0, rank 2" in late["error"]
    # Its tokens must not pass for a whole sequence.
    assert all(isinstance(ring, str) for ring in late["ring"])


def test_a_rank_that_is_slow_takes_part() -> None:
    found = runs(3, Run(UNTIL, [Fault(1, 3, "forward", "stop", seconds=5.0)], every=2, timeout=3.0))
    assert as_undisturbed(found)


@pytest.mark.parametrize(
    ("phase", "kind"),
    [("forward", "link"), ("backward", "link"), ("after the vote", "unheard"), ("after the end", "unheard")],
)
def test_broken_links_are_made_again(phase: str, kind: str) -> None:
    """A vote that one rank does not hear leaves the others a step ahead."""
    step = UNTIL - 1 if phase == "after the end" else 3
    found = runs(3, Run(UNTIL, [Fault(1, step, phase, kind)], every=2))
    assert as_undisturbed(found)
    assert phase == "after the end" or len(found[0]["attempts"]) > UNTIL


def test_links_that_break_every_time() -> None:
    found = runs(3, Run(UNTIL, [Fault(2, 2, "forward", "link", times=99)], again=True))
    assert len({each["error"] for each in found}) == 1 and "StepError: step 2" in found[0]["error"]
    assert found[0]["attempts"].count((2, 3)) == 5  # four in vain, and one after that
    assert as_undisturbed(found)


# Memory runs out.


def widest() -> int:
    """The most tokens that a rank of three receives in a call, from the tiles alone."""
    layout = st.BlockLayout.from_pattern(CONFIG.pattern(True), LENGTH, block_size=BLOCK)
    row, column = layout.rows_and_columns()
    owner = Sharding.contiguous(LENGTH, 3, BLOCK).tile_owner()
    away = [column[(owner[row] == rank) & (owner[column] != rank)].unique().numel() for rank in range(3)]
    return max(away) * BLOCK


@pytest.mark.parametrize(
    ("phase", "every"), [("plan", 1), ("forward", 2), ("backward", 1), ("vote", 2), ("optimizer", 2)]
)
def test_one_rank_without_memory_makes_all_stages_smaller(phase: str, every: int) -> None:
    found = runs(3, Run(UNTIL, [Fault(1, 3, phase, "memory")], every=every))
    half = widest() // 2 // BLOCK * BLOCK
    assert widest() > half >= BLOCK
    for each, wanted in zip(found, undisturbed(), strict=True):
        assert each["most"] == [half, half] and each["step"] == UNTIL
        assert torch.equal(each["last"]["random"], wanted["last"]["random"])
        for name, x in each["last"]["model"].items():
            assert alike(x, found[0]["last"]["model"][name])
            torch.testing.assert_close(x, wanted["last"]["model"][name], rtol=0, atol=1e-12)


def test_what_arrives_at_most_by_distance() -> None:
    """Asked for when there is no group."""
    config = st.DistributedSparseConfig(
        ranks_per_node=2, local_sparsity=0.5, global_sparsity=0.3, inter_node_sparsity=0.2
    )
    module = st.create_block_sparse_attention("distributed", distributed_config=config)
    where = Sharding.contiguous(4096, 4, 128)
    layout = st.BlockLayout.from_pattern(where.hierarchical(0.5, 0.3, 0.2, 2), 4096)
    row, column = layout.rows_and_columns()
    owner = where.tile_owner()
    away = [column[(owner[row] == rank) & (owner[column] != rank)].unique().numel() for rank in range(4)]
    assert max(away) > 0
    assert _remote_tokens(module, 4096, 4, (1024, 2, 2, False)) == max(away) * 128


def test_a_stage_of_one_tile_is_the_end() -> None:
    found = runs(3, Run(UNTIL, [Fault(1, 2, "backward", "memory", times=99)], every=2, again=True))
    halvings, now = 0, widest()
    while now > BLOCK:
        halvings, now = halvings + 1, max(BLOCK, now // 2 // BLOCK * BLOCK)
    assert halvings > 1 and found[0]["attempts"].count((2, 3)) == halvings + 2
    assert len({each["error"] for each in found}) == 1
    assert "StepError: step 2" in found[0]["error"] and "rank 1: OutOfMemoryError" in found[0]["error"]
    for each, wanted in zip(found, undisturbed(), strict=True):
        assert each["most"] == [BLOCK, BLOCK]
        assert alike(each["at"]["model"], wanted["starts"][2, 3]["model"])
        for name, x in each["last"]["model"].items():
            torch.testing.assert_close(x, wanted["last"]["model"][name], rtol=0, atol=1e-12)


# Something is wrong on one rank.


@pytest.mark.parametrize("phase", ["state", "plan", "backward", "gradients", "vote", "optimizer"])
def test_an_error_on_one_rank_is_one_on_all(phase: str) -> None:
    found = runs(3, Run(UNTIL, [Fault(1, 2, phase, "error")], again=True))
    assert len({each["error"] for each in found}) == 1
    assert found[0]["error"].startswith(
        "StepError: step 2: expected all 3 ranks to compute it, got rank 1: V"
    )
    assert [each["cause"] for each in found] == ["NoneType", "ValueError", "NoneType"]
    assert as_undisturbed(found)  # after they went on


@pytest.mark.parametrize("what", ["shape", "dtype", "layout"])
def test_wrong_arguments_on_one_rank_are_an_error_on_all(what: str) -> None:
    found = runs(3, Run(UNTIL, [Fault(1, 2, "arguments", what)], again=True))
    assert len({each["error"] for each in found}) == 1
    assert "ranks 0, 1, 2: MismatchError" in found[0]["error"]
    assert as_undisturbed(found)


# Faults drawn at random; soak.py has more of them.


@pytest.mark.parametrize("number", range(3))
def test_drawn_faults(number: int) -> None:
    seed = random.getrandbits(30)
    world, run = schedule(seed)
    print(f"seed {seed}: {world} ranks, {run}")
    survived(world, run)


# Arguments.


def refused(rank: int, world: int) -> None:
    store = dist.HashStore()
    torch.manual_seed(0)
    plain = Tiny()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    ring = torch.nn.Sequential(st.BlockSparseRingDilatedAttention(ring=dist.group.WORLD))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (plain, {"timeout": 0}, "seconds above 0"),
        (plain, {"timeout": 5.0, "every": 0}, "every"),
        (plain, {"timeout": 5.0, "step": -1}, "step"),
        (plain.state_dict(), {"timeout": 5.0}, "model"),
        (ring, {"timeout": 5.0}, "a group of its own"),
        (DistributedDataParallel(Tiny()), {"timeout": 5.0}, "a group of its own"),
    ]
    for model, settings, says in cases:
        with pytest.raises(ArgumentError, match=says):
            Supervisor(model, optimizer, store, **settings)
        if rank:  # an error of one is one of all
            model, settings = plain, {"timeout": 5.0}
        with pytest.raises(MismatchError, match=says):
            Supervisor(model, optimizer, store, **settings)
    with pytest.raises(MismatchError, match="every: 1 on rank 0, 2 on rank 1"):
        Supervisor(plain, optimizer, store, timeout=5.0, every=rank + 1)


def test_bad_arguments_are_refused_by_all() -> None:
    run_ranks(refused, 2)


def test_without_a_process_group_there_is_nothing_to_supervise() -> None:
    model = Tiny()
    with pytest.raises(ArgumentError, match="init_process_group"):
        Supervisor(model, torch.optim.SGD(model.parameters()), dist.HashStore(), timeout=5.0)
