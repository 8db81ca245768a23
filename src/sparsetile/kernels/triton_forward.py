# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Forward: one program a work item walks the key tiles of a block of queries with a running softmax.

The online softmax is that of Milakov and Gimelshein 2018 (arXiv:1805.02867), tiled as in FlashAttention-2
(Dao 2023, arXiv:2307.08691, algorithm 1). Logits are kept in base 2, with scale·log₂e folded into one factor.
"""

import triton
import triton.language as tl

from sparsetile.kernels.triton_tiles import (
    COUNTS,
    LN2,
    LOG2E,
    allowed_pairs,
    bias_after,
    drawn_from,
    dropout_keep,
    dropout_row,
    dropout_stream,
    first_bias,
    first_block,
    item_of,
    load_tile,
    place,
    product,
    store_tile,
    work_of,
)


# fmt: off
@triton.jit
def attend(
    acc, total, peak, q_tile, k, v, first, last, block, others, mask_ids, masks, edges, padding, bias_rows,
    tile_bias, next_bias, next_edge, item_end, hashes, k_tiles, query, queries_ok, sk_n, sv_n, sb_k, k_len,
    scale, threshold,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Fold entries first … last into (acc, total, peak). Whole tiles take neither masks nor bounds checks.

    ``next_bias`` is the tile bias of the first step and ``next_edge`` the edge of the second, see
    ``first_bias``. Both come back for the step after the last, up to ``item_end``.
    """
    steps: tl.constexpr = BLOCK_K // N
    check: tl.constexpr = MASKED or padding is not None
    scaled: tl.constexpr = bias_rows is not None  # scores are in base 2 before the softmax, not in it
    may_be_empty: tl.constexpr = check or scaled or tile_bias is not None
    queries = tl.arange(0, acc.shape[0])
    keys = tl.arange(0, N)
    dims = tl.arange(0, BLOCK_D)
    for step in range(first * steps, last * steps):
        entry = step // steps
        key_in_tile = (step % steps) * N
        key0 = block * BLOCK_K + key_in_tile
        if DROPOUT:
            drawn = drawn_from(k_tiles, block, BLOCK_K) + key_in_tile
        # The next tile's address is under way while this tile is computed.
        block = tl.load(others + tl.minimum((step + 1) // steps, last - 1))
        if tile_bias is not None:
            shift = next_bias * LOG2E
            next_bias, next_edge = bias_after(tile_bias, edges, next_edge, step, item_end, steps)
        key_ok = keys >= 0
        if MASKED:
            key_ok = key0 + keys < k_len
        if padding is not None:
            key_ok = key_ok & (tl.load(padding + key0 + keys, mask=key_ok, other=1) == 0)
        k_tile = load_tile(k + key0.to(tl.int64) * sk_n, keys, sk_n, dims, key_ok, D, BLOCK_D, check)
        s = product(q_tile, tl.trans(k_tile), None, PRECISION)
        if bias_rows is not None:
            s = s * scale
            bias_at = bias_rows[:, None] + (key0 + keys).to(tl.int64)[None, :] * sb_k
            if check:
                bias_tile = tl.load(bias_at, mask=queries_ok[:, None] & key_ok[None, :], other=0.0)
            else:
                bias_tile = tl.load(bias_at)
            s += bias_tile.to(tl.float32) * LOG2E
        if MASKED:
            mask_id = tl.load(mask_ids + entry)
            allowed = allowed_pairs(masks, mask_id, query, key_in_tile, keys, BLOCK_Q, BLOCK_K, N, False)
            s = tl.where(allowed, s, float("-inf"))
        if padding is not None:
            s = tl.where(key_ok[None, :], s, float("-inf"))

        if scaled:
            top = tl.max(s, 1)
        else:
            top = tl.max(s, 1) * scale
        if tile_bias is not None:
            new_peak = tl.maximum(peak, top + shift)
        else:
            new_peak = tl.maximum(peak, top)
        # exp2(−inf − −inf) is NaN: a row that has met no key yet is measured from 0.
        origin = new_peak
        if may_be_empty:
            origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        zero = origin
        if tile_bias is not None:
            # A scalar for all of the tile moves the rows' origins instead of its scores. Never below the
            # largest score, as rounding could take it at biases of great size.
            zero = tl.maximum(origin - shift, top)
        if scaled:
            p = tl.exp2(s - zero[:, None])
        else:
            p = tl.exp2(s * scale - zero[:, None])
        shrink = tl.exp2(peak - origin)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            keep = dropout_keep(hashes[:, None], drawn, queries[:, None], keys[None, :], threshold)
            p = tl.where(keep, p, 0.0)
        v_tile = load_tile(v + key0.to(tl.int64) * sv_n, keys, sv_n, dims, key_ok, D, BLOCK_D, check)
        acc = product(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
        peak = new_peak
    return acc, total, peak, next_bias, next_edge


@triton.jit
def put(out, lse, at, queries, dims, queries_ok, result, row_lse, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a block of rows and its LSE; ``at`` counts rows of both buffers."""
    store_tile(out + at * D, queries, D, dims, queries_ok, result, D, BLOCK_D)
    tl.store(lse + at + queries, row_lse, mask=queries_ok)


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, out, lse, part_out, part_lse, items, others, mask_ids, masks, edges, padding, bias, tile_bias,
    seed, q_tiles, k_tiles, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, sp_b, sp_h, sb_b, sb_h,
    sb_q, sb_k, st_b, st_h, skt_h, item_count, first_count, reps, heads, layout_heads, group, q_len, k_len,
    q_blocks, scale, keep_scale, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr, PARTIAL: tl.constexpr,
    NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """out and lse of M queries of one work item; ``NEGATE`` serves negative scales (``scale`` itself is
    positive)."""
    subs: tl.constexpr = BLOCK_Q // M
    program = tl.program_id(0)
    item, rep = work_of(program // subs, item_count, first_count, reps)
    row, start, full_end, end, entry = item_of(items, item, item_count)
    if row < 0:
        return
    batch, head, block = place(row, rep, heads, layout_heads, q_blocks, BATCH_SHARED, HEADS_SHARED)

    first_query = (program % subs) * M
    queries = tl.arange(0, M)
    dims = tl.arange(0, BLOCK_D)
    query0 = block * BLOCK_Q + first_query
    queries_ok = query0 + queries < q_len
    q_tile = load_tile(
        q + batch * sq_b + head * sq_h + query0 * sq_n, queries, sq_n, dims, queries_ok, D, BLOCK_D, True
    )
    if NEGATE:
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
    kv_head = head // group
    k += batch * sk_b + kv_head * sk_h
    v += batch * sv_b + kv_head * sv_h
    if padding is not None:
        padding += batch * sp_b + kv_head * sp_h
    if bias is not None:
        bias = bias + batch * sb_b + head * sb_h + (query0 + queries) * sb_q
    if tile_bias is not None:
        tile_bias += batch * st_b + head * st_h
    next_bias, next_edge = 0.0, 0
    if tile_bias is not None:
        next_bias, next_edge = first_bias(tile_bias, edges, start, end, BLOCK_K // N)
    hashes = 0
    if seed is not None:
        drawn = drawn_from(q_tiles, block, BLOCK_Q) + first_query
        hashes = dropout_row(dropout_stream(seed, batch * heads + head), drawn, queries)
    if k_tiles is not None:
        k_tiles += kv_head * skt_h

    acc = tl.zeros((M, BLOCK_D), tl.float32)
    total = tl.zeros((M,), tl.float32)
    peak = tl.full((M,), float("-inf"), tl.float32)
    # fmt: off
    acc, total, peak, next_bias, next_edge = attend(
        acc, total, peak, q_tile, k, v, start, full_end, entry, others, mask_ids, masks, edges, padding, bias,
        tile_bias, next_bias, next_edge, end, hashes, k_tiles, first_query + queries, queries_ok, sk_n, sv_n,
        sb_k, k_len, scale, threshold, False, seed is not None, D, BLOCK_D, BLOCK_Q, BLOCK_K, N, PRECISION,
    )
    if PARTIAL:
        entry = first_block(others, start, full_end, end, entry)
        acc, total, peak, next_bias, next_edge = attend(
            acc, total, peak, q_tile, k, v, full_end, end, entry, others, mask_ids, masks, edges, padding,
            bias, tile_bias, next_bias, next_edge, end, hashes, k_tiles, first_query + queries, queries_ok,
            sk_n, sv_n, sb_k, k_len, scale, threshold, True, seed is not None, D, BLOCK_D, BLOCK_Q, BLOCK_K,
            N, PRECISION,
        )
    # fmt: on
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    result = acc * (keep_scale / divisor)[:, None]
    row_lse = tl.where(empty, float("-inf"), peak + tl.log2(divisor))
    at = (batch * heads + head) * q_len + query0
    if part_out is None:
        put(out, lse, at, queries, dims, queries_ok, result, row_lse * LN2, D, BLOCK_D)
    else:
        slot = tl.load(items + 4 * item_count + item)
        if slot >= 0:
            at = (slot.to(tl.int64) * reps + rep) * BLOCK_Q + first_query
            put(part_out, part_lse, at, queries, dims, queries_ok, result, row_lse, D, BLOCK_D)
        else:
            put(out, lse, at, queries, dims, queries_ok, result, row_lse * LN2, D, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    part_out, part_lse, out, lse, splits, split_count, reps, heads, layout_heads, q_len, q_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, M: tl.constexpr,
    BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr,
):
    # fmt: on
    """Merge the parts of M queries of one split row, in the order of their slots, weighted by their LSE."""
    subs: tl.constexpr = BLOCK_Q // M
    program = tl.program_id(0)
    split = (program // subs) % split_count
    rep = program // (subs * split_count)
    parts = tl.load(splits + 2 * split_count + split)
    if parts == 0:
        return
    row = tl.load(splits + split)
    slot = tl.load(splits + split_count + split)
    batch, head, block = place(row, rep, heads, layout_heads, q_blocks, BATCH_SHARED, HEADS_SHARED)
    first_query = (program % subs) * M
    queries = tl.arange(0, M)
    dims = tl.arange(0, BLOCK_D)
    query0 = block * BLOCK_Q + first_query
    queries_ok = query0 + queries < q_len

    acc = tl.zeros((M, BLOCK_D), tl.float32)
    total = tl.zeros((M,), tl.float32)
    peak = tl.full((M,), float("-inf"), tl.float32)
    for part in range(parts):
        at = ((slot + part).to(tl.int64) * reps + rep) * BLOCK_Q + first_query
        weight = tl.load(part_lse + at + queries, mask=queries_ok, other=float("-inf"))
        tile = load_tile(part_out + at * D, queries, D, dims, queries_ok, D, BLOCK_D, True)
        new_peak = tl.maximum(peak, weight)
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - origin)
        grow = tl.exp2(weight - origin)
        acc = acc * shrink[:, None] + tile * grow[:, None]
        total = total * shrink + grow
        peak = new_peak
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    at = (batch * heads + head) * q_len + query0
    row_lse = tl.where(empty, float("-inf"), peak + tl.log2(divisor))
    put(out, lse, at, queries, dims, queries_ok, acc / divisor[:, None], row_lse * LN2, D, BLOCK_D)
