"""Error against float64 on sampled queries: exact rows, without ever writing out the attention matrix.

The gradient of the output is zero except at the sampled queries. Then the gradients of q at those queries,
and of all of k and v, depend on the sampled rows alone: a few hundred rows give the exact reference for the
whole backward pass at any length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.layout.blocks import FULL, BlockLayout
from sparsetile.patterns.tiles import unpack


class Sample(NamedTuple):
    """Query heads and query positions that are checked: int64 ``[S]`` each."""

    batch: Tensor
    head: Tensor
    query: Tensor


@dataclass(frozen=True)
class Exact:
    """float64 results: ``out`` and ``dq`` ``[S, D]`` at the sample; ``dk``, ``dv`` by (batch, key head)."""

    sample: Sample
    out: Tensor
    dq: Tensor
    dk: dict[tuple[int, int], Tensor]
    dv: dict[tuple[int, int], Tensor]


def draw_sample(q: Tensor, rows: int, generator: torch.Generator) -> Sample:
    """Up to ``rows`` queries of two (batch element, head) pairs; the first and the last query among them."""
    batch, heads, length, _ = q.shape
    pairs = torch.randperm(batch * heads, generator=generator)[:2]
    pair = pairs[torch.arange(rows) % len(pairs)]
    query = torch.randint(length, (rows,), generator=generator)
    query[0], query[-1] = 0, length - 1
    # The same query of the same head twice would count its gradient once on one side and twice on the other.
    flat = torch.unique(pair * length + query)
    return Sample(flat // length // heads, flat // length % heads, flat % length)


def sparse_gradient(sample: Sample, grad_out: Tensor) -> Tensor:
    """``grad_out`` at the sample, zero elsewhere; same shape and dtype."""
    kept = torch.zeros_like(grad_out)
    at = tuple(index.to(grad_out.device) for index in sample)
    kept[at] = grad_out[at]
    return kept


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    sample: Sample,
    layout: BlockLayout | None,
    *,
    causal: bool = False,
) -> Exact:
    """Attention rows and gradients of the sample in float64.

    Without a layout every key is kept, or with ``causal`` every key up to the query (bottom right aligned).
    """
    scale = q.shape[-1] ** -0.5
    group = q.shape[1] // k.shape[1]
    rows = len(sample.query)
    out = torch.zeros(rows, q.shape[-1], dtype=torch.float64, device=q.device)
    dq = torch.zeros_like(out)
    dk: dict[tuple[int, int], Tensor] = {}
    dv: dict[tuple[int, int], Tensor] = {}
    for s, (b, h, i) in enumerate(torch.stack(tuple(sample), 1).tolist()):
        place = (b, h // group)
        keys, values = k[place], v[place]
        if place not in dk:
            dk[place] = torch.zeros(keys.shape, dtype=torch.float64, device=q.device)
            dv[place] = torch.zeros(values.shape, dtype=torch.float64, device=q.device)
        last = i + 1 + k.shape[2] - q.shape[2] if causal else k.shape[2]
        kept = slice(max(last, 0)) if layout is None else kept_keys(layout, b, h, i)
        keys, values = keys[kept].double(), values[kept].double()
        query, grad = q[b, h, i].double(), grad_out[b, h, i].double()
        weights = torch.softmax(keys @ query * scale, 0)
        out[s] = weights @ values
        change = values @ grad
        logits = weights * (change - weights @ change) * scale
        dq[s] = logits @ keys
        dk[place][kept] += logits[:, None] * query
        dv[place][kept] += weights[:, None] * grad
    return Exact(sample, out, dq, dk, dv)


def kept_keys(layout: BlockLayout, batch: int, head: int, query: int) -> Tensor:
    """int64 positions of the keys that one query may attend, ascending."""
    b, h = min(batch, layout.batch - 1), min(head, layout.heads - 1)
    row = (b * layout.heads + h) * layout.q_blocks + query // layout.block_q
    span = slice(int(layout.indptr[row]), int(layout.indptr[row + 1]))
    ids = layout.mask_ids[span].long()
    offset = torch.arange(layout.block_k, device=layout.device)
    allowed = torch.ones(len(ids), layout.block_k, dtype=torch.bool, device=layout.device)
    partial = ids != FULL
    lines = layout.masks[ids[partial], query % layout.block_q]
    allowed[partial] = unpack(lines[:, None], layout.block_k)[:, 0]
    positions = layout.indices[span].long()[:, None] * layout.block_k + offset
    return positions[allowed]


def output_error(out: Tensor, reference: Exact) -> float:
    """‖out − exact‖ / ‖exact‖ over the sampled queries."""
    at = tuple(index.to(out.device) for index in reference.sample)
    return _relative([out[at]], [reference.out])


def gradient_errors(dq: Tensor, dk: Tensor, dv: Tensor, reference: Exact) -> dict[str, float]:
    """The same of each gradient: dq at the sample, dk and dv over all keys of the sampled heads."""
    at = tuple(index.to(dq.device) for index in reference.sample)
    return {
        "dq": _relative([dq[at]], [reference.dq]),
        "dk": _relative([dk[place] for place in reference.dk], list(reference.dk.values())),
        "dv": _relative([dv[place] for place in reference.dv], list(reference.dv.values())),
    }


def _relative(got: list[Tensor], want: list[Tensor]) -> float:
    wrong = sum(float((g.double() - w).square().sum()) for g, w in zip(got, want, strict=True))
    size = sum(float(w.square().sum()) for w in want)
    return math.sqrt(wrong / size) if size else math.sqrt(wrong)
