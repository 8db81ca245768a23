"""Decoding on the CPU: gather the kept tiles of each row, one batched product, softmax, another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.kernels.decode_request import DecodeRequest
from sparsetile.patterns.tiles import unpack

_ELEMENTS = 1 << 22  # gathered key elements at a time: 16 MiB in fp32


def why_not(q: Tensor, request: DecodeRequest) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if not q.is_cpu:
        return f"it computes on the CPU and the tensors are on {q.device.type!r}."
    return None


def decode(q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and natural LSE ``[B, H, Nq]``."""
    layout = request.layout
    batch, heads, q_len, width = q.shape
    key_heads = k.shape[1]
    own_heads = key_heads if layout.heads == 1 else heads  # rows of tiles are gathered for each of these
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=precise)
    rows, counts = request.rows()  # [B, Nq, layout heads]
    longest = max(1, int(counts.max()))
    span = longest * layout.block_k
    at_once = max(1, _ELEMENTS // (own_heads * span * width))
    each = torch.cartesian_prod(torch.arange(batch), torch.arange(q_len)).view(-1, 2)
    bits = unpack(layout.masks, layout.block_k)
    within = torch.arange(longest)
    for part in torch.split(each, at_once):
        b, i = part.unbind(1)
        first, count = rows[b, i], counts[b, i]  # [n, layout heads]
        edges = (first[..., None] + within).clamp(max=max(0, layout.capacity - 1))
        there = within < count[..., None]
        slots = request.starts_of(b)[:, None, None, None] + (
            layout.indices[edges].long()[..., None] * layout.block_k + torch.arange(layout.block_k)
        )
        ids = layout.mask_ids[edges].long()
        allowed = there[..., None] & (slots >= 0) & (slots < request.lengths[b][:, None, None, None])
        if layout.masks.shape[0]:
            bit_row = request.positions()[b, i] % layout.block_q
            held = bits[ids.clamp(min=0), bit_row[:, None, None]]
            allowed = allowed & (held | (ids < 0)[..., None])
        slots, allowed = slots.flatten(2), allowed.flatten(2)  # [n, layout heads, span]
        slots = slots.clamp(0, request.capacity - 1)
        if request.key_padding_mask is not None:
            allowed = allowed & ~request.key_padding_mask[b[:, None, None], slots]
        head = torch.arange(own_heads) // (own_heads // key_heads)
        keys = request.gather(k, b, head, slots).to(precise)  # [n, own heads, span, D]
        # What no query of the row may attend is not there, NaN included.
        hidden = (~allowed)[..., None]
        values = request.gather(v, b, head, slots).to(precise).masked_fill(hidden, 0)
        queries = q[b, :, i].to(precise).view(len(part), own_heads, heads // own_heads, width)
        scores = (queries @ keys.transpose(2, 3)).mul_(request.scale)
        scores = scores.masked_fill(~allowed[:, :, None], -math.inf)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
        total = weights.sum(-1, keepdim=True)
        made = (weights @ values).div_(total.masked_fill(total == 0, 1))
        out[b, :, i] = made.view(len(part), heads, width).to(q.dtype)
        lse[b, :, i] = (top + total.log()).view(len(part), heads)
    return out, lse
