"""Sharding: every tile has one owner, chunks are even, positions follow the tiles."""

import itertools
import random

import pytest
import torch

from sparsetile.distributed.sharding import Sharding, balance, choose_sharding, loads
from sparsetile.errors import ArgumentError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Causal, Full, Global, Local, Random


def _chunks(tiles: int, count: int) -> list[list[int]]:
    borders = [c * (tiles // count) + min(c, tiles % count) for c in range(count + 1)]
    return [list(range(borders[c], borders[c + 1])) for c in range(count)]


@pytest.mark.parametrize("kind", ["contiguous", "balanced", "dealt"])
def test_by_hand(kind):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(60):
        length, ranks, block = draw.randint(1, 900), draw.randint(1, 9), draw.choice([16, 32, 64, 128])
        tiles = -(-length // block)
        if kind == "contiguous":
            sharding, order = Sharding.contiguous(length, ranks, block), list(range(ranks))
        elif kind == "balanced":
            sharding = Sharding.balanced(length, ranks, block)
            order = [c for r in range(ranks) for c in (r, 2 * ranks - 1 - r)]
        else:
            order = list(range(ranks * draw.randint(1, 4)))
            draw.shuffle(order)
            sharding = Sharding(length, ranks, block, tuple(order))
        chunks, each = _chunks(tiles, len(order)), len(order) // ranks
        total = []
        for rank in range(ranks):
            mine = sorted(t for c in order[rank * each : (rank + 1) * each] for t in chunks[c])
            positions = [p for t in mine for p in range(t * block, min(t * block + block, length))]
            at = f"seed={seed} {sharding} rank={rank}"
            assert sharding.tiles_of(rank).tolist() == mine, at
            assert sharding.positions_of(rank).tolist() == positions, at
            assert sharding.tokens_of(rank) == len(positions), at
            assert sharding.tile_counts()[rank] == len(mine), at
            assert all(sharding.tile_owner()[t] == rank for t in mine), at
            assert [int(sharding.local_index()[t]) for t in mine] == list(range(len(mine))), at
            total += positions
        assert sorted(total) == list(range(length)), f"seed={seed} {sharding}"


def test_values():
    assert Sharding.contiguous(100, 4, 16) == Sharding(100, 4, 16)
    assert hash(Sharding.balanced(100, 4, 16)) == hash(Sharding.balanced(100, 4, 16))
    assert Sharding(100, 2, 16, [1, 0]).order == (1, 0)
    assert Sharding.contiguous(10, 3, 16).tokens_of(2) == 0
    assert Sharding.contiguous(10, 3, 16).positions_of(2).dtype == torch.int64


@pytest.mark.parametrize(
    "values, name",
    [
        ((0, 2, 16), "length"),
        ((64.0, 2, 16), "length"),
        ((64, 0, 16), "ranks"),
        ((64, True, 16), "ranks"),
        ((64, 2, 17), "block"),
        ((64, 2, 16, (0, 1, 2)), "order"),
        ((64, 2, 16, (0, 0)), "order"),
        ((64, 2, 16, ()), "order"),
        ((64, 2, 16, (0, 1.0)), "order"),
    ],
)
def test_refused(values, name):
    with pytest.raises(ArgumentError, match=name):
        Sharding(*values)
    if name == "ranks":
        with pytest.raises(ArgumentError, match=name):
            Sharding.balanced(*values[:3])


@pytest.mark.parametrize("rank", [-1, 2, "0"])
def test_unknown_rank(rank):
    with pytest.raises(ArgumentError, match="rank"):
        Sharding.contiguous(64, 2, 16).tiles_of(rank)


def test_loads():
    layout = BlockLayout.from_pattern(Random(0.2, by_head=True) & Causal(), 700, block_size=16, heads=3)
    sharding = Sharding.balanced(700, 4, 16)
    row, _ = layout.rows_and_columns()
    owner = sharding.tile_owner()[row % layout.q_blocks]
    assert loads(layout, sharding).tolist() == [int((owner == r).sum()) for r in range(4)]
    assert balance(torch.tensor([3, 1, 0, 0])) == 3.0
    assert balance(torch.zeros(4, dtype=torch.int64)) == 1.0


@pytest.mark.parametrize(
    "pattern, dealt",
    [
        (Full(), False),
        (Causal(), True),
        (Local(100) & Causal(), False),
        (Local(1000) & Causal(), False),
        # One row of tiles that sees everything is one rank's in any case.
        (Local(100) | Global(16), False),
    ],
)
def test_choice(pattern, dealt):
    layout = BlockLayout.from_pattern(pattern, 16 * 1024, block_size=16)
    chosen = choose_sharding(layout, 8)
    assert chosen == (Sharding.balanced if dealt else Sharding.contiguous)(16 * 1024, 8, 16)
    if dealt:
        assert balance(loads(layout, chosen)) < 1.01
    assert choose_sharding(layout, 8, threshold=8) == Sharding.contiguous(16 * 1024, 8, 16)
    assert choose_sharding(layout, 1).order is None


@pytest.mark.parametrize("cut", [Sharding.contiguous, Sharding.balanced])
@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (33, 4), (160, 3), (161, 5), (1000, 7)])
def test_runs_are_the_positions(cut, length, ranks):
    where = cut(length, ranks, 16)
    for rank in range(ranks):
        runs = where.runs_of(rank)
        found = [position for at, count in runs for position in range(at, at + count)]
        assert found == where.positions_of(rank).tolist()
        assert all(b[0] > a[0] + a[1] for a, b in itertools.pairwise(runs))  # runs are unbroken and apart
