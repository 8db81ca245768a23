"""The parts of a rank's attention: own tiles and stages of received ones, forward and backward.

Own tiles are computed while the first remote ones are on their way, every part by the same kernels as a
single process uses, and the parts are merged by their log-sum-exp in fp32: one softmax over everything.
Backward gives every part the final output and log-sum-exp, so that its gradients are exact on their own (as
in ring attention, Liu et al. 2023, arXiv:2310.01889), sends those of remote tiles back where they came from,
and adds them in fp32 in the order of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile import op
from sparsetile.arguments import checked_tile_bias
from sparsetile.distributed.call import Settings
from sparsetile.distributed.exchange import Buffers, Exchange
from sparsetile.distributed.layouts import layout_of, plan_of
from sparsetile.distributed.rank_plan import RankPlan
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding
from sparsetile.functional import merge_attention
from sparsetile.kernels.request import Gradients, Request
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Call:
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
            lean=True,  # a step that is done again is to give the same bits
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Output, log-sum-exp, and what is kept of the stages: keys, values and mask of each. Collective.

        Args:
            biases: of the own part, and of each stage.
        """
        plan, exchange = self.plan, self.exchange(k, v)
        arriving = exchange.start(0)
        done = None
        if plan.own is not None:
            done = _merged(None, self.attend(plan.own, q, self.own(k, v), biases[0]))
        kept: list[Tensor | None] = []
        for number, stage in enumerate(plan.stages):
            buffers, arriving = exchange.advance(arriving, number)
            if stage.layout is not None:
                done = _merged(done, self.attend(stage.layout, q, buffers, biases[number + 1]))
            if self.keep:
                kept += (buffers.k, buffers.v, buffers.mask)
        out, lse = (q.new_zeros(q.shape), _statistic(q)) if done is None else (done[0].to(q.dtype), done[1])
        return out, lse, kept

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        biases: Sequence[Tensor | None],
        wanted: Sequence[bool],
        kept: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """Gradients of q, k, v and of the biases that are wanted. Collective."""
        plan = self.plan
        given = (q, out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse)
        exchange = self.exchange(k, v)
        arriving = None if self.keep else exchange.start(0)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        of_biases: list[Tensor | None] = [
            torch.zeros_like(bias) if want and bias is not None else None
            for bias, want in zip(biases, wanted, strict=True)
        ]

        def part(number: int, layout: BlockLayout, buffers: Buffers) -> tuple[Tensor, Tensor]:
            bias, want = biases[number], wanted[number]
            found = self.gradients(layout, *given, buffers, bias, want)
            dq.add_(found.q)
            if found.tile_bias is not None:
                assert bias is not None
                of_biases[number] = found.tile_bias.sum_to_size(bias.shape).to(bias.dtype)
            return found.k, found.v

        for number, stage in enumerate(plan.stages):
            if self.keep:
                held_k, held_v, held_mask = kept[3 * number : 3 * number + 3]
                assert held_k is not None and held_v is not None
                buffers = Buffers(held_k, held_v, held_mask, stage.tiles)
            else:
                buffers, arriving = exchange.advance(arriving, number)
            pair = (None, None) if stage.layout is None else part(number + 1, stage.layout, buffers)
            exchange.send_back(stage, *pair)
        exchange.send_on()
        total = exchange.zeros()
        if plan.own is not None:
            # Computed while the others' gradients are on their way.
            exchange.add_own(total, *part(0, plan.own, self.own(k, v)))
        exchange.add_back(total)
        dk, dv = exchange.packed(total, k.shape[2])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_biases


def call_of(
    query: Tensor,
    key: Tensor,
    pattern: Pattern | str | BlockLayout,
    ranks: Ranks,
    settings: Settings,
    key_padding_mask: Tensor | None,
    where: Sharding,
    draw: int,
) -> tuple[Call, BlockLayout]:
    """What all agreed on, and the layout of the whole sequence, on the CPU."""
    layout = layout_of(pattern, settings.is_causal, where.length, where.block, query.shape[1])
    plan = plan_of(layout, where, ranks.rank, query, key, settings.max_remote_tokens, settings.ranks_per_node)
    scale = 1.0 / math.sqrt(query.shape[3]) if settings.scale is None else float(settings.scale)
    seed = None
    if settings.dropout_p > 0.0:
        # A fill: what is copied to a device is waited for.
        seed = torch.full((1,), draw, dtype=torch.int64, device=query.device)
    call = Call(
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
    return call, layout


def biases_of(
    tile_bias: Tensor | None, query: Tensor, layout: BlockLayout, plan: RankPlan
) -> list[Tensor | None]:
    """The bias of each part's tiles, taken from that of the whole layout with gradient."""
    if tile_bias is None:
        return [None] * (1 + len(plan.stages))
    shaped = checked_tile_bias(tile_bias, query, layout)
    assert shaped is not None
    mine = shaped.index_select(2, plan.edges)
    return [mine.index_select(2, edges) for edges in (plan.own_edges, *(x.edges for x in plan.stages))]


def _merged(done: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Parts over disjoint keys as one, in fp32."""
    part = part[0].to(part[1].dtype), part[1]
    return part if done is None else merge_attention(done, part)


def _statistic(q: Tensor) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)


def of_whole_layout(of_biases: Sequence[Tensor | None], tile_bias: Tensor, plan: RankPlan) -> Tensor:
    """What :func:`biases_of` gives each part, backward: the gradient of the whole layout's bias."""
    sizes = [1] * (3 - tile_bias.dim()) + list(tile_bias.shape[:-1])
    mine = tile_bias.new_zeros((*sizes, plan.edges.numel()))
    for edges, grad in zip((plan.own_edges, *(x.edges for x in plan.stages)), of_biases, strict=True):
        assert grad is not None
        mine.index_add_(2, edges, grad)
    whole = tile_bias.new_zeros((*sizes, tile_bias.shape[-1]))
    return whole.index_add_(2, plan.edges, mine).view(tile_bias.shape)
