"""Plan: which key-value tiles travel from which rank to which, known before a byte moves.

A *unit* is what is sent or not sent: one key tile of one kv head, or of all kv heads at once where all heads
share the layout. A rank receives the units that its rows attend and that lie elsewhere, each once, nothing
else. Where the memory for them is bounded they come in stages; the attention over one stage is an ordinary
call with a layout whose columns are the stage's buffer. Between nodes one copy of a unit travels: one of the
ranks that need it receives it and passes it on to the others of its node.

Everything here is a pure function of the layout and the sharding, without communication, and so the same on
every rank; :attr:`Plan.hash` is what ranks compare to be sure of it. Memory is O(tiles + units), and so is
time, but for one byte written for each (rank, kv head, key tile).
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsetile.distributed.rank_plan import Forward, RankPlan, Stage, places, rank_plan, rows_of, starts_of
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, LayoutError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns.base import Pattern

__all__ = ["Forward", "Plan", "RankPlan", "Stage", "digest_of", "make_plan"]

_VERSION = 2  # of what a plan means: ranks that mean different things must not exchange
_LEAST_MARKS = 1 << 26


@dataclass(frozen=True, eq=False)
class Plan:
    """Every unit that travels, in the order (destination, stage, hop, sender, kv head, tile).

    Attributes:
        layout: the layout of the whole sequence, on the CPU.
        sharding: where positions live.
        kv_heads, group_size: key-value heads, and query heads that share each.
        ranks_per_node: ranks ``0 … n − 1`` are on the first node, and so on; None: one node.
        max_remote_tokens: the most tokens of a stage's buffer on any rank, None: no bound.
        starts: int64 ``[ranks + 1]``: where the units of each destination start.
        stage, source, sender, head, tile: int64 ``[units]``. ``source`` owns the tile. ``sender`` is the
            source too (hop 0), or another rank of the destination's node that received the unit in the same
            stage (hop 1).
        stages: how many stages every rank goes through.
    """

    layout: BlockLayout
    sharding: Sharding
    kv_heads: int
    group_size: int
    ranks_per_node: int | None
    max_remote_tokens: int | None
    starts: Tensor
    stage: Tensor
    source: Tensor
    sender: Tensor
    head: Tensor
    tile: Tensor
    stages: int

    @classmethod
    def from_pattern(
        cls,
        pattern: Pattern,
        sharding: Sharding,
        *,
        kv_heads: int = 1,
        group_size: int = 1,
        ranks_per_node: int | None = None,
        max_remote_tokens: int | None = None,
    ) -> Plan:
        """The plan of a pattern over ``sharding.length`` tokens; see :func:`make_plan`.

        Raises:
            PatternError: the pattern does not fit the length or the tiles.
        """
        heads = _count("kv_heads", kv_heads) * _count("group_size", group_size)
        layout = BlockLayout.from_pattern(
            pattern, sharding.length, block_size=sharding.block, device="cpu", heads=heads
        )
        return make_plan(
            layout,
            sharding,
            kv_heads=kv_heads,
            group_size=group_size,
            ranks_per_node=ranks_per_node,
            max_remote_tokens=max_remote_tokens,
        )

    @property
    def heads_together(self) -> bool:
        """Whether a unit holds all kv heads of its tile."""
        return self.layout.heads == 1

    @property
    def groups(self) -> int:
        """kv heads that are told apart: 1 if units hold all of them."""
        return 1 if self.heads_together else self.kv_heads

    @property
    def units(self) -> int:
        """Units that travel."""
        return self.tile.numel()

    @cached_property
    def destination(self) -> Tensor:
        """int64 ``[units]``."""
        return torch.arange(self.sharding.ranks, device="cpu").repeat_interleave(
            self.starts.diff(), output_size=self.units
        )

    @cached_property
    def hash(self) -> str:
        """Hex digest of all that ranks must agree on: the layout with its masks, the sharding, heads, nodes
        and stages, and the meaning of plans itself."""
        layout = self.layout
        digest = hashlib.blake2b(digest_size=16)
        numbers = (digest_of(layout), self.sharding, self.kv_heads, self.group_size, self.ranks_per_node)
        digest.update(repr((_VERSION, *numbers, self.max_remote_tokens, self.units)).encode())
        return digest.hexdigest()

    @cached_property
    def forwards(self) -> list[bool]:
        """Whether anything is passed on, for each stage."""
        return torch.bincount(self.stage[self.sender != self.source], minlength=self.stages).bool().tolist()

    def recv_counts(self, rank: int) -> Tensor:
        """int64 ``[stages, ranks]``: units that ``rank`` receives from each, at first or second hand."""
        mine = self.received(rank)
        return _counts(self.stage[mine], self.sender[mine], self.stages, self.sharding.ranks)

    def send_counts(self, rank: int) -> Tensor:
        """int64 ``[stages, ranks]``: units that ``rank`` sends or passes on to each."""
        mine = self._sent(rank)
        return _counts(self.stage[mine], self.destination[mine], self.stages, self.sharding.ranks)

    def for_rank(self, rank: int) -> RankPlan:
        """What ``rank`` sends, receives and computes."""
        with torch.device("cpu"):
            return rank_plan(self, rank)

    def received(self, rank: int) -> slice:
        """The units that a rank receives."""
        self.sharding._check(rank)
        return slice(int(self.starts[rank]), int(self.starts[rank + 1]))

    def units_between(self, rank: int, stage: int, hop: int) -> tuple[Tensor, Tensor]:
        """The numbers of the units that a rank receives and of those that it sends in one exchange."""
        mine = self.received(rank)
        chosen = self._of(self.stage[mine], self.sender[mine], self.source[mine], stage, hop) + mine.start
        sent = self._sent(rank)
        return chosen, sent[self._of(self.stage[sent], self.sender[sent], self.source[sent], stage, hop)]

    @staticmethod
    def _of(stages: Tensor, sender: Tensor, source: Tensor, stage: int, hop: int) -> Tensor:
        return ((stages == stage) & ((sender != source) == bool(hop))).nonzero().flatten()

    def _sent(self, rank: int) -> Tensor:
        """The numbers of the units that a rank sends, ascending."""
        self.sharding._check(rank)
        order, starts = self._by_sender
        return order[int(starts[rank]) : int(starts[rank + 1])]

    @cached_property
    def _by_sender(self) -> tuple[Tensor, Tensor]:
        return self.sender.argsort(stable=True), starts_of(self.sender, self.sharding.ranks)


def make_plan(
    layout: BlockLayout,
    sharding: Sharding,
    *,
    kv_heads: int,
    group_size: int = 1,
    ranks_per_node: int | None = None,
    max_remote_tokens: int | None = None,
) -> Plan:
    """The plan of a layout.

    Args:
        layout: of the whole sequence against itself, on the CPU: square tiles of ``sharding.block`` tokens,
            batch 1, and 1 head (shared by all) or ``kv_heads · group_size`` heads, where query head ``h``
            reads kv head ``h // group_size``.
        sharding: where positions live.
        kv_heads: key-value heads.
        group_size: query heads that share one.
        ranks_per_node: how many consecutive ranks one node holds; None: all. A unit that several ranks of
            another node need travels there once.
        max_remote_tokens: the most tokens that a rank's buffer of one stage holds (of each kv head); at least
            one tile. Stages are filled with the units of the nearest ranks behind first, so that in one stage
            not everyone asks the same rank. The ranks of a node receive a unit in the same stage.

    Raises:
        LayoutError: the layout is not as above.
        ArgumentError: a number is not as above.
    """
    _count("kv_heads", kv_heads)
    _count("group_size", group_size)
    _check_layout(layout, sharding, kv_heads * group_size)
    if ranks_per_node is not None and sharding.ranks % _count("ranks_per_node", ranks_per_node):
        raise ArgumentError(
            explain(
                "ranks_per_node",
                expected=f"a divisor of {sharding.ranks} ranks",
                got=ranks_per_node,
                fix="Every node holds as many ranks.",
            )
        )
    if max_remote_tokens is not None and _count("max_remote_tokens", max_remote_tokens) < sharding.block:
        raise ArgumentError(
            explain(
                "max_remote_tokens",
                expected=f"at least one tile, {sharding.block} tokens",
                got=max_remote_tokens,
                fix="Tiles are not divided on their way; take smaller tiles or more tokens.",
            )
        )
    with torch.device("cpu"):
        groups = 1 if layout.heads == 1 else kv_heads
        destination, head, tile = _needed(layout, sharding, groups)
        source = sharding.tile_owner()[tile]
        node = 1 if ranks_per_node in (None, sharding.ranks) else _count("ranks_per_node", ranks_per_node)
        travel = _Travel(sharding, groups, node, destination, source, head, tile)
        sender = travel.senders()
        stage, stages = torch.zeros_like(tile), int(tile.numel() > 0)
        if max_remote_tokens is not None and stages:
            stage, stages = travel.in_stages(max_remote_tokens // sharding.block)
        hop = (sender != source).long()
        order = ((destination * stages + stage) * 2 + hop) * sharding.ranks + sender
        order = order.argsort(stable=True)
        return Plan(
            layout=layout,
            sharding=sharding,
            kv_heads=kv_heads,
            group_size=group_size,
            ranks_per_node=ranks_per_node,
            max_remote_tokens=max_remote_tokens,
            starts=starts_of(destination, sharding.ranks),
            stage=stage[order],
            source=source[order],
            sender=sender[order],
            head=head[order],
            tile=tile[order],
            stages=stages,
        )


@dataclass(frozen=True, eq=False)
class _Travel:
    """The units of all destinations, ascending by (destination, kv head, tile), before they are ordered.

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


def _needed(layout: BlockLayout, sharding: Sharding, groups: int) -> tuple[Tensor, Tensor, Tensor]:
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


def _counts(stage: Tensor, rank: Tensor, stages: int, ranks: int) -> Tensor:
    return torch.bincount(stage * ranks + rank, minlength=stages * ranks).reshape(stages, ranks)


def digest_of(layout: BlockLayout) -> str:
    """Hex digest of a layout's tiles and masks; kept with the layout. A layout on a device is read once."""
    known = layout._memo.get("digest")
    if not isinstance(known, str):
        digest = hashlib.blake2b(repr(layout.geometry[:6]).encode(), digest_size=16)
        tiles = layout.nnz
        for tensor in (layout.indptr, layout.indices[:tiles], layout.mask_ids[:tiles], layout.masks):
            _feed(digest, tensor.cpu())
        known = layout._memo["digest"] = digest.hexdigest()
    return known


def _feed(digest: hashlib.blake2b, tensor: Tensor) -> None:
    """Hash a CPU tensor with its type and shape, without a copy."""
    tensor = tensor.contiguous()
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ArgumentError(
            explain(
                name, expected="an integer ≥ 1", got=repr(value), fix="It counts things of a model or group."
            )
        )
    return value


def _check_layout(layout: BlockLayout, sharding: Sharding, heads: int) -> None:
    want = {
        "q_len": sharding.length,
        "k_len": sharding.length,
        "block_q": sharding.block,
        "block_k": sharding.block,
        "batch": 1,
    }
    for name, value in want.items():
        if getattr(layout, name) != value:
            raise LayoutError(
                explain(
                    f"layout.{name}",
                    expected=value,
                    got=getattr(layout, name),
                    fix="A plan is of one sequence against itself, in the tiles of its sharding.",
                )
            )
    if layout.heads not in (1, heads):
        raise LayoutError(
            explain(
                "layout.heads",
                expected=f"1 or kv_heads · group_size = {heads}",
                got=layout.heads,
                fix="Build the layout for the query heads of the call.",
            )
        )
    if layout.device.type != "cpu":
        raise LayoutError(
            explain(
                "layout", expected="a layout on the CPU", got=str(layout.device), fix='Pass layout.to("cpu").'
            )
        )
