"""Sharding: every tile has one owner, chunks are even, positions follow the tiles."""

import random

import pytest
import torch

from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError


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
