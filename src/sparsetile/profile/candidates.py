"""The patterns that ``sparsetile profile`` tries on every head, and the tiles that each keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Budget, Causal, Full, Global, Local, LogStrided, Pattern, Strided

_WIDTHS = (4, 5, 6, 7)
_DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75)
_STRIDES = (2, 3, 4, 8)


class Candidate(NamedTuple):
    """A pattern of whole tiles, and the family in which it has larger and smaller relatives."""

    family: str
    pattern: Pattern


def candidates(length: int, block: int) -> list[Candidate]:
    """Windows, windows with sinks, with strides, with distances that double; shares of a row; everything.

    Args:
        length: tokens, a multiple of the block.
        block: tokens of a tile's side.
    """
    tiles = length // block
    widths = sorted({1, 2, 3, *(w << e for e in range(tiles.bit_length()) for w in _WIDTHS)})
    widths = [w for w in widths if w < tiles]
    found = []

    def window(width: int, sinks: int) -> Pattern:
        own: Pattern = Local(width - 1, 0, unit=block)
        return own | Global(sinks * block, rows=False) if sinks else own

    for sinks in (0, 1, 2, 4):
        family = "window" if sinks == 0 else "window, sinks"
        found += [Candidate(family, window(w, sinks)) for w in widths if w + sinks < tiles]
    for width in (1, 2, 4, 8):
        if width < tiles:
            near = window(width, 1)
            found += [
                Candidate("window, sinks, stride", near | Strided(r * block, block))
                for r in _STRIDES
                if r < tiles
            ]
            found.append(Candidate("window, sinks, doubling", near | LogStrided(2, block)))
    for density in _DENSITIES:
        found.append(Candidate("share of the row", Budget("local_window", density, causal=True)))
        share = Budget("global_local", density, causal=True, global_tokens=block)
        found.append(Candidate("share of the row, sinks", share))
    found.append(Candidate("everything", Full()))
    return found


class Kept(NamedTuple):
    """The tiles that candidates keep of a causal sequence, by rows of tiles.

    Attributes:
        starts: int64 ``[rows + 1]``: where the entries of each row begin.
        candidate, column: int64 ``[entries]``.
        tiles: int64 ``[candidates]``, how many each keeps in all.
        every: tiles of the causal triangle.
    """

    starts: Tensor
    candidate: Tensor
    column: Tensor
    tiles: Tensor
    every: int

    def row(self, row: int, dtype: torch.dtype) -> Tensor:
        """``[candidates, row + 1]``: 1 where a candidate keeps the tile of this row, else 0."""
        first, last = int(self.starts[row]), int(self.starts[row + 1])
        chosen = torch.zeros((self.tiles.numel(), row + 1), dtype=dtype, device=self.column.device)
        chosen[self.candidate[first:last], self.column[first:last]] = 1
        return chosen

    def to(self, device: torch.device | str) -> Kept:
        candidate, column, tiles = (x.to(device) for x in (self.candidate, self.column, self.tiles))
        return Kept(self.starts, candidate, column, tiles, self.every)


def tiles_a_row(density: float, rows: int) -> tuple[int, int]:
    """``(m, more)``: every row of tiles takes ``m`` (as many as it has, where it has fewer), and ``more`` of
    the rows one more: so many tiles that the causal triangle has the density, and at least one a row."""
    budget = max(rows, round(density * (rows * (rows + 1) // 2)))
    taken, m = rows, 1
    while m < rows and taken + rows - m <= budget:
        taken, m = taken + rows - m, m + 1
    return m, budget - taken if m < rows else 0


def kept(tried: Sequence[Candidate], length: int, block: int) -> Kept:
    """What candidates keep of ``length`` tokens; O(tiles of all of them)."""
    rows, columns, owners, tiles = [], [], [], []
    count = length // block
    for number, candidate in enumerate(tried):
        layout = BlockLayout.from_pattern(candidate.pattern & Causal(), length, block_size=block)
        row, column = layout.rows_and_columns()
        # Only the diagonal may be partial: mass is counted by whole tiles.
        assert bool(((layout.mask_ids < 0) | (row == column)).all()), candidate
        rows.append(row)
        columns.append(column)
        owners.append(torch.full_like(row, number))
        tiles.append(row.numel())
    row, order = torch.cat(rows).sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(count + 1))
    return Kept(
        starts,
        torch.cat(owners)[order],
        torch.cat(columns)[order],
        torch.tensor(tiles),
        count * (count + 1) // 2,
    )
