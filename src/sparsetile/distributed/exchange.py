"""Exchange: moves the key-value tiles of a plan's stages between ranks, and their gradients back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sparsetile.distributed.pool import Lease, pool_of
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
    """Payloads on their way, and the memory of what is sent and received."""

    works: list[dist.Work]
    tiles: Tensor
    mask: Tensor | None
    leases: tuple[Lease, ...]

    def release(self) -> None:
        """To be called when all of it has been sent, received and read."""
        for lease in self.leases:
            lease.release()


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
            padded = F.pad(mask, (0, rest), value=True).view(torch.uint8)
            self.mask = torch.unflatten(padded, 1, (-1, block)).transpose(0, 1)
        self._tiles: Lease | None = None

    def start(self, number: int) -> _Arriving | None:
        """Begins the exchange of a stage; None past the last one. Collective."""
        if number >= len(self.plan.stages):
            if self._tiles is not None:
                self._tiles.release()
                self._tiles = None
            return None
        stage = self.plan.stages[number]
        shape = (self.kv_heads,) if self._together(stage) else ()
        unit = (*shape, 2, self.batch, self.block, self.dim)
        out = self._lease(stage.send_places.shape[0], unit)
        if self._together(stage):
            torch.index_select(self._laid_out(), 0, stage.send_places, out=out.tensor)
        else:
            of_heads = stage.send_places * self.kv_heads + stage.send_units[:, 1]
            torch.index_select(self._laid_out().flatten(0, 1), 0, of_heads, out=out.tensor)
        received = self._lease(sum(stage.recv_splits), unit)
        works = [self._all_to_all(received.tensor, out.tensor, stage.recv_splits, stage.send_splits)]
        mask: Tensor | None = None
        leases = [out, received]
        if self.mask is not None:
            marks = self._lease(stage.send_places.shape[0], (self.batch, self.block), torch.uint8)
            torch.index_select(self.mask, 0, stage.send_places, out=marks.tensor)
            marked = self._lease(sum(stage.recv_splits), (self.batch, self.block), torch.uint8)
            works.append(self._all_to_all(marked.tensor, marks.tensor, stage.recv_splits, stage.send_splits))
            mask = marked.tensor
            leases += [marks, marked]
        return _Arriving(works, received.tensor, mask, tuple(leases))

    def _laid_out(self) -> Tensor:
        """``[tiles, Hkv, 2, B, block, D]``: a copy, made when something is first sent, and given back when
        the last stage has been. Backward over kept tiles sends none of them."""
        if self._tiles is None:
            self._tiles = self._lease(self.count, (self.kv_heads, 2, self.batch, self.block, self.dim))
            whole = self.k.shape[2] // self.block
            for side, x in enumerate((self.k, self.v)):
                into = self._tiles.tensor[:, :, side]
                full = torch.unflatten(x[:, :, : whole * self.block], 2, (whole, self.block))
                into[:whole] = full.permute(2, 1, 0, 3, 4)
                rest = x.shape[2] - whole * self.block
                if rest:
                    into[whole, ..., :rest, :] = x[:, :, whole * self.block :].transpose(0, 1)
                    into[whole, ..., rest:, :] = 0.0
        return self._tiles.tensor

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
        # A copy even of a single tile: what has arrived is memory to give back.
        lines = lines.clone(memory_format=torch.contiguous_format)
        arriving.release()
        k, v = lines.flatten(3, 4).unbind(0)
        return Buffers(k, v, mask, stage.tiles)

    def send_back(self, stage: Stage, dk: Tensor | None, dv: Tensor | None) -> _Arriving:
        """Begins the way back of a stage's gradients (None: this rank has none). Collective."""
        if dk is None or dv is None:
            size = (self.batch, self.kv_heads, stage.width * self.block, self.dim)
            dk = dv = torch.zeros(size, dtype=self.dtype, device=self.device)
        both = torch.unflatten(torch.stack((dk, dv)), 3, (stage.width, self.block))
        unit: tuple[int, ...] = (2, self.batch, self.block, self.dim)
        if self._together(stage):
            unit = (self.kv_heads, *unit)
            out = self._lease(stage.width, unit)
            out.tensor.copy_(both.permute(3, 2, 0, 1, 4, 5))
        else:
            out = self._lease(stage.slots.shape[0], unit)
            lines = both.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
            torch.index_select(lines, 0, stage.slots, out=out.tensor)
        received = self._lease(sum(stage.send_splits), unit)
        works = [self._all_to_all(received.tensor, out.tensor, stage.send_splits, stage.recv_splits)]
        return _Arriving(works, received.tensor, None, (out, received))

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
        arriving.release()

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

    def _lease(self, count: int, unit: tuple[int, ...], dtype: torch.dtype | None = None) -> Lease:
        return pool_of(self.device).lease((count, *unit), self.dtype if dtype is None else dtype)

    def _all_to_all(
        self, received: Tensor, out: Tensor, recv_splits: list[int], send_splits: list[int]
    ) -> dist.Work:
        with self.ranks.watched("the exchange of tiles"):
            work: dist.Work | None = dist.all_to_all_single(
                received, out, recv_splits, send_splits, group=self.ranks.group, async_op=True
            )
        assert work is not None
        return work
