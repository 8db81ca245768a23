"""Rounding outward to whole tiles against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs, simple
from sparsetile.errors import PatternError
from sparsetile.layout import BlockLayout
from sparsetile.patterns import Causal, Full, Local


@runs(40)
@given(st.data(), st.sampled_from([(16, 16), (16, 32), (64, 16)]), st.integers(-70, 70), st.integers(0, 2))
def test_a_tile_with_any_allowed_pair_is_whole(data, blocks, offset, head):
    block_q, block_k = blocks
    inner = data.draw(simple(192, block_q if block_q == block_k else None))
    q, k = torch.arange(offset, offset + 192)[:, None], torch.arange(192)
    pairs = inner.resolve(block_q, block_k, offset, 192).allows(q, k, head).expand(192, 192)
    tiles = pairs.reshape(192 // block_q, block_q, 192 // block_k, block_k).any(3).any(1)
    expected = tiles.repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)
    rounded = inner.block_aligned().resolve(block_q, block_k, offset, 192)
    assert torch.equal(rounded.allows(q, k, head), expected)
    # Sizes that were given are kept, whatever the layout's are.
    given_sizes = inner.block_aligned(block_q, block_k, offset).resolve(128, 64, 5, 192)
    assert torch.equal(given_sizes.allows(q, k, head), expected)


def test_causality_is_kept_by_the_intersection_that_comes_after():
    before = BlockLayout.from_pattern((Local(20) & Causal()).block_aligned(), 100, block_size=16).to_dense()
    after = BlockLayout.from_pattern(Local(20).block_aligned() & Causal(), 100, block_size=16).to_dense()
    assert before.triu(1).any() and not after.triu(1).any()
    assert torch.equal(after, before.tril())


def test_whole_tiles_have_no_masks_inside():
    layout = BlockLayout.from_pattern(Local(300).block_aligned(), 1024, block_size=64)
    assert layout.masks.shape[0] == 0 and bool((layout.mask_ids == -1).all())


def test_errors():
    with pytest.raises(PatternError, match="resolve"):
        Local(3).block_aligned().allows(torch.tensor(1), torch.tensor(1))
    with pytest.raises(PatternError, match="or neither"):
        Local(3).block_aligned(16)
    with pytest.raises(PatternError, match="≥ 1"):
        Local(3).block_aligned(16, 0)
    with pytest.raises(PatternError, match=r"\(16, 16, 0\)"):
        BlockLayout.from_pattern(Full() & Local(3).block_aligned(16, 16), 100, block_size=32)
