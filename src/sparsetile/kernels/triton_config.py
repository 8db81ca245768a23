"""Tile sizes, warps and stages of the Triton kernels: one table, and a way to override it while tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch

Family = Literal["hopper", "ampere", "amd"]
Work = Literal["whole", "partial", "featured"]

_WORK = ("whole", "partial", "featured")

ITEMS_PER_PROCESSOR = 8
"""How many items of the longest kind make one multiprocessor's share of the work."""

ITEM_TOKENS = 2048
"""Shortest item that is worth a combining pass, in tokens of the other side."""


@dataclass(frozen=True)
class Tiles:
    """Queries × keys of one step of the inner loop and the launch options; never above the layout's tile."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Pair:
    """Backward: (queries, keys) of a step of the row programs and of the column programs, in one launch."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Target:
    """What the choice depends on. ``hopper`` stands for ≥ 200 KB of shared memory, ``ampere`` for ≥ 99 KB."""

    family: Family
    processors: int


# Keyed by family, bytes of an element and head_dim padded to 64, 128 or 256. Up to three choices: for layouts
# of whole tiles, for layouts with partial tiles, and for a dense bias, padding or dropout; the last given
# serves the rest. A tile bias, one scalar a step, changes no choice. "hopper" does not spill up to head_dim
# 128 where none of these is used; for 16-bit elements its forward is the fastest such choice by
# benchmarks/tune_triton.py on an H200. All fit their shared memory.
FORWARD: dict[tuple[Family, int, int], tuple[Tiles, ...]] = {
    ("hopper", 2, 64): (
        Tiles(128, 64, 4, 3),
        Tiles(128, 64, 4, 3),
        Tiles(64, 64, 4, 3),
    ),
    ("hopper", 2, 128): (
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 8, 2),
    ),
    ("hopper", 2, 256): (
        Tiles(128, 64, 8, 2),
        Tiles(128, 32, 8, 2),
        Tiles(64, 32, 8, 2),
    ),
    ("hopper", 4, 64): (Tiles(64, 32, 4, 2),),
    ("hopper", 4, 128): (Tiles(16, 32, 4, 2),),
    ("hopper", 4, 256): (Tiles(16, 32, 8, 1),),
    ("ampere", 2, 64): (Tiles(64, 64, 4, 3),),
    ("ampere", 2, 128): (Tiles(64, 32, 4, 3),),
    ("ampere", 2, 256): (Tiles(64, 32, 8, 1),),
    ("ampere", 4, 64): (Tiles(32, 32, 4, 2),),
    ("ampere", 4, 128): (Tiles(32, 32, 4, 1),),
    ("ampere", 4, 256): (Tiles(16, 32, 8, 1),),
    ("amd", 2, 64): (
        Tiles(64, 64, 4, 1),
        Tiles(64, 64, 4, 1),
        Tiles(64, 32, 4, 1),
    ),
    ("amd", 2, 128): (Tiles(64, 32, 4, 1),),
    ("amd", 2, 256): (Tiles(32, 32, 4, 1),),
    ("amd", 4, 64): (Tiles(32, 32, 4, 1),),
    ("amd", 4, 128): (Tiles(32, 32, 4, 1),),
    ("amd", 4, 256): (Tiles(16, 16, 4, 1),),
}

BACKWARD: dict[tuple[Family, int, int], tuple[Pair, ...]] = {
    ("hopper", 2, 64): (
        Pair((64, 64), (64, 64), 4, 3),
        Pair((64, 64), (64, 64), 4, 3),
        Pair((64, 32), (32, 64), 4, 2),
    ),
    ("hopper", 2, 128): (
        Pair((128, 64), (64, 128), 8, 3),
        Pair((128, 64), (32, 128), 8, 3),
        Pair((64, 32), (64, 32), 8, 2),
    ),
    ("hopper", 2, 256): (Pair((64, 32), (64, 32), 8, 1),),
    ("hopper", 4, 64): (Pair((64, 32), (16, 32), 4, 2),),
    ("hopper", 4, 128): (Pair((16, 32), (32, 16), 8, 2),),
    ("hopper", 4, 256): (Pair((16, 16), (16, 16), 8, 1),),
    ("ampere", 2, 64): (
        Pair((64, 64), (32, 64), 4, 2),
        Pair((64, 64), (32, 64), 4, 2),
        Pair((64, 32), (32, 64), 4, 2),
    ),
    ("ampere", 2, 128): (Pair((64, 32), (32, 64), 8, 2),),
    ("ampere", 2, 256): (Pair((32, 32), (32, 32), 8, 1),),
    ("ampere", 4, 64): (Pair((32, 32), (32, 32), 4, 1),),
    ("ampere", 4, 128): (Pair((16, 32), (32, 16), 8, 1),),
    ("ampere", 4, 256): (Pair((16, 16), (16, 16), 8, 1),),
    ("amd", 2, 64): (Pair((64, 32), (32, 64), 4, 1),),
    ("amd", 2, 128): (Pair((32, 32), (32, 32), 4, 1),),
    ("amd", 2, 256): (Pair((32, 32), (32, 32), 4, 1),),
    ("amd", 4, 64): (Pair((32, 32), (32, 32), 4, 1),),
    ("amd", 4, 128): (Pair((32, 16), (16, 32), 4, 1),),
    ("amd", 4, 256): (Pair((16, 16), (16, 16), 4, 1),),
}

# For hardly more than a tile a row, without those features: there, more programs on a multiprocessor hide
# what each loads once, before its loop.
BACKWARD_SHORT: dict[tuple[Family, int, int], tuple[Pair, ...]] = {
    ("hopper", 2, 128): (Pair((64, 64), (32, 64), 4, 2), Pair((64, 32), (32, 64), 4, 2)),
}

Choice = TypeVar("Choice", Tiles, Pair)


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


def _chosen(choices: tuple[Choice, ...], work: Work) -> Choice:
    return choices[min(_WORK.index(work), len(choices) - 1)]


def _cut(
    shape: tuple[int, int], block_q: int, block_k: int, dim: int, *, by_rows: bool
) -> tuple[tuple[int, int], int]:
    """(shape within the layout's tile, warps that it keeps busy; 32 where nothing was cut off)."""
    cut = min(shape[0], block_q), min(shape[1], block_k)
    owned, other = cut if by_rows else cut[::-1]
    # Never one warp: Triton 3.6 miscompiles the column programs there (head_dim 16, 16-token blocks, 16-bit,
    # dense bias: a misaligned 16-byte read on an H200). Two and four warps are right.
    return cut, 32 if cut == shape else max(2, owned * max(other, dim) // 1024)


def forward_tiles(
    target: Target, element_bytes: int, head_dim: int, block_q: int, block_k: int, work: Work
) -> Tiles:
    """The table's choice, or the override, cut to the layout's tile; fewer warps where little is left."""
    dim = padded_dim(head_dim)
    chosen = _override.forward or _chosen(FORWARD[target.family, element_bytes, max(64, dim)], work)
    shape, busy = _cut((chosen.queries, chosen.keys), block_q, block_k, dim, by_rows=True)
    return Tiles(*shape, min(chosen.warps, busy), chosen.stages)


def backward_tiles(
    target: Target, element_bytes: int, head_dim: int, block_q: int, block_k: int, work: Work, *, short: bool
) -> Pair:
    """As ``forward_tiles``; the part that keeps more warps busy decides for both. ``short``: short rows."""
    dim = padded_dim(head_dim)
    key = target.family, element_bytes, max(64, dim)
    chosen = _chosen(BACKWARD[key], work)
    if short and work != "featured" and key in BACKWARD_SHORT:
        chosen = _chosen(BACKWARD_SHORT[key], work)
    chosen = _override.backward or chosen
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
    family: Family = "hopper" if properties.major in (9, 10) else "ampere"
    return Target(family, properties.multi_processor_count)
