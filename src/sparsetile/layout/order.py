"""The tiles of a layout in another order, on whatever device they lie, without waiting for it.

One stable sort does both jobs: by column it gives the transpose, and with "is it partial" as the last digit
of the key it puts the whole tiles of a row or column first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.layout.build import Transpose

_INT32 = 2**31 - 1


class Shape(NamedTuple):
    """Rows and columns of a layout: ``groups`` (batch · heads) times these blocks."""

    groups: int
    q_blocks: int
    k_blocks: int


class Ordered(NamedTuple):
    """Tiles line by line; a line is a flattened row or column.

    Attributes:
        starts: ``[2·lines + 1]``: where the whole tiles of a line start, then its partial ones.
        others: int32 ``[capacity]``, the key block (in columns: the query block) of each tile.
        edges: ``[capacity]``, its position in ``indices``.
    """

    starts: Tensor
    others: Tensor
    edges: Tensor


def transpose(indptr: Tensor, indices: Tensor, shape: Shape) -> Transpose:
    """Columns, with ascending query blocks. Unused entries stay past the end."""
    row = _rows_of(indptr, indices)
    lines = shape.groups * shape.k_blocks
    starts, edges = _sorted(_columns_of(row, indptr, indices, shape), lines, indptr.dtype)
    return Transpose(starts, _blocks_of(row, shape).index_select(0, edges), edges)


def whole_tiles_first(
    indptr: Tensor, indices: Tensor, mask_ids: Tensor, shape: Shape, *, by_rows: bool
) -> Ordered:
    """Rows (or columns) with their whole tiles first, each part in ascending order."""
    row = _rows_of(indptr, indices)
    if by_rows:
        line, lines, others = row, shape.groups * shape.q_blocks, indices
    else:
        line, lines = _columns_of(row, indptr, indices, shape), shape.groups * shape.k_blocks
        others = _blocks_of(row, shape)
    if line.dtype == torch.int32 and 2 * lines >= _INT32:
        line = line.long()
    key = torch.add(mask_ids >= 0, line, alpha=2)
    starts, edges = _sorted(key, 2 * lines, indptr.dtype)
    return Ordered(starts, others.index_select(0, edges), edges)


def _rows_of(indptr: Tensor, indices: Tensor) -> Tensor:
    """Flattened row of each entry; the number of rows for unused ones."""
    entry = torch.arange(indices.numel(), dtype=indptr.dtype, device=indptr.device)
    return torch.searchsorted(indptr[1:], entry, right=True, out_int32=indptr.dtype == torch.int32)


def _blocks_of(row: Tensor, shape: Shape) -> Tensor:
    """Query block of each entry; 0 for unused ones."""
    return row.remainder(shape.q_blocks).to(torch.int32)


def _columns_of(row: Tensor, indptr: Tensor, indices: Tensor, shape: Shape) -> Tensor:
    """Flattened column of each entry; the number of columns for unused ones, whatever they hold."""
    lines = shape.groups * shape.k_blocks
    group = torch.div(row if lines < _INT32 else row.long(), shape.q_blocks, rounding_mode="floor")
    return torch.add(indices, group, alpha=shape.k_blocks).masked_fill_(group >= shape.groups, lines)


def _sorted(key: Tensor, lines: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(where each line starts, the entries in the order of their lines)."""
    key, edges = key.sort(stable=True)
    bounds = torch.arange(lines + 1, dtype=key.dtype, device=key.device)
    starts = torch.searchsorted(key, bounds, out_int32=kind == torch.int32)
    return starts, edges.to(kind)
