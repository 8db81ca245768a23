# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""What one program of backward does: dK and dV of a block of keys, or dQ of a block of queries.

Device functions of ``triton_backward.backward_kernel``, which has the equations.
"""

import triton
import triton.language as tl

from sparsetile.kernels.triton_tiles import (
    GRAD_ROWS,
    LOG2E,
    allowed_pairs,
    bias_after,
    drawn_from,
    dropout_keep,
    dropout_row,
    dropout_stream,
    first_bias,
    first_block,
    load_tile,
    place,
    product,
    store_tile,
)


# fmt: off
@triton.jit
def collect_columns(
    dk, dv, k_tile, v_tile, q, grad_out, lse2, delta, first, last, block, others, mask_ids, masks, edges,
    keys_allowed, bias_keys, tile_bias, next_bias, next_edge, item_end, stream, q_tiles, drawn_key,
    key_in_tile, keys_ok, sq_n, sg_n, sb_q, q_len, scale, keep_scale, threshold,
    MASKED: tl.constexpr, PADDED: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """Add entries first … last of a column to (dk, dv); tiles are ``[keys, queries]``.

    The tile bias of the next step is passed on as in forward.
    """
    steps: tl.constexpr = BLOCK_Q // M
    queries = tl.arange(0, M)
    keys = tl.arange(0, N)
    dims = tl.arange(0, BLOCK_D)
    for step in range(first * steps, last * steps):
        entry = step // steps
        if MASKED:
            query_in_tile = (step % steps) * M
        else:
            query_in_tile = (step & (steps - 1)) * M  # the same, in fewer registers here and in more there
        query0 = block * BLOCK_Q + query_in_tile
        if DROPOUT:
            drawn = drawn_from(q_tiles, block, BLOCK_Q) + query_in_tile
        block = tl.load(others + tl.minimum((step + 1) // steps, last - 1))
        if tile_bias is not None:
            shift = next_bias * LOG2E
            next_bias, next_edge = bias_after(tile_bias, edges, next_edge, step, item_end, steps)
        queries_ok = queries >= 0
        if MASKED:
            queries_ok = query0 + queries < q_len
        q_at = q + query0.to(tl.int64) * sq_n
        q_tile = load_tile(q_at, queries, sq_n, dims, queries_ok, D, BLOCK_D, MASKED)
        if MASKED:
            row_lse = tl.load(lse2 + (query0 + queries), mask=queries_ok, other=float("inf"))
        else:
            row_lse = tl.load(lse2 + (query0 + queries))
        s = product(k_tile, tl.trans(q_tile), None, PRECISION) * scale
        if bias_keys is not None:
            bias_at = bias_keys[:, None] + (query0 + queries).to(tl.int64)[None, :] * sb_q
            if MASKED:
                bias_tile = tl.load(bias_at, mask=keys_ok[:, None] & queries_ok[None, :], other=0.0)
            else:
                bias_tile = tl.load(bias_at)
            s += bias_tile.to(tl.float32) * LOG2E
        if tile_bias is not None:
            row_lse -= shift
        p = tl.exp2(s - row_lse[None, :])
        if MASKED:
            mask_id = tl.load(mask_ids + entry)
            query = query_in_tile + queries
            allowed = allowed_pairs(masks, mask_id, query, key_in_tile, keys, BLOCK_Q, BLOCK_K, N, True)
            p = tl.where(allowed, p, 0.0)
        if PADDED:
            p = tl.where(keys_allowed[:, None], p, 0.0)
        grad_at = grad_out + query0.to(tl.int64) * sg_n
        grad_tile = load_tile(grad_at, queries, sg_n, dims, queries_ok, D, BLOCK_D, MASKED)
        if MASKED:
            row_delta = tl.load(delta + (query0 + queries), mask=queries_ok, other=0.0)
        else:
            row_delta = tl.load(delta + (query0 + queries))
        dp = product(v_tile, tl.trans(grad_tile), None, PRECISION)
        kept = p
        if DROPOUT:
            row = dropout_row(stream, drawn, queries)
            keep = dropout_keep(row[None, :], drawn_key, queries[None, :], keys[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = product(kept.to(grad_tile.dtype), grad_tile, dv, PRECISION)
        ds = p * (dp - row_delta[None, :])
        dk = product(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv, next_bias, next_edge


# fmt: off
@triton.jit
def columns_body(
    item, sub, rep, row, start, full_end, end, entry, q, k, v, grad_out, lse2, delta, dk_out, dv_out, part_dk,
    part_dv, items, others, mask_ids, masks, edges, padding, bias, tile_bias, seed, q_tiles, k_tiles, sq_b,
    sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, sg_b, sg_h, sg_n, sp_b, sp_h, sb_b, sb_h, sb_q, sb_k,
    st_b, st_h, skt_h, item_count, reps, heads, layout_heads, group, q_len, k_len, k_blocks, scale, scale2,
    keep_scale, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HEADS_A_PROGRAM: tl.constexpr, BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """dK and dV of N keys of one work item, summed over ``HEADS_A_PROGRAM`` heads of the key head's group.

    ``heads`` counts query heads; the outputs have ``heads // HEADS_A_PROGRAM`` heads.
    """
    out_heads = heads // HEADS_A_PROGRAM
    batch, out_head, block = place(row, rep, out_heads, layout_heads, k_blocks, BATCH_SHARED, HEADS_SHARED)

    key_in_tile = sub * N
    keys = tl.arange(0, N)
    dims = tl.arange(0, BLOCK_D)
    key0 = block * BLOCK_K + key_in_tile
    keys_ok = key0 + keys < k_len
    kv_head = out_head * HEADS_A_PROGRAM // group
    keys_allowed = keys_ok
    if padding is not None:
        padding += batch * sp_b + kv_head * sp_h
        keys_allowed = tl.load(padding + key0 + keys, mask=keys_ok, other=1) == 0
    drawn_key = key0
    if k_tiles is not None:
        drawn_key = drawn_from(k_tiles + kv_head * skt_h, block, BLOCK_K) + key_in_tile
    k_at = k + batch * sk_b + kv_head * sk_h + key0 * sk_n
    v_at = v + batch * sv_b + kv_head * sv_h + key0 * sv_n
    k_tile = load_tile(k_at, keys, sk_n, dims, keys_allowed, D, BLOCK_D, True)
    v_tile = load_tile(v_at, keys, sv_n, dims, keys_allowed, D, BLOCK_D, True)

    partial_entry = entry
    if PARTIAL:
        partial_entry = first_block(others, start, full_end, end, entry)
    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_D), tl.float32)
    for member in range(HEADS_A_PROGRAM):
        head = out_head * HEADS_A_PROGRAM + member
        q_at = q + batch * sq_b + head * sq_h
        grad_at = grad_out + batch * sg_b + head * sg_h
        row_at = (batch * heads + head) * q_len
        bias_keys = bias
        if bias is not None:
            bias_keys = bias + batch * sb_b + head * sb_h + (key0 + keys) * sb_k
        tile_at = tile_bias
        next_bias, next_edge = 0.0, 0
        if tile_bias is not None:
            tile_at = tile_bias + batch * st_b + head * st_h
            next_bias, next_edge = first_bias(tile_at, edges, start, end, BLOCK_Q // M)
        stream = 0
        if seed is not None:
            stream = dropout_stream(seed, batch * heads + head)
        # fmt: off
        dk, dv, next_bias, next_edge = collect_columns(
            dk, dv, k_tile, v_tile, q_at, grad_at, lse2 + row_at, delta + row_at, start, full_end, entry,
            others, mask_ids, masks, edges, keys_allowed, bias_keys, tile_at, next_bias, next_edge, end,
            stream, q_tiles, drawn_key, key_in_tile, keys_ok, sq_n, sg_n, sb_q, q_len, scale2, keep_scale,
            threshold, False, padding is not None, seed is not None, D, BLOCK_D, BLOCK_Q, BLOCK_K, M, N,
            PRECISION,
        )
        if PARTIAL:
            dk, dv, next_bias, next_edge = collect_columns(
                dk, dv, k_tile, v_tile, q_at, grad_at, lse2 + row_at, delta + row_at, full_end, end,
                partial_entry, others, mask_ids, masks, edges, keys_allowed, bias_keys, tile_at, next_bias,
                next_edge, end, stream, q_tiles, drawn_key, key_in_tile, keys_ok, sq_n, sg_n, sb_q, q_len,
                scale2, keep_scale, threshold, True, padding is not None, seed is not None, D, BLOCK_D,
                BLOCK_Q, BLOCK_K, M, N, PRECISION,
            )
        # fmt: on
    dk = dk * scale
    dv = dv * keep_scale
    at = ((batch * out_heads + out_head) * k_len + key0) * D
    if part_dk is None:
        store_tile(dk_out + at, keys, D, dims, keys_ok, dk, D, BLOCK_D)
        store_tile(dv_out + at, keys, D, dims, keys_ok, dv, D, BLOCK_D)
    else:
        slot = tl.load(items + 4 * item_count + item)
        if slot >= 0:
            at = ((slot.to(tl.int64) * reps + rep) * BLOCK_K + key_in_tile) * D
            store_tile(part_dk + at, keys, D, dims, keys_ok, dk, D, BLOCK_D)
            store_tile(part_dv + at, keys, D, dims, keys_ok, dv, D, BLOCK_D)
        else:
            store_tile(dk_out + at, keys, D, dims, keys_ok, dk, D, BLOCK_D)
            store_tile(dv_out + at, keys, D, dims, keys_ok, dv, D, BLOCK_D)


# fmt: off
@triton.jit
def collect_rows(
    dq, q_tile, grad_tile, row_lse, row_delta, k, v, first, last, block, others, mask_ids, masks, edges,
    padding, bias_rows, bias_grad_rows, tile_bias, next_bias, next_edge, item_end, tile_grad, hashes, k_tiles,
    query, queries_ok, sk_n, sv_n, sb_k, k_len, scale, keep_scale, threshold,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """Add entries first … last of a row to dq; store the bias gradients of these tiles, which it owns.

    The tile bias of the next step is passed on as in forward. ``tile_grad`` points to the part of each
    ``GRAD_ROWS`` queries.
    """
    steps: tl.constexpr = BLOCK_K // N
    check: tl.constexpr = MASKED or padding is not None
    queries = tl.arange(0, dq.shape[0])
    keys = tl.arange(0, N)
    dims = tl.arange(0, BLOCK_D)
    if tile_grad is not None:
        tile_sum = tl.zeros((dq.shape[0] // GRAD_ROWS,), tl.float32)
    for step in range(first * steps, last * steps):
        entry = step // steps
        key_in_tile = (step & (steps - 1)) * N  # step % steps, in fewer registers
        key0 = block * BLOCK_K + key_in_tile
        if DROPOUT:
            drawn = drawn_from(k_tiles, block, BLOCK_K) + key_in_tile
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
        v_tile = load_tile(v + key0.to(tl.int64) * sv_n, keys, sv_n, dims, key_ok, D, BLOCK_D, check)
        s = product(q_tile, tl.trans(k_tile), None, PRECISION) * scale
        if bias_rows is not None:
            bias_at = bias_rows[:, None] + (key0 + keys).to(tl.int64)[None, :] * sb_k
            if check:
                bias_tile = tl.load(bias_at, mask=queries_ok[:, None] & key_ok[None, :], other=0.0)
            else:
                bias_tile = tl.load(bias_at)
            s += bias_tile.to(tl.float32) * LOG2E
        zero = row_lse
        if tile_bias is not None:
            zero = row_lse - shift
        p = tl.exp2(s - zero[:, None])
        if MASKED:
            mask_id = tl.load(mask_ids + entry)
            p = tl.where(
                allowed_pairs(masks, mask_id, query, key_in_tile, keys, BLOCK_Q, BLOCK_K, N, False), p, 0.0
            )
        if padding is not None:
            p = tl.where(key_ok[None, :], p, 0.0)
        dp = product(grad_tile, tl.trans(v_tile), None, PRECISION)
        if DROPOUT:
            keep = dropout_keep(hashes[:, None], drawn, queries[:, None], keys[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - row_delta[:, None])
        if tile_grad is not None:
            # Sixteen rows are one warp's in the products' layout: no warp waits for another here.
            part = tl.sum(tl.reshape(ds, (ds.shape[0] // GRAD_ROWS, GRAD_ROWS * N)), 1)
            tile_sum = tl.where(key_in_tile == 0, part, tile_sum + part)
            edge = entry
            if edges is not None:
                edge = tl.load(edges + entry)
            # The first of 32 columns; the others, which stay as they are, make a row each warp's own.
            column = tl.arange(0, 32)[None, :]
            stored = (column == 0) & (key_in_tile == BLOCK_K - N)
            tl.store(tile_grad[:, None] + edge + column, tile_sum[:, None], mask=stored)
        if bias_grad_rows is not None:
            bias_grad_at = bias_grad_rows[:, None] + (key0 + keys)[None, :]
            if check:
                tl.store(bias_grad_at, ds, mask=queries_ok[:, None] & key_ok[None, :])
            else:
                tl.store(bias_grad_at, ds)
        dq = product(ds.to(k_tile.dtype), k_tile, dq, PRECISION)
    return dq, next_bias, next_edge


# fmt: off
@triton.jit
def rows_body(
    item, sub, rep, row, start, full_end, end, entry, q, k, v, grad_out, lse2, delta, dq_out, part_dq, items,
    others, mask_ids, masks, edges, padding, bias, bias_grad, tile_bias, tile_grad, seed, q_tiles, k_tiles,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, sg_b, sg_h, sg_n, sp_b, sp_h, sb_b, sb_h, sb_q,
    sb_k, st_b, st_h, stg_b, stg_h, skt_h, tile_grad_step, item_count, reps, heads, layout_heads, group,
    q_len, k_len, q_blocks, scale, scale2, keep_scale, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    """dQ of M queries of one work item, with the gradients of the biases of its tiles."""
    batch, head, block = place(row, rep, heads, layout_heads, q_blocks, BATCH_SHARED, HEADS_SHARED)

    first_query = sub * M
    queries = tl.arange(0, M)
    dims = tl.arange(0, BLOCK_D)
    query0 = block * BLOCK_Q + first_query
    queries_ok = query0 + queries < q_len
    q_at = q + batch * sq_b + head * sq_h + query0 * sq_n
    grad_at = grad_out + batch * sg_b + head * sg_h + query0 * sg_n
    q_tile = load_tile(q_at, queries, sq_n, dims, queries_ok, D, BLOCK_D, True)
    grad_tile = load_tile(grad_at, queries, sg_n, dims, queries_ok, D, BLOCK_D, True)
    row_at = (batch * heads + head) * q_len + query0
    row_lse = tl.load(lse2 + row_at + queries, mask=queries_ok, other=float("inf"))
    row_delta = tl.load(delta + row_at + queries, mask=queries_ok, other=0.0)
    kv_head = head // group
    k += batch * sk_b + kv_head * sk_h
    v += batch * sv_b + kv_head * sv_h
    if padding is not None:
        padding += batch * sp_b + kv_head * sp_h
    if bias is not None:
        bias = bias + batch * sb_b + head * sb_h + (query0 + queries) * sb_q
    if bias_grad is not None:
        bias_grad = bias_grad + (row_at + queries) * k_len
    next_bias, next_edge = 0.0, 0
    if tile_bias is not None:
        tile_bias += batch * st_b + head * st_h
        next_bias, next_edge = first_bias(tile_bias, edges, start, end, BLOCK_K // N)
    if tile_grad is not None:
        parts = first_query // GRAD_ROWS + tl.arange(0, M // GRAD_ROWS)
        tile_grad += batch * stg_b + head * stg_h + parts.to(tl.int64) * tile_grad_step
    hashes = 0
    if seed is not None:
        drawn = drawn_from(q_tiles, block, BLOCK_Q) + first_query
        hashes = dropout_row(dropout_stream(seed, batch * heads + head), drawn, queries)
    if k_tiles is not None:
        k_tiles += kv_head * skt_h

    dq = tl.zeros((M, BLOCK_D), tl.float32)
    # fmt: off
    dq, next_bias, next_edge = collect_rows(
        dq, q_tile, grad_tile, row_lse, row_delta, k, v, start, full_end, entry, others, mask_ids, masks,
        edges, padding, bias, bias_grad, tile_bias, next_bias, next_edge, end, tile_grad, hashes, k_tiles,
        first_query + queries, queries_ok, sk_n, sv_n, sb_k, k_len, scale2, keep_scale, threshold, False,
        seed is not None, D, BLOCK_D, BLOCK_Q, BLOCK_K, N, PRECISION,
    )
    if PARTIAL:
        entry = first_block(others, start, full_end, end, entry)
        dq, next_bias, next_edge = collect_rows(
            dq, q_tile, grad_tile, row_lse, row_delta, k, v, full_end, end, entry, others, mask_ids, masks,
            edges, padding, bias, bias_grad, tile_bias, next_bias, next_edge, end, tile_grad, hashes, k_tiles,
            first_query + queries, queries_ok, sk_n, sv_n, sb_k, k_len, scale2, keep_scale, threshold, True,
            seed is not None, D, BLOCK_D, BLOCK_Q, BLOCK_K, N, PRECISION,
        )
    # fmt: on
    dq = dq * scale
    if part_dq is None:
        store_tile(dq_out + row_at * D, queries, D, dims, queries_ok, dq, D, BLOCK_D)
    else:
        slot = tl.load(items + 4 * item_count + item)
        if slot >= 0:
            at = ((slot.to(tl.int64) * reps + rep) * BLOCK_Q + first_query) * D
            store_tile(part_dq + at, queries, D, dims, queries_ok, dq, D, BLOCK_D)
        else:
            store_tile(dq_out + row_at * D, queries, D, dims, queries_ok, dq, D, BLOCK_D)
