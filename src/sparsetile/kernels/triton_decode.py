# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Decoding on a GPU: the tiles of a row are split over programs, whose parts a second kernel merges.

A new token is one query, and reading the cache is all the work: each program takes a few tiles of one
sequence's row for the query heads that share a key head, so that each key is read once. Rows are found on
the device, from the lengths; nothing waits for it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetile.kernels.decode_request import DecodeRequest
from sparsetile.kernels.triton_tiles import product

_LOG2_E = math.log2(math.e)
_PROGRAMS_A_MULTIPROCESSOR = 4
_STEP_BYTES = 1 << 14  # of keys, and as many of values, that a program has in flight at a step


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    out,
    lse,
    indptr,
    indices,
    mask_ids,
    masks,
    lengths,
    starts,
    pages,
    padding,
    scale,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    pages_b,
    capacity,
    q_blocks,
    per_split,
    splits,
    q_len,
    groups,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One share of one row: partial output ``[ROWS, WIDTH]``, normalised, and its LSE in base 2."""
    program, split = tl.program_id(0), tl.program_id(1)
    group = program % groups
    query = program // groups % q_len
    batch = (program // (groups * q_len)).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + batch).to(tl.int32)
    position = length - start - q_len + query
    row = tl.maximum(position, 0) // BLOCK_Q
    bit_row = tl.maximum(position, 0) % BLOCK_Q
    if BY_HEAD:
        row += group * q_blocks
        key_head = (group // GROUP).to(tl.int64)
        first_head = group
    else:
        key_head = group.to(tl.int64)
        first_head = group * GROUP
    STACK: tl.constexpr = 1 if BY_HEAD else GROUP
    first = tl.load(indptr + row).to(tl.int64)
    last = tl.load(indptr + row + 1).to(tl.int64)
    last = tl.where(position < 0, first, last)
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, last)
    lane = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDE)
    part = tl.arange(0, KEYS)
    STEPS: tl.constexpr = BLOCK_K // KEYS
    real = lane < STACK
    inside = dim < WIDTH
    head = (first_head + lane).to(tl.int64)
    q_at = q + batch * q_b + head[:, None] * q_h + query.to(tl.int64) * q_n + dim[None, :]
    queries = tl.load(q_at, mask=real[:, None] & inside[None, :], other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    for step in tl.range(0, (end - begin).to(tl.int32) * STEPS):
        edge = begin + step // STEPS
        cell = step % STEPS * KEYS + part
        column = tl.load(indices + edge)
        slot = start + column * BLOCK_K + cell
        there = (slot >= 0) & (slot < length)
        if HAS_PADDING:
            ignored = tl.load(padding + batch * capacity + slot, mask=there, other=1)
            there = there & (ignored == 0)
        if HAS_MASKS:
            number = tl.load(mask_ids + edge)
            word_at = (tl.maximum(number, 0).to(tl.int64) * BLOCK_Q + bit_row) * WORDS + cell // 32
            word = tl.load(masks + word_at, mask=number >= 0, other=-1)
            there = there & (((word >> (cell % 32)) & 1) == 1)
        if PAGE > 0:
            page = tl.load(pages + batch * pages_b + column * BLOCK_K // PAGE).to(tl.int64)
            place = (column * BLOCK_K % PAGE + cell).to(tl.int64)
            k_base = k + page * k_b + key_head * k_h
            v_base = v + page * v_b + key_head * v_h
        else:
            place = slot.to(tl.int64)
            k_base = k + batch * k_b + key_head * k_h
            v_base = v + batch * v_b + key_head * v_h
        keep = there[:, None] & inside[None, :]
        keys = tl.load(k_base + place[:, None] * k_n + dim[None, :], mask=keep, other=0.0)
        values = tl.load(v_base + place[:, None] * v_n + dim[None, :], mask=keep, other=0.0)
        scores = product(queries, tl.trans(keys), tl.zeros([ROWS, KEYS], tl.float32), PRECISION) * scale
        scores = tl.where(there[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = product(weights.to(values.dtype), values, acc, PRECISION)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    # [B, H, Nq, splits, …]
    place_out = ((batch * HEADS + head) * q_len + query) * splits + split
    tl.store(out + place_out[:, None] * WIDTH + dim[None, :], acc, mask=real[:, None] & inside[None, :])
    tl.store(lse + place_out, top + tl.log2(total), mask=real)


@triton.jit
def merge_kernel(
    parts,
    part_lse,
    out,
    lse,
    splits,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One query of one head: its parts weighted by what each has of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    dim = tl.arange(0, WIDE)
    own = tl.load(part_lse + row * splits + part, mask=part < splits, other=-float("inf"))
    top = tl.max(own, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(own - shift)
    total = tl.sum(weight, 0)
    there = (part < splits)[:, None] & (dim < WIDTH)[None, :]
    each = tl.load(parts + (row * splits + part)[:, None] * WIDTH + dim[None, :], mask=there, other=0.0)
    made = tl.sum(each * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * WIDTH + dim, made.to(out.dtype.element_ty), mask=dim < WIDTH)
    tl.store(lse + row, (top + tl.log2(total)) * 0.6931471805599453)


def longest_row(request: DecodeRequest) -> int:
    """Tiles of the layout's longest row; looked up on the device once for each layout."""
    memo = request.layout._memo
    if "longest_row" not in memo:
        memo["longest_row"] = int(request.layout.row_counts().max())
    longest = memo["longest_row"]
    assert isinstance(longest, int)
    return max(1, longest)


def split(programs: int, longest: int, multiprocessors: int) -> tuple[int, int]:
    """``(splits, tiles a split)`` that fill the GPU, no share of a row being empty of choice."""
    wanted = -(-_PROGRAMS_A_MULTIPROCESSOR * multiprocessors // programs)
    tiles = -(-longest // max(1, min(wanted, longest, 128)))
    return -(-longest // tiles), tiles


def launch_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Tensor,
    part_lse: Tensor,
    request: DecodeRequest,
    per_split: int,
    hip: bool = torch.version.hip is not None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments and options of ``decode_kernel``; parts ``[B, H, Nq, splits, D]``, part_lse without D."""
    layout = request.layout
    heads, key_heads = q.shape[1], k.shape[1]
    by_head = layout.heads > 1
    group = heads // key_heads
    pages, padding = request.page_table, request.key_padding_mask
    wide = max(16, triton.next_power_of_2(q.shape[3]))
    # Products in fp32 take plain instructions, many registers each.
    step = 8 if q.dtype == torch.float32 else 2
    q_b, q_h, q_n, _ = q.stride()
    k_b, k_h, k_n, _ = k.stride()
    v_b, v_h, v_n, _ = v.stride()
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "out": parts,
        "lse": part_lse,
        "indptr": layout.indptr,
        "indices": layout.indices,
        "mask_ids": layout.mask_ids,
        "masks": layout.masks,
        "lengths": request.lengths,
        "starts": request.lengths if request.starts is None else request.starts,
        "pages": request.lengths if pages is None else pages,
        "padding": layout.masks if padding is None else padding.view(torch.uint8),
        "scale": request.scale * _LOG2_E,
        "q_b": q_b,
        "q_h": q_h,
        "q_n": q_n,
        "k_b": k_b,
        "k_h": k_h,
        "k_n": k_n,
        "v_b": v_b,
        "v_h": v_h,
        "v_n": v_n,
        "pages_b": 0 if pages is None else pages.stride(0),
        "capacity": request.capacity,
        "q_blocks": layout.q_blocks,
        "per_split": per_split,
        "splits": parts.shape[3],
        "q_len": q.shape[2],
        "groups": heads if by_head else key_heads,
        "HEADS": heads,
        "GROUP": group,
        "BY_HEAD": by_head,
        "ROWS": max(16, triton.next_power_of_2(1 if by_head else group)),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "KEYS": min(layout.block_k, max(16, _STEP_BYTES // (wide * step))),
        "WORDS": layout.masks.shape[-1],
        "WIDTH": q.shape[3],
        "WIDE": wide,
        "PAGE": request.page_size,
        "HAS_STARTS": request.starts is not None,
        "HAS_PADDING": padding is not None,
        "HAS_MASKS": layout.masks.shape[0] > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    return arguments, {"num_warps": 4, "num_stages": 2 if hip else 3}


def decode(q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and natural LSE ``[B, H, Nq]`` fp32."""
    batch, heads, q_len, width = q.shape
    programs = batch * q_len * (heads if request.layout.heads > 1 else k.shape[1])
    splits, per_split = split(programs, longest_row(request), _multiprocessors(q))
    parts = torch.empty((batch, heads, q_len, splits, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(parts.shape[:4], dtype=torch.float32, device=q.device)
    arguments, options = launch_of(q, k, v, parts, part_lse, request, per_split)
    decode_kernel[(programs, splits)](**arguments, **options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    wide = max(16, triton.next_power_of_2(width))
    merge_kernel[(batch * heads * q_len,)](
        parts,
        part_lse,
        out,
        lse,
        splits,
        WIDTH=width,
        WIDE=wide,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=1 if wide <= 64 else 4,
    )
    return out, lse


@lru_cache(maxsize=16)
def _multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _multiprocessors(q: Tensor) -> int:
    # In the interpreter there are none; as many as on a small GPU.
    return _multiprocessors_of(q.device) if q.is_cuda else 8
