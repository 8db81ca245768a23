"""Attention over a sequence that is spread over ranks: each receives the tiles that its rows attend.

The plan says before a byte moves which key-value tiles those are. Own tiles are computed while the first
remote ones are on their way, every part by the same kernels as a single process uses, and the parts are
merged by their log-sum-exp in fp32: one softmax over everything. Backward gives every part the final output
and log-sum-exp, so that its gradients are exact on their own (as in ring attention, Liu et al. 2023,
arXiv:2310.01889), sends those of remote tiles back where they came from, and adds them in fp32 in the order
of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sparsetile import op
from sparsetile.arguments import checked_tile_bias
from sparsetile.distributed.call import Order, Settings, check_choices, checked, described, sharding_by
from sparsetile.distributed.exchange import Buffers, Exchange
from sparsetile.distributed.layouts import layout_of, plan_of
from sparsetile.distributed.rank_plan import RankPlan
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, BackendError, explain
from sparsetile.functional import merge_attention, sparse_attention
from sparsetile.kernels.dropout import draw_seed
from sparsetile.kernels.request import Gradients, Request
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
            are. (One process draws from its device's generator.)
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
        keep: whether remote tiles are kept for backward; else they are sent again then.

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
    problem: Exception | None = None
    call: dict[str, object] = {}
    try:
        query, key, value = checked(query, key, value, key_padding_mask, tile_bias, settings)
        call = described(query, key, value, pattern, key_padding_mask, tile_bias, settings)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    tokens = draw = 0
    if problem is None:
        tokens = query.shape[2]
        if settings.dropout_p > 0.0:
            # On the CPU: what a device draws would have to be waited for, to be told. Every rank draws, so
            # that generators that were alike stay alike; rank 0's draw counts, so that they need not be.
            draw = int(draw_seed(torch.device("cpu")))
    counts, draw = ranks.agree(call, tokens, problem, draw)
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
    layout = layout_of(pattern, settings.is_causal, length, where.block, query.shape[1])
    plan = plan_of(layout, where, ranks.rank, query, key, settings.max_remote_tokens, settings.ranks_per_node)
    scale = 1.0 / math.sqrt(query.shape[3]) if settings.scale is None else float(settings.scale)
    seed = None
    if settings.dropout_p > 0.0:
        # A fill: what is copied to a device is waited for.
        seed = torch.full((1,), draw, dtype=torch.int64, device=query.device)
    made = _Call(
        plan,
        ranks,
        where.block,
        scale,
        float(settings.dropout_p),
        seed,
        key_padding_mask,
        settings.backend,
        settings.keep,
    )
    biases = _biases(tile_bias, query, layout, plan)
    out, lse = _Spread.apply(made, query, key, value, *biases)  # type: ignore[no-untyped-call]
    return Done(out, lse, layout, where)


@dataclass(frozen=True, eq=False)
class _Call:
    """All of a call but its tensors with gradients."""

    plan: RankPlan
    ranks: Ranks
    block: int
    scale: float
    dropout_p: float
    seed: Tensor | None
    mask: Tensor | None
    backend: str
    keep: bool

    def exchange(self, k: Tensor, v: Tensor) -> Exchange:
        return Exchange(self.plan, self.ranks, self.block, k, v, self.mask)

    def own(self, k: Tensor, v: Tensor) -> Buffers:
        """This rank's own keys."""
        return Buffers(k, v, self.mask, self.plan.tiles[None])

    def attend(
        self, layout: BlockLayout, q: Tensor, keys: Buffers, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return op.run(q, keys.k, keys.v, self._request(layout, keys, bias), self.backend)

    def gradients(
        self,
        layout: BlockLayout,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        keys: Buffers,
        bias: Tensor | None,
        bias_grad: bool,
    ) -> Gradients:
        """One part's share of the gradients; ``out`` and ``lse`` are of all parts."""
        request = self._request(layout, keys, bias)
        return op.run_backward(
            grad_out, grad_lse, q, keys.k, keys.v, out, lse, request, self.backend, bias_grad, False
        )

    def _request(self, layout: BlockLayout, keys: Buffers, bias: Tensor | None) -> Request:
        return Request(
            layout,
            self.scale,
            self.dropout_p,
            self.seed,
            key_padding_mask=keys.mask,
            tile_bias=bias,
            q_tiles=None if self.seed is None else self.plan.tiles,
            k_tiles=None if self.seed is None else keys.tiles,
        )


class _Spread(torch.autograd.Function):
    """(call, q, k, v, bias of the own part, biases of the stages) → (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        plan, exchange = call.plan, call.exchange(k, v)
        arriving = exchange.start(0)
        done = None
        if plan.own is not None:
            done = _merged(None, call.attend(plan.own, q, call.own(k, v), biases[0]))
        kept: list[Tensor | None] = []
        for number, stage in enumerate(plan.stages):
            buffers, arriving = exchange.advance(arriving, number)
            if stage.layout is not None:
                done = _merged(done, call.attend(stage.layout, q, buffers, biases[number + 1]))
            if call.keep:
                kept += (buffers.k, buffers.v, buffers.mask)
        out, lse = (q.new_zeros(q.shape), _statistic(q)) if done is None else (done[0].to(q.dtype), done[1])
        ctx.set_materialize_grads(False)
        # The mask is kept by autograd, which notices if it is changed in place before backward.
        ctx.save_for_backward(q, k, v, out, lse, call.mask, *biases, *kept)
        ctx.call = replace(call, mask=None)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        q, k, v, out, lse, mask, *rest = ctx.saved_tensors
        call: _Call = replace(ctx.call, mask=mask)
        plan, wanted = call.plan, ctx.needs_input_grad[4:]
        biases, kept = rest[: len(wanted)], rest[len(wanted) :]
        given = (q, out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse)
        exchange = call.exchange(k, v)
        arriving = None if call.keep else exchange.start(0)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        of_biases: list[Tensor | None] = [
            torch.zeros_like(bias) if want else None for bias, want in zip(biases, wanted, strict=True)
        ]

        def part(number: int, layout: BlockLayout, buffers: Buffers) -> tuple[Tensor, Tensor]:
            bias, want = biases[number], wanted[number]
            found = call.gradients(layout, *given, buffers, bias, want)
            dq.add_(found.q)
            if found.tile_bias is not None:
                of_biases[number] = found.tile_bias.sum_to_size(bias.shape).to(bias.dtype)
            return found.k, found.v

        for number, stage in enumerate(plan.stages):
            if call.keep:
                held_k, held_v, held_mask = kept[3 * number : 3 * number + 3]
                buffers = Buffers(held_k, held_v, held_mask, stage.tiles)
            else:
                buffers, arriving = exchange.advance(arriving, number)
            pair = (None, None) if stage.layout is None else part(number + 1, stage.layout, buffers)
            exchange.send_back(stage, *pair)
        exchange.send_on()
        total = exchange.zeros()
        if plan.own is not None:
            # Computed while the others' gradients are on their way.
            exchange.add_own(total, *part(0, plan.own, call.own(k, v)))
        exchange.add_back(total)
        dk, dv = exchange.packed(total, k.shape[2])
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *of_biases


def refuse_second_derivative() -> None:
    """Raises BackendError in a backward pass that shall be derived in its turn."""
    if torch.is_grad_enabled():
        raise BackendError(
            "distributed_attention has no second derivative: expected backward() or torch.autograd.grad, "
            "got create_graph=True. Use F.scaled_dot_product_attention where you need one."
        )


def _merged(done: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Parts over disjoint keys as one, in fp32."""
    part = part[0].to(part[1].dtype), part[1]
    return part if done is None else merge_attention(done, part)


def _statistic(q: Tensor) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)


def _biases(
    tile_bias: Tensor | None, query: Tensor, layout: BlockLayout, plan: RankPlan
) -> list[Tensor | None]:
    """The bias of each part's tiles, taken from that of the whole layout with gradient."""
    if tile_bias is None:
        return [None] * (1 + len(plan.stages))
    shaped = checked_tile_bias(tile_bias, query, layout)
    assert shaped is not None
    mine = shaped.index_select(2, plan.edges)
    return [mine.index_select(2, edges) for edges in (plan.own_edges, *(x.edges for x in plan.stages))]
