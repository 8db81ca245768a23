"""Layouts of learned indices against whole tiles painted one by one, and against the general constructor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.errors import LayoutError
from sparsetile.layout import BlockLayout
from sparsetile.layout.check import sizes
from sparsetile.layout.schedule import schedule
from sparsetile.layout.topk import Sizes, in_order, topk_tensors

SIZES = st.sampled_from([16, 32, 64, 128])


def painted(rows, q_len, k_len, block_q, block_k, is_causal):
    out = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i, cols in enumerate(rows.tolist()):
        for c in cols:
            if 0 <= c * block_k < k_len:
                out[i * block_q : (i + 1) * block_q, c * block_k : (c + 1) * block_k] = True
    if is_causal:
        out &= torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len
    return out


@runs(150)
@given(
    st.integers(1, 400),
    st.none() | st.integers(1, 400),
    SIZES,
    SIZES,
    st.booleans(),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6)),
    st.integers(0, 2**40),
    st.sampled_from([torch.int16, torch.int32, torch.int64]),
)
def test_tiles_are_the_indices(k_len, q_len, block_q, block_k, is_causal, shape, seed, dtype):
    q_len = q_len or k_len
    batch, heads, width = shape
    size = (batch, heads, -(-q_len // block_q), width)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, -(-k_len // block_k) + 1, size, generator=generator).to(dtype)
    layout = BlockLayout.from_topk(indices, q_len, k_len, (block_q, block_k), is_causal)
    layout.validate()
    assert layout.capacity == indices.numel()
    assert (layout.batch, layout.heads) == (batch, heads)
    expected = torch.stack(
        [painted(rows, q_len, k_len, block_q, block_k, is_causal) for rows in indices.flatten(0, 1)]
    ).view(batch, heads, q_len, k_len)
    for b in range(batch):
        for h in range(heads):
            assert torch.equal(layout.to_dense(h, b), expected[b, h])
    same_tiles(layout, BlockLayout.from_dense_mask(expected, (block_q, block_k)))
    rows_are_known(layout, width)


def same_tiles(layout, general):
    """Tiles, their masks and the transpose, in the same order; masks may be numbered differently."""
    for name in ("indptr", "indices", "t_indptr", "t_indices", "t_edges"):
        count = None if name.endswith("indptr") else general.nnz
        assert torch.equal(getattr(layout, name)[:count], getattr(general, name)), name
    ids, wanted = layout.mask_ids[: general.nnz].long(), general.mask_ids.long()
    assert torch.equal(ids < 0, wanted < 0)
    partial = ids >= 0
    assert torch.equal(layout.masks[ids[partial]], general.masks[wanted[partial]])
    assert (layout.indices[general.nnz :] == 0).all() and (layout.mask_ids[general.nnz :] == -1).all()


def rows_are_known(layout, width):
    """What the layout says of its rows: at most ``width`` tiles, the partial ones last."""
    plan = schedule(layout, "rows", width)
    line, start, full_end, end, slot, first = plan.items
    row, _ = layout.rows_and_columns()
    partial = layout.mask_ids[: layout.nnz] >= 0
    assert layout.row_bound == width and (layout.row_counts() <= width).all()
    assert not (partial[:-1] & ~partial[1:] & (row[1:] == row[:-1])).any()
    counts = torch.zeros(layout.indptr.numel() - 1, dtype=torch.int32).index_add_(0, row, partial.int())
    assert torch.equal(end - full_end, counts)
    assert torch.equal(line, torch.arange(len(line))) and (slot == -1).all() and not plan.slots
    assert torch.equal(start, layout.indptr[:-1]) and torch.equal(end, layout.indptr[1:])
    filled = layout.row_counts() > 0
    assert torch.equal(first[filled], layout.indices[layout.indptr[:-1][filled]])
    assert not first[~filled].any()


@runs(60)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    SIZES,
    SIZES,
    st.booleans(),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
    st.integers(0, 2**40),
)
def test_a_selection_for_several_heads(q_len, k_len, block_q, block_k, is_causal, shape, seed):
    """Each group's tiles for each of its heads, and where every place went."""
    batch, groups, share, width = shape
    generator = torch.Generator().manual_seed(seed)
    size = Sizes(*sizes(q_len, k_len, (block_q, block_k)), is_causal)
    chosen = torch.rand(batch, groups, size.q_blocks, size.k_blocks, generator=generator).argsort(-1)
    chosen = chosen[..., :width].to(torch.int32)
    chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, -1)
    made = topk_tensors(in_order(chosen, size), share, size)
    layout, slot = BlockLayout.from_chosen(made, size), made.slot
    each = chosen.repeat_interleave(share, 1)
    same = BlockLayout.from_topk(each, q_len, k_len, (block_q, block_k), is_causal)
    for name, tensor in same.tensors()._asdict().items():
        assert torch.equal(getattr(layout, name), tensor), name
    assert (layout.batch, layout.heads) == (batch, groups * share)
    assert torch.equal(slot.flatten().sort().values, torch.arange(layout.capacity))
    column, valid = in_order(chosen, size)
    assert torch.equal(layout.indices[slot], column[:, :, None].expand(slot.shape))
    assert torch.equal(slot < layout.nnz, valid[:, :, None].expand(slot.shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_junk_names_no_key_block(dtype):
    limits = torch.iinfo(dtype)
    junk = [limits.min, limits.max, 0, 2, 2, 100]
    if dtype == torch.int64:
        junk += [2**32, 2**32 + 1, -(2**31), 2**31 - 1]
    layout = BlockLayout.from_topk(torch.tensor(junk, dtype=dtype).view(1, 1, 1, -1), 16, 16 * 201, 16)
    layout.validate()
    wanted = {value for value in junk if 0 <= value < 201}
    assert layout.indices[: layout.nnz].tolist() == sorted(wanted)


def test_nothing_is_read_back_to_the_host():
    # Meta tensors hold no values, so any attempt to look at one raises.
    for is_causal in (False, True):
        indices = torch.empty((2, 3, 4, 5), dtype=torch.int64, device="meta")
        layout = BlockLayout.from_topk(indices, 200, 230, 64, is_causal)
        assert layout.device.type == "meta" and layout.capacity == 120
        assert "tiles≤120" in repr(layout)


def test_rows_without_a_tile():
    layout = BlockLayout.from_topk(torch.full((1, 1, 4, 3), -1), 64, 64, 16)
    layout.validate()
    assert layout.nnz == 0 and not layout.to_dense().any()


@pytest.mark.parametrize(
    "indices",
    [
        torch.zeros(1, 1, 4, 2),
        torch.zeros(1, 1, 3, 2, dtype=torch.int64),
        torch.zeros(1, 4, 2, dtype=torch.int64),
        torch.zeros(1, 1, 4, 2, dtype=torch.bool),
        torch.zeros(1, 1, 4, 0, dtype=torch.int64),
        [[0]],
    ],
)
def test_bad_indices(indices):
    with pytest.raises(LayoutError, match=r"expected integers .*q_blocks = 4"):
        BlockLayout.from_topk(indices, 64, 64, 16)
