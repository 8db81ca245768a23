"""Seen: what a call is judged by: its tile summaries, their features, and where its rows stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.adaptive.scorer import Features, ImportanceScorer
from sparsetile.adaptive.select import own_tiles, reach
from sparsetile.adaptive.summaries import group_queries, tile_summaries, valid_tiles


@dataclass(frozen=True, eq=False)
class Seen:
    """A call as the scorer sees it.

    Attributes:
        q_sum, k_sum: ``[B, G, q_blocks, d]`` and ``[B, G, k_blocks, d]`` summaries.
        features: of them, by the scorer.
        heads: query heads.
        q_len, k_len, block, is_causal: of the call.
        own, reach: int64 ``[q_blocks]``, see :func:`own_tiles` and :func:`reach`.
        valid: bool ``[B, k_blocks]``: tiles with a key that is not ignored; None: all are.
    """

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
        if config.query_summary == "first" or (config.query_summary == "auto" and is_causal):
            # Tiles of one token: the one that each tile of the layout begins with.
            of_query = None if of_query is None else of_query[:, ::block]
            tokens = _wide(q[:, :, ::block])
            q_sum = tile_summaries(tokens, 1, pooling=config.pooling, padding=of_query, sub=1)
        else:
            q_sum = tile_summaries(_wide(q), block, pooling=config.pooling, padding=of_query)
        q_sum = group_queries(q_sum, groups)
        k_sum = tile_summaries(_wide(k), block, pooling=config.pooling, padding=padding)
        if groups > k.shape[1]:
            k_sum = k_sum.repeat_interleave(groups // k.shape[1], 1)
        nq, nk = q_sum.shape[2], k_sum.shape[2]
        return cls(
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

    def choices(self) -> Tensor:
        """How many tiles all rows of all batch elements and groups may choose from: an int64 scalar."""
        batch, groups, _, _ = self.shape
        if self.valid is None:
            return (self.reach + 1).sum() * (batch * groups)
        return F.pad(self.valid.cumsum(1), (1, 0))[:, self.reach + 1].sum() * groups

    def rows_of(self, rows: Tensor) -> Features:
        """The features with rows ``[r]`` of the query tiles alone."""
        a, b, gates = self.features
        return Features(a.index_select(2, rows), b, None if gates is None else gates.index_select(2, rows))


def _wide(x: Tensor) -> Tensor:
    """Summaries have the dtype of their tokens; in 16 bits their rounding alone costs the scorer's gradients
    up to 5 %."""
    return x.float() if x.dtype.itemsize == 2 else x
