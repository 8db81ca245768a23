# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Dropout in the kernels for Hopper: the bits of ``kernels/dropout.py``, where the scores are.

A thread holds the scores of queries q and q + 8 and keys k and k + 8 together, whether queries are rows or
columns of its product. The words of a tile are written as if each score had its own; the compiler sees that
four have two in common.

``dropout`` is ``(None,)`` without dropout, else ``(seed, threshold, keep_scale, q_tiles, k_tiles, skt_h,
places)``, of which the last has room for where each of the tiles in shared memory begins, in the sequence.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsetile.kernels.hopper_tiles import noted

KEY_STEP = gl.constexpr(0x9E3779B1)
QUERY_STEP = gl.constexpr(0x85EBCA6B)


@gluon.jit
def word(x):
    """x modulo 2³²."""
    return x.to(gl.uint32)


@gluon.jit
def wide(x):
    return x.to(gl.uint64)


@gluon.jit
def mix(x):
    x = word((x ^ (x >> 16)) * 0x7FEB352D)
    x = word((x ^ (x >> 15)) * 0x846CA68B)
    return x ^ (x >> 16)


@gluon.jit
def fold(x, FACTOR: gl.constexpr):
    product = wide(x) * FACTOR
    return word((product >> 32) ^ product)


@gluon.jit
def own_cells(along):
    """c of positions ``along``."""
    return word((along >> 4 << 3) | (along & 7))


@gluon.jit
def place_of(tiles, block, BLOCK: gl.constexpr):
    """Where a tile begins in the sequence: in the layout, unless ``tiles`` has its number there."""
    if tiles is not None:
        block = gl.load(tiles + block).to(gl.int32)
    return block * BLOCK


@gluon.jit
def keys_at(dropout, kv_head, block, BLOCK: gl.constexpr):
    """Where key tile ``block`` of a key head begins in the sequence; 0 without dropout."""
    place = 0
    if dropout[0] is not None:
        tiles = dropout[4]
        if tiles is not None:
            tiles = tiles + kv_head * dropout[5]
        place = place_of(tiles, block, BLOCK)
    return place


@gluon.jit
def queries_at(dropout, block, BLOCK: gl.constexpr):
    """Where query tile ``block`` begins in the sequence; 0 without dropout."""
    place = 0
    if dropout[0] is not None:
        place = place_of(dropout[3], block, BLOCK)
    return place


@gluon.jit
def put_place(dropout, stage, place):
    """Puts it beside the tile in shared memory."""
    if dropout[0] is not None:
        one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        dropout[6].index(stage).store(gl.full([1], place, gl.int32, one))


@gluon.jit
def read_place(dropout, stage):
    place = 0
    if dropout[0] is not None:
        place = noted(dropout[6], stage)
    return place


@gluon.jit
def row_words(dropout, batch_head, place, queries):
    """One word a query, from which every key's bits are drawn; ``batch_head`` is b·H + h."""
    seed = gl.load(dropout[0])
    stream = mix(word(seed) ^ mix(word(word(seed >> 32) + word(batch_head))))
    cells = word(word(place) >> 1) + own_cells(queries)
    return fold(stream ^ word(word(cells) * QUERY_STEP), 0xC2B2AE35)


@gluon.jit
def keeps(dropout, rows, queries, place, keys):
    """Which weights stay: of queries with words ``rows`` and ``keys`` after ``place``; all broadcast."""
    # The step times each summand: of that of a thread's own places all but the first is a constant.
    key_words = word(word(word(place) >> 1) * KEY_STEP) + word(own_cells(keys) * KEY_STEP)
    x = fold(fold(rows ^ word(key_words), 0xD2511F53), 0xCD9E8D57)
    x = gl.where((queries & 8) != 0, fold(x, 0xA0761D65), x)
    return word(x << word(16 - 2 * (keys & 8))) >= word(dropout[1])


@gluon.jit
def factors(dropout, rows, queries, place, keys):
    """1 for weights that stay, 0 for the others. A select of the weights themselves would be done in 16 bits,
    of which two share a register that has to be taken apart."""
    return gl.where(keeps(dropout, rows, queries, place, keys), 1.0, 0.0)
