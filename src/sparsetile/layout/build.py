"""From a pattern (or tiles in any other form) to the tensors of a layout, in O(tiles).

The steps for a pattern: a cover of key blocks for each block row, merged into sorted distinct tiles without a
global sort; the state of each tile; one bit mask for each distinct signature among the undecided tiles; the
transpose. Nothing here looks at pairs of positions except inside those few representatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.patterns.base import Pattern, signature_within
from sparsetile.patterns.tiles import (
    Grid,
    Key,
    Span,
    Tiles,
    combine,
    interval_words,
    mask_words,
    ones,
    representatives,
)

FULL = -1
EMPTY = -2
_INT32_TILES = 2**31 - 1


class Rows(NamedTuple):
    """Sorted tiles with their masks, before the transpose."""

    row: Tensor
    col: Tensor
    mask_ids: Tensor
    masks: Tensor


class Transpose(NamedTuple):
    indptr: Tensor
    indices: Tensor
    edges: Tensor


def tiles_of(pattern: Pattern, grid: Grid) -> Rows:
    """The tiles of a resolved pattern."""
    tree = pattern.lower()
    tiles = expand(tree.cover(grid, grid.everything), grid)
    some, full = tree.state(tiles)
    if not some.all():
        kept = some.nonzero().flatten()
        tiles, full = tiles.pick(kept), full.index_select(0, kept)
    if grid.whole is not grid:
        full = full & ~hangs_over(tiles)
    mask_ids = torch.full((len(tiles),), FULL, dtype=torch.int32)
    undecided = (~full).nonzero().flatten()
    masks = no_masks(grid.block_q, grid.block_k)
    if undecided.numel():
        part = tiles.pick(undecided)
        keys = _signatures(tree, part)
        which, index = representatives(keys.values)
        few = part.pick(which)
        words = tree.words(few)
        if grid.whole is not grid:
            words = words & valid_words(few)
        ids, masks = distinct(words, grid.block_k)
        mask_ids[undecided] = ids.index_select(0, index)
        if (ids == EMPTY).any():
            kept = (mask_ids != EMPTY).nonzero().flatten()
            tiles, mask_ids = tiles.pick(kept), mask_ids.index_select(0, kept)
    return Rows(tiles.row, tiles.col, mask_ids, masks)


def _signatures(tree: Pattern, tiles: Tiles) -> Key:
    grid = tiles.grid
    keys = [signature_within(tree, tiles)]
    if grid.whole is not grid:
        keys.append(Key(tiles.q1 - tiles.q0, grid.block_q))
        keys.append(Key(tiles.k1 - tiles.k0, grid.block_k))
    return combine(keys)


def expand(spans: Span, grid: Grid) -> Tiles:
    """The distinct tiles of ``[rows, s]`` block ranges, ascending in each row."""
    lo, hi = spans
    rows, count = lo.shape
    if count > 1:
        lo, order = lo.sort(1)
        hi = hi.gather(1, order).cummax(1).values
        lo = lo.clone()
        lo[:, 1:] = torch.maximum(lo[:, 1:], hi[:, :-1])
    sizes = (hi - lo).clamp_(min=0).flatten()
    ends = sizes.cumsum(0)
    total = int(sizes.sum())
    span = torch.arange(rows * count).repeat_interleave(sizes, output_size=total)
    col = torch.arange(total) + (lo.flatten() - ends + sizes).index_select(0, span)
    row = span if count == 1 else torch.div(span, count, rounding_mode="floor")
    return Tiles(grid, row, col)


def cut_tiles(tiles: Tiles) -> tuple[Tiles, Tensor]:
    """One tile for each size that the ends of the sequence leave, and each tile's place among them."""
    grid = tiles.grid
    sizes = combine([Key(tiles.q1 - tiles.q0, grid.block_q), Key(tiles.k1 - tiles.k0, grid.block_k)])
    which, index = representatives(sizes.values)
    return tiles.pick(which), index


def hangs_over(tiles: Tiles) -> Tensor:
    """Whether each tile reaches past the end of the queries or keys."""
    grid = tiles.grid
    over = torch.zeros(len(tiles), dtype=torch.bool)
    if grid.k_len % grid.block_k:
        over |= tiles.col == grid.k_blocks - 1
    if grid.q_len % grid.block_q:
        over |= tiles.row % grid.q_blocks == grid.q_blocks - 1
    return over


def valid_words(tiles: Tiles) -> Tensor:
    """Bit masks of the pairs that are not past the ends of the sequence."""
    grid = tiles.grid
    row_ok = torch.arange(grid.block_q) <= (tiles.q1 - tiles.q0)[:, None]
    width = torch.where(row_ok, (tiles.k1 - tiles.k0 + 1)[:, None], 0)
    return interval_words(torch.zeros_like(width), width, grid.block_k)


def no_masks(block_q: int, block_k: int, device: torch.device | None = None) -> Tensor:
    return torch.empty((0, block_q, mask_words(block_k)), dtype=torch.int32, device=device)


def distinct(words: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """Numbers bit masks by content.

    Args:
        words: int32 ``[n, block_q, words]``.

    Returns:
        ``(ids, masks)``: int32 ``[n]``, FULL for all ones and −2 for all zeros, else a row of ``masks``.
    """
    flat = words.flatten(1)
    least, most = flat.aminmax(dim=1)
    uniform = least == most
    ids = torch.where(uniform & (least == 0), EMPTY, torch.where(uniform & (least == ones(block_k)), FULL, 0))
    partial = (ids == 0).nonzero().flatten()
    if not partial.numel():
        return ids.to(torch.int32), words[:0]
    if partial.numel() < flat.shape[0]:
        flat = flat.index_select(0, partial)
    which, index = _same_rows(flat)
    ids[partial] = index
    return ids.to(torch.int32), flat.index_select(0, which).reshape(-1, *words.shape[1:])


def _same_rows(flat: Tensor) -> tuple[Tensor, Tensor]:
    """``(which, index)``: one row for each distinct content, and each row's place in ``which``."""
    pairs = flat.contiguous().view(torch.int64)
    weights = torch.randint(2**62, (pairs.shape[1],), generator=torch.Generator().manual_seed(0))
    # Sums keep the low bits of what is summed, so high bits are folded down first, without loss.
    folded = (pairs ^ (pairs >> 32 & 0xFFFFFFFF)) * 0x2545F4914F6CDD1D
    folded ^= folded >> 29 & 0x7FFFFFFFF
    which, index = representatives(folded.mul_(weights.to(flat.device)).sum(1))
    # Equal sums are likely, not certainly, equal rows: every row is compared with the one that stands for it.
    if not torch.equal(flat, flat.index_select(0, which.index_select(0, index))):
        index = torch.unique(flat, dim=0, return_inverse=True)[1]
        which, index = representatives(index)
    return which, index


def row_starts(row: Tensor, rows: int) -> Tensor:
    """``indptr`` of sorted row numbers."""
    dtype = torch.int32 if row.numel() <= _INT32_TILES else torch.int64
    starts = torch.zeros(rows + 1, dtype=dtype, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=rows), 0, dtype=dtype, out=starts[1:])
    return starts


def transpose(row: Tensor, col: Tensor, q_blocks: int, k_blocks: int, groups: int) -> Transpose:
    """Columns of tiles that are sorted by flattened row; ``groups`` is batch · heads."""
    line = col
    if groups > 1:
        line = torch.div(row, q_blocks, rounding_mode="floor") * k_blocks + col
    if groups * k_blocks <= _INT32_TILES:
        line = line.to(torch.int32)
    edges = line.argsort(stable=True)
    starts = row_starts(line, groups * k_blocks)
    block = row.index_select(0, edges)
    if groups > 1:
        block = block.remainder(q_blocks)
    kind = starts.dtype
    return Transpose(starts, block.to(torch.int32), edges.to(kind))
