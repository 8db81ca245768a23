# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Device functions that all Triton kernels share: places, tile loads, mask bits, dropout."""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True if the kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` at import)."""

COUNTS = [
    "item_count", "first_count", "split_count", "reps", "heads", "layout_heads", "group", "q_len", "k_len",
    "length", "q_blocks", "k_blocks", "blocks", "threshold", "tile_grad_step", "row_item_count",
    "row_first_count", "column_item_count", "column_first_count", "skt_h", "pitch", "works",
]  # fmt: skip
"""Arguments that differ from layout to layout: specialising on them would compile again and gain nothing."""

_WIDEN = tl.constexpr(INTERPRETED)
KEY_STEP = tl.constexpr(0x9E3779B1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GRAD_ROWS = tl.constexpr(16)
"""Queries whose share of a tile bias's gradient is stored apart; no tile of queries has fewer."""


@triton.jit
def work_of(index, item_count, first_count, reps):
    """(item, rep) of a program: the first items of all heads, then the others head by head.

    Long items must not start last, but a head's keys stay in the L2 only while its programs run together.
    """
    if index < first_count * reps:
        item = index % first_count
        rep = index // first_count
    else:
        rest = index - first_count * reps
        item = first_count + rest % (item_count - first_count)
        rep = rest // (item_count - first_count)
    return item, rep


@triton.jit
def item_of(items, item, item_count):
    """(row, start, full_end, end, first block) of an item: loads that do not wait for one another."""
    at = items + item
    row = tl.load(at)
    start = tl.load(at + item_count)
    full_end = tl.load(at + 2 * item_count)
    end = tl.load(at + 3 * item_count)
    first = tl.load(at + 5 * item_count).to(tl.int32)
    return row, start, full_end, end, first


@triton.jit
def first_block(others, start, full_end, end, first):
    """The block of entry ``full_end``; ``first`` is that of ``start``."""
    return tl.load(others + full_end, mask=(start < full_end) & (full_end < end), other=first)


@triton.jit
def first_bias(tile_bias, edges, start, end, STEPS: tl.constexpr):
    """(tile bias of the first step of an item, edge of its second); a tile takes ``STEPS`` steps.

    A bias is loaded one step and its place (``edges``) two steps before it is needed: a step that waits for
    both takes longer than its tile's products. Partial tiles go on where the whole ones end.
    """
    some = start < end
    edge = start
    next_edge = start
    if edges is not None:
        edge = tl.load(edges + start, mask=some, other=0)
        next_edge = tl.load(edges + tl.minimum(start + 1 // STEPS, end - 1), mask=some, other=0)
    return tl.load(tile_bias + edge, mask=some, other=0.0), next_edge


@triton.jit
def bias_after(tile_bias, edges, next_edge, step, item_end, STEPS: tl.constexpr):
    """(tile bias of the step after ``step``, edge of the step after that); ``next_edge`` is the first's edge.

    Not to be used before that step: the first use of a load waits for it.
    """
    if edges is None:
        next_bias = tl.load(tile_bias + tl.minimum((step + 1) // STEPS, item_end - 1))
    else:
        next_bias = tl.load(tile_bias + next_edge)
        next_edge = tl.load(edges + tl.minimum((step + 2) // STEPS, item_end - 1))
    return next_bias, next_edge


@triton.jit
def place(row, rep, heads, layout_heads, blocks, BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr):
    """(batch element, head, block) of a flattened layout row, run for the rep-th head that shares it."""
    block = row % blocks
    owner = row // blocks
    if HEADS_SHARED:
        head = rep % heads
        rep_batch = rep // heads
        owner_batch = owner
    else:
        head = owner % layout_heads
        owner_batch = owner // layout_heads
        rep_batch = rep
    if BATCH_SHARED:
        batch = rep_batch
    else:
        batch = owner_batch
    return batch.to(tl.int64), head.to(tl.int64), block.to(tl.int64)


@triton.jit
def load_tile(base, rows, stride, dims, rows_ok, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """``[rows, BLOCK_D]`` from a base pointer; 0 where ``CHECK`` and not ``rows_ok``, and past D."""
    if CHECK:
        pointers = base + rows[:, None] * stride + dims[None, :]
    else:
        # A thread's rows are mostly 16 apart: it keeps the 64-bit offset of one, and the distances of the
        # others are the same in all threads. One a row would take the registers that the products need.
        near = (rows % 16)[:, None] * stride + dims[None, :]
        pointers = base + near + (rows // 16 * 16)[:, None] * stride
    if CHECK:
        if D == BLOCK_D:
            tile = tl.load(pointers, mask=rows_ok[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=rows_ok[:, None] & (dims < D)[None, :], other=0.0)
    else:
        if D == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    return tile


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32."""
    if _WIDEN:
        # The interpreter holds bf16 as bits and would multiply those; in fp32 the products are the GPU's.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def store_tile(base, rows, stride, dims, rows_ok, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store ``[rows, BLOCK_D]`` where ``rows_ok`` and the dimension is below D, in the type of ``base``."""
    pointers = base + rows[:, None] * stride + dims[None, :]
    if D == BLOCK_D:
        keep = rows_ok[:, None]
    else:
        keep = rows_ok[:, None] & (dims < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=keep)


@triton.jit
def allowed_pairs(
    masks,
    mask_id,
    query,
    key0,
    keys,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Which pairs of a partial tile are allowed, bool ``[queries, keys]`` (or transposed, if ``KEYS_FIRST``).

    ``query`` are positions inside the tile; keys are ``key0 + keys``. A row's words are loaded once each and
    spread over their 32 columns in registers: a load for every pair would cost more than the products.
    """
    words_a_row: tl.constexpr = (BLOCK_K + 31) // 32
    words: tl.constexpr = (N + 31) // 32
    first = masks + mask_id.to(tl.int64) * (BLOCK_Q * words_a_row) + query * words_a_row + key0 // 32
    group = keys // 32
    bit = keys % 32 + key0 % 32
    word = tl.load(first)
    if KEYS_FIRST:
        spread = word[None, :]
        for index in tl.static_range(1, words):
            spread = tl.where((group == index)[:, None], tl.load(first + index)[None, :], spread)
        allowed = (spread >> bit[:, None]) & 1
    else:
        spread = word[:, None]
        for index in tl.static_range(1, words):
            spread = tl.where((group == index)[None, :], tl.load(first + index)[:, None], spread)
        allowed = (spread >> bit[None, :]) & 1
    return allowed != 0


@triton.jit
def mix(x):
    """lowbias32 on uint32, as ``kernels/dropout.py``."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def drawn_from(tiles, block, BLOCK: tl.constexpr):
    """Where a tile begins for dropout: in the layout, or in the sequence, if ``tiles`` has its number there.

    Modulo 2³², as the hash takes it."""
    if tiles is not None:
        block = tl.load(tiles + block).to(tl.int32)
    return block * BLOCK


@triton.jit
def dropout_stream(seed, batch_head):
    """The uint32 stream of one (batch, head); ``batch_head`` is ``b·H + h``."""
    value = tl.load(seed)
    low = value.to(tl.uint32)
    high = (value >> 32).to(tl.uint32)
    return mix(low ^ mix(high + batch_head.to(tl.uint32)))


@triton.jit
def dropout_cell(drawn, places):
    """c of ``kernels/dropout.py`` at ``places`` after ``drawn``, a multiple of 16. Apart, so that the
    compiler sees which of a thread's places share a cell, and computes its words once."""
    return (drawn.to(tl.uint32) >> 1) + ((places >> 4 << 3) | (places & 7)).to(tl.uint32)


@triton.jit
def fold(x, FACTOR: tl.constexpr):
    """Upper half of the 64-bit product xor the lower one."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)


@triton.jit
def dropout_row(stream, drawn, queries):
    """One uint32 a query, from which every key's bits are drawn."""
    step = tl.full((), 0x85EBCA6B, tl.uint32)
    return fold(stream ^ (dropout_cell(drawn, queries) * step), 0xC2B2AE35)


@triton.jit
def dropout_keep(row, drawn, queries, keys, threshold):
    """Whether the weights stay: of ``row``, from ``dropout_row``, and the ``queries`` that it is for, with
    ``keys`` after ``drawn``. All broadcast; threshold is of 32 bits, as an int32."""
    step = tl.full((), KEY_STEP, tl.uint32)
    x = fold(fold(row ^ (dropout_cell(drawn, keys) * step), 0xD2511F53), 0xCD9E8D57)
    word = tl.where((queries & 8) != 0, fold(x, 0xA0761D65), x)
    return (word << (16 - 2 * (keys & 8)).to(tl.uint32)) >= threshold.to(tl.uint32)
