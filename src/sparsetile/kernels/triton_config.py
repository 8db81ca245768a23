"""Tile sizes, warps and stages of the Triton kernels: one table, and a way to override it while tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Kernel = Literal["forward", "rows", "columns"]
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
class Target:
    """What the choice depends on. ``hopper`` stands for ≥ 200 KB of shared memory, ``ampere`` for ≥ 99 KB."""

    family: Family
    processors: int


# Keyed by family, kernel, bytes of an element and head_dim padded to 64, 128 or 256. Up to three choices: for
# layouts of whole tiles, for layouts with partial tiles, and for biases, padding or dropout; the last given
# serves the rest. "hopper" does not spill up to head_dim 128 where no feature is used; for 16-bit elements
# it is the fastest such choice by benchmarks/tune_triton.py on an H200. The others fit their shared memory.
TABLE: dict[tuple[Family, Kernel, int, int], tuple[Tiles, ...]] = {
    ("hopper", "forward", 2, 64): (
        Tiles(128, 64, 4, 3),
        Tiles(128, 64, 4, 3),
        Tiles(64, 64, 4, 3),
    ),
    ("hopper", "forward", 2, 128): (
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 8, 2),
    ),
    ("hopper", "forward", 2, 256): (
        Tiles(128, 64, 8, 2),
        Tiles(128, 32, 8, 2),
        Tiles(64, 32, 8, 2),
    ),
    ("hopper", "forward", 4, 64): (Tiles(64, 32, 4, 2),),
    ("hopper", "forward", 4, 128): (Tiles(16, 32, 4, 2),),
    ("hopper", "forward", 4, 256): (Tiles(16, 32, 8, 1),),
    ("hopper", "rows", 2, 64): (
        Tiles(128, 64, 8, 3),
        Tiles(128, 64, 8, 3),
        Tiles(64, 32, 4, 2),
    ),
    ("hopper", "rows", 2, 128): (
        Tiles(128, 64, 8, 3),
        Tiles(128, 64, 8, 3),
        Tiles(64, 32, 4, 2),
    ),
    ("hopper", "rows", 2, 256): (Tiles(64, 32, 8, 2),),
    ("hopper", "rows", 4, 64): (Tiles(64, 32, 4, 2),),
    ("hopper", "rows", 4, 128): (Tiles(16, 32, 4, 2),),
    ("hopper", "rows", 4, 256): (Tiles(16, 16, 8, 2),),
    ("hopper", "columns", 2, 64): (
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 3),
        Tiles(32, 64, 4, 2),
    ),
    ("hopper", "columns", 2, 128): (
        Tiles(32, 128, 8, 3),
        Tiles(32, 128, 8, 3),
        Tiles(32, 64, 8, 2),
    ),
    ("hopper", "columns", 2, 256): (Tiles(64, 32, 8, 1),),
    ("hopper", "columns", 4, 64): (Tiles(16, 32, 4, 2),),
    ("hopper", "columns", 4, 128): (Tiles(32, 16, 8, 2),),
    ("hopper", "columns", 4, 256): (Tiles(16, 16, 8, 1),),
    ("ampere", "forward", 2, 64): (Tiles(64, 64, 4, 3),),
    ("ampere", "forward", 2, 128): (Tiles(64, 32, 4, 3),),
    ("ampere", "forward", 2, 256): (Tiles(64, 32, 8, 1),),
    ("ampere", "forward", 4, 64): (Tiles(32, 32, 4, 2),),
    ("ampere", "forward", 4, 128): (Tiles(32, 32, 4, 1),),
    ("ampere", "forward", 4, 256): (Tiles(16, 32, 8, 1),),
    ("ampere", "rows", 2, 64): (
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 2),
        Tiles(64, 32, 4, 2),
    ),
    ("ampere", "rows", 2, 128): (Tiles(64, 32, 4, 2),),
    ("ampere", "rows", 2, 256): (Tiles(32, 32, 8, 1),),
    ("ampere", "rows", 4, 64): (Tiles(32, 32, 4, 2),),
    ("ampere", "rows", 4, 128): (Tiles(16, 32, 4, 1),),
    ("ampere", "rows", 4, 256): (Tiles(16, 16, 8, 1),),
    ("ampere", "columns", 2, 64): (Tiles(32, 64, 4, 2),),
    ("ampere", "columns", 2, 128): (Tiles(32, 64, 8, 2),),
    ("ampere", "columns", 2, 256): (Tiles(32, 32, 8, 1),),
    ("ampere", "columns", 4, 64): (Tiles(32, 32, 4, 1),),
    ("ampere", "columns", 4, 128): (Tiles(32, 16, 8, 1),),
    ("ampere", "columns", 4, 256): (Tiles(16, 16, 8, 1),),
    ("amd", "forward", 2, 64): (
        Tiles(64, 64, 4, 1),
        Tiles(64, 64, 4, 1),
        Tiles(64, 32, 4, 1),
    ),
    ("amd", "forward", 2, 128): (Tiles(64, 32, 4, 1),),
    ("amd", "forward", 2, 256): (Tiles(32, 32, 4, 1),),
    ("amd", "forward", 4, 64): (Tiles(32, 32, 4, 1),),
    ("amd", "forward", 4, 128): (Tiles(32, 32, 4, 1),),
    ("amd", "forward", 4, 256): (Tiles(16, 16, 4, 1),),
    ("amd", "rows", 2, 64): (Tiles(64, 32, 4, 1),),
    ("amd", "rows", 2, 128): (Tiles(32, 32, 4, 1),),
    ("amd", "rows", 2, 256): (Tiles(32, 32, 4, 1),),
    ("amd", "rows", 4, 64): (Tiles(32, 32, 4, 1),),
    ("amd", "rows", 4, 128): (Tiles(32, 16, 4, 1),),
    ("amd", "rows", 4, 256): (Tiles(16, 16, 4, 1),),
    ("amd", "columns", 2, 64): (Tiles(32, 64, 4, 1),),
    ("amd", "columns", 2, 128): (Tiles(32, 32, 4, 1),),
    ("amd", "columns", 2, 256): (Tiles(32, 32, 4, 1),),
    ("amd", "columns", 4, 64): (Tiles(32, 32, 4, 1),),
    ("amd", "columns", 4, 128): (Tiles(16, 32, 4, 1),),
    ("amd", "columns", 4, 256): (Tiles(16, 16, 4, 1),),
}

_tiles_override: dict[Kernel, Tiles] = {}
_chunk_override: list[int] = []


@contextmanager
def override(tiles: dict[Kernel, Tiles] | None = None, chunk: int | None = None) -> Iterator[None]:
    """Use other tiles for some kernels, or another longest item, in the block. For tuning and tests only."""
    saved = dict(_tiles_override), list(_chunk_override)
    _tiles_override.update(tiles or {})
    if chunk is not None:
        _chunk_override[:] = [chunk]
    try:
        yield
    finally:
        _tiles_override.clear()
        _tiles_override.update(saved[0])
        _chunk_override[:] = saved[1]


def padded_dim(head_dim: int) -> int:
    """head_dim as the kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(
    kernel: Kernel, target: Target, element_bytes: int, head_dim: int, block_q: int, block_k: int, work: Work
) -> Tiles:
    """The table's choice, or the override, cut to the layout's tile; fewer warps where little is left."""
    dim = padded_dim(head_dim)
    choices = TABLE[target.family, kernel, element_bytes, max(64, dim)]
    chosen = choices[min(_WORK.index(work), len(choices) - 1)]
    chosen = _tiles_override.get(kernel, chosen)
    queries, keys = min(chosen.queries, block_q), min(chosen.keys, block_k)
    warps = chosen.warps
    if (queries, keys) != (chosen.queries, chosen.keys):
        owned, other = (keys, queries) if kernel == "columns" else (queries, keys)
        # Never one warp: Triton 3.6 miscompiles the column pass there (head_dim 16, 16-token blocks, 16-bit,
        # dense bias: a misaligned 16-byte read on an H200). Two and four warps are right.
        warps = min(warps, max(2, owned * max(other, dim) // 1024))
    return Tiles(queries, keys, warps, chosen.stages)


def overridden() -> bool:
    """Whether ``override`` is in force."""
    return bool(_tiles_override or _chunk_override)


def chunk_override() -> int | None:
    """The longest item that ``override`` asks for, if it does."""
    return _chunk_override[0] if _chunk_override else None


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
