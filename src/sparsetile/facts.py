"""What a block layout keeps: its coverage on a coarse grid, and the numbers that describe it.

Everything is computed from the compressed rows of one head: O(tiles) time, O(tiles + cells) memory. Nothing
here writes out the attention matrix or its tile grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.blocks import FULL, BlockLayout
from sparsetile.patterns.tiles import unpack


@dataclass(frozen=True)
class Coverage:
    """The layout of one head on a grid of cells.

    Attributes:
        full, partial: float64 ``[rows, columns]``: share of the cell's (query, key) pairs that are kept by
            whole tiles, and by tiles that keep only some of their pairs.
        cell_q, cell_k: tokens that one cell spans down and across.
    """

    full: Tensor
    partial: Tensor
    cell_q: int
    cell_k: int


@dataclass(frozen=True)
class Description:
    """What one head of a layout costs and reaches; memory is that of the whole layout.

    ``back`` and ``ahead`` are the farthest kept key before and after its query, in tokens (negative where
    every kept key lies on the other side; None where nothing is kept). ``causal_density`` is the share of the
    causal triangle's tiles, where no key lies after its query, else None.
    """

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    heads: int
    tiles: int
    partial: int
    masks: int
    pairs: int
    row_min: int
    row_mean: float
    row_max: int
    empty_queries: bool
    back: int | None
    ahead: int | None
    causal_density: float | None
    nbytes: int

    @property
    def tile_grid(self) -> int:
        return -(-self.q_len // self.block_q) * -(-self.k_len // self.block_k)

    @property
    def density(self) -> float:
        return self.tiles / self.tile_grid

    @property
    def pair_density(self) -> float:
        return self.pairs / (self.q_len * self.k_len)

    def flops(self, head_dim: int) -> int:
        """Forward operations of one head: two products, 2·D operations each, for every pair of every tile."""
        return 4 * head_dim * self.tiles * self.block_q * self.block_k

    def dense_flops(self, head_dim: int) -> int:
        return 4 * head_dim * self.q_len * self.k_len


@dataclass(frozen=True)
class Tiles:
    """The tiles of one head, on the CPU: row and column of each, and its mask (−1: whole)."""

    rows: Tensor
    columns: Tensor
    mask_ids: Tensor
    counts: Tensor
    masks: Tensor
    layout: BlockLayout


def tiles_of(layout: BlockLayout, batch: int, head: int) -> Tiles:
    for name, index, count in (("batch", batch, layout.batch), ("head", head, layout.heads)):
        if not 0 <= index < count:
            fix = (
                f"This layout is shared by all of them: use {name} 0."
                if count == 1
                else f"Choose another {name}."
            )
            raise ArgumentError(
                explain(name, expected=f"a number from 0 to {count - 1} (of the layout)", got=index, fix=fix)
            )
    first = (batch * layout.heads + head) * layout.q_blocks
    starts = layout.indptr[first : first + layout.q_blocks + 1].cpu().long()
    span = slice(int(starts[0]), int(starts[-1]))
    counts = starts.diff()
    rows = torch.repeat_interleave(torch.arange(layout.q_blocks), counts)
    ids = layout.mask_ids[span].cpu()
    return Tiles(rows, layout.indices[span].cpu().long(), ids, counts, layout.masks.cpu(), layout)


def coverage(layout: BlockLayout, rows: int, columns: int, *, batch: int = 0, head: int = 0) -> Coverage:
    """Average the layout of one head over at most ``rows × columns`` cells of equal size.

    Raises:
        ArgumentError: the batch element or head is not in the layout, or the grid has no cell.
    """
    if rows < 1 or columns < 1:
        raise ArgumentError(
            explain(
                "grid", expected="at least 1 × 1 cells", got=f"{rows} × {columns}", fix="Ask for more cells."
            )
        )
    tiles = tiles_of(layout, batch, head)
    merge_q, split_q = _cells(layout.q_blocks, layout.block_q, rows)
    merge_k, split_k = _cells(layout.k_blocks, layout.block_k, columns)
    cell_q, cell_k = layout.block_q * merge_q // split_q, layout.block_k * merge_k // split_k
    grid = (-(-layout.q_len // cell_q), -(-layout.k_len // cell_k))

    # Kept pairs of each piece of a tile; pieces are smaller than tiles only where tiles are fewer than cells.
    piece = (layout.block_q // split_q, layout.block_k // split_k)
    pieces = torch.empty(len(tiles.masks), split_q, split_k, dtype=torch.float64)
    for start, bits in _mask_bits(tiles.masks, layout.block_k):
        cut = bits.view(-1, split_q, piece[0], split_k, piece[1])
        pieces[start : start + len(bits)] = cut.sum((2, 4)).double()
    down, across = torch.arange(split_q), torch.arange(split_k)
    whole = tiles.mask_ids == FULL
    drawn = []
    for chosen in (whole, ~whole):
        y = (tiles.rows[chosen][:, None, None] * split_q + down[:, None]) // merge_q
        x = (tiles.columns[chosen][:, None, None] * split_k + across) // merge_k
        if chosen is whole:
            kept = torch.full((), float(piece[0] * piece[1]), dtype=torch.float64).expand(
                len(x), split_q, split_k
            )
        else:
            kept = pieces[tiles.mask_ids[chosen].long()]
        # A tile over the end of the sequence can have pieces that lie wholly past it (and keep nothing).
        inside = (y < grid[0]) & (x < grid[1])
        cells = torch.zeros(grid[0] * grid[1], dtype=torch.float64)
        cells.index_add_(0, (y * grid[1] + x)[inside], kept[inside])
        drawn.append(cells.view(grid))
    height = (layout.q_len - torch.arange(grid[0]) * cell_q).clamp(max=cell_q)
    width = (layout.k_len - torch.arange(grid[1]) * cell_k).clamp(max=cell_k)
    area = height[:, None] * width
    return Coverage(drawn[0] / area, drawn[1] / area, cell_q, cell_k)


def describe(layout: BlockLayout, *, batch: int = 0, head: int = 0) -> Description:
    """Count what one head of ``layout`` keeps. Raises ArgumentError if the layout has no such head."""
    tiles = tiles_of(layout, batch, head)
    pairs_of = torch.zeros(len(tiles.masks), dtype=torch.int64)
    back_of, ahead_of = pairs_of.clone(), pairs_of.clone()
    empty_rows = torch.zeros(len(tiles.masks), layout.block_q, dtype=torch.bool)
    queries = torch.arange(layout.block_q)
    far = layout.block_q + layout.block_k
    for start, bits in _mask_bits(tiles.masks, layout.block_k):
        here = slice(start, start + len(bits))
        kept = bits.any(2)
        first = bits.to(torch.uint8).argmax(2)
        last = layout.block_k - 1 - bits.flip(2).to(torch.uint8).argmax(2)
        pairs_of[here] = bits.sum((1, 2))
        back_of[here] = torch.where(kept, queries - first, -far).amax(1)
        ahead_of[here] = torch.where(kept, last - queries, -far).amax(1)
        empty_rows[here] = ~kept
    whole = tiles.mask_ids == FULL
    ids = tiles.mask_ids.clamp(min=0).long()
    shift = tiles.rows * layout.block_q + layout.k_len - layout.q_len - tiles.columns * layout.block_k
    pairs = int(whole.sum()) * layout.block_q * layout.block_k
    if len(tiles.masks):
        pairs += int(pairs_of[ids[~whole]].sum())
        back = shift + torch.where(whole, layout.block_q - 1, back_of[ids])
        ahead = torch.where(whole, layout.block_k - 1, ahead_of[ids]) - shift
    else:
        back, ahead = shift + layout.block_q - 1, layout.block_k - 1 - shift
    any_tile = len(tiles.rows) > 0
    farthest_back = int(back.max()) if any_tile else None
    farthest_ahead = int(ahead.max()) if any_tile else None
    causal = farthest_ahead is not None and farthest_ahead <= 0
    return Description(
        q_len=layout.q_len,
        k_len=layout.k_len,
        block_q=layout.block_q,
        block_k=layout.block_k,
        heads=layout.heads,
        tiles=len(tiles.rows),
        partial=int((~whole).sum()),
        masks=int(torch.bincount(ids[~whole]).count_nonzero()),
        pairs=pairs,
        row_min=int(tiles.counts.min()),
        row_mean=len(tiles.rows) / len(tiles.counts),
        row_max=int(tiles.counts.max()),
        empty_queries=_has_empty_query(tiles, empty_rows),
        back=farthest_back,
        ahead=farthest_ahead,
        causal_density=layout.causal_density if causal else None,
        nbytes=layout.nbytes,
    )


def _cells(blocks: int, block: int, limit: int) -> tuple[int, int]:
    """(blocks merged into a cell, cells that a block is split into): one of them is 1."""
    if blocks >= limit:
        return -(-blocks // limit), 1
    split = 1
    while split < block and blocks * split * 2 <= limit:
        split *= 2
    return 1, split


def _mask_bits(masks: Tensor, block_k: int, chunk: int = 512) -> Iterator[tuple[int, Tensor]]:
    """(index of the first, ``[≤ chunk, block_q, block_k]`` bool) for all masks, a few at a time."""
    for start in range(0, len(masks), chunk):
        yield start, unpack(masks[start : start + chunk], block_k)


def _has_empty_query(tiles: Tiles, empty_rows: Tensor) -> bool:
    """Whether some query keeps no key: every tile of its row leaves it out."""
    layout = tiles.layout
    if bool((tiles.counts == 0).any()):
        return True
    whole = tiles.mask_ids == FULL
    served = torch.zeros(layout.q_blocks, dtype=torch.bool)
    served[tiles.rows[whole]] = True
    partial = ~whole & ~served[tiles.rows]
    # Rows of masked tiles only: count, query by query, the tiles that serve it, a bounded number at a time.
    reached = torch.zeros(layout.q_blocks, layout.block_q, dtype=torch.bool)
    reached[served] = True
    rows, ids = tiles.rows[partial], tiles.mask_ids[partial].long()
    for start in range(0, len(rows), 1 << 16):
        part = slice(start, start + (1 << 16))
        hits = torch.zeros(layout.q_blocks, layout.block_q, dtype=torch.int32)
        hits.index_add_(0, rows[part], (~empty_rows[ids[part]]).int())
        reached |= hits > 0
    return not bool(reached.flatten()[: layout.q_len].all())
