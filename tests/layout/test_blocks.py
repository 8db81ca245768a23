"""Views of a layout, its arguments, and what it says of itself."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from pattern_draws import HEADS, case, runs
from sparsetile.errors import LayoutError, PatternError
from sparsetile.layout import BlockLayout
from sparsetile.layout.blocks import memo_of
from sparsetile.patterns import Causal, Documents, Full, Local, Random, Strided


@runs(60)
@given(case(longest=400))
def test_counts(drawn):
    size = (drawn.block_q, drawn.block_k)
    layout = BlockLayout.from_pattern(drawn.pattern, drawn.q_len, drawn.k_len, size, heads=HEADS)
    padded = torch.zeros(layout.q_blocks * drawn.block_q, layout.k_blocks * drawn.block_k, dtype=torch.bool)
    future = padded.clone()
    query = torch.arange(drawn.q_len)[:, None] + drawn.k_len - drawn.q_len
    future[: drawn.q_len, : drawn.k_len] = torch.arange(drawn.k_len) <= query

    def tiles(pairs):
        return pairs.reshape(layout.q_blocks, drawn.block_q, layout.k_blocks, drawn.block_k).any(3).any(1)

    kept = []
    for head in range(layout.heads):
        padded[: drawn.q_len, : drawn.k_len] = layout.to_dense(head)
        kept.append(tiles(padded))
    stacked, triangle = torch.stack(kept), tiles(future)
    assert layout.nnz == layout.capacity == int(stacked.sum())
    assert layout.row_counts().tolist() == stacked.sum(-1).flatten().tolist()
    assert layout.density == pytest.approx(float(stacked.float().mean()))
    share = int((stacked & triangle).sum()) / (layout.heads * int(triangle.sum()))
    assert layout.causal_density == pytest.approx(share)
    assert layout.nbytes == sum(t.numel() * t.element_size() for t in layout.tensors())
    row, col = layout.rows_and_columns()
    assert torch.equal(torch.stack((row, col), 1), stacked.flatten(0, 1).nonzero())


def test_says_what_it_is():
    layout = BlockLayout.from_pattern(Local(64) & Causal(), 500, 600, (32, 64))
    text = repr(layout)
    assert "500×600 tokens" in text and "32×64" in text and f"tiles={layout.nnz}" in text and "cpu" in text


def test_moves_between_devices():
    layout = BlockLayout.from_pattern(Local(64), 500)
    assert layout.to("cpu") is layout
    there = layout.to("meta")
    assert there.device.type == "meta" and there.nnz == layout.nnz
    assert BlockLayout.from_pattern(Local(64), 500, device="meta").device.type == "meta"


def learned():
    chosen = torch.randint(-1, 9, (2, 3, 7, 4))
    return BlockLayout.from_topk(chosen, 200, 270, 32, is_causal=True)


def test_a_learned_layout_is_transposed_when_asked():
    layout = learned()
    before = layout.nbytes
    assert before == sum(t.nbytes for t in layout.operands()) and len(layout.operands()) == 4
    held = layout.footprint
    turned = layout.transpose
    assert layout.t_indptr is turned.indptr and layout.t_edges is turned.edges
    assert layout.transpose is turned and layout.tensors()[4:] == tuple(turned)
    added = sum(t.nbytes for t in turned)
    assert layout.nbytes == before + added and layout.footprint == held + added
    # Operators rebuild the layout from its tensors: what was derived travels with the first.
    again = BlockLayout(*layout.operands(), 200, 270, 32, 32, 2, 3, _memo=memo_of(layout.indptr))
    assert again.transpose is turned


def test_a_transpose_that_was_given_stays():
    layout = learned()
    given = replace(layout, given=layout.transpose, _memo={})
    assert given.transpose is layout.transpose and len(given.operands()) == 7
    given.validate()
    moved = given.to("meta")
    assert moved.given is not None and moved.t_edges.device.type == "meta"
    assert layout.to("meta").given is None and layout.to("meta").t_edges.shape == layout.t_edges.shape


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, replace, lambda layout: pickle.loads(pickle.dumps(layout))]
)
def test_copies_of_a_learned_layout(again, turned):
    layout = learned()
    if turned:
        layout.validate()
    other = again(layout)
    other.validate()
    for name, tensor in layout.tensors()._asdict().items():
        assert torch.equal(getattr(other, name), tensor), name


def test_heads_are_asked_for_only_where_they_differ():
    with pytest.raises(LayoutError, match="heads"):
        BlockLayout.from_pattern(Strided(64, 32, head_shift=32), 256)
    assert BlockLayout.from_pattern(Strided(64, 32, head_shift=32), 256, heads=2).heads == 2
    assert BlockLayout.from_pattern(Full(), 256, heads=2).heads == 1
    assert BlockLayout.from_pattern(Random(0.5, by_head=True), 256, heads=1).heads == 1


def test_an_empty_layout():
    layout = BlockLayout.from_pattern(Local(0, 5) & Causal() & Local(5, 0) & Documents([200]), 500, 200, 16)
    layout.validate()
    assert torch.equal(layout.to_dense()[300:], torch.eye(200, dtype=torch.bool))
    nothing = BlockLayout.from_dense_mask(torch.zeros(40, 50, dtype=torch.bool), 16)
    nothing.validate()
    assert nothing.nnz == 0 and nothing.density == 0 and not nothing.to_dense().any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockLayout.from_pattern(Local(3), 0),
        lambda: BlockLayout.from_pattern(Local(3), 5, 0),
        lambda: BlockLayout.from_pattern(Local(3), 5.0),
        lambda: BlockLayout.from_pattern(Local(3), 64, block_size=24),
        lambda: BlockLayout.from_pattern(Local(3), 64, block_size=(16, 256)),
        lambda: BlockLayout.from_pattern(Local(3), 64, block_size=(16,)),
        lambda: BlockLayout.from_pattern(Local(3), 64, heads=0),
        lambda: BlockLayout.from_pattern(Random(0.5, by_head=True), 64),
        lambda: BlockLayout.from_pattern(Local(3), 64).to_dense(head=1),
        lambda: BlockLayout.from_pattern(Local(3), 64).to_dense(batch=-1),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(LayoutError, match=r"expected .*, got .*\. \S"):
        make()


def test_patterns_that_do_not_fit():
    with pytest.raises(PatternError, match="k_len = 9"):
        BlockLayout.from_pattern(Documents([3, 4]), 9)
    with pytest.raises(PatternError, match="square tiles"):
        BlockLayout.from_pattern(Strided(128), 512, block_size=(64, 32))
    with pytest.raises(PatternError, match="a Pattern"):
        BlockLayout.from_pattern("Local(3)", 512)
