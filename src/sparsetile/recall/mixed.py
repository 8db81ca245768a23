"""Easy and hard inputs in one stream: does a share of the mass spend fewer tiles than a fixed number?

A sequence is a memory of tiles and then questions, each a key that fills a tile of queries::

    memory       noise … key value … noise | key value … | …      two rounds of pairs at random places
    questions    key key … key | key key … key | …                 each looks at the memory alone

In an *easy* sequence all keys of the memory differ, and the answer is the value behind the key asked for: one
tile in all holds it. In a *hard* one the key stands in ``votes`` tiles, each time before one of two values,
and the answer is the value that most of them name, a majority of one: whoever misses a tile may be misled.
Both have as many pairs, in as many tiles, and noise of the symbols of values.

Rows of the layout are questions alone, one row each, so the tiles counted are all that are computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.check import BLOCK_SIZES
from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.recall.model import Layer, ModelConfig
from sparsetile.train.model import Linear, norm

Emit = Callable[[dict[str, Any]], None]
Start = dict[str, Tensor]
DENSE, TOP_P = "dense", "top_p"
KINDS = ("easy", "hard")
_RISE = 10
# Streams of data of one seed, apart from each other.
_START, _OWN, _FRESH = 0, 1, 2


class MixedBatch(NamedTuple):
    """Sequences and what is asked in them.

    Attributes:
        tokens: int64 ``[B, length]``: keys are ``0 … keys − 1``, values and noise the ``values`` symbols
            above.
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
        keys: symbols of keys, at least ``questions · votes``.
        values: symbols of values and noise.

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
        pairs = self.questions * self.votes
        demand("keys", self.keys >= pairs, f"at least questions · votes = {pairs}", "Easy keys all differ.")
        demand("values", self.values >= 2, "at least 2", "With one there is nothing to recall.")

    @property
    def symbols(self) -> int:
        return self.keys + self.values

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

        order = shuffled(batch, self.keys)[:, : self.questions * self.votes].view(pairs)
        keys = torch.where(hard[:, None, None], order[..., :1], order)
        first = drawn(0, self.values, batch, self.questions, 1)
        second = (first + drawn(1, self.values, batch, self.questions, 1)) % self.values
        vote = torch.arange(self.votes, device=device)
        voted = torch.where(vote <= self.votes // 2, first, second)
        values = self.keys + torch.where(
            hard[:, None, None] | (vote == 0), voted, drawn(0, self.values, *pairs)
        )

        tokens = drawn(self.keys, self.symbols, batch, self.memory)
        tokens.scatter_(1, key_at, keys.flatten(1))
        tokens.scatter_(1, key_at + 1, values.flatten(1))
        asked = keys[..., 0].repeat_interleave(self.block, 1)
        held = torch.where(hard[:, None, None] | (vote == 0), tiles, -1)
        return MixedBatch(torch.cat((tokens, asked), 1), values[..., 0], hard, held)


class Asked(nn.Module):
    """Attention of the questions to the memory, by tiles that a learned scorer chooses, or dense.

    Attributes:
        module: None: dense.
    """

    def __init__(self, task: MixedTask, model: ModelConfig, config: AdaptiveConfig | None) -> None:
        super().__init__()
        self.task = task
        self.module: BlockSparseAdaptive | None = None
        if config is not None:
            self.module = BlockSparseAdaptive(config, num_heads=model.heads, head_dim=model.head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v ``[B, H, length, D]`` → ``[B, H, length, D]``, 0 in the memory, where nobody asks."""
        memory = self.task.memory
        q, k, v = q[:, :, memory:], k[:, :, :memory], v[:, :, :memory]
        if self.module is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            found = self.module(*(x.transpose(1, 2) for x in (q, k, v)))
            assert isinstance(found, Tensor)
            out = found.transpose(1, 2)
        return F.pad(out, (0, 0, memory, 0))

    def set(self, **options: Any) -> None:
        """Changes settings of the module from here on."""
        if self.module is not None:
            self.module.config = replace(self.module.config, **options)

    def kept(self, batch: int) -> Tensor:
        """bool ``[B, heads, questions, tiles]``: what the last call kept."""
        task, module = self.task, self.module
        if module is None:
            return torch.ones((1, 1, 1, 1), dtype=torch.bool).expand(batch, 1, task.questions, task.tiles)
        layout = module.last_layout
        counts = layout.indptr.diff().long()
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        flat = torch.zeros(len(counts), task.tiles, dtype=torch.bool, device=counts.device)
        flat[row, layout.indices[: len(row)].long()] = True
        return flat.view(layout.batch, layout.heads, layout.q_blocks, task.tiles)


class Reader(nn.Module):
    """One layer of the experiment's model, read at the first token of each question."""

    def __init__(self, config: ModelConfig, task: MixedTask) -> None:
        super().__init__()
        self.task = task
        self.embed = nn.Embedding(task.symbols, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = Linear(config.width, task.symbols)

    def forward(self, tokens: Tensor, attend: Asked) -> Tensor:
        """``tokens`` int64 [B, length] → logits float32 [B, questions, symbols]."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, attend)
        logits: Tensor = self.head(norm(x[:, self.task.memory :: self.task.block])).float()
        return logits
