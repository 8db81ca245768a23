# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Forward on Hopper: the tensor cores have other products while a tile's weights are computed.

Per consumer: Q·Kᵀ of tile j + 1 is issued beside P·V of tile j; the first Q·Kᵀ of the next item beside the
last P·V of this one, and before its epilogue. The softmax is online (Milakov and Gimelshein 2018,
arXiv:1805.02867), as in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), algorithm 2.
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
            tell(info_s.index(buffer), batch, head, block, start, full_end, end, slot, rep)
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
            turn += 1
    buffer = turn % QS
    mbarrier.wait(q_free.index(buffer), ((turn // QS) & 1) ^ 1)
    tell_end(info_s.index(buffer))
    mbarrier.arrive(q_full.index(buffer), count=1)


# fmt: off
@gluon.jit
def masked(s, entry, full_end, end, mask_ids, masks, first_query,
           BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, S: gl.constexpr):
    # fmt: on
    """Scores ``[ROWS, BLOCK_K]`` with −inf where a partial tile forbids the pair."""
    if (entry >= full_end) & (entry < end):
        queries = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        keys = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S))
        bits = allowed(masks, gl.load(mask_ids + entry), queries[:, None], keys[None, :], BLOCK_Q, BLOCK_K)
        s = gl.where(bits != 0, s, float("-inf"))
    return s


@gluon.jit
def soften(s, peak, total, scale, shift, MAYBE_EMPTY: gl.constexpr, BIASED: gl.constexpr):
    """(weights, factor of what came before, peak, total) after one more tile of scores; in base 2."""
    top = gl.max(s, 1) * scale
    if BIASED:
        shift = shift * LOG2E
        new_peak = gl.maximum(peak, top + shift)
    else:
        new_peak = gl.maximum(peak, top)
    origin = new_peak
    if MAYBE_EMPTY or BIASED:
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
    STAGES: gl.constexpr, QS: gl.constexpr, PARTIAL: gl.constexpr,
):
    # fmt: on
    out, lse, part_out, part_lse, mask_ids, masks, heads, reps, q_len, scale = tensors
    tile_bias = bias[0]
    q_s, k_s, v_s, o_s, info_s, _, bias_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = signals
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    BIASED: gl.constexpr = tile_bias is not None
    MAYBE_EMPTY: gl.constexpr = PARTIAL or padding[0] is not None
    kind: gl.constexpr = q_s.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    tiles = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    line = told(info_s.index(0))
    more = field(line, 0) >= 0
    some = field(line, 3) < field(line, 5)
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    # An item without tiles, and the end, have products like all others, of whatever lies there: a product
    # that some branches leave out makes ptxas wait for each of them.
    mbarrier.wait(k_full.index(0), 0, pred=some)
    first_q = q_s.index(C).reshape([ROWS, BLOCK_D])
    first_k = k_s.index(0).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
    s = warpgroup_mma(first_q, first_k, zero, use_acc=False)
    shift = 0.0
    if BIASED:
        shift = noted(bias_s, 0)
    note = read_note(padding, 0)
    place = read_place(dropout, 0)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    keys = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S))
    mbarrier.arrive(k_free.index(0), count=1, pred=some)
    while more:
        buffer = turn % QS
        line = told(info_s.index(buffer))
        start = field(line, 3)
        full_end = field(line, 4)
        end = field(line, 5)
        some = start < end
        q = q_s.index(buffer * CONSUMERS + C).reshape([ROWS, BLOCK_D])
        if PARTIAL:
            s = masked(s, start, full_end, end, mask_ids, masks, C * ROWS, BLOCK_Q, BLOCK_K, S)
        s = heeded(s, padding, gl.where(some, note, -1), BLOCK_K, S)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, O)
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S))
        p, shrink, peak, total = soften(s, peak, total, scale, shift, MAYBE_EMPTY, BIASED)
        if dropout[0] is not None:
            own_place = queries_at(dropout, field(line, 2), BLOCK_Q) + C * ROWS
            words = row_words(dropout, field(line, 0) * heads + field(line, 1), own_place, rows)
            p = p * factors(dropout, words[:, None], rows[:, None], place, keys[None, :])
        p = gl.convert_layout(p.to(kind), P)
        for entry in range(start + 1, end):
            before = tiles % STAGES
            before_phase = (tiles // STAGES) & 1
            tiles += 1
            stage = tiles % STAGES
            mbarrier.wait(k_full.index(stage), (tiles // STAGES) & 1)
            k = k_s.index(stage).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
            s_token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), before_phase)
            acc_token = warpgroup_mma(p, v_s.index(before).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            if BIASED:
                shift = noted(bias_s, stage)
            note = read_note(padding, stage)
            place = read_place(dropout, stage)
            mbarrier.arrive(k_free.index(stage), count=1)
            if PARTIAL:
                s = masked(s, entry, full_end, end, mask_ids, masks, C * ROWS, BLOCK_Q, BLOCK_K, S)
            s = heeded(s, padding, note, BLOCK_K, S)
            new_p, shrink, peak, total = soften(s, peak, total, scale, shift, MAYBE_EMPTY, BIASED)
            if dropout[0] is not None:
                new_p = new_p * factors(dropout, words[:, None], rows[:, None], place, keys[None, :])
            # Over at once: a new basic block, above which ptxas cannot move the wait for acc.
            mbarrier.wait(v_full.index(before), before_phase)
            acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
            mbarrier.arrive(v_free.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
            p = gl.convert_layout(new_p.to(kind), P)
        stage = tiles % STAGES
        mbarrier.wait(v_full.index(stage), (tiles // STAGES) & 1, pred=some)
        acc_token = warpgroup_mma(p, v_s.index(stage).reshape([BLOCK_K, BLOCK_D]), acc, is_async=True)
        tiles += some.to(gl.int32)
        turn += 1
        next_buffer = turn % QS
        mbarrier.wait(q_full.index(next_buffer), (turn // QS) & 1)
        next_line = told(info_s.index(next_buffer))
        more = field(next_line, 0) >= 0
        next_some = field(next_line, 3) < field(next_line, 5)
        next_stage = tiles % STAGES
        mbarrier.wait(k_full.index(next_stage), (tiles // STAGES) & 1, pred=next_some)
        next_q = q_s.index(next_buffer * CONSUMERS + C).reshape([ROWS, BLOCK_D])
        next_k = k_s.index(next_stage).reshape([BLOCK_K, BLOCK_D]).permute((1, 0))
        s_token = warpgroup_mma(next_q, next_k, zero, use_acc=False, is_async=True)
        batch = field(line, 0)
        head = field(line, 1)
        block = field(line, 2)
        acc, p = warpgroup_mma_wait(1, deps=[acc_token, p])
        mbarrier.arrive(v_free.index(stage), count=1, pred=some)
        mbarrier.arrive(q_free.index(buffer), count=1)
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
        # Before the loop turns: a product in flight there would make ptxas wait for each of them.
        s = warpgroup_mma_wait(0, deps=[s_token])
        if BIASED:
            shift = noted(bias_s, next_stage)
        note = read_note(padding, next_stage)
        place = read_place(dropout, next_stage)
        mbarrier.arrive(k_free.index(next_stage), count=1, pred=next_some)
    tma.store_wait(0)


# fmt: off
@gluon.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, out, lse, part_out, part_lse, tile_bias, edges, kept_notes, kept_words, kept_k, kept_v, seed,
    q_tiles, k_tiles, skt_h, keep_scale, threshold, counter, items, others, mask_ids, masks, st_b, st_h,
    item_count, first_count, reps, heads, layout_heads, group, q_len, q_blocks, k_blocks, works, scale,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, QS: gl.constexpr, PARTIAL: gl.constexpr, BATCH_SHARED: gl.constexpr,
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
        gl.allocate_shared_memory(gl.int32, [QS, 8], flat),
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
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, PARTIAL)),
            (consumer, (gl.constexpr(1), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, PARTIAL)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, BATCH_SHARED, HEADS_SHARED)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (gl.constexpr(0), stores, bias, padding, dropout, buffers, signals,
                        D, BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, PARTIAL)),
            (producer, (loads, walk, bias, padding, dropout, buffers, signals,
                        BLOCK_D, BLOCK_Q, BLOCK_K, STAGES, QS, BATCH_SHARED, HEADS_SHARED)),
        ], [1], [PRODUCER_REGISTERS])
    # fmt: on
