"""Exchange: moves the key-value tiles of a plan's stages between ranks, and their gradients back."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Units on their way: keys and values, and the mask if there is one; what is sent must live until it is
    there. The first exchange fills the first places, the second one the rest."""

    works: list[dist.Work]
    received: list[Tensor]
    sent: list[Tensor]


@dataclass(frozen=True, eq=False)
class _Returning:
    """Gradients of a stage on their way back.

    Attributes:
        first: this rank's own, of the units that came first, while those of the units that it passed on come
            back within the node; None once their sum is on its way to the owners.
    """

    stage: Stage
    work: dist.Work
    received: Tensor
    sent: Tensor
    first: Tensor | None


class Exchange:
    """What one rank sends of its keys and values, stage by stage.

    A unit on the wire is ``[2, B, Hkv, block, D]`` (keys and values of all heads), or without Hkv if units
    are of one kv head; the short last tile is filled up with zeros. The mask of its tokens, ``[B, block]``,
    goes beside each, of one kv head or of all: a byte a token, where the keys are hundreds.

    Where the plan knows nodes, a stage has two exchanges: units come from their owners, one copy for each
    node, and are passed on within it. Their gradients go the same ways back: first to the rank that passed
    the unit on, which adds them to its own, then one sum to the owner.

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
        self._returning: list[_Returning] = []
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
        """Begins the first exchange of a stage; None past the last one. Collective."""
        if number >= len(self.plan.stages):
            return None
        stage = self.plan.stages[number]
        if self._together(stage):
            sent = [self.tiles.index_select(0, stage.send_places)]
        else:
            sent = [self.tiles[stage.send_places, stage.send_units[:, 1]]]
        if self.mask is not None:
            sent.append(self.mask.index_select(0, stage.send_places).to(torch.uint8))
        units = stage.slots.numel() + (0 if stage.forward is None else stage.forward.slots.numel())
        received = [self._empty(units, x) for x in sent]
        works = [
            self._all_to_all(room[: stage.slots.numel()], x, stage.recv_splits, stage.send_splits)
            for room, x in zip(received, sent, strict=True)
        ]
        return _Arriving(works, received, sent)

    def advance(self, arriving: _Arriving | None, number: int) -> tuple[Buffers, _Arriving | None]:
        """Waits for a stage; returns its buffer, and the stage after it on its way. Collective."""
        assert arriving is not None
        stage = self.plan.stages[number]
        passing = self._pass_on(arriving, stage)
        # Before what is passed on is waited for: the next stage need not.
        following = self.start(number + 1)
        return self.finish(passing, stage), following

    def _pass_on(self, arriving: _Arriving, stage: Stage) -> _Arriving:
        """Begins the second exchange of a stage, if it has one, once the first is over. Collective."""
        self._wait(arriving.works)
        hop = stage.forward
        if hop is None:
            return _Arriving([], arriving.received, [])
        sent = [x.index_select(0, hop.send_places) for x in arriving.received]
        works = [
            self._all_to_all(room[stage.slots.numel() :], x, hop.recv_splits, hop.send_splits)
            for room, x in zip(arriving.received, sent, strict=True)
        ]
        return _Arriving(works, arriving.received, sent)

    def finish(self, arriving: _Arriving, stage: Stage) -> Buffers:
        """Waits for a stage's last units and lays them all out as its buffer."""
        self._wait(arriving.works)
        tiles, *marks = arriving.received
        mask = None
        if self._together(stage):
            # [width, Hkv, 2, B, block, D]
            lines = tiles.permute(2, 3, 1, 0, 4, 5)
            if marks:
                mask = marks[0].transpose(0, 1).flatten(1) != 0
        else:
            slots = stage.slots if stage.forward is None else torch.cat((stage.slots, stage.forward.slots))
            buffer = tiles.new_zeros((stage.tiles.numel(), *tiles.shape[1:]))
            buffer[slots] = tiles
            lines = torch.unflatten(buffer, 0, stage.tiles.shape).permute(2, 3, 0, 1, 4, 5)
            if marks:
                each = marks[0].new_ones((stage.tiles.numel(), self.batch, self.block))
                each[slots] = marks[0]
                mask = torch.unflatten(each, 0, stage.tiles.shape).permute(2, 0, 1, 3).flatten(2) != 0
        k, v = lines.reshape(2, self.batch, self.kv_heads, stage.width * self.block, self.dim).unbind(0)
        return Buffers(k, v, mask, stage.tiles)

    def send_back(self, stage: Stage, dk: Tensor | None, dv: Tensor | None) -> None:
        """Begins the way back of the next stage's gradients (None: this rank has none). Collective."""
        self.send_on()
        if dk is None or dv is None:
            size = (self.batch, self.kv_heads, stage.width * self.block, self.dim)
            dk = dv = torch.zeros(size, dtype=self.dtype, device=self.device)
        both = torch.unflatten(torch.stack((dk, dv)), 3, (stage.width, self.block))
        if self._together(stage):
            # Units lie as they came.
            units = both.permute(3, 2, 0, 1, 4, 5).contiguous()
            first = units[: stage.slots.numel()]
        else:
            units = both.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
            first = units.index_select(0, stage.slots)
        hop = stage.forward
        if hop is None:
            self._send_to_owners(stage, first)
            return
        sent = units.index_select(0, hop.slots)
        received = self._empty(hop.send_places.numel(), sent)
        work = self._all_to_all(received, sent, hop.send_splits, hop.recv_splits)
        self._returning.append(_Returning(stage, work, received, sent, first))

    def send_on(self) -> None:
        """Sends the owners what has come back within the node of the last stage, and this rank's own, as one
        sum: added in fp32, a rank after the other. Nothing if that is done. Collective."""
        if not self._returning or self._returning[-1].first is None:
            return
        back = self._returning.pop()
        hop = back.stage.forward
        assert hop is not None and back.first is not None
        total = back.first.to(self._wide)
        self._wait([back.work])
        for part in _parts(hop.send_splits):
            total.index_add_(0, hop.send_places[part], back.received[part].to(total.dtype))
        self._send_to_owners(back.stage, total.to(self.dtype))

    def _send_to_owners(self, stage: Stage, units: Tensor) -> None:
        received = self._empty(stage.send_places.numel(), units)
        work = self._all_to_all(received, units, stage.send_splits, stage.recv_splits)
        self._returning.append(_Returning(stage, work, received, units, None))

    def add_back(self, into: Tensor) -> None:
        """Adds what came back of all stages to ``into``, like :meth:`zeros`: in fp32, a rank after the other,
        so that the sum is the same bits every time."""
        for back in self._returning:
            stage = back.stage
            self._wait([back.work])
            for part in _parts(stage.send_splits):
                tiles, places = back.received[part].to(into.dtype), stage.send_places[part]
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
        size = (self.count, self.kv_heads, 2, self.batch, self.block, self.dim)
        return torch.zeros(size, dtype=self._wide, device=self.device)

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _together(self, stage: Stage) -> bool:
        return self.kv_heads == 1 or stage.tiles.shape[0] == 1

    def _empty(self, units: int, like: Tensor) -> Tensor:
        """Room for as many units."""
        return like.new_empty((units, *like.shape[1:]))

    def _wait(self, works: list[dist.Work]) -> None:
        with self.ranks.watched("the exchange of tiles"):
            for work in works:
                work.wait()

    def _all_to_all(
        self, received: Tensor, out: Tensor, recv_splits: list[int], send_splits: list[int]
    ) -> dist.Work:
        with self.ranks.watched("the exchange of tiles"):
            work: dist.Work | None = dist.all_to_all_single(
                received, out.contiguous(), recv_splits, send_splits, group=self.ranks.group, async_op=True
            )
        assert work is not None
        return work


def _parts(splits: list[int]) -> Iterator[slice]:
    """The units of each rank that has some."""
    start = 0
    for count in splits:
        if count:
            yield slice(start, start + count)
        start += count
