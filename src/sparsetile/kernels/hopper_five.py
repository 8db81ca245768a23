# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Backward on Hopper in five products: dK and dV of a key tile, and its share of every dQ.

Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, dV = Σ Pᵀ·dO, dK = scale·Σ dSᵀ·Q as in ``hopper_columns.py``, and dQ += dS·K, which
the bulk copies add up in fp32: in whatever order programs come, so that its bits differ between runs. dS goes
to shared memory, where the two consumers' halves of the keys meet, and each makes half of dQ. dQ is made one
step late: by then the other consumer's half lies there, and neither waits for the other. Values are read
first and left first, so that one buffer serves them; dV and dK leave from where dQ does.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsetile.kernels.hopper_columns import ITEMS, load_steps, signed, step_buffers, store_wide, weights
from sparsetile.kernels.hopper_dropout import keys_at, read_place
from sparsetile.kernels.hopper_rows import keep_sums
from sparsetile.kernels.hopper_tiles import (
    ROWS,
    barriers,
    copy_keys,
    field,
    ignored_keys,
    item_at,
    note_of,
    noted,
    put_note,
    read_note,
    room_for_notes,
    tell,
    tell_end,
    told,
)
from sparsetile.kernels.triton_tiles import COUNTS

SLOTS = gl.constexpr(2)  # steps whose dS lies in shared memory: one is multiplied while the next is made
NOWHERE = gl.constexpr(1 << 24)  # a query past every end, where bulk copies add nothing


@gl._core.builtin
def tma_add(desc, coord, source, _semantic=None):
    """Adds shared memory to a tensor, as ``tma.async_copy_shared_to_global`` stores it; Gluon has no such
    function for Hopper."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, desc.handle, coord, source.handle)


# fmt: off
@gluon.jit
def producer(
    tensors, walk, bias, padding, dropout, buffers, signals,
    BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, M: gl.constexpr,
    STAGES: gl.constexpr, MEMBERS: gl.constexpr, BATCH_SHARED: gl.constexpr, HEADS_SHARED: gl.constexpr,
):
    # fmt: on
    k, v, of_steps = tensors
    counter, items, others, counts = walk
    item_count, first_count, reps, heads, layout_heads, group, blocks, works = counts
    k_s, v_s, info_s, stream = buffers[:4]
    k_full, k_free, v_full, v_free, full, free = signals
    steps = 0
    turn = 0
    work = gl.atomic_add(counter, 1)
    more = work < works
    while more:
        # Heads here are those of the result: a query head each, or as many as key heads.
        row, start, full_end, end, slot, batch, head, block, rep = item_at(
            work, items, item_count, first_count, reps, heads, layout_heads, blocks,
            BATCH_SHARED, HEADS_SHARED,
        )  # fmt: skip
        work = gl.atomic_add(counter, 1)
        more = work < works
        if row >= 0:
            buffer = turn % ITEMS
            here = k_full.index(buffer)
            at = [batch, head * MEMBERS // group, block * BLOCK_K, 0]
            mbarrier.wait(k_free.index(buffer), ((turn // ITEMS) & 1) ^ 1)
            tell(info_s.index(buffer), batch, head, block, start, full_end, end, slot, rep)
            note = note_of(padding, batch, head * MEMBERS, heads * MEMBERS, group, block)
            put_note(padding, buffer, note)
            mbarrier.expect(here, BLOCK_K * BLOCK_D * 2)
            copy_keys(k, padding, 0, note, at, here, k_s.index(buffer))
            # Free as soon as the last dP of the item before is made.
            here = v_full.index(0)
            mbarrier.wait(v_free.index(0), (turn & 1) ^ 1)
            mbarrier.expect(here, BLOCK_K * BLOCK_D * 2)
            copy_keys(v, padding, 1, note, at, here, v_s.index(0))
            steps = load_steps(
                of_steps, others, bias, dropout, stream, full, free, steps, batch, head, start, end,
                BLOCK_D, BLOCK_Q, M, STAGES, MEMBERS,
            )  # fmt: skip
            turn += 1
    buffer = turn % ITEMS
    mbarrier.wait(k_free.index(buffer), ((turn // ITEMS) & 1) ^ 1)
    tell_end(info_s.index(buffer))
    mbarrier.arrive(k_full.index(buffer), count=1)


@gluon.jit
def issue_dq(C: gl.constexpr, ds_s, slot, k_all, BLOCK_D: gl.constexpr, T: gl.constexpr):
    """dS·K over all keys, in flight: 64 of the columns, or of narrow heads 64 of the queries."""
    dq = gl.zeros([64, 64], gl.float32, T)
    for half in gl.static_range(2):
        if BLOCK_D > 64:
            left = ds_s.index(slot * 2 + half)
            right = k_all.slice(C * 64, 64, 1).slice(half * ROWS, ROWS, 0)
        else:
            left = ds_s.index(slot * 2 + half).slice(C * 64, 64, 1)
            right = k_all.slice(half * ROWS, ROWS, 0)
        dq = warpgroup_mma(left.permute((1, 0)), right, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def send_dq(C: gl.constexpr, dq, dq_sum, dq_s, batch, head, query0, BLOCK_D: gl.constexpr):
    """Adds this consumer's part of a step's dQ, once its part of the step before has left."""
    mine = dq_s.index(C)
    tma.store_wait(0)
    mine.reshape([64, 64]).store(dq)
    fence_async_shared()
    if BLOCK_D > 64:
        tma_add(dq_sum, [batch, head, query0, C * 64], mine)
    else:
        tma_add(dq_sum, [batch, head, query0 + C * 64, 0], mine)


# fmt: off
@gluon.jit
def consumer(
    C: gl.constexpr, tensors, bias, bias_grad, padding, dropout, buffers, signals,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    M: gl.constexpr, STAGES: gl.constexpr, MEMBERS: gl.constexpr, PARTIAL: gl.constexpr,
):
    # fmt: on
    dk_out, dv_out, dq_sum, part_dk, part_dv, members_dk, members_dv = tensors[:7]
    others, mask_ids, masks, heads, group, reps, k_len, scale, scale2 = tensors[7:]
    tile_grad, stg_b, stg_h, tile_grad_step = bias_grad
    tile_bias = bias[0]
    k_s, v_s, info_s, stream, ds_s, dq_s, o_s = buffers
    q_s, g_s, lse_s, delta_s, edge_s, bias_s = stream
    k_full, k_free, v_full, v_free, full, free = signals
    STEPS: gl.constexpr = BLOCK_Q // M
    kind: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    steps = 0
    turn = 0
    mbarrier.wait(k_full.index(0), 0)
    more = field(told(info_s.index(0)), 0) >= 0
    while more:
        buffer = turn % ITEMS
        line = told(info_s.index(buffer))
        batch = field(line, 0)
        head = field(line, 1)
        start = field(line, 3)
        full_end = field(line, 4)
        end = field(line, 5)
        dk = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        dv = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        zero = gl.zeros([ROWS, M], gl.float32, S)
        if padding[0] is not None:
            hidden = ignored_keys(padding, read_note(padding, buffer), C * ROWS, BLOCK_K, S)
        own_place = keys_at(dropout, head * MEMBERS // group, field(line, 2), BLOCK_K) + C * ROWS
        if tile_grad is not None:
            kept = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
        span = (end - start) * STEPS
        count = span * MEMBERS
        # The first scores; of an item without steps of whatever lies there: a product that some branches
        # leave out makes ptxas wait for each of them.
        mbarrier.wait(full.index(steps % STAGES), (steps // STAGES) & 1, pred=count > 0)
        k = k_s.index(buffer + (count >> 30)).reshape([BLOCK_K, BLOCK_D]).slice(C * ROWS, ROWS, 0)
        q = q_s.index(steps % STAGES).reshape([M, BLOCK_D])
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False)
        # The first step makes dQ too, of whatever dS lies there: added to nothing.
        query_before = NOWHERE
        head_before = head * MEMBERS
        for i in range(count):
            # No compiler knows this to be 0: descriptors of k and v are not hoisted, and spilled.
            none = i >> 30
            k_all = k_s.index(buffer + none).reshape([BLOCK_K, BLOCK_D])
            k = k_all.slice(C * ROWS, ROWS, 0)
            v = v_s.index(none).reshape([BLOCK_K, BLOCK_D]).slice(C * ROWS, ROWS, 0)
            stage = steps % STAGES
            g = g_s.index(stage).reshape([M, BLOCK_D])
            mbarrier.wait(v_full.index(0), turn & 1, pred=i == 0)
            d_token = warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
            at = i
            q_head = head
            if MEMBERS > 1:
                at = i % span
                q_head = head * MEMBERS + i // span
            part = at % STEPS
            entry = start + at // STEPS
            query0 = gl.load(others + entry).to(gl.int32) * BLOCK_Q + part * M
            p = weights(
                s, part, entry, full_end, stage, lse_s, bias_s, tile_bias,
                mask_ids, masks, scale2, C * ROWS, BLOCK_Q, BLOCK_K, M, PARTIAL, S,
            )  # fmt: skip
            p_kept = p
            if dropout[0] is not None:
                q_line = batch * heads * MEMBERS + q_head
                p = signed(p, dropout, q_line, read_place(dropout, stage), own_place, M, S)
                p_kept = gl.maximum(p, 0.0)
            p_left = gl.convert_layout(p_kept.to(kind), P)
            # Over long ago: ptxas cannot move the wait for dP above the exponentials.
            mbarrier.wait(k_full.index(buffer), (turn // ITEMS) & 1)
            d = warpgroup_mma_wait(0, deps=[d_token])
            dv_token = warpgroup_mma(p_left, g, dv, is_async=True)
            delta_row = delta_s.index(stage).reshape([M]).load(gl.SliceLayout(0, S))
            if dropout[0] is not None:
                d = gl.where(p > 0.0, d * dropout[2], 0.0)
                p = gl.abs(p)
            p = p * (d - delta_row[None, :])
            if padding[0] is not None:
                p = gl.where(hidden[:, None], 0.0, p)
            if tile_grad is not None:
                # A tile's steps follow each other: their sum is stored again with each, whole with the last.
                kept = gl.sum(p, 1) + gl.where(part == 0, 0.0, kept)
                into = tile_grad + batch.to(gl.int64) * stg_b + q_head.to(gl.int64) * stg_h
                keep_sums(into + noted(edge_s, stage), C * 4, tile_grad_step, kept)
            ds_kind = p.to(kind)
            ds = gl.convert_layout(ds_kind, P)
            dk_token = warpgroup_mma(ds, q_s.index(stage).reshape([M, BLOCK_D]), dk, is_async=True)
            # Both consumers are through with the step before: its dS is here, and the dQ before it is made,
            # whose dS this one's replaces.
            mbarrier.wait(
                free.index((steps + STAGES - 1) % STAGES), ((steps - 1) // STAGES) & 1, pred=i > 0
            )
            ds_s.index((steps % SLOTS) * 2 + C).store(ds_kind)
            fence_async_shared()
            dq_token = issue_dq(C, ds_s, (steps + SLOTS - 1) % SLOTS, k_all, BLOCK_D, T)
            # All but dQ, which is two products.
            dv, p_left, dk, ds = warpgroup_mma_wait(2, deps=[dv_token, p_left, dk_token, ds])
            steps += 1
            after = steps % STAGES
            mbarrier.wait(full.index(after), (steps // STAGES) & 1, pred=i + 1 < count)
            q = q_s.index(after).reshape([M, BLOCK_D])
            s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dq = warpgroup_mma_wait(1, deps=[dq_token])
            mbarrier.arrive(free.index(stage), count=1)
            mbarrier.arrive(v_free.index(0), count=1, pred=i + 1 == count)
            send_dq(C, dq, dq_sum, dq_s, batch, head_before, query_before, BLOCK_D)
            query_before = query0
            head_before = q_head
            # Nothing is in flight where the loop turns.
            s = warpgroup_mma_wait(0, deps=[s_token])
        # Of an item without steps none has freed the values, which have come all the same.
        mbarrier.wait(v_full.index(0), turn & 1, pred=count <= 0)
        mbarrier.arrive(v_free.index(0), count=1, pred=count <= 0)
        if count > 0:
            mbarrier.wait(free.index((steps + STAGES - 1) % STAGES), ((steps - 1) // STAGES) & 1)
            k_all = k_s.index(buffer + (count >> 30)).reshape([BLOCK_K, BLOCK_D])
            dq_token = issue_dq(C, ds_s, (steps + SLOTS - 1) % SLOTS, k_all, BLOCK_D, T)
            dq = warpgroup_mma_wait(0, deps=[dq_token])
            send_dq(C, dq, dq_sum, dq_s, batch, head_before, query_before, BLOCK_D)
        # Read again rather than held in registers meanwhile.
        line = told(info_s.index(buffer))
        batch = field(line, 0)
        head = field(line, 1)
        key0 = field(line, 2) * BLOCK_K + C * ROWS
        slot = field(line, 6)
        rep = field(line, 7)
        if padding[0] is not None:
            hidden = ignored_keys(padding, read_note(padding, buffer), C * ROWS, BLOCK_K, O)
            dv = gl.where(hidden[:, None], 0.0, dv)
        mbarrier.arrive(k_free.index(buffer), count=1)
        dk = dk * scale
        if dropout[0] is not None:
            dv = dv * dropout[2]
        whole = True
        if part_dk is not None:
            if slot >= 0:
                whole = False
                at = (slot.to(gl.int64) * reps + rep) * BLOCK_K + C * ROWS
                store_wide(part_dk, part_dv, at, dk, dv, ROWS, D, O)
        if whole:
            if members_dk is not None:
                at = (batch * heads + head).to(gl.int64) * k_len + key0
                store_wide(members_dk, members_dv, at, dk, dv, k_len - key0, D, O)
            else:
                own = o_s.index(C * (128 // BLOCK_D))
                tma.store_wait(0)
                own.reshape([ROWS, BLOCK_D]).store(dv.to(kind))
                fence_async_shared()
                tma.async_copy_shared_to_global(dv_out, [batch, head, key0, 0], own)
                tma.store_wait(0)
                own.reshape([ROWS, BLOCK_D]).store(dk.to(kind))
                fence_async_shared()
                tma.async_copy_shared_to_global(dk_out, [batch, head, key0, 0], own)
        turn += 1
        mbarrier.wait(k_full.index(turn % ITEMS), (turn // ITEMS) & 1)
        more = field(told(info_s.index(turn % ITEMS)), 0) >= 0
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=COUNTS)
def five_kernel(
    q, grad_out, k, v, lse2, delta, dk_out, dv_out, dq_sum, part_dk, part_dv, members_dk, members_dv,
    tile_bias, edges, tile_grad, kept_notes, kept_words, kept_k, kept_v, seed, q_tiles, k_tiles, skt_h,
    keep_scale, threshold, counter, items, others, mask_ids, masks, st_b, st_h, stg_b, stg_h,
    tile_grad_step, item_count, first_count, reps, heads, layout_heads, group, k_len, k_blocks, works,
    scale, scale2,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    M: gl.constexpr, STAGES: gl.constexpr, MEMBERS: gl.constexpr, PARTIAL: gl.constexpr,
    BATCH_SHARED: gl.constexpr, HEADS_SHARED: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    # fmt: on
    """As ``columns_kernel``, for tiles of 128×128. dq_sum is a TMA descriptor of fp32 ``[B, H, Nq, D]``,
    zeros at first, to which dQ ÷ scale is added. M is 64 where BLOCK_D is 128, and 128 where it is 64: 64×64
    of a step's dQ are each consumer's. k and v come in boxes of BLOCK_K rows."""
    kind: gl.constexpr = q.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, 64], dq_sum.layout)
    buffers = (
        gl.allocate_shared_memory(kind, [ITEMS, 1, 1, BLOCK_K, BLOCK_D], k.layout),
        gl.allocate_shared_memory(kind, [1, 1, 1, BLOCK_K, BLOCK_D], v.layout),
        gl.allocate_shared_memory(gl.int32, [ITEMS, 8], flat),
        step_buffers(q, grad_out, lse2, delta, M, BLOCK_D, STAGES),
        gl.allocate_shared_memory(kind, [2 * SLOTS, ROWS, M], swizzled),
        dq_s,
        dq_s._reinterpret(kind, [2 * (128 // BLOCK_D), 1, 1, ROWS, BLOCK_D], dk_out.layout),
    )
    k_full, k_free = barriers(ITEMS, 2)
    v_full, v_free = barriers(1, 2)
    full, free = barriers(STAGES, 2)
    signals = (k_full, k_free, v_full, v_free, full, free)
    fence_async_shared()
    loads = (k, v, (q, grad_out, lse2, delta))
    counts = (item_count, first_count, reps, heads, layout_heads, group, k_blocks, works)
    walk = (counter, items, others, counts)
    bias = (tile_bias, edges, st_b, st_h)
    bias_grad = (tile_grad, stg_b, stg_h, tile_grad_step)
    padding = (kept_notes,)
    if kept_notes is not None:
        padding = (kept_notes, kept_words, kept_k, kept_v, k_blocks, room_for_notes(ITEMS))
    dropout = (seed,)
    if seed is not None:
        dropout = (seed, threshold, keep_scale, q_tiles, k_tiles, skt_h, room_for_notes(STAGES))
    stores = (
        dk_out, dv_out, dq_sum, part_dk, part_dv, members_dk, members_dv,
        others, mask_ids, masks, heads, group, reps, k_len, scale, scale2,
    )  # fmt: skip
    # fmt: off
    gl.warp_specialize([
        (consumer, (gl.constexpr(0), stores, bias, bias_grad, padding, dropout, buffers, signals,
                    D, BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, PARTIAL)),
        (consumer, (gl.constexpr(1), stores, bias, bias_grad, padding, dropout, buffers, signals,
                    D, BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, PARTIAL)),
        (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                    BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, BATCH_SHARED, HEADS_SHARED)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])
    # fmt: on
