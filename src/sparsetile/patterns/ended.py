"""Keys that stand for runs of tokens: a query sees the runs that have ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsetile.patterns.base import Interval
from sparsetile.patterns.parameters import floor, integer
from sparsetile.patterns.tiles import UNBOUNDED, Key, Span, Tiles


@dataclass(frozen=True, eq=False)
class Ended(Interval):
    """Key k stands for tokens ``k·step … (k + 1)·step − 1``, and is seen from the last of them on:
    ``(k + 1)·step ≤ q + shift + 1``.

    Not public: arises in the coarse branch of adaptive attention alone. Positions count keys, of which there
    are fewer than tokens, so the query at position ``q`` stands at token ``q + shift``.
    """

    step: int
    shift: int = 0

    def __post_init__(self) -> None:
        integer("Ended", "step", self.step, 1)
        integer("Ended", "shift", self.shift)

    def interval(self, q: torch.Tensor) -> Span:
        return Span(torch.full_like(q, -UNBOUNDED), floor(q + (self.shift + 1), self.step))

    def signature(self, tiles: Tiles) -> Key:
        # Query t of a tile sees its keys below ⌊(apart + t) / step⌋.
        grid = tiles.grid
        apart = tiles.q0 + (self.shift + 1) - tiles.k0 * self.step
        least = grid.offset + self.shift + 1 - grid.k_blocks * grid.block_k * self.step
        most = grid.offset + grid.q_blocks * grid.block_q + self.shift + 1
        return Key(apart - least, most - least + 1)
