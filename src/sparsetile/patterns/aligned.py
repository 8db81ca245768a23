"""Patterns rounded outward to whole tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Intersection, Pattern, Union
from sparsetile.patterns.parameters import unresolved
from sparsetile.patterns.tiles import (
    Grid,
    Key,
    Span,
    State,
    Tiles,
    combine,
    mask_words,
    ones,
    representatives,
)


@dataclass(frozen=True, eq=False, repr=False)
class BlockAligned(Pattern):
    """``inner`` rounded outward to whole tiles of ``block_q × block_k``; see :meth:`Pattern.block_aligned`.

    Tiles are counted in full, also where they hang over the end of the sequence: like every pattern, this is
    a function of positions, not of lengths.
    """

    inner: Pattern
    block_q: int | None = None
    block_k: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if (self.block_q is None) != (self.block_k is None):
            raise PatternError(
                explain(
                    "block_aligned()",
                    expected="both block_q and block_k, or neither",
                    got=f"block_q={self.block_q}, block_k={self.block_k}",
                    fix="Leave both out to round to the tiles of the layout.",
                )
            )
        sizes = [n for n in (self.block_q, self.block_k) if n is not None]
        if any(type(n) is not int or n < 1 for n in sizes) or type(self.offset) is not int:
            raise PatternError(
                explain(
                    "block_aligned()",
                    expected="block sizes ≥ 1 and an integer offset",
                    got=f"{self.block_q!r}, {self.block_k!r}, offset {self.offset!r}",
                    fix="Pass tokens as plain integers.",
                )
            )

    @property
    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def __repr__(self) -> str:
        inner = f"({self.inner!r})" if isinstance(self.inner, (Union, Intersection)) else repr(self.inner)
        sizes = "" if self.block_q is None else f"{self.block_q}, {self.block_k}, {self.offset}"
        return f"{inner}.block_aligned({sizes})"

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        if self.block_q is None or self.block_k is None:
            inner = self.inner.resolve(block_q, block_k, offset, k_len)
            return BlockAligned(inner, block_q, block_k, offset)
        inner = self.inner.resolve(self.block_q, self.block_k, self.offset, k_len)
        return BlockAligned(inner, self.block_q, self.block_k, self.offset)

    def lower(self) -> Pattern:
        return BlockAligned(self.inner.lower(), self.block_q, self.block_k, self.offset)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        if self.block_q is None or self.block_k is None:
            raise unresolved(self, "its tiles are those of a layout")
        row = torch.div(q - self.offset, self.block_q, rounding_mode="floor")
        col = torch.div(k, self.block_k, rounding_mode="floor")
        heads = torch.as_tensor(head, dtype=torch.int64, device=q.device)
        shape = (row + col + heads).shape
        each = [x.expand(shape).flatten() for x in (row, col, heads)]
        if not each[0].numel():
            return torch.empty(shape, dtype=torch.bool, device=q.device)
        lows = [int(x.min()) for x in each]
        keys = [Key(x - low, int(x.max()) - low + 1) for x, low in zip(each, lows, strict=True)]
        which, index = representatives(combine(keys).values)
        rows, cols, heads = (x[which][:, None, None] for x in each)
        q_in = rows * self.block_q + self.offset + torch.arange(self.block_q, device=q.device)[:, None]
        k_in = cols * self.block_k + torch.arange(self.block_k, device=q.device)
        step = max(1, (1 << 18) // (self.block_q * self.block_k))
        kept = [
            self.inner.allows(a, b, h).expand(-1, self.block_q, self.block_k).flatten(1).any(1)
            for a, b, h in zip(*(torch.split(x, step) for x in (q_in, k_in, heads)), strict=True)
        ]
        return torch.cat(kept)[index].reshape(shape)

    def _whole(self, grid: Grid) -> Grid:
        mine = (self.block_q, self.block_k, self.offset)
        if mine != (grid.block_q, grid.block_k, grid.offset):
            raise PatternError(
                explain(
                    "block_aligned()",
                    expected=f"a layout with (block_q, block_k, offset) = {mine}",
                    got=(grid.block_q, grid.block_k, grid.offset),
                    fix="Use the pattern before resolve(), or a layout with these blocks and lengths.",
                )
            )
        return grid.whole

    def cover(self, grid: Grid, clip: Span) -> Span:
        whole = self._whole(grid)
        blocks = grid.blocks(clip)
        clip = Span(blocks.lo * grid.block_k, blocks.hi * grid.block_k)
        return self.inner.cover(whole, clip)

    def state(self, tiles: Tiles) -> State:
        tiles = tiles.on(self._whole(tiles.grid))
        some, full = self.inner.state(tiles)
        undecided = (some & ~full).nonzero().flatten()
        if undecided.numel():
            part = tiles.pick(undecided)
            which, index = representatives(self.inner.signature(part).values)
            kept = self.inner.words(part.pick(which)).flatten(1).any(1)
            some = some.clone()
            some[undecided] = kept[index]
        return State(some, some)

    def signature(self, tiles: Tiles) -> Key:
        return Key(torch.zeros_like(tiles.row), 1)

    def words(self, tiles: Tiles) -> Tensor:
        grid = tiles.grid
        fill = torch.where(self.state(tiles).full, ones(grid.block_k), 0).to(torch.int32)
        return fill[:, None, None].expand(-1, grid.block_q, mask_words(grid.block_k))
