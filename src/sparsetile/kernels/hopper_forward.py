# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Forward on Hopper: the tensor cores have one consumer's products while another computes its weights.

A consumer walks the keys of its item in steps: softmax of a step's scores, P·V, and Q·Kᵀ of the next step, be
it of the next item. A step is a tile; or half of one where heads are narrow, for then the registers hold four
consumers a multiprocessor, which fill each other's gaps better than one can its own. The softmax is online
(Milakov and Gimelshein 2018, arXiv:1805.02867).
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
    factors,
    keys_at,
    put_place,
    queries_at,
    read_place,
    row_words,
)
from sparsetile.kernels.hopper_tiles import (
    LN2,
    LOG2E,
    ROWS,
    allowed,
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

# Of items in shared memory: more than of their queries, for a line is read until its item is stored.
LINES = gl.constexpr(8)


# fmt: off
@gluon.jit
def producer(
    tensors, walk, bias, padding, dropout, buffers, signals,
    BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    QS: gl.constexpr, BATCH_SHARED: gl.constexpr, HEADS_SHARED: gl.constexpr,
):
    # fmt: on
    q, k, v = tensors
    counter, items, others, counts = walk
    item_count, first_count, reps, heads, layout_heads, group, q_blocks, works = counts
    tile_bias, edges, st_b, st_h = bias
    q_s, k_s, v_s, _, info_s, edge_s, bias_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = signals
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    tiles = 0
    turn = 0
    work = gl.atomic_add(counter, 1)
    more = work < works
    while more:
        row, start, full_end, end, slot, batch, head, block, rep = item_at(
            work, items, item_count, first_count, reps, heads, layout_heads, q_blocks,
            BATCH_SHARED, HEADS_SHARED,
        )  # fmt: skip
        work = gl.atomic_add(counter, 1)
        more = work < works
        if row >= 0:
            buffer = turn % QS
            mbarrier.wait(q_free.index(buffer), ((turn // QS) & 1) ^ 1)
            tell(info_s.index(turn % LINES), batch, head, block, start, full_end, end, slot, rep)
            full = q_full.index(buffer)
            mbarrier.expect(full, BLOCK_Q * BLOCK_D * 2)
            for c in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    q, [batch, head, block * BLOCK_Q + c * ROWS, 0], full, q_s.index(buffer * CONSUMERS + c)
                )
            kv_head = head // group
            for entry in range(start, end):
                key_block = gl.load(others + entry).to(gl.int32)
                note = note_of(padding, batch, head, heads, group, key_block)
                at = [batch, kv_head, key_block * BLOCK_K, 0]
                stage = tiles % STAGES
                phase = ((tiles // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), phase)
                put_note(padding, stage, note)
                put_place(dropout, stage, keys_at(dropout, kv_head, key_block, BLOCK_K))
                if tile_bias is not None:
                    own = tile_bias + batch.to(gl.int64) * st_b + head.to(gl.int64) * st_h
                    note_down(edge_s, bias_s, stage, own, edges, entry)
                mbarrier.expect(k_full.index(stage), BLOCK_K * BLOCK_D * 2)
                copy_keys(k, padding, 0, note, at, k_full.index(stage), k_s.index(stage))
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), BLOCK_K * BLOCK_D * 2)
                copy_keys(v, padding, 1, note, at, v_full.index(stage), v_s.index(stage))
                tiles += 1
            if start >= end:
                # A product that only some items have makes ptxas wait for each of them: of an item without
                # tiles the consumers multiply whatever lies there, and store nothing of it.
                stage = tiles % STAGES
                phase = ((tiles // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), phase)
                put_note(padding, stage, -1)
                mbarrier.arrive(k_full.index(stage), count=1)
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.arrive(v_full.index(stage), count=1)
                tiles += 1
            turn += 1
    # The end is an item, too, whose first scores are computed.
    buffer = turn % QS
    mbarrier.wait(q_free.index(buffer), ((turn // QS) & 1) ^ 1)
    tell_end(info_s.index(turn % LINES))
    mbarrier.arrive(q_full.index(buffer), count=1)
    stage = tiles % STAGES
    mbarrier.wait(k_free.index(stage), ((tiles // STAGES) & 1) ^ 1)
    put_note(padding, stage, -1)
    mbarrier.arrive(k_full.index(stage), count=1)


# fmt: off
@gluon.jit
def masked(s, entry, full_end, end, mask_ids, masks, first_query, first_key,
           BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, S: gl.constexpr):
    # fmt: on
    """Scores ``[ROWS, …]`` of keys from ``first_key`` on, with −inf where a partial tile forbids the pair."""
    if (entry >= full_end) & (entry < end):
        queries = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        keys = first_key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S))
        bits = allowed(masks, gl.load(mask_ids + entry), queries[:, None], keys[None, :], BLOCK_Q, BLOCK_K)
        s = gl.where(bits != 0, s, float("-inf"))
    return s


@gluon.jit
def keys_of(k_s, stage, part, BLOCK_K: gl.constexpr, BLOCK_D: gl.constexpr, KEYS: gl.constexpr):
    """Kᵀ ``[BLOCK_D, KEYS]`` of one step of a tile."""
    return k_s.index(stage).reshape([BLOCK_K, BLOCK_D]).slice(part * KEYS, KEYS).permute((1, 0))


@gluon.jit
def soften(s, peak, total, scale, shift, BIASED: gl.constexpr):
    """(weights, factor of what came before, peak, total) after one more step's scores; in base 2."""
    top = gl.max(s, 1) * scale
    if BIASED:
        shift = shift * LOG2E
        new_peak = gl.maximum(peak, top + shift)
    else:
        new_peak = gl.maximum(peak, top)
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    zero = origin
    if BIASED:
        # A scalar for all of the tile moves the rows' origins instead of its scores. Never below the largest
        # score, as rounding could take it at biases of great size.
        zero = gl.maximum(origin - shift, top)
    p = gl.exp2(s * scale - zero[:, None])
    shrink = gl.exp2(peak - origin)
    total = total * shrink + gl.sum(p, 1)
    return p, shrink, new_peak, total


# fmt: off
@gluon.jit
def consumer(
    C: gl.constexpr, tensors, bias, padding, dropout, buffers, signals,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, QS: gl.constexpr, KEYS: gl.constexpr,
):
    # fmt: on
    out, lse, part_out, part_lse, mask_ids, masks, heads, reps, q_len, scale = tensors
    tile_bias = bias[0]
    q_s, k_s, v_s, o_s, info_s, _, bias_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = signals
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    STEPS: gl.constexpr = BLOCK_K // KEYS
    BIASED: gl.constexpr = tile_bias is not None
    kind: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    tiles = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    more = field(told(info_s.index(0)), 0) >= 0
    zero = gl.zeros([ROWS, KEYS], gl.float32, S)
    mbarrier.wait(k_full.index(0), 0)
    first_q = q_s.index(C).reshape([ROWS, BLOCK_D])
    s = warpgroup_mma(first_q, keys_of(k_s, 0, 0, BLOCK_K, BLOCK_D, KEYS), zero, use_acc=False)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    keys = gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
    while more:
        line = told(info_s.index(turn % LINES))
        start = field(line, 3)
        full_end = field(line, 4)
        end = field(line, 5)
        last = gl.maximum(end, start + 1)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S))
        if dropout[0] is not None:
            own_place = queries_at(dropout, field(line, 2), BLOCK_Q) + C * ROWS
            words = row_words(dropout, field(line, 0) * heads + field(line, 1), own_place, rows)
        for entry in range(start, last):
            stage = tiles % STAGES
            phase = (tiles // STAGES) & 1
            shift = 0.0
            if BIASED:
                shift = noted(bias_s, stage)
            note = read_note(padding, stage)
            place = read_place(dropout, stage)
            if STEPS == 1:
                mbarrier.arrive(k_free.index(stage), count=1)
            for part in gl.static_range(STEPS):
                key = part * KEYS
                s = masked(s, entry, full_end, end, mask_ids, masks, C * ROWS, key, BLOCK_Q, BLOCK_K, S)
                s = heeded(s, padding, note, key, BLOCK_K, S)
                p, shrink, peak, total = soften(s, peak, total, scale, shift, BIASED)
                if dropout[0] is not None:
                    p = p * factors(dropout, words[:, None], rows[:, None], place, key + keys[None, :])
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
                p = gl.convert_layout(p.to(kind), P)
                if part == 0:
                    mbarrier.wait(v_full.index(stage), phase)
                v = v_s.index(stage).reshape([BLOCK_K, BLOCK_D]).slice(part * KEYS, KEYS)
                acc_token = warpgroup_mma(p, v, acc, is_async=True)
                if STEPS > 1:
                    acc_token, p = warpgroup_mma_wait(0, deps=[acc_token, p])
                next_turn = turn
                next_stage = stage
                if part + 1 == STEPS:
                    if STEPS > 1:
                        mbarrier.arrive(k_free.index(stage), count=1)
                    tiles += 1
                    next_turn = turn + (entry + 1 == last).to(gl.int32)
                    next_stage = tiles % STAGES
                    mbarrier.wait(q_full.index(next_turn % QS), (next_turn // QS) & 1)
                    mbarrier.wait(k_full.index(next_stage), (tiles // STAGES) & 1)
                q = q_s.index(next_turn % QS * CONSUMERS + C).reshape([ROWS, BLOCK_D])
                k = keys_of(k_s, next_stage, (part + 1) % STEPS, BLOCK_K, BLOCK_D, KEYS)
                s_token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
                acc, s, p = warpgroup_mma_wait(0, deps=[acc_token, s_token, p])
            mbarrier.arrive(v_free.index(stage), count=1)
        mbarrier.arrive(q_free.index(turn % QS), count=1)
        line = told(info_s.index(turn % LINES))
        batch = field(line, 0)
        head = field(line, 1)
        block = field(line, 2)
        some = field(line, 3) < field(line, 5)
        total = gl.where(some, total, 0.0)
        empty = total == 0.0
        divisor = gl.where(empty, 1.0, total)
        row_lse = gl.where(empty, float("-inf"), peak + gl.log2(divisor))
        inverse = 1.0 / divisor
        if dropout[0] is not None:
            inverse = dropout[2] / divisor
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O))[:, None]
        acc = gl.where(some, acc, 0.0)
        query = block * BLOCK_Q + C * ROWS + rows
        whole = True
        if part_out is not None:
            slot = field(line, 6)
            if slot >= 0:
                whole = False
                at = (slot.to(gl.int64) * reps + field(line, 7)) * BLOCK_Q + C * ROWS
                store_rows(part_out, at, acc, D, O)
                gl.store(part_lse + at + rows, row_lse)
        if whole:
            at = (batch * heads + head).to(gl.int64) * q_len
            gl.store(lse + at + query, row_lse * LN2, mask=query < q_len)
            tma.store_wait(0)
            o_s.index(C).reshape([ROWS, BLOCK_D]).store(acc.to(kind))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [batch, head, block * BLOCK_Q + C * ROWS, 0], o_s.index(C))
        turn += 1
        more = field(told(info_s.index(turn % LINES)), 0) >= 0
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, out, lse, part_out, part_lse, tile_bias, edges, kept_notes, kept_words, kept_k, kept_v, seed,
    q_tiles, k_tiles, skt_h, keep_scale, threshold, counter, items, others, mask_ids, masks, st_b, st_h,
    item_count, first_count, reps, heads, layout_heads, group, q_len, q_blocks, k_blocks, works, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, QS: gl.constexpr, KEYS: gl.constexpr, BATCH_SHARED: gl.constexpr,
    HEADS_SHARED: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    # fmt: on
    """Items are rows of the layout. q, k, v and out are TMA descriptors of ``[B, H, N, D]``; ``scale`` is in
    base 2 and positive; ``works`` items are drawn from ``counter``, which starts at 0. Buffers are BLOCK_D
    wide: bulk copies bring zeros past D, and store nothing there. What begins with kept comes from
    ``kept_kernel``, where keys are padded; else it is None."""
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    kind: gl.constexpr = q.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = (
        gl.allocate_shared_memory(kind, [QS * CONSUMERS, 1, 1, ROWS, BLOCK_D], q.layout),
        gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK_K, BLOCK_D], k.layout),
        gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK_K, BLOCK_D], v.layout),
        gl.allocate_shared_memory(kind, [CONSUMERS, 1, 1, ROWS, BLOCK_D], out.layout),
        gl.allocate_shared_memory(gl.int32, [LINES, 8], flat),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], flat),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1], flat),
    )
    q_full, q_free = barriers(QS, CONSUMERS)
    k_full, k_free = barriers(STAGES, CONSUMERS)
    v_full, v_free = barriers(STAGES, CONSUMERS)
    signals = (q_full, q_free, k_full, k_free, v_full, v_free)
    fence_async_shared()
    loads = (q, k, v)
    counts = (item_count, first_count, reps, heads, layout_heads, group, q_blocks, works)
    walk = (counter, items, others, counts)
    bias = (tile_bias, edges, st_b, st_h)
    padding = (kept_notes,)
    if kept_notes is not None:
        padding = (kept_notes, kept_words, kept_k, kept_v, k_blocks, room_for_notes(STAGES))
    dropout = (seed,)
    if seed is not None:
        dropout = (seed, threshold, keep_scale, q_tiles, k_tiles, skt_h, room_for_notes(STAGES))
    stores = (out, lse, part_out, part_lse, mask_ids, masks, heads, reps, q_len, scale)
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, KEYS)),
            (consumer, (gl.constexpr(1), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, KEYS)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, BATCH_SHARED, HEADS_SHARED)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, KEYS)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, BATCH_SHARED, HEADS_SHARED)),
        ], [1], [PRODUCER_REGISTERS])
    # fmt: on
