"""Joined layouts keep what each keeps, and nothing between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import HEADS, runs, simple
from sparsetile import Budget, Causal, Global, Local, Random
from sparsetile.errors import LayoutError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.join import join


@runs(60)
@given(data=st.data())
def test_each_sequence_has_its_own_tiles(data):
    block = data.draw(st.sampled_from([16, 32, 64]))
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 150), st.integers(0, 90)), min_size=1, max_size=5))
    by_head = data.draw(st.booleans())
    layouts = []
    for q_len, past in lengths:
        k_len = q_len + past
        pattern = data.draw(simple(k_len, block)) | Random(0.1, unit="token", by_head=True)
        if not by_head:
            pattern = data.draw(simple(k_len, block)) & Causal()
        heads = HEADS if by_head else 1
        layout = BlockLayout.from_pattern(pattern, q_len, k_len, block, heads=HEADS)
        if layout.heads != heads:  # a pattern drawn without heads may differ by head all the same
            layout = BlockLayout.from_dense_mask(layout.to_dense(), block)
        layouts.append(layout)
    joined = join(layouts)
    joined.validate()
    assert joined.q_len == sum(x.q_blocks for x in layouts) * block
    for head in range(joined.heads):
        dense, expected = joined.to_dense(head), torch.zeros(joined.q_len, joined.k_len, dtype=torch.bool)
        q_at = k_at = 0
        for x in layouts:
            expected[q_at : q_at + x.q_len, k_at : k_at + x.k_len] = x.to_dense(head)
            q_at, k_at = q_at + x.q_blocks * block, k_at + x.k_blocks * block
        assert torch.equal(dense, expected)


def test_masks_are_shared_by_content():
    pattern = (Local(40) | Global(5)) & Causal()
    one = BlockLayout.from_pattern(pattern, 300, block_size=32)
    again = BlockLayout.from_pattern(pattern, 300, block_size=32)
    assert join([one, again, one]).masks.shape[0] == one.masks.shape[0]


def test_refuses_layouts_that_are_not_alike():
    small = BlockLayout.from_pattern(Local(40), 300, block_size=32)
    large = BlockLayout.from_pattern(Local(40), 300, block_size=64)
    with pytest.raises(LayoutError, match="same blocks"):
        join([small, large])
    budget = BlockLayout.from_pattern(Budget("local_window", 0.5), 300, block_size=32)
    assert join([small, budget]).nnz == small.nnz + budget.nnz
