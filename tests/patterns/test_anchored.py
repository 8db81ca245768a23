"""Anchored dilation against its definition in plain integers, its layout, and what a rank then receives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.distributed.plan import Plan
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import PatternError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Anchored, Causal, Dilated, Local, parse_pattern


@runs(60)
@given(st.data())
def test_definition_and_layout(data):
    draw = data.draw
    block = draw(st.sampled_from([16, 32]))
    unit = draw(st.sampled_from(["token", "block", 5, 16, 50]))
    segment, rate, group = draw(st.integers(1, 500)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    pattern = Anchored(segment, rate, unit, group)
    k_len, q_len, heads = draw(st.integers(1, 400)), draw(st.integers(1, 400)), draw(st.integers(1, 5))
    u = {"token": 1, "block": block}.get(unit, unit)
    layout = BlockLayout.from_pattern(pattern, q_len, k_len, block_size=block, heads=heads)
    layout.validate()
    joined = (Local(30) | pattern) & Causal()
    causal = BlockLayout.from_pattern(joined, q_len, k_len, block_size=block, heads=heads)
    offset = k_len - q_len
    q = torch.arange(offset, offset + q_len)[:, None]
    k = torch.arange(k_len)
    for head in range(heads):
        same = torch.div(q, segment, rounding_mode="floor") == torch.div(k, segment, rounding_mode="floor")
        expected = same & (k // u % rate == head // group % rate)
        assert torch.equal(pattern.resolve(block, block).allows(q, k, head), expected)
        assert torch.equal(layout.to_dense(min(head, layout.heads - 1)), expected)
        expected = (expected | ((q - k).abs() <= 30)) & (k <= q)
        assert torch.equal(causal.to_dense(min(head, causal.heads - 1)), expected)


def test_a_rank_receives_its_share():
    """Row-congruent dilation needs every key of the segment on every rank, anchored one in `rate`."""
    length, rate = 16 * 1024, 8
    sharding = Sharding.contiguous(length, 8, 16)
    anchored = Plan.from_pattern(Anchored(length, rate, group_size=2), sharding, kv_heads=8, group_size=2)
    dilated = Plan.from_pattern(Dilated(length, rate), sharding, kv_heads=8, group_size=2)
    assert anchored.layout.density == dilated.layout.density
    got, everything = (plan.report(head_dim=64) for plan in (anchored, dilated))
    assert torch.equal(everything.received, everything.circulated)
    assert torch.equal(got.received * rate, everything.received)
    assert got.excess == 1.0


def test_values():
    pattern = Anchored(4096, 4, group_size=2)
    assert parse_pattern(repr(pattern)) == pattern
    assert pattern.needs_heads and not Anchored(4096, 1).needs_heads
    # Rates beyond the sequence: head 0 keeps the first unit alone.
    far = Anchored(1 << 40, 1 << 48, 1)
    layout = BlockLayout.from_pattern(far, 40, block_size=16, heads=2)
    assert layout.to_dense(0).nonzero()[:, 1].unique().tolist() == [0]
    assert layout.to_dense(1).nonzero()[:, 1].unique().tolist() == [1]


@pytest.mark.parametrize("name", ["segment_length", "dilation_rate", "group_size", "unit"])
def test_refused(name):
    with pytest.raises(PatternError, match=name):
        Anchored(**{"segment_length": 8, "dilation_rate": 2, name: 0})
