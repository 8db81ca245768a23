"""Layouts from learned indices: made on the device they lie on, without ever waiting for it.

Sorted once, a row of a selection is a row of the layout: its used places come first, and its partial tiles
come last, because both ends of a sequence and the causal diagonal cut the last tiles of a row. What remains
is to close up the rows, by a running count over rows, not over tiles.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout.build import FULL, no_masks

_INT32 = 2**31 - 1

SHORT_ROWS = "short_rows"
"""Key of ``BlockLayout._memo`` for the items of the rows of learned indices, where they came with them."""


class Chosen(NamedTuple):
    """A selection in order.

    Attributes:
        column: integers ``[B, G, q_blocks, k]``: key blocks, ascending; unused places last, and 0.
        valid: bool, the same shape: the place is used.
    """

    column: Tensor
    valid: Tensor


class TopkTensors(NamedTuple):
    """The tensors of a layout without the transpose, and

    Attributes:
        slot: int64 ``[B, G, heads of a group, q_blocks, k]``: the entry of each place. Unused places have the
            unused entries past the end, so that every entry has one place.
        items: one of each row, as ``Schedule`` has them; None where they wait until they are asked for.
    """

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    slot: Tensor
    items: Tensor | None


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


class Cuts(NamedTuple):
    """How the ends of the sequences and the causal diagonal cut tiles: what the lengths alone decide.

    With masks numbered in the order in which tiles come nearer to the end of a row, the number is linear in
    the key block, ``max(first − down·row + across·column, FULL)``, plus ``last`` in the last row. So it never
    descends in a row: partial tiles come last.

    Of mask ``m``, query ``i`` sees the keys before ``start − m·step + slope·i``. From mask ``whole_rows`` on,
    masks are those of the last row: the keys before ``tail − (m − whole_rows)·step + slope·i``, and none from
    query ``rows_left`` on.
    """

    masks: int
    whole_rows: int
    first: int
    down: int
    across: int
    last: int
    start: int
    tail: int
    step: int
    slope: int
    rows_left: int

    @staticmethod
    def of(sizes: Sizes) -> Cuts:
        q_len, k_len, block_q, block_k, is_causal = sizes
        rows_left, cols_left = q_len % block_q, k_len % block_k
        if is_causal:
            # Keys stop at `ahead + query`, where ahead = q0 − k0 takes the values least + slot·step. From
            # slot `cut` on, tiles are whole. Keys past the end lie after every query: the diagonal cuts them
            # off too.
            offset, step = k_len - q_len, gcd(block_q, block_k)
            least = offset % step - block_q
            least += 0 if least > -block_q else step
            cut = max(0, -(-(block_k - 1 - least) // step))
            first, down, across = cut - 1 - (offset - least) // step, block_q // step, block_k // step
            start, slope = least + 1 + (cut - 1) * step, 1
            tail = start + step
            # Down to the last tile that the valid queries reach.
            tails = cut + 1 - max(0, -(-(1 - rows_left - least) // step))
        else:
            cut = 1 if cols_left else 0
            first, down, across = cut - sizes.k_blocks, 0, 1
            start, tail, slope, tails = cols_left, block_k, 0, 1 + cut
            step = block_k - cols_left
            if not (rows_left or cols_left):
                first, across = FULL, 0
        # The last row has masks of its own, the first of them for tiles that only the end of the rows cuts.
        masks, last = (cut + tails, cut + 1) if rows_left else (cut, 0)
        return Cuts(masks, cut, first, down, across, last, start, tail, step, slope, rows_left)


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

    cuts = Cuts.of(sizes)
    if cuts.masks:
        mask_ids = entries(_mask_ids(chosen, cuts))
    else:
        mask_ids = torch.full((capacity,), FULL, dtype=torch.int32, device=device)
    return TopkTensors(indptr, entries(column), mask_ids, _masks(cuts, sizes, device), slot, None)


def _mask_ids(chosen: Chosen, cuts: Cuts) -> Tensor:
    """Mask number of each place."""
    column, valid = chosen
    row = torch.arange(column.shape[2], dtype=column.dtype, device=column.device)[:, None]
    ids = torch.add(cuts.first - cuts.down * row, column, alpha=cuts.across).clamp_(min=FULL)
    if cuts.last:
        ids[:, :, -1] += cuts.last
    return ids.masked_fill_(~valid, FULL)


def _masks(cuts: Cuts, sizes: Sizes, device: torch.device) -> Tensor:
    """int32 ``[n_masks, block_q, words]``: bits of the keys before where each query's end."""
    block_q, block_k = sizes.block_q, sizes.block_k
    if not cuts.masks:
        return no_masks(block_q, block_k, device)
    query = torch.arange(block_q, device=device)
    mask = torch.arange(cuts.masks, device=device)[:, None]
    ends = cuts.start - cuts.step * mask + cuts.slope * query
    if cuts.last:
        of_last = mask >= cuts.whole_rows
        ends = ends + of_last * (cuts.tail - cuts.start + cuts.whole_rows * cuts.step)
        ends = ends.masked_fill(of_last & (query >= cuts.rows_left), 0)
    word = ends[..., None] - torch.arange(0, block_k, 32, device=device)
    return ((1 << word.clamp_(0, min(32, block_k))) - 1).to(torch.int32)
