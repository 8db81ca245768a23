"""Backward of the CPU backend: five batched products a chunk, weights recomputed from the LSE.

With P = exp(S − lse), δ = rowsum(dO∘O) and the gradient of the LSE, Dao et al. 2022 (arXiv:2205.14135,
algorithm 4) give dV = PᵀdO, dS = P∘(dOVᵀ − δ + dlse), dQ = scale·dS·K, dK = scale·dSᵀQ. Sums over the tiles
of a column run in one fixed order, so gradients are bitwise equal from run to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsetile.kernels.cpu_plan import (
    Chunk,
    Heads,
    Plan,
    Step,
    chunks,
    first_at_least,
    layout_plan,
    plan_rows,
)
from sparsetile.kernels.cpu_scores import LOG2_E, Scores
from sparsetile.kernels.cpu_tiles import Tiles
from sparsetile.kernels.dropout import keep_scale
from sparsetile.kernels.request import Gradients, Request

_SUM_BYTES = 2**24  # fp32 sums of dK and dV for 16-bit gradients


@dataclass(frozen=True)
class Window:
    """Batch elements, key heads and key blocks whose dK and dV are summed together."""

    batch: range
    heads: range
    blocks: range


class Sums:
    """dK and dV of a window, as tiles that chunks add to.

    The sums of fp32 and float64 calls are the gradients themselves. 16-bit gradients are summed in fp32 in
    a buffer of bounded size, one window after the other.
    """

    def __init__(self, window: Window, scores: Scores, grads: tuple[Tensor, Tensor]) -> None:
        self.window, self.scores, self.grads = window, scores, grads
        self.direct = grads[0].dtype == scores.dtype
        self.buffers = grads
        if not self.direct:
            length = len(window.blocks) * scores.layout.block_k
            shape = (len(window.batch), len(window.heads), length, scores.width)
            self.buffers = (torch.zeros(shape, dtype=scores.dtype), torch.zeros(shape, dtype=scores.dtype))
        self.k, self.v = (Tiles(buffer, scores.layout.block_k) for buffer in self.buffers)

    def ids(self, step: Step) -> Tensor:
        """Tiles of the sums that belong to the key tiles of a step, flat."""
        keys = step.keys.flatten()
        if self.direct:
            return keys
        head, block = keys // self.scores.k.blocks, keys % self.scores.k.blocks
        batch, head = head // self.scores.key_heads, head % self.scores.key_heads
        row = (batch - self.window.batch.start) * len(self.window.heads) + head - self.window.heads.start
        return row * len(self.window.blocks) + block - self.window.blocks.start

    def store(self) -> None:
        """Rounds the sums into the gradients."""
        if self.direct:
            return
        window, block = self.window, self.scores.layout.block_k
        for grad, buffer in zip(self.grads, self.buffers, strict=True):
            heads = grad[window.batch.start : window.batch.stop, window.heads.start : window.heads.stop]
            part = heads[:, :, window.blocks.start * block : window.blocks.stop * block]
            part.copy_(buffer[:, :, : part.shape[2]])

    def restrict(self, plan: Plan, heads: Heads) -> tuple[Plan, Heads]:
        """The rows, tiles and copies that reach this window."""
        layout, window, nk, key_heads = (
            self.scores.layout,
            self.window,
            self.scores.k.blocks,
            self.scores.key_heads,
        )

        def within(base: Tensor, batch: bool, head: bool) -> Tensor:
            b, h = base // nk // key_heads, base // nk % key_heads
            inside = torch.ones_like(base, dtype=torch.bool)
            if batch:
                inside &= (b >= window.batch.start) & (b < window.batch.stop)
            if head:
                inside &= (h >= window.heads.start) & (h < window.heads.stop)
            return inside

        copies = within(heads.copy_k, layout.batch == 1, layout.heads == 1)
        rows = within(heads.row_k, layout.batch > 1, layout.heads > 1)
        first = first_at_least(layout, window.blocks.start)
        counts = (first_at_least(layout, window.blocks.stop) - first) * rows
        heads = replace(heads, copy_q=heads.copy_q[copies], copy_k=heads.copy_k[copies])
        return plan_rows(layout, first, counts), heads


def _windows(scores: Scores, *, bounded: bool) -> list[Window]:
    """One window of everything; bounded: batch elements, else heads, else runs of key blocks that fit."""
    batch, heads, blocks = range(scores.batch), range(scores.key_heads), range(scores.k.blocks)
    if not bounded:
        return [Window(batch, heads, blocks)]
    tile = 2 * scores.dtype.itemsize * scores.layout.block_k * scores.width
    fit = max(1, _SUM_BYTES // tile)
    blocks_at_once = min(len(blocks), fit)
    heads_at_once = max(1, min(len(heads), fit // len(blocks)))
    batch_at_once = max(1, min(len(batch), fit // (len(blocks) * len(heads))))
    return [
        Window(batch[b : b + batch_at_once], heads[h : h + heads_at_once], blocks[j : j + blocks_at_once])
        for b in range(0, len(batch), batch_at_once)
        for h in range(0, len(heads), heads_at_once)
        for j in range(0, len(blocks), blocks_at_once)
    ]


class _Backward:
    """The tensors of one backward call as tiles."""

    def __init__(
        self,
        scores: Scores,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grads: Gradients,
    ) -> None:
        block = scores.layout.block_q
        self.scores, self.grads = scores, grads
        self.grad_out, self.out, self.grad_q = (
            Tiles(grad_out, block),
            Tiles(out, block),
            Tiles(grads.q, block),
        )
        self.lse = Tiles(lse[..., None], block)
        self.grad_lse = None if grad_lse is None else Tiles(grad_lse[..., None], block)

    def run(self, chunk: Chunk, sums: Sums | None, *, rows: bool) -> None:
        """Adds a chunk to ``sums``, if given; with ``rows`` also writes its dQ and bias gradients."""
        scores, workspace = self.scores, self.scores.workspace
        scale, dropout_p = scores.request.scale, scores.request.dropout_p
        queries = scores.load("q", scores.q, chunk.queries)
        grad_out = scores.load("grad_out", self.grad_out, chunk.queries)
        shift, drift = self._row_terms(chunk, grad_out)
        grad_q = workspace.take("out", *queries.shape)
        for index, step in enumerate(chunk.steps()):
            keys, values, bad = scores.keys_values(step)
            weights = scores.logits(chunk, step, queries, keys, bad).sub_(shift).exp2_()
            if bad is not None:
                scores.forbid(chunk, step, weights, 0)
            slopes = workspace.take("slopes", *weights.shape)
            torch.bmm(grad_out, values.transpose(1, 2), out=slopes)
            kept = weights
            if dropout_p > 0:
                factor = keep_scale(dropout_p)
                kept = workspace.take("kept", *weights.shape).copy_(weights)
                scores.drop(chunk, step, kept, factor)
                # The mask once more rather than kept/weights: a weight may be 0.
                scores.drop(chunk, step, slopes, factor)
            # values is read for the last time above, keys below: their buffers then take the products.
            if sums is not None:
                ids = sums.ids(step)
                torch.bmm(kept.transpose(1, 2), grad_out, out=values)
                sums.v.add(ids, values.view(len(ids), scores.layout.block_k, -1))
            slopes.sub_(drift).mul_(weights)
            if bad is not None:
                scores.forbid(chunk, step, slopes, 0)
            if rows:
                self._bias_gradients(chunk, step, slopes)
                torch.baddbmm(grad_q, slopes, keys, beta=0 if index == 0 else 1, alpha=scale, out=grad_q)
            if sums is not None:
                torch.baddbmm(keys, slopes.transpose(1, 2), queries, beta=0, alpha=scale, out=keys)
                sums.k.add(ids, keys.view(len(ids), scores.layout.block_k, -1))
        if rows:
            at = chunk.queries.flatten()
            self.grad_q.write(at, grad_q.view(len(at), scores.layout.block_q, -1))

    def _row_terms(self, chunk: Chunk, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Per row ``[n, stack·block_q, 1]``: log₂e·lse, and δ less the gradient of the LSE."""
        scores = self.scores
        drift = scores.load("out", self.out, chunk.queries).mul_(grad_out).sum(-1, keepdim=True)
        if self.grad_lse is not None:
            drift.sub_(scores.load("row", self.grad_lse, chunk.queries))
        lse = scores.load("row", self.lse, chunk.queries)
        alone = lse == -math.inf  # rows without any key: weights exp2(−inf − inf) = 0
        return lse.mul(LOG2_E).masked_fill_(alone, math.inf), drift.masked_fill_(alone, 0)

    def _bias_gradients(self, chunk: Chunk, step: Step, slopes: Tensor) -> None:
        scores, tiled = self.scores, self.scores.tiled(slopes, chunk, step)
        if self.grads.tile_bias is not None:
            entries = scores.bias_entries(chunk, step, self.grads.tile_bias)
            self.grads.tile_bias.view(-1)[entries.flatten()] = tiled.sum((3, 5)).flatten()
        if self.grads.attn_bias is not None:
            dense = self.grads.attn_bias
            entries = scores.pair_entries(chunk, step, dense)
            dense.view(-1).index_add_(0, entries.flatten(), slopes.flatten().to(dense.dtype))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    request: Request,
    *,
    tile_bias_grad: bool,
    attn_bias_grad: bool,
) -> Gradients:
    """Gradients of ``sum(out·grad_out) + sum(lse·grad_lse)``; shapes and dtypes as ``Backend.backward``."""
    layout = request.layout
    scores = Scores(q, k, v, request)
    plan = layout_plan(layout)
    grad_q = torch.zeros(q.shape, dtype=q.dtype) if plan.has_empty else torch.empty(q.shape, dtype=q.dtype)
    grad_k, grad_v = torch.zeros(k.shape, dtype=k.dtype), torch.zeros(v.shape, dtype=v.dtype)
    tile_bias = attn_bias = None
    if tile_bias_grad:
        batch, heads = (q.shape[0] if layout.batch == 1 else 1), (q.shape[1] if layout.heads == 1 else 1)
        tile_bias = torch.zeros((batch, heads, layout.capacity), dtype=scores.dtype)
    if attn_bias_grad:
        assert request.attn_bias is not None
        attn_bias = torch.zeros((*q.shape[:3], k.shape[2]), dtype=request.attn_bias.dtype)
    grads = Gradients(grad_q, grad_k, grad_v, tile_bias, attn_bias)
    call = _Backward(scores, grad_out, grad_lse, out, lse, grads)
    windows = _windows(scores, bounded=q.dtype != scores.dtype) if plan.groups else []
    if len(windows) > 1:
        for chunk in chunks(layout, plan, scores.unfolded, scores.budget):
            call.run(chunk, None, rows=True)
    for window in windows:
        sums = Sums(window, scores, (grad_k, grad_v))
        part = (plan, scores.unfolded) if len(windows) == 1 else sums.restrict(plan, scores.unfolded)
        for chunk in chunks(layout, *part, scores.budget):
            call.run(chunk, sums, rows=len(windows) == 1)
        sums.store()
        del sums  # before the next window's are made
    return grads
