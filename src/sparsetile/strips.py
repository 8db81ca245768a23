"""Strips: heads at one stride and tokens at another, read from and mixed into whole sequences without copies.

The two differentiable functions here are the two ends of dilated attention. ``take`` cuts a sequence into
strips, which are views; ``mix`` puts strips of attention back, weighted by their softmax denominators.
Slicing and merging by PyTorch's own operators would be exact too, but fills a tensor of the whole sequence
for the gradient of every strip, and one for every branch before they are merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Line(NamedTuple):
    """``size`` indices from ``start`` on in equal steps; step 0 repeats the first."""

    start: int
    step: int
    size: int


class Strip(NamedTuple):
    """Tokens with ``(t mod length) mod rate = offset`` of ``heads``.

    If ``diagonal``, the i-th head has ``offset + i`` instead; ``rate`` must then divide the sequence, and
    ``length`` too, unless that spans the sequence.
    """

    heads: Line
    offset: int
    length: int
    rate: int
    diagonal: bool = False


def _select_heads(x: Tensor, heads: Line) -> Tensor:
    start, step, size = heads
    if step == 0:
        return x[:, start : start + 1].expand(-1, size, -1, -1)
    return x[:, start : start + step * (size - 1) + 1 : step]


def _view(x: Tensor, strip: Strip) -> Tensor | None:
    """The strip of ``[B, H, N, D]`` as a view ``[B, h, n, D]``; None where its tokens have no common step."""
    if strip.length % strip.rate and strip.length < x.shape[2]:
        return None
    part = _select_heads(x, strip.heads)
    if strip.diagonal:
        split = part.view(*part.shape[:2], x.shape[2] // strip.rate, strip.rate, part.shape[3])
        return split.diagonal(strip.offset, 1, 3).movedim(-1, 1)
    return part if strip.rate == 1 else part[:, :, strip.offset :: strip.rate]


def _tokens(x: Tensor, strip: Strip) -> Tensor:
    """The tokens of a strip, ascending."""
    whole, rest = divmod(x.shape[2], strip.length)
    kept = -(-(strip.length - strip.offset) // strip.rate)
    count = whole * kept + max(0, -(-(rest - strip.offset) // strip.rate))
    segments = torch.arange(whole + 1, device=x.device) * strip.length
    within = strip.offset + torch.arange(kept, device=x.device) * strip.rate
    return (segments[:, None] + within).flatten()[:count]


def read(x: Tensor, strip: Strip) -> Tensor:
    """The strip of ``[B, H, N, D]`` as ``[B, h, n, D]``: a view, unless segments are cut at uneven steps."""
    view = _view(x, strip)
    return _select_heads(x, strip.heads).index_select(2, _tokens(x, strip)) if view is None else view


def write(x: Tensor, strip: Strip, values: Tensor) -> None:
    """Replaces the strip of ``x`` by ``values``."""
    view = _view(x, strip)
    if view is None:
        _select_heads(x, strip.heads).index_copy_(2, _tokens(x, strip), values)
    else:
        view.copy_(values)


def add(x: Tensor, strip: Strip, values: Tensor) -> None:
    """Adds ``values`` to the strip of ``x``."""
    view = _view(x, strip)
    if view is None:
        _select_heads(x, strip.heads).index_add_(2, _tokens(x, strip), values.to(x.dtype))
    else:
        view.add_(values)


def take(x: Tensor, strips: Sequence[Strip]) -> tuple[Tensor, ...]:
    """The strips of ``[B, H, N, D]``, as :func:`read` reads them; gradients are summed in fp32 or float64."""
    return _Take.apply(x, strips)  # type: ignore[no-untyped-call, no-any-return]


def mix(
    q: Tensor, strips: Sequence[Strip], outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Strips of attention, mixed by their softmax denominators.

    With lseᵢ the log-sum-exp of the i-th strip at a query, and lse = log Σᵢ exp lseᵢ over the strips that
    hold the query, out = Σᵢ exp(lseᵢ − lse)·outᵢ: one softmax over the keys of all strips, a key that is in
    two of them counted twice. Differentiable in every out and lse.

    Args:
        q: ``[B, H, N, D]``, for its shape.
        strips: where the i-th part belongs; strips may overlap.
        outs, lses: ``[B, h, n, D]`` and ``[B, h, n]`` of each.

    Returns:
        (out ``[B, H, N, D]``, lse ``[B, H, N]``); queries in no strip get 0 and −inf.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*outs, *lses)):
        # torch.compile passes a function without derivative one argument more, if it takes any number.
        return _mixed(q, strips, outs, lses)
    return _Mix.apply(q, strips, *outs, *lses)  # type: ignore[no-untyped-call, no-any-return]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, strips: Sequence[Strip]) -> tuple[Tensor, ...]:
        return tuple(read(x, strip) for strip in strips)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.strips = inputs
        # Shares its memory with the strips, which attention keeps anyway.
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        total = torch.zeros_like(x, dtype=_sum_dtype(x.dtype))
        for strip, grad in zip(ctx.strips, grads, strict=True):
            if grad is not None:
                add(total, strip, grad)
        return total.to(x.dtype), None


def _mixed(
    q: Tensor, strips: Sequence[Strip], outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    lses = [lse.unsqueeze(-1) for lse in lses]
    total = lses[0].new_full((*q.shape[:3], 1), -math.inf)
    for strip, lse in zip(strips, lses, strict=True):
        write(total, strip, torch.logaddexp(read(total, strip), lse))
    shift = _finite(total)
    out = torch.zeros(q.shape, dtype=total.dtype, device=q.device)
    for strip, part, lse in zip(strips, outs, lses, strict=True):
        add(out, strip, torch.exp(lse - read(shift, strip)) * part)
    return out.to(outs[0].dtype), total.squeeze(-1)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, strips: Sequence[Strip], *parts: Tensor) -> tuple[Tensor, Tensor]:
        return _mixed(q, strips, parts[: len(strips)], parts[len(strips) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.strips, *parts = inputs
        ctx.save_for_backward(*parts, output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *parts, lse = ctx.saved_tensors
        strips: Sequence[Strip] = ctx.strips
        outs, lses = parts[: len(strips)], [x.unsqueeze(-1) for x in parts[len(strips) :]]
        total, grad_lse = lse.unsqueeze(-1), grad_lse.unsqueeze(-1)
        # ∂out/∂lseᵢ = wᵢ·(outᵢ − out), so each strip needs the sum over all strips of wᵢ·⟨grad, outᵢ⟩.
        shift, mean = _finite(total), torch.zeros_like(total)
        weights, dots = [], []
        for strip, part, part_lse in zip(strips, outs, lses, strict=True):
            weight = torch.exp(part_lse - read(shift, strip))
            dot = (read(grad_out, strip).to(total.dtype) * part).sum(-1, keepdim=True)
            add(mean, strip, weight * dot)
            weights.append(weight)
            dots.append(dot)
        grad_outs, grad_lses = [], []
        for strip, part, weight, dot in zip(strips, outs, weights, dots, strict=True):
            grad_outs.append((weight * read(grad_out, strip)).to(part.dtype))
            grad_lses.append((weight * (dot - read(mean, strip) + read(grad_lse, strip))).squeeze(-1))
        return None, None, *grad_outs, *grad_lses


def _finite(lse: Tensor) -> Tensor:
    """0 for −inf: a query without any key then has weights exp(−inf − 0) = 0 where −inf − (−inf) is NaN."""
    return lse.masked_fill(torch.isneginf(lse), 0.0)
