"""Pattern: which keys each query may attend, as a value.

A pattern is defined by ``allows(q, k, head)`` on positions alone. The remaining methods are how a layout is
built from it without asking about every pair: a *cover* of key blocks for each block row, a *state* for each
covered tile (no pair, every pair, or undecided), an exact *signature* of undecided tiles (equal signatures
have equal masks), and the bit mask of one tile for each signature. A pattern that defines ``allows`` alone
works and is exact; the other methods only save time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sparsetile.patterns.tiles import (
    Grid,
    Key,
    Span,
    State,
    Tiles,
    allowed_words,
    combine,
    interval_words,
)


class Pattern:
    """Base of all patterns: frozen, hashable, comparable values, in tokens.

    Subclasses are ``@dataclass(frozen=True, eq=False)`` and define ``allows``.
    """

    # -- the definition -------------------------------------------------------------------------------

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        """Whether the query at position ``q`` may attend the key at position ``k``.

        Args:
            q, k: int64 positions that broadcast against each other. Query ``i`` of a call stands at position
                ``i + k_len − q_len``, keys at ``0 … k_len − 1``.
            head: query head, an int or an int64 tensor that broadcasts with the positions.

        Returns:
            bool tensor of the broadcast shape (or one that broadcasts to it).

        Raises:
            PatternError: the pattern counts in layout blocks and has not been resolved.
        """
        raise NotImplementedError

    def __or__(self, other: Pattern) -> Pattern:
        """Allows what either allows."""
        return Union.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: Pattern) -> Pattern:
        """Allows what both allow."""
        return Intersection.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def block_aligned(
        self, block_q: int | None = None, block_k: int | None = None, offset: int = 0
    ) -> Pattern:
        """This pattern rounded outward to whole tiles: a tile with any allowed pair is allowed in full.

        Tiles are those of the layout it is used in (or of ``block_q × block_k`` with queries starting at
        position ``offset``, if given). Rounding outward lets a query see later keys of its own tile, so
        ``pattern.block_aligned() & Causal()`` is causal and ``(pattern & Causal()).block_aligned()`` is not.
        """
        from sparsetile.patterns.aligned import BlockAligned

        return BlockAligned(self, block_q, block_k, offset)

    @property
    def needs_heads(self) -> bool:
        """True if the pattern differs from head to head, so that a layout needs to know their number."""
        known: bool | None = self.__dict__.get("_needs_heads_memo")
        if known is None:
            known = self.__dict__["_needs_heads_memo"] = any(child.needs_heads for child in self.children)
        return known

    @property
    def needs_length(self) -> bool:
        """True if what a query may attend depends on how many keys there are, and not on positions alone, so
        that a longer layout is no layout of fewer keys."""
        known: bool | None = self.__dict__.get("_needs_length_memo")
        if known is None:
            known = self.__dict__["_needs_length_memo"] = any(child.needs_length for child in self.children)
        return known

    @property
    def children(self) -> tuple[Pattern, ...]:
        return ()

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        """The same pattern with everything that it takes from a layout replaced by numbers.

        Those are ``unit="block"``, the tiles of ``block_aligned()``, and the blocks and number of key tiles
        of a ``Budget`` (the one that needs ``k_len``).

        Args:
            block_q, block_k: tokens of the layout's tiles.
            offset: position of the first query, ``k_len − q_len``.
            k_len: keys. Patterns without a ``Budget`` do without it.

        Raises:
            PatternError: the tiles are not square, or ``k_len`` is missing, where the pattern needs them.
        """
        return self

    def check(self, q_len: int, k_len: int, heads: int | None = None) -> None:
        """Raises PatternError if the pattern cannot be used with these lengths."""
        for child in self.children:
            child.check(q_len, k_len, heads)

    # -- values ---------------------------------------------------------------------------------------

    def _values(self) -> tuple[Any, ...]:
        values: tuple[Any, ...] | None = self.__dict__.get("_values_memo")
        if values is None:
            values = tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
            self.__dict__["_values_memo"] = values
        return values

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or not isinstance(other, Pattern):
            return NotImplemented
        return hash(self) == hash(other) and self._values() == other._values()

    def __hash__(self) -> int:
        # Kept, because a pattern is looked up at every call and documents may be many.
        value: int | None = self.__dict__.get("_hash_memo")
        if value is None:
            value = hash((type(self).__name__, self._values()))
            self.__dict__["_hash_memo"] = value
        return value

    def __getstate__(self) -> dict[str, Any]:
        # String hashes differ between processes, so what was derived stays behind.
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_memo")}

    # -- how layouts are built ------------------------------------------------------------------------

    def lower(self) -> Pattern:
        """The same pattern in the terms that the methods below are quick for. Only for resolved patterns."""
        return self

    def cover(self, grid: Grid, clip: Span) -> Span:
        """Key blocks that may hold allowed pairs: ``[rows, s]`` ranges within the token ranges ``clip``."""
        lo, hi = grid.blocks(clip)
        return Span(lo[:, None], hi[:, None])

    def state(self, tiles: Tiles) -> State:
        """What is known of each tile; undecided is always a right answer."""
        n = len(tiles)
        return State(torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool))

    def signature(self, tiles: Tiles) -> Key:
        """Keys such that undecided tiles of equal key have equal masks."""
        grid = tiles.grid
        return Key(tiles.row * grid.k_blocks + tiles.col, max(1, grid.rows * grid.k_blocks))

    def words(self, tiles: Tiles) -> Tensor:
        """Bit masks ``[n, block_q, words]`` int32; what they say past the ends of the sequence is ignored."""
        return allowed_words(tiles, self.allows)


def signature_within(child: Pattern, tiles: Tiles) -> Key:
    """The child's signature where it is undecided, a constant where it is not."""
    some, full = child.state(tiles)
    values, radix = child.signature(tiles)
    return Key(torch.where(full, 1, torch.where(some, values + 2, 0)), radix + 2)


def _flatten(kind: type[Pattern], parts: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    flat: list[Pattern] = []
    for part in parts:
        flat.extend(part.children if type(part) is kind else (part,))
    return tuple(flat)


@dataclass(frozen=True, eq=False, repr=False)
class Union(Pattern):
    """Allows what any of ``parts`` allows: ``a | b``."""

    parts: tuple[Pattern, ...]

    @classmethod
    def of(cls, *parts: Pattern) -> Pattern:
        flat = _flatten(cls, parts)
        return flat[0] if len(flat) == 1 else cls(flat)

    @property
    def children(self) -> tuple[Pattern, ...]:
        return self.parts

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        out = self.parts[0].allows(q, k, head)
        for part in self.parts[1:]:
            out = out | part.allows(q, k, head)
        return out

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return Union.of(*(p.resolve(block_q, block_k, offset, k_len) for p in self.parts))

    def lower(self) -> Pattern:
        return Union.of(*(p.lower() for p in self.parts))

    def cover(self, grid: Grid, clip: Span) -> Span:
        spans = [p.cover(grid, clip) for p in self.parts]
        return Span(torch.cat([s.lo for s in spans], 1), torch.cat([s.hi for s in spans], 1))

    def state(self, tiles: Tiles) -> State:
        some, full = self.parts[0].state(tiles)
        for part in self.parts[1:]:
            other = part.state(tiles)
            some, full = some | other.some, full | other.full
        return State(some, full)

    def signature(self, tiles: Tiles) -> Key:
        return combine([signature_within(p, tiles) for p in self.parts])

    def words(self, tiles: Tiles) -> Tensor:
        out = self.parts[0].words(tiles)
        for part in self.parts[1:]:
            out = out | part.words(tiles)
        return out


@dataclass(frozen=True, eq=False, repr=False)
class Intersection(Pattern):
    """Allows what all of ``parts`` allow: ``a & b``."""

    parts: tuple[Pattern, ...]

    @classmethod
    def of(cls, *parts: Pattern) -> Pattern:
        flat = _flatten(cls, parts)
        return flat[0] if len(flat) == 1 else cls(flat)

    @property
    def children(self) -> tuple[Pattern, ...]:
        return self.parts

    def __repr__(self) -> str:
        return " & ".join(f"({p!r})" if isinstance(p, Union) else repr(p) for p in self.parts)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        out = self.parts[0].allows(q, k, head)
        for part in self.parts[1:]:
            out = out & part.allows(q, k, head)
        return out

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return Intersection.of(*(p.resolve(block_q, block_k, offset, k_len) for p in self.parts))

    def lower(self) -> Pattern:
        lowered = _flatten(Intersection, tuple(p.lower() for p in self.parts))
        intervals: list[Interval] = []
        others: list[Pattern] = []
        for part in lowered:
            if isinstance(part, Meet):
                intervals.extend(part.parts)
            elif isinstance(part, Interval):
                intervals.append(part)
            else:
                others.append(part)
        if len(intervals) > 1:
            return Intersection.of(Meet(tuple(intervals)), *others)
        return Intersection.of(*intervals, *others)

    def cover(self, grid: Grid, clip: Span) -> Span:
        others: list[Pattern] = []
        for part in self.parts:
            if isinstance(part, Interval):
                clip = part.clip(grid, clip)
            else:
                others.append(part)
        if not others:
            return super().cover(grid, clip)
        spans = [p.cover(grid, clip) for p in others]
        return min(spans, key=_tiles_in) if len(spans) > 1 else spans[0]

    def state(self, tiles: Tiles) -> State:
        some, full = self.parts[0].state(tiles)
        for part in self.parts[1:]:
            other = part.state(tiles)
            some, full = some & other.some, full & other.full
        return State(some, full)

    def signature(self, tiles: Tiles) -> Key:
        return combine([signature_within(p, tiles) for p in self.parts])

    def words(self, tiles: Tiles) -> Tensor:
        out = self.parts[0].words(tiles)
        for part in self.parts[1:]:
            out = out & part.words(tiles)
        return out


def _tiles_in(spans: Span) -> int:
    return int((spans.hi - spans.lo).clamp_(min=0).sum())


class Interval(Pattern):
    """A pattern that allows one range of keys to each query, both ends monotone in the query's position.

    Monotone (in either direction) means that the extremes of a block row are found at its first and last
    query, so no pass over positions is ever needed.
    """

    def interval(self, q: Tensor) -> Span:
        """The allowed keys ``[lo, hi)`` of queries at positions ``q``."""
        raise NotImplementedError

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        lo, hi = self.interval(q)
        return (lo <= k) & (k < hi)

    def bounds(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(least lo, greatest lo, least hi, greatest hi)`` of each block row; the outer may be wider."""

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            lo, hi = self.interval(grid.ends)
            return (
                torch.minimum(lo[0], lo[1]),
                torch.maximum(lo[0], lo[1]),
                torch.minimum(hi[0], hi[1]),
                torch.maximum(hi[0], hi[1]),
            )

        return grid.remember(("bounds", self), make)

    def clip(self, grid: Grid, clip: Span) -> Span:
        lo, _, _, hi = self.bounds(grid)
        return Span(torch.maximum(clip.lo, lo), torch.minimum(clip.hi, hi))

    def cover(self, grid: Grid, clip: Span) -> Span:
        return super().cover(grid, self.clip(grid, clip))

    def state(self, tiles: Tiles) -> State:
        grid = tiles.grid

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            lo_least, lo_most, hi_least, hi_most = self.bounds(grid)
            some = grid.blocks(Span(lo_least, hi_most))
            # Key blocks that start at or after the last lo and end before the first hi.
            size = grid.block_k
            full_lo = torch.div(lo_most.clamp(0, grid.k_len) + (size - 1), size, rounding_mode="floor")
            full_hi = torch.div(hi_least.clamp(0, grid.k_len), size, rounding_mode="floor")
            full_hi = torch.where(hi_least >= grid.k_len, grid.k_blocks, full_hi)
            return some.lo, some.hi, full_lo, full_hi

        some_lo, some_hi, full_lo, full_hi = grid.remember(("thresholds", self), make)
        row, col = tiles.row, tiles.col
        some = (col >= some_lo.index_select(0, row)).logical_and_(col < some_hi.index_select(0, row))
        full = (col >= full_lo.index_select(0, row)).logical_and_(col < full_hi.index_select(0, row))
        return State(some, full)

    def words(self, tiles: Tiles) -> Tensor:
        lo, hi = self.interval(tiles.queries)
        k0 = tiles.k0[:, None]
        shape = tiles.queries.shape
        return interval_words((lo - k0).expand(shape), (hi - k0).expand(shape), tiles.grid.block_k)


@dataclass(frozen=True, eq=False)
class Meet(Interval):
    """The intersection of intervals, which is one interval; arises in :meth:`Intersection.lower` alone."""

    parts: tuple[Interval, ...]

    @property
    def children(self) -> tuple[Pattern, ...]:
        return self.parts

    def interval(self, q: Tensor) -> Span:
        lo, hi = self.parts[0].interval(q)
        for part in self.parts[1:]:
            other = part.interval(q)
            lo, hi = torch.maximum(lo, other.lo), torch.minimum(hi, other.hi)
        return Span(lo, hi)

    def bounds(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The ends of a meet need not be monotone, so the parts' own extremes bound them instead.
        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            a = self.parts[0].bounds(grid)
            for part in self.parts[1:]:
                b = part.bounds(grid)
                a = (
                    torch.maximum(a[0], b[0]),
                    torch.maximum(a[1], b[1]),
                    torch.minimum(a[2], b[2]),
                    torch.minimum(a[3], b[3]),
                )
            return a

        return grid.remember(("bounds", self), make)

    def signature(self, tiles: Tiles) -> Key:
        return combine([signature_within(p, tiles) for p in self.parts])
