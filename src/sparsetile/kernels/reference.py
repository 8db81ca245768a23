"""Dense attention in float64 with explicit gradients: slow, memory-hungry, and the answer to compare with.

Everything is computed in float64 from q, k, v whatever their dtype, and rounded once at the end; backward
starts from q, k, v again rather than from the rounded output. Memory is O(B·H·Nq·Nk).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.kernels.dropout import keep_mask, keep_scale, positions
from sparsetile.kernels.request import Gradients, Request
from sparsetile.layout.blocks import BlockLayout


class _Dense(NamedTuple):
    """A layout written out, ``[Lb, Lh, Nq, Nk]``: the kept pairs, and the tile of each pair (−1: none)."""

    keep: Tensor
    edge: Tensor


def _dense(layout: BlockLayout) -> _Dense:
    device, block_q, block_k = layout.device, layout.block_q, layout.block_k
    nq, nk = layout.q_blocks, layout.k_blocks
    rows = layout.batch * layout.heads * nq
    counts = layout.indptr.long().diff()
    row = torch.repeat_interleave(torch.arange(rows, device=device), counts)
    edge = torch.arange(len(row), device=device)
    column, mask_ids = layout.indices[: len(row)].long(), layout.mask_ids[: len(row)].long()
    keep = torch.ones((len(row), block_q, block_k), dtype=torch.bool, device=device)
    partial = mask_ids >= 0
    bits = torch.arange(32, device=device, dtype=torch.int32)
    pairs = (layout.masks[mask_ids[partial]][..., None] >> bits & 1).bool()
    keep[partial] = pairs.flatten(2)[..., :block_k]
    tiles = torch.zeros((rows, nk, block_q, block_k), dtype=torch.bool, device=device)
    tiles[row, column] = keep
    edges = torch.full((rows, nk), -1, dtype=torch.int64, device=device)
    edges[row, column] = edge

    def spread(x: Tensor) -> Tensor:
        x = x.view(layout.batch, layout.heads, nq, nk, block_q, block_k).transpose(3, 4)
        x = x.reshape(layout.batch, layout.heads, nq * block_q, nk * block_k)
        return x[:, :, : layout.q_len, : layout.k_len]

    return _Dense(spread(tiles), spread(edges[..., None, None].expand(-1, -1, block_q, block_k)))


class _Attention(NamedTuple):
    """float64 ``[B, H, …]``: operands with key heads repeated, weights, and what follows from them."""

    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor
    weights: Tensor
    factor: Tensor | None
    out: Tensor
    lse: Tensor
    edge: Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, request: Request) -> _Attention:
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    dense = _dense(request.layout)
    allowed = dense.keep.expand(batch, heads, -1, -1)
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    bias = torch.zeros((), dtype=torch.float64, device=q.device)
    if request.attn_bias is not None:
        bias = bias + request.attn_bias.double()
    if request.tile_bias is not None and request.layout.capacity:
        values = request.tile_bias.double().expand(batch, heads, -1)
        edge = dense.edge.expand(batch, heads, -1, -1).clamp(min=0)
        bias = bias + values.gather(2, edge.flatten(2)).view(edge.shape)
    allowed = allowed & (bias != -math.inf)
    if request.key_padding_mask is not None:
        ignored = request.key_padding_mask
        ignored = ignored[:, None] if ignored.dim() == 2 else ignored.repeat_interleave(group, 1)
        allowed = allowed & ~ignored[:, :, None]
    # A key with inf or NaN must reach only rows that attend it, but 0·NaN is NaN: zero it, mark its column.
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    k, v = k.masked_fill(bad[..., None], 0), v.masked_fill(bad[..., None], 0)
    scores = request.scale * (q @ k.transpose(-1, -2)) + bias
    scores = scores.masked_fill(bad[:, :, None, :], math.nan).masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp().masked_fill(~allowed, 0)
    factor = None
    if request.dropout_p > 0:
        assert request.seed is not None
        stream = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
        query, key = torch.arange(q_len, device=q.device), torch.arange(k_len, device=q.device)
        if request.q_tiles is not None and request.k_tiles is not None:
            query = positions(request.q_tiles, request.layout.block_q, query)
            key = positions(request.k_tiles, request.layout.block_k, key).repeat_interleave(
                heads // request.k_tiles.shape[0], 0
            )[:, None]
        kept = keep_mask(request.seed, request.dropout_p, stream, query[:, None], key)
        factor = kept.double() * keep_scale(request.dropout_p)
    out = (weights if factor is None else weights * factor) @ v
    return _Attention(q, k, v, allowed, weights, factor, out, lse, dense.edge)


def why_not(q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if not q.dtype.is_floating_point:
        return f"it computes floating-point tensors and q is {q.dtype}."
    if not q.device == k.device == v.device == request.layout.device:
        return f"it needs one device and q is on {q.device}, the layout on {request.layout.device}."
    return None


def _statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and LSE ``[B, H, Nq]`` fp32 (float64 for float64)."""
    result = _attend(q, k, v, request)
    return result.out.to(q.dtype), result.lse.to(_statistic_dtype(q.dtype))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    request: Request,
    *,
    tile_bias_grad: bool,
    attn_bias_grad: bool,
) -> Gradients:
    """Gradients of ``sum(out·grad_out) + sum(lse·grad_lse)``; see ``Backend.backward``."""
    exact = _attend(q, k, v, request)
    layout, (batch, heads), key_heads = request.layout, q.shape[:2], k.shape[1]
    grad_out = grad_out.double()
    # Of a row that has keys elsewhere too, what is given is of all of them. Where it is of these keys alone,
    # what was computed anew is the same without the rounding.
    whole = exact.lse.to(lse.dtype) == lse
    share = torch.where(whole, 0.0, exact.lse - lse.double()).exp()
    weights, factor = exact.weights * share[..., None], exact.factor
    out = torch.where(whole[..., None], exact.out, out.double())
    drift = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        drift = drift - grad_lse.double()[..., None]
    slopes = grad_out @ exact.v.transpose(-1, -2)
    if factor is not None:
        slopes = slopes * factor
    slopes = (weights * (slopes - drift)).masked_fill(~exact.allowed, 0)
    grad_v = (weights if factor is None else weights * factor).transpose(-1, -2) @ grad_out
    grad_k = request.scale * (slopes.transpose(-1, -2) @ exact.q)
    grad_q = request.scale * (slopes @ exact.k)

    def sum_groups(x: Tensor) -> Tensor:
        return x.view(batch, key_heads, heads // key_heads, *x.shape[2:]).sum(2)

    tile_bias = attn_bias = None
    if tile_bias_grad:
        edge = exact.edge.expand(batch, heads, -1, -1).flatten(2)
        sums = slopes.new_zeros((batch, heads, layout.capacity + 1))
        sums.scatter_add_(2, torch.where(edge < 0, layout.capacity, edge), slopes.flatten(2))
        tile_bias = sums[..., : layout.capacity]
        if layout.batch > 1:
            tile_bias = tile_bias.sum(0, keepdim=True)
        if layout.heads > 1:
            tile_bias = tile_bias.sum(1, keepdim=True)
        tile_bias = tile_bias.to(_statistic_dtype(q.dtype))
    if attn_bias_grad:
        assert request.attn_bias is not None
        attn_bias = slopes.to(request.attn_bias.dtype)
    grads = (grad_q.to(q.dtype), sum_groups(grad_k).to(k.dtype), sum_groups(grad_v).to(v.dtype))
    return Gradients(*grads, tile_bias, attn_bias)
