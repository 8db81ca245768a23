"""Branches of dilated attention as patterns: the layout against the definition, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.errors import PatternError
from sparsetile.layout import BlockLayout
from sparsetile.patterns import Causal, Dilated, parse_pattern
from sparsetile.patterns.branches import NotInBranches, segments_of


def on_offset(tokens, length, rate, offset):
    return (tokens % length) % rate == offset


@st.composite
def drawn_branches(draw):
    heads = draw(st.sampled_from([1, 3]))
    branches = []
    for _ in range(draw(st.integers(2, 4))):
        length = draw(
            st.one_of(st.sampled_from([8, 16, 32, 64, 96]), st.integers(1, 20), st.integers(1, 150))
        )
        rate = min(length, draw(st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(1, 12))))
        offsets = tuple(draw(st.integers(0, rate - 1)) for _ in range(heads))
        branches.append((length, rate, offsets))
    length, rate, offsets = branches[-1]
    if length % rate:  # segments of equal size in the branch's own positions need one offset
        branches[-1] = (length, rate, offsets[:1] * heads)
    return branches[-1], tuple(branches[:-1]), draw(st.integers(1, 600)), draw(st.sampled_from([16, 32]))


def agrees(own, earlier, total, block):
    """Definition and layout of every head against a mask made of tokens."""
    length, rate, offsets = own
    pattern = NotInBranches(length, rate, offsets, earlier)
    assert parse_pattern(repr(pattern)) == pattern
    assert pattern.needs_heads == (len(offsets) > 1)
    everything = torch.arange(total)
    for head, offset in enumerate(offsets):
        tokens = everything[on_offset(everything, length, rate, offset)]
        if not len(tokens):
            continue
        p, t = tokens[:, None], tokens
        expected = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        for w, r, others in earlier:
            both = on_offset(p, w, r, others[head]) & on_offset(t, w, r, others[head])
            expected &= ~(both & (p // w == t // w))
        x = torch.arange(len(tokens))
        assert torch.equal(pattern.allows(x[:, None], x, head).expand(expected.shape), expected)
        layout = BlockLayout.from_pattern(
            pattern, len(tokens), block_size=block, heads=len(offsets) if pattern.needs_heads else None
        )
        layout.validate()
        assert torch.equal(layout.to_dense(head if layout.heads > 1 else 0), expected)


@runs(150)
@given(drawn_branches())
def test_layout_is_what_earlier_branches_leave(drawn):
    note(repr(drawn))
    agrees(*drawn)


@pytest.mark.parametrize(
    ("own", "earlier"),
    [
        # The rate divides the own one, but not its segments: their borders move it off its offset and on.
        ((600, 2, (0,)), ((15, 2, (1,)),)),
        ((600, 4, (1,)), ((37, 2, (0,)), (31, 4, (1,)))),
        # The own rate does not divide the own segments: uneven steps, at other places in every tile.
        ((7, 2, (0,)), ((5, 1, (0,)),)),
        ((10, 4, (0,)), ((6, 1, (0,)),)),
        ((25, 4, (3,)), ((8, 2, (1,)), (12, 4, (3,)))),
    ],
)
def test_rates_that_do_not_divide_the_segments(own, earlier):
    for block in (16, 32):
        agrees(own, earlier, 600, block)


def test_nested_branches_leave_few_masks():
    own = Dilated(128, 1, 1) & NotInBranches(8192, 64, (5,), ((2048, 16, (5,)), (512, 4, (1,)))) & Causal()
    layout = BlockLayout.from_pattern(own, 1 << 16, block_size=32)
    # 128 tokens a segment, 32 of them within one earlier segment: 4 · 5 / 2 tiles less the 4 on the diagonal.
    assert layout.nnz == (1 << 16) // 128 * 6
    assert layout.masks.shape[0] == 0


@pytest.mark.parametrize(
    ("lengths", "rates", "says"),
    [
        ([], [], "not empty"),
        ("16", [1], "two lists"),
        (16, [1], "two lists"),
        ([16], [1, 2], "as many rates"),
        ([16, 0], [1, 2], "from 1"),
        ([16, 16.0], [1, 2], "from 1"),
        ([16, True], [1, 1], "from 1"),
        ([16, 2**50], [1, 1], "from 1"),
        ([16, 8], [1, 9], "no rate above"),
    ],
)
def test_segments_refuse(lengths, rates, says):
    with pytest.raises(PatternError, match=says):
        segments_of(lengths, rates)


def test_segments_are_tuples():
    assert segments_of([16, 32], (1, 4)) == ((16, 32), (1, 4))


@pytest.mark.parametrize(("offsets", "other"), [((4,), (0,)), ((0, 1), (0,)), ((0,), (2,)), ((-1,), (0,))])
def test_offsets_below_the_rate_one_a_head(offsets, other):
    with pytest.raises(PatternError, match="offsets below the dilation rate"):
        NotInBranches(16, 4, offsets, ((8, 2, other),))
