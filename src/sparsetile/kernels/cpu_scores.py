"""Scores of a chunk of tiles on the CPU: what forward and backward compute alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.kernels.cpu_plan import Chunk, Heads, Step, tile_budget, unfold_heads
from sparsetile.kernels.cpu_tiles import Tiles, forbidden
from sparsetile.kernels.dropout import keep_tiles
from sparsetile.kernels.request import Request

LOG2_E = math.log2(math.e)
_DROPOUT_ELEMENTS = 2**19


class Workspace:
    """Buffers that are used again for every chunk, one per name, as large as the largest use so far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype or self.dtype)
        return buffer[:size].view(shape)


class Scores:
    """Scaled, biased and masked logits of chunks, times log₂e for ``exp2``, which is cheaper than ``exp``."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> None:
        layout = self.layout = request.layout
        self.request = request
        self.batch, self.heads, self.q_len, self.width = q.shape
        self.key_heads = k.shape[1]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.budget = tile_budget(layout, self.width, self.dtype.itemsize)
        self.unfolded: Heads = unfold_heads(layout, self.batch, self.heads, self.key_heads, self.budget[0])
        self.workspace = Workspace(self.dtype)
        self.q, self.k, self.v = (
            Tiles(q, layout.block_q),
            Tiles(k, layout.block_k),
            Tiles(v, layout.block_k),
        )
        padding = request.key_padding_mask
        self.padding = None
        if padding is not None:
            by_head = padding[:, None].expand(-1, self.key_heads, -1) if padding.dim() == 2 else padding
            self.padding = Tiles(by_head[..., None], layout.block_k)
        masked = padding is not None or request.attn_bias is not None or layout.masks.numel() > 0
        # The weight 0 of a forbidden pair must not meet an inf or NaN: 0·NaN = NaN.
        self.careful = masked and not bool(torch.isfinite(k.sum() + v.sum()))

    def load(self, name: str, tiles: Tiles, ids: Tensor) -> Tensor:
        """Tiles ``ids`` ``[c, r, x]`` as ``[c·r, x·block, D]`` in the dtype of the computation."""
        flat = ids.flatten()
        shape = (len(flat), tiles.block, tiles.width)
        loaded = self.workspace.take(name, *shape)
        if tiles.dtype == self.dtype:
            tiles.gather(flat, loaded)
        else:
            loaded.copy_(tiles.gather(flat, self.workspace.take("cast", *shape, dtype=tiles.dtype)))
        return loaded.view(ids.shape[0] * ids.shape[1], -1, tiles.width)

    def keys_values(self, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values ``[n, keys, D]``, and in the careful case which keys ``[n, keys]`` hold inf or NaN.

        Those keys are zeroed; ``logits`` puts NaN in their columns, so that a row that attends one becomes
        NaN and a row that does not is untouched.
        """
        keys, values = self.load("k", self.k, step.keys), self.load("v", self.v, step.keys)
        if not self.careful:
            return keys, values, None
        bad = ~(keys.isfinite().all(-1) & values.isfinite().all(-1))
        keys.masked_fill_(bad[..., None], 0)
        values.masked_fill_(bad[..., None], 0)
        return keys, values, bad

    def logits(self, chunk: Chunk, step: Step, queries: Tensor, keys: Tensor, bad: Tensor | None) -> Tensor:
        """``log₂e · (scale·q·k + biases)``, −inf where forbidden: ``[n, stack·block_q, tiles·block_k]``."""
        scores = self.workspace.take("scores", len(queries), queries.shape[1], keys.shape[1])
        alpha = self.request.scale * LOG2_E
        torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=alpha, out=scores)
        if bad is not None:
            scores.masked_fill_(bad[:, None, :], math.nan)
        if self.request.tile_bias is not None:
            bias = self.request.tile_bias.flatten()[self.bias_entries(chunk, step, self.request.tile_bias)]
            self.tiled(scores, chunk, step).add_(bias[:, :, :, None, :, None], alpha=LOG2_E)
        if self.request.attn_bias is not None:
            bias = self._dense_bias(chunk, step).to(self.dtype)
            self.tiled(scores, chunk, step).add_(bias, alpha=LOG2_E)
        self.forbid(chunk, step, scores, -math.inf)
        return scores

    def tiled(self, scores: Tensor, chunk: Chunk, step: Step) -> Tensor:
        """``[copies, rows, stack, block_q, tiles, block_k]`` view of scores."""
        copies, rows, stack = chunk.queries.shape
        return scores.view(copies, rows, stack, self.layout.block_q, step.keys.shape[2], self.layout.block_k)

    def forbid(self, chunk: Chunk, step: Step, scores: Tensor, value: float) -> None:
        """Puts ``value`` wherever the layout, the padding or a bias of −inf forbids a pair."""
        if step.partial:
            tiled = self.tiled(scores, chunk, step)
            for start, stop, mask_ids in step.partial:
                pairs = forbidden(self.layout.masks, mask_ids, self.layout.block_k)
                tiled[:, :, :, :, start:stop].masked_fill_(pairs.transpose(1, 2)[None, :, None], value)
        if self.padding is not None:
            flat = step.keys.flatten()
            ignored = self.padding.gather(flat, torch.empty(len(flat), self.k.block, 1, dtype=torch.bool))
            scores.masked_fill_(ignored.view(len(scores), 1, -1), value)
        if self.careful and self.request.attn_bias is not None:
            tiled = self.tiled(scores, chunk, step)
            tiled.masked_fill_(self._dense_bias(chunk, step) == -math.inf, value)

    def drop(self, chunk: Chunk, step: Step, weights: Tensor, factor: float) -> None:
        """Multiplies the weights that dropout keeps by ``factor`` and the others by 0.

        In slices of query rows, because the mask is computed in 64-bit integers.
        """
        request, layout = self.request, self.layout
        assert request.seed is not None
        ids = chunk.queries[..., None]
        query = self._tile_starts(ids % layout.q_blocks, layout.block_q, request.q_tiles)
        head = step.keys // self.k.blocks
        key = self._tile_starts(step.keys % self.k.blocks, layout.block_k, request.k_tiles, head)[:, :, None]
        tiled = self.tiled(weights, chunk, step).transpose(3, 4)
        rows = max(16, layout.block_q * _DROPOUT_ELEMENTS // weights.numel() // 16 * 16)
        for row in range(0, layout.block_q, rows):
            here = tiled[..., row : row + rows, :]
            shape = (here.shape[-2], here.shape[-1])
            kept = keep_tiles(
                request.seed, request.dropout_p, ids // layout.q_blocks, query + row, key, shape
            )
            here.mul_(kept.to(self.dtype).mul_(factor))

    def bias_entries(self, chunk: Chunk, step: Step, bias: Tensor) -> Tensor:
        """Flat positions ``[copies, rows, stack, tiles]`` in ``bias`` ``[B|1, H|1, capacity]``."""
        head = chunk.queries // self.layout.q_blocks
        at = head // self.heads * bias.stride(0) * (bias.shape[0] > 1) + head % self.heads * bias.stride(
            1
        ) * (bias.shape[1] > 1)
        return at[..., None] + step.edges[:, None, :]

    def pair_entries(self, chunk: Chunk, step: Step, dense: Tensor) -> Tensor:
        """Positions in the storage of ``dense`` ``[B|1, H|1, Nq, Nk]``, in the shape of ``tiled``.

        Pairs past the ends are clamped onto the last token: they are forbidden by the layout, so what is
        read is replaced and what is added is 0.
        """
        ids = chunk.queries[..., None, None, None]
        query = (
            ids % self.layout.q_blocks * self.layout.block_q
            + torch.arange(self.layout.block_q)[:, None, None]
        )
        head = ids // self.layout.q_blocks
        step_b, step_h, step_q, step_k = (
            s if n > 1 else 0 for s, n in zip(dense.stride(), dense.shape, strict=True)
        )
        rows = head // self.heads * step_b + head % self.heads * step_h
        rows = rows + query.clamp(max=self.layout.q_len - 1) * step_q
        key = (step.keys % self.k.blocks * self.layout.block_k)[:, :, None, None, :, None]
        key = key + torch.arange(self.layout.block_k)
        return rows + key.clamp(max=self.layout.k_len - 1) * step_k

    @staticmethod
    def _tile_starts(tile: Tensor, block: int, tiles: Tensor | None, head: Tensor | None = None) -> Tensor:
        """Where tiles begin in the sequence; ``tiles`` ``[blocks]``, or ``[heads, blocks]`` with each one's
        ``head`` modulo heads, has their numbers there."""
        if tiles is not None:
            tile = tiles[tile] if head is None else tiles[head % tiles.shape[0], tile]
        return tile * block

    def _dense_bias(self, chunk: Chunk, step: Step) -> Tensor:
        bias = self.request.attn_bias
        assert bias is not None
        at = self.pair_entries(chunk, step, bias)
        reach = sum((n - 1) * s for n, s in zip(bias.shape, bias.stride(), strict=True)) + 1
        return bias.as_strided((reach,), (1,)).index_select(0, at.flatten()).view(at.shape)
