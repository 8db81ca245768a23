"""Layouts side by side: one for several sequences that lie one after another and do not see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, explain
from sparsetile.layout import build
from sparsetile.layout.blocks import BlockLayout


def join(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """The block-diagonal layout of sequences that each begin at a tile.

    Sequence ``i`` takes ``layouts[i].q_blocks`` rows and ``layouts[i].k_blocks`` columns of tiles. Where its
    length is no multiple of the block, the rest of its last tile belongs to nobody: those keys are masked,
    those queries attend nothing.

    Args:
        layouts: of one block size and one count of heads, with ``batch`` 1, on one device.

    Returns:
        a layout of ``q_blocks·block_q × k_blocks·block_k`` tokens, summed over the sequences, on that device.
    """
    first = layouts[0]
    alike = {(x.block_q, x.block_k, x.heads, x.batch, x.device) for x in layouts}
    if len(alike) > 1 or first.batch != 1:
        raise LayoutError(
            explain(
                "join(layouts)",
                expected="layouts of the same blocks, heads and device, with batch 1",
                got=f"(block_q, block_k, heads, batch, device) in {sorted(map(str, alike))}",
                fix="Build them alike.",
            )
        )
    q_blocks, k_blocks = sum(x.q_blocks for x in layouts), sum(x.k_blocks for x in layouts)
    rows: list[Tensor] = []
    cols: list[Tensor] = []
    ids: list[Tensor] = []
    q_at = k_at = masks = 0
    known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for layout in layouts:
        if id(layout) not in known:  # documents of one length share a layout
            row, col = layout.rows_and_columns()
            head = torch.div(row, layout.q_blocks, rounding_mode="floor")
            known[id(layout)] = (
                row + head * (q_blocks - layout.q_blocks),
                col,
                layout.mask_ids[: layout.nnz],
            )
        row, col, mask_ids = known[id(layout)]
        rows.append(row + q_at)
        cols.append(col + k_at)
        ids.append(torch.where(mask_ids >= 0, mask_ids + masks, mask_ids))
        q_at, k_at, masks = q_at + layout.q_blocks, k_at + layout.k_blocks, masks + layout.masks.shape[0]
    row, order = torch.cat(rows).sort(stable=True)
    words, numbers = _distinct(torch.cat([x.masks for x in layouts]), first.block_k)
    mask_ids = torch.cat(ids)[order]
    if numbers.numel():
        mask_ids = torch.where(mask_ids >= 0, numbers[mask_ids.clamp(min=0).long()], mask_ids)
    return BlockLayout._of(
        build.Rows(row, torch.cat(cols)[order], mask_ids, words),
        q_blocks * first.block_q,
        k_blocks * first.block_k,
        first.block_q,
        first.block_k,
        heads=first.heads,
    )


def _distinct(masks: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """The distinct masks, and the number among them of each; all of them are partial."""
    if not masks.shape[0]:
        return masks, masks.new_empty(0)
    numbers, words = build.distinct(masks, block_k)
    return words, numbers
