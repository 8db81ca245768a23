"""PlanReport: what a plan costs each rank, beside what every rank receives where everything circulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetile.distributed.sharding import balance, loads

if TYPE_CHECKING:
    from sparsetile.distributed.plan import Plan


@dataclass(frozen=True, eq=False)
class PlanReport:
    """Bytes of keys and values of one forward pass of one layer, and who computes how much.

    Attributes:
        received, sent: int64 ``[ranks]``, whole tiles. Backward sends as many gradients the other way.
        attended: int64 ``[ranks]``: keys and values that the rank's rows attend outside of its shard, the
            short last tile counted by its tokens. Nothing less can be received.
        circulated: int64 ``[ranks]``: what a ring or an all-gather brings to each rank: all that is not its.
        crossing: int64 ``[ranks]``: the part of ``received`` that comes from another node.
        crossing_directly: the same if ranks did not pass units on within their node.
        buffer: int64 ``[ranks]``: the largest buffer of a stage, the unused places included.
        tiles: int64 ``[ranks]``: tiles of attention that each rank computes, over all query heads.
        stages: how many stages every rank goes through.
    """

    received: Tensor
    sent: Tensor
    attended: Tensor
    circulated: Tensor
    crossing: Tensor
    crossing_directly: Tensor
    buffer: Tensor
    tiles: Tensor
    stages: int

    @property
    def excess(self) -> float:
        """Bytes received ÷ bytes attended elsewhere, the largest of all ranks; 1 if nothing travels."""
        some = self.attended > 0
        return float((self.received[some] / self.attended[some]).max()) if some.any() else 1.0

    @property
    def balance(self) -> float:
        """Tiles of the busiest rank ÷ their mean: what the slowest rank costs all others."""
        return balance(self.tiles)


def report_of(plan: Plan, head_dim: int, itemsize: int, batch: int) -> PlanReport:
    """See :meth:`Plan.report`."""
    sharding, ranks = plan.sharding, plan.sharding.ranks
    token = 2 * batch * plan.kv_heads * head_dim * itemsize
    unit = token * sharding.block // plan.groups
    node = plan.ranks_per_node or ranks
    short = (sharding.tiles * sharding.block - sharding.length) * token // plan.groups

    def count(which: Tensor, of: Tensor) -> Tensor:
        return torch.bincount(of[which], minlength=ranks)

    every = torch.ones_like(plan.tile, dtype=torch.bool)
    received = count(every, plan.destination) * unit
    elsewhere = plan.destination // node != plan.source // node
    tokens = sharding.tile_counts() * sharding.block
    tokens[sharding.tile_owner()[-1]] -= sharding.tiles * sharding.block - sharding.length
    return PlanReport(
        received=received,
        sent=count(every, plan.sender) * unit,
        attended=received - count(plan.tile == sharding.tiles - 1, plan.destination) * short,
        circulated=(sharding.length - tokens) * token,
        crossing=count(elsewhere & (plan.sender == plan.source), plan.destination) * unit,
        crossing_directly=count(elsewhere, plan.destination) * unit,
        buffer=_widths(plan) * plan.groups * unit,
        tiles=loads(plan.layout, sharding) * (plan.kv_heads * plan.group_size // plan.layout.heads),
        stages=plan.stages,
    )


def _widths(plan: Plan) -> Tensor:
    """int64 ``[ranks]``: columns of the widest buffer of any stage."""
    ranks, stages = plan.sharding.ranks, max(1, plan.stages)
    line = (plan.destination * stages + plan.stage) * plan.groups + plan.head
    return torch.bincount(line, minlength=ranks * stages * plan.groups).reshape(ranks, -1).amax(1)
