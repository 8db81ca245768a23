# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""What the kernels for Hopper share: how work is drawn and told, tiles' notes, masks and barriers.

A program is a producer warp and one or two consumer warpgroups of 64 rows (or keys) each. The producer draws
work items from a counter, tells the consumers of each through shared memory, and fills buffers by bulk copies
(TMA); for every buffer one barrier says that it is full and one that it is free.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

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
