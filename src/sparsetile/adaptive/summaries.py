"""One vector a tile: what the scorer looks at in place of the tile's tokens.

Mean pooling is MoBA's choice (Lu et al. 2025, arXiv:2502.13189, eq. 6: the affinity of a query with a block
is its product with the mean of the block's keys). The other two keep more of a tile that holds one
outstanding token among many plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetile.errors import ArgumentError, explain
from sparsetile.kernels.triton_backend import device_problem

POOLINGS = ("mean", "max_min", "lse")


def summary_dim(head_dim: int, pooling: str) -> int:
    """Width of the summaries that ``pooling`` makes of tokens of width ``head_dim``."""
    check_pooling(pooling)
    return 2 * head_dim if pooling == "max_min" else head_dim


def check_pooling(pooling: object) -> None:
    if pooling not in POOLINGS:
        raise ArgumentError(
            explain(
                "pooling",
                expected=f"one of {', '.join(POOLINGS)}",
                got=repr(pooling),
                fix="'mean' is the usual choice.",
            )
        )


def tile_summaries(
    x: Tensor, block: int, *, pooling: str = "mean", padding: Tensor | None = None, sub: int = 4
) -> Tensor:
    """Summaries of tiles of ``block`` tokens; differentiable, O(N·D) time and memory.

    With V the valid tokens of a tile (inside the sequence and not ignored), per channel::

        mean:     Σ_{t∈V} x_t / |V|
        max_min:  [max_{t∈V} x_t, min_{t∈V} x_t]
        lse:      log( Σ_{p∈P} exp(m_p) / |P| )

    where ``lse`` cuts the tile into ``sub`` equal parts, m_p is the mean of part p and P are the parts that
    hold a valid token: a smooth maximum. Dividing by |P| keeps tiles that are only partly filled on the
    scale of the others. A tile without a valid token has the summary 0, and no gradient.

    Args:
        x: ``[B, H, N, D]``, floating point, any strides.
        block: tokens of a tile; the last tile may hold fewer.
        pooling: ``"mean"``, ``"max_min"`` or ``"lse"``.
        padding: bool ``[B, N]``, True = ignore the token, whatever it holds, NaN included.
        sub: parts of a tile for ``"lse"``; must divide ``block``.

    Returns:
        ``[B, H, ⌈N/block⌉, D']`` float32 (float64 for float64 input), D' = 2·D for ``"max_min"``, else D. In
        16 bits their rounding alone would cost a scorer's gradients up to 5 %.

    Raises:
        ArgumentError: an argument is not as above.
    """
    check_pooling(pooling)
    _check_tokens(x, block, padding)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if pooling == "mean":
        return _by_pieces(x, padding, block, lambda piece, valid: _mean(piece, valid, wide))
    if pooling == "max_min":
        return _by_pieces(x, padding, block, lambda piece, valid: _max_min(piece, valid, wide))
    return _log_mean_exp(x, padding, block, sub, wide)


def means_beside(x: Tensor, block: int, tokens: int) -> tuple[Tensor, Tensor]:
    """x, and of each tile the mean of its first ``tokens`` tokens, with one gradient for both.

    The gradient of means is as large as x and nearly empty of news: autograd would write it out and add it
    to that of x. Here it is added to the gradient that comes for the x returned, in its memory. So what is
    returned must be used in place of x, by an operation whose backward makes a tensor of its own.

    Args:
        x: ``[B, H, N, D]``, floating point, any strides.
        block: 16, 32, 64 or 128.
        tokens: 1, or ``block``.

    Returns:
        (x, ``[B, H, ⌈N/block⌉, D]`` float32, or float64 for float64 input).
    """
    both: tuple[Tensor, Tensor] = _Beside.apply(x, block, tokens)  # type: ignore[no-untyped-call]
    return both


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, tokens: int) -> tuple[Tensor, Tensor]:
        ctx.block, ctx.tokens, ctx.shape, ctx.dtype = block, tokens, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        means = x[:, :, ::block].to(wide) if tokens == 1 else tile_summaries(x, block)
        return x.view_as(x), means

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_means: Tensor | None) -> tuple[Tensor | None, None, None]:
        if of_means is None:
            return grad, None, None
        block, length = ctx.block, ctx.shape[2]
        if grad is None:
            grad = of_means.new_zeros(ctx.shape, dtype=ctx.dtype)
        elif any(step == 0 and size > 1 for step, size in zip(grad.stride(), grad.shape, strict=True)):
            grad = grad.contiguous()  # one place in memory for several elements, as of a sum: not to write to
        if ctx.tokens == 1:
            grad[:, :, ::block] += of_means
            return grad, None, None
        served = grad.is_cuda and grad.dtype != torch.float64 and grad.stride(-1) == 1
        # A kernel's sum would have no second derivative.
        served = served and not torch.is_grad_enabled()
        if served and device_problem(grad.device, "gradients") is None:
            from sparsetile.kernels.triton_spread import add_means

            add_means(grad, of_means.contiguous(), block)
            return grad, None, None
        whole = length // block
        inner = torch.unflatten(grad[:, :, : whole * block], 2, (whole, block))
        inner += (of_means[:, :, :whole] / block)[..., None, :]
        if length % block:
            grad[:, :, whole * block :] += of_means[:, :, whole:] / (length % block)
        return grad, None, None


def group_queries(summaries: Tensor, groups: int) -> Tensor:
    """Means over ``groups`` equal runs of heads: ``[B, H, n, D]`` to ``[B, G, n, D]``.

    Raises:
        ArgumentError: ``groups`` does not divide H.
    """
    heads = summaries.shape[1]
    if type(groups) is not int or groups < 1 or heads % groups:
        raise ArgumentError(
            explain(
                "groups",
                expected=f"a divisor of the {heads} heads",
                got=repr(groups),
                fix="One group a key-value head is the usual choice; H groups select for each query head.",
            )
        )
    if groups == heads:
        return summaries
    wide = torch.float64 if summaries.dtype == torch.float64 else torch.float32
    return torch.unflatten(summaries, 1, (groups, heads // groups)).mean(2, dtype=wide).to(summaries.dtype)


def valid_tiles(padding: Tensor, block: int) -> Tensor:
    """bool ``[B, ⌈N/block⌉]``: the tiles with a token that is not ignored; ``padding`` is bool ``[B, N]``."""
    rest = -padding.shape[1] % block
    valid = F.pad(~padding, (0, rest), value=False) if rest else ~padding
    return torch.unflatten(valid, 1, (-1, block)).any(-1)


def _check_tokens(x: Tensor, block: int, padding: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or 0 in x.shape:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(
            explain(
                "tile_summaries(x)",
                expected="floats [B, H, N, D] without an empty dimension",
                got=got,
                fix="From [B, N, H, D] use transpose(1, 2).",
            )
        )
    if type(block) is not int or block < 1:
        raise ArgumentError(
            explain(
                "block",
                expected="an integer ≥ 1",
                got=repr(block),
                fix="Give the block size of the layout.",
            )
        )
    expected = (x.shape[0], x.shape[2])
    if padding is not None and (padding.dtype != torch.bool or tuple(padding.shape) != expected):
        raise ArgumentError(
            explain(
                "padding",
                expected=f"bool {list(expected)}, True = ignore the token",
                got=f"{padding.dtype} {list(padding.shape)}",
                fix="For lengths use torch.arange(N) >= lengths[:, None].",
            )
        )


def _by_pieces(
    x: Tensor, padding: Tensor | None, size: int, reduce: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """``reduce`` of runs of ``size`` tokens, the shorter one at the end on its own: nothing is padded.

    ``reduce`` gets ``[B, H, n, size, D]`` and the valid tokens ``[B, 1, n, size, 1]``, or None if all are.
    """
    whole = x.shape[2] // size * size
    outs = []
    for start, stop, length in ((0, whole, size), (whole, x.shape[2], x.shape[2] - whole)):
        if start < stop:
            valid = None
            if padding is not None:
                valid = ~torch.unflatten(padding[:, None, start:stop], -1, (-1, length))[..., None]
            outs.append(reduce(torch.unflatten(x[:, :, start:stop], 2, (-1, length)), valid))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _mean(piece: Tensor, valid: Tensor | None, wide: torch.dtype) -> Tensor:
    if valid is None:
        return piece.mean(-2, dtype=wide)
    # Not a product with the mask: what is ignored may be NaN.
    total = piece.masked_fill(~valid, 0.0).sum(-2, dtype=wide)
    return total / valid.sum(-2).clamp(min=1)


def _max_min(piece: Tensor, valid: Tensor | None, wide: torch.dtype) -> Tensor:
    if valid is None:
        return torch.cat((piece.amax(-2), piece.amin(-2)), -1).to(wide)
    top = piece.masked_fill(~valid, -torch.inf).amax(-2)
    bottom = piece.masked_fill(~valid, torch.inf).amin(-2)
    both = torch.cat((top, bottom), -1).to(wide)
    return both.masked_fill(~valid.any(-2), 0.0)


def _log_mean_exp(x: Tensor, padding: Tensor | None, block: int, sub: int, wide: torch.dtype) -> Tensor:
    if type(sub) is not int or sub < 1 or block % sub:
        raise ArgumentError(
            explain(
                "sub",
                expected=f"a divisor of the block size {block}",
                got=repr(sub),
                fix="4 parts suit blocks of 16 to 128.",
            )
        )
    size = block // sub
    means = _by_pieces(x, padding, size, lambda piece, valid: _mean(piece, valid, wide))
    rest = -means.shape[2] % sub
    means = torch.unflatten(F.pad(means, (0, 0, 0, rest)), 2, (-1, sub))
    parts = torch.zeros((x.shape[0], 1, x.shape[2], 1), dtype=torch.bool, device=x.device)
    if padding is not None:
        parts = padding[:, None, :, None]
    # Parts past the end of the sequence count as ignored, too.
    parts = F.pad(parts, (0, 0, 0, -x.shape[2] % block), value=True)
    filled = ~torch.unflatten(parts, 2, (-1, sub, size)).all(-2)
    some = filled.any(-2, keepdim=True)
    out = means.masked_fill(~filled & some, -torch.inf).logsumexp(-2)
    count = filled.sum(-2).clamp(min=1).to(wide)
    return (out - count.log()).masked_fill(~some.squeeze(-2), 0.0)
