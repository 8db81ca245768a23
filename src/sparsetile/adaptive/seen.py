"""Seen: what a call is judged by: its tile summaries, their features, and where its rows stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.scorer import Features, ImportanceScorer
from sparsetile.adaptive.select import farthest, own_tiles, reach
from sparsetile.adaptive.summaries import group_queries, means_beside, tile_summaries, valid_tiles


@dataclass(frozen=True, eq=False)
class Seen:
    """A call as the scorer sees it.

    Attributes:
        q, k: to be attended with in place of those given, see :func:`means_beside`.
        q_sum, k_sum: ``[B, G, q_blocks, d]`` and ``[B, G, k_blocks, d]`` summaries.
        features: of them, by the scorer.
        heads: query heads.
        q_len, k_len, block, is_causal: of the call.
        own, reach: int64 ``[q_blocks]``, see :func:`own_tiles` and :func:`reach`.
        valid: bool ``[B, k_blocks]``: tiles with a key that is not ignored; None: all are.
    """

    q: Tensor
    k: Tensor
    q_sum: Tensor
    k_sum: Tensor
    features: Features
    heads: int
    q_len: int
    k_len: int
    block: int
    is_causal: bool
    own: Tensor
    reach: Tensor
    valid: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        scorer: ImportanceScorer,
        config: AdaptiveConfig,
        *,
        is_causal: bool,
        padding: Tensor | None,
    ) -> Seen:
        """q ``[B, H, Nq, D]``, k ``[B, Hkv, Nk, D]``, padding bool ``[B, Nk]``, True = ignore."""
        heads, q_len, k_len, block = q.shape[1], q.shape[2], k.shape[2], config.block_size
        groups, offset = heads if config.per_query_head else k.shape[1], k_len - q_len
        of_query = None
        if padding is not None and config.self_attention:
            of_query = padding[:, offset:] if offset >= 0 else F.pad(padding, (-offset, 0), value=False)
        tokens = block
        if config.query_summary == "first" or (config.query_summary == "auto" and is_causal):
            tokens = 1
        q, q_sum = _summarised(q, block, tokens, config.pooling, of_query)
        q_sum = group_queries(q_sum, groups)
        k, k_sum = _summarised(k, block, block, config.pooling, padding)
        if groups > k.shape[1]:
            k_sum = k_sum.repeat_interleave(groups // k.shape[1], 1)
        nq, nk = q_sum.shape[2], k_sum.shape[2]
        return cls(
            q,
            k,
            q_sum,
            k_sum,
            scorer.features(q_sum, k_sum),
            heads,
            q_len,
            k_len,
            block,
            is_causal,
            own_tiles(nq, nk, offset_tokens=offset, block=block, device=q.device),
            reach(nq, nk, is_causal=is_causal, offset_tokens=offset, block=block, device=q.device),
            None if padding is None else valid_tiles(padding, block),
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, G, q_blocks, k_blocks)"""
        batch, groups, nq, _ = self.q_sum.shape
        return batch, groups, nq, self.k_sum.shape[2]

    @property
    def astride(self) -> bool:
        """Whether query tiles of a causal call lie over two key tiles, the second wholly in the future of the
        row's first query."""
        return self.is_causal and (self.k_len - self.q_len) % self.block != 0

    def unscored(self, column: Tensor, own: Tensor) -> Tensor:
        """The tiles ``column`` that a row with the tile ``own`` keeps whatever their score: its own and, in
        causal calls, any that reaches beyond its first query."""
        return column >= own if self.is_causal else column == own

    def allowed(self, rows: Tensor) -> Tensor:
        """bool ``[B, 1, r, k_blocks]``: the tiles that rows ``[r]`` may choose from."""
        column = torch.arange(self.shape[3], device=rows.device)
        within = (column <= self.reach[rows][:, None]).expand(self.shape[0], 1, -1, -1)
        return within if self.valid is None else within & self.valid[:, None, None]

    def choices(self) -> Tensor | int:
        """How many tiles all rows of all batch elements and groups may choose from; an int64 scalar on the
        device if keys are ignored."""
        batch, groups, nq, nk = self.shape
        if self.valid is not None:
            return F.pad(self.valid.cumsum(1), (1, 0))[:, self.reach + 1].sum() * groups
        if not self.is_causal:
            return batch * groups * nq * nk
        first = farthest(self.k_len - self.q_len, self.block)
        return batch * groups * (_up_to(first + nq, nk) - _up_to(first, nk))

    def rows_of(self, rows: Tensor) -> Features:
        """The features with rows ``[r]`` of the query tiles alone."""
        a, b, gates = self.features
        return Features(a.index_select(2, rows), b, None if gates is None else gates.index_select(2, rows))


def _up_to(n: int, most: int) -> int:
    """Σ min(i, most) for i = 1 … n; 0 for n < 1."""
    n, level = max(n, 0), min(max(n, 0), most)
    return level * (level + 1) // 2 + (n - level) * most


def _summarised(
    x: Tensor, block: int, tokens: int, pooling: str, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x to go on with, summaries of the first ``tokens`` tokens of each tile: 1, or ``block``)."""
    differentiable = x.requires_grad and torch.is_grad_enabled()
    # A compiler joins the two gradients itself, and one of torch 2.11's loses what is added in place.
    if pooling == "mean" and padding is None and differentiable and not torch.compiler.is_compiling():
        return means_beside(x, block, tokens)
    if tokens == block:
        return x, tile_summaries(x, block, pooling=pooling, padding=padding)
    # Tiles of one token: the one that each tile of the layout begins with.
    padding = None if padding is None else padding[:, ::block]
    return x, tile_summaries(x[:, :, ::block], 1, pooling=pooling, padding=padding, sub=1)
