"""Tiles of strided tensors on the CPU: many are read, written or added to by one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Tiles:
    """A ``[B, H, N, D]`` tensor of any strides as ``B·H·ceil(N/block)`` tiles of ``block × D``.

    Tile ``(b·H + h)·blocks + j`` holds tokens ``j·block …``. A view with the greatest common divisor of all
    tile offsets as its first stride reaches every tile by one index, so nothing is copied to make strides
    regular (``[B, N, H, D]`` storage and slices of a fused qkv are read in place). The last tile of a
    ragged length is served from a second, shorter view: it reads as zeros past the end and is never written
    there.
    """

    def __init__(self, tensor: Tensor, block: int) -> None:
        batch, heads, length, width = tensor.shape
        step_b, step_h, step_n, step_d = tensor.stride()
        self.block = block
        self.width = width
        self.blocks = -(-length // block)
        self.rest = length % block
        self.dtype = tensor.dtype
        steps = [s for s, n in ((step_b, batch), (step_h, heads), (block * step_n, self.blocks)) if n > 1]
        unit = math.gcd(*steps) or 1
        last = (batch - 1) * step_b + (heads - 1) * step_h
        whole = length // block
        self.starts: Tensor | None = None
        if self.rest or not tensor.is_contiguous():
            grid = [
                torch.arange(n) * s
                for n, s in ((batch, step_b), (heads, step_h), (self.blocks, block * step_n))
            ]
            starts = grid[0][:, None, None] + grid[1][:, None] + grid[2]
            self.starts = starts.flatten() // unit
        self.whole: Tensor | None = None
        if whole:
            count = (last + (whole - 1) * block * step_n) // unit + 1
            self.whole = tensor.as_strided((count, block, width), (unit, step_n, step_d))
        self.tail: Tensor | None = None
        if self.rest:
            count = (last + whole * block * step_n) // unit + 1
            self.tail = tensor.as_strided((count, self.rest, width), (unit, step_n, step_d))

    def _split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in ``ids`` of whole tiles and of ragged ones."""
        ragged = ids % self.blocks == self.blocks - 1
        return (~ragged).nonzero().squeeze(1), ragged.nonzero().squeeze(1)

    def gather(self, ids: Tensor, out: Tensor) -> Tensor:
        """Writes the tiles ``ids`` ``[n]`` to ``out`` ``[n, block, D]`` of the same dtype, and returns it."""
        starts = ids if self.starts is None else self.starts[ids]
        if self.tail is None:
            assert self.whole is not None
            return torch.index_select(self.whole, 0, starts, out=out)
        ragged = self._split(ids)[1]
        if not len(ragged):
            assert self.whole is not None
            return torch.index_select(self.whole, 0, starts, out=out)
        if self.whole is not None:
            # A ragged tile would reach past the storage: read any tile there, the next lines replace it.
            torch.index_select(self.whole, 0, starts.clamp(max=len(self.whole) - 1), out=out)
        padded = out.new_zeros((len(ragged), self.block, self.width))
        padded[:, : self.rest] = self.tail.index_select(0, starts[ragged])
        return out.index_copy_(0, ragged, padded)

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Replaces the tiles ``ids`` (each at most once) by ``values`` ``[n, block, D]``."""
        values = values.to(self.dtype)
        for view, at, part in self._targets(ids, values):
            view.index_copy_(0, at, part)

    def add(self, ids: Tensor, values: Tensor) -> None:
        """Adds ``values`` ``[n, block, D]`` to the tiles ``ids``, in order where one repeats."""
        for view, at, part in self._targets(ids, values):
            view.index_add_(0, at, part)

    def _targets(self, ids: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        starts = ids if self.starts is None else self.starts[ids]
        if self.tail is None:
            assert self.whole is not None
            return [(self.whole, starts, values)]
        whole, ragged = self._split(ids)
        targets = []
        if self.whole is not None and len(whole):
            part = values if not len(ragged) else values[whole]
            targets.append((self.whole, starts if not len(ragged) else starts[whole], part))
        if len(ragged):
            targets.append((self.tail, starts[ragged], values[ragged, : self.rest]))
        return targets


def _forbidden_bytes() -> Tensor:
    """For each byte of a mask, eight booleans (as one int64) that say which of its bits are 0."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (bits == 0).contiguous().view(torch.int64).squeeze(1)


_FORBIDDEN = _forbidden_bytes()


def forbidden(masks: Tensor, mask_ids: Tensor, block_k: int) -> Tensor:
    """The pairs that tiles forbid: ``[*mask_ids.shape, block_q, block_k]`` bool; mask id −1 forbids none."""
    flat = mask_ids.flatten()
    words = masks.index_select(0, flat.clamp(min=0)).masked_fill_((flat < 0)[:, None, None], -1)
    octets = words.view(torch.uint8)[..., : block_k // 8]
    pairs = _FORBIDDEN.index_select(0, octets.flatten().int()).view(torch.bool)
    return pairs.view(*mask_ids.shape, masks.shape[1], block_k)
