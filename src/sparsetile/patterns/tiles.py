"""The grid of tiles that patterns are asked about: positions, exact keys and bit masks, all vectorised.

Patterns never see a layout. They see a :class:`Grid` (which positions each block row and key block covers)
and :class:`Tiles` (a batch of row, column pairs on that grid).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

UNBOUNDED = 1 << 61
"""Stands for ±∞ among positions; leaves room for sums in int64."""

_LARGEST_KEY = 1 << 62
_PAIRS_AT_A_TIME = 1 << 18  # int64 work tensors of this size stay in the cache
_T = TypeVar("_T")


class Span(NamedTuple):
    """Ranges ``[lo, hi)``; empty where ``hi <= lo``. Shape and meaning (tokens or key blocks) by context."""

    lo: Tensor
    hi: Tensor


class Key(NamedTuple):
    """Exact int64 keys in ``[0, radix)``."""

    values: Tensor
    radix: int


class State(NamedTuple):
    """What is known of tiles: ``some`` False: no pair is allowed; ``full`` True: every valid pair is."""

    some: Tensor
    full: Tensor


@dataclass(eq=False)
class Grid:
    """Block rows (flattened as head, query block) and key blocks, in positions.

    Query ``i`` stands at position ``i + offset``; keys at ``0 … k_len − 1``. Only valid positions count:
    ``last`` and ``key_last`` stop at the ends of the sequence.
    """

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    offset: int
    heads: int = 1
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)

    @property
    def rows(self) -> int:
        return self.heads * self.q_blocks

    @cached_property
    def first(self) -> Tensor:
        """``[rows]`` position of the first query of each block row."""
        starts = torch.arange(self.offset, self.offset + self.q_len, self.block_q)
        return starts if self.heads == 1 else starts.repeat(self.heads)

    @cached_property
    def last(self) -> Tensor:
        """``[rows]`` position of the last valid query of each block row."""
        return (self.first + (self.block_q - 1)).clamp_(max=self.offset + self.q_len - 1)

    @cached_property
    def ends(self) -> Tensor:
        """``[2, rows]``: ``first`` and ``last``."""
        return torch.stack((self.first, self.last))

    @cached_property
    def head(self) -> Tensor:
        """``[rows]`` head of each block row."""
        return torch.arange(self.heads).repeat_interleave(self.q_blocks)

    @cached_property
    def everything(self) -> Span:
        """``[rows]`` token ranges that clip nothing."""
        return Span(torch.zeros(self.rows, dtype=torch.int64), torch.full((self.rows,), self.k_len))

    @cached_property
    def whole(self) -> Grid:
        """The same tiles without tails: the last blocks count in full."""
        q_len, k_len = self.q_blocks * self.block_q, self.k_blocks * self.block_k
        if (q_len, k_len) == (self.q_len, self.k_len):
            return self
        return replace(self, q_len=q_len, k_len=k_len, memo={})

    def blocks(self, tokens: Span) -> Span:
        """The key blocks that token ranges touch; empty ranges stay empty."""
        lo, hi = tokens
        low = torch.div(lo.clamp(0, self.k_len), self.block_k, rounding_mode="floor")
        high = torch.div(hi.clamp(0, self.k_len) + (self.block_k - 1), self.block_k, rounding_mode="floor")
        return Span(low, torch.where(lo < hi, high, low))

    def remember(self, name: object, make: Callable[[], _T]) -> _T:
        """``make()``, once for this grid and name."""
        if name not in self.memo:
            self.memo[name] = make()
        value: _T = self.memo[name]
        return value


@dataclass(eq=False)
class Tiles:
    """A batch of tiles of a grid: ``row`` and ``col``, int64 ``[n]``."""

    grid: Grid
    row: Tensor
    col: Tensor

    def __len__(self) -> int:
        return self.row.numel()

    def pick(self, which: Tensor) -> Tiles:
        return Tiles(self.grid, self.row.index_select(0, which), self.col.index_select(0, which))

    def on(self, grid: Grid) -> Tiles:
        return self if grid is self.grid else Tiles(grid, self.row, self.col)

    @cached_property
    def q0(self) -> Tensor:
        """Position of the first query of each tile."""
        return self.grid.first.index_select(0, self.row)

    @cached_property
    def k0(self) -> Tensor:
        """Position of the first key of each tile."""
        return self.col * self.grid.block_k

    @cached_property
    def q1(self) -> Tensor:
        """Position of the last valid query of each tile."""
        return self.grid.last.index_select(0, self.row)

    @cached_property
    def k1(self) -> Tensor:
        """Position of the last valid key of each tile."""
        return (self.k0 + (self.grid.block_k - 1)).clamp_(max=self.grid.k_len - 1)

    @cached_property
    def head(self) -> Tensor:
        if self.grid.heads == 1:
            return torch.zeros_like(self.row)
        return torch.div(self.row, self.grid.q_blocks, rounding_mode="floor")

    @cached_property
    def queries(self) -> Tensor:
        """``[n, block_q]`` positions, those past the end of the sequence included."""
        return self.q0[:, None] + torch.arange(self.grid.block_q)

    @cached_property
    def keys(self) -> Tensor:
        """``[n, block_k]`` positions, those past the end of the sequence included."""
        return self.k0[:, None] + torch.arange(self.grid.block_k)


def combine(keys: list[Key]) -> Key:
    """One exact key for a tuple of keys: mixed radix, with values renumbered where the product overflows."""
    values, radix = keys[0]
    for other in keys[1:]:
        if radix * other.radix > _LARGEST_KEY:
            values, radix = _renumber(values)
            if radix * other.radix > _LARGEST_KEY:
                other = Key(*_renumber(other.values))
        values = values * other.radix + other.values
        radix *= other.radix
    return Key(values, radix)


def _renumber(values: Tensor) -> Key:
    distinct, index = torch.unique(values, return_inverse=True)
    return Key(index, max(1, distinct.numel()))


def representatives(values: Tensor) -> tuple[Tensor, Tensor]:
    """``(which, index)``: one position for each distinct value, and each entry's place in ``which``."""
    distinct, index = torch.unique(values, return_inverse=True)
    places = torch.arange(values.numel(), device=values.device)
    which = torch.zeros_like(distinct).scatter_(0, index, places)
    return which, index


def mask_words(block_k: int) -> int:
    """32-bit words in one row of a tile mask; a 16-wide tile uses the low half of its word."""
    return max(1, block_k // 32)


def interval_words(lo: Tensor, hi: Tensor, block_k: int) -> Tensor:
    """Bits ``lo ≤ j < hi`` of every row: ``[…]`` int64 bounds relative to the tile → ``[…, words]`` int32."""
    # Row x of the table holds the bits below x, so a mask row is two look-ups.
    bound = torch.arange(block_k + 1, device=lo.device)[:, None]
    starts = torch.arange(0, block_k, 32, device=lo.device)
    below = ((1 << (bound - starts).clamp_(0, min(32, block_k))) - 1).to(torch.int32)
    words = below.index_select(0, hi.clamp(0, block_k).flatten())
    words &= (~below).index_select(0, lo.clamp(0, block_k).flatten())
    return words.reshape(*lo.shape, mask_words(block_k))


def pack(bits: Tensor) -> Tensor:
    """bool ``[…, block_k]`` → int32 ``[…, words]``, least significant bit first."""
    block_k = bits.shape[-1]
    width = min(32, block_k)
    grouped = bits.reshape(*bits.shape[:-1], mask_words(block_k), width)
    weights = 1 << torch.arange(width, device=bits.device)
    return (grouped * weights).sum(-1).to(torch.int32)


def unpack(words: Tensor, block_k: int) -> Tensor:
    """int32 ``[…, words]`` → bool ``[…, block_k]``: the inverse of :func:`pack`."""
    width = min(32, block_k)
    bits = words[..., None] >> torch.arange(width, dtype=torch.int32, device=words.device) & 1
    return bits.bool().reshape(*words.shape[:-1], block_k)


def ones(block_k: int) -> int:
    """The int32 value of a mask word whose every bit is set."""
    return -1 if block_k >= 32 else (1 << block_k) - 1


def allowed_words(tiles: Tiles, allows: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Bit masks ``[n, block_q, words]`` by asking ``allows`` for every pair, a bounded number at a time."""
    grid = tiles.grid
    shape = (grid.block_q, mask_words(grid.block_k))
    out = torch.empty((len(tiles), *shape), dtype=torch.int32)
    step = max(1, _PAIRS_AT_A_TIME // (grid.block_q * grid.block_k))
    for start in range(0, len(tiles), step):
        part = slice(start, start + step)
        q, k = tiles.queries[part, :, None], tiles.keys[part, None, :]
        bits = allows(q, k, tiles.head[part, None, None])
        out[part] = pack(bits.expand(q.shape[0], grid.block_q, grid.block_k))
    return out
