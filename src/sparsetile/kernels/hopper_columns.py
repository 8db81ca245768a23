# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Backward on Hopper, dK and dV: programs own key tiles and walk the query tiles that attend them.

Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, dV = Σ Pᵀ·dO, dK = scale·Σ dSᵀ·Q, M queries a step: Pᵀ and dSᵀ stay in registers as
left operands. The next step's Sᵀ is issued behind this one's dK, so that the tensor cores have work while
exponentials run; every product is awaited before the loop turns, or ptxas would serialise them all. The LSE
and δ of a step's queries come by bulk copy beside Q and dO; past the end they are zeros as dO is, so that no
mask is needed there. dV and dK leave from where the item's values and keys lay.
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
from sparsetile.kernels.hopper_tiles import (
    LOG2E,
    ROWS,
    allowed,
    barriers,
    copy_keys,
    field,
    ignored_keys,
    item_at,
    note_down,
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

ITEMS = gl.constexpr(2)  # whose keys lie in shared memory: one is read while the next comes


@gluon.jit
def step_buffers(q, grad_out, lse2, delta, M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """Where STAGES steps lie: Q, dO, LSE, δ, and the tile's place among the layout's and its bias."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, BLOCK_D], q.layout)
    g_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, BLOCK_D], grad_out.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, M], lse2.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, M], delta.layout)
    edge_s = gl.allocate_shared_memory(gl.int32, [STAGES, 1], flat)
    bias_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1], flat)
    return q_s, g_s, lse_s, delta_s, edge_s, bias_s


# fmt: off
@gluon.jit
def load_steps(
    tensors, others, bias, dropout, stream, full, free, steps, batch, head, start, end,
    BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    MEMBERS: gl.constexpr,
):
    # fmt: on
    """Loads what an item's steps read, for one query head of its group after the other; returns the count of
    steps so far, which were ``steps``."""
    q, grad_out, lse2, delta = tensors
    tile_bias, edges, st_b, st_h = bias
    q_s, g_s, lse_s, delta_s, edge_s, bias_s = stream
    STEPS: gl.constexpr = BLOCK_Q // M
    for member in range(MEMBERS):
        q_head = head * MEMBERS + member
        for step in range(start * STEPS, end * STEPS):
            query_block = gl.load(others + step // STEPS).to(gl.int32)
            query0 = query_block * BLOCK_Q + (step % STEPS) * M
            tile_at = [batch, q_head, query0, 0]
            line_at = [batch, q_head, query0]
            stage = steps % STAGES
            here = full.index(stage)
            mbarrier.wait(free.index(stage), ((steps // STAGES) & 1) ^ 1)
            put_place(dropout, stage, queries_at(dropout, query_block, BLOCK_Q) + (step % STEPS) * M)
            if tile_bias is not None:
                own = tile_bias + batch.to(gl.int64) * st_b + q_head.to(gl.int64) * st_h
                note_down(edge_s, bias_s, stage, own, edges, step // STEPS)
            mbarrier.expect(here, 2 * (M * BLOCK_D * 2 + M * 4))
            tma.async_copy_global_to_shared(q, tile_at, here, q_s.index(stage))
            tma.async_copy_global_to_shared(lse2, line_at, here, lse_s.index(stage))
            tma.async_copy_global_to_shared(grad_out, tile_at, here, g_s.index(stage))
            tma.async_copy_global_to_shared(delta, line_at, here, delta_s.index(stage))
            steps += 1
    return steps


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
    k_s, v_s, info_s, stream = buffers
    kv_full, kv_free, full, free = signals
    CONSUMERS: gl.constexpr = BLOCK_K // ROWS
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
            here = kv_full.index(buffer)
            mbarrier.wait(kv_free.index(buffer), ((turn // ITEMS) & 1) ^ 1)
            tell(info_s.index(buffer), batch, head, block, start, full_end, end, slot, rep)
            note = note_of(padding, batch, head * MEMBERS, heads * MEMBERS, group, block)
            put_note(padding, buffer, note)
            mbarrier.expect(here, BLOCK_K * BLOCK_D * 4)
            kv_head = head * MEMBERS // group
            for c in gl.static_range(CONSUMERS):
                at = [batch, kv_head, block * BLOCK_K + c * ROWS, 0]
                copy_keys(k, padding, 0, note, at, here, k_s.index(buffer * CONSUMERS + c))
                copy_keys(v, padding, 1, note, at, here, v_s.index(buffer * CONSUMERS + c))
            steps = load_steps(
                of_steps, others, bias, dropout, stream, full, free, steps, batch, head, start, end,
                BLOCK_D, BLOCK_Q, M, STAGES, MEMBERS,
            )  # fmt: skip
            turn += 1
    buffer = turn % ITEMS
    mbarrier.wait(kv_free.index(buffer), ((turn // ITEMS) & 1) ^ 1)
    tell_end(info_s.index(buffer))
    mbarrier.arrive(kv_full.index(buffer), count=1)


# fmt: off
@gluon.jit
def masked(s, entry, full_end, mask_ids, masks, first_key, first_query,
           BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, M: gl.constexpr, S: gl.constexpr):
    # fmt: on
    """Scores ``[ROWS keys, M queries]`` with −inf where a partial tile forbids the pair."""
    if entry >= full_end:
        keys = first_key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        queries = first_query + gl.arange(0, M, layout=gl.SliceLayout(0, S))
        bits = allowed(masks, gl.load(mask_ids + entry), queries[None, :], keys[:, None], BLOCK_Q, BLOCK_K)
        s = gl.where(bits != 0, s, float("-inf"))
    return s


# fmt: off
@gluon.jit
def weights(
    s, part, entry, full_end, stage, lse_s, bias_s, tile_bias, mask_ids, masks, scale2, first_key,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, M: gl.constexpr, PARTIAL: gl.constexpr, S: gl.constexpr,
):
    # fmt: on
    """Pᵀ ``[ROWS keys, M queries]`` of part ``part`` of a tile's queries."""
    lse_row = lse_s.index(stage).reshape([M]).load(gl.SliceLayout(0, S))
    if PARTIAL:
        s = masked(s, entry, full_end, mask_ids, masks, first_key, part * M, BLOCK_Q, BLOCK_K, M, S)
    if tile_bias is not None:
        p = gl.exp2(s * scale2 - (lse_row - noted(bias_s, stage) * LOG2E)[None, :])
    else:
        p = gl.exp2(s * scale2 - lse_row[None, :])
    return p


# fmt: off
@gluon.jit
def signed(p, dropout, batch_head, query_place, key_place, M: gl.constexpr, S: gl.constexpr):
    # fmt: on
    """Pᵀ ``[ROWS keys, M queries]``, below 0 where the weight is dropped: nothing else need be held until dP
    is there."""
    queries = gl.arange(0, M, layout=gl.SliceLayout(0, S))
    keys = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    words = row_words(dropout, batch_head, query_place, queries)
    return gl.where(keeps(dropout, words[None, :], queries[None, :], key_place, keys[:, None]), p, -p)


@gluon.jit
def store_wide(dk_to, dv_to, at, dk, dv, rows_left, D: gl.constexpr, O: gl.constexpr):
    """Stores fp32 dk and dv from row ``at`` of lines of D entries, of which they may have more, as far as
    rows are left."""
    rows = gl.arange(0, dk.shape[0], layout=gl.SliceLayout(1, O))[:, None]
    dims = gl.arange(0, dk.shape[1], layout=gl.SliceLayout(0, O))[None, :]
    offsets = at * D + rows * D + dims
    gl.store(dk_to + offsets, dk, mask=(rows < rows_left) & (dims < D))
    gl.store(dv_to + offsets, dv, mask=(rows < rows_left) & (dims < D))


# fmt: off
@gluon.jit
def consumer(
    C: gl.constexpr, tensors, bias, padding, dropout, buffers, signals,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    M: gl.constexpr, STAGES: gl.constexpr, MEMBERS: gl.constexpr, PARTIAL: gl.constexpr,
):
    # fmt: on
    dk_out, dv_out, part_dk, part_dv, members_dk, members_dv = tensors[:6]
    mask_ids, masks, heads, group, reps, k_len, scale, scale2 = tensors[6:]
    tile_bias = bias[0]
    k_s, v_s, info_s, stream = buffers
    q_s, g_s, lse_s, delta_s, _, bias_s = stream
    kv_full, kv_free, full, free = signals
    CONSUMERS: gl.constexpr = BLOCK_K // ROWS
    STEPS: gl.constexpr = BLOCK_Q // M
    kind: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    steps = 0
    turn = 0
    mbarrier.wait(kv_full.index(0), 0)
    more = field(told(info_s.index(0)), 0) >= 0
    while more:
        buffer = turn % ITEMS
        line = told(info_s.index(buffer))
        start = field(line, 3)
        full_end = field(line, 4)
        end = field(line, 5)
        dk = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        dv = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        zero = gl.zeros([ROWS, M], gl.float32, S)
        own_place = keys_at(dropout, field(line, 1) * MEMBERS // group, field(line, 2), BLOCK_K) + C * ROWS
        line_head = (field(line, 0) * heads + field(line, 1)) * MEMBERS
        span = (end - start) * STEPS
        count = span * MEMBERS
        # The first scores; of an item without steps of whatever lies there: a product that some branches
        # leave out makes ptxas wait for each of them.
        mbarrier.wait(full.index(steps % STAGES), (steps // STAGES) & 1, pred=count > 0)
        k = k_s.index(buffer * CONSUMERS + C + (count >> 30)).reshape([ROWS, BLOCK_D])
        q = q_s.index(steps % STAGES).reshape([M, BLOCK_D])
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False)
        # By now the item before has left its buffer.
        tma.store_wait(0)
        mbarrier.arrive(kv_free.index(1 - buffer), count=1, pred=turn > 0)
        for i in range(count):
            # No compiler knows this to be C: descriptors of k and v are not hoisted, and spilled.
            mine = buffer * CONSUMERS + C + (i >> 30)
            k = k_s.index(mine).reshape([ROWS, BLOCK_D])
            v = v_s.index(mine).reshape([ROWS, BLOCK_D])
            stage = steps % STAGES
            g = g_s.index(stage).reshape([M, BLOCK_D])
            d_token = warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
            at = i
            if MEMBERS > 1:
                at = i % span
            p = weights(
                s, at % STEPS, start + at // STEPS, full_end, stage, lse_s, bias_s, tile_bias,
                mask_ids, masks, scale2, C * ROWS, BLOCK_Q, BLOCK_K, M, PARTIAL, S,
            )  # fmt: skip
            p_kept = p
            if dropout[0] is not None:
                q_line = line_head
                if MEMBERS > 1:
                    q_line = line_head + i // span
                p = signed(p, dropout, q_line, read_place(dropout, stage), own_place, M, S)
                p_kept = gl.maximum(p, 0.0)
            p_left = gl.convert_layout(p_kept.to(kind), P)
            # Over long ago: ptxas cannot move the wait for dP above the exponentials.
            mbarrier.wait(kv_full.index(buffer), (turn // ITEMS) & 1)
            d = warpgroup_mma_wait(0, deps=[d_token])
            dv_token = warpgroup_mma(p_left, g, dv, is_async=True)
            delta_row = delta_s.index(stage).reshape([M]).load(gl.SliceLayout(0, S))
            if dropout[0] is not None:
                d = gl.where(p > 0.0, d * dropout[2], 0.0)
                p = gl.abs(p)
            ds = gl.convert_layout((p * (d - delta_row[None, :])).to(kind), P)
            dk_token = warpgroup_mma(ds, q_s.index(stage).reshape([M, BLOCK_D]), dk, is_async=True)
            steps += 1
            after = steps % STAGES
            mbarrier.wait(full.index(after), (steps // STAGES) & 1, pred=i + 1 < count)
            q = q_s.index(after).reshape([M, BLOCK_D])
            s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dv, p_left, dk, ds = warpgroup_mma_wait(1, deps=[dv_token, p_left, dk_token, ds])
            mbarrier.arrive(free.index(stage), count=1)
            # Nothing is in flight where the loop turns.
            s = warpgroup_mma_wait(0, deps=[s_token])
        # Read again rather than held in registers meanwhile.
        line = told(info_s.index(buffer))
        batch = field(line, 0)
        head = field(line, 1)
        key0 = field(line, 2) * BLOCK_K + C * ROWS
        slot = field(line, 6)
        rep = field(line, 7)
        if padding[0] is not None:
            hidden = ignored_keys(padding, read_note(padding, buffer), C * ROWS, BLOCK_K, O)
            dk = gl.where(hidden[:, None], 0.0, dk)
            dv = gl.where(hidden[:, None], 0.0, dv)
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
                own = buffer * CONSUMERS + C
                v_s.index(own).reshape([ROWS, BLOCK_D]).store(dv.to(kind))
                k_s.index(own).reshape([ROWS, BLOCK_D]).store(dk.to(kind))
                fence_async_shared()
                tma.async_copy_shared_to_global(dv_out, [batch, head, key0, 0], v_s.index(own))
                tma.async_copy_shared_to_global(dk_out, [batch, head, key0, 0], k_s.index(own))
        turn += 1
        mbarrier.wait(kv_full.index(turn % ITEMS), (turn // ITEMS) & 1)
        more = field(told(info_s.index(turn % ITEMS)), 0) >= 0
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=COUNTS)
def columns_kernel(
    q, grad_out, k, v, lse2, delta, dk_out, dv_out, part_dk, part_dv, members_dk, members_dv, tile_bias,
    edges, kept_notes, kept_words, kept_k, kept_v, seed, q_tiles, k_tiles, skt_h, keep_scale, threshold,
    counter, items, others, mask_ids, masks, st_b, st_h, item_count, first_count, reps, heads,
    layout_heads, group, k_len, k_blocks, works, scale, scale2,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    M: gl.constexpr, STAGES: gl.constexpr, MEMBERS: gl.constexpr, PARTIAL: gl.constexpr,
    BATCH_SHARED: gl.constexpr, HEADS_SHARED: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    # fmt: on
    """Items are columns of the layout. q, grad_out, k, v, dk_out and dv_out are TMA descriptors of
    ``[B, H, N, D]``, lse2 and delta of ``[B, H, Nq]``. Given members_dk and members_dv (fp32
    ``[B, H, Nk, D]``), those are filled instead: each query head's share."""
    CONSUMERS: gl.constexpr = BLOCK_K // ROWS
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = (
        gl.allocate_shared_memory(k.dtype, [ITEMS * CONSUMERS, 1, 1, ROWS, BLOCK_D], k.layout),
        gl.allocate_shared_memory(k.dtype, [ITEMS * CONSUMERS, 1, 1, ROWS, BLOCK_D], v.layout),
        gl.allocate_shared_memory(gl.int32, [ITEMS, 8], flat),
        step_buffers(q, grad_out, lse2, delta, M, BLOCK_D, STAGES),
    )
    kv_full, kv_free = barriers(ITEMS, CONSUMERS)
    full, free = barriers(STAGES, CONSUMERS)
    signals = (kv_full, kv_free, full, free)
    fence_async_shared()
    loads = (k, v, (q, grad_out, lse2, delta))
    counts = (item_count, first_count, reps, heads, layout_heads, group, k_blocks, works)
    walk = (counter, items, others, counts)
    bias = (tile_bias, edges, st_b, st_h)
    padding = (kept_notes,)
    if kept_notes is not None:
        padding = (kept_notes, kept_words, kept_k, kept_v, k_blocks, room_for_notes(ITEMS))
    dropout = (seed,)
    if seed is not None:
        dropout = (seed, threshold, keep_scale, q_tiles, k_tiles, skt_h, room_for_notes(STAGES))
    stores = (
        dk_out, dv_out, part_dk, part_dv, members_dk, members_dv,
        mask_ids, masks, heads, group, reps, k_len, scale, scale2,
    )  # fmt: skip
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, PARTIAL)),
            (consumer, (gl.constexpr(1), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, PARTIAL)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, BATCH_SHARED, HEADS_SHARED)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, PARTIAL)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, M, STAGES, MEMBERS, BATCH_SHARED, HEADS_SHARED)),
        ], [1], [PRODUCER_REGISTERS])
    # fmt: on
