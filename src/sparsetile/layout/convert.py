"""Layouts from tiles that someone else chose: dense masks, block masks, sparse tensors, learned indices."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout import build
from sparsetile.patterns.tiles import pack


def four_dims(what: str, mask: Tensor) -> Tensor:
    """A boolean matrix, or a stack of them by head or by batch and head, as ``[B, H, rows, columns]``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise LayoutError(
            explain(
                what,
                expected="a bool tensor of 2 to 4 dimensions",
                got=got,
                fix="True means: may attend. Leading dimensions are batch and head.",
            )
        )
    if mask.numel() == 0:
        raise LayoutError(
            explain(what, expected="a mask with entries", got=list(mask.shape), fix="Lengths are ≥ 1.")
        )
    return mask[(None,) * (4 - mask.dim())]


def dense_tiles(mask: Tensor, block_q: int, block_k: int) -> build.Rows:
    """Tiles of bool ``[B, H, Nq, Nk]``."""
    batch, heads, q_len, k_len = mask.shape
    q_blocks, k_blocks = -(-q_len // block_q), -(-k_len // block_k)
    padding = (0, k_blocks * block_k - k_len, 0, q_blocks * block_q - q_len)
    tiles = torch.nn.functional.pad(mask, padding)
    tiles = tiles.reshape(batch * heads * q_blocks, block_q, k_blocks, block_k).transpose(1, 2)
    row, col = tiles.flatten(2).any(-1).nonzero().unbind(1)
    ids, masks = build.distinct(pack(tiles[row, col]), block_k)
    return build.Rows(row, col, ids, masks)
