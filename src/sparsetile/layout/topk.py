"""Layouts from learned indices: made on the device they lie on, without ever waiting for it."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.patterns.tiles import interval_words

_INT32 = 2**31 - 1


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


def topk_tensors(
    indices: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The seven tensors of a layout, in order. No operation here reads a value back to the host."""
    batch, heads, q_blocks = indices.shape[:3]
    k_blocks, groups, offset = -(-k_len // block_k), batch * heads, k_len - q_len
    device, capacity = indices.device, indices.numel()
    kind = torch.int32 if capacity <= _INT32 else torch.int64
    block = torch.arange(q_blocks, device=device)

    keep = (indices >= 0) & (indices < k_blocks)
    if is_causal:
        last = ((block + 1) * block_q).clamp(max=q_len) + (offset - 1)
        keep &= indices <= torch.div(last, block_k, rounding_mode="floor")[:, None]
    col = torch.where(keep, indices, k_blocks).to(torch.int32).sort(-1).values
    again = torch.zeros_like(col, dtype=torch.bool)
    again[..., 1:] = col[..., 1:] == col[..., :-1]
    keep = (col < k_blocks) & ~again

    # Kept entries move up to where their row starts; all others to places past the end.
    counts = keep.sum(-1).flatten()
    indptr = torch.zeros(groups * q_blocks + 1, dtype=kind, device=device)
    torch.cumsum(counts, 0, dtype=kind, out=indptr[1:])
    place = indptr[:-1].reshape(batch, heads, q_blocks, 1) + (keep.cumsum(-1) - 1)
    spare = torch.arange(capacity, 2 * capacity, device=device).reshape(indices.shape)
    place = torch.where(keep, place, spare).flatten()

    def compact(values: Tensor, fill: int, dtype: torch.dtype) -> Tensor:
        out = torch.full((2 * capacity,), fill, dtype=dtype, device=device)
        return out.scatter_(0, place, values.expand(indices.shape).flatten().to(dtype))[:capacity]

    ids, masks = _masks(block[:, None], col, q_len, k_len, block_q, block_k, is_causal)
    group = torch.arange(groups, device=device).reshape(batch, heads, 1, 1)
    line_kind = torch.int32 if groups * k_blocks < _INT32 else torch.int64
    valid = torch.arange(capacity, device=device) < indptr[-1]
    lines = compact(group * k_blocks + col, 0, line_kind)
    lines = torch.where(valid, lines, groups * k_blocks)
    lines, edges = lines.sort(stable=True)
    bounds = torch.arange(groups * k_blocks + 1, dtype=line_kind, device=device)
    rows = compact(block[:, None], 0, torch.int32)
    return (
        indptr,
        torch.where(valid, compact(col, 0, torch.int32), 0),
        torch.where(valid, compact(ids, -1, torch.int32), -1),
        masks,
        torch.searchsorted(lines, bounds).to(kind),
        torch.where(valid, rows.index_select(0, edges), 0),
        edges.to(kind),
    )


def _masks(
    row: Tensor, col: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Mask number of each tile, and the masks: few, and known from the lengths alone."""
    device = col.device
    rows_left, cols_left = q_len % block_q, k_len % block_k
    in_tail = row == (-(-q_len // block_q) - 1) if rows_left else torch.zeros_like(row, dtype=torch.bool)
    query = torch.arange(block_q, device=device)
    if is_causal:
        # Keys stop at `ahead + query`, where ahead = q0 − k0 takes few values: those of one residue.
        # Keys past the end lie after every query, so the diagonal cuts them off too.
        step = gcd(block_q, block_k)
        least = (k_len - q_len) % step - block_q
        least += 0 if least > -block_q else step
        cut = max(0, -(-(block_k - 1 - least) // step))
        ahead = row * block_q + (k_len - q_len) - col * block_k
        slot = torch.div(ahead - least, step, rounding_mode="floor").clamp(max=cut)
        ids = torch.where(slot < cut, slot, -1)
        ends = least + torch.arange(cut, device=device)[:, None] * step + query + 1
        if rows_left:
            # In the tail a slot counts from the first whose valid queries reach the tile, and `cut` is whole.
            first = max(0, -(-(1 - rows_left - least) // step))
            ids = torch.where(in_tail, cut - first + slot, ids)
            slots = torch.arange(first, cut + 1, device=device)[:, None]
            tail = torch.where(slots < cut, least + slots * step + query + 1, block_k)
            ends = torch.cat((ends, torch.where(query < rows_left, tail, 0)))
    else:
        at_end = col == (-(-k_len // block_k) - 1) if cols_left else torch.zeros_like(col, dtype=torch.bool)
        kinds = (2 if rows_left else 1) * (2 if cols_left else 1) - 1
        # With both tails: 0 rows, 1 keys, 2 both. With one of them: 0.
        ids = torch.where(in_tail, torch.where(at_end, kinds - 1, 0), torch.where(at_end, kinds // 2, -1))
        number = torch.arange(kinds, device=device)[:, None]
        cuts_rows = (number != 1) if rows_left else (number < 0)
        cuts_keys = (number != 0) if rows_left else (number == 0)
        width = torch.where(cuts_keys & (cols_left > 0), cols_left, block_k)
        ends = torch.where(cuts_rows & (query >= rows_left), 0, width)
    return ids, interval_words(torch.zeros_like(ends), ends, block_k)
