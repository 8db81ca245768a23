"""Decoding, dense and in float64: the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.kernels.decode_request import DecodeRequest


def decode(q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and natural LSE ``[B, H, Nq]`` (fp32; float64 for float64)."""
    batch, heads, q_len, _ = q.shape
    device = q.device
    slots = torch.arange(request.capacity, device=device)
    everyone = torch.arange(batch, device=device)
    group = torch.arange(heads, device=device) // (heads // k.shape[1])
    every = slots.expand(batch, 1, -1)
    keys, values = (request.gather(x, everyone, group, every).double() for x in (k, v))
    dense = torch.stack([request.layout.to_dense(head) for head in range(request.layout.heads)])
    positions = request.positions(batch)  # [B, Nq]
    where = slots - request.starts_of(everyone)[:, None]  # [B, capacity]
    inside = (where >= 0) & (slots < request.ends(batch)[:, None])
    if request.key_padding_mask is not None:
        inside = inside & ~request.key_padding_mask
    allowed = dense[:, positions.clamp(min=0)[:, :, None], where.clamp(0, dense.shape[2] - 1)[:, None, :]]
    allowed = allowed.transpose(0, 1) & inside[:, None, None] & (positions >= 0)[:, None, :, None]
    allowed = allowed.expand(batch, heads, q_len, request.capacity)
    gone = ~inside[:, None, :, None]
    keys, values = keys.masked_fill(gone, 0), values.masked_fill(gone, 0)
    scores = (q.double() @ keys.transpose(2, 3) * request.scale).masked_fill(~allowed, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return (weights @ values).to(q.dtype), lse.to(
        torch.float64 if q.dtype == torch.float64 else torch.float32
    )
