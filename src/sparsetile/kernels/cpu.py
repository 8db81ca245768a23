"""Exact block-sparse attention on the CPU.

Tiles are computed a chunk at a time: gather keys and values, one batched product for the scores, softmax in
base 2, one batched product for the output. A chunk's scores stay in the processor's cache, and the
workspace is bounded whatever the sequence length. Rows longer than a chunk are walked in steps with the
running maximum and sum of Milakov & Gimelshein 2018 (arXiv:1805.02867), many rows side by side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.kernels.cpu_backward import backward
from sparsetile.kernels.cpu_plan import Chunk, chunks, layout_plan
from sparsetile.kernels.cpu_scores import LOG2_E, Scores
from sparsetile.kernels.cpu_tiles import Tiles
from sparsetile.kernels.dropout import keep_scale
from sparsetile.kernels.request import Request

__all__ = ["backward", "forward", "why_not"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if not q.is_cpu:
        # Its type is text already; that of a whole device takes a microsecond, and every call on a GPU
        # comes by here.
        return f"it computes on the CPU and the tensors are on {q.device.type!r}."
    if request.layout.device.type != "cpu":
        return f"it computes on the CPU and the layout is on {request.layout.device}."
    if q.dtype not in _DTYPES:
        return f"it computes float32, float64, bfloat16 and float16 and the tensors are {q.dtype}."
    if not q.dtype == k.dtype == v.dtype:
        return f"it needs one dtype for q, k and v and they are {q.dtype}, {k.dtype} and {v.dtype}."
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and LSE ``[B, H, Nq]`` fp32 (float64 for float64)."""
    layout = request.layout
    scores = Scores(q, k, v, request)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=scores.dtype)
    plan = layout_plan(layout)
    if plan.has_empty:
        out.zero_()
        lse.fill_(-math.inf)
    out_tiles, lse_tiles = Tiles(out, layout.block_q), Tiles(lse[..., None], layout.block_q)
    for chunk in chunks(layout, plan, scores.unfolded, scores.budget):
        result, result_lse = _attend(scores, chunk)
        ids = chunk.queries.flatten()
        out_tiles.write(ids, result.view(len(ids), layout.block_q, -1))
        lse_tiles.write(ids, result_lse.view(len(ids), layout.block_q, 1))
    return out, lse


def _attend(scores: Scores, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Output ``[n, stack·block_q, D]`` and LSE ``[n, stack·block_q, 1]`` of a chunk."""
    queries = scores.load("q", scores.q, chunk.queries)
    out = scores.workspace.take("out", *queries.shape)
    top = total = None
    for step in chunk.steps():
        keys, values, bad = scores.keys_values(step)
        weights = scores.logits(chunk, step, queries, keys, bad)
        step_top = weights.amax(-1, keepdim=True)
        new_top = step_top if top is None else torch.maximum(top, step_top)
        # A row without any key so far has −inf here; −inf − 0 keeps its weights 0 where −inf − (−inf) is NaN.
        shift = new_top.masked_fill(new_top == -math.inf, 0)
        weights.sub_(shift).exp2_()
        step_total = weights.sum(-1, keepdim=True)
        if scores.request.dropout_p > 0:
            scores.drop(chunk, step, weights, keep_scale(scores.request.dropout_p))
        if top is None or total is None:
            torch.bmm(weights, values, out=out)
            total = step_total
        else:
            fade = torch.exp2(top - shift)
            out.mul_(fade).baddbmm_(weights, values)
            total = total * fade + step_total
        top = new_top
    assert top is not None and total is not None
    lse = (top + total.log2()) / LOG2_E
    out.div_(total.masked_fill(total == 0, 1))
    return out, lse
