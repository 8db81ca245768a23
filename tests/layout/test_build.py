"""The fast enumeration against the definition, on every pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note

from pattern_draws import HEADS, Case, case, runs
from sparsetile.layout import BlockLayout, build
from sparsetile.patterns import Causal, Dilated, Documents, Global, Local, LogStrided, Random, Strided
from sparsetile.patterns.tiles import Grid, Span


def agrees(drawn: Case) -> BlockLayout:
    layout = BlockLayout.from_pattern(
        drawn.pattern, drawn.q_len, drawn.k_len, (drawn.block_q, drawn.block_k), heads=HEADS
    )
    layout.validate()
    assert layout.heads == (HEADS if drawn.pattern.needs_heads else 1)
    for head in range(layout.heads):
        assert torch.equal(layout.to_dense(head), drawn.dense(head))
    return layout


@runs(300)
@given(case())
def test_layouts_are_their_patterns(drawn):
    note(repr(drawn))
    layout = agrees(drawn)
    if layout.heads == 1:
        assert torch.equal(drawn.dense(HEADS - 1), drawn.dense(0))
    # The dense mask says which tiles are empty, partial and full, and which masks are equal.
    heads = [drawn.dense(h) for h in range(layout.heads)]
    direct = BlockLayout.from_dense_mask(torch.stack(heads), (drawn.block_q, drawn.block_k))
    for name in ("indptr", "indices", "t_indptr", "t_indices", "t_edges"):
        assert torch.equal(getattr(layout, name), getattr(direct, name)), name
    assert torch.equal(layout.mask_ids < 0, direct.mask_ids < 0)
    assert layout.masks.shape == direct.masks.shape
    assert layout.mask_ids[layout.mask_ids >= 0].unique().numel() == layout.masks.shape[0]


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 700])
def test_the_usual_pattern_at_every_edge(block, length):
    pattern = (Local(100) | Global(20)) & Causal()
    for q_len in {1, length, max(1, length // 2), length + 37}:
        agrees(Case(pattern, q_len, length, block, block))


@pytest.mark.parametrize(
    "pattern",
    [
        Local(2**48) & Global(2**48) & Causal(),
        Local(50) | (Dilated(2**48, 2**48, 2**48) & Strided(2**48, 1, 2**48)),
        (Dilated(2**48, 2**48, 1) | LogStrided(2**48, 1)) & Local(2**48, 7),
        Random(1e-12, unit=1) | Local(40),
    ],
    ids=repr,
)
def test_parameters_far_beyond_the_length(pattern):
    agrees(Case(pattern, 150, 170, 32, 32))


def test_no_span_at_all():
    # The one distance in reach, 3, is no power of 2.
    layout = agrees(Case(LogStrided(2, 1) & Global(1, rows=False), 1, 4, 16, 16))
    assert layout.nnz == 0


def test_documents_across_blocks():
    seed = int(torch.randint(2**40, ()))
    lengths = torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    layout = agrees(Case(Documents(lengths) & Causal(), sum(lengths), sum(lengths), 32, 32))
    assert layout.heads == 1, seed


def test_cost_grows_with_the_tiles():
    layout = BlockLayout.from_pattern((Local(4096) | Global(128)) & Causal(), 1 << 20)
    rows = torch.arange(8192)
    # 33 tiles of the window and, once that has left it, the global one.
    expected = (rows + 1).clamp(max=33) + (rows >= 33).long()
    assert torch.equal(layout.row_counts().long(), expected)
    # Two masks: the diagonal and the far edge of the window.
    assert layout.masks.shape[0] == 2
    assert layout.nbytes < 20 * layout.nnz


def test_keys_of_far_strides_stay_few():
    pattern = Strided(1 << 16, head_shift=128) | (Random(0.001, by_head=True) & Causal())
    layout = BlockLayout.from_pattern(pattern, 1 << 17, heads=4)
    assert 4 * 1024 * 2 <= layout.nnz <= 4 * 1024 * 4
    layout.validate()


def test_merged_spans_are_sorted_and_distinct():
    seed = int(torch.randint(2**40, ()))
    generator = torch.Generator().manual_seed(seed)
    lo = torch.randint(0, 50, (30, 5), generator=generator)
    hi = lo + torch.randint(-3, 20, lo.shape, generator=generator)
    tiles = build.expand(Span(lo, hi), Grid(30 * 16, 80 * 16, 16, 16, 0))
    spelled = [
        (row, col)
        for row in range(30)
        for col in sorted(
            {c for a, b in zip(lo[row].tolist(), hi[row].tolist(), strict=True) for c in range(a, b)}
        )
    ]
    assert list(zip(tiles.row.tolist(), tiles.col.tolist(), strict=True)) == spelled, seed


def test_equal_hashes_do_not_merge_different_masks(monkeypatch):
    seed = int(torch.randint(2**40, ()))
    words = (
        torch.randint(2, (60, 16, 1), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)) << 4
    )
    words = torch.cat((words, words[:20], torch.zeros_like(words[:1]), torch.full_like(words[:1], 0xFFFF)))
    same = (words[:, None] == words[None, :]).flatten(2).all(-1)
    for weight in (None, 0):
        if weight is not None:
            monkeypatch.setattr(
                torch, "randint", lambda high, size, **kw: torch.zeros(size, dtype=torch.int64)
            )
        ids, masks = build.distinct(words, 16)
        assert torch.equal(ids[:, None] == ids[None, :], same), seed
        assert ids[-1] == build.FULL and ids[-2] == build.EMPTY
        kept = ids >= 0
        assert torch.equal(masks[ids[kept].long()], words[kept]), seed
