# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Backward on Hopper, dQ = scale·Σ dS·K: programs own query tiles and walk the key tiles that they attend.

P comes from the saved LSE, dS = P∘(dO·Vᵀ − δ); see ``triton_backward.py``. dS stays in registers as left
operand of the third product. The producer and its barriers are those of the forward, with dO beside Q.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsetile.kernels.hopper_dropout import (
    keeps,
    keys_at,
    put_place,
    queries_at,
    read_place,
    row_words,
)
from sparsetile.kernels.hopper_forward import masked
from sparsetile.kernels.hopper_tiles import (
    LOG2E,
    ROWS,
    barriers,
    copy_keys,
    field,
    heeded,
    item_at,
    note_down,
    note_of,
    noted,
    put_note,
    read_note,
    room_for_notes,
    store_rows,
    tell,
    tell_end,
    told,
)
from sparsetile.kernels.triton_tiles import COUNTS


# fmt: off
@gluon.jit
def producer(
    tensors, walk, bias, padding, dropout, buffers, signals,
    BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    QS: gl.constexpr, BATCH_SHARED: gl.constexpr, HEADS_SHARED: gl.constexpr,
):
    # fmt: on
    q, grad_out, k, v = tensors
    counter, items, others, counts = walk
    item_count, first_count, reps, heads, layout_heads, group, blocks, works = counts
    tile_bias, edges, st_b, st_h = bias
    q_s, g_s, k_s, v_s, _, info_s, edge_s, bias_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = signals
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    tiles = 0
    turn = 0
    work = gl.atomic_add(counter, 1)
    more = work < works
    while more:
        row, start, full_end, end, slot, batch, head, block, rep = item_at(
            work, items, item_count, first_count, reps, heads, layout_heads, blocks,
            BATCH_SHARED, HEADS_SHARED,
        )  # fmt: skip
        work = gl.atomic_add(counter, 1)
        more = work < works
        if row >= 0:
            buffer = turn % QS
            mbarrier.wait(q_free.index(buffer), ((turn // QS) & 1) ^ 1)
            tell(info_s.index(buffer), batch, head, block, start, full_end, end, slot, rep)
            full = q_full.index(buffer)
            mbarrier.expect(full, BLOCK_Q * BLOCK_D * 4)
            for c in gl.static_range(CONSUMERS):
                at = [batch, head, block * BLOCK_Q + c * ROWS, 0]
                tma.async_copy_global_to_shared(q, at, full, q_s.index(buffer * CONSUMERS + c))
                tma.async_copy_global_to_shared(grad_out, at, full, g_s.index(buffer * CONSUMERS + c))
            kv_head = head // group
            for entry in range(start, end):
                key_block = gl.load(others + entry).to(gl.int32)
                note = note_of(padding, batch, head, heads, group, key_block)
                at = [batch, kv_head, key_block * BLOCK_K, 0]
                stage = tiles % STAGES
                phase = ((tiles // STAGES) & 1) ^ 1
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), BLOCK_K * BLOCK_D * 2)
                copy_keys(v, padding, 1, note, at, v_full.index(stage), v_s.index(stage))
                mbarrier.wait(k_free.index(stage), phase)
                put_note(padding, stage, note)
                put_place(dropout, stage, keys_at(dropout, kv_head, key_block, BLOCK_K))
                if tile_bias is not None:
                    own = tile_bias + batch.to(gl.int64) * st_b + head.to(gl.int64) * st_h
                    note_down(edge_s, bias_s, stage, own, edges, entry)
                mbarrier.expect(k_full.index(stage), BLOCK_K * BLOCK_D * 2)
                copy_keys(k, padding, 0, note, at, k_full.index(stage), k_s.index(stage))
                tiles += 1
            turn += 1
    buffer = turn % QS
    mbarrier.wait(q_free.index(buffer), ((turn // QS) & 1) ^ 1)
    tell_end(info_s.index(buffer))
    mbarrier.arrive(q_full.index(buffer), count=1)


@gluon.jit
def warps_of(x):
    """0 … 3, where the sums of a warpgroup's four warps lie."""
    return gl.arange(0, 4, layout=x.type.layout)


@gluon.jit
def keep_sums(into, first, step, row_sums):
    """Stores the sums of each warp's 16 rows as parts ``first`` … of a tile's bias's gradient."""
    sums = gl.sum(gl.reshape(row_sums, [4, ROWS // 4]), 1)
    gl.store(into + (first + warps_of(sums)).to(gl.int64) * step, sums)


# fmt: off
@gluon.jit
def consumer(
    C: gl.constexpr, tensors, bias, bias_grad, padding, dropout, buffers, signals,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, QS: gl.constexpr, PARTIAL: gl.constexpr,
):
    # fmt: on
    dq, lse2, delta, part_dq, mask_ids, masks, heads, reps, q_len, pitch, scale, scale2 = tensors
    tile_grad, stg_b, stg_h, step = bias_grad
    tile_bias = bias[0]
    q_s, g_s, k_s, v_s, o_s, info_s, edge_s, bias_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = signals
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    kind: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    keys = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S))
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    tiles = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    more = field(told(info_s.index(0)), 0) >= 0
    while more:
        buffer = turn % QS
        line = told(info_s.index(buffer))
        batch = field(line, 0)
        head = field(line, 1)
        block = field(line, 2)
        start = field(line, 3)
        full_end = field(line, 4)
        end = field(line, 5)
        slot = field(line, 6)
        rep = field(line, 7)
        query = block * BLOCK_Q + C * ROWS + rows
        at = (batch * heads + head).to(gl.int64) * pitch
        lse_row = gl.load(lse2 + at + query, mask=query < q_len, other=0.0)
        delta_row = gl.load(delta + at + query, mask=query < q_len, other=0.0)
        if dropout[0] is not None:
            own_place = queries_at(dropout, block, BLOCK_Q) + C * ROWS
            words = row_words(dropout, batch * heads + head, own_place, rows)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        for entry in range(start, end):
            stage = tiles % STAGES
            phase = (tiles // STAGES) & 1
            # No compiler knows this in advance: descriptors of q and g are not hoisted, and spilled.
            mine = buffer * CONSUMERS + C + (entry >> 30)
            q = q_s.index(mine).reshape([ROWS, BLOCK_D])
            g = g_s.index(mine).reshape([ROWS, BLOCK_D])
            mbarrier.wait(k_full.index(stage), phase)
            k = k_s.index(stage).reshape([BLOCK_K, BLOCK_D])
            s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            v = v_s.index(stage).reshape([BLOCK_K, BLOCK_D])
            d_token = warpgroup_mma(g, v.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            if PARTIAL:
                s = masked(s, entry, full_end, end, mask_ids, masks, C * ROWS, 0, BLOCK_Q, BLOCK_K, S)
            s = heeded(s, padding, read_note(padding, stage), 0, BLOCK_K, S)
            if tile_bias is not None:
                p = gl.exp2(s * scale2 - (lse_row - noted(bias_s, stage) * LOG2E)[:, None])
            else:
                p = gl.exp2(s * scale2 - lse_row[:, None])
            # Over at once: ptxas cannot move the wait for dP above the exponentials.
            mbarrier.wait(v_full.index(stage), phase)
            if dropout[0] is not None:
                # Below 0 where the weight is dropped: nothing else need be held until dP is there. Above the
                # barrier the hashes would be made, and held, before the exponentials.
                place = read_place(dropout, stage)
                p = gl.where(keeps(dropout, words[:, None], rows[:, None], place, keys[None, :]), p, -p)
            d = warpgroup_mma_wait(0, deps=[d_token])
            mbarrier.arrive(v_free.index(stage), count=1)
            if dropout[0] is not None:
                d = gl.where(p > 0.0, d * dropout[2], 0.0)
                p = gl.abs(p)
            p = p * (d - delta_row[:, None])
            if tile_grad is not None:
                into = tile_grad + batch.to(gl.int64) * stg_b + head.to(gl.int64) * stg_h
                keep_sums(into + noted(edge_s, stage), C * 4, step, gl.sum(p, 1))
            ds = gl.convert_layout(p.to(kind), P)
            acc = warpgroup_mma(ds, k, acc)
            mbarrier.arrive(k_free.index(stage), count=1)
            tiles += 1
        mbarrier.arrive(q_free.index(buffer), count=1)
        acc = acc * scale
        whole = True
        if part_dq is not None:
            if slot >= 0:
                whole = False
                part = (slot.to(gl.int64) * reps + rep) * BLOCK_Q + C * ROWS
                store_rows(part_dq, part, acc, D, O)
        if whole:
            tma.store_wait(0)
            o_s.index(C).reshape([ROWS, BLOCK_D]).store(acc.to(kind))
            fence_async_shared()
            tma.async_copy_shared_to_global(dq, [batch, head, block * BLOCK_Q + C * ROWS, 0], o_s.index(C))
        turn += 1
        buffer = turn % QS
        mbarrier.wait(q_full.index(buffer), (turn // QS) & 1)
        more = field(told(info_s.index(buffer)), 0) >= 0
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=COUNTS)
def rows_kernel(
    q, grad_out, k, v, dq_out, lse2, delta, part_dq, tile_bias, edges, tile_grad, kept_notes, kept_words,
    kept_k, kept_v, seed, q_tiles, k_tiles, skt_h, keep_scale, threshold, counter, items, others,
    mask_ids, masks, st_b, st_h, stg_b, stg_h, tile_grad_step, item_count, first_count, reps, heads,
    layout_heads, group, q_len, q_blocks, k_blocks, pitch, works, scale, scale2,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, QS: gl.constexpr, PARTIAL: gl.constexpr, BATCH_SHARED: gl.constexpr,
    HEADS_SHARED: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    # fmt: on
    """Items are rows of the layout. q, grad_out, k, v and dq_out are TMA descriptors of ``[B, H, N, D]``;
    lse2 and delta lie in lines of ``pitch``; ``scale2`` is ``scale`` in base 2."""
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    kind: gl.constexpr = q.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = (
        gl.allocate_shared_memory(kind, [QS * CONSUMERS, 1, 1, ROWS, BLOCK_D], q.layout),
        gl.allocate_shared_memory(kind, [QS * CONSUMERS, 1, 1, ROWS, BLOCK_D], grad_out.layout),
        gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK_K, BLOCK_D], k.layout),
        gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK_K, BLOCK_D], v.layout),
        gl.allocate_shared_memory(kind, [CONSUMERS, 1, 1, ROWS, BLOCK_D], dq_out.layout),
        gl.allocate_shared_memory(gl.int32, [QS, 8], flat),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], flat),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1], flat),
    )
    q_full, q_free = barriers(QS, CONSUMERS)
    k_full, k_free = barriers(STAGES, CONSUMERS)
    v_full, v_free = barriers(STAGES, CONSUMERS)
    signals = (q_full, q_free, k_full, k_free, v_full, v_free)
    fence_async_shared()
    loads = (q, grad_out, k, v)
    counts = (item_count, first_count, reps, heads, layout_heads, group, q_blocks, works)
    walk = (counter, items, others, counts)
    bias = (tile_bias, edges, st_b, st_h)
    bias_grad = (tile_grad, stg_b, stg_h, tile_grad_step)
    padding = (kept_notes,)
    if kept_notes is not None:
        padding = (kept_notes, kept_words, kept_k, kept_v, k_blocks, room_for_notes(STAGES))
    dropout = (seed,)
    if seed is not None:
        dropout = (seed, threshold, keep_scale, q_tiles, k_tiles, skt_h, room_for_notes(STAGES))
    stores = (dq_out, lse2, delta, part_dq, mask_ids, masks, heads, reps, q_len, pitch, scale, scale2)
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, bias_grad, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, PARTIAL)),
            (consumer, (gl.constexpr(1), stores, bias, bias_grad, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, PARTIAL)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, BATCH_SHARED, HEADS_SHARED)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, bias_grad, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, PARTIAL)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, BATCH_SHARED, HEADS_SHARED)),
        ], [1], [PRODUCER_REGISTERS])
    # fmt: on
