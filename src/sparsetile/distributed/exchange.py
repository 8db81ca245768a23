"""Exchange: moves the key-value tiles of a plan's stages between ranks, and their gradients back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sparsetile.distributed.rank_plan import RankPlan, Stage
from sparsetile.distributed.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Buffers:
    """The keys of one stage.

    Attributes:
        k, v: ``[B, Hkv, width · block, D]``.
        mask: bool, True = ignore: ``[B, width · block]``, or ``[B, Hkv, width · block]`` where the heads have
            tiles of their own; None if no rank has a mask.
        tiles: int64 ``[1 or Hkv, width]``: the tile of the sequence in each place.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    tiles: Tensor


@dataclass(frozen=True, eq=False)
class _Arriving:
    """Payloads on their way; what is sent must live until it is there."""

    works: list[dist.Work]
    tiles: Tensor
    mask: Tensor | None
    sent: tuple[Tensor, ...]


class Exchange:
    """What one rank sends of its keys and values, stage by stage.

    A unit on the wire is ``[2, B, Hkv, block, D]`` (keys and values of all heads), or without Hkv if units
    are of one kv head; the short last tile is filled up with zeros. The mask of its tokens, ``[B, block]``,
    goes beside each, of one kv head or of all: a byte a token, where the keys are hundreds.

    Args:
        k, v: ``[B, Hkv, n, D]`` of this rank.
        mask: bool ``[B, n]`` or None.
    """

    def __init__(
        self, plan: RankPlan, ranks: Ranks, block: int, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> None:
        self.plan, self.ranks, self.block = plan, ranks, block
        self.batch, self.kv_heads, tokens, self.dim = k.shape
        self.dtype, self.device = k.dtype, k.device
        rest = -tokens % block
        self.k, self.v, self.count = k, v, (tokens + rest) // block
        self.mask = None
        if mask is not None:
            self.mask = torch.unflatten(F.pad(mask, (0, rest), value=True), 1, (-1, block)).transpose(0, 1)

    @cached_property
    def tiles(self) -> Tensor:
        """``[tiles, Hkv, 2, B, block, D]``: a copy, made when something is first sent. Backward over kept
        tiles sends none of them."""
        both = F.pad(torch.stack((self.k, self.v)), (0, 0, 0, -self.k.shape[2] % self.block))
        return torch.unflatten(both, 3, (-1, self.block)).permute(3, 2, 0, 1, 4, 5)

    def start(self, number: int) -> _Arriving | None:
        """Begins the exchange of a stage; None past the last one. Collective."""
        if number >= len(self.plan.stages):
            return None
        stage = self.plan.stages[number]
        shape = (self.kv_heads,) if self._together(stage) else ()
        unit = (*shape, 2, self.batch, self.block, self.dim)
        if self._together(stage):
            out = self.tiles.index_select(0, stage.send_places)
        else:
            out = self.tiles[stage.send_places, stage.send_units[:, 1]]
        tiles, works = self._move(out, unit, stage)
        mask: Tensor | None = None
        sent: tuple[Tensor, ...] = (out,)
        if self.mask is not None:
            marks = self.mask.index_select(0, stage.send_places).to(torch.uint8)
            mask, more = self._move(marks, (self.batch, self.block), stage)
            works, sent = works + more, (out, marks)
        return _Arriving(works, tiles, mask, sent)

    def finish(self, arriving: _Arriving | None, stage: Stage) -> Buffers:
        """Waits for a stage's payloads and lays them out as its buffer."""
        assert arriving is not None
        with self.ranks.watched("the exchange of tiles"):
            for work in arriving.works:
                work.wait()
        mask = None
        if self._together(stage):
            # [width, Hkv, 2, B, block, D]
            lines = arriving.tiles.permute(2, 3, 1, 0, 4, 5)
            if arriving.mask is not None:
                mask = arriving.mask.transpose(0, 1).flatten(1) != 0
        else:
            size = (stage.tiles.numel(), 2, self.batch, self.block, self.dim)
            buffer = torch.zeros(size, dtype=self.dtype, device=self.device)
            buffer[stage.slots] = arriving.tiles
            lines = torch.unflatten(buffer, 0, stage.tiles.shape).permute(2, 3, 0, 1, 4, 5)
            if arriving.mask is not None:
                marks = arriving.mask.new_ones((stage.tiles.numel(), self.batch, self.block))
                marks[stage.slots] = arriving.mask
                mask = torch.unflatten(marks, 0, stage.tiles.shape).permute(2, 0, 1, 3).flatten(2) != 0
        k, v = lines.reshape(2, self.batch, self.kv_heads, stage.width * self.block, self.dim).unbind(0)
        return Buffers(k, v, mask, stage.tiles)

    def send_back(self, stage: Stage, dk: Tensor | None, dv: Tensor | None) -> _Arriving:
        """Begins the way back of a stage's gradients (None: this rank has none). Collective."""
        if dk is None or dv is None:
            size = (self.batch, self.kv_heads, stage.width * self.block, self.dim)
            dk = dv = torch.zeros(size, dtype=self.dtype, device=self.device)
        both = torch.unflatten(torch.stack((dk, dv)), 3, (stage.width, self.block))
        if self._together(stage):
            out = both.permute(3, 2, 0, 1, 4, 5).contiguous()
        else:
            out = both.permute(2, 3, 0, 1, 4, 5).flatten(0, 1).index_select(0, stage.slots)
        received = self._empty(sum(stage.send_splits), tuple(out.shape[1:]), out.dtype)
        works = [self._all_to_all(received, out, stage.send_splits, stage.recv_splits)]
        return _Arriving(works, received, None, (out,))

    def add_back(self, arriving: _Arriving, stage: Stage, into: Tensor) -> None:
        """Adds what came back of a stage to ``into``, like :meth:`zeros`: in fp32, a rank after the other, so
        that the sum is the same bits every time."""
        with self.ranks.watched("the exchange of tiles"):
            for work in arriving.works:
                work.wait()
        start = 0
        for count in stage.send_splits:
            part = slice(start, start + count)
            start += count
            if not count:
                continue
            tiles, places = arriving.tiles[part].to(into.dtype), stage.send_places[part]
            if self._together(stage):
                into.index_add_(0, places, tiles)
            else:
                # A rank asks for a unit once, so no place occurs twice.
                heads = stage.send_units[part, 1]
                into.index_put_((places, heads), into[places, heads] + tiles)

    def add_own(self, into: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds the gradients of this rank's own keys and values ``[B, Hkv, n, D]``."""
        both = F.pad(torch.stack((dk, dv)), (0, 0, 0, -dk.shape[2] % self.block))
        into += torch.unflatten(both, 3, (-1, self.block)).permute(3, 2, 0, 1, 4, 5)

    def packed(self, total: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """``[B, Hkv, tokens, D]`` twice, from what :meth:`zeros` made."""
        dk, dv = total.permute(2, 3, 1, 0, 4, 5).flatten(3, 4)[:, :, :, :tokens].unbind(0)
        return dk, dv

    def zeros(self) -> Tensor:
        """``[tiles, Hkv, 2, B, block, D]`` in fp32 (float64 for float64 inputs)."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        size = (self.count, self.kv_heads, 2, self.batch, self.block, self.dim)
        return torch.zeros(size, dtype=wide, device=self.device)

    def _together(self, stage: Stage) -> bool:
        return self.kv_heads == 1 or stage.tiles.shape[0] == 1

    def _move(self, out: Tensor, unit: tuple[int, ...], stage: Stage) -> tuple[Tensor, list[dist.Work]]:
        received = self._empty(sum(stage.recv_splits), unit, out.dtype)
        return received, [self._all_to_all(received, out, stage.recv_splits, stage.send_splits)]

    def _empty(self, count: int, unit: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty((count, *unit), dtype=dtype, device=self.device)

    def _all_to_all(
        self, received: Tensor, out: Tensor, recv_splits: list[int], send_splits: list[int]
    ) -> dist.Work:
        with self.ranks.watched("the exchange of tiles"):
            work: dist.Work | None = dist.all_to_all_single(
                received, out.contiguous(), recv_splits, send_splits, group=self.ranks.group, async_op=True
            )
        assert work is not None
        return work
