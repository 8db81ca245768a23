"""Patterns of the distance between query and key, counted in units of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Intersection, Interval, Pattern
from sparsetile.patterns.fixed import distance
from sparsetile.patterns.parameters import LONGEST, Unit, check_unit, floor, in_tokens, integer, resolved_unit
from sparsetile.patterns.tiles import UNBOUNDED, Grid, Key, Span, State, Tiles, combine


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
        unit = in_tokens(self, self.unit)
        return self.differs_by(floor(q, unit) - floor(k, unit), head)

    def cover(self, grid: Grid, clip: Span) -> Span:
        unit = in_tokens(self, self.unit)
        if self.dense(unit, grid):
            return super().cover(grid, clip)
        lo, hi = clip.lo.clamp(0, grid.k_len), clip.hi.clamp(0, grid.k_len)
        hi = torch.maximum(lo, hi)
        q_first, q_last = floor(grid.first, unit), floor(grid.last, unit)
        least, most = q_first - floor(hi - 1, unit), q_last - floor(lo, unit)
        most = torch.where(lo < hi, most, least - 1)
        d = self.differences(least, most, grid.head)
        inside = (d >= least[:, None]) & (d <= most[:, None])
        k_lo = torch.maximum((q_first[:, None] - d) * unit, lo[:, None])
        k_hi = torch.minimum((q_last[:, None] - d + 1) * unit, hi[:, None])
        return grid.blocks(Span(k_lo, torch.where(inside, k_hi, k_lo)))

    def state(self, tiles: Tiles) -> State:
        unit = in_tokens(self, self.unit)
        q, k = floor(tiles.q0, unit), floor(tiles.k0, unit)
        one_pair = (q == floor(tiles.q1, unit)) & (k == floor(tiles.k1, unit))
        kept = self.differs_by(q - k, tiles.head)
        return State(kept | ~one_pair, kept & one_pair)

    def signature(self, tiles: Tiles) -> Key:
        unit = in_tokens(self, self.unit)
        q, k = floor(tiles.q0, unit), floor(tiles.k0, unit)
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
        integer("Strided", "stride", self.stride, 1)
        integer("Strided", "head_shift", self.head_shift)
        check_unit("Strided", self.unit)
        if self.unit != "block":
            self._divide(in_tokens(self, self.unit))

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

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        unit = resolved_unit(self, self.unit, block_q, block_k)
        self._divide(unit)
        return replace(self, unit=unit)

    def _residue(self, difference: Tensor, head: Tensor | int) -> Tensor:
        unit = in_tokens(self, self.unit)
        if self.head_shift:
            difference = difference - head * (self.head_shift // unit)
        return difference.remainder(self.stride // unit)

    def differs_by(self, difference: Tensor, head: Tensor | int) -> Tensor:
        return self._residue(difference, head) == 0

    def differences(self, least: Tensor, most: Tensor, head: Tensor) -> Tensor:
        step = self.stride // in_tokens(self, self.unit)
        start = least + self._residue(-least, -head)
        count = int(floor(most - start, step).amax()) + 1
        return start[:, None] + torch.arange(max(1, count)) * step

    def residue(self, difference: Tensor, head: Tensor, tiles: Tiles) -> Key:
        return Key(self._residue(difference, head), self.stride // in_tokens(self, self.unit))

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
        integer("LogStrided", "base", self.base, 2)
        check_unit("LogStrided", self.unit)

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return replace(self, unit=resolved_unit(self, self.unit, block_q, block_k))

    @cached_property
    def _powers_memo(self) -> Tensor:
        powers = [1]
        while powers[-1] * self.base < UNBOUNDED:
            powers.append(powers[-1] * self.base)
        return torch.tensor([0, *powers])

    def differs_by(self, difference: Tensor, head: Tensor | int) -> Tensor:
        size, powers = difference.abs(), self._powers_memo.to(difference.device)
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
class Segment(Interval):
    """Same segment of ``length`` tokens. Not public: :class:`Dilated` is this and a congruence."""

    length: int

    def interval(self, q: Tensor) -> Span:
        lo = q - q.remainder(self.length)
        return Span(lo, lo + self.length)

    def signature(self, tiles: Tiles) -> Key:
        return combine([Key(tiles.q0.remainder(self.length), self.length), distance(tiles)])


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
        integer("Dilated", "segment_length", self.segment_length, 1)
        integer("Dilated", "dilation_rate", self.dilation_rate, 1)
        check_unit("Dilated", self.unit)

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return replace(self, unit=resolved_unit(self, self.unit, block_q, block_k))

    def lower(self) -> Pattern:
        unit = in_tokens(self, self.unit)
        segment = Segment(self.segment_length)
        if self.dilation_rate == 1:
            return segment
        return Intersection.of(segment, Strided(min(self.dilation_rate, LONGEST // unit) * unit, unit))

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        unit = in_tokens(self, self.unit)
        same = floor(q, self.segment_length) == floor(k, self.segment_length)
        return same & ((floor(q, unit) - floor(k, unit)).remainder(self.dilation_rate) == 0)
