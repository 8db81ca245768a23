"""Runs of tokens that have ended: the definition, and the layout against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.errors import PatternError
from sparsetile.layout import BlockLayout
from sparsetile.patterns import parse_pattern
from sparsetile.patterns.ended import Ended


@runs(60)
@given(
    st.sampled_from([1, 3, 16, 128, 200]),
    st.integers(1, 700),
    st.integers(1, 3000),
    st.sampled_from([(16, 16), (128, 128), (32, 128), (64, 16)]),
)
def test_a_key_is_seen_from_the_last_token_of_its_run_on(step, q_len, tokens, blocks):
    keys = -(-tokens // step)
    pattern = Ended(step, tokens - keys)
    assert parse_pattern(repr(pattern)) == pattern
    at = torch.arange(q_len)[:, None] + tokens - q_len  # tokens at which the queries stand
    expected = torch.arange(keys) * step + step - 1 <= at
    layout = BlockLayout.from_pattern(pattern, q_len, keys, blocks)
    layout.validate()
    assert torch.equal(layout.to_dense(), expected)
    q = torch.arange(q_len)[:, None] + keys - q_len
    assert torch.equal(pattern.allows(q, torch.arange(keys)), expected)


def test_few_masks_however_long():
    # One for each place of the edge in a tile, and one more where a query of the tile ends a run.
    layout = BlockLayout.from_pattern(Ended(128, 2**20 - 2**13), 2**20, 2**13)
    assert len(layout.masks) <= 129 and layout.nnz == sum(-(-(i + 1) // 128) for i in range(2**13))


@pytest.mark.parametrize("make", [lambda: Ended(0), lambda: Ended(4, 0.5), lambda: Ended(True)])
def test_impossible_parameters(make):
    with pytest.raises(PatternError, match=r"expected .*, got .*\. \S"):
        make()
