# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""What the kernels for Hopper share: how work is drawn and told, tiles' notes, masks and barriers.

A program is a producer warp and one or two consumer warpgroups of 64 rows (or keys) each. The producer draws
work items from a counter, tells the consumers of each through shared memory, and fills buffers by bulk copies
(TMA); for every buffer one barrier says that it is full and one that it is free.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FIELDS = gl.constexpr(8)  # of an item: batch, head, block, start, full_end, end, slot, rep
ROWS = gl.constexpr(64)  # of a consumer: what one warpgroup multiplies at once


# fmt: off
@gluon.jit
def item_at(index, items, item_count, first_count, reps, heads, layout_heads, blocks,
            BATCH_SHARED: gl.constexpr, HEADS_SHARED: gl.constexpr):
    # fmt: on
    """(row, start, full_end, end, slot, batch, head, block, rep) of the item whose turn is ``index``: long
    items for all heads first, then head by head, so that a head's keys stay in the L2."""
    early = index < first_count * reps
    rest = index - first_count * reps
    first, others = gl.maximum(first_count, 1), gl.maximum(item_count - first_count, 1)
    at = items + gl.where(early, index % first, first_count + rest % others)
    rep = gl.where(early, index // first, rest // others)
    row = gl.load(at).to(gl.int32)
    start = gl.load(at + item_count).to(gl.int32)
    full_end = gl.load(at + 2 * item_count).to(gl.int32)
    end = gl.load(at + 3 * item_count).to(gl.int32)
    slot = gl.load(at + 4 * item_count).to(gl.int32)
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
    return row, start, full_end, end, slot, batch, head, row % blocks, rep


@gluon.jit
def tell(info, batch, head, block, start, full_end, end, slot, rep):
    """Puts an item where the consumers read it; run by one warp."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    place = gl.arange(0, FIELDS, layout=layout)
    line = gl.where(place == 0, batch, gl.where(place == 1, head, gl.where(place == 2, block, start)))
    line = gl.where(place == 4, full_end, gl.where(place == 5, end, line))
    info.store(gl.where(place == 6, slot, gl.where(place == 7, rep, line)))


@gluon.jit
def tell_end(info):
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    info.store(gl.full([FIELDS], -1, gl.int32, layout))


@gluon.jit
def told(info):
    """The item as a consumer holds it: all eight numbers in every thread."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    return info.load(layout)


@gluon.jit
def field(line, i: gl.constexpr):
    """Number ``i`` of an item that was told."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    return gl.sum(gl.where(gl.arange(0, FIELDS, layout=layout) == i, line, 0), 0)


@gluon.jit
def note_down(edge_s, bias_s, stage, tile_bias, edges, entry):
    """Puts a tile's place among the layout's, and its bias, beside its keys."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    edge = entry
    if edges is not None:
        edge = gl.load(edges + entry).to(gl.int32)
    edge_s.index(stage).store(gl.full([1], edge, gl.int32, one))
    bias_s.index(stage).store(gl.full([1], gl.load(tile_bias + edge), gl.float32, one))


@gluon.jit
def noted(line_s, stage):
    """What was put beside a tile's keys."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(line_s.index(stage).load(one), 0)


@gluon.jit
def allowed(masks, ident, queries, keys, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Bits of a partial tile at ``queries`` × ``keys``, which broadcast; 1 where the pair is allowed."""
    words = masks + (ident * BLOCK_Q + queries) * (BLOCK_K // 32) + keys // 32
    return (gl.load(words) >> (keys % 32)) & 1


@gluon.jit
def room_for_notes(COUNT: gl.constexpr):
    """Where the notes of COUNT tiles lie beside their keys."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [COUNT, 1], flat)


@gluon.jit
def note_of(padding, batch, head, heads, group, block):
    """What ``kept_kernel`` noted of key tile ``block`` of the key head of ``head``, one of ``heads``, so many
    a key head: −1 where all its keys count, as where none are ignored at all."""
    note = -1
    if padding[0] is not None:
        key_head = (batch * heads + head) // group
        note = gl.load(padding[0] + key_head * padding[4] + block)
    return note


@gluon.jit
def put_note(padding, stage, note):
    """Puts a tile's note beside its keys."""
    if padding[0] is not None:
        one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        padding[5].index(stage).store(gl.full([1], note, gl.int32, one))


@gluon.jit
def read_note(padding, stage):
    note = -1
    if padding[0] is not None:
        note = noted(padding[5], stage)
    return note


@gluon.jit
def copy_keys(x, padding, which: gl.constexpr, note, at, full, into):
    """Brings keys (``which`` 0) or values (1) into shared memory, with zeros for those to ignore."""
    clean = note < 0
    if clean:
        tma.async_copy_global_to_shared(x, at, full, into)
    if padding[0] is not None:
        if not clean:
            tma.async_copy_global_to_shared(padding[2 + which], at, full, into)


@gluon.jit
def heeded(s, padding, note, first_key, BLOCK_K: gl.constexpr, S: gl.constexpr):
    """Scores ``[ROWS, BLOCK_K]`` with −inf where a key is to be ignored."""
    if padding[0] is not None:
        if note >= 0:
            keys = first_key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, S))[None, :]
            words = padding[1] + note * (BLOCK_K // 32) + keys // 32
            s = gl.where(((gl.load(words) >> (keys % 32)) & 1) != 0, s, float("-inf"))
    return s


@gluon.jit
def ignored_keys(padding, note, first_key, BLOCK_K: gl.constexpr, S: gl.constexpr):
    """bool ``[ROWS]``: which keys from place ``first_key`` of a tile are to be ignored."""
    keys = first_key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    words = padding[1] + gl.maximum(note, 0) * (BLOCK_K // 32) + keys // 32
    return (((gl.load(words) >> (keys % 32)) & 1) == 0) & (note >= 0)


@gluon.jit
def store_rows(to, at, x, D: gl.constexpr, O: gl.constexpr):
    """Stores fp32 ``x`` from row ``at`` of lines of D entries, of which x may have more."""
    rows = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, O))[:, None]
    dims = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, O))[None, :]
    places = to + at * D + rows * D + dims
    if x.shape[1] > D:
        gl.store(places, x, mask=(rows >= 0) & (dims < D))
    else:
        gl.store(places, x)


@gluon.jit
def barriers(COUNT: gl.constexpr, CONSUMERS: gl.constexpr):
    """(full, free) of COUNT buffers: the producer's copies fill them, CONSUMERS warpgroups free them."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], layout)
    free = gl.allocate_shared_memory(gl.int64, [COUNT, 1], layout)
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    return full, free
