"""Layouts of learned indices against whole tiles painted one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.errors import LayoutError
from sparsetile.layout import BlockLayout

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
    for b in range(batch):
        for h in range(heads):
            expected = painted(indices[b, h], q_len, k_len, block_q, block_k, is_causal)
            assert torch.equal(layout.to_dense(h, b), expected)


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
