"""What a backend is asked to decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.layout.blocks import BlockLayout


@dataclass(eq=False, slots=True)
class DecodeRequest:
    """Everything of a decoding call besides q and the cache; validated by the caller.

    Attributes:
        layout: the tiles of all positions that a query may stand at, causal, with batch 1.
        lengths: int ``[B]``: slots that are filled, those of the queries included; or None: all of them.
        starts: int ``[B]``: slot of position 0; below 0 where a cache has dropped its first keys. Or None: 0.
        page_table: int ``[B, pages]``: the page of each ``page_size`` slots; or None.
        key_padding_mask: bool ``[B, capacity]``, True = ignore; or None.
        q_len: queries of each sequence.
        capacity: slots of each sequence.
        page_size: slots of a page; 0 without pages.
        scale: factor on q·k.
    """

    layout: BlockLayout
    lengths: Tensor | None
    starts: Tensor | None
    page_table: Tensor | None
    key_padding_mask: Tensor | None
    q_len: int
    capacity: int
    page_size: int
    scale: float

    def starts_of(self, batch: Tensor) -> Tensor:
        """int64 ``[n]`` for batch elements ``[n]``."""
        return torch.zeros_like(batch) if self.starts is None else self.starts[batch].long()

    def ends(self, batch: int) -> Tensor:
        """int64 ``[B]``: how many slots of each sequence are filled."""
        if self.lengths is None:
            return torch.full((batch,), self.capacity, device=self.layout.device)
        return self.lengths.long()

    def positions(self, batch: int) -> Tensor:
        """int64 ``[B, Nq]``: where each query stands in its sequence; below 0: among the padding."""
        last = self.ends(batch) if self.starts is None else self.ends(batch) - self.starts.long()
        return last[:, None] - self.q_len + torch.arange(self.q_len, device=last.device)

    def gather(self, cache: Tensor, batch: Tensor, head: Tensor, slots: Tensor) -> Tensor:
        """``[n, heads, span, D]`` of a cache: slots ``[n, heads or 1, span]`` of batch elements ``[n]``, key
        heads ``[heads]``."""
        batch, head = batch[:, None, None], head[:, None]
        if self.page_table is not None:
            page = self.page_table[batch, torch.div(slots, self.page_size, rounding_mode="floor")].long()
            return cache[page, head, slots % self.page_size]
        return cache[batch, head, slots]
