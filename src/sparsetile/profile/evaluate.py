"""A model's next-token loss under a pattern, and under tiles chosen by looking at the text itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsetile.functional import sparse_attention
from sparsetile.integrations.transformers import use
from sparsetile.layout.blocks import BlockLayout
from sparsetile.profile.candidates import tiles_a_row

_NAME = "sparsetile_chosen"
Chooser = Callable[[int, Tensor, Tensor], Tensor]
"""Key tiles int64 ``[1, H, rows, k]`` for a layer with these q and k; −1 for none."""


def loss_under(model: PreTrainedModel, tokens: Tensor, settings: Mapping[str, Any]) -> float:
    """Mean next-token loss, in nats, of ``tokens`` ``[1, N]`` where the model attends by ``settings``."""
    use(model, settings)
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def loss_with(model: PreTrainedModel, tokens: Tensor, choose: Chooser, block: int) -> float:
    """The same where ``choose`` picks the tiles of each layer (causal, whole but for the diagonal)."""
    with _choosing(model, choose, block), torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)


@contextmanager
def _choosing(model: PreTrainedModel, choose: Chooser, block: int) -> Iterator[None]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, **given: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        layout = BlockLayout.from_topk(
            choose(layer, query, key), query.shape[2], block_size=block, is_causal=True
        )
        scale = given.get("scaling")
        out = sparse_attention(query, key, value, layout, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, lambda *_given, **_named: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def best_tiles(best: Mapping[int, Tensor]) -> Chooser:
    """The oracle: for each head and row of tiles those of the largest true mass, of this very text."""
    return lambda layer, q, k: best[layer][None]


def pooled(density: float, block: int) -> Chooser:
    """Tiles by mean query · mean key of a tile, the own one always (MoBA, Lu et al. 2025, arXiv:2502.13189,
    eq. 5 and 6): selection that adapts to the text without training."""

    def choose(layer: int, q: Tensor, k: Tensor) -> Tensor:
        heads, length, width = q.shape[1:]
        rows = length // block
        queries = q[0].float().view(heads, rows, block, width).mean(2)
        keys = k[0].float().view(-1, rows, block, width).mean(2).repeat_interleave(heads // k.shape[1], 0)
        most, more = tiles_a_row(density, rows)
        tiles = torch.full((heads, rows, most + 1), -1, device=q.device)
        for row in range(rows):
            score = (queries[:, row, None] * keys[:, : row + 1]).sum(-1)
            score[:, row] = math.inf
            m = min(row + 1, most + (row >= rows - more))
            tiles[:, row, :m] = score.topk(m, dim=-1).indices
        return tiles[None]

    return choose
