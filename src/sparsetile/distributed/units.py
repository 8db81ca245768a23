"""Units: who needs which key tiles of others, who sends them, and in which stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.distributed.rank_plan import places, rows_of, starts_of
from sparsetile.distributed.sharding import Sharding
from sparsetile.layout.blocks import BlockLayout

_LEAST_MARKS = 1 << 26


@dataclass(frozen=True, eq=False)
class Units:
    """All units, ascending by (destination, kv head, tile).

    ``node`` is the number of ranks that share what comes from elsewhere: 1 if there is one node only.
    """

    sharding: Sharding
    groups: int
    node: int
    destination: Tensor
    source: Tensor
    head: Tensor
    tile: Tensor

    def senders(self) -> Tensor:
        """Who sends each unit: its owner, or the rank of the destination's node that receives it for all.

        That is one of those that need it, another one for each unit in turn.
        """
        if self.node == 1:
            return self.source
        home = self.destination // self.node
        crossing = (home != self.source // self.node).nonzero().flatten()
        key = (home[crossing] * self.groups + self.head[crossing]) * self.sharding.tiles + self.tile[crossing]
        crossing = crossing[key.argsort(stable=True)]
        _, copy, counts = torch.unique(key, return_inverse=True, return_counts=True)
        copy = copy.sort().values
        destination = self.destination[crossing]
        chosen = places(copy, counts.numel()) == copy % counts[copy]
        relay = destination[chosen][copy]
        sender = self.source.clone()
        sender[crossing] = torch.where(relay == destination, sender[crossing], relay)
        return sender

    def in_stages(self, most: int) -> tuple[Tensor, int]:
        """The stage of each unit, and how many there are; no rank has more than ``most`` tiles of a kv head
        in one.

        Each line (rank, kv head) takes its units in the order of their distance, and the lines of a node stop
        a stage at the same unit: where the first of them is full.
        """
        ranks, lines = self.sharding.ranks, self.sharding.ranks * self.groups
        last = (self.destination // self.node + 1) * self.node - 1
        behind = (last - self.source).remainder(ranks)
        span = ranks * self.sharding.tiles
        line = self.destination * self.groups + self.head
        key, order = (line * span + behind * self.sharding.tiles + self.tile).sort()
        base = torch.arange(lines) * span
        party = torch.arange(lines) // (self.groups * self.node) * self.groups
        party += torch.arange(lines) % self.groups
        starts = starts_of(line, lines)
        now, ends = starts[:-1], starts[1:]
        counts = []
        while bool((now < ends).any()):
            full = now + most
            stop = torch.where(full < ends, key[full.clamp(max=key.numel() - 1)] - base, span)
            common = torch.full((lines,), span).scatter_reduce_(0, party, stop, "amin")
            after = torch.searchsorted(key, base + common[party])
            counts.append(after - now)
            now = after
        numbers = torch.arange(len(counts)).repeat(lines)
        stage = torch.empty_like(self.tile)
        stage[order] = numbers.repeat_interleave(torch.stack(counts, 1).flatten(), output_size=key.numel())
        return stage, len(counts)


def needed(layout: BlockLayout, sharding: Sharding, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(destination, kv head, tile) of every unit that travels, ascending in that order.

    Attended units are marked in a table of (rank, kv head, tile), for as many ranks at a time as keep the
    table within the size of the layout.
    """
    ranks, tiles = sharding.ranks, sharding.tiles
    owner = sharding.tile_owner()
    at_once = min(ranks, max(1, max(_LEAST_MARKS, 8 * layout.nnz) // (groups * tiles)))
    found = []
    for first in range(0, ranks, at_once):
        some = torch.arange(first, min(first + at_once, ranks))
        rows = torch.isin(owner, some).nonzero().flatten() if at_once < ranks else torch.arange(tiles)
        edges, row = rows_of(layout, rows)
        group = row // max(1, rows.numel() * (layout.heads // groups))
        rank = owner[rows[row % rows.numel()]] - first if rows.numel() else row
        marks = torch.zeros(some.numel() * groups * tiles, dtype=torch.bool)
        marks[(rank * groups + group) * tiles + layout.indices.index_select(0, edges)] = True
        marked = marks.view(-1, groups, tiles)
        # What a rank has need not travel.
        own = (owner >= first) & (owner < first + some.numel())
        mine = own.nonzero().flatten()
        marked[owner[mine] - first, :, mine] = False
        rank, head, tile = marked.nonzero().unbind(1)
        found.append((rank + first, head, tile))
    destination, head, tile = (torch.cat(parts) for parts in zip(*found, strict=True))
    return destination, head, tile
