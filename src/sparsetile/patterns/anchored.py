"""Anchored: dilation whose columns belong to key-value heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsetile.patterns.base import Intersection, Pattern
from sparsetile.patterns.lattice import Segment
from sparsetile.patterns.parameters import (
    LONGEST,
    Unit,
    check_unit,
    floor,
    in_tokens,
    integer,
    resolved_unit,
)
from sparsetile.patterns.tiles import Grid, Key, Span, State, Tiles, combine


@dataclass(frozen=True, eq=False)
class Columns(Pattern):
    """Key units congruent to the kv head modulo ``rate``. Not public: :class:`Anchored` is this in a
    segment."""

    rate: int
    unit: int
    group_size: int

    @property
    def needs_heads(self) -> bool:
        return self.rate > 1

    def _residue(self, head: Tensor | int) -> Tensor:
        return floor(torch.as_tensor(head), self.group_size).remainder(self.rate)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        return floor(k, self.unit).remainder(self.rate) == self._residue(head).to(k.device)

    def cover(self, grid: Grid, clip: Span) -> Span:
        if self.rate * self.unit <= grid.block_k:
            return super().cover(grid, clip)
        lo = clip.lo.clamp(0, grid.k_len)
        hi = torch.maximum(lo, clip.hi.clamp(0, grid.k_len))
        first = floor(lo, self.unit)
        first = first + (self._residue(grid.head) - first).remainder(self.rate)
        last = floor(hi - 1, self.unit)
        count = max(1, int(floor(last - first, self.rate).amax()) + 1)
        units = first[:, None] + torch.arange(count) * self.rate
        k_lo = torch.maximum(units * self.unit, lo[:, None])
        k_hi = torch.minimum((units + 1) * self.unit, hi[:, None])
        return grid.blocks(Span(k_lo, torch.maximum(k_lo, k_hi)))

    def state(self, tiles: Tiles) -> State:
        unit = floor(tiles.k0, self.unit)
        one = unit == floor(tiles.k1, self.unit)
        kept = unit.remainder(self.rate) == self._residue(tiles.head)
        return State(kept | ~one, kept & one)

    def signature(self, tiles: Tiles) -> Key:
        period = self.rate * self.unit
        return combine([Key(tiles.k0.remainder(period), period), Key(self._residue(tiles.head), self.rate)])


@dataclass(frozen=True, eq=False)
class Anchored(Pattern):
    """Same segment of ``segment_length`` tokens, and key units congruent to the kv head modulo
    ``dilation_rate``.

    Like :class:`Dilated`, every query keeps one unit in ``dilation_rate``; which one depends on the kv head
    (query head ``// group_size``) and not on the query. All rows of a rank then attend the same keys of a kv
    head, so a rank receives one in ``dilation_rate`` of the others' keys; with ``Dilated``, whose rows
    differ, nearly all. ``dilation_rate`` kv heads together reach every key. A query may find its own position
    left out: join a window, ``Local(…) | Anchored(…)``.

    ``unit`` is ``"block"`` (a tile of the layout), ``"token"`` or a number of tokens.

    Raises:
        PatternError: a number is below 1.
    """

    segment_length: int
    dilation_rate: int
    unit: Unit = "block"
    group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("segment_length", "dilation_rate", "group_size"):
            integer("Anchored", name, getattr(self, name), 1)
        check_unit("Anchored", self.unit)

    @property
    def needs_heads(self) -> bool:
        return self.dilation_rate > 1

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return replace(self, unit=resolved_unit(self, self.unit, block_q, block_k))

    def lower(self) -> Pattern:
        segment = Segment(self.segment_length)
        if self.dilation_rate == 1:
            return segment
        return Intersection.of(segment, self._columns())

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        same = floor(q, self.segment_length) == floor(k, self.segment_length)
        return same & self._columns().allows(q, k, head)

    def _columns(self) -> Columns:
        # Rates beyond the last key are all alike, and products stay within int64.
        unit = in_tokens(self, self.unit)
        return Columns(min(self.dilation_rate, LONGEST // unit + 1), unit, self.group_size)
