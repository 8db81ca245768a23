"""Layouts from other people's tiles, and back."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.errors import LayoutError
from sparsetile.layout import BlockLayout

SIZES = st.sampled_from([16, 32, 64, 128])


def written_out(layout):
    heads = [[layout.to_dense(h, b) for h in range(layout.heads)] for b in range(layout.batch)]
    return torch.stack([torch.stack(row) for row in heads])


def same_tiles(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("indptr", "indices", "t_edges")) and (
        torch.equal(a.mask_ids < 0, b.mask_ids < 0)
    )


@runs(100)
@given(st.integers(1, 300), st.integers(1, 300), SIZES, SIZES, st.integers(0, 2**40), st.integers(2, 4))
def test_dense_masks(q_len, k_len, block_q, block_k, seed, dims):
    generator = torch.Generator().manual_seed(seed)
    lead = (2, 3)[: dims - 2]
    coarse = torch.rand((*lead, -(-q_len // 16), -(-k_len // 16)), generator=generator)
    fine = torch.rand((*lead, q_len, k_len), generator=generator)
    coarse = coarse.repeat_interleave(16, -2)[..., :q_len, :].repeat_interleave(16, -1)[..., :k_len]
    mask = (coarse < 0.3) | ((coarse < 0.6) & (fine < 0.5))
    layout = BlockLayout.from_dense_mask(mask, (block_q, block_k))
    layout.validate()
    assert torch.equal(written_out(layout), mask.reshape(layout.batch, layout.heads, q_len, k_len))


@runs(100)
@given(st.integers(1, 300), st.integers(1, 300), SIZES, SIZES, st.integers(0, 2**40), st.integers(2, 4))
def test_block_masks_and_compressed_rows(q_len, k_len, block_q, block_k, seed, dims):
    generator = torch.Generator().manual_seed(seed)
    shape = (*(2, 3)[: dims - 2], -(-q_len // block_q), -(-k_len // block_k))
    mask = torch.rand(shape, generator=generator) < 0.4
    layout = BlockLayout.from_block_mask(mask, q_len, k_len, (block_q, block_k))
    layout.validate()
    pairs = mask.repeat_interleave(block_q, -2)[..., :q_len, :].repeat_interleave(block_k, -1)[..., :k_len]
    assert torch.equal(written_out(layout), pairs.reshape(layout.batch, layout.heads, q_len, k_len))
    if dims == 2:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse BSR", UserWarning)
            stored = mask.repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)
            bsr = stored.float().to_sparse_bsr((block_q, block_k))
        again = BlockLayout.from_bsr(bsr, q_len=q_len, k_len=k_len)
        again.validate()
        assert same_tiles(layout, again) and torch.equal(again.to_dense(), pairs)
        # Compressed rows need not be sorted.
        order = torch.cat([r.nonzero().flatten().flip(0) for r in mask])
        size = (block_q, block_k)
        again = BlockLayout.from_bsr(layout.indptr, order, q_len=q_len, k_len=k_len, block_size=size)
        assert same_tiles(layout, again) and torch.equal(again.to_dense(), pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockLayout.from_dense_mask(torch.ones(3, 4)),
        lambda: BlockLayout.from_dense_mask(torch.ones(3, dtype=torch.bool)),
        lambda: BlockLayout.from_dense_mask(torch.ones(0, 4, dtype=torch.bool)),
        lambda: BlockLayout.from_dense_mask([[True]]),
        lambda: BlockLayout.from_block_mask(torch.ones(3, 3, dtype=torch.bool), 64, 64, 16),
        lambda: BlockLayout.from_bsr(torch.ones(32, 32)),
        lambda: BlockLayout.from_bsr(torch.tensor([0, 1]), torch.tensor([0])),
        lambda: BlockLayout.from_bsr(torch.tensor([0, 1]), torch.tensor([7]), q_len=16, block_size=16),
        lambda: BlockLayout.from_bsr(torch.tensor([0, 2]), torch.tensor([0]), q_len=16, block_size=16),
        lambda: BlockLayout.from_bsr(torch.tensor([1, 1]), torch.tensor([0]), q_len=16, block_size=16),
        lambda: BlockLayout.from_bsr(torch.tensor([0, 1, 1]), torch.tensor([0]), q_len=16, block_size=16),
    ],
)
def test_bad_input(make):
    with pytest.raises(LayoutError, match=r"expected .*, got .*\. \S"):
        make()
