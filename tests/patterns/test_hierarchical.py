"""Hierarchical: against the definition written with lists, against its own layout, and its budget."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import Case, runs
from sparsetile.distributed.plan import make_plan
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import PatternError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Causal, Hierarchical, Local, parse_pattern

SHARES = [0, 0.01, 0.05, 0.1, 1 / 3, 0.4, 0.5, 0.9, 1]


@st.composite
def hierarchical(draw: st.DrawFn) -> Hierarchical:
    ranks = draw(st.integers(1, 9))
    node = draw(st.sampled_from([None, *(n for n in range(1, ranks + 1) if ranks % n == 0)]))
    order = None
    if draw(st.booleans()):
        order = tuple(draw(st.permutations(range(ranks * draw(st.integers(1, 3))))))
    densities = [draw(st.sampled_from(SHARES) | st.floats(0, 1)) for _ in range(3)]
    return Hierarchical(ranks, node, *densities, causal=draw(st.booleans()), order=order)


def _kept(count: int, density: float) -> int:
    exact = Fraction(repr(float(density))).limit_denominator(2**20)
    return math.floor(exact * count + Fraction(1, 2))


def _rows(pattern: Hierarchical, tiles: int) -> list[set[int]]:
    """The key tiles of each query tile, as the docstring says."""
    sharding = Sharding(tiles * 16, pattern.ranks, 16, pattern.order)
    owner = sharding.tile_owner().tolist()
    node = [r // (pattern.ranks_per_node or pattern.ranks) for r in owner]
    rows = []
    for own in range(tiles):
        past = range(own + 1) if pattern.causal else range(tiles)
        mine = [t for t in past if owner[t] == owner[own]]
        most, at = max(1, _kept(len(mine), pattern.local_sparsity)), mine.index(own)
        chosen = {own}
        # The nearest in the order of the rank, the past one first.
        for step in range(1, tiles):
            for place in (at - step, at + step):
                if 0 <= place < len(mine) and len(chosen) < most:
                    chosen.add(mine[place])
        others = (
            ([t for t in past if node[t] == node[own] and owner[t] != owner[own]], pattern.global_sparsity),
            ([t for t in past if node[t] != node[own]], pattern.inter_node_sparsity),
        )
        for tiles_there, density in others:
            chosen |= {t for e, t in enumerate(tiles_there) if _kept(e + 1, density) > _kept(e, density)}
        rows.append(chosen)
    return rows


@runs(80)
@given(hierarchical(), st.integers(1, 40), st.sampled_from([16, 32]))
def test_definition(pattern, tiles, block):
    length = torch.arange(tiles) * block
    resolved = pattern.resolve(block, block, 0, tiles * block)
    allowed = resolved.allows(length[:, None] + block - 1, length[None, :])
    expected = torch.zeros(tiles, tiles, dtype=torch.bool)
    for row, columns in enumerate(_rows(pattern, tiles)):
        expected[row, list(columns)] = True
    assert torch.equal(allowed, expected)


@runs(80)
@given(hierarchical(), st.integers(1, 500), st.data())
def test_layout_agrees(pattern, k_len, data):
    block = data.draw(st.sampled_from([16, 16, 32, 64]))
    q_len = data.draw(st.just(k_len) | st.integers(1, 600))
    if data.draw(st.booleans()):
        pattern = pattern & data.draw(st.sampled_from([Causal(), Local(60)]))
    elif data.draw(st.booleans()):
        pattern = pattern | Local(20)
    case = Case(pattern, q_len, k_len, block, block)
    layout = BlockLayout.from_pattern(pattern, q_len, k_len, block_size=block)
    layout.validate()
    assert torch.equal(layout.to_dense(), case.dense())


def test_other_tiles_than_its_own():
    """Tiles of the layout that are none of the pattern's are asked pair by pair."""
    pattern = Hierarchical(4, 2, 0.5, 0.4, 0.3).resolve(32, 32, 0, 400)
    for blocks in ((16, 16), (64, 64), (32, 64), (16, 128)):
        layout = BlockLayout.from_pattern(pattern, 400, block_size=blocks)
        q = torch.arange(400)
        assert torch.equal(layout.to_dense(), pattern.allows(q[:, None], q))


@pytest.mark.parametrize("causal", [False, True])
def test_budget_and_what_travels(causal):
    """Each class keeps its density, and what crosses between nodes is one set of tiles a node."""
    sharding = Sharding.contiguous(16 * 512, 8, 16)
    pattern = sharding.hierarchical(0.5, 0.25, 0.125, ranks_per_node=4, is_causal=causal)
    layout = BlockLayout.from_pattern(pattern, sharding.length, block_size=16)
    counts = layout.row_counts().tolist()
    for own in (0, 63, 64, 300, 511):
        mine, node = own % 64 + 1, own % 256 // 64 * 64
        if causal:
            other = own // 256 * 256
            expected = max(1, _kept(mine, 0.5)) + _kept(node, 0.25) + _kept(other, 0.125)
        else:
            expected = 32 + _kept(192, 0.25) + _kept(256, 0.125)
        assert counts[own] == expected
    report = make_plan(layout, sharding, kv_heads=1, ranks_per_node=4).report(head_dim=1, itemsize=1)
    tile = 2 * 16
    nodes = report.crossing.reshape(2, 4).sum(1) // tile
    assert nodes.tolist() == ([0, 32] if causal else [32, 32])
    received = [(r % 4 * 16 + (32 if r > 3 else 0)) if causal else 48 + 32 for r in range(8)]
    assert (report.received // tile).tolist() == received


@runs(30)
@given(hierarchical())
def test_values(pattern):
    assert parse_pattern(repr(pattern)) == pattern
    assert parse_pattern(repr(pattern & Causal())) == pattern & Causal()
    resolved = pattern.resolve(16, 16, 0, 300)
    assert parse_pattern(repr(resolved)) == resolved
    resolved.allows(torch.arange(3), torch.arange(3))
    assert pickle.loads(pickle.dumps(resolved)) == resolved
    assert not pattern.needs_heads


def test_layout_of_many_tiles():
    """A million tokens on 64 ranks: whole tiles only, and each row at its budget."""
    layout = BlockLayout.from_pattern(Hierarchical(64, 8, 0.1, 0.01, 0.002), 1 << 20)
    assert layout.masks.shape[0] == 0
    assert set(layout.row_counts().tolist()) == {13 + 9 + 14}


@pytest.mark.parametrize(
    "values, name",
    [
        ({"ranks": 0}, "ranks"),
        ({"ranks": 2**21}, "ranks"),
        ({"ranks_per_node": 3}, "ranks_per_node"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"local_sparsity": 1.1}, "local_sparsity"),
        ({"global_sparsity": -0.1}, "global_sparsity"),
        ({"inter_node_sparsity": True}, "inter_node_sparsity"),
        ({"inter_node_sparsity": math.nan}, "inter_node_sparsity"),
        ({"causal": 1}, "causal"),
        ({"order": (0, 1, 2)}, "order"),
        ({"order": "0123"}, "order"),
        ({"block": 16}, "block, k_blocks"),
        ({"block": 16, "k_blocks": 0}, "k_blocks"),
    ],
)
def test_refused(values, name):
    with pytest.raises(PatternError, match=name):
        Hierarchical(**{"ranks": 4, **values})


def test_must_be_resolved():
    pattern = Hierarchical(4)
    with pytest.raises(PatternError, match="k_len"):
        pattern.resolve(16, 16)
    with pytest.raises(PatternError, match="square"):
        pattern.resolve(16, 32, 0, 100)
    with pytest.raises(PatternError, match="resolve"):
        pattern.allows(torch.arange(3), torch.arange(3))
