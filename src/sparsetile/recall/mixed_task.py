"""Easy and hard inputs in one stream: does a share of the mass need fewer tiles than a fixed number?

A sequence is a memory of tiles and then questions, each a key that fills a tile of queries::

    memory       blank … key value … blank | … key value … blank | …     pairs at random places
    questions    key key … | key key … | …                               each sees the memory alone

In an *easy* sequence one tile holds the key asked for, and the answer is the value behind it. In a *hard* one
``votes`` tiles do, each time before one of two values, and the answer is the value that most of them name, by
a majority of one: whoever misses a tile may be misled. Both have as many pairs in as many tiles; in easy ones
the others are pairs of keys that nobody asks for.

All queries of a tile ask the same, because a tile of queries is chosen for, and its mass summed,
as one. Rows of the layout are questions alone, so the tiles counted are all that are computed. One of them is
the row's own, at its position from the end of the memory, which the module always keeps and which is of no
more use here than any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.check import BLOCK_SIZES


class MixedBatch(NamedTuple):
    """Sequences and what is asked in them.

    Attributes:
        tokens: int64 ``[B, length]``: keys are ``0 … keys − 1``, values the ``values`` symbols above, and the
            last symbol is the blank.
        answers: int64 ``[B, questions]``.
        hard: bool ``[B]``.
        tiles: int64 ``[B, questions, votes]``: tiles of the memory that hold the key asked for; of an easy
            question one, the others −1.
    """

    tokens: Tensor
    answers: Tensor
    hard: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class MixedTask:
    """Sizes of the stream.

    Attributes:
        tiles: of the memory.
        block: tokens of a tile.
        questions: of a sequence.
        votes: tiles that hold the key of a hard question, an odd number.
        keys: symbols of keys, more than ``questions``.
        values: symbols of values.

    Raises:
        ArgumentError: sizes that do not fit each other.
    """

    tiles: int
    block: int
    questions: int
    votes: int
    keys: int
    values: int

    def __post_init__(self) -> None:
        def demand(name: str, fits: bool, expected: str, fix: str) -> None:
            if not fits:
                raise ArgumentError(explain(name, expected=expected, got=getattr(self, name), fix=fix))

        known = ", ".join(map(str, BLOCK_SIZES))
        demand("block", self.block in BLOCK_SIZES, f"one of {known}", "16 makes many tiles.")
        demand("votes", self.votes >= 3 and self.votes % 2 == 1, "an odd number ≥ 3", "9 is usual.")
        demand("tiles", self.tiles >= 2 * self.votes, f"at least 2 · votes = {2 * self.votes}", "Add some.")
        most = min(self.tiles // self.votes * (self.block // 2), self.tiles)
        demand("questions", 1 <= self.questions <= most, f"1 to {most}", "Their pairs share the tiles.")
        demand(
            "keys", self.keys > self.questions, f"above questions = {self.questions}", "Not all are asked."
        )
        demand("values", self.values >= 2, "at least 2", "With one there is nothing to recall.")

    @property
    def symbols(self) -> int:
        return self.keys + self.values + 1

    @property
    def memory(self) -> int:
        """Tokens before the questions."""
        return self.tiles * self.block

    @property
    def length(self) -> int:
        return self.memory + self.questions * self.block

    def sample(self, batch: int, generator: torch.Generator) -> MixedBatch:
        """``batch`` fresh sequences on the generator's device, every other one hard, without a host sync."""
        device, pairs = generator.device, (batch, self.questions, self.votes)

        def shuffled(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device).argsort(-1)

        def drawn(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device=device)

        hard = torch.arange(batch, device=device) % 2 == 1
        # In each round the pairs of some questions get tiles of their own, and each tile a place for one.
        at_once = self.tiles // self.votes
        rounds = -(-self.questions // at_once)
        tiles = shuffled(batch, rounds, self.tiles)[..., : at_once * self.votes]
        tiles = tiles.reshape(batch, -1, self.votes)[:, : self.questions]
        slots = shuffled(batch, self.tiles, self.block // 2)[..., :rounds].flatten(1)
        turn = torch.arange(self.questions, device=device)[:, None] // at_once
        slot = slots.gather(1, (tiles * rounds + turn).flatten(1)).view(pairs)
        key_at = (tiles * self.block + 2 * slot).flatten(1)

        order = shuffled(batch, self.keys)
        key = order[:, : self.questions, None]
        others = order.gather(1, drawn(self.questions, self.keys, batch, pairs[1] * pairs[2])).view(pairs)
        first = drawn(0, self.values, batch, self.questions, 1)
        second = (first + drawn(1, self.values, batch, self.questions, 1)) % self.values
        vote = torch.arange(self.votes, device=device)
        keys = torch.where(hard[:, None, None] | (vote == 0), key, others)
        voted = torch.where(vote <= self.votes // 2, first, second)
        values = self.keys + torch.where(
            hard[:, None, None] | (vote == 0), voted, drawn(0, self.values, *pairs)
        )

        tokens = torch.full((batch, self.memory), self.symbols - 1, device=device)
        tokens.scatter_(1, key_at, keys.flatten(1))
        tokens.scatter_(1, key_at + 1, values.flatten(1))
        asked = keys[..., 0].repeat_interleave(self.block, 1)
        held = torch.where(hard[:, None, None] | (vote == 0), tiles, -1)
        return MixedBatch(torch.cat((tokens, asked), 1), values[..., 0], hard, held)
