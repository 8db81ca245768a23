"""Sizes that layouts can have, and the invariants of a layout, checked one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetile.errors import LayoutError, PatternError, explain
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.tiles import mask_words, ones, unpack

if TYPE_CHECKING:
    from sparsetile.layout.blocks import BlockLayout

BLOCK_SIZES = (16, 32, 64, 128)


def sizes(q_len: int, k_len: int | None, block_size: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """``(q_len, k_len, block_q, block_k)``, checked."""
    k_len = q_len if k_len is None else k_len
    if type(q_len) is not int or type(k_len) is not int or q_len < 1 or k_len < 1:
        raise LayoutError(
            explain(
                "q_len, k_len",
                expected="integers ≥ 1",
                got=(q_len, k_len),
                fix="Lengths count tokens.",
            )
        )
    pair = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2 or any(type(n) is not int or n not in BLOCK_SIZES for n in pair):
        raise LayoutError(
            explain(
                "block_size",
                expected=f"one of {BLOCK_SIZES}, or a pair of them",
                got=repr(block_size),
                fix="128 suits GPUs; smaller blocks follow fine patterns with fewer wasted pairs.",
            )
        )
    return q_len, k_len, pair[0], pair[1]


def check_pattern(pattern: Pattern, q_len: int, k_len: int, heads: int | None) -> None:
    """Raises PatternError or LayoutError if the pattern does not fit the lengths or heads."""
    if not isinstance(pattern, Pattern):
        raise PatternError(
            explain(
                "from_pattern(pattern)",
                expected="a Pattern",
                got=type(pattern).__name__,
                fix="Use e.g. Local(1024) & Causal(), or parse_pattern() for text.",
            )
        )
    if heads is not None and (type(heads) is not int or heads < 1):
        raise LayoutError(
            explain("heads", expected="an integer ≥ 1", got=repr(heads), fix="Give the query heads.")
        )
    pattern.check(q_len, k_len, heads)
    if pattern.needs_heads and heads is None:
        raise LayoutError(
            explain(
                "heads",
                expected="the number of query heads, because the pattern differs by head",
                got=None,
                fix="Pass heads=….",
            )
        )


def first_broken(layout: BlockLayout) -> str | None:
    """What is wrong with a layout, in words, or None."""
    return _numbers(layout) or _tensors(layout) or _rows(layout) or _masks(layout) or _transpose(layout)


def _numbers(layout: BlockLayout) -> str | None:
    for name in ("q_len", "k_len", "batch", "heads"):
        if getattr(layout, name) < 1:
            return f"{name} is {getattr(layout, name)}, not ≥ 1"
    for name in ("block_q", "block_k"):
        if getattr(layout, name) not in BLOCK_SIZES:
            return f"{name} is {getattr(layout, name)}, not one of {BLOCK_SIZES}"
    return None


def _tensors(layout: BlockLayout) -> str | None:
    groups, capacity = layout.batch * layout.heads, layout.capacity
    shapes = {
        "indptr": (groups * layout.q_blocks + 1,),
        "indices": (capacity,),
        "mask_ids": (capacity,),
        "masks": (layout.masks.shape[0], layout.block_q, mask_words(layout.block_k)),
        "t_indptr": (groups * layout.k_blocks + 1,),
        "t_indices": (capacity,),
        "t_edges": (capacity,),
    }
    counts = torch.int32 if capacity <= 2**31 - 1 else torch.int64
    for name, tensor in layout.tensors()._asdict().items():
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} has shape {list(tensor.shape)}, not {list(shapes[name])}"
        want = counts if name in ("indptr", "t_indptr", "t_edges") else torch.int32
        if tensor.dtype != want:
            return f"{name} is {tensor.dtype}, not {want}"
        if tensor.device != layout.device:
            return f"{name} is on {tensor.device}, indices on {layout.device}"
    return None


def _starts(name: str, starts: Tensor, capacity: int) -> str | None:
    if int(starts[0]) != 0:
        return f"{name} starts at {int(starts[0])}, not 0"
    if bool((starts.diff() < 0).any()):
        return f"{name} descends"
    if int(starts[-1]) > capacity:
        return f"{name} ends at {int(starts[-1])}, past the {capacity} entries"
    return None


def _lines(starts: Tensor) -> Tensor:
    return torch.arange(starts.numel() - 1).repeat_interleave(starts.diff())


def _rows(layout: BlockLayout) -> str | None:
    starts = layout.indptr.cpu().long()
    broken = _starts("indptr", starts, layout.capacity)
    if broken:
        return broken
    count = int(starts[-1])
    if layout._memo.get("nnz", count) != count:
        return f"nnz is kept as {layout._memo['nnz']}, but indptr ends at {count}"
    col, ids = layout.indices[:count].cpu(), layout.mask_ids[:count].cpu()
    if bool(((col < 0) | (col >= layout.k_blocks)).any()):
        return f"indices go beyond 0 … {layout.k_blocks - 1}"
    row = _lines(starts)
    if bool(((col[1:] <= col[:-1]) & (row[1:] == row[:-1])).any()):
        return "indices do not ascend within a row"
    if bool(((ids < -1) | (ids >= layout.masks.shape[0])).any()):
        return f"mask_ids go beyond −1 … {layout.masks.shape[0] - 1}"
    if layout.row_bound is not None:
        if bool((starts.diff() > layout.row_bound).any()):
            return f"a row has more tiles than row_bound = {layout.row_bound}"
        if bool(((ids[1:] < 0) & (ids[:-1] >= 0) & (row[1:] == row[:-1])).any()):
            return "row_bound is given, but a whole tile comes after a partial one"
    return None


def _masks(layout: BlockLayout) -> str | None:
    masks, whole = layout.masks.cpu(), ones(layout.block_k)
    flat = masks.flatten(1)
    if bool((flat & ~whole).any()):
        return f"masks have bits beyond the {layout.block_k} keys of a tile"
    if bool((flat == whole).all(1).any()):
        return "masks hold a full tile, which is mask_id −1"
    if bool((flat == 0).all(1).any()):
        return "masks hold an empty tile, which is not to be kept"
    if torch.unique(flat, dim=0).shape[0] != flat.shape[0]:
        return "masks hold the same tile twice"
    starts = layout.indptr.cpu().long()
    count = int(starts[-1])
    ids, col = layout.mask_ids[:count].cpu().long(), layout.indices[:count].cpu()
    row = _lines(starts) % layout.q_blocks
    bits = unpack(masks, layout.block_k)
    for what, over, left in (
        ("q_len", row == layout.q_blocks - 1, layout.q_len % layout.block_q),
        ("k_len", col == layout.k_blocks - 1, layout.k_len % layout.block_k),
    ):
        if not left:
            continue
        used = torch.unique(ids[over])
        if bool((used < 0).any()):
            return f"a tile that hangs over {what} is not partial"
        past = bits[:, left:] if what == "q_len" else bits[:, :, left:]
        if bool(past[used].any()):
            return f"a mask allows pairs past {what}"
    return None


def _transpose(layout: BlockLayout) -> str | None:
    starts = layout.indptr.cpu().long()
    t_starts = layout.t_indptr.cpu().long()
    broken = _starts("t_indptr", t_starts, layout.capacity)
    if broken:
        return broken
    count = int(starts[-1])
    if int(t_starts[-1]) != count:
        return f"t_indptr ends at {int(t_starts[-1])}, indptr at {count}"
    edges, block = layout.t_edges[:count].cpu().long(), layout.t_indices[:count].cpu()
    if not torch.equal(edges.sort().values, torch.arange(count)):
        return "t_edges is not a permutation of the tiles"
    row = _lines(starts)
    group = torch.div(row, layout.q_blocks, rounding_mode="floor")
    line = group * layout.k_blocks + layout.indices[:count].cpu()
    if not torch.equal(line[edges], _lines(t_starts)):
        return "t_edges names tiles of other columns"
    if not torch.equal((row % layout.q_blocks)[edges].to(block.dtype), block):
        return "t_indices differ from the query blocks of t_edges"
    same = line[edges][1:] == line[edges][:-1]
    if bool(((block[1:] <= block[:-1]) & same).any()):
        return "t_indices do not ascend within a column"
    return None
