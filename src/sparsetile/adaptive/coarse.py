"""The coarse branch: attention over one pooled key and value a tile, gated and added to the chosen tiles'.

After Native Sparse Attention (Yuan et al. 2025, arXiv:2502.11089), whose output is a sum of branches, each
with a gate in (0, 1) (eq. 5), one of them over compressed keys (eq. 7; here the compression is the mean).
The other branch keeps the weight 1 that it has without this one, so a closed gate leaves exactly the
attention that was there before. A mixture ``(1 − σ(g))·out + σ(g)·coarse`` would scale it down for every gate
but that, and one softmax over tokens and pooled keys would count the tokens of chosen tiles twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetile.adaptive.losses import for_queries
from sparsetile.adaptive.summaries import tile_summaries, valid_tiles
from sparsetile.functional import sparse_attention

START = 0.05
"""σ(g) at the start: nearly off, and still a twentieth of the gradient for every tile."""

_TILE = 128
"""Edge of the layout's tiles, in queries and in pooled keys; it has no bearing on the result."""


def add_coarse(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    block: int,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    dropout: float,
    backend: str,
) -> Tensor:
    """``out + σ(g)·coarse`` with, for the query at position p::

        coarse = Σ_j softmax_j(scale·q·k̄_j + c_j)·v̄_j   over the pooled tiles j that p sees

    k̄, v̄: means over the tile's tokens that are not ignored; c_j: log-mean-exp of ``key_bias`` over them. In
    causal calls p sees the tiles whose last token stands at p or before; not a tail that fills no tile,
    because with more tokens it would not be seen either. Without such a tile coarse is 0.

    Every tile that a query sees gets a gradient through k̄ and v̄, kept or not (the scorer gets none here).
    Time is O(Nq·Nk/block), memory O(N).

    Args:
        out: ``[B, H, Nq, D]``, of the chosen tiles.
        q, k, v: ``[B, H, Nq, D]``, ``[B, Hkv, Nk, D]``.
        gate: g, ``[1]``, or ``[G]`` for runs of H/G heads.
        block: tokens of a tile.
        key_padding_mask: bool ``[B, Nk]``, True = ignore; a tile of such keys alone is not seen.
        key_bias: ``[B, Nk]``; −inf ignores the key.
        scale, dropout, backend: as in :func:`sparsetile.sparse_attention`.

    Returns:
        ``[B, H, Nq, D]`` in the dtype of ``out``.
    """
    ignored, bias = _ignored(key_padding_mask, key_bias), None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    pooled_k, pooled_v = (tile_summaries(x, block, padding=ignored).to(x.dtype) for x in (k, v))
    if key_bias is not None:
        assert ignored is not None
        bias = for_queries(_log_mean_exp(key_bias, ignored, block).to(wide), q.shape[2])
    coarse = sparse_attention(
        q,
        pooled_k,
        pooled_v,
        pattern_of(q.shape[2], k.shape[2], block, is_causal),
        scale=scale,
        dropout_p=dropout,
        key_padding_mask=None if ignored is None else ~valid_tiles(ignored, block),
        attn_bias=bias,
        block_size=_TILE,
        enable_gqa=True,
        backend=backend,
    )
    share = gate.to(wide).sigmoid().repeat_interleave(q.shape[1] // len(gate))
    # In 16 bits the gate's small steps and half of the digits of its gradient would be lost.
    both: Tensor = out + share[:, None, None] * coarse
    return both.to(out.dtype)


def pattern_of(q_len: int, k_len: int, block: int, is_causal: bool) -> str:
    """Which pooled tiles each query sees, as a pattern's text: a compiled graph can make one."""
    if not is_causal:
        return "Full()"
    # A query's position counts keys: without the shift, those that are left.
    return f"Ended({block}, {k_len - -(-k_len // block)})"


def _ignored(padding: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    if key_bias is None:
        return padding
    forbidden = torch.isneginf(key_bias)
    return forbidden if padding is None else padding | forbidden


def _log_mean_exp(key_bias: Tensor, ignored: Tensor, block: int) -> Tensor:
    """``[B, Nk]`` → ``[B, ⌈Nk/block⌉]``: log of the mean of exp over a tile's tokens that count, else 0."""
    weight = tile_summaries(key_bias[:, None, :, None], block, pooling="lse", padding=ignored, sub=block)
    return weight[:, 0, :, 0]
