"""ByHead: another pattern for each query head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.tiles import Grid, Key, Span, State, Tiles, combine


@dataclass(frozen=True, eq=False, repr=False)
class ByHead(Pattern):
    """Query head ``h`` attends by ``patterns[h]``.

    Heads that are given equal patterns cost no more to build than one. ``sparsetile profile`` finds such
    patterns for the heads of a trained model.

    Raises:
        PatternError: no patterns, something that is not a pattern, or (when a layout is built) another
            number of query heads.
    """

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        raw = self.patterns
        given = tuple(raw) if isinstance(raw, Iterable) else ()
        if not given or not all(isinstance(p, Pattern) for p in given):
            raise PatternError(
                explain(
                    "ByHead(patterns)",
                    expected="one Pattern for each query head",
                    got=f"{type(raw).__name__} of {len(given)}",
                    fix="Pass a tuple or list of patterns.",
                )
            )
        object.__setattr__(self, "patterns", given)

    def __repr__(self) -> str:
        return f"ByHead([{', '.join(map(repr, self.patterns))}])"

    @property
    def needs_heads(self) -> bool:
        return True

    @property
    def children(self) -> tuple[Pattern, ...]:
        return self.patterns

    def check(self, q_len: int, k_len: int, heads: int | None = None) -> None:
        if heads is not None and heads != len(self.patterns):
            raise PatternError(
                explain(
                    "ByHead(patterns)",
                    expected=f"{heads} patterns, one for each query head",
                    got=len(self.patterns),
                    fix="Key-value heads do not count: a group of query heads has one pattern each, too.",
                )
            )
        for kind in self._kinds_memo[0]:
            kind.check(q_len, k_len, heads)

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        return self._map(lambda p: p.resolve(block_q, block_k, offset, k_len))

    def lower(self) -> Pattern:
        return self._map(lambda p: p.lower())

    def _map(self, change: Callable[[Pattern], Pattern]) -> ByHead:
        kinds, which = self._kinds_memo
        changed = [change(kind) for kind in kinds]
        return ByHead(tuple(changed[i] for i in which.tolist()))

    @cached_property
    def _kinds_memo(self) -> tuple[tuple[Pattern, ...], Tensor]:
        """The distinct patterns, and int64 ``[heads]`` which of them each head has."""
        kinds = tuple(dict.fromkeys(self.patterns))
        place = {kind: i for i, kind in enumerate(kinds)}
        return kinds, torch.tensor([place[p] for p in self.patterns])

    def _of(self, head: Tensor) -> Iterator[tuple[int, Pattern, Tensor]]:
        """For each distinct pattern its number, itself, and the positions in ``head`` ``[n]`` it serves."""
        kinds, which = self._kinds_memo
        own = which[head]
        for number, kind in enumerate(kinds):
            yield number, kind, (own == number).nonzero().flatten()

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        kinds, which = self._kinds_memo
        if isinstance(head, int):
            return self.patterns[head].allows(q, k, head)
        own = which.to(head.device)[head]
        out = kinds[0].allows(q, k, head) & (own == 0)
        for number, kind in enumerate(kinds[1:], 1):
            out = out | (kind.allows(q, k, head) & (own == number))
        return out

    # -- how layouts are built ------------------------------------------------------------------------

    def cover(self, grid: Grid, clip: Span) -> Span:
        kinds, which = self._kinds_memo
        own = which[grid.head]
        spans = [kind.cover(grid, clip) for kind in kinds]
        wide = max(s.lo.shape[1] for s in spans)
        lo = torch.zeros((grid.rows, wide), dtype=torch.int64)
        hi = torch.zeros_like(lo)
        for number, span in enumerate(spans):
            rows = (own == number).nonzero().flatten()
            lo[rows, : span.lo.shape[1]] = span.lo[rows]
            hi[rows, : span.hi.shape[1]] = span.hi[rows]
        return Span(lo, hi)

    def state(self, tiles: Tiles) -> State:
        some = torch.empty(len(tiles), dtype=torch.bool)
        full = torch.empty_like(some)
        for _, kind, at in self._of(tiles.head):
            some[at], full[at] = kind.state(tiles.pick(at))
        return State(some, full)

    def signature(self, tiles: Tiles) -> Key:
        numbers, values, radix = torch.empty_like(tiles.row), torch.empty_like(tiles.row), 1
        for number, kind, at in self._of(tiles.head):
            own = kind.signature(tiles.pick(at))
            numbers[at], values[at] = number, own.values
            radix = max(radix, own.radix)
        return combine([Key(numbers, len(self._kinds_memo[0])), Key(values, radix)])

    def words(self, tiles: Tiles) -> Tensor:
        out: Tensor | None = None
        for _, kind, at in self._of(tiles.head):
            own = kind.words(tiles.pick(at))
            if out is None:
                out = own.new_empty((len(tiles), *own.shape[1:]))
            out[at] = own
        assert out is not None
        return out
