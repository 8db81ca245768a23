"""What each candidate pattern would do to each head of a trained model, from one pass over a text.

A backward pass visits the layers one by one. At each, with q, k, v, the output o and its gradient g at hand,
rows of tiles are computed again from the log-sum-exp: the weights of one row of tiles, summed within tiles,
give the share of the true attention mass that any set of tiles keeps; the same weights times the values,
summed likewise, give the output that it would leave. Memory is O(N) for each layer at hand.

What a pattern costs a head is estimated as ``½ Σ_t ‖g_t‖²·‖o'_t − o_t‖² / D``: the loss is taken to be
quadratic along the output with the curvature of the empirical Fisher matrix, and the error to point nowhere
in particular. Mass alone does not know which heads matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import sparse_attention
from sparsetile.integrations import masks
from sparsetile.integrations.masks import TileMask
from sparsetile.profile.candidates import Kept, tiles_a_row

_NAME = "sparsetile_profile"
_ELEMENTS = 1 << 26  # of the largest work tensor: 256 MiB in fp32


@dataclass
class Tables:
    """What was measured of each layer, by its number.

    Attributes:
        mass: ``[H, candidates]``: share of the attention mass kept, a mean over queries.
        cost: ``[H, candidates]``: estimated increase of the summed loss.
        best: for each density asked for, int64 ``[H, rows, most]``: the tiles of the largest mass of each
            row of tiles (as many as :func:`~sparsetile.profile.candidates.tiles_a_row` says), −1 for none.
    """

    mass: dict[int, Tensor] = field(default_factory=dict)
    cost: dict[int, Tensor] = field(default_factory=dict)
    best: dict[float, dict[int, Tensor]] = field(default_factory=dict)

    def stacked(self, name: str) -> Tensor:
        """``[layers, H, candidates]`` of ``"mass"`` or ``"cost"``, by layer number, on the CPU."""
        table: dict[int, Tensor] = getattr(self, name)
        return torch.stack([table[layer].cpu() for layer in sorted(table)])


Watcher = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, TileMask, float], None]
_watching: list[Watcher] = []


class _Watch(torch.autograd.Function):
    """The identity on an attention's output; shows backward what it sees there."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *seen: Any) -> Tensor:
        *tensors, layer, mask, scale = seen
        ctx.save_for_backward(out, *tensors)
        ctx.rest = (layer, mask, scale)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        out, q, k, v, lse = ctx.saved_tensors
        layer, mask, scale = ctx.rest
        for watcher in _watching:
            watcher(layer, q, k, v, out, lse, grad, mask, scale)
        return (grad, *[None] * 7)


def _watched(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TileMask,
    *,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Dense attention, as the model has it, that is watched."""
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise _unsuited(f"a model with {name}", "plain softmax attention")
    if not isinstance(attention_mask, TileMask) or attention_mask.asked is not None:
        raise _unsuited(f"a mask of the model's own ({attention_mask!r})", "causal or sliding-window layers")
    if not attention_mask.causal:
        raise _unsuited("a bidirectional one", "a causal language model")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    out, lse = sparse_attention(
        query, key, value, attention_mask.allowed, scale=scale, enable_gqa=True, return_lse=True
    )
    seen = (query.detach(), key.detach(), value.detach(), lse.detach())
    out = _Watch.apply(out, *seen, module.layer_idx, attention_mask, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def _unsuited(got: str, expected: str) -> ArgumentError:
    fix = "Choose a pattern by hand; sparsetile.integrations.transformers.use takes it."
    return ArgumentError(explain("sparsetile profile", expected=expected, got=got, fix=fix))


@contextmanager
def watching(model: PreTrainedModel, watcher: Watcher) -> Iterator[None]:
    """Within, the model attends densely, and ``watcher`` sees each layer when backward reaches it."""
    AttentionInterface.register(_NAME, _watched)
    AttentionMaskInterface.register(_NAME, masks.tile_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    _watching.append(watcher)
    try:
        yield
    finally:
        _watching.remove(watcher)
        model.set_attn_implementation(before)


def measure(
    model: PreTrainedModel,
    tokens: Tensor,
    chosen: Kept,
    block: int,
    densities: tuple[float, ...] = (),
    done: Callable[[], None] = lambda: None,
) -> tuple[Tables, float]:
    """Runs a model forward and backward over a text.

    Args:
        tokens: int64 ``[1, N]``, N a multiple of the block.
        chosen: what the candidates keep of N tokens.
        densities: also note the best tiles of each row at these.
        done: called after each layer.

    Returns:
        the tables, and the dense loss of a token, in nats.
    """
    tables = Tables(best={density: {} for density in densities})

    def look(
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad: Tensor,
        mask: TileMask,
        scale: float,
    ) -> None:
        parts = _layer(q[0], k[0], v[0], out[0], lse[0], grad[0], mask, scale, chosen, block, densities)
        tables.mass[layer], tables.cost[layer], best = parts
        for density, tiles in best.items():
            tables.best[density][layer] = tiles
        done()

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    try:
        # Only what the layers pass on needs a gradient, not the weights.
        for parameter, _ in wanted:
            parameter.requires_grad_(parameter is embedding)
        with watching(model, look), torch.enable_grad():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            # Scaled to the sum over tokens: 16-bit gradients of a mean would vanish.
            torch.autograd.grad(loss * (tokens.shape[1] - 1), embedding)
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
    return tables, float(loss.detach())


def _layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    mask: TileMask,
    scale: float,
    chosen: Kept,
    block: int,
    densities: tuple[float, ...],
) -> tuple[Tensor, Tensor, dict[float, Tensor]]:
    """Mass and cost ``[H, candidates]`` of one layer, and its best tiles; q, out, grad ``[H, N, D]``, k, v
    ``[Hkv, N, D]``, lse ``[H, N]``."""
    heads, length, width = q.shape
    group, count = heads // k.shape[0], chosen.tiles.numel()
    mass = torch.zeros((heads, count), device=q.device)
    cost = torch.zeros_like(mass)
    rows = length // block
    most = max((tiles_a_row(d, rows)[0] + 1 for d in densities), default=1)
    top = torch.full((heads, rows, most), -1.0, device=q.device)
    top_tile = torch.full((heads, rows, most), -1, device=q.device)
    weight = grad.float().square().sum(-1)  # [H, N]
    position = torch.arange(length, device=q.device)
    allowed = mask.allowed.resolve(block, block, 0, length)
    at_once = max(1, _ELEMENTS // (max(length, count * block) * width))
    for row in range(rows):
        here, end = slice(row * block, (row + 1) * block), (row + 1) * block
        pairs = allowed.allows(position[here, None], position[None, :end])
        picked = chosen.row(row, torch.float32)
        for head in range(0, heads, at_once):
            some = slice(head, min(heads, head + at_once))
            own = torch.arange(some.start, some.stop, device=q.device) // group
            keys, values = k[own, :end].float(), v[own, :end].float()
            weights = torch.exp(
                q[some, here].float() @ keys.transpose(1, 2) * scale - lse[some, here, None].float()
            )
            weights = weights.masked_fill(~pairs, 0).view(-1, block, row + 1, block).transpose(1, 2)
            tile_mass = weights.sum(-1)  # [h, tiles, queries]
            tile_out = weights @ values.view(-1, row + 1, block, width)  # [h, tiles, queries, D]
            left = picked @ tile_mass  # [h, candidates, queries]
            made = (picked @ tile_out.flatten(2)).view(-1, count, block, width)
            made /= left.clamp(min=1e-30)[..., None]
            error = (made - out[some, None, here].float()).square().sum(-1)
            cost[some] += (error * weight[some, None, here]).sum(-1)
            mass[some] += left.sum(-1)
            m = min(row + 1, most)
            top[some, row, :m], top_tile[some, row, :m] = tile_mass.sum(-1).topk(m, dim=-1)
    best = {d: _best(top, top_tile, *tiles_a_row(d, rows)) for d in densities}
    return mass / length, cost / (2 * width), best


def _best(top: Tensor, tile: Tensor, m: int, more: int) -> Tensor:
    """Tiles ``[H, rows, m + 1]``: the first ``m`` of each row of ``tile``, and the next one of the ``more``
    rows where its mass ``top`` is largest."""
    best = tile[..., : m + 1].clone()
    if best.shape[-1] > m:
        order = top[..., m].argsort(dim=-1, descending=True)
        best[..., m].scatter_(1, order[:, more:], -1)
    return best
