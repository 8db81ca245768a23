"""BlockLayout: which tiles of the attention matrix are computed, in compressed rows.

This is the contract between patterns and kernels. Rows are flattened as (layout batch, layout head, query
block), so row ``(b·heads + h)·q_blocks + i`` holds the tiles of query block ``i``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)
FULL = -1


def mask_words(block_k: int) -> int:
    """32-bit words in one row of a tile mask; a 16-wide tile uses the low half of its word."""
    return max(1, block_k // 32)


class LayoutTensors(NamedTuple):
    """The tensors of a layout in the order in which operators pass them."""

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    t_indptr: Tensor
    t_indices: Tensor
    t_edges: Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Tiles of ``block_q × block_k`` tokens, compressed by rows, with the transpose.

    Attributes:
        indptr: ``[batch·heads·q_blocks + 1]`` int32 (int64 past 2³¹ tiles). Row starts in ``indices``.
        indices: ``[capacity]`` int32. Key block of each tile, ascending within a row. ``capacity`` is the
            tile count where the host knows it; a layout made on the device without a sync may hold unused
            entries past ``indptr[-1]``.
        mask_ids: ``[capacity]`` int32. −1: every pair of the tile is allowed; else a row of ``masks``.
        masks: ``[n_masks, block_q, mask_words(block_k)]`` int32. Distinct partial tiles as bits: bit ``j``
            (least significant first) of word ``w`` of row ``i`` says that query ``i`` of the tile may attend
            key ``32·w + j`` of the tile. Rows and columns past the ends of the sequence are 0, so a tile that
            hangs over ``q_len`` or ``k_len`` is always partial.
        t_indptr: ``[batch·heads·k_blocks + 1]``, t_indices: ``[capacity]`` (query block, ascending within a
            column), t_edges: ``[capacity]`` (position of that tile in ``indices``): the transpose.
        batch, heads: 1 (shared by all) or the tensor's own count of batch elements and query heads.
        q_len, k_len: tokens; any lengths. Query ``i`` stands at position ``i + k_len − q_len``.
    """

    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor
    t_indptr: Tensor
    t_indices: Tensor
    t_edges: Tensor
    q_len: int
    k_len: int
    block_q: int
    block_k: int
    batch: int = 1
    heads: int = 1
    _memo: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.k_len // self.block_k)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def capacity(self) -> int:
        """Entries in ``indices``: the tile count, or a bound of it that needs no device sync."""
        return self.indices.numel()

    def tensors(self) -> LayoutTensors:
        return LayoutTensors(
            self.indptr, self.indices, self.mask_ids, self.masks, self.t_indptr, self.t_indices, self.t_edges
        )
