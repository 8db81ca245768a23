"""The model of the experiment: attention layers alone, small, and plain but for one choice.

Keys are made from the token *before* (values and queries from the token itself), so one layer can find "what
followed this symbol". Where models learn that by a convolution or a layer before, here it is given, and the
same in all arms. There are no positions: the answer may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.errors import ArgumentError, explain
from sparsetile.recall.task import Task
from sparsetile.train.model import Attention, Linear, norm


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Raises:
        ArgumentError: a size below 1, or ``heads`` that do not divide ``width`` into multiples of 8.
    """

    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        sizes = (self.layers, self.width, self.heads)
        if min(sizes) < 1 or self.width % (8 * self.heads):
            raise ArgumentError(
                explain(
                    "model sizes",
                    expected="all ≥ 1, width a multiple of 8·heads",
                    got="layers {}, width {}, heads {}".format(*sizes),
                    fix="For example --layers 1 --width 64 --heads 1.",
                )
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Layer(nn.Module):
    """Attention of a token to the tokens whose predecessors are like it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        h = norm(x)
        before = F.pad(h, (0, 0, 1, -1))

        def by_head(y: Tensor) -> Tensor:
            return torch.unflatten(y, -1, (self.heads, -1)).transpose(1, 2)

        found = attend(by_head(self.q(h)), by_head(self.k(before)), by_head(self.v(h)))
        out: Tensor = x + self.o(found.transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    """Symbols in, logits of the answers out."""

    def __init__(self, config: ModelConfig, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = Linear(config.width, symbols)

    def forward(
        self, tokens: Tensor, task: Task, attends: Sequence[Attention], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``tokens`` int64 [B, N] → logits float32 [B, queries, symbols]; one attention for each layer."""
        x = self.embed(tokens).to(dtype)
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, attend)
        logits: Tensor = self.head(norm(task.at_queries(x))).float()
        return logits
