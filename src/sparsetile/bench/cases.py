"""What is measured: shapes × patterns × densities, and the fixed table of baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import parse_pattern

TILE_PATTERNS = ("local", "random", "global+local")
"""Patterns of whole tiles, given by a budget of tiles a row; anything else is a pattern expression."""


@dataclass(frozen=True)
class Case:
    """One shape and pattern.

    ``tiles`` is the budget of a row for a name in ``TILE_PATTERNS`` and None for a pattern expression.
    ``asked`` is the density that the budget was made from, where there was one.
    """

    pattern: str
    length: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    block: int
    tiles: int | None = None
    asked: float | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.length, self.head_dim)

    @property
    def label(self) -> str:
        size = f"{self.length // 1024}K" if self.length % 1024 == 0 else str(self.length)
        return f"{size} B{self.batch} H{self.heads} D{self.head_dim} {self.pattern}"

    def record(self) -> dict[str, Any]:
        return {"label": self.label, **asdict(self)}

    def layout(self, device: torch.device, generator: torch.Generator) -> BlockLayout:
        """Build the layout; ``generator`` (CPU) draws the tiles of ``random``."""
        if self.tiles is None:
            return BlockLayout.from_pattern(
                parse_pattern(self.pattern),
                q_len=self.length,
                k_len=self.length,
                block_size=self.block,
                device=device,
                heads=self.heads,
            )
        indptr, indices = tile_rows(self.pattern, -(-self.length // self.block), self.tiles, generator)
        return BlockLayout.from_bsr(
            indptr.to(device),
            indices.to(device),
            q_len=self.length,
            k_len=self.length,
            block_size=self.block,
        )


def tile_rows(pattern: str, blocks: int, tiles: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compressed rows (int64 ``[blocks + 1]`` and ``[nnz]``, ascending in a row) of a whole-tile pattern.

    ``local``: ``tiles`` tiles around the diagonal, shifted inwards at both ends so that no row has fewer.
    ``random``: ``tiles`` different tiles a row, every set as likely. ``global+local``: a quarter of the
    budget (at least one) as global columns and as global rows, the rest as the window of ``local``.

    Raises:
        ArgumentError: the budget is not in 1 … ``blocks``, or the pattern is none of the three.
    """
    if not 1 <= tiles <= blocks:
        raise ArgumentError(
            explain(
                "tiles a row",
                expected=f"1 to {blocks} (the blocks of the sequence)",
                got=tiles,
                fix="Choose another density or a longer sequence.",
            )
        )
    if pattern == "local":
        return _rows_of(_window(blocks, tiles))
    if pattern == "random":
        return _rows_of(_random(blocks, tiles, generator))
    if pattern != "global+local":
        raise ArgumentError(
            explain("whole-tile pattern", expected=TILE_PATTERNS, got=repr(pattern), fix="Name one of these.")
        )
    reach = max(1, tiles // 4)
    window = _window(blocks, max(1, tiles - reach))[reach:]
    columns = torch.cat([torch.arange(reach).expand(len(window), reach), window], 1)
    once = torch.ones_like(columns, dtype=torch.bool)
    once[:, reach:] = window >= reach
    counts = torch.cat([torch.full((min(reach, blocks),), blocks), once.sum(1)])
    indices = torch.cat([torch.arange(blocks).repeat(min(reach, blocks)), columns[once]])
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), indices


def grid(
    patterns: Sequence[str],
    lengths: Sequence[int],
    densities: Sequence[float],
    *,
    batch: int,
    heads: int,
    head_dims: Sequence[int],
    dtype: str,
    block: int,
) -> list[Case]:
    """Every combination; a pattern expression has one density, its own."""
    cases = []
    for head_dim in head_dims:
        for length in lengths:
            for pattern in patterns:
                shape = (pattern, length, batch, heads, head_dim, dtype, block)
                if pattern not in TILE_PATTERNS:
                    cases.append(Case(*shape))
                    continue
                blocks = -(-length // block)
                # Two densities that come to the same tiles are one case.
                budgets = {max(1, round(density * blocks)): density for density in reversed(densities)}
                cases += [Case(*shape, tiles, asked) for tiles, asked in sorted(budgets.items())]
    return cases


def baselines() -> list[Case]:
    """The shapes at which peers were measured: 8K, 32K and 128K tokens, head_dim 64 and 128, bfloat16."""
    table = (
        (8192, 4, 16, {"local": 1, "random": 6, "global+local": 2}),
        (32768, 1, 16, {"local": 5, "random": 26, "global+local": 11}),
        (131072, 1, 8, {"local": 10, "global+local": 16}),
    )
    return [
        Case(pattern, length, batch, heads, head_dim, "bfloat16", 128, tiles)
        for length, batch, heads, budgets in table
        for head_dim in (64, 128)
        for pattern, tiles in budgets.items()
    ]


def _window(blocks: int, tiles: int) -> Tensor:
    first = (torch.arange(blocks) - tiles // 2).clamp(0, blocks - tiles)
    return first[:, None] + torch.arange(tiles)


def _random(blocks: int, tiles: int, generator: torch.Generator) -> Tensor:
    """``[blocks, tiles]``: a uniformly drawn set a row, by redrawing what came twice."""
    few = min(tiles, blocks - tiles)  # a large set is the complement of a small one
    drawn = torch.randint(blocks, (blocks, few), generator=generator)
    while few > 1:
        drawn = drawn.sort(1).values
        twice = torch.zeros_like(drawn, dtype=torch.bool)
        twice[:, 1:] = drawn[:, 1:] == drawn[:, :-1]
        again = int(twice.sum())
        if not again:
            break
        drawn[twice] = torch.randint(blocks, (again,), generator=generator)
    if few == tiles:
        return drawn
    kept = torch.ones(blocks, blocks, dtype=torch.bool).scatter_(1, drawn, False)
    return kept.nonzero()[:, 1].view(blocks, tiles)


def _rows_of(columns: Tensor) -> tuple[Tensor, Tensor]:
    rows, tiles = columns.shape
    return torch.arange(rows + 1) * tiles, columns.flatten()
