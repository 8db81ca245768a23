"""Layouts from learned indices: made on the device they lie on, without ever waiting for it.

Sorted once, a row of a selection is a row of the layout: its used places come first, and its partial tiles
come last, because both ends of a sequence and the causal diagonal cut the last tiles of a row. What remains
is to close up the rows, by a running count over rows, not over tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout.build import FULL, no_masks

_INT32 = 2**31 - 1

SHORT_ROWS = "short_rows"
"""Key of ``BlockLayout._memo`` for what is known of the rows of a layout of learned indices."""


@dataclass(frozen=True, eq=False)
class ShortRows:
    """Of each row of a layout of learned indices, whose whole tiles come first in the layout itself.

    Attributes:
        partial: partial tiles, None where there are none; broadcast over equal heads.
        first: int32, key block of the first tile, 0 in a row without tiles; broadcast as ``partial``.
    """

    partial: Tensor | None
    first: Tensor

    @classmethod
    def of(cls, indptr: Tensor, indices: Tensor, mask_ids: Tensor, masks: Tensor) -> ShortRows:
        """From the tensors alone: where a graph passed them on without what was known of them."""
        start, end = indptr[:-1], indptr[1:]
        first = indices.index_select(0, start.clamp(max=indices.numel() - 1)) * (end > start)
        if not masks.shape[0]:
            return cls(None, first)
        before = indptr.new_zeros(mask_ids.numel() + 1)
        torch.cumsum(mask_ids >= 0, 0, dtype=before.dtype, out=before[1:])
        return cls(before.index_select(0, indptr).diff(), first)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.first,) if self.partial is None else (self.first, self.partial)


class Chosen(NamedTuple):
    """A selection in order.

    Attributes:
        column: int32 ``[B, G, q_blocks, k]``: key blocks, ascending; unused places last, and 0.
        valid: bool, the same shape: the place is used.
    """

    column: Tensor
    valid: Tensor


class TopkTensors(NamedTuple):
    """The tensors of a layout without the transpose, and

    Attributes:
        slot: int64 ``[B, G, heads of a group, q_blocks, k]``: the entry of each place. Unused places have the
            unused entries past the end, so that every entry has one place.
        rows: what is known of the rows.
    """

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    slot: Tensor
    rows: ShortRows


class Sizes(NamedTuple):
    """Tokens of queries and keys and of their blocks, and whether the future is cut off."""

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    is_causal: bool

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)


def check_indices(indices: Tensor, q_blocks: int) -> None:
    if (
        not isinstance(indices, Tensor)
        or indices.dim() != 4
        or indices.is_floating_point()
        or indices.is_complex()
        or indices.dtype == torch.bool
        or indices.shape[2] != q_blocks
        or indices.numel() == 0
    ):
        got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else repr(indices)
        raise LayoutError(
            explain(
                "from_topk(indices)",
                expected=f"integers [batch or 1, heads or 1, q_blocks = {q_blocks}, k]",
                got=got,
                fix="Give the key blocks of each query block; −1 marks an unused place.",
            )
        )


def distinct(indices: Tensor, k_blocks: int) -> Tensor:
    """Any integers → int32, each key block at most once in a row, −1 in place of all else."""
    if indices.dtype != torch.int64:
        indices = indices.to(torch.int32)
    keep = (indices >= 0) & (indices < k_blocks)
    col = torch.where(keep, indices.to(torch.int32), -1).sort(-1).values
    col[..., 1:].masked_fill_(col[..., 1:] == col[..., :-1], -1)
    return col


def in_order(indices: Tensor, sizes: Sizes) -> Chosen:
    """Distinct key blocks, integers ``[B, G, q_blocks, k]``, −1 = unused, in order; the future is dropped."""
    # Without the sign −1 is the largest number, hence last.
    col = (indices.to(torch.int32) & _INT32).sort(-1).values
    if sizes.is_causal:
        # The last key that the last query of each row may see. Rounds down: −1 is no key block.
        ahead = sizes.k_len - sizes.q_len + sizes.block_q - 1
        last = torch.arange(
            ahead, ahead + sizes.q_blocks * sizes.block_q, sizes.block_q, dtype=torch.int32, device=col.device
        )
        last = last.clamp_(max=sizes.k_len - 1).div_(sizes.block_k, rounding_mode="floor")
        valid = col <= last[:, None]
    else:
        valid = col < sizes.k_blocks
    return Chosen(col.mul_(valid), valid)


def topk_tensors(chosen: Chosen, share: int, sizes: Sizes) -> TopkTensors:
    """The layout of ``G·share`` heads, each group's selection repeated. Nothing is read back to the host."""
    column, valid = chosen
    batch, groups, q_blocks, k = column.shape
    device, rows = column.device, batch * groups * share * q_blocks
    capacity = rows * k
    kind = torch.int32 if capacity <= _INT32 else torch.int64

    def of_heads(x: Tensor) -> Tensor:
        return x[:, :, None].expand(batch, groups, share, *x.shape[2:])

    indptr = torch.zeros(rows + 1, dtype=kind, device=device)
    torch.cumsum(of_heads(valid.sum(-1, dtype=kind)).reshape(rows), 0, dtype=kind, out=indptr[1:])
    start, end = indptr[:-1], indptr[1:]
    # Place j of row r is entry start + j. Unused places come after all tiles: those of earlier rows, of which
    # there are r·k − start, and of this row, from j = end − start on.
    unused = torch.arange(0, capacity, k, dtype=kind, device=device).sub_(end).add_(indptr[-1])
    shape = (batch, groups, share, q_blocks, 1)
    slot = torch.where(of_heads(valid), start.view(shape), unused.view(shape))
    slot = slot + torch.arange(k, device=device)

    def entries(values: Tensor) -> Tensor:
        return values.new_empty(capacity).index_put_((slot,), values[:, :, None])

    ids, masks = _mask_ids(chosen, sizes)
    if ids is None:
        partial = None
        mask_ids = torch.full((capacity,), FULL, dtype=torch.int32, device=device)
    else:
        partial, mask_ids = of_heads((ids >= 0).sum(-1, dtype=kind)), entries(ids)
    known = ShortRows(partial, of_heads(column[..., 0]))
    return TopkTensors(indptr, entries(column), mask_ids, masks, slot, known)


def _mask_ids(chosen: Chosen, sizes: Sizes) -> tuple[Tensor | None, Tensor]:
    """Mask number of each place (None: all are whole), and the masks: few, and known from the lengths alone.

    With masks numbered in the order in which tiles come nearer to the end of a row, the number is linear in
    the key block, and at least FULL. So it never descends in a row: partial tiles come last.
    """
    q_len, k_len, block_q, block_k, is_causal = sizes
    column, valid = chosen
    device, offset = column.device, k_len - q_len
    rows_left, cols_left = q_len % block_q, k_len % block_k
    if not (is_causal or rows_left or cols_left):
        return None, no_masks(block_q, block_k, device)
    query = torch.arange(block_q, device=device)
    if is_causal:
        # Keys stop at `ahead + query`, where ahead = q0 − k0 takes the values least + slot·step. From slot
        # `cut` on, tiles are whole. Keys past the end lie after every query: the diagonal cuts them off too.
        step = gcd(block_q, block_k)
        least = offset % step - block_q
        least += 0 if least > -block_q else step
        cut = max(0, -(-(block_k - 1 - least) // step))
        first, down = cut - 1 - (offset - least) // step, block_q // step
        line = torch.arange(first, first - down * sizes.q_blocks, -down, dtype=torch.int32, device=device)
        ids = torch.add(line[:, None], column, alpha=block_k // step)
        ends = torch.arange(least + 1 + (cut - 1) * step, least + 1 - step, -step, device=device)
        ends = ends[:, None] + query
        if rows_left:
            # Down to the last tile that the valid queries reach.
            stop = max(0, -(-(1 - rows_left - least) // step)) - 1
            tail = torch.arange(least + 1 + cut * step, least + 1 + stop * step, -step, device=device)
            ends = torch.cat((ends, torch.where(query < rows_left, tail[:, None] + query, 0)))
    else:
        cut = 1 if cols_left else 0
        ids = column + (cut - sizes.k_blocks)
        ends = torch.full((cut, block_q), cols_left, device=device)
        if rows_left:
            widths = (block_k, cols_left) if cols_left else (block_k,)
            ends = torch.cat((ends, *(torch.where(query < rows_left, width, 0)[None] for width in widths)))
    ids = ids.clamp_(min=FULL)
    if rows_left:
        # The last row has masks of its own, the first of them for tiles that only the end of the rows cuts.
        ids[:, :, -1] += cut + 1
    return ids.masked_fill_(~valid, FULL), _below(ends, block_k)


def _below(ends: Tensor, block_k: int) -> Tensor:
    """Bits ``j < end`` of every row of a mask: int64 ``[…]`` → int32 ``[…, words]``."""
    word = ends[..., None] - torch.arange(0, block_k, 32, device=ends.device)
    return ((1 << word.clamp_(0, min(32, block_k))) - 1).to(torch.int32)
