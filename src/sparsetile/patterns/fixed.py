"""One range of keys for each query (windows, documents, …), and a fixed random choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Interval, Pattern
from sparsetile.patterns.parameters import (
    LONGEST,
    Unit,
    check_unit,
    floor,
    in_tokens,
    integer,
    resolved_unit,
    truth,
)
from sparsetile.patterns.tiles import (
    UNBOUNDED,
    Grid,
    Key,
    Span,
    State,
    Tiles,
    combine,
    interval_words,
    mask_words,
)

_WORD = 0xFFFFFFFF
_STEP_DENOMINATOR = 1 << 20


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
        return distance(tiles)


@dataclass(frozen=True, eq=False, repr=False)
class Local(Interval):
    """A window from ``left`` units before the query's to ``right`` after it: ``−left ≤ k − q ≤ right``.

    ``unit`` is ``"token"``, ``"block"`` (a tile of the layout) or a number of tokens; position ``p`` lies in
    unit ``p // unit``. ``Local(3, 0, unit=128)`` keeps whole tiles of 128: the query's own and three before.
    """

    left: int
    right: int | None = None
    unit: Unit = "token"

    def __post_init__(self) -> None:
        left = integer("Local", "left", self.left, 0)
        right = left if self.right is None else integer("Local", "right", self.right, 0)
        object.__setattr__(self, "right", right)
        check_unit("Local", self.unit)
        if max(left, right) * (self.unit if isinstance(self.unit, int) else 1) > LONGEST:
            raise PatternError(
                explain(
                    "Local",
                    expected=f"a window of at most {LONGEST} tokens",
                    got=f"{max(left, right)} units of {self.unit}",
                    fix="Full() has no end.",
                )
            )

    def __repr__(self) -> str:
        unit = "" if self.unit == "token" else f", unit={self.unit!r}"
        return f"Local(left={self.left}, right={self.right}{unit})"

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        if self.unit == "token":
            return self
        return replace(self, unit=resolved_unit(self, self.unit, block_q, block_k))

    def interval(self, q: Tensor) -> Span:
        assert self.right is not None
        unit = in_tokens(self, self.unit)
        own = q if unit == 1 else floor(q, unit)
        return Span((own - self.left) * unit, (own + (self.right + 1)) * unit)

    def signature(self, tiles: Tiles) -> Key:
        unit = in_tokens(self, self.unit)
        if unit == 1:
            return distance(tiles)
        return combine([distance(tiles), Key(tiles.q0.remainder(unit), unit)])


def distance(tiles: Tiles) -> Key:
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
        integer("Global", "tokens", self.tokens, 1)
        truth("Global", "rows", self.rows)
        truth("Global", "columns", self.columns)
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
        q, k = tiles.q0.clamp(max=self.tokens) - lowest, tiles.k0.clamp(max=self.tokens)
        return combine([Key(q, self.tokens - lowest + 1), Key(k, self.tokens + 1)])


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
            if type(n) is not int or not 1 <= n <= LONGEST:
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

    @property
    def needs_length(self) -> bool:
        return True

    def check(self, q_len: int, k_len: int, heads: int | None = None) -> None:
        total = sum(self.lengths)
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
        return torch.searchsorted(self._ends_memo[0].to(position.device), position, right=True)

    def interval(self, q: Tensor) -> Span:
        number, borders = self.number(q), self._ends_memo[1].to(q.device)
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
        if type(self.seed) is not int:
            raise PatternError(
                explain(
                    "Random(seed=…)", expected="an integer", got=repr(self.seed), fix="Any integer will do."
                )
            )
        check_unit("Random", self.unit)
        truth("Random", "by_head", self.by_head)

    @property
    def needs_heads(self) -> bool:
        return self.by_head

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return replace(self, unit=resolved_unit(self, self.unit, block_q, block_k))

    @cached_property
    def _step_memo(self) -> tuple[int, int]:
        step = (1 / Fraction(repr(self.density))).limit_denominator(_STEP_DENOMINATOR)
        return step.numerator, step.denominator

    def _stratum(self, key_unit: Tensor) -> Tensor:
        over, under = self._step_memo
        return floor((key_unit + 1) * under - 1, over)

    def _choice(self, query_unit: Tensor, stratum: Tensor, head: Tensor | int) -> Tensor:
        over, under = self._step_memo
        start, end = floor(stratum * over, under), floor((stratum + 1) * over, under)
        bits = torch.tensor(self.seed & _WORD)
        bits = _mix(bits ^ _mix(torch.tensor(self.seed >> 32 & _WORD)))
        if self.by_head:
            bits = _mix((bits + head) & _WORD)
        bits = _mix((bits + query_unit) & _WORD)
        return start + _mix((bits ^ stratum * 0x9E3779B1) & _WORD) % (end - start)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        unit = in_tokens(self, self.unit)
        key_unit = floor(k, unit)
        return self._choice(floor(q, unit), self._stratum(key_unit), head) == key_unit

    def cover(self, grid: Grid, clip: Span) -> Span:
        unit = in_tokens(self, self.unit)
        lo = clip.lo.clamp(0, grid.k_len)
        hi = torch.maximum(lo, clip.hi.clamp(0, grid.k_len))
        q_first, q_last = floor(grid.first, unit), floor(grid.last, unit)
        s_first, s_last = self._stratum(floor(lo, unit)), self._stratum(floor(hi - 1, unit))
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
        unit = in_tokens(self, self.unit)
        q, k = floor(tiles.q0, unit), floor(tiles.k0, unit)
        one_pair = (q == floor(tiles.q1, unit)) & (k == floor(tiles.k1, unit))
        kept = self._choice(q, self._stratum(k), tiles.head) == k
        return State(kept | ~one_pair, kept & one_pair)

    def words(self, tiles: Tiles) -> Tensor:
        unit, grid = in_tokens(self, self.unit), tiles.grid
        first = self._stratum(floor(tiles.k0, unit))
        last = self._stratum(floor(tiles.k0 + (grid.block_k - 1), unit))
        strata = int((last - first).max()) + 1 if len(tiles) else 0
        if 4 * strata > grid.block_k:
            return super().words(tiles)
        # Few strata in a tile: each says itself which unit it keeps.
        query_unit, head = floor(tiles.queries, unit), tiles.head[:, None]
        out = torch.zeros((len(tiles), grid.block_q, mask_words(grid.block_k)), dtype=torch.int32)
        for step in range(strata):
            lo = self._choice(query_unit, first[:, None] + step, head) * unit - tiles.k0[:, None]
            out |= interval_words(lo, lo + unit, grid.block_k)
        return out
