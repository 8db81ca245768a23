"""Sharding: which rank holds which positions of one sequence, in whole tiles.

Ranks own whole tiles, so that what the ranks exchange, and what kernels read, is never less than a tile. A
rank keeps its tiles in ascending order; with that, the last tile of the sequence, which may be short, is the
last one of its owner, and a rank's tokens lie packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.check import BLOCK_SIZES
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.fixed import Causal
from sparsetile.patterns.hierarchical import Dealt, Hierarchical, deal, is_order

if TYPE_CHECKING:
    from sparsetile.layout.blocks import BlockLayout


@dataclass(frozen=True)
class Sharding:
    """Positions ``0 … length − 1`` over ``ranks``, by tiles of ``block`` tokens.

    The tiles are cut into chunks of consecutive tiles, as evenly as whole tiles allow: the first ``tiles mod
    chunks`` chunks have one more. With fewer tiles than ranks some ranks own nothing.

    Attributes:
        length: tokens of the whole sequence, any number ≥ 1.
        ranks: how many ranks hold it.
        block: tokens of a tile; the last tile may be shorter.
        order: None: one chunk a rank, in order (contiguous). Else the chunks as they are dealt: a
            permutation of ``0 … C − 1``, ``C`` a multiple of ``ranks``, of which rank ``r`` gets
            ``order[r·C/ranks : (r + 1)·C/ranks]``.

    Raises:
        ArgumentError: a value is not as above.
    """

    length: int
    ranks: int
    block: int
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("length", "ranks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise _bad(name, "an integer ≥ 1", value, "Count tokens and processes of the group.")
        if self.block not in BLOCK_SIZES:
            raise _bad("block", f"one of {BLOCK_SIZES}", self.block, "Take the tile edge of the layout.")
        if self.order is None:
            return
        order = tuple(self.order)
        if not is_order(order, self.ranks):
            shown = str(order) if len(order) <= 16 else f"{len(order)} chunks"
            raise _bad(
                "order",
                f"a permutation of 0 … C − 1 with C a multiple of {self.ranks} ranks",
                shown,
                "Use Sharding.balanced() for causal attention.",
            )
        object.__setattr__(self, "order", order)

    @classmethod
    def contiguous(cls, length: int, ranks: int, block: int) -> Sharding:
        """Rank 0 has the first tiles, rank 1 the next, …: a window reaches into neighbours alone."""
        return cls(length, ranks, block)

    @classmethod
    def balanced(cls, length: int, ranks: int, block: int) -> Sharding:
        """Two chunks a rank, ``r`` and ``2·ranks − 1 − r``: with causal attention early rows, which have
        little to do, go with late ones."""
        if type(ranks) is not int or ranks < 1:
            raise _bad("ranks", "an integer ≥ 1", ranks, "Count the processes of the group.")
        return cls(length, ranks, block, tuple(c for r in range(ranks) for c in (r, 2 * ranks - 1 - r)))

    @property
    def tiles(self) -> int:
        """Tiles of the whole sequence."""
        return -(-self.length // self.block)

    def tile_owner(self) -> Tensor:
        """int64 ``[tiles]``: the rank that holds each tile."""
        return self._dealt.owner

    def local_index(self) -> Tensor:
        """int64 ``[tiles]``: the place of each tile among those of its owner."""
        return self._dealt.place

    def tile_counts(self) -> Tensor:
        """int64 ``[ranks]``: how many tiles each rank holds."""
        return self._dealt.starts.diff()

    def tiles_of(self, rank: int) -> Tensor:
        """int64, ascending: the tiles of a rank in the order in which it keeps them."""
        self._check(rank)
        starts = self._dealt.starts
        return self._dealt.tiles[int(starts[rank]) : int(starts[rank + 1])]

    def tokens_of(self, rank: int) -> int:
        """Tokens of a rank; 0 if it owns nothing."""
        tiles = self.tiles_of(rank)
        if not tiles.numel():
            return 0
        missing = self.tiles * self.block - self.length if int(tiles[-1]) == self.tiles - 1 else 0
        return tiles.numel() * self.block - missing

    def runs_of(self, rank: int) -> list[tuple[int, int]]:
        """First position and number of tokens of each unbroken run that a rank holds, in order."""
        tiles = self.tiles_of(rank)
        if not tiles.numel():
            return []
        ends = (tiles.diff() != 1).nonzero().flatten() + 1
        bounds = [0, *ends.tolist(), tiles.numel()]
        first = [int(tiles[start]) * self.block for start in bounds[:-1]]
        counts = [(stop - start) * self.block for start, stop in pairwise(bounds)]
        return [(at, min(count, self.length - at)) for at, count in zip(first, counts, strict=True)]

    def positions_of(self, rank: int) -> Tensor:
        """int64 ``[tokens_of(rank)]``, ascending: where the tokens of a rank stand in the whole sequence
        (what rotary embeddings need)."""
        each = self.tiles_of(rank)[:, None] * self.block + torch.arange(self.block, device="cpu")
        return each.flatten()[: self.tokens_of(rank)]

    def hierarchical(
        self,
        local_sparsity: float = 0.4,
        global_sparsity: float = 0.1,
        inter_node_sparsity: float = 0.05,
        ranks_per_node: int | None = None,
        is_causal: bool = False,
    ) -> Pattern:
        """The pattern of these densities (inside a rank, inside a node, across) for this sharding; see
        ``Hierarchical``.

        Raises:
            PatternError: a density is not in [0, 1], or nodes do not hold as many ranks each.
        """
        densities = (local_sparsity, global_sparsity, inter_node_sparsity)
        pattern = Hierarchical(self.ranks, ranks_per_node, *densities, causal=is_causal, order=self.order)
        return pattern & Causal() if is_causal else pattern

    def _check(self, rank: int) -> None:
        if type(rank) is not int or not 0 <= rank < self.ranks:
            raise _bad("rank", f"0 … {self.ranks - 1}", rank, "Ranks count within the group.")

    @cached_property
    def _dealt(self) -> Dealt:
        with torch.device("cpu"):
            return deal(self.tiles, self.ranks, self.order)


def loads(layout: BlockLayout, sharding: Sharding) -> Tensor:
    """int64 ``[ranks]``: the tiles of each rank's rows, over the heads of the layout."""
    rows = layout.row_counts().cpu().long().reshape(-1, sharding.tiles).sum(0)
    return torch.zeros(sharding.ranks, dtype=rows.dtype, device="cpu").index_add_(
        0, sharding.tile_owner(), rows
    )


def balance(tiles: Tensor) -> float:
    """The largest of ``[ranks]`` counts ÷ their mean; 1 if all are 0."""
    total = int(tiles.sum())
    return int(tiles.max()) * tiles.numel() / total if total else 1.0


def choose_sharding(layout: BlockLayout, ranks: int, threshold: float = 1.25) -> Sharding:
    """Contiguous, unless the busiest rank then has more than ``threshold`` times the mean of the tiles; then
    balanced, if that takes at least a tenth off the busiest rank's (a window reaches into more ranks).

    Causal attention over everything is such a case (the last of many ranks has nearly twice the mean), a
    causal window is not, and a global row is one rank's either way. Reads the row counts of a layout on a
    device.

    Args:
        layout: square tiles, of the whole sequence against itself.

    Raises:
        ArgumentError: ``ranks`` is not an integer ≥ 1.
    """
    contiguous = Sharding.contiguous(layout.q_len, ranks, layout.block_q)
    skew = balance(loads(layout, contiguous))
    if skew <= threshold:
        return contiguous
    dealt = Sharding.balanced(layout.q_len, ranks, layout.block_q)
    return dealt if balance(loads(layout, dealt)) <= 0.9 * skew else contiguous


def _bad(name: str, expected: str, got: object, fix: str) -> ArgumentError:
    shown = got if isinstance(got, str) else repr(got)
    return ArgumentError(explain(f"Sharding({name}=…)", expected=expected, got=shown, fix=fix))
