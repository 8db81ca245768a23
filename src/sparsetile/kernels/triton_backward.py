# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Backward without atomics, hence the same bits every run: dK and dV by key columns, dQ by query rows.

With P the softmax weights, dP = dO·Vᵀ and δ = rowsum(dO∘O) − dLSE: dS = P∘(dP − δ), dQ = scale·dS·K,
dK = scale·dSᵀ·Q, dV = Pᵀ·dO (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2). Rows and columns
both recompute P from the stored LSE; columns are walked through the layout's stored transpose. One kernel
does both, side by side for each head: what the one read of q, k, v and dO, the other finds in the L2.
"""

import triton
import triton.language as tl

from sparsetile.kernels.triton_gradients import columns_body, rows_body
from sparsetile.kernels.triton_tiles import COUNTS, LOG2E, item_of, load_tile, place, store_tile


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    grad_out, out, lse, grad_lse, lse2, delta, dq_sum, row_counter, column_counter, sg_b, sg_h, sg_n, so_b,
    so_h, so_n, heads, q_len, pitch,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
):
    # fmt: on
    """δ and the LSE in base 2, fp32 ``[B, H, pitch]``; a row without keys gets LSE +inf, so P is 0 there.

    Where the kernels that come next add up dQ (fp32 ``[B, H, Nq, D]``) or draw their work from counters,
    those begin at 0.
    """
    blocks = tl.cdiv(q_len, M)
    program = tl.program_id(0)
    owner = program // blocks
    batch = (owner // heads).to(tl.int64)
    head = (owner % heads).to(tl.int64)
    query0 = (program % blocks).to(tl.int64) * M
    queries = tl.arange(0, M)
    dims = tl.arange(0, BLOCK_D)
    ok = query0 + queries < q_len
    grad_at = grad_out + batch * sg_b + head * sg_h + query0 * sg_n
    out_at = out + batch * so_b + head * so_h + query0 * so_n
    grad_tile = load_tile(grad_at, queries, sg_n, dims, ok, D, BLOCK_D, True).to(tl.float32)
    out_tile = load_tile(out_at, queries, so_n, dims, ok, D, BLOCK_D, True).to(tl.float32)
    row_delta = tl.sum(grad_tile * out_tile, 1)
    at = owner.to(tl.int64) * q_len + query0 + queries
    row_lse = tl.load(lse + at, mask=ok, other=0.0)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + at, mask=ok, other=0.0)
    empty = row_lse == float("-inf")
    at = owner.to(tl.int64) * pitch + query0 + queries
    tl.store(lse2 + at, tl.where(empty, float("inf"), row_lse * LOG2E), mask=ok)
    tl.store(delta + at, tl.where(empty, 0.0, row_delta), mask=ok)
    if dq_sum is not None:
        first = (owner.to(tl.int64) * q_len + query0) * D
        zeros = tl.zeros((M, BLOCK_D), tl.float32)
        places = queries[:, None] * D + dims[None, :]
        tl.store(dq_sum + first + places, zeros, mask=ok[:, None] & (dims < D)[None, :])
    if program == 0:
        if row_counter is not None:
            tl.store(row_counter, 0)
        if column_counter is not None:
            tl.store(column_counter, 0)


@triton.jit
def turn_of(program, row_first, row_rest, column_first, column_rest, families):
    """(family, is_row, long, index): whose turn it is.

    A family is a head of dk and dv with the query heads that its column programs sum over. The counts are its
    programs for long items, which run first in all families, and for the others, which run family by family.
    In either part rows and columns alternate in proportion; ``index`` counts the programs of a kind there.
    """
    long_programs = (row_first + column_first) * families
    long = program < long_programs
    rows = tl.where(long, row_first, row_rest)
    both = rows + tl.where(long, column_first, column_rest)
    turn = tl.where(long, program, program - long_programs)
    family = turn // both
    turn = turn % both
    rows_before = (turn.to(tl.int64) * rows // both).to(tl.int32)
    is_row = ((turn + 1).to(tl.int64) * rows // both).to(tl.int32) > rows_before
    return family, is_row, long, tl.where(is_row, rows_before, turn - rows_before)


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    q, k, v, grad_out, lse2, delta, dq_out, dk_out, dv_out, part_dq, part_dk, part_dv,
    row_items, row_others, row_mask_ids, row_edges, column_items, column_others, column_mask_ids,
    column_edges, masks, padding, bias, bias_grad, tile_bias, tile_grad, seed, q_tiles, k_tiles, sq_b, sq_h,
    sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, sg_b, sg_h, sg_n, sp_b, sp_h, sb_b, sb_h, sb_q, sb_k, st_b,
    st_h, stg_b, stg_h, skt_h, tile_grad_step, row_item_count, row_first_count, column_item_count,
    column_first_count, reps, heads, layout_heads, group, q_len, k_len, q_blocks, k_blocks, scale, scale2,
    keep_scale, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS_M: tl.constexpr, ROWS_N: tl.constexpr, COLUMNS_M: tl.constexpr, COLUMNS_N: tl.constexpr,
    HEADS_A_PROGRAM: tl.constexpr, BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    """One program: dQ of ``ROWS_M`` queries of a row item, or dK and dV of ``COLUMNS_N`` keys of a column's.

    ``reps`` counts the heads that run every column; rows have ``HEADS_A_PROGRAM`` times as many.
    """
    row_subs: tl.constexpr = BLOCK_Q // ROWS_M
    column_subs: tl.constexpr = BLOCK_K // COLUMNS_N
    row_rest = row_item_count - row_first_count
    column_rest = column_item_count - column_first_count
    family, is_row, long, index = turn_of(
        tl.program_id(0),
        row_first_count * row_subs * HEADS_A_PROGRAM,
        row_rest * row_subs * HEADS_A_PROGRAM,
        column_first_count * column_subs,
        column_rest * column_subs,
        reps,
    )
    # fmt: off
    if is_row:
        of_head = tl.where(long, row_first_count, row_rest)
        place_of = index // row_subs
        item = place_of % of_head + tl.where(long, 0, row_first_count)
        rep = family * HEADS_A_PROGRAM + place_of // of_head
        row, start, full_end, end, entry = item_of(row_items, item, row_item_count)
        if row >= 0:
            rows_body(
                item, index % row_subs, rep, row, start, full_end, end, entry, q, k, v, grad_out, lse2, delta,
                dq_out, part_dq, row_items, row_others, row_mask_ids, masks, row_edges, padding, bias,
                bias_grad, tile_bias, tile_grad, seed, q_tiles, k_tiles, sq_b, sq_h, sq_n, sk_b, sk_h, sk_n,
                sv_b, sv_h, sv_n, sg_b, sg_h, sg_n, sp_b, sp_h, sb_b, sb_h, sb_q, sb_k, st_b, st_h, stg_b,
                stg_h, skt_h, tile_grad_step, row_item_count, reps * HEADS_A_PROGRAM, heads, layout_heads,
                group, q_len, k_len, q_blocks, scale, scale2, keep_scale, threshold, D, BLOCK_D, BLOCK_Q,
                BLOCK_K, ROWS_M, ROWS_N, BATCH_SHARED, HEADS_SHARED, PARTIAL, PRECISION,
            )
    else:
        item = index // column_subs + tl.where(long, 0, column_first_count)
        row, start, full_end, end, entry = item_of(column_items, item, column_item_count)
        if row >= 0:
            columns_body(
                item, index % column_subs, family, row, start, full_end, end, entry, q, k, v, grad_out, lse2,
                delta, dk_out, dv_out, part_dk, part_dv, column_items, column_others, column_mask_ids, masks,
                column_edges, padding, bias, tile_bias, seed, q_tiles, k_tiles, sq_b, sq_h, sq_n, sk_b, sk_h,
                sk_n, sv_b, sv_h, sv_n, sg_b, sg_h, sg_n, sp_b, sp_h, sb_b, sb_h, sb_q, sb_k, st_b, st_h,
                skt_h, column_item_count, reps, heads, layout_heads, group, q_len, k_len, k_blocks, scale,
                scale2, keep_scale, threshold, D, BLOCK_D, BLOCK_Q, BLOCK_K, COLUMNS_M, COLUMNS_N,
                HEADS_A_PROGRAM, BATCH_SHARED, HEADS_SHARED, PARTIAL, PRECISION,
            )
    # fmt: on


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def sum_kernel(
    parts, out, splits, split_count, reps, heads, layout_heads, length, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
    BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr,
):
    # fmt: on
    """Sum the parts of M tokens of a split row or column, in slot order, into ``[B, heads, length, D]``."""
    subs: tl.constexpr = BLOCK // M
    program = tl.program_id(0)
    split = (program // subs) % split_count
    rep = program // (subs * split_count)
    count = tl.load(splits + 2 * split_count + split)
    if count == 0:
        return
    row = tl.load(splits + split)
    slot = tl.load(splits + split_count + split)
    batch, head, block = place(row, rep, heads, layout_heads, blocks, BATCH_SHARED, HEADS_SHARED)
    first = (program % subs) * M
    tokens = tl.arange(0, M)
    dims = tl.arange(0, BLOCK_D)
    token0 = block * BLOCK + first
    ok = token0 + tokens < length
    acc = tl.zeros((M, BLOCK_D), tl.float32)
    for part in range(count):
        at = (((slot + part).to(tl.int64) * reps + rep) * BLOCK + first) * D
        acc += load_tile(parts + at, tokens, D, dims, ok, D, BLOCK_D, True)
    store_tile(out + ((batch * heads + head) * length + token0) * D, tokens, D, dims, ok, acc, D, BLOCK_D)


# fmt: off
@triton.jit(do_not_specialize=["members"])
def group_sum_kernel(
    members_dk, members_dv, dk_out, dv_out, members, entries, ENTRIES: tl.constexpr,
):
    # fmt: on
    """Sum dk and dv over the query heads of each group, in their order:
    ``[B·Hkv, members, entries]`` → ``[B·Hkv, entries]``, entries = Nk·D."""
    blocks = tl.cdiv(entries, ENTRIES)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    ok = at < entries
    first = line * members * entries
    dk = tl.zeros((ENTRIES,), tl.float32)
    dv = tl.zeros((ENTRIES,), tl.float32)
    for member in range(members):
        here = first + member * entries + at
        dk += tl.load(members_dk + here, mask=ok, other=0.0)
        dv += tl.load(members_dv + here, mask=ok, other=0.0)
    tl.store(dk_out + line * entries + at, dk.to(dk_out.dtype.element_ty), mask=ok)
    tl.store(dv_out + line * entries + at, dv.to(dv_out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=("entries",))
def scaled_kernel(dq_sum, dq_out, entries, scale, ENTRIES: tl.constexpr):
    """dq_out = scale · dq_sum, both contiguous; the sum is fp32."""
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.load(dq_sum + at, mask=at < entries, other=0.0)
    tl.store(dq_out + at, (total * scale).to(dq_out.dtype.element_ty), mask=at < entries)
