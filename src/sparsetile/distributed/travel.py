"""Messages between the owners of shards, and what a rank adds up of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Travelling:
    """Messages under way: where they arrive, and what must not be freed until then."""

    arriving: Tensor
    leaving: Tensor
    work: Any

    def wait_for(self) -> Tensor:
        self.work.wait()
        return self.arriving


def to_owners(messages: Tensor, group: dist.ProcessGroup) -> Travelling:
    """messages [ranks − 1, …], one for each other rank, ascending; comes back as those from the others."""
    messages = messages.contiguous()
    arriving = torch.empty_like(messages)
    counts = [int(rank != group.rank()) for rank in range(group.size())]
    work = dist.all_to_all_single(arriving, messages, counts, counts, group=group, async_op=True)
    return Travelling(arriving, messages, work)


def to_everyone(message: Tensor, group: dist.ProcessGroup) -> Travelling:
    """message [n]; comes back as [ranks, n]."""
    arriving = message.new_empty((group.size(), *message.shape))
    work = dist.all_gather(list(arriving.unbind(0)), message, group=group, async_op=True)
    return Travelling(arriving, message, work)


def others_of(shards: Tensor, rank: int) -> Tensor:
    """All shards but this rank's, as a message to their owners: [ranks, n] → [ranks − 1, n]."""
    return torch.cat([shards[:rank], shards[rank + 1 :]])


def summed(others: Tensor, own: Tensor, rank: int) -> Tensor:
    """fp32 [n], the sum of the others' shards [ranks − 1, n] and this rank's own [n], in the order of ranks.

    All are bf16: what a rank sends itself is rounded, too, so whoever owns a shard, its sum is the same.
    """
    return torch.cat([others[:rank], own[None], others[rank:]]).float().sum(0)
