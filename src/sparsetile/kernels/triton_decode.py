# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Decoding: the tiles of a row are split over programs, whose parts a second kernel merges.

A few new queries do little work on many keys, so reading the cache is what takes the time: each key is read
once, for all queries of its sequence and all query heads that share it. Rows are found on the device, from
the lengths; nothing waits for it. The softmax is that of ``triton_forward.py``.
"""

import triton
import triton.language as tl

from sparsetile.kernels.triton_tiles import LN2, load_tile, product

COUNTS = ["works", "units", "row_count", "splits", "least", "capacity", "q_blocks", "layout_h"]
"""Arguments that differ from call to call: specialising on them would compile again and gain nothing."""


@triton.jit
def kept_pairs(masks, mask_id, query, key0, keys, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which pairs of a tile are allowed, bool ``[queries, keys]``; a mask id of −1 allows all, and nothing is
    loaded."""
    words_a_row: tl.constexpr = (BLOCK_K + 31) // 32
    words: tl.constexpr = (keys.shape[0] + 31) // 32
    partial = mask_id >= 0
    row = tl.maximum(mask_id, 0).to(tl.int64) * (BLOCK_Q * words_a_row) + query * words_a_row + key0 // 32
    group = keys // 32
    spread = tl.load(masks + row, mask=partial & (query >= 0), other=-1)[:, None]
    for index in tl.static_range(1, words):
        word = tl.load(masks + row + index, mask=partial & (query >= 0), other=-1)
        spread = tl.where((group == index)[None, :], word[:, None], spread)
    return ((spread >> (keys % 32 + key0 % 32)[None, :]) & 1) != 0


@triton.jit
def kept_keys(masks, mask_id, query, key0, keys, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same for one query, bool ``[keys]``."""
    words_a_row: tl.constexpr = (BLOCK_K + 31) // 32
    row = (tl.maximum(mask_id, 0).to(tl.int64) * BLOCK_Q + query) * words_a_row
    cell = key0 + keys
    word = tl.load(masks + row + cell // 32, mask=(mask_id >= 0) & (cell >= 0), other=-1)
    return ((word >> (cell % 32)) & 1) != 0


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def decode_kernel(
    q, k, v, out, lse, lengths, starts, pages, padding, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    st_b, sp_b, capacity, scale,
    indptr, others, mask_ids, masks, works, units, row_count, splits, least, q_blocks, layout_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, PAGE: tl.constexpr,
    PARTIAL: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """One share of the tiles of one row of the layout, for the queries that stand in it.

    A unit is a key head, whose ``GROUP`` query heads are stacked (or one query head, where heads have layouts
    of their own: then ``SHARING`` of them share a key head). The few queries of a sequence stand in one row
    of the layout or in two that follow one another: ``side`` says which of the two is meant. ``lse`` is in
    base 2 but for ``DIRECT``, the case of one split, whose results are final.
    """
    SIDES: tl.constexpr = 1 if QUERIES == 1 else 2
    CHUNKS: tl.constexpr = (QUERIES * GROUP + M - 1) // M
    STEPS: tl.constexpr = BLOCK_K // N
    program = tl.program_id(0)
    split = program // works
    work = program % works
    side = work % SIDES
    chunk = work // SIDES % CHUNKS
    unit = work // (SIDES * CHUNKS) % units
    batch = (work // (SIDES * CHUNKS * units)).to(tl.int64)

    length = capacity
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch), capacity).to(tl.int32)
    start = 0
    if starts is not None:
        start = tl.load(starts + batch).to(tl.int32)
    there = length - start
    block = tl.maximum(there - QUERIES, 0) // BLOCK_Q
    if SIDES == 2:
        last_block = tl.maximum(there - 1, 0) // BLOCK_Q
        if (side == 1) & (last_block == block):
            return
        block = tl.where(side == 1, last_block, block)
    stacked = chunk * M + tl.arange(0, M)
    query = stacked // GROUP
    head = (unit * GROUP + stacked % GROUP).to(tl.int64)
    position = there - QUERIES + query
    mine = (query < QUERIES) & (position >= 0) & (position // BLOCK_Q == block)
    # A query before the first key stands in no row; the first side writes its zeros.
    shown = mine | ((query < QUERIES) & (position < 0) & (side == 0))

    row = tl.minimum(block, q_blocks - 1) + unit * layout_h
    begin = tl.load(indptr + row)
    total = (tl.load(indptr + row + 1) - begin).to(tl.int32) * STEPS
    total = tl.where((there > 0) & (block < q_blocks), total, 0)
    share = tl.maximum((total + splits - 1) // splits, least)
    first = tl.minimum(split * share, total)
    last = tl.minimum(first + share, total)
    others += begin
    mask_ids += begin

    keys = tl.arange(0, N)
    dims = tl.arange(0, BLOCK_D)
    kv_head = (unit // SHARING).to(tl.int64)
    q_at = q + batch * sq_b + head[:, None] * sq_h + query[:, None] * sq_n + dims[None, :]
    q_tile = tl.load(q_at, mask=(query < QUERIES)[:, None] & (dims < D)[None, :], other=0.0)
    k += kv_head * sk_h
    v += kv_head * sv_h
    if pages is None:
        k += batch * sk_b
        v += batch * sv_b
    else:
        pages += batch * st_b
    if padding is not None:
        padding += batch * sp_b

    acc = tl.zeros((M, BLOCK_D), tl.float32)
    total_weight = tl.zeros((M,), tl.float32)
    peak = tl.full((M,), float("-inf"), tl.float32)
    for step in range(first, last):
        entry = step // STEPS
        key_in_tile = (step % STEPS) * N
        key0 = tl.load(others + entry) * BLOCK_K + key_in_tile
        slot = start + key0
        key_ok = slot + keys < length
        if starts is not None:
            key_ok = key_ok & (slot + keys >= 0)
        if padding is not None:
            key_ok = key_ok & (tl.load(padding + slot + keys, mask=key_ok, other=1) == 0)
        if PARTIAL:
            mask_id = tl.load(mask_ids + entry)
            if QUERIES == 1:
                # What the only query may not attend is not even read.
                key_ok = key_ok & kept_keys(
                    masks, mask_id, tl.maximum(there - 1, 0) % BLOCK_Q, key_in_tile, keys, BLOCK_Q, BLOCK_K
                )
        place = slot.to(tl.int64)
        k_at = k
        v_at = v
        if pages is not None:
            page = tl.load(pages + key0 // PAGE, mask=key0 < length, other=0).to(tl.int64)
            place = (key0 % PAGE).to(tl.int64)
            k_at += page * sk_b
            v_at += page * sv_b
        k_tile = load_tile(k_at + place * sk_n, keys, sk_n, dims, key_ok, D, BLOCK_D, True)
        s = product(q_tile, tl.trans(k_tile), None, PRECISION) * scale
        allowed = key_ok[None, :]
        if QUERIES > 1:
            allowed = allowed & mine[:, None]
        if PARTIAL and QUERIES > 1:
            in_row = tl.where(mine, position % BLOCK_Q, 0)
            allowed = allowed & kept_pairs(masks, mask_id, in_row, key_in_tile, keys, BLOCK_Q, BLOCK_K)
        s = tl.where(allowed, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # exp2(−inf − −inf) is NaN: a row that has met no key yet is measured from 0.
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - origin[:, None])
        shrink = tl.exp2(peak - origin)
        total_weight = total_weight * shrink + tl.sum(p, 1)
        v_tile = load_tile(v_at + place * sv_n, keys, sv_n, dims, key_ok, D, BLOCK_D, True)
        acc = product(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
        peak = new_peak

    empty = total_weight == 0.0
    divisor = tl.where(empty, 1.0, total_weight)
    row_lse = tl.where(empty, float("-inf"), peak + tl.log2(divisor))
    at = (batch * (units * GROUP) + head) * QUERIES + query
    if DIRECT:
        row_lse = row_lse * LN2
    else:
        at += split.to(tl.int64) * row_count
    tl.store(lse + at, row_lse, mask=shown)
    # The part of a program without tiles is only said to be none.
    stored = shown
    if not DIRECT:
        stored = shown & (first < last)
    result = (acc / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * D + dims[None, :], result, mask=stored[:, None] & (dims < D)[None, :])


# fmt: off
@triton.jit(do_not_specialize=["row_count", "splits"])
def merge_kernel(
    part_out, part_lse, out, lse, row_count, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):
    # fmt: on
    """One query of one head: its parts, weighted by what each has of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full((), float("-inf"), tl.float32)
    for first in range(0, splits, PARTS):
        at = (first + part).to(tl.int64) * row_count + row
        own = tl.load(part_lse + at, mask=first + part < splits, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(own, 0))
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, PARTS):
        at = (first + part).to(tl.int64) * row_count + row
        own = tl.load(part_lse + at, mask=first + part < splits, other=float("-inf"))
        weight = tl.exp2(own - origin)
        total += tl.sum(weight, 0)
        there = (own > float("-inf"))[:, None] & (dims < D)[None, :]
        each = tl.load(part_out + at[:, None] * D + dims[None, :], mask=there, other=0.0)
        acc += tl.sum(each * weight[:, None], 0)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    tl.store(out + row * D + dims, (acc / divisor).to(out.dtype.element_ty), mask=dims < D)
    tl.store(lse + row, tl.where(empty, float("-inf"), (peak + tl.log2(divisor)) * LN2))
