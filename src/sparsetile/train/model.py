"""A small byte-level transformer: RMSNorm, RoPE, SwiGLU, grouped key heads, and any attention you hand it.

Flat on purpose. Five choices are unusual, and the same in every arm of a comparison. Together they let a
model learn to copy from far back within about a hundred steps, where others wait through a long plateau:

- *Token shift*: queries are made from the last four bytes, keys from the byte itself and the three before
  it, a quarter of the channels each. So one layer can find "where did these bytes stand before, and
  what came next" (an induction head; Olsson et al. 2022, arXiv:2209.11895). No parameters.
- *RoPE on a quarter of each head's channels*: the others compare content alone, at any distance.
- *Agreement*: values are normalised and what a head finds is scaled by its mean square, which is 1 where the
  values that it attends agree and about 1/n where it spreads over n unlike ones. So a head that looks where
  the answer is not keeps quiet. That matters where heads share out the keys. No parameters.
- *Sharpness*: queries and keys are normalised, and each head learns the temperature of its softmax by its
  logarithm. It starts low: too sharp a head takes its best chance likeness for a find, and the heads that
  look where the answer is not speak louder than the one that has it.
- *Start*: queries and keys start from nearly the same weights (like is compared with like), each head's
  output projection as its values' transpose, scaled to undo them, and the output layer as the embedding (what
  is attended to becomes more likely).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.errors import ArgumentError, explain
from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive

SYMBOLS = 256
QUERY_TAPS = (0, 1, 2, 3)
KEY_TAPS = (1, 2, 3, 0)
# The score of a query and a key that are wholly alike, at the start.
_SHARPNESS = 16.0
# Heads that share keys and start alike would stay alike under dense attention, as one head.
_UNLIKENESS = 0.1
# The logarithm moves by this times the learning rate: a doubling takes some hundred steps at most.
_SHARPNESS_RATE = 4.0

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(q [B, H, N, D], k [B, Hkv, N, D], v [B, Hkv, N, D]) → [B, H, N, D]``, causal."""
TokenShift = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``x [B, N, C]`` → what queries and what keys are made from, each ``[B, N, C]``: :func:`token_shift`, or the
same for tokens that do not lie together."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Raises:
        ArgumentError: a size below 1, ``heads`` that do not divide ``width`` into head widths that are
            multiples of 8, or ``kv_heads`` that do not divide ``heads``.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        sizes = (self.layers, self.width, self.heads, self.kv_heads)
        if min(sizes) < 1 or self.width % (8 * self.heads) or self.heads % self.kv_heads:
            raise ArgumentError(
                explain(
                    "model sizes",
                    expected="all ≥ 1, width a multiple of 8·heads, heads a multiple of kv-heads",
                    got="layers {}, width {}, heads {}, kv-heads {}".format(*sizes),
                    fix="For example --layers 2 --width 128 --heads 4 --kv-heads 2.",
                )
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Inner width of the SwiGLU block: 8/3 of the width, rounded up to a multiple of 32."""
        return -(-self.width * 8 // 3 // 32) * 32


def shift(x: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Part ``i`` of the channels comes from ``taps[i]`` tokens earlier. ``x`` [B, N, C] → [B, N, C]."""
    parts = zip(x.chunk(len(taps), dim=-1), taps, strict=True)
    return torch.cat([F.pad(part, (0, 0, tap, -tap)) if tap else part for part, tap in parts], dim=-1)


def token_shift(x: Tensor) -> tuple[Tensor, Tensor]:
    """What queries and what keys are made from: ``x`` [B, N, C] shifted by their taps."""
    return shift(x, QUERY_TAPS), shift(x, KEY_TAPS)


def rope_tables(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 ``[N, dim/2]`` for positions ``[N]`` (Su et al. 2021, arXiv:2104.09864,
    eq. 15)."""
    frequency = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the leading channels of ``x`` [B, H, N, D], two for each column of the tables."""
    cos, sin = tables
    pairs = cos.shape[-1]
    a, b, content = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, content], dim=-1)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    return F.rms_norm(x, (x.shape[-1],))


class Linear(nn.Linear):
    """A bias-free layer whose float32 weight is cast to the dtype of its input: float32 master weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Layer(nn.Module):
    """One transformer layer: attention, then SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(width, width)
        self.k = Linear(width, config.kv_heads * config.head_dim)
        self.v = Linear(width, config.kv_heads * config.head_dim)
        self.o = Linear(width, width)
        self.sharpness = nn.Parameter(torch.zeros(config.heads, 1, 1))
        self.gate = Linear(width, config.hidden)
        self.up = Linear(width, config.hidden)
        self.down = Linear(config.hidden, width)
        with torch.no_grad():
            self.q.weight.mul_(_UNLIKENESS).add_(self._of_every_head(self.k.weight))
            self.o.weight.copy_(self._of_every_head(self.v.weight).T * (width / config.head_dim))
            self.down.weight.zero_()

    def _of_every_head(self, weight: Tensor) -> Tensor:
        """A weight of the key heads repeated for the query heads that share them."""
        by_head = weight.view(self.kv_heads, self.head_dim, -1)
        return by_head.repeat_interleave(self.heads // self.kv_heads, 0).flatten(0, 1)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], attend: Attention, shifted: TokenShift
    ) -> Tensor:
        h = norm(x)
        batch, length, _ = h.shape
        of_q, of_k = shifted(h)
        q = self.q(of_q).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k(of_k).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = norm(self.v(h).view(batch, length, self.kv_heads, -1).transpose(1, 2))
        # Attention divides by √D what normalised queries and keys have, at most D.
        sharpness = _SHARPNESS * self.head_dim**-0.5 * (_SHARPNESS_RATE * self.sharpness).exp()
        q, k = rotate(norm(q) * sharpness.to(q.dtype), tables), rotate(norm(k), tables)
        found = attend(q, k, v)
        found = found * found.square().mean(-1, keepdim=True)
        x = x + self.o(found.transpose(1, 2).flatten(2))
        h = norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Model(nn.Module):
    """Bytes in, logits of the next byte out.

    Attributes:
        learned: with an AdaptiveConfig, what chooses the tiles of each layer; else empty.
    """

    def __init__(self, config: ModelConfig, adaptive: AdaptiveConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(SYMBOLS, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = Linear(config.width, SYMBOLS)
        with torch.no_grad():
            self.head.weight.copy_(self.embed.weight * config.width**-0.5)
        # Drawn last: all else starts as in a model without.
        self.learned = nn.ModuleList(
            BlockSparseAdaptive(
                adaptive, num_heads=config.heads, num_kv_heads=config.kv_heads, head_dim=config.head_dim
            )
            for _ in range(config.layers if adaptive else 0)
        )

    def forward(
        self,
        tokens: Tensor,
        attend: Attention | Sequence[Attention],
        dtype: torch.dtype = torch.float32,
        positions: Tensor | None = None,
        shifted: TokenShift = token_shift,
    ) -> Tensor:
        """``tokens`` int64 [B, N] → logits float32 [B, N, 256], computed in ``dtype``.

        ``attend``: one for all layers, or one for each. ``positions`` int64 [N] and ``shifted``: where these
        tokens stand and what comes before them, if they are not a whole sequence.
        """
        config = self.config
        each = [attend] * config.layers if callable(attend) else attend
        rotated = max(2, config.head_dim // 8 * 2)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = rope_tables(positions, rotated, config.rope_base)
        tables = (cos.to(dtype), sin.to(dtype))
        x = norm(self.embed(tokens).to(dtype))
        for layer, of_layer in zip(self.layers, each, strict=True):
            x = layer(x, tables, of_layer, shifted)
        logits: Tensor = self.head(norm(x)).float()
        return logits
