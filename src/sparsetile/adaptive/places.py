"""Places: where the tiles that were selected lie in the layout made from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.kernels.triton_backend import device_problem
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.check import sizes
from sparsetile.layout.topk import Chosen, Sizes, TopkTensors, in_order, topk_tensors


@dataclass(frozen=True, eq=False)
class Places:
    """A selection and its layout. A *place* is one of the k entries of a row of the selection.

    Attributes:
        layout: of the batch, and of all query heads (one head where there is one group).
        column: int64 ``[B, G, q_blocks, k]``: key block of each place, ascending, unused ones last (and 0).
        valid: bool, the same shape: the place is used.
        slot: int64 ``[B, G, layout.heads / G, q_blocks, k]``: where the place lies in ``layout.indices``;
            unused ones lie past the tiles. Every entry has one place.
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
        size = Sizes(*sizes(q_len, k_len, block_size), is_causal)
        # One group is every head's: then the layout is shared by all heads.
        groups = indices.shape[1]
        chosen, made = _tensors(indices, 1 if groups == 1 else heads // groups, size)
        return cls(BlockLayout.from_chosen(made, size), chosen.column.long(), chosen.valid, made.slot)

    def to_edges(self, values: Tensor) -> Tensor:
        """``[B, G, q_blocks, k]`` → ``[1, 1, capacity]``, in the order of ``layout.indices``; differentiable.

        Every entry has one source, so forward and backward are the same bits run to run. Unused ones: 0.
        """
        values = torch.where(self.valid, values, 0)
        edges = values.new_empty(self.layout.capacity)
        return edges.index_put_((self.slot,), values[:, :, None])[None, None]

    def from_edges(self, edges: Tensor) -> Tensor:
        """``[1, 1, capacity]`` → ``[B, G, q_blocks, k]``, summed over the heads of a group; unused: 0."""
        values = edges.reshape(self.layout.capacity)[self.slot]
        values = values.sum(2) if values.shape[2] > 1 else values.squeeze(2)
        return torch.where(self.valid, values, 0)


_MOST_PLACES = 256
"""Places of a row that the kernels sort."""


def _tensors(indices: Tensor, share: int, size: Sizes) -> tuple[Chosen, TopkTensors]:
    """By kernels on a GPU, where nothing is compiled."""
    if _in_kernels(indices):
        from sparsetile.kernels.triton_layout import chosen_tensors

        return chosen_tensors(indices, share, size)
    chosen = in_order(indices, size)
    return chosen, topk_tensors(chosen, share, size)


def _in_kernels(indices: Tensor) -> bool:
    if not indices.is_cuda or type(indices) is not Tensor or torch.compiler.is_compiling():
        return False
    return indices.shape[3] <= _MOST_PLACES and device_problem(indices.device, "tiles") is None
