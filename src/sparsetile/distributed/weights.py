"""The softmax weights of attention over ranks: each rank's own queries × the whole sequence.

Dense ones are as large as queries × keys, so the keys of all ranks may well be gathered for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetile.distributed.attention import over_ranks, refuse_second_derivative
from sparsetile.distributed.call import Settings
from sparsetile.distributed.layouts import rows_layout
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sequence import gathered, own
from sparsetile.distributed.sharding import Sharding
from sparsetile.nn.weights import attention_weights
from sparsetile.patterns import Pattern


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    ranks: Ranks,
    settings: Settings,
    key_padding_mask: Tensor | None,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`distributed_attention` over more than one rank, and its softmax weights before dropout.

    Args:
        settings: ``need_weights`` and ``weights`` say whether the weights are asked for, and in which form.
        average: the mean over heads instead of each head's own.

    Returns:
        the output ``[B, H, n, D]``; None, or the weights, with n this rank's tokens and N those of all:
        dense ``[B, H, n, N]``, with gradient, or ``torch.sparse_bsr`` of the kept tiles, n and N rounded up
        to whole tiles; without H if ``average``.

    Raises:
        ArgumentError: dense weights of some rank would be too large; otherwise as distributed_attention.
    """
    if torch.compiler.is_compiling():
        from sparsetile.distributed.op import traced

        out, _ = traced(query, key, value, pattern, ranks, settings, key_padding_mask, None)
        # Weights are refused when the graph runs, on every rank: until then this stands for them.
        return out, out.new_empty(0) if settings.need_weights else None
    done = over_ranks(query, key, value, pattern, ranks, settings, key_padding_mask, None)
    if not settings.need_weights:
        return done.out, None
    keys: Tensor = _Keys.apply(ranks, done.where, query, key, value)  # type: ignore[no-untyped-call]
    mask = None
    if key_padding_mask is not None:
        mask = gathered(key_padding_mask.to(torch.uint8), 1, done.where, ranks) != 0
    return done.out, attention_weights(
        query,
        keys,
        done.lse,
        rows_layout(done.layout, done.where, ranks.rank, query.device),
        weights=settings.weights,
        average=average,
        scale=settings.scale,
        key_padding_mask=mask,
    )


class _Keys(torch.autograd.Function):
    """(ranks, sharding, q, k, v) → the keys of all ranks ``[B, Hkv, N, D]``.

    q and v, because backward is collective: ranks agree on whether a gradient comes, not of which of them.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, where: Sharding, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.how = where, ranks
        return gathered(k, 2, where, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        where, ranks = ctx.how
        total = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32, copy=True)
        with ranks.watched("the sum of gradients of weights"):
            dist.all_reduce(total, group=ranks.group)
        return None, None, None, own(total, 2, where, ranks).to(grad.dtype), None
