"""Places: where the tiles that were selected lie in the layout made from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.layout.blocks import BlockLayout


@dataclass(frozen=True, eq=False)
class Places:
    """A selection and its layout. A *place* is one of the k entries of a row of the selection.

    Attributes:
        layout: of the batch, and of all query heads (one head where there is one group).
        column: int64 ``[B, G, q_blocks, k]``: key block of each place, ascending, unused ones last (and 0).
        valid: bool, the same shape: the place is used.
        slot: int64 ``[B, layout.heads, q_blocks, k]``: where the place lies in ``layout.indices``; unused
            ones lie past the end, each in a slot of its own.
    """

    layout: BlockLayout
    column: Tensor
    valid: Tensor
    slot: Tensor

    @classmethod
    def of(
        cls, indices: Tensor, heads: int, q_len: int, k_len: int, block_size: int, is_causal: bool
    ) -> Places:
        """The places of distinct key blocks, −1 = unused. No host sync, no read of a device value.

        Args:
            indices: int32 ``[B, G, q_blocks, k]``; when causal none lies wholly in the future.
            heads: query heads, a multiple of G.
        """
        groups = indices.shape[1]
        beyond = -(-k_len // block_size)
        column = torch.where(indices < 0, beyond, indices).sort(-1).values
        valid = column < beyond
        column = torch.where(valid, column, 0)
        # One group is every head's: then the layout is shared by all heads.
        share = 1 if groups == 1 else heads // groups
        chosen = torch.where(valid, column, -1).repeat_interleave(share, 1)
        layout = BlockLayout.from_topk(chosen, q_len, k_len, block_size, is_causal)
        # The columns of a row ascend already, so the layout has them in this order from the row's start on.
        start = layout.indptr[:-1].long().view(chosen.shape[:-1])[..., None]
        place = start + torch.arange(chosen.shape[-1], device=indices.device)
        spare = torch.arange(layout.capacity, 2 * layout.capacity, device=indices.device)
        slot = torch.where(chosen >= 0, place, spare.view(chosen.shape))
        return cls(layout, column.long(), valid, slot)

    def to_edges(self, values: Tensor) -> Tensor:
        """``[B, G, q_blocks, k]`` → ``[1, 1, capacity]``, in the order of ``layout.indices``; differentiable.

        Every slot has one source, so forward and backward are the same bits run to run.
        """
        share = self.slot.shape[1] // values.shape[1]
        spread = values[:, :, None].expand(-1, -1, share, -1, -1).reshape(-1)
        capacity = self.layout.capacity
        edges = spread.new_zeros(2 * capacity).scatter(0, self.slot.view(-1), spread)
        return edges[:capacity].view(1, 1, capacity)

    def from_edges(self, edges: Tensor) -> Tensor:
        """``[1, 1, capacity]`` → ``[B, G, q_blocks, k]``, summed over the heads of a group; unused: 0."""
        capacity, groups = self.layout.capacity, self.column.shape[1]
        padded = torch.cat((edges.reshape(capacity), edges.new_zeros(1)))
        values = padded[self.slot.clamp(max=capacity)]
        return torch.unflatten(values, 1, (groups, -1)).sum(2)
