"""How the CPU backend cuts a layout into chunks: rows of equal tile count side by side, long rows in steps.

Rows of one count form a rectangle without padding. ``d`` distinct counts need at least ``d²/2`` tiles, so
there are at most ``tiles / budget + √(2·tiles)`` chunks whatever the pattern, and a row of thousands of
tiles is walked in steps by an online softmax beside the other rows of its count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sparsetile.layout.blocks import BlockLayout

_CHUNK_ELEMENTS = 32 * (128 * 128 + 3 * 128 * 64)  # measured: 2 MiB of fp32 scores stay in cache


@dataclass(frozen=True)
class Group:
    """Layout rows ``rows`` ``[n]`` of ``count`` tiles each, from ``first`` ``[n]`` on in
    ``layout.indices``."""

    count: int
    rows: Tensor
    first: Tensor


@dataclass(frozen=True)
class Plan:
    """The rows of a layout by tile count; O(rows) memory."""

    groups: tuple[Group, ...]
    has_empty: bool
    has_partial: bool


def plan_rows(layout: BlockLayout, first: Tensor, counts: Tensor) -> Plan:
    """Groups the rows of ``layout``, of which row ``r`` has ``counts[r]`` tiles from ``first[r]`` on."""
    order = torch.sort(counts, descending=True, stable=True).indices
    values, sizes = torch.unique_consecutive(counts[order], return_counts=True)
    groups = []
    for count, rows in zip(values.tolist(), torch.split(order, sizes.tolist()), strict=True):
        if count:
            groups.append(Group(count, rows, first[rows]))
    return Plan(tuple(groups), bool((counts == 0).any()), bool((layout.mask_ids >= 0).any()))


def layout_plan(layout: BlockLayout) -> Plan:
    """The plan of the whole layout, made once."""
    plan = layout._memo.get("cpu_plan")
    if plan is None:
        indptr = layout.indptr.long()
        plan = layout._memo["cpu_plan"] = plan_rows(layout, indptr[:-1], indptr.diff())
    return cast(Plan, plan)


def first_at_least(layout: BlockLayout, column: int) -> Tensor:
    """For each row, the position in ``indices`` of its first tile of key block ≥ ``column`` ``[rows]``."""
    low, high = layout.indptr[:-1].long(), layout.indptr[1:].long()
    end = high
    longest = int((high - low).max()) if len(low) else 0
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        inside = middle < high
        below = inside & (layout.indices[middle.clamp(max=layout.capacity - 1)] < column)
        low = torch.where(below, middle + 1, low)
        high = torch.where(inside & ~below, middle, high)
    return torch.minimum(low, end)


@dataclass(frozen=True)
class Heads:
    """How layout rows unfold over the batch elements and heads of a call.

    ``stack`` query heads that share a key head and a layout row are stacked in one matrix product. A *copy*
    is one unfolding of a shared layout. Ids count tiles of ``[B, H, blocks]``; those of a (copy, row) pair
    are sums.
    """

    stack: int
    copy_q: Tensor
    copy_k: Tensor
    row_q: Tensor
    row_k: Tensor
    stack_q: Tensor


def unfold_heads(layout: BlockLayout, batch: int, heads: int, key_heads: int, budget: int) -> Heads:
    """Ids of the query tiles and key tiles for a call on ``layout``; the last are remembered."""
    key = (batch, heads, key_heads, budget)
    known = cast("tuple[tuple[int, ...], Heads] | None", layout._memo.get("cpu_heads"))
    if known is not None and known[0] == key:
        return known[1]
    unfolded = _unfold_heads(layout, batch, heads, key_heads, budget)
    layout._memo["cpu_heads"] = (key, unfolded)
    return unfolded


def _unfold_heads(layout: BlockLayout, batch: int, heads: int, key_heads: int, budget: int) -> Heads:
    group = heads // key_heads
    stack = 1
    if layout.heads == 1:
        stack = max(d for d in range(1, group + 1) if group % d == 0 and d <= max(budget, 1))
    nq, nk = layout.q_blocks, layout.k_blocks
    b = torch.arange(batch if layout.batch == 1 else 1)[:, None]
    h = torch.arange(0, heads if layout.heads == 1 else 1, stack)
    row = torch.arange(layout.batch * layout.heads * nq)
    row_b, row_h, row_i = row // (layout.heads * nq), row // max(nq, 1) % layout.heads, row % max(nq, 1)
    return Heads(
        stack=stack,
        copy_q=((b * heads + h) * nq).flatten(),
        copy_k=((b * key_heads + h // group) * nk).flatten(),
        row_q=(row_b * heads + row_h) * nq + row_i,
        row_k=(row_b * key_heads + row_h // group) * nk,
        stack_q=torch.arange(stack) * nq,
    )


def tile_budget(layout: BlockLayout, width: int, itemsize: int) -> tuple[int, int]:
    """Tiles a chunk aims at, and tiles it must not pass, for head dimension ``width``."""
    block = max(layout.block_q, layout.block_k)
    aim = max(32, _CHUNK_ELEMENTS // (layout.block_q * layout.block_k + 3 * block * width))
    most = max(1, 2**23 // (itemsize * block * width))
    return min(aim, most), most


@dataclass(frozen=True)
class Step:
    """Key tiles ``[copies, rows, tiles]`` of one step of a chunk, and where they stand in the layout.

    ``edges`` ``[rows, tiles]`` are positions in ``layout.indices``; ``partial`` lists ``(start, stop, mask
    ids)`` for runs of tile columns that hold partial tiles, mask ids ``[rows or 1, stop − start]``.
    """

    keys: Tensor
    edges: Tensor
    partial: tuple[tuple[int, int, Tensor], ...]


@dataclass(frozen=True)
class Chunk:
    """``copies × rows`` rows of attention that are computed together.

    ``queries`` ``[copies, rows, stack]`` are ids of query tiles; ``copies`` is the range of copies.
    """

    layout: BlockLayout
    plan: Plan
    group: Group
    queries: Tensor
    key_base: Tensor
    rows: slice
    tiles_a_step: int

    def steps(self) -> Iterator[Step]:
        for start in range(0, self.group.count, self.tiles_a_step):
            stop = min(start + self.tiles_a_step, self.group.count)
            edges = self.group.first[self.rows, None] + torch.arange(start, stop)
            keys = self.key_base[..., None] + self.layout.indices[edges]
            partial = _partial_runs(self.layout.mask_ids[edges]) if self.plan.has_partial else ()
            yield Step(keys, edges, partial)


def _partial_runs(mask_ids: Tensor) -> tuple[tuple[int, int, Tensor], ...]:
    """Runs of columns of ``mask_ids`` ``[rows, tiles]`` with partial tiles; beyond two, one run spans all."""
    columns = (mask_ids >= 0).any(0).nonzero().squeeze(1).tolist()
    if not columns:
        return ()
    runs = [[columns[0], columns[0] + 1]]
    for column in columns[1:]:
        if column == runs[-1][1]:
            runs[-1][1] = column + 1
        else:
            runs.append([column, column + 1])
    if len(runs) > 2:
        runs = [[runs[0][0], runs[-1][1]]]
    partial = []
    for start, stop in runs:
        ids = mask_ids[:, start:stop]
        same = len(ids) == 1 or bool((ids == ids[:1]).all())
        partial.append((start, stop, ids[:1] if same else ids))
    return tuple(partial)


def chunks(layout: BlockLayout, plan: Plan, heads: Heads, budget: tuple[int, int]) -> Iterator[Chunk]:
    """Cuts the rows of ``plan``, unfolded by ``heads``, into chunks of about ``budget[0]`` tiles."""
    aim, most = budget
    copies = len(heads.copy_q)
    for group in plan.groups:
        longest = max(1, aim // heads.stack)
        steps = -(-group.count // longest)
        tiles = -(-group.count // steps)
        items = -(-aim // (tiles * heads.stack))
        if items * tiles * heads.stack > most:
            items = max(1, most // (tiles * heads.stack))
        rows_at_once = min(items, len(group.rows))
        copies_at_once = min(-(-items // rows_at_once) if rows_at_once < items else 1, copies)
        if rows_at_once * copies_at_once * tiles * heads.stack > most:
            copies_at_once = max(1, copies_at_once - 1)
        for c in range(0, copies, copies_at_once):
            copy_q = heads.copy_q[c : c + copies_at_once, None]
            copy_k = heads.copy_k[c : c + copies_at_once, None]
            for r in range(0, len(group.rows), rows_at_once):
                rows = slice(r, r + rows_at_once)
                at = group.rows[rows]
                queries = (copy_q + heads.row_q[at])[..., None] + heads.stack_q
                yield Chunk(layout, plan, group, queries, copy_k + heads.row_k[at], rows, tiles)
