"""Which tiles each query tile keeps: top-k of the scores, or as many as a share of their mass needs.

Training perturbs the scores with Gumbel noise: the k largest of s/τ + g, g independent standard Gumbel, are
a draw of k tiles without replacement from softmax(s/τ) (Kool, van Hoof and Welling 2019, arXiv:1903.06059,
theorem 1), so every tile has its chance. The noise is counter-based: it depends on (seed, batch element,
group, row, column) alone, so neither chunks nor neighbours in the batch change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetile.adaptive.lasting import lasting
from sparsetile.errors import ArgumentError, explain
from sparsetile.kernels.dropout import random_bits

_MASK = 0xFFFFFFFF
_NEVER, _FIRST = -(2**63), 2**63 - 1
# Scores a chunk: with the 64-bit keys and what the noise needs on the way, about 64 MiB.
CHUNK_SCORES = 2**20


class Selection(NamedTuple):
    """What :func:`select_tiles` chose.

    Attributes:
        indices: int32 ``[B, G, nq, k]``, key tiles in the order of preference: the own tile in place 0, the
            sink next, then by falling (perturbed) score; −1 marks an unused place. Cutting a row after any
            place leaves what a smaller k would have chosen.
    """

    indices: Tensor


@lasting
def reach(
    nq: int,
    nk: int,
    *,
    is_causal: bool,
    offset_tokens: int,
    block: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """int64 ``[nq]``: the last key tile that a query of the row may see, −1 if none. ``reach + 1`` tiles are
    the row's choices.

    The last row ends with the last key whatever its length is, so lengths in tokens are not needed.
    """
    if not is_causal:
        return torch.full((nq,), nk - 1, device=device)
    first = farthest(offset_tokens, block)
    return torch.arange(first, first + nq, device=device).clamp_(-1, nk - 1)


def farthest(offset_tokens: int, block: int) -> int:
    """The key tile of the last query of row 0 of a causal call, before it is clamped to the key tiles."""
    return (block - 1 + offset_tokens) // block


@lasting
def own_tiles(
    nq: int, nk: int, *, offset_tokens: int, block: int, device: torch.device | str | None = None
) -> Tensor:
    """int64 ``[nq]``: the key tile at the position of the row's first query, clamped to the key tiles.

    If the offset is no multiple of the block, a query tile lies over two key tiles; the first of them is
    the one in which every query of the row, causal or not, has a key.
    """
    first = offset_tokens // block
    return torch.arange(first, first + nq, device=device).clamp_(0, nk - 1)


def gumbel(seed: Tensor, batch_group: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, in the broadcast shape of ``batch_group`` (b·G + g), ``row``, ``col``.

    The bits are those of ``kernels/dropout.py`` with (row, col) in place of (query, key); of them::

        u = (2·⌊bits / 2⁹⌋ + 1) / 2²⁴        exact in float32, never 0 or 1
        g = −log(−log u)                      between −2.9 and 16.7

    Args:
        seed: int64 ``[1]``; the others int64.
    """
    bits = random_bits(seed, batch_group, row, col)
    uniform = ((bits >> 9) * 2 + 1).to(torch.float32) * 2.0**-24
    return uniform.log_().neg_().log_().neg_()


@torch.no_grad()
def select_tiles(
    scorer_rows: Callable[[int, int], Tensor],
    shape: tuple[int, int, int, int],
    k: int,
    *,
    is_causal: bool,
    offset_tokens: int,
    block: int,
    temperature: float | Tensor = 1.0,
    noise: Tensor | None = None,
    sink: bool = False,
    own: bool = True,
    valid_keys: Tensor | None = None,
    limit: Tensor | None = None,
    top_p: float | None = None,
    k_min: int = 1,
    k_max: int | None = None,
    chunk: int | None = None,
    span: int = 1,
    within: Tensor | None = None,
) -> Selection:
    """The tiles that each row keeps, without a host sync and in O(B·G·nq·k) memory besides one chunk.

    A row may keep tiles up to its :func:`reach`, of those with ``valid_keys``. Places are filled with

    1. the own tile (place 0 is its own: −1 if it is not allowed),
    2. key tile 0, if ``sink`` and allowed,
    3. all others by falling s/τ + g, g = Gumbel noise if a seed is given; equal ones by rising index. NaN
       counts as +∞, so that a broken score is seen and not hidden.

    With ``top_p``, m = softmax(s/τ) over the allowed tiles of the row is the predicted mass, and place j is
    kept iff j < k_min or Σ_{i<j} m_i < top_p: tiles in the above order until their mass reaches ``top_p``.
    Noise changes the order, not the mass.

    The two levels of ``adaptive.search``: with ``span`` > 1 keys are runs of so many tiles, the last of which
    may be shorter, and a row's own run is the one that holds its own tile. With ``within`` keys are tiles,
    and a row may keep those of the runs given. In both, causal rows keep nothing beyond their own.

    Args:
        scorer_rows: ``(start, stop) → [B, G, stop − start, nk]``, scores of these rows; compared in float32.
        shape: ``(B, G, nq, nk)``.
        k: places of a row, ≥ 1; may exceed nk.
        is_causal, offset_tokens (k_len − q_len), block: where the rows stand; see :func:`reach`.
        temperature: τ > 0, a number, or a tensor ``[]`` or ``[G]`` (whose sign is not looked at).
        noise: int64 seed ``[1]`` on the device of the scores (``kernels.dropout.draw_seed``); None: no noise.
        valid_keys: bool ``[B, nk]``, False: no row may keep the tile.
        limit: integers ``[nq]`` or ``[B, G, nq]`` on that device: at most so many places of a row are used.
        top_p: in (0, 1]; None keeps k tiles.
        k_min, k_max: bounds of the places used with ``top_p``; k_max defaults to k, and replaces it.
        chunk: rows scored at a time; by default as many as make 2²⁰ scores, one at least.
        span: tiles of a run.
        within: integers ``[B, G, nq, S]``, distinct runs of each row, −1 = none. ``scorer_rows`` then returns
            ``[B, G, stop − start, S·span]``: scores of tiles ``within·span + 0 … span − 1``, run by run; what
            it says of those that do not exist does not matter. Not with ``top_p``, which needs them all.

    Raises:
        ArgumentError: an argument is not as above.
    """
    width = _checked_width(shape, k, temperature, valid_keys, top_p, k_min, k_max, chunk)
    if (span > 1 or within is not None) and top_p is not None:
        _refuse("top_p", "None in a search of two levels", top_p, "The mass of a row is that of all tiles.")
    batch, groups, nq, nk = shape
    columns = nk if within is None else within.shape[-1] * span
    step = chunk if chunk is not None else max(1, CHUNK_SCORES // (batch * groups * columns))
    parts = []
    for start in range(0, nq, step):
        stop = min(start + step, nq)
        scores = scorer_rows(start, stop)
        if tuple(scores.shape) != (batch, groups, stop - start, columns):
            raise ArgumentError(
                explain(
                    "scorer_rows(start, stop)",
                    expected=[batch, groups, stop - start, columns],
                    got=list(scores.shape),
                    fix="Return a score for each key tile.",
                )
            )
        device = scores.device
        where: dict[str, Any] = {"offset_tokens": offset_tokens, "block": block, "device": device}
        tiles = nk if within is not None else nk * span
        last = reach(nq, tiles, is_causal=is_causal, **where)
        home = own_tiles(nq, tiles, **where)
        if is_causal and (span > 1 or within is not None):
            last = torch.minimum(last, home)
        if span > 1 and within is None:
            last, home = (torch.div(x, span, rounding_mode="floor") for x in (last, home))
        col = torch.arange(nk, device=device)
        if within is not None:
            col = tiles_of_runs(within[:, :, start:stop], span)
        rows = _Rows(
            torch.arange(start, stop, device=device)[:, None],
            last[start:stop, None],
            home[start:stop, None],
        )
        parts.append(
            _chosen(scores, col, rows, width, temperature, noise, sink, own, valid_keys, top_p, k_min)
        )
    indices = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return Selection(indices if limit is None else at_most(indices, limit))


def at_most(indices: Tensor, limit: Tensor) -> Tensor:
    """Selected tiles ``[B, G, nq, k]`` with at most ``limit`` places of each row used, ``[nq]`` or
    ``[B, G, nq]``; the others are −1."""
    place = _line(indices.shape[-1], device=indices.device)
    return torch.where(place < limit[..., None], indices, -1)


@lasting
def _line(count: int, *, device: torch.device) -> Tensor:
    """int64 0 … count − 1"""
    return torch.arange(count, device=device)


def tiles_of_runs(runs: Tensor, span: int) -> Tensor:
    """int64 ``[…, S·span]``: the tiles of runs ``[…, S]``, run by run; below 0 for runs below 0."""
    return (runs.long()[..., None] * span + torch.arange(span, device=runs.device)).flatten(-2)


class _Rows(NamedTuple):
    """Row number, reach and own tile of a chunk, int64 ``[rows, 1]`` each."""

    number: Tensor
    reach: Tensor
    own: Tensor


def _chosen(
    scores: Tensor,
    col: Tensor,
    rows: _Rows,
    width: int,
    temperature: float | Tensor,
    noise: Tensor | None,
    sink: bool,
    own: bool,
    valid_keys: Tensor | None,
    top_p: float | None,
    k_min: int,
) -> Tensor:
    """int32 ``[B, G, rows, width]``, of scores of the key tiles ``col``: ``[n]`` or ``[B, G, rows, n]``."""
    batch, groups, _, columns = scores.shape
    allowed = (col <= rows.reach).expand(batch, 1 if col.dim() == 1 else groups, -1, -1)
    if col.dim() > 1:
        allowed, col = allowed & (col >= 0), col.clamp(min=0)
    mine = rows.own <= rows.reach
    if valid_keys is not None:
        allowed = allowed & _look_up(valid_keys, col)
        mine = mine & valid_keys[:, None][..., rows.own]
    logits = scores.float()
    if noise is not None or top_p is not None:
        tau = temperature if isinstance(temperature, Tensor) else float(temperature)
        logits = logits / (tau.float().reshape(-1, 1, 1) if isinstance(tau, Tensor) else tau)
    order = logits
    if noise is not None:
        line = torch.arange(batch * groups, device=scores.device).reshape(batch, groups, 1, 1)
        order = gumbel(noise, line, rows.number, col).add_(logits)

    others = allowed & (col != rows.own) if own else allowed
    ranks = _ranks(order, col)
    if sink:
        # Above all others, and its low bits name tile 0 as those of any key do.
        ranks = torch.where(col == 0, _FIRST, ranks)
    ranks = torch.where(others, ranks, _NEVER)
    count = min(width - int(own), columns)
    best = ranks.topk(count, -1).values
    picked = torch.where(best == _NEVER, -1, _MASK - (best & _MASK))
    if own:
        home = torch.where(mine, rows.own, -1).expand(batch, groups, -1, -1)
        picked = torch.cat((home, picked), -1)
    picked = F.pad(picked, (0, width - picked.shape[-1]), value=-1)
    if top_p is not None:
        total = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1, keepdim=True)
        mass = (logits.gather(-1, picked.clamp(min=0)) - total).exp()
        mass = mass.masked_fill(picked < 0, 0.0)
        before = F.pad(mass.cumsum(-1)[..., :-1], (1, 0))
        place = torch.arange(width, device=scores.device)
        picked = torch.where((place < k_min) | (before < top_p), picked, -1)
    return picked.to(torch.int32)


def _look_up(valid_keys: Tensor, col: Tensor) -> Tensor:
    """Of each key tile whether it is valid: ``[B, 1, 1, n]``, or ``[B, G, rows, n]`` where ``col`` is so."""
    if col.dim() == 1:
        return valid_keys[:, None, None, :]
    last = valid_keys.shape[1] - 1
    return valid_keys[:, None, None].expand(*col.shape[:3], -1).gather(-1, col.clamp(max=last))


def _ranks(order: Tensor, col: Tensor) -> Tensor:
    """int64 keys, all different, that sort as (value, falling column): the float's bits above the column.

    Which of equal values ``topk`` returns is not defined; of keys that differ, it has no choice.
    """
    # Adding 0 makes one of the two zeros.
    bits = torch.nan_to_num(order + 0.0, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bits = bits.view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (rising << 32).add_(_MASK - col)


def _checked_width(
    shape: tuple[int, int, int, int],
    k: object,
    temperature: float | Tensor,
    valid_keys: Tensor | None,
    top_p: float | None,
    k_min: object,
    k_max: object,
    chunk: object,
) -> int:
    """Places of a row."""

    def count(value: object) -> bool:
        return type(value) is int and value >= 1

    if len(shape) != 4 or not all(count(n) for n in shape):
        _refuse("shape", "four integers ≥ 1: (B, G, nq, nk)", shape, "Skip empty calls.")
    if not count(k):
        _refuse("k", "an integer ≥ 1", k, "The own tile counts, so 1 keeps it alone.")
    if chunk is not None and not count(chunk):
        _refuse("chunk", "None or an integer ≥ 1", chunk, "It counts rows.")
    check_temperature(temperature)
    if valid_keys is not None:
        expected = (shape[0], shape[3])
        if valid_keys.dtype != torch.bool or tuple(valid_keys.shape) != expected:
            got = f"{valid_keys.dtype} {list(valid_keys.shape)}"
            _refuse("valid_keys", f"bool {list(expected)}", got, "valid_tiles(padding, block) makes it.")
    if top_p is None:
        if k_min != 1 or k_max is not None:
            _refuse("k_min, k_max", "a top_p to go with them", (k_min, k_max), "Pass top_p, or k alone.")
        assert isinstance(k, int)
        return k
    check_top_p(top_p)
    most = k if k_max is None else k_max
    if not count(most) or not count(k_min) or k_min > most:  # type: ignore[operator]
        fix = "They bound how many tiles of a row top_p may keep."
        _refuse("k_min, k_max", "integers with 1 ≤ k_min ≤ k_max", (k_min, most), fix)
    assert isinstance(most, int)
    return most


def check_temperature(temperature: object) -> None:
    """Raises ArgumentError unless it is a finite number > 0, or a tensor (whose values are on the device)."""
    if isinstance(temperature, Tensor):
        return
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0.0 < temperature < float("inf"):  # type: ignore[operator]
        _refuse("temperature", "a finite number > 0, or a tensor", temperature, "1.0 is the usual start.")


def check_top_p(top_p: object) -> None:
    """Raises ArgumentError unless it is a number in (0, 1]."""
    number = isinstance(top_p, int | float) and not isinstance(top_p, bool)
    if not number or not 0.0 < top_p <= 1.0:  # type: ignore[operator]
        _refuse("top_p", "a number in (0, 1]", top_p, "0.9 keeps tiles until 90 % of the mass.")


def _refuse(what: str, expected: object, got: object, fix: str) -> None:
    raise ArgumentError(explain(what, expected=expected, got=repr(got), fix=fix))
