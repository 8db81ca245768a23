"""Block-MQAR: recall of values by their keys, one query at the beginning of each tile of the second half.

Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927, section 4) on tiles::

    first half    noise … key value … noise … key value …       pairs at random places, no key twice
    second half   query noise … noise | query noise … | …        a key of the first half, none twice

The answer, asked for at the query itself, is the value that followed the key: anywhere in the first half, so
the distance is random and says nothing. Noise is drawn from the symbols of values, so nothing but a key in
front of it tells a value from noise; keys occur in pairs and queries alone.

A query stands first in its tile because a causal tile of queries is judged by its first query alone
(``AdaptiveConfig.query_summary``): this way every arm is asked only what it may know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.check import BLOCK_SIZES


class Batch(NamedTuple):
    """Sequences and what is asked in them.

    Attributes:
        tokens: int64 ``[B, length]``: keys are ``0 … keys − 1``, values and noise the
            ``values`` symbols above.
        answers: int64 ``[B, queries]``: the symbol asked for at each query.
        places: int64 ``[B, queries]``: where the answer stands.
    """

    tokens: Tensor
    answers: Tensor
    places: Tensor


@dataclass(frozen=True)
class Task:
    """Sizes of block-MQAR.

    Attributes:
        length: tokens of a sequence; an even number of tiles.
        block: tokens of a tile.
        pairs: key-value pairs of a sequence, at least one for each query.
        keys: symbols that pairs draw their keys from, at least ``pairs``.
        values: symbols of values and noise.

    Raises:
        ArgumentError: sizes that do not fit each other.
    """

    length: int
    block: int
    pairs: int
    keys: int
    values: int

    def __post_init__(self) -> None:
        def demand(name: str, fits: bool, expected: str, fix: str) -> None:
            if not fits:
                raise ArgumentError(explain(name, expected=expected, got=getattr(self, name), fix=fix))

        known = ", ".join(map(str, BLOCK_SIZES))
        demand("block", self.block in BLOCK_SIZES, f"one of {known}", "16 and 32 make many tiles.")
        demand(
            "length",
            self.length > 0 and self.length % (2 * self.block) == 0,
            f"a multiple of 2 · block = {2 * self.block}",
            "Each half of a sequence is whole tiles.",
        )
        half = self.length // 2
        demand(
            "pairs",
            self.queries <= self.pairs <= half // 2,
            f"{self.queries} (one for each query) to {half // 2} (half of the tokens before the queries)",
            "No pair is asked for twice. A sixteenth of the length is usual.",
        )
        demand("keys", self.keys >= self.pairs, f"at least pairs = {self.pairs}", "All keys differ.")
        demand("values", self.values >= 2, "at least 2", "With one there is nothing to recall.")

    @property
    def symbols(self) -> int:
        return self.keys + self.values

    @property
    def tiles(self) -> int:
        """Tiles of a sequence."""
        return self.length // self.block

    @property
    def queries(self) -> int:
        """Queries of a sequence: one for each tile of the second half."""
        return self.tiles // 2

    def at_queries(self, x: Tensor) -> Tensor:
        """What ``x`` ``[B, length, …]`` holds at the queries: ``[B, queries, …]``."""
        return x[:, self.length // 2 :: self.block]

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """``batch`` fresh sequences on the generator's device, without a host sync."""
        device, half = generator.device, self.length // 2

        def shuffled(count: int, take: int) -> Tensor:
            order = torch.rand(batch, count, generator=generator, device=device).argsort(-1)
            return order[:, :take]

        tokens = torch.randint(
            self.keys, self.symbols, (batch, self.length), generator=generator, device=device
        )
        # Places that differ, each moved on by those before it: pairs of two tokens that never overlap.
        start = shuffled(half - self.pairs, self.pairs).sort(-1).values
        start = start + torch.arange(self.pairs, device=device)
        keys = shuffled(self.keys, self.pairs)
        tokens.scatter_(1, start, keys)
        asked = shuffled(self.pairs, self.queries)
        tokens[:, half :: self.block] = keys.gather(1, asked)
        places = start.gather(1, asked) + 1
        return Batch(tokens, tokens.gather(1, places), places)
