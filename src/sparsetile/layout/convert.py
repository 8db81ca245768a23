"""Layouts from tiles that someone else chose: dense masks, block masks, sparse tensors, learned indices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout import build
from sparsetile.patterns.tiles import Grid, Tiles, pack, unpack

if TYPE_CHECKING:
    from sparsetile.layout.blocks import BlockLayout


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


def whole_tiles(
    row: Tensor, col: Tensor, q_len: int, k_len: int, block_q: int, block_k: int, groups: int
) -> build.Rows:
    """Sorted tiles, allowed in full but for what hangs over the ends. ``row`` counts on through groups."""
    grid = Grid(q_len, k_len, block_q, block_k, 0, groups)
    tiles = Tiles(grid, row, col)
    ids = torch.full((len(tiles),), build.FULL, dtype=torch.int32)
    cut = build.hangs_over(tiles).nonzero().flatten()
    if not cut.numel():
        return build.Rows(row, col, ids, build.no_masks(block_q, block_k))
    few, index = build.cut_tiles(tiles.pick(cut))
    numbers, masks = build.distinct(build.valid_words(few), block_k)
    ids[cut] = numbers[index]
    return build.Rows(row, col, ids, masks)


def block_tiles(mask: Tensor, q_len: int, k_len: int, block_q: int, block_k: int) -> build.Rows:
    """Tiles of bool ``[B, H, q_blocks, k_blocks]``."""
    shape = (-(-q_len // block_q), -(-k_len // block_k))
    if tuple(mask.shape[2:]) != shape:
        raise LayoutError(
            explain(
                "from_block_mask(mask)",
                expected=f"[…, {shape[0]} query blocks, {shape[1]} key blocks] for {q_len} × {k_len} tokens",
                got=list(mask.shape),
                fix="One entry a tile; the last tile of a row may hang over the end.",
            )
        )
    row, col = mask.reshape(-1, shape[1]).nonzero().cpu().unbind(1)
    return whole_tiles(row, col, q_len, k_len, block_q, block_k, mask.shape[0] * mask.shape[1])


def row_parts(
    blocks: Tensor,
    cols: Tensor | None,
    q_len: int | None,
    k_len: int | None,
    block_size: int | tuple[int, int] | None,
) -> tuple[Tensor, Tensor, int, int | None, int | tuple[int, int]]:
    """(row starts, columns, q_len, k_len, block_size) of the arguments of :meth:`BlockLayout.from_bsr`."""
    if cols is None:
        if blocks.layout is not torch.sparse_bsr or not 2 <= blocks.dim() <= 4:
            raise LayoutError(
                explain(
                    "from_bsr",
                    expected="a torch.sparse_bsr tensor of 2 to 4 dimensions, or row starts and cols",
                    got=f"{blocks.layout} {list(blocks.shape)}",
                    fix="Convert with tensor.to_sparse_bsr((block_q, block_k)).",
                )
            )
        own = tuple(blocks.values().shape[-2:])
        starts, cols, lead = blocks.crow_indices(), blocks.col_indices(), blocks.shape[:-2]
        q_len = blocks.shape[-2] if q_len is None else q_len
        k_len = blocks.shape[-1] if k_len is None else k_len
        block_size = (own[0], own[1]) if block_size is None else block_size
    else:
        starts, lead = blocks, blocks.shape[:-1]
    if q_len is None or block_size is None or len(lead) > 2:
        raise LayoutError(
            explain(
                "from_bsr(starts, cols)",
                expected="q_len, block_size and at most two leading dimensions",
                got=f"q_len={q_len}, block_size={block_size}, starts {list(starts.shape)}",
                fix="Row starts and columns alone do not say how long the sequence is.",
            )
        )
    return starts, cols, q_len, k_len, block_size


def compressed_rows(starts: Tensor, cols: Tensor, q_blocks: int, k_blocks: int) -> tuple[Tensor, Tensor, int]:
    """``(row, col, groups)`` of row starts ``[…, q_blocks + 1]`` and ``[…, tiles]``, checked and sorted."""
    starts, cols = starts.detach().cpu().long(), cols.detach().cpu().long()
    starts = starts.reshape(-1, starts.shape[-1])
    groups = starts.shape[0]
    cols = cols.reshape(math.prod(cols.shape[:-1]), cols.shape[-1])
    sound = (
        starts.shape[1] == q_blocks + 1
        and cols.shape[0] == groups
        and not starts[:, 0].any()
        and bool((starts.diff() >= 0).all())
        and bool((starts[:, -1] == cols.shape[1]).all())
        and bool(((cols >= 0) & (cols < k_blocks)).all())
    )
    if not sound:
        raise LayoutError(
            explain(
                "from_bsr",
                expected=f"ascending row starts [{q_blocks + 1}] from 0 to the number of tiles, "
                f"and key blocks below {k_blocks}",
                got=f"row starts {list(starts.shape)}, key blocks {list(cols.shape)}",
                fix="Check them against q_len, k_len and block_size.",
            )
        )
    rows = torch.arange(groups * q_blocks).repeat_interleave(starts.diff().flatten())
    order = torch.unique(rows * k_blocks + cols.flatten())
    return torch.div(order, k_blocks, rounding_mode="floor"), order % k_blocks, groups


def to_dense(layout: BlockLayout, head: int, batch: int) -> Tensor:
    """See :meth:`BlockLayout.to_dense`."""
    if not (0 <= head < layout.heads and 0 <= batch < layout.batch):
        raise LayoutError(
            explain(
                "to_dense(head, batch)",
                expected=f"head below {layout.heads} and batch below {layout.batch}",
                got=(head, batch),
                fix="A layout shared by all heads has the one head 0.",
            )
        )
    start = (batch * layout.heads + head) * layout.q_blocks
    bounds = layout.indptr[start : start + layout.q_blocks + 1].long()
    first, end = int(bounds[0]), int(bounds[-1])
    rows = torch.arange(layout.q_blocks, device=layout.device)
    row = rows.repeat_interleave(bounds.diff(), output_size=end - first)
    ids = layout.mask_ids[first:end].long()
    whole = torch.ones((1, layout.block_q, layout.block_k), dtype=torch.bool, device=layout.device)
    bits = torch.cat((unpack(layout.masks, layout.block_k), whole))
    out = torch.zeros(
        (layout.q_blocks, layout.k_blocks, layout.block_q, layout.block_k),
        dtype=torch.bool,
        device=layout.device,
    )
    # FULL is −1, which picks the all-ones tile at the end.
    out[row, layout.indices[first:end].long()] = bits[ids]
    dense = out.transpose(1, 2).reshape(layout.q_blocks * layout.block_q, layout.k_blocks * layout.block_k)
    return dense[: layout.q_len, : layout.k_len]
