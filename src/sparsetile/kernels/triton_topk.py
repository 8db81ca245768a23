# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""The kernel behind ``kernels/triton_select.py``: scores of tile pairs, streamed into a running top-k.

A program owns ROWS query tiles. A step scores them with SLOTS·LANES key tiles; the score of key tile
``start + slot·LANES + lane`` sits in ``[slot, row, lane]``. Triton's default layout keeps a row inside one
warp, lanes over threads and slots over registers, so that folding the slots is free of shuffles, and only
``[row, lane]`` is ever sorted.

Scores are compared as keys, int64, all different: the float's bits, made monotonic, above the inverted index.
"""

import triton
import triton.language as tl

from sparsetile.kernels.triton_tiles import KEY_STEP, dropout_stream, mix

COUNTS = ["groups", "nq", "nk", "blocks", "offset", "width", "runs"]
"""Arguments that are not worth a compilation of their own."""

_UNUSED = tl.constexpr(-(2**31))  # below the ordered bits of −inf
_FIRST = tl.constexpr(2**31 - 1)  # above those of +inf
_INDEX = tl.constexpr(2**31 - 1)
_NONE = tl.constexpr(-(2**63) + 2**31 - 1)  # the largest key whose score is unused


@triton.jit
def floor_quotient(x, y):
    """⌊x / y⌋ for y > 0; Triton's ``//`` rounds to zero."""
    rest = x % y
    return (x - tl.where(rest < 0, rest + y, rest)) // y


@triton.jit
def ordered(score):
    """int32 that compares as the fp32 score does; NaN counts as +∞. Sums that start at 0 are never −0."""
    score = tl.where(score != score, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(order):
    """The score that ``ordered`` took."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(order, col):
    """int64 keys: by score, the lower index first among equals."""
    return (order.to(tl.int64) << 32) | (col ^ _INDEX).to(tl.int64)


@triton.jit
def gumbel(line, col):
    """``adaptive.select.gumbel`` of a row's uint32 ``line`` and a column; the bits are the same."""
    bits = mix(line ^ (col.to(tl.uint32) * tl.full((), KEY_STEP, tl.uint32)))
    u = ((bits >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * (2.0**-24)
    return -tl.log(-tl.log(u))


@triton.jit
def quarters(x, A: tl.constexpr, B: tl.constexpr):
    """The four columns of ``[A, B, 4]`` (or ``[A, 4]``, if B is 0), widened to fp32."""
    if B == 0:
        pairs = tl.reshape(x, [A, 2, 2])
    else:
        pairs = tl.reshape(x, [A, B, 2, 2])
    even, odd = tl.split(pairs)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def load_four(base, at, hidden, H: tl.constexpr):
    """Four values of the hidden dimension from ``base + at``; 0 past H."""
    if H % 4 == 0:
        x = tl.load(base + at)
    else:
        x = tl.load(base + at, mask=hidden < H, other=0.0)
    return x


@triton.jit
def weight_at(w, hidden, H: tl.constexpr):
    """One output weight, 0 past H if that is no multiple of 4."""
    if H % 4 == 0:
        x = tl.load(w + hidden)
    else:
        x = tl.load(w + hidden, mask=hidden < H, other=0.0)
    return x.to(tl.float32)


@triton.jit
def term(score, of_row, of_key, w, hidden, H: tl.constexpr):
    """``score`` and what one hidden unit adds: w·ReLU(a + b), or a·b if w is None; NaN stays NaN. H is asked
    only whether it is a multiple of 4: ``weight_at``."""
    if w is None:
        score += of_row * of_key
    else:
        x = of_row + of_key
        score += weight_at(w, hidden, H) * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return score


@triton.jit
def tile_scores(
    a, row_at, b, col_at, w, ROWS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr
):
    """Σ_h w_h·ReLU(a_h + b_h), or Σ_h a_h·b_h if w is None, fp32 ``[SLOTS, ROWS, LANES]``: rows at
    ``row_at``, keys at ``col_at``."""
    score = tl.zeros([SLOTS, ROWS, LANES], tl.float32)
    four = tl.arange(0, 4)
    for first in range(0, H, 4):
        hidden = first + four
        of_row = load_four(a, row_at[:, None] + hidden[None, :], hidden[None, :], H)
        of_key = load_four(b, col_at[:, :, None] + hidden[None, None, :], hidden[None, None, :], H)
        a0, a1, a2, a3 = quarters(of_row, ROWS, 0)
        b0, b1, b2, b3 = quarters(of_key, SLOTS, LANES)
        score = term(score, a0[None, :, None], b0[:, None, :], w, first, H)
        score = term(score, a1[None, :, None], b1[:, None, :], w, first + 1, H)
        score = term(score, a2[None, :, None], b2[:, None, :], w, first + 2, H)
        score = term(score, a3[None, :, None], b3[:, None, :], w, first + 3, H)
    return score


@triton.jit
def gathered_scores(
    a,
    row_at,
    b,
    col,
    sb_h,
    w,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    H: tl.constexpr,
):
    """As ``tile_scores``, of each row's own keys ``col`` ``[SLOTS, ROWS, LANES]``, added in the same order.

    Keys of a run lie side by side and ``sb_h`` apart from one hidden unit to the next, so that lanes read
    whole sectors.
    """
    score = tl.zeros([SLOTS, ROWS, LANES], tl.float32)
    for hidden in range(H):
        of_row = tl.load(a + row_at + hidden).to(tl.float32)
        of_key = tl.load(b + col).to(tl.float32)
        score = term(score, of_row[None, :, None], of_key, w, hidden, 4)
        b += sb_h
    return score


@triton.jit
def single_scores(a, row_at, b, col_at, sb_h, w, ROWS: tl.constexpr, H: tl.constexpr):
    """As ``tile_scores``, of one key a row, fp32 ``[ROWS]``, added in the same order."""
    score = tl.zeros([ROWS], tl.float32)
    for hidden in range(H):
        of_row, of_key = tl.load(a + row_at + hidden).to(tl.float32), tl.load(b + col_at).to(tl.float32)
        score = term(score, of_row, of_key, w, hidden, 4)
        b += sb_h
    return score


@triton.jit
def column_of(within, place, runs, SPAN: tl.constexpr):
    """The key tile at ``place`` of the tiles of a row's runs, which start at ``within``; below 0 if none."""
    run = tl.load(within + place // SPAN, mask=place < runs * SPAN, other=-1)
    return tl.where(run < 0, -1, run * SPAN + place % SPAN)


@triton.jit
def ranked(score, shift, rate, line, col, NOISE: tl.constexpr):
    """What a score competes with: s, or s/τ + g if noise is wanted. ``line`` and ``col`` broadcast."""
    score += shift
    if NOISE:
        score = score * rate + gumbel(line, col)
    return score


@triton.jit(do_not_specialize=COUNTS)
def topk_rows(
    a,
    b,
    w,
    shift,
    tau,
    seed,
    valid,
    within,
    indices,
    scores,
    number_rate,
    groups,
    nq,
    nk,
    blocks,
    offset,
    width,
    runs,
    sa_b,
    sa_g,
    sa_n,
    sb_b,
    sb_g,
    sb_n,
    sb_h,
    sw_g,
    sshift_g,
    stau_g,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    SINK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program: ROWS query tiles of one (batch, group), ``width`` places a row.

    KEPT ≤ LANES is a power of two, not below the places besides the own tile's; 0 if there are none. With
    SPAN > 1 keys are runs of so many tiles; or tiles, if ``within`` lists each row's ``runs``, rising.
    """
    lines = tl.num_programs(0) // blocks
    line = tl.program_id(0) % lines
    # Causal rows grow with their number: the long ones first, so that none is left for the end.
    block = blocks - 1 - tl.program_id(0) // lines
    batch = (line // groups).to(tl.int64)
    group = (line % groups).to(tl.int64)
    a += batch * sa_b + group * sa_g
    b += batch * sb_b + group * sb_g
    if w is not None:
        w += group * sw_g
    base = 0.0
    if shift is not None:
        base = tl.load(shift + group * sshift_g).to(tl.float32)
    rate = number_rate
    if tau is not None:
        rate = 1.0 / tl.load(tau + group * stau_g).to(tl.float32)
    rows = block * ROWS + tl.arange(0, ROWS)
    noise = rows.to(tl.uint32)
    if seed is not None:
        noise = mix(dropout_stream(seed, line) + rows.to(tl.uint32))
    row_at = tl.minimum(rows, nq - 1).to(tl.int64) * sa_n
    tiles = nk
    if SPAN > 1 and within is None:
        tiles = nk * SPAN
    home = floor_quotient(rows.to(tl.int64) * BLOCK + offset, BLOCK)
    home = tl.minimum(tl.maximum(home, 0), tiles - 1).to(tl.int32)
    reach = tl.zeros([ROWS], tl.int32) + tiles - 1
    if CAUSAL:
        last = floor_quotient(rows.to(tl.int64) * BLOCK + BLOCK - 1 + offset, BLOCK)
        reach = tl.minimum(tl.maximum(last, -1), tiles - 1).to(tl.int32)
        if SPAN > 1 or within is not None:
            reach = tl.minimum(reach, home)
    if SPAN > 1 and within is None:
        home //= SPAN
        reach = floor_quotient(reach, SPAN)
    reach = tl.where(rows < nq, reach, -1)
    if not OWN:
        home = tl.full([ROWS], -1, tl.int32)
    out_at = (line.to(tl.int64) * nq + rows) * width
    if valid is not None:
        valid += batch * nk

    count = width - 1 if OWN else width
    if KEPT > 0:
        lane = tl.arange(0, LANES)
        slot = tl.arange(0, SLOTS)
        place = KEPT - 1 - tl.arange(0, KEPT)
        # Rising, so that its larger half against a falling list is a bitonic list of the best of both.
        best = tl.full([ROWS, KEPT], _NONE, tl.int64)
        worst = tl.full([ROWS], _NONE, tl.int64)
        end = tl.max(reach) + 1
        if within is not None:
            end = runs * SPAN
            within += (line.to(tl.int64) * nq + tl.minimum(rows, nq - 1)) * runs
        for start in range(0, end, SLOTS * LANES):
            col = start + slot[:, None] * LANES + lane[None, :]
            if within is not None:
                column = column_of(within[None, :, None], col[:, None, :], runs, SPAN)
                near = tl.minimum(tl.maximum(column, 0), nk - 1)
                score = gathered_scores(a, row_at, b, near, sb_h, w, ROWS, SLOTS, LANES, H)
            else:
                col_at = tl.minimum(col, nk - 1).to(tl.int64) * sb_n
                score = tile_scores(a, row_at, b, col_at, w, ROWS, SLOTS, LANES, H)
                column = col[:, None, :]
            score = ranked(score, base, rate, noise[None, :, None], column, seed is not None)
            order = ordered(score)
            if SINK:
                order = tl.where(column == 0, _FIRST, order)
            allowed = column <= reach[None, :, None]
            if within is not None:
                allowed &= column >= 0
            if OWN:
                allowed &= column != home[None, :, None]
            if valid is not None and within is not None:
                allowed &= tl.load(valid + near) != 0
            elif valid is not None:
                usable = tl.load(valid + col, mask=col < nk, other=0) != 0
                allowed &= usable[:, None, :]
            order = tl.where(allowed, order, _UNUSED)
            # The best of each lane go in until none beats what its row holds: few rounds, as the best of a
            # row seldom share a lane, and none at all for most steps of a long row.
            top, at = tl.max(order, axis=0, return_indices=True)
            found = start + at * LANES + lane[None, :]
            if within is not None:
                found = tl.maximum(column_of(within[:, None], found, runs, SPAN), 0)
            key = keys_of(top, found)
            while tl.max((key > worst[:, None]).to(tl.int32)) > 0:
                order = tl.where(slot[:, None, None] == at[None, :, :], _UNUSED, order)
                if KEPT < LANES:
                    fresh = tl.topk(key, KEPT)
                else:
                    fresh = tl.sort(key, descending=True)
                best = tl.bitonic_merge(tl.maximum(best, fresh))
                worst = tl.min(tl.where(place[None, :] < count, best, 0x7FFFFFFFFFFFFFFF), axis=1)
                top, at = tl.max(order, axis=0, return_indices=True)
                found = start + at * LANES + lane[None, :]
                if within is not None:
                    found = tl.maximum(column_of(within[:, None], found, runs, SPAN), 0)
                key = keys_of(top, found)

        order = (best >> 32).to(tl.int32)
        chosen = tl.where(order == _UNUSED, -1, (best & _INDEX).to(tl.int32) ^ _INDEX)
        score = tl.where(order == _UNUSED, float("-inf"), score_of(order))
        if SINK:
            sink = single_scores(a, row_at, b, tl.zeros([ROWS], tl.int64), sb_h, w, ROWS, H)
            sink = ranked(sink, base, rate, noise, tl.zeros([ROWS], tl.int32), seed is not None)
            sink = score_of(ordered(sink))
            score = tl.where(order == _FIRST, sink[:, None], score)
        keep = (rows[:, None] < nq) & (place[None, :] < count)
        out = out_at[:, None] + (width - count) + place[None, :]
        tl.store(indices + out, chosen, mask=keep)
        tl.store(scores + out, score, mask=keep)

    if OWN:
        score = single_scores(a, row_at, b, home.to(tl.int64) * sb_n, sb_h, w, ROWS, H)
        score = score_of(ordered(ranked(score, base, rate, noise, home, seed is not None)))
        allowed = home <= reach
        if valid is not None:
            allowed &= tl.load(valid + home) != 0
        tl.store(indices + out_at, tl.where(allowed, home, -1), mask=rows < nq)
        tl.store(scores + out_at, tl.where(allowed, score, float("-inf")), mask=rows < nq)
