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

from sparsetile.distributed.plan_report import PlanReport, report_of
from sparsetile.distributed.rank_plan import Forward, RankPlan, Stage, rank_plan, starts_of
from sparsetile.distributed.sharding import Sharding
from sparsetile.distributed.units import Units, needed
from sparsetile.errors import ArgumentError, LayoutError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns.base import Pattern

__all__ = ["Forward", "Plan", "PlanReport", "RankPlan", "Stage", "digest_of", "make_plan"]

_VERSION = 2  # of what a plan means: ranks that mean different things must not exchange


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

    def report(self, head_dim: int, itemsize: int = 2, batch: int = 1) -> PlanReport:
        """Bytes and balance, for keys and values ``[batch, kv_heads, N, head_dim]`` of ``itemsize`` bytes.

        Raises:
            ArgumentError: a number is not an integer ≥ 1.
        """
        for name, value in (("head_dim", head_dim), ("itemsize", itemsize), ("batch", batch)):
            _count(name, value)
        return report_of(self, head_dim, itemsize, batch)

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
    if max_remote_tokens is not None:
        check_stage("max_remote_tokens", _count("max_remote_tokens", max_remote_tokens), sharding.block)
    with torch.device("cpu"):
        groups = 1 if layout.heads == 1 else kv_heads
        destination, head, tile = needed(layout, sharding, groups)
        source = sharding.tile_owner()[tile]
        node = 1 if ranks_per_node in (None, sharding.ranks) else _count("ranks_per_node", ranks_per_node)
        units = Units(sharding, groups, node, destination, source, head, tile)
        sender = units.senders()
        stage, stages = torch.zeros_like(tile), int(tile.numel() > 0)
        if max_remote_tokens is not None and stages:
            stage, stages = units.in_stages(max_remote_tokens // sharding.block)
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


def check_stage(name: str, tokens: int, block: int) -> None:
    """Raises ArgumentError, about ``name``, if a stage of so many tokens cannot hold a tile."""
    if tokens < block:
        raise ArgumentError(
            explain(
                name,
                expected=f"at least one tile, {block} tokens",
                got=tokens,
                fix="Tiles are not divided on their way; take smaller tiles or more tokens.",
            )
        )


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
