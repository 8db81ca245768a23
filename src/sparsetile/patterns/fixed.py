"""The patterns that do not depend on data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Intersection, Interval, Pattern, unresolved
from sparsetile.patterns.tiles import UNBOUNDED, Grid, Key, Span, State, Tiles, combine

Unit = int | Literal["block", "token"]

_WORD = 0xFFFFFFFF
_STEP_DENOMINATOR = 1 << 20


def _floor(a: Tensor, b: int) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _integer(pattern: str, name: str, value: object, least: int | None = None) -> int:
    """``value`` as a plain int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise PatternError(
            explain(
                f"{pattern}({name}=…)",
                expected="an integer" if least is None else f"an integer ≥ {least}",
                got=repr(value),
                fix="Pattern parameters count tokens.",
            )
        )
    return value


def _truth(pattern: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise PatternError(
            explain(f"{pattern}({name}=…)", expected="True or False", got=repr(value), fix="Pass a bool.")
        )


def _unit(pattern: str, value: object) -> None:
    if value in ("block", "token"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PatternError(
            explain(
                f"{pattern}(unit=…)",
                expected="'block', 'token' or an integer ≥ 1",
                got=repr(value),
                fix="A unit is a number of consecutive tokens that are kept or left out together.",
            )
        )


def _resolved_unit(pattern: Pattern, unit: Unit, block_q: int, block_k: int) -> int:
    if unit == "token":
        return 1
    if unit != "block":
        return int(unit)
    if block_q != block_k:
        raise PatternError(
            explain(
                f"{pattern!r}",
                expected="square tiles for unit='block'",
                got=f"block_q={block_q}, block_k={block_k}",
                fix="Give the unit as a number of tokens.",
            )
        )
    return block_k


def _in_tokens(pattern: Pattern, unit: Unit) -> int:
    if unit == "block":
        raise unresolved(pattern, "its unit is a block of the layout")
    return 1 if unit == "token" else int(unit)


# -- one range of keys a query ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Full(Interval):
    """Every key: dense attention."""

    def interval(self, q: Tensor) -> Span:
        return Span(torch.full_like(q, -UNBOUNDED), torch.full_like(q, UNBOUNDED))

    def signature(self, tiles: Tiles) -> Key:
        return Key(torch.zeros_like(tiles.row), 1)


@dataclass(frozen=True, eq=False)
class Causal(Interval):
    """Keys at or before the query: ``k ≤ q``."""

    def interval(self, q: Tensor) -> Span:
        return Span(torch.full_like(q, -UNBOUNDED), q + 1)

    def signature(self, tiles: Tiles) -> Key:
        return _distance(tiles)


@dataclass(frozen=True, eq=False)
class Local(Interval):
    """A window from ``left`` tokens before the query to ``right`` after it: ``−left ≤ k − q ≤ right``."""

    left: int
    right: int | None = None

    def __post_init__(self) -> None:
        left = _integer("Local", "left", self.left, 0)
        right = left if self.right is None else _integer("Local", "right", self.right, 0)
        object.__setattr__(self, "right", right)

    def interval(self, q: Tensor) -> Span:
        assert self.right is not None
        return Span(q - self.left, q + (self.right + 1))

    def signature(self, tiles: Tiles) -> Key:
        return _distance(tiles)


def _distance(tiles: Tiles) -> Key:
    """``k0 − q0``, shifted to start at 0."""
    grid = tiles.grid
    shift = grid.offset + grid.q_blocks * grid.block_q
    return Key(tiles.k0 - tiles.q0 + shift, shift + grid.k_blocks * grid.block_k - min(grid.offset, 0))


@dataclass(frozen=True, eq=False)
class Global(Interval):
    """The first ``tokens`` positions are global: their queries see every key (``rows``), every query sees
    them (``columns``)."""

    tokens: int
    rows: bool = True
    columns: bool = True

    def __post_init__(self) -> None:
        _integer("Global", "tokens", self.tokens, 1)
        _truth("Global", "rows", self.rows)
        _truth("Global", "columns", self.columns)
        if not (self.rows or self.columns):
            raise PatternError(
                explain(
                    "Global",
                    expected="rows or columns",
                    got="rows=False, columns=False",
                    fix="Keep one of them; with neither, nothing is global.",
                )
            )

    def interval(self, q: Tensor) -> Span:
        rest = self.tokens if self.columns else 0
        hi = torch.where(q < self.tokens, UNBOUNDED, rest) if self.rows else torch.full_like(q, rest)
        return Span(torch.zeros_like(q), hi)

    def signature(self, tiles: Tiles) -> Key:
        lowest = min(tiles.grid.offset, 0)
        radix = self.tokens - lowest + 1
        return Key(
            (tiles.q0.clamp(max=self.tokens) - lowest) * radix + tiles.k0.clamp(max=self.tokens),
            radix * radix,
        )


@dataclass(frozen=True, eq=False)
class Documents(Interval):
    """Attention within documents packed one after another: same document only, nothing outside of them.

    ``lengths`` (a tuple, list or 1-d tensor of integers ≥ 1) must sum to ``k_len``, which is checked when a
    layout is built.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        raw = self.lengths
        if isinstance(raw, Tensor):
            if raw.dim() != 1 or raw.is_floating_point() or raw.dtype == torch.bool:
                raise self._bad(f"a {raw.dim()}-d {raw.dtype} tensor")
            raw = raw.tolist()
        if not isinstance(raw, Iterable):
            raise self._bad(repr(raw))
        lengths = tuple(raw)
        if not lengths:
            raise self._bad("no document")
        for n in lengths:
            if type(n) is not int or n < 1:
                raise self._bad(f"a document of length {n!r}")
        object.__setattr__(self, "lengths", lengths)

    @staticmethod
    def _bad(got: str) -> PatternError:
        return PatternError(
            explain(
                "Documents(lengths)",
                expected="at least one length, all of them integers ≥ 1",
                got=got,
                fix="Give the token counts of the packed documents in order.",
            )
        )

    @cached_property
    def _ends_memo(self) -> tuple[Tensor, Tensor]:
        """Borders ``[0, end₀, end₁, …]``, and the same with a last entry repeated: lookups need no clamp."""
        ends = torch.tensor((0, *self.lengths)).cumsum_(0)
        return ends, torch.cat((ends[:1], ends, ends[-1:]))

    def check(self, q_len: int, k_len: int, heads: int | None = None) -> None:
        total = int(self._ends_memo[0][-1])
        if total != k_len:
            raise PatternError(
                explain(
                    "Documents(lengths)",
                    expected=f"lengths that sum to k_len = {k_len}",
                    got=f"{len(self.lengths)} lengths that sum to {total}",
                    fix="Add a document for the padding, or pass the packed length.",
                )
            )

    def number(self, position: Tensor) -> Tensor:
        """The document at a position, from 1; 0 before the first, ``len(lengths) + 1`` after the last."""
        return torch.searchsorted(self._ends_memo[0], position, right=True)

    def interval(self, q: Tensor) -> Span:
        number, borders = self.number(q), self._ends_memo[1]
        # borders[d], borders[d + 1]: (0, 0) before the first document, (total, total) after the last.
        return Span(borders[number], borders[number + 1])

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        a, b = self.number(q), self.number(k)
        return (a == b) & (a > 0) & (a <= len(self.lengths))

    def signature(self, tiles: Tiles) -> Key:
        """A block inside one document is known by its number relative to the other; one across a border by
        its own position."""
        grid = tiles.grid
        many = len(self.lengths) + 2

        def blocks() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            starts = torch.arange(0, grid.k_blocks * grid.block_k, grid.block_k)
            k_first, k_last = self.number(torch.stack((starts, starts + (grid.block_k - 1))))
            q_first, q_last = self.number(torch.stack((grid.first, grid.first + (grid.block_q - 1))))
            q_own = torch.where(q_first == q_last, 0, torch.arange(1, grid.rows + 1))
            k_own = torch.where(k_first == k_last, 0, torch.arange(1, grid.k_blocks + 1))
            return q_first, q_own, k_first, k_own

        q_first, q_own, k_first, k_own = grid.remember(("documents", self), blocks)
        row, col = tiles.row, tiles.col
        return combine(
            [
                Key(q_own[row], grid.rows + 1),
                Key(k_own[col], grid.k_blocks + 1),
                Key(q_first[row] - k_first[col] + many, 2 * many),
            ]
        )


@dataclass(frozen=True, eq=False)
class Segment(Interval):
    """Same segment of ``length`` tokens. Not public: :class:`Dilated` is this and a congruence."""

    length: int

    def interval(self, q: Tensor) -> Span:
        lo = q - q.remainder(self.length)
        return Span(lo, lo + self.length)

    def signature(self, tiles: Tiles) -> Key:
        return combine([Key(tiles.q0.remainder(self.length), self.length), _distance(tiles)])


# -- functions of the distance in units ---------------------------------------------------------------------


class Lattice(Pattern):
    """A pattern of the difference of unit indices, ``q // unit − k // unit``, and the head alone."""

    unit: Unit

    def differs_by(self, difference: Tensor, head: Tensor | int) -> Tensor:
        """Whether a difference of units is allowed."""
        raise NotImplementedError

    def differences(self, least: Tensor, most: Tensor, head: Tensor) -> Tensor:
        """``[rows, s]``: all allowed differences from ``least`` to ``most``; what lies outside is padding."""
        raise NotImplementedError

    def residue(self, difference: Tensor, head: Tensor, tiles: Tiles) -> Key:
        """What of a difference decides whether it, and those next to it, are allowed."""
        raise NotImplementedError

    def dense(self, unit: int, grid: Grid) -> bool:
        """Whether the pattern touches (nearly) every tile, so that listing the differences is no gain."""
        return False

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        unit = _in_tokens(self, self.unit)
        return self.differs_by(_floor(q, unit) - _floor(k, unit), head)

    def cover(self, grid: Grid, clip: Span) -> Span:
        unit = _in_tokens(self, self.unit)
        if self.dense(unit, grid):
            return super().cover(grid, clip)
        lo, hi = clip.lo.clamp(0, grid.k_len), clip.hi.clamp(0, grid.k_len)
        hi = torch.maximum(lo, hi)
        q_first, q_last = _floor(grid.first, unit), _floor(grid.last, unit)
        least, most = q_first - _floor(hi - 1, unit), q_last - _floor(lo, unit)
        most = torch.where(lo < hi, most, least - 1)
        d = self.differences(least, most, grid.head)
        inside = (d >= least[:, None]) & (d <= most[:, None])
        k_lo = torch.maximum((q_first[:, None] - d) * unit, lo[:, None])
        k_hi = torch.minimum((q_last[:, None] - d + 1) * unit, hi[:, None])
        return grid.blocks(Span(k_lo, torch.where(inside, k_hi, k_lo)))

    def state(self, tiles: Tiles) -> State:
        unit = _in_tokens(self, self.unit)
        q, k = _floor(tiles.q0, unit), _floor(tiles.k0, unit)
        one_pair = (q == _floor(tiles.q1, unit)) & (k == _floor(tiles.k1, unit))
        kept = self.differs_by(q - k, tiles.head)
        return State(kept | ~one_pair, kept & one_pair)

    def signature(self, tiles: Tiles) -> Key:
        unit = _in_tokens(self, self.unit)
        q, k = _floor(tiles.q0, unit), _floor(tiles.k0, unit)
        return combine(
            [
                Key(tiles.q0 - q * unit, unit),
                Key(tiles.k0 - k * unit, unit),
                self.residue(q - k, tiles.head, tiles),
            ]
        )


def _difference_key(difference: Tensor, tiles: Tiles) -> Key:
    """A difference of units, shifted to start at 0."""
    grid = tiles.grid
    span = grid.q_blocks * grid.block_q + grid.k_blocks * grid.block_k + abs(grid.offset) + 1
    return Key(difference + span, 2 * span)


@dataclass(frozen=True, eq=False)
class Strided(Lattice):
    """Units at a fixed stride: ``(P − T − head·head_shift/unit) mod (stride/unit) = 0``.

    ``P`` and ``T`` are the unit indices of query and key (position // unit). ``stride`` and ``head_shift``
    are tokens, multiples of the unit. With ``head_shift`` = unit each head keeps another residue, so
    ``stride / unit`` heads together reach every tile.
    """

    stride: int
    unit: Unit = "block"
    head_shift: int = 0

    def __post_init__(self) -> None:
        _integer("Strided", "stride", self.stride, 1)
        _integer("Strided", "head_shift", self.head_shift)
        _unit("Strided", self.unit)
        if self.unit != "block":
            self._divide(_in_tokens(self, self.unit))

    def _divide(self, unit: int) -> None:
        if self.stride % unit or self.head_shift % unit:
            raise PatternError(
                explain(
                    "Strided",
                    expected=f"stride and head_shift that are multiples of the unit, {unit} tokens",
                    got=f"stride={self.stride}, head_shift={self.head_shift}",
                    fix="Both count tokens; choose multiples of the unit (the layout's block, unless given).",
                )
            )

    @property
    def needs_heads(self) -> bool:
        return self.head_shift != 0

    def resolve(self, block_q: int, block_k: int, offset: int = 0) -> Pattern:
        unit = _resolved_unit(self, self.unit, block_q, block_k)
        self._divide(unit)
        return replace(self, unit=unit)

    def _residue(self, difference: Tensor, head: Tensor | int) -> Tensor:
        unit = _in_tokens(self, self.unit)
        if self.head_shift:
            difference = difference - head * (self.head_shift // unit)
        return difference.remainder(self.stride // unit)

    def differs_by(self, difference: Tensor, head: Tensor | int) -> Tensor:
        return self._residue(difference, head) == 0

    def differences(self, least: Tensor, most: Tensor, head: Tensor) -> Tensor:
        step = self.stride // _in_tokens(self, self.unit)
        start = least + self._residue(-least, -head)
        count = int(_floor(most - start, step).amax()) + 1
        return start[:, None] + torch.arange(max(1, count)) * step

    def residue(self, difference: Tensor, head: Tensor, tiles: Tiles) -> Key:
        return Key(self._residue(difference, head), self.stride // _in_tokens(self, self.unit))

    def dense(self, unit: int, grid: Grid) -> bool:
        return self.stride <= grid.block_k


@dataclass(frozen=True, eq=False)
class LogStrided(Lattice):
    """Units at distances 0, ±1, ±base, ±base², …: every query reaches any key in O(log N) layers.

    The log-sparse attention of Li et al. 2019 (arXiv:1907.00235, section 4.2), over units instead of tokens.
    """

    base: int = 2
    unit: Unit = "block"

    def __post_init__(self) -> None:
        _integer("LogStrided", "base", self.base, 2)
        _unit("LogStrided", self.unit)

    def resolve(self, block_q: int, block_k: int, offset: int = 0) -> Pattern:
        return replace(self, unit=_resolved_unit(self, self.unit, block_q, block_k))

    @cached_property
    def _powers_memo(self) -> Tensor:
        powers = [1]
        while powers[-1] * self.base < UNBOUNDED:
            powers.append(powers[-1] * self.base)
        return torch.tensor([0, *powers])

    def differs_by(self, difference: Tensor, head: Tensor | int) -> Tensor:
        size, powers = difference.abs(), self._powers_memo
        place = torch.searchsorted(powers, size).clamp_(max=powers.numel() - 1)
        return powers[place] == size

    def differences(self, least: Tensor, most: Tensor, head: Tensor) -> Tensor:
        powers = self._powers_memo
        both = torch.cat((powers, -powers[1:]))
        both = both[(both >= least.amin()) & (both <= most.amax())]
        return both.expand(least.numel(), -1)

    def residue(self, difference: Tensor, head: Tensor, tiles: Tiles) -> Key:
        return _difference_key(difference, tiles)


@dataclass(frozen=True, eq=False)
class Dilated(Pattern):
    """Same segment of ``segment_length`` tokens, and unit indices congruent modulo ``dilation_rate``.

    One branch of LongNet's dilated attention (Ding et al. 2023, arXiv:2307.02486, section 2.2) over units of
    tokens; all offsets are kept, so every query has keys. For the exact published form see
    ``sparsetile.dilated_attention``.
    """

    segment_length: int
    dilation_rate: int
    unit: Unit = "block"

    def __post_init__(self) -> None:
        _integer("Dilated", "segment_length", self.segment_length, 1)
        _integer("Dilated", "dilation_rate", self.dilation_rate, 1)
        _unit("Dilated", self.unit)

    def resolve(self, block_q: int, block_k: int, offset: int = 0) -> Pattern:
        return replace(self, unit=_resolved_unit(self, self.unit, block_q, block_k))

    def lower(self) -> Pattern:
        unit = _in_tokens(self, self.unit)
        segment = Segment(self.segment_length)
        if self.dilation_rate == 1:
            return segment
        return Intersection.of(segment, Strided(self.dilation_rate * unit, unit))

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        unit = _in_tokens(self, self.unit)
        same = _floor(q, self.segment_length) == _floor(k, self.segment_length)
        return same & ((_floor(q, unit) - _floor(k, unit)).remainder(self.dilation_rate) == 0)


# -- a fixed random choice ----------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser "lowbias32" (Chris Wellons, public domain) on int64 tensors."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


@dataclass(frozen=True, eq=False)
class Random(Pattern):
    """A fixed random share ``density`` of key units for each query unit, one from each stratum.

    Key units are cut into strata with borders ``⌊s / density⌋``; from each stratum, each query unit (of each
    head, if ``by_head``) keeps one unit, chosen by hashing (seed, head, query unit, stratum). The choice does
    not depend on the lengths, and no region is left bare by chance. ``1 / density`` is taken as the nearest
    fraction with a denominator up to 2²⁰; borders are exact integers.
    """

    density: float
    seed: int = 0
    unit: Unit = "block"
    by_head: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
        if not number or not 0 < self.density <= 1:
            raise PatternError(
                explain(
                    "Random(density=…)",
                    expected="0 < density ≤ 1",
                    got=repr(self.density),
                    fix="density is the share of key units that each query unit keeps.",
                )
            )
        object.__setattr__(self, "density", float(self.density))
        _integer("Random", "seed", self.seed)
        _unit("Random", self.unit)
        _truth("Random", "by_head", self.by_head)

    @property
    def needs_heads(self) -> bool:
        return self.by_head

    def resolve(self, block_q: int, block_k: int, offset: int = 0) -> Pattern:
        return replace(self, unit=_resolved_unit(self, self.unit, block_q, block_k))

    @cached_property
    def _step_memo(self) -> tuple[int, int]:
        step = (1 / Fraction(repr(self.density))).limit_denominator(_STEP_DENOMINATOR)
        return step.numerator, step.denominator

    def _stratum(self, key_unit: Tensor) -> Tensor:
        over, under = self._step_memo
        return _floor((key_unit + 1) * under - 1, over)

    def _choice(self, query_unit: Tensor, stratum: Tensor, head: Tensor | int) -> Tensor:
        over, under = self._step_memo
        start, end = _floor(stratum * over, under), _floor((stratum + 1) * over, under)
        bits = torch.tensor(self.seed & _WORD)
        bits = _mix(bits ^ _mix(torch.tensor(self.seed >> 32 & _WORD)))
        if self.by_head:
            bits = _mix((bits + head) & _WORD)
        bits = _mix((bits + query_unit) & _WORD)
        return start + _mix((bits ^ stratum * 0x9E3779B1) & _WORD) % (end - start)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        unit = _in_tokens(self, self.unit)
        key_unit = _floor(k, unit)
        return self._choice(_floor(q, unit), self._stratum(key_unit), head) == key_unit

    def cover(self, grid: Grid, clip: Span) -> Span:
        unit = _in_tokens(self, self.unit)
        lo = clip.lo.clamp(0, grid.k_len)
        hi = torch.maximum(lo, clip.hi.clamp(0, grid.k_len))
        q_first, q_last = _floor(grid.first, unit), _floor(grid.last, unit)
        s_first, s_last = self._stratum(_floor(lo, unit)), self._stratum(_floor(hi - 1, unit))
        queries = int((q_last - q_first).amax()) + 1
        strata = max(1, int((s_last - s_first).amax()) + 1)
        if queries * strata >= grid.k_blocks:
            return super().cover(grid, clip)
        query_unit = q_first[:, None, None] + torch.arange(queries)[:, None]
        stratum = s_first[:, None, None] + torch.arange(strata)
        chosen = self._choice(query_unit, stratum, grid.head[:, None, None])
        inside = (query_unit <= q_last[:, None, None]) & (stratum <= s_last[:, None, None])
        k_lo = torch.maximum(chosen * unit, lo[:, None, None])
        k_hi = torch.minimum((chosen + 1) * unit, hi[:, None, None])
        k_hi = torch.where(inside, k_hi, k_lo)
        return grid.blocks(Span(k_lo.flatten(1), k_hi.flatten(1)))

    def state(self, tiles: Tiles) -> State:
        unit = _in_tokens(self, self.unit)
        q, k = _floor(tiles.q0, unit), _floor(tiles.k0, unit)
        one_pair = (q == _floor(tiles.q1, unit)) & (k == _floor(tiles.k1, unit))
        kept = self._choice(q, self._stratum(k), tiles.head) == k
        return State(kept | ~one_pair, kept & one_pair)
