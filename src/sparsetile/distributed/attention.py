"""Attention over a sequence that is spread over ranks: each receives the tiles that its rows attend.

The plan says before a byte moves which key-value tiles those are. The ranks agree on the call, then each
computes its parts (``parts.py``). Compiled graphs hold the same as operators (``op.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sparsetile.distributed.call import Order, Settings, check_choices, checked, described, sharding_by
from sparsetile.distributed.parts import Call, biases_of, call_of
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, BackendError, explain
from sparsetile.functional import sparse_attention
from sparsetile.kernels.dropout import draw_seed
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.weights import check_dense_size
from sparsetile.patterns import Pattern


@overload
def distributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    group: object = ...,
    order: Order = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    key_padding_mask: Tensor | None = ...,
    tile_bias: Tensor | None = ...,
    block_size: int = ...,
    enable_gqa: bool = ...,
    max_remote_tokens: int | None = ...,
    ranks_per_node: int | None = ...,
    keep: bool = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def distributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    group: object = ...,
    order: Order = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    key_padding_mask: Tensor | None = ...,
    tile_bias: Tensor | None = ...,
    block_size: int = ...,
    enable_gqa: bool = ...,
    max_remote_tokens: int | None = ...,
    ranks_per_node: int | None = ...,
    keep: bool = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def distributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    group: object = None,
    order: Order = "contiguous",
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    tile_bias: Tensor | None = None,
    block_size: int = 128,
    enable_gqa: bool = False,
    max_remote_tokens: int | None = None,
    ranks_per_node: int | None = None,
    keep: bool = True,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``sparse_attention`` of a sequence that is spread over the ranks of a group.

    Every rank passes its own tokens and gets their output: what one process would compute for them, with its
    gradients. Forward and backward are collective. Before any payload the ranks compare what they are about
    to do; if they differ, each of them raises the same error and nothing is sent.

    Args:
        query: ``[B, H, n, D]``, this rank's tokens; how many it must hold says
            ``Sharding.contiguous(N, ranks, block_size)`` (or ``balanced``), with N the tokens of all ranks.
            :func:`shard_sequence` cuts a whole sequence.
        key, value: ``[B, Hkv, n, D]``; with ``enable_gqa`` H may be a multiple of Hkv.
        pattern: of the whole sequence, the same on every rank: a Pattern, its text, or a BlockLayout of N × N
            tokens in square tiles of ``block_size``, batch 1.
        group: process group, one-dimensional DeviceMesh, or None: the default group, or this process alone.
        order: ``"contiguous"``: rank 0 holds the first tokens, and so on. ``"balanced"``: chunks r and
            2·ranks − 1 − r, so that causal attention gives all ranks as much to do.
        is_causal, scale, backend, return_lse: as for :func:`sparsetile.sparse_attention`.
        dropout_p: share of the softmax weights to drop, in [0, 1). Which ones depends on positions in the
            whole sequence and a seed that rank 0 draws from the CPU's generator: not on how many ranks there
            are. (One process draws from its device's generator; inductor has draws of its own.)
        key_padding_mask: bool ``[B, n]`` of this rank's tokens, True = ignore this key.
        tile_bias: fp32, as for ``sparse_attention`` with a BlockLayout, of the whole layout, the same on
            every rank. A rank's gradient of it holds the share of its own queries: add them up over ranks, as
            for any parameter that all ranks have.
        block_size: tile edge in tokens.
        max_remote_tokens: the most remote tokens (of each kv head) that an exchange brings a rank: more come
            in stages, one after the other. None: all at once.
        ranks_per_node: how many consecutive ranks of the group one node holds, a divisor of their number. A
            unit that several ranks of another node need travels there once and is passed on there; one sum
            of its gradients travels back. None: ranks receive all from its owners. A world of one sends
            nothing, whatever the number.
        keep: whether remote tiles are kept for backward; else they are sent again then. In graphs of
            ``torch.compile`` they are always sent again: the same result.

    Returns:
        ``[B, H, n, D]`` in query's dtype; with ``return_lse`` a tuple with the log-sum-exp ``[B, H, n]``.

    Raises:
        MismatchError: ranks differ in what they ask for, or one of them cannot: the same on every rank.
        RankLostError: a rank did not take part; forward or backward.
        ArgumentError, PatternError, LayoutError, BackendError: as ``sparse_attention``, where all ranks make
            the same mistake; a second derivative.
    """
    ranks = Ranks.of(group)
    if ranks.size == 1:
        check_choices(order, keep, ranks_per_node)
        # The layout of a text or Pattern is the cache's; all else is what one process does anyway.
        out, lse = sparse_attention(
            query,
            key,
            value,
            pattern,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            key_padding_mask=key_padding_mask,
            tile_bias=tile_bias,
            block_size=block_size,
            enable_gqa=enable_gqa,
            deterministic=True,
            backend=backend,
            return_lse=True,
        )
        return (out, lse) if return_lse else out
    settings = Settings(
        order,
        is_causal,
        scale,
        dropout_p,
        enable_gqa,
        backend,
        block_size,
        max_remote_tokens,
        keep,
        ranks_per_node=ranks_per_node,
    )
    if torch.compiler.is_compiling():
        from sparsetile.distributed.op import traced

        out, lse = traced(query, key, value, pattern, ranks, settings, key_padding_mask, tile_bias)
        return (out, lse) if return_lse else out
    done = over_ranks(query, key, value, pattern, ranks, settings, key_padding_mask, tile_bias)
    return (done.out, done.lse) if return_lse else done.out


class Done(NamedTuple):
    """A call's output and log-sum-exp, the layout of the whole sequence, on the CPU, and who holds what."""

    out: Tensor
    lse: Tensor
    layout: BlockLayout
    where: Sharding


def over_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    ranks: Ranks,
    settings: Settings,
    key_padding_mask: Tensor | None,
    tile_bias: Tensor | None,
) -> Done:
    """:func:`distributed_attention` over more than one rank, of arguments that nobody has looked at."""
    tensors = (query, key, value, tile_bias)
    gradients = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    query, key, value, where, draw = agreed(
        query, key, value, pattern, ranks, settings, key_padding_mask, tile_bias, gradients
    )
    call, layout = call_of(query, key, pattern, ranks, settings, key_padding_mask, where, draw)
    biases = biases_of(tile_bias, query, layout, call.plan)
    out, lse = _Spread.apply(call, query, key, value, *biases)  # type: ignore[no-untyped-call]
    return Done(out, lse, layout, where)


def agreed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    ranks: Ranks,
    settings: Settings,
    key_padding_mask: Tensor | None,
    tile_bias: Tensor | None,
    gradients: bool,
    drawn: Tensor | None = None,
    problem: Exception | None = None,
) -> tuple[Tensor, Tensor, Tensor, Sharding, int]:
    """The tensors as autocast has them, who holds what, and rank 0's draw for dropout.

    Args:
        gradients: whether a backward will come.
        drawn: this rank's draw, on the CPU, where it was made before.
        problem: what is known to be wrong already.

    Raises:
        SparsetileError: on every rank, before anything is sent, unless all make the same call.
    """
    facts: dict[str, object] = {}
    try:
        if problem is not None:
            raise problem
        query, key, value = checked(query, key, value, key_padding_mask, tile_bias, settings)
        facts = described(query, key, value, pattern, key_padding_mask, tile_bias, settings, gradients)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    tokens = draw = 0
    if problem is None:
        tokens = query.shape[2]
        if settings.dropout_p > 0.0:
            # On the CPU: what a device draws would have to be waited for, to be told. Every rank draws, so
            # that generators that were alike stay alike; rank 0's draw counts, so that they need not be.
            draw = int(draw_seed(torch.device("cpu")) if drawn is None else drawn)
    counts, draw = ranks.agree(facts, tokens, problem, draw)
    # From here on every rank does the same: what fails now fails on all of them.
    length = sum(counts)
    where = sharding_by(settings.order, length, ranks.size, settings.block_size)
    wanted = tuple(where.tokens_of(rank) for rank in range(ranks.size))
    if counts != wanted:
        raise ArgumentError(
            explain(
                "tokens of the ranks",
                expected=f"{list(wanted)} ({length} in whole tiles of {where.block}, {settings.order})",
                got=list(counts),
                fix="Cut the sequence with shard_sequence.",
            )
        )
    if settings.need_weights and settings.weights == "dense":
        # Those of the rank that holds most, so that all refuse or none.
        most = query.new_empty((*query.shape[:2], max(counts), query.shape[3]), device="meta")
        check_dense_size(most, length)
    return query, key, value, where, draw


class _Spread(torch.autograd.Function):
    """(call, q, k, v, bias of the own part, biases of the stages) → (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, kept = call.forward(q, k, v, biases)
        ctx.set_materialize_grads(False)
        # The mask is kept by autograd, which notices if it is changed in place before backward.
        ctx.save_for_backward(q, k, v, out, lse, call.mask, *biases, *kept)
        ctx.call = replace(call, mask=None)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        q, k, v, out, lse, mask, *rest = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        biases, kept = rest[: len(wanted)], rest[len(wanted) :]
        call: Call = replace(ctx.call, mask=mask)
        dq, dk, dv, of_biases = call.backward(q, k, v, out, lse, grad_out, grad_lse, biases, wanted, kept)
        return None, dq, dk, dv, *of_biases


def refuse_second_derivative() -> None:
    """Raises BackendError in a backward pass that shall be derived in its turn."""
    if torch.is_grad_enabled():
        raise BackendError(
            "distributed_attention has no second derivative: expected backward() or torch.autograd.grad, "
            "got create_graph=True. Use F.scaled_dot_product_attention where you need one."
        )
