"""Schedule: who computes what. Rows (or columns) of a layout are cut into work items of bounded length.

A global row has thousands of tiles where a local row has five; one program per row would leave the GPU
waiting for a few. Here a row longer than ``chunk`` tiles becomes several items of nearly equal length; each
writes its part to a slot of a buffer, and a small second kernel combines the slots of a row in fixed order.

Everything is derived on the layout's own device from sizes that the host knows, so a layout that was made
on the device costs no host sync: the number of items is then a bound, and the items beyond the real ones
are empty (row −1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.order import whole_tiles_first
from sparsetile.layout.topk import SHORT_ROWS

Direction = Literal["rows", "columns"]

HOST_KNOWN = "host_known"
"""Key of ``BlockLayout._memo``: True if its counts came from the host, so one sync is harmless."""

_LENGTH_CLASSES = 512


class ScheduleTensors(NamedTuple):
    """The tensors of a schedule in the order in which operators pass them."""

    items: Tensor
    splits: Tensor
    others: Tensor
    mask_ids: Tensor
    edges: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """The work items of all rows, or of all columns, of a layout.

    "Row" below means a flattened row of ``indptr`` for ``direction="rows"`` and a flattened column of
    ``t_indptr`` for ``"columns"``.

    Attributes:
        items: ``[6, n]`` int32 (int64 past 2³¹ tiles): row, start, full_end, end, slot, first of each item.
            Entries ``start … full_end`` of ``others`` are whole tiles, ``full_end … end`` partial ones.
            ``slot`` is −1 for a row of one item, else where the item puts its part. ``first`` is
            ``others[start]`` (0 if the item is empty), so that a program need not wait for ``start``. Row −1:
            nothing to do. Every row has an item, even if it is empty. Items of one layout head stay together,
            longest first; in the order of their rows where no row of learned indices is longer than an item.
        splits: ``[3, m]``: row, first slot and number of slots (consecutive) of each row of several items.
            0 slots: nothing to do.
        others: ``[capacity]`` int32. Key block (for columns: query block) of each entry, whole tiles first in
            each row.
        mask_ids: ``[capacity]`` int32, as in the layout, in the order of ``others``.
        edges: ``[capacity]`` position of each entry in ``layout.indices``; empty if that is its own position.
        slots: how many slots a buffer needs for each head that shares the layout.
        long_items: so many leading items should run for all heads before the others do; 0 if the host does
            not know, or if the layout has heads of its own.
        partial: whether the layout may hold partial tiles.
        direction: ``"rows"`` or ``"columns"``.
    """

    items: Tensor
    splits: Tensor
    others: Tensor
    mask_ids: Tensor
    edges: Tensor
    slots: int
    long_items: int
    partial: bool
    direction: Direction

    def tensors(self) -> ScheduleTensors:
        return ScheduleTensors(self.items, self.splits, self.others, self.mask_ids, self.edges)


def schedule(layout: BlockLayout, direction: Direction, chunk: int) -> Schedule:
    """The schedule of a layout, from its memo if it was asked for before.

    Args:
        layout: any layout. Its counts are read back once (a host sync) only if it lives on the CPU or its
            memo says ``HOST_KNOWN``; that trims the empty items.
        direction: ``"rows"`` for passes that own query blocks, ``"columns"`` for those that own key blocks.
        chunk: longest item, in tiles.

    Raises:
        LayoutError: ``chunk`` is not positive.
    """
    if chunk < 1:
        raise LayoutError(
            explain("schedule chunk", expected="at least 1 tile", got=chunk, fix="Pass a positive chunk.")
        )
    key = f"schedule {direction} {chunk}"
    known = layout._memo.get(key)
    if isinstance(known, Schedule):
        return known
    made = _build(layout, direction, chunk)
    layout._memo[key] = made
    return made


def chunk_for(
    layout: BlockLayout, heads: int, processors: int, *, items_per_processor: int, at_least: int
) -> int:
    """Longest item that keeps ``processors`` evenly loaded: a power of two near tiles ÷ (processors · items).

    Args:
        layout: the layout; only its capacity is looked at, so no host sync.
        heads: how many (batch, head) pairs run every row of the layout.
        processors: multiprocessors of the device.
        items_per_processor: longest items that one processor's share should at least be cut into.
        at_least: floor, below which the cost of combining outweighs the balance.
    """
    share = layout.capacity * heads // (processors * items_per_processor)
    return max(at_least, 1 << max(share - 1, 0).bit_length())


def _build(layout: BlockLayout, direction: Direction, chunk: int) -> Schedule:
    by_rows = direction == "rows"
    if by_rows and layout.row_bound is not None and layout.row_bound <= chunk:
        return _of_short_rows(layout)
    blocks = layout.q_blocks if by_rows else layout.k_blocks
    longest_possible = layout.k_blocks if by_rows else layout.q_blocks
    device, kind, capacity = layout.device, layout.indptr.dtype, layout.capacity
    partial = layout.masks.shape[0] > 0
    mask_ids = layout.mask_ids
    if partial:
        starts, others, edges = whole_tiles_first(
            layout.indptr, layout.indices, mask_ids, layout.shape, by_rows=by_rows
        )
        mask_ids = mask_ids.index_select(0, edges)
    elif by_rows:
        starts, others, edges = layout.indptr, layout.indices, layout.indptr.new_empty(0)
    else:
        starts, others, edges = layout.transpose
    # What is counted below fits into int32 unless a row can be of tens of thousands of tiles.
    most = max(longest_possible * (longest_possible // chunk + 2), layout.shape.groups * _LENGTH_CLASSES)
    small = kind == torch.int32 and most < 2**31
    count = torch.int32 if small else torch.int64
    starts = starts.to(count)
    step = 2 if partial else 1
    begin, middle, stop = starts[:-1:step], starts[1::step], starts[step::step]

    rows, may_split = begin.numel(), chunk < longest_possible
    n_items = rows + (capacity // chunk if may_split else 0)
    n_splits = min(rows, capacity // chunk) if may_split else 0
    n_slots = 2 * (capacity // chunk) if may_split else 0
    length = stop - begin
    parts = (length + (chunk - 1)).div_(chunk, rounding_mode="floor").clamp_(min=1)
    split = parts > 1
    slots_of = parts * split
    after = parts.cumsum(0, dtype=count)
    slot_first = slots_of.cumsum(0, dtype=count).sub_(slots_of)

    item = torch.arange(n_items, dtype=count, device=device)
    # Items past the real ones look up the last row, of which they are no part.
    row = torch.searchsorted(after, item, right=True, out_int32=small).clamp_(max=rows - 1)
    by_row = torch.stack((begin, middle, length, parts, after - parts, slot_first))
    begin_of, middle_of, length_of, parts_of, first_of, slot_of = by_row.index_select(1, row)
    part = item - first_of
    none = part >= parts_of
    cuts = torch.arange(2, dtype=count, device=device)[:, None] + part
    start, end = cuts.mul_(length_of).div_(parts_of, rounding_mode="floor").add_(begin_of)
    slot = (slot_of + part).masked_fill_(none | (parts_of == 1), -1)
    length_of_item = end - start
    first_block = torch.zeros_like(start)
    if capacity:
        first_block = others.index_select(0, start.clamp(max=capacity - 1)) * (length_of_item > 0)
    # Eight classes an octave: nearly equal items keep the order of their rows, and with it the L2's content.
    # A tile and a half more, so that no length falls on the border of a class.
    minus_class = (length_of_item + 1.5).log2_().mul_(-8).to(count)
    head = torch.div(row, blocks, rounding_mode="floor")
    rank = torch.add(minus_class, head, alpha=_LENGTH_CLASSES).masked_fill_(none, torch.iinfo(count).max)
    order = torch.argsort(rank, stable=True)
    row = row.masked_fill_(none, -1)
    items = torch.stack((row, start, middle_of.clamp(start, end), end, slot, first_block))
    items = items.index_select(1, order).to(kind)

    splits = torch.zeros((3, n_splits + 1), dtype=count, device=device)
    if n_splits:
        # Rows that are not split all go to place 0.
        place = split.cumsum(0) * split
        row = torch.arange(rows, dtype=count, device=device)
        splits[:, place] = torch.stack((row, slot_first, slots_of))
    splits = splits[:, 1:].to(kind)

    long_items = 0
    if device.type == "cpu" or layout._memo.get(HOST_KNOWN):
        n_items, n_splits, n_slots = torch.stack((parts.sum(), split.sum(), slots_of.sum())).tolist()
        items, splits = items[:, :n_items], splits[:, :n_splits]
        if layout.batch == layout.heads == 1:
            long_items = n_slots
    return Schedule(
        items=items.contiguous(),
        splits=splits.contiguous(),
        others=others,
        mask_ids=mask_ids,
        edges=edges,
        slots=n_slots,
        long_items=long_items,
        partial=partial,
        direction=direction,
    )


def _of_short_rows(layout: BlockLayout) -> Schedule:
    """The rows of a layout of learned indices, none longer than an item: in their own order, as they lie."""
    items = layout._memo.get(SHORT_ROWS)
    if not isinstance(items, Tensor):
        items = _items_of_rows(layout)
    return Schedule(
        items=items,
        splits=items.new_empty((3, 0)),
        others=layout.indices,
        mask_ids=layout.mask_ids,
        edges=items.new_empty(0),
        slots=0,
        long_items=0,
        partial=layout.masks.shape[0] > 0,
        direction="rows",
    )


def _items_of_rows(layout: BlockLayout) -> Tensor:
    """One item of each row, whose whole tiles come first in the layout itself."""
    indptr, indices = layout.indptr, layout.indices
    start, end = indptr[:-1], indptr[1:]
    full_end = end
    if layout.masks.shape[0]:
        before = indptr.new_zeros(indices.numel() + 1)
        torch.cumsum(layout.mask_ids >= 0, 0, dtype=before.dtype, out=before[1:])
        full_end = end - before.index_select(0, indptr).diff()
    row = torch.arange(start.numel(), dtype=start.dtype, device=start.device)
    first = indices.index_select(0, start.clamp(max=indices.numel() - 1)) * (end > start)
    return torch.stack((row, start, full_end, end, torch.full_like(row, -1), first.to(start.dtype)))
