# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""The layout of learned indices in two kernels and a running count between them.

One sorts the rows of the selection, counts what they use and draws the masks; the other, which knows where
every row starts, writes what lies there. The tensors are those of ``layout/topk.py`` and, for items,
``layout/schedule.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetile.kernels.triton_backend import on_device
from sparsetile.kernels.triton_launch import Launch
from sparsetile.kernels.triton_topk import floor_quotient
from sparsetile.layout.topk import Chosen, Cuts, Sizes, TopkTensors
from sparsetile.patterns.tiles import mask_words

_ENTRIES = 256
"""Places, or words of masks, that a program of one warp holds."""

_INT32 = 2**31 - 1
_ROWS = ["rows", "nq", "k", "share", "row_programs", "ahead", "last_key"]
_MASKS = ["words", "whole_rows", "start", "tail", "step", "slope", "rows_left"]
_PLACES = ["rows", "nq", "k", "share", "first", "down", "across", "last"]


# fmt: off
@triton.jit(do_not_specialize=_ROWS + _MASKS)
def rows_kernel(
    given, column, valid, indptr, masks, rows, nq, k, share, row_programs, ahead, last_key,
    words, whole_rows, start, tail, step, slope, rows_left,
    ROWS: tl.constexpr, PLACES: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr, CAUSAL: tl.constexpr,
):
    # fmt: on
    """The first ``row_programs`` programs: ROWS rows of the selection in order, and how many tiles each has,
    to ``indptr`` past where it starts. The others: ENTRIES of the ``words`` of the masks."""
    program = tl.program_id(0)
    if program < row_programs:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        place = tl.arange(0, PLACES)
        known = row < rows
        keep = known[:, None] & (place < k)[None, :]
        at = row[:, None] * k + place[None, :]
        # Without the sign −1 is the largest number, hence last.
        block = tl.sort(tl.load(given + at, mask=keep, other=-1).to(tl.int32) & 0x7FFFFFFF)
        own = row % nq
        last = tl.zeros([ROWS], tl.int32) + last_key // BLOCK_K
        if CAUSAL:
            # The last key that the last query of each row may see.
            last = floor_quotient(tl.minimum(ahead + own.to(tl.int32) * BLOCK_Q, last_key), BLOCK_K)
        used = block <= last[:, None]
        tl.store(column + at, tl.where(used, block, 0).to(tl.int64), mask=keep)
        tl.store(valid + at, used.to(tl.uint8), mask=keep)
        count = tl.sum(used.to(tl.int32), 1).to(indptr.dtype.element_ty)
        into = indptr + 1 + row // nq * share * nq + own
        for _ in range(share):
            tl.store(into, count, mask=known)
            into += nq
        if program == 0:
            tl.store(indptr, tl.full([], 0, indptr.dtype.element_ty))
    else:
        entry = (program - row_programs) * ENTRIES + tl.arange(0, ENTRIES)
        query = entry // WORDS % BLOCK_Q
        mask = entry // (WORDS * BLOCK_Q)
        of_last = mask >= whole_rows
        end = tl.where(of_last, tail - (mask - whole_rows) * step, start - mask * step) + slope * query
        end = tl.where(of_last & (query >= rows_left), 0, end) - entry % WORDS * 32
        bits = tl.minimum(tl.maximum(end, 0), BLOCK_K)
        word = tl.where(bits >= 32, -1, (1 << tl.minimum(bits, 31)) - 1)
        tl.store(masks + entry, word, mask=entry < words)


# fmt: off
@triton.jit(do_not_specialize=_PLACES)
def places_kernel(
    column, indptr, indices, mask_ids, slots, items, rows, nq, k, share, first, down, across, last,
    ROWS: tl.constexpr, PLACES: tl.constexpr,
):
    # fmt: on
    """ROWS rows of the layout: what lies at their entries, where their places went, and their items."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, PLACES)
    known = row < rows
    keep = known[:, None] & (place < k)[None, :]
    own = row % nq
    selected = (row // nq // share * nq + own) * k
    start = tl.load(indptr + row, mask=known, other=0)
    end = tl.load(indptr + row + 1, mask=known, other=0)
    used = place[None, :] < (end - start)[:, None]
    block = tl.load(column + selected[:, None] + place[None, :], mask=keep, other=0).to(tl.int32)
    # Unused places come after all tiles: those of earlier rows, then of this one.
    unused = row * k - end + tl.load(indptr + rows)
    slot = tl.where(used, start[:, None].to(tl.int64), unused[:, None]) + place[None, :]
    ids = tl.maximum((first - down * own.to(tl.int32))[:, None] + across * block, -1)
    ids += tl.where(own == nq - 1, last, 0)[:, None]
    ids = tl.where(used, ids, -1)
    tl.store(indices + slot, block, mask=keep)
    tl.store(mask_ids + slot, ids, mask=keep)
    tl.store(slots + row[:, None] * k + place[None, :], slot, mask=keep)
    kind = items.dtype.element_ty
    partial = tl.sum((ids >= 0).to(tl.int32), 1).to(kind)
    tl.store(items + row, row.to(kind), mask=known)
    tl.store(items + rows.to(tl.int64) + row, start, mask=known)
    tl.store(items + rows.to(tl.int64) * 2 + row, end - partial, mask=known)
    tl.store(items + rows.to(tl.int64) * 3 + row, end, mask=known)
    tl.store(items + rows.to(tl.int64) * 4 + row, tl.full([ROWS], -1, kind), mask=known)
    first_block = tl.load(column + selected, mask=known, other=0).to(kind)
    tl.store(items + rows.to(tl.int64) * 5 + row, first_block, mask=known)


def chosen_tensors(given: Tensor, share: int, sizes: Sizes) -> tuple[Chosen, TopkTensors]:
    """``in_order`` and ``topk_tensors`` of a selection, and the items of its rows: the same numbers, but that
    ``Chosen.column`` is int64. Nothing is read back to the host.

    Args:
        given: distinct key blocks, integers ``[B, G, q_blocks, k]``, −1 = unused. A row is sorted in
            registers, so k should not be much above 256.
    """
    batch, groups, nq, k = given.shape
    device, rows = given.device, batch * groups * share * nq
    kind = torch.int32 if rows * k <= _INT32 else torch.int64
    cuts = Cuts.of(sizes)
    column = torch.empty(given.shape, dtype=torch.int64, device=device)
    valid = torch.empty(given.shape, dtype=torch.bool, device=device)
    indptr = torch.empty(rows + 1, dtype=kind, device=device)
    words = mask_words(sizes.block_k)
    masks = torch.empty((cuts.masks, sizes.block_q, words), dtype=torch.int32, device=device)
    indices, mask_ids = (torch.empty(rows * k, dtype=torch.int32, device=device) for _ in range(2))
    slot = torch.empty((batch, groups, share, nq, k), dtype=torch.int64, device=device)
    items = torch.empty((6, rows), dtype=kind, device=device)
    with on_device(device):
        rows_launch(given.contiguous(), column, valid, indptr, masks, share, sizes, cuts).run()
        indptr.cumsum_(0)
        places_launch(column, indptr, indices, mask_ids, slot, items, cuts).run()
    return Chosen(column, valid), TopkTensors(indptr, indices, mask_ids, masks, slot, items)


def rows_launch(
    given: Tensor,
    column: Tensor,
    valid: Tensor,
    indptr: Tensor,
    masks: Tensor,
    share: int,
    sizes: Sizes,
    cuts: Cuts,
) -> Launch:
    """The launch that fills ``column``, ``valid`` and ``masks``, and ``indptr`` with counts of the rows."""
    nq, k = given.shape[2:]
    rows = given.numel() // k
    height, places = _shape_of(k)
    programs = -(-rows // height)
    arguments = {
        "given": given,
        "column": column,
        "valid": valid.view(torch.uint8),
        "indptr": indptr,
        "masks": masks,
        "rows": rows,
        "nq": nq,
        "k": k,
        "share": share,
        "row_programs": programs,
        "ahead": sizes.k_len - sizes.q_len + sizes.block_q - 1,
        "last_key": sizes.k_len - 1,
        "words": masks.numel(),
        "whole_rows": cuts.whole_rows,
        "start": cuts.start,
        "tail": cuts.tail,
        "step": cuts.step,
        "slope": cuts.slope,
        "rows_left": cuts.rows_left,
        "ROWS": height,
        "PLACES": places,
        "ENTRIES": _ENTRIES,
        "BLOCK_Q": sizes.block_q,
        "BLOCK_K": sizes.block_k,
        "WORDS": masks.shape[2],
        "CAUSAL": sizes.is_causal,
    }
    return Launch(rows_kernel, programs + -(-masks.numel() // _ENTRIES), arguments, {"num_warps": 1})


def places_launch(
    column: Tensor,
    indptr: Tensor,
    indices: Tensor,
    mask_ids: Tensor,
    slot: Tensor,
    items: Tensor,
    cuts: Cuts,
) -> Launch:
    """The launch that fills ``indices``, ``mask_ids``, ``slot`` and ``items``."""
    share, nq, k = slot.shape[2:]
    rows = items.shape[1]
    height, places = _shape_of(k)
    arguments = {
        "column": column,
        "indptr": indptr,
        "indices": indices,
        "mask_ids": mask_ids,
        "slots": slot,
        "items": items,
        "rows": rows,
        "nq": nq,
        "k": k,
        "share": share,
        "first": cuts.first,
        "down": cuts.down,
        "across": cuts.across,
        "last": cuts.last,
        "ROWS": height,
        "PLACES": places,
    }
    return Launch(places_kernel, -(-rows // height), arguments, {"num_warps": 1})


def _shape_of(k: int) -> tuple[int, int]:
    """(rows of a program, places of a row, a power of two)."""
    places = max(2, 1 << (k - 1).bit_length())
    return max(1, _ENTRIES // places), places
