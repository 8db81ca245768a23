"""Tile sizes, warps and stages of a Triton launch: the table's choice cut to the layout, and a way to
override it while tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from sparsetile.kernels.triton_table import Family, Kernel, Pair, Place, Tiles, Work, entry_for, table

ITEMS_PER_PROCESSOR = 8
"""How many items of the longest kind make one multiprocessor's share of the work."""

ITEM_TOKENS = 2048
"""Shortest item that is worth a combining pass, in tokens of the other side."""


@dataclass(frozen=True)
class Target:
    """What the choice depends on; ``triton_table.SHARED_BYTES`` says what a family stands for."""

    family: Family
    processors: int


@dataclass(frozen=True)
class _Override:
    forward: Tiles | None = None
    backward: Pair | None = None
    chunk: int | None = None


_NOTHING = _Override()
_override = _NOTHING


@contextmanager
def override(
    *, forward: Tiles | None = None, backward: Pair | None = None, chunk: int | None = None
) -> Iterator[None]:
    """Use other tiles, or another longest item, in the block. For tuning and tests only."""
    global _override
    saved = _override
    _override = _Override(forward or saved.forward, backward or saved.backward, chunk or saved.chunk)
    try:
        yield
    finally:
        _override = saved


def padded_dim(head_dim: int) -> int:
    """head_dim as the kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _cut(
    shape: tuple[int, int], block_q: int, block_k: int, dim: int, *, by_rows: bool
) -> tuple[tuple[int, int], int]:
    """(shape within the layout's tile, warps that it keeps busy; 32 where nothing was cut off)."""
    cut = min(shape[0], block_q), min(shape[1], block_k)
    owned, other = cut if by_rows else cut[::-1]
    # Never one warp: Triton 3.6 miscompiles the column programs there (head_dim 16, 16-token blocks, 16-bit,
    # dense bias: a misaligned 16-byte read on an H200). Two and four warps are right.
    return cut, 32 if cut == shape else max(2, owned * max(other, dim) // 1024)


def _chosen(
    kernel: Kernel, target: Target, element_bytes: int, dim: int, block_q: int, block_k: int, work: Work
) -> Tiles | Pair:
    block = block_q if block_q == block_k else None
    return entry_for(table(), Place(kernel, target.family, element_bytes, max(64, dim), block, work)).choice


def forward_tiles(
    target: Target, element_bytes: int, head_dim: int, block_q: int, block_k: int, work: Work
) -> Tiles:
    """The table's choice, or the override, cut to the layout's tile; fewer warps where little is left."""
    dim = padded_dim(head_dim)
    chosen = _override.forward or cast(
        Tiles, _chosen("forward", target, element_bytes, dim, block_q, block_k, work)
    )
    shape, busy = _cut((chosen.queries, chosen.keys), block_q, block_k, dim, by_rows=True)
    return Tiles(*shape, min(chosen.warps, busy), chosen.stages)


def backward_tiles(
    target: Target, element_bytes: int, head_dim: int, block_q: int, block_k: int, work: Work
) -> Pair:
    """As ``forward_tiles``; the part that keeps more warps busy decides for both."""
    dim = padded_dim(head_dim)
    chosen = _override.backward or cast(
        Pair, _chosen("backward", target, element_bytes, dim, block_q, block_k, work)
    )
    rows, busy_rows = _cut(chosen.rows, block_q, block_k, dim, by_rows=True)
    columns, busy_columns = _cut(chosen.columns, block_q, block_k, dim, by_rows=False)
    return Pair(rows, columns, min(chosen.warps, max(busy_rows, busy_columns)), chosen.stages)


def overridden() -> bool:
    """Whether ``override`` is in force."""
    return _override is not _NOTHING


def chunk_override() -> int | None:
    """The longest item that ``override`` asks for, if it does."""
    return _override.chunk


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The target of a GPU; a CPU device (the interpreter) is treated as a Hopper GPU."""
    if device.type != "cuda":
        return Target("hopper", 132)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target("amd", properties.multi_processor_count)
    # By shared memory: 12.x, Blackwell too by name, has no more of it than 8.6.
    family: Family = {9: "hopper", 10: "blackwell"}.get(properties.major, "ampere")  # type: ignore[assignment]
    return Target(family, properties.multi_processor_count)
