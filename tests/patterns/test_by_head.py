"""ByHead gives each head its own pattern, and text brings it back."""

import pickle

import pytest
import torch

from sparsetile import (
    BlockLayout,
    Budget,
    ByHead,
    Causal,
    Global,
    Local,
    LogStrided,
    Random,
    Strided,
    parse_pattern,
    sparse_attention,
)
from sparsetile.errors import LayoutError, PatternError

FOUR = (Local(20, 0), Local(2, 0, unit=16) | Global(9), Strided(48, 16) & Local(90), LogStrided(2, 16))


@pytest.mark.parametrize("block", [16, 32])
def test_each_head_has_the_tiles_of_its_pattern(block):
    layout = BlockLayout.from_pattern(ByHead(FOUR) & Causal(), 210, 333, block, heads=4)
    layout.validate()
    for head, own in enumerate(FOUR):
        alone = BlockLayout.from_pattern(own & Causal(), 210, 333, block)
        assert torch.equal(layout.to_dense(head), alone.to_dense())


def test_children_that_differ_by_head_are_told_which_one_they_serve():
    random = Random(0.2, unit="token", by_head=True)
    layout = BlockLayout.from_pattern(ByHead([random, Local(3), random]), 200, block_size=32, heads=3)
    alone = BlockLayout.from_pattern(random, 200, block_size=32, heads=3)
    for head in (0, 2):
        assert torch.equal(layout.to_dense(head), alone.to_dense(head))


def test_attention_by_head_is_each_heads_own():
    q = torch.randn(2, 4, 150, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 150, 16, dtype=torch.float64).unbind(0)
    out = sparse_attention(q, k, v, ByHead(FOUR), is_causal=True, block_size=32, enable_gqa=True)
    for head, own in enumerate(FOUR):
        pick = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        alone = sparse_attention(
            q[:, pick[0]], k[:, pick[1]], v[:, pick[1]], own, is_causal=True, block_size=32
        )
        torch.testing.assert_close(out[:, pick[0]], alone, rtol=0, atol=1e-12)


def test_is_a_value():
    one = ByHead([*FOUR, Budget("local_window", 0.25, causal=True)])
    assert parse_pattern(repr(one)) == one
    assert parse_pattern(repr(one & Causal())) == one & Causal()
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != ByHead(reversed(one.patterns))


@pytest.mark.parametrize("raw", [(), "Local(3)", [Local(3), 4], Local(3)])
def test_refuses_what_is_no_list_of_patterns(raw):
    with pytest.raises(PatternError, match="one Pattern for each query head"):
        ByHead(raw)


def test_refuses_another_number_of_heads():
    with pytest.raises(PatternError, match="expected 3 patterns"):
        BlockLayout.from_pattern(ByHead(FOUR), 100, heads=3)
    with pytest.raises(LayoutError, match="the number of query heads"):
        BlockLayout.from_pattern(ByHead(FOUR), 100)


def test_equal_patterns_are_built_once(monkeypatch):
    built = []
    cover = Local.cover
    monkeypatch.setattr(Local, "cover", lambda self, *given: (built.append(self), cover(self, *given))[1])
    BlockLayout.from_pattern(ByHead([Local(16) | Global(1), Local(32) | Global(1)] * 8), 400, heads=16)
    assert len(built) == 2
