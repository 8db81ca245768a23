"""RankPlan: one rank's share of a plan, stage by stage: what it receives, sends, passes on and computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.build import Rows

if TYPE_CHECKING:
    from sparsetile.distributed.plan import Plan


@dataclass(frozen=True, eq=False)
class Forward:
    """The second exchange of a stage, within nodes: what one rank of a node received for others of it too.

    Attributes:
        recv_units, recv_splits, slots: as in :class:`Stage`; these units follow those that came first.
        send_units: int64 ``[m, 2]``: (tile, kv head) of each unit to pass on, by destination rank, then in
            the order in which that rank receives.
        send_places: int64 ``[m]``: the place of each among the units that came first.
        send_splits: units to each rank.
    """

    recv_units: Tensor
    recv_splits: list[int]
    slots: Tensor
    send_units: Tensor
    send_places: Tensor
    send_splits: list[int]

    def to(self, device: torch.device | str) -> Forward:
        names = ("recv_units", "slots", "send_units", "send_places")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, eq=False)
class Stage:
    """What one rank receives and sends in one exchange, and the layout of the attention over it.

    The buffer of received keys (and of values) is ``[groups, width]`` tiles of whole ``block`` tokens, where
    ``groups`` is 1 if units hold all kv heads, else ``kv_heads``. The short last tile of the sequence takes a
    whole tile of it; the layout's masks leave out what is past its end.

    Attributes:
        recv_units: int64 ``[n, 2]``: (tile, kv head) of each received unit in the order of arrival: by source
            rank, then kv head, then tile. The kv head is 0 if units hold all heads.
        recv_splits: units from each rank, ``ranks`` integers.
        slots: int64 ``[n]``: the buffer tile of each received unit, ``head · width + column``. If units hold
            all kv heads it is 0, 1, …: units lie as they arrive.
        tiles: int64 ``[groups, width]``: the tile of the sequence in each place of the buffer, −1 in places
            that stay unused (heads with fewer units than the head with most).
        send_units: int64 ``[m, 2]``: (tile, kv head) of each unit to send, by destination rank, then in the
            order in which that rank receives.
        send_places: int64 ``[m]``: the place of each of these tiles among this rank's own.
        send_splits: units to each rank.
        forward: the second exchange, or None, on all ranks alike, if nothing is passed on in this stage.
        layout: this rank's query tiles × the buffer's columns: ``q_len`` the rank's tokens, ``k_len =
            width · block``. None if the rank has no tokens or receives nothing in this stage.
        edges: int64 ``[layout.nnz]``: the place of each of its tiles in :attr:`RankPlan.edges`.
    """

    recv_units: Tensor
    recv_splits: list[int]
    slots: Tensor
    tiles: Tensor
    send_units: Tensor
    send_places: Tensor
    send_splits: list[int]
    forward: Forward | None
    layout: BlockLayout | None
    edges: Tensor

    @property
    def width(self) -> int:
        """Tiles of the buffer for each kv head (or for all together)."""
        return self.tiles.shape[1]

    def to(self, device: torch.device | str) -> Stage:
        """This stage with its tensors on ``device``; the splits are host integers anyway."""
        names = ("recv_units", "slots", "tiles", "send_units", "send_places", "edges")
        moved = {name: getattr(self, name).to(device) for name in names}
        forward = None if self.forward is None else self.forward.to(device)
        layout = None if self.layout is None else self.layout.to(device)
        return replace(self, **moved, forward=forward, layout=layout)


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does.

    Attributes:
        rank: which.
        tiles: int64: its own tiles, in the order in which it keeps them.
        tokens: its tokens.
        edges: int64: where in the global layout's ``indices`` each tile of its rows stands, in the order
            (query head, own query tile, key tile).
        own: its query tiles × its own key tiles (``q_len = k_len = tokens``); None if it has no tokens.
        own_edges: int64 ``[own.nnz]``: the place of each of these tiles in ``edges``.
        stages: as many as :attr:`Plan.stages` on every rank; some may be empty.
    """

    rank: int
    tiles: Tensor
    tokens: int
    edges: Tensor
    own: BlockLayout | None
    own_edges: Tensor
    stages: tuple[Stage, ...]

    def to(self, device: torch.device | str) -> RankPlan:
        """This plan with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("tiles", "edges", "own_edges")}
        own = None if self.own is None else self.own.to(device)
        return replace(self, **moved, own=own, stages=tuple(stage.to(device) for stage in self.stages))


@dataclass(frozen=True, eq=False)
class _Lying:
    """Where the key tiles that a rank's rows attend lie: tables over (kv head, tile).

    Attributes:
        stage: the stage that brings it, −1 if it is the rank's own (or not needed).
        column: its column in the buffer of that stage; among the rank's own tiles, its place.
    """

    stage: Tensor
    column: Tensor


def rank_plan(plan: Plan, rank: int) -> RankPlan:
    """The share of one rank."""
    sharding, layout = plan.sharding, plan.layout
    tiles, tokens = sharding.tiles_of(rank), sharding.tokens_of(rank)
    received = plan.received(rank)
    stage, head, tile = plan.stage[received], plan.head[received], plan.tile[received]
    # Units are in order of arrival, so places count through both exchanges of a stage.
    place = places(stage * plan.groups + head, plan.stages * plan.groups)
    lying = _Lying(
        torch.full((plan.groups * sharding.tiles,), -1), sharding.local_index().repeat(plan.groups)
    )
    lying.stage[head * sharding.tiles + tile] = stage
    lying.column[head * sharding.tiles + tile] = place

    edges, row = rows_of(layout, tiles)
    column = layout.indices.index_select(0, edges).long()
    # Query heads of a layout of their own follow one another, group_size to a kv head.
    share = max(1, tiles.numel()) * (1 if plan.heads_together else plan.group_size)
    at = row // share * sharding.tiles + column
    stage_at, column_at = lying.stage[at], lying.column[at]

    def local(number: int, k_len: int) -> tuple[BlockLayout | None, Tensor]:
        which = (stage_at == number).nonzero().flatten()
        if not tokens or not k_len:
            return None, which
        columns = -(-k_len // sharding.block)
        which = which[(row[which] * columns + column_at[which]).argsort(stable=True)]
        mask_ids = layout.mask_ids.index_select(0, edges[which])
        rows = Rows(row[which], column_at[which], mask_ids, layout.masks)
        block = sharding.block
        return BlockLayout._of(rows, tokens, k_len, block, block, heads=layout.heads), which

    own, own_edges = local(-1, tokens)
    held = sharding.local_index().repeat(plan.groups)
    stages = []
    for number in range(plan.stages):
        here = stage == number
        width = int(place[here].amax()) + 1 if here.any() else 0
        buffer = torch.full((plan.groups * width,), -1)
        buffer[head[here] * width + place[here]] = tile[here]
        local_layout, local_edges = local(number, width * sharding.block)
        first = _exchange(plan, rank, number, 0, lying, width, held)
        second = None
        if plan.forwards[number]:
            # What came first is this rank's to pass on, and lies in the order of arrival.
            came, of_head = first.recv_units.unbind(1)
            held[of_head * sharding.tiles + came] = torch.arange(came.numel())
            second = _exchange(plan, rank, number, 1, lying, width, held)
        stages.append(
            Stage(
                recv_units=first.recv_units,
                recv_splits=first.recv_splits,
                slots=first.slots,
                tiles=buffer.reshape(plan.groups, width),
                send_units=first.send_units,
                send_places=first.send_places,
                send_splits=first.send_splits,
                forward=second,
                layout=local_layout,
                edges=local_edges,
            )
        )
    return RankPlan(rank, tiles, tokens, edges, own, own_edges, tuple(stages))


def _exchange(
    plan: Plan, rank: int, number: int, hop: int, lying: _Lying, width: int, held: Tensor
) -> Forward:
    """The units of one of the two exchanges of a stage; ``held``, over (kv head, tile), says where what this
    rank sends lies."""
    got, sent = plan.units_between(rank, number, hop)
    ranks, tiles = plan.sharding.ranks, plan.sharding.tiles
    tile, head = plan.tile[got], plan.head[got]
    return Forward(
        recv_units=torch.stack((tile, head), 1),
        recv_splits=torch.bincount(plan.sender[got], minlength=ranks).tolist(),
        slots=head * width + lying.column[head * tiles + tile],
        send_units=torch.stack((plan.tile[sent], plan.head[sent]), 1),
        send_places=held[plan.head[sent] * tiles + plan.tile[sent]],
        send_splits=torch.bincount(plan.destination[sent], minlength=ranks).tolist(),
    )


def rows_of(layout: BlockLayout, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The edges of the rows of these query tiles, in the order (head, query tile, key tile), and the row of
    each, counted as ``head · len(tiles) + place in tiles``."""
    rows = (torch.arange(layout.heads)[:, None] * layout.q_blocks + tiles).flatten()
    first = layout.indptr[:-1].index_select(0, rows).long()
    counts = layout.row_counts().index_select(0, rows).long()
    total = int(counts.sum())
    row = torch.arange(rows.numel()).repeat_interleave(counts, output_size=total)
    before = counts.cumsum(0) - counts
    return torch.arange(total) + (first - before).index_select(0, row), row


def places(line: Tensor, lines: int) -> Tensor:
    """The place of each entry among those of its line, in order."""
    order = line.argsort(stable=True)
    place = torch.empty_like(line)
    place[order] = torch.arange(line.numel()) - starts_of(line, lines)[line[order]]
    return place


def starts_of(line: Tensor, lines: int) -> Tensor:
    """int64 ``[lines + 1]``: where each line starts once entries are sorted by line."""
    starts = torch.zeros(lines + 1, dtype=torch.int64, device=line.device)
    torch.cumsum(torch.bincount(line, minlength=lines), 0, out=starts[1:])
    return starts
