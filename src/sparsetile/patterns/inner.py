"""Patterns that adapt another library's masks. Not public: they arise in ``integrations`` alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsetile.patterns.base import Interval, Pattern
from sparsetile.patterns.tiles import Key, Span, Tiles

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Shifted(Pattern):
    """``inner`` where the first key of the call stands at position ``by`` of the sequence: the earlier keys
    have left a cache that keeps a window."""

    inner: Pattern
    by: int

    @property
    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Pattern:
        end = None if k_len is None else k_len + self.by
        return replace(self, inner=self.inner.resolve(block_q, block_k, offset + self.by, end))

    def lower(self) -> Pattern:
        inner = self.inner.lower()
        return ShiftedInterval(inner, self.by) if isinstance(inner, Interval) else replace(self, inner=inner)

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        return self.inner.allows(q + self.by, k + self.by, head)


@dataclass(frozen=True, eq=False)
class ShiftedInterval(Interval):
    """:class:`Shifted` of one range of keys a query, which is one range again."""

    inner: Interval
    by: int

    def interval(self, q: Tensor) -> Span:
        lo, hi = self.inner.interval(q + self.by)
        return Span(lo - self.by, hi - self.by)

    def signature(self, tiles: Tiles) -> Key:
        return Pattern.signature(self, tiles)


@dataclass(frozen=True, eq=False)
class Asked(Pattern):
    """What a ``mask_mod`` of FlexAttention's form allows for one batch element, its positions those of the
    call: it is asked about every pair of the tiles that the patterns beside it keep."""

    mod: MaskMod
    batch: int = 0
    q_shift: int = 0
    k_shift: int = 0
    by_head: bool = True

    @property
    def needs_heads(self) -> bool:
        return self.by_head

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        heads = torch.as_tensor(head, dtype=torch.int64, device=q.device)
        shape = (q + k + heads).shape
        flat = [x.expand(shape).flatten() for x in (q + self.q_shift, k + self.k_shift, heads)]
        batch = torch.tensor(self.batch, device=q.device)
        over = torch.vmap(self.mod, in_dims=(None, 0, 0, 0))
        return over(batch, flat[2], flat[0], flat[1]).bool().reshape(shape)
