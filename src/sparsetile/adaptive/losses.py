"""What trains a scorer besides the model's own loss, and the quantities that these losses need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.functional import sparse_attention
from sparsetile.layout.blocks import BlockLayout


@torch.no_grad()
def kept_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    tile_bias: Tensor,
    *,
    key_padding_mask: Tensor | None,
    scale: float,
    backend: str,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The attention mass of every kept tile, ``m_e = ∂ Σ_q lse_q / ∂β_e = Σ_{q, k ∈ e} softmax(q·k)``.

    It is the kernels' tile-bias gradient at a log-sum-exp gradient of 1: one backward pass, from the
    log-sum-exp that the forward saved.

    Args:
        q, k, v, out, lse: of a ``sparse_attention`` call, ``[B, H, N, D]`` and ``[B, H, Nq]``.
        layout, tile_bias, key_padding_mask, scale, backend: of that call; tile_bias ``[1, 1, capacity]``.
        key_bias: ``[B, Nk]``, which that call had as ``attn_bias``.

    Returns:
        ``[1, 1, capacity]`` in the dtype of ``tile_bias``, summed over what shares a tile.
    """
    q, k, v = q.to(out.dtype), k.to(out.dtype), v.to(out.dtype)
    features = (tile_bias, for_queries(key_bias, q.shape[2]), key_padding_mask, None, scale, 0.0)
    mass = _mass(q, k, v, out, lse, torch.ones_like(lse), layout, features, backend)
    return mass.sum_to_size(1, 1, mass.shape[-1]).to(tile_bias.dtype)


def for_queries(key_bias: Tensor | None, count: int) -> Tensor | None:
    """``[B, Nk]`` → ``[B, 1, count, Nk]``, the same for all queries, in the memory of one."""
    return None if key_bias is None else key_bias[:, None, None].expand(-1, -1, count, -1)


def _mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    weight: Tensor,
    layout: BlockLayout,
    features: tuple[object, ...],
    backend: str,
) -> Tensor:
    """``∂ Σ_q weight_q·lse_q / ∂β``, by the operator of a backward pass; features in the order it takes."""
    geometry = [layout.q_len, layout.k_len, layout.block_q, layout.block_k, layout.batch, layout.heads]
    lean = torch.are_deterministic_algorithms_enabled()
    call = (list(layout.tensors()), "", geometry, *features, lean, backend)
    grads = torch.ops.sparsetile.attention_backward(
        torch.zeros_like(out), weight, q, k, v, out, lse, *call, True, False
    )
    mass: Tensor = grads[3]
    return mass


@torch.no_grad()
def dense_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    block: int,
    *,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
    backend: str,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The mass that dense attention of one query tile puts on each key tile, ``Σ_{q, k ∈ e} softmax(q·k)``.

    Args:
        q, k, v: ``[B, H, Nq, D]``, ``[B, Hkv, Nk, D]``.
        row: int64 ``[1]``: the query tile, of ``block`` tokens. Nobody waits for its value.
        key_bias: ``[B, Nk]``, added to the logits of each key.

    Returns:
        ``[B, H, k_blocks]`` without gradient; fp32, float64 for float64 inputs. Memory O(k_blocks); when
        causal O(block·Nk), for the mask.
    """
    batch, heads, q_len, _ = q.shape
    k_len, device = k.shape[2], q.device
    place = row * block + torch.arange(block, device=device)
    # Past the end the last query stands in, with no part in the sum.
    tokens = q.index_select(2, place.clamp(max=q_len - 1))
    attn_bias = for_queries(key_bias, block)
    if is_causal:
        ahead = torch.arange(k_len, device=device) > place[:, None] + (k_len - q_len)
        later = torch.zeros(ahead.shape, dtype=q.dtype, device=device).masked_fill(ahead, -math.inf)
        attn_bias = later[None, None] if attn_bias is None else attn_bias + later
    every = torch.arange(-(-k_len // block), device=device).view(1, 1, 1, -1)
    layout = BlockLayout.from_topk(every, block, k_len, block)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    tile_bias = torch.zeros((batch, heads, layout.capacity), dtype=dtype, device=device)
    out, lse = sparse_attention(
        tokens,
        k,
        v,
        layout,
        attn_bias=attn_bias,
        tile_bias=tile_bias,
        scale=scale,
        key_padding_mask=key_padding_mask,
        enable_gqa=True,
        backend=backend,
        return_lse=True,
    )
    weight = (place < q_len).to(lse.dtype).expand_as(lse)
    features = (tile_bias, attn_bias, key_padding_mask, None, scale, 0.0)
    return _mass(tokens, k, v, out, lse, weight, layout, features, backend)


def divergence(mass: Tensor, logits: Tensor, counted: Tensor) -> Tensor:
    """``mean over rows of KL(m / Σm ‖ softmax(logits))``, both over the counted tiles of the row.

    Args:
        mass: ``[..., n]`` ≥ 0, without gradient.
        logits: ``[..., n]``; gradients reach them alone.
        counted: bool ``[..., n]``.

    Returns:
        a scalar ≥ 0; rows without counted mass do not count, and without any row it is 0.
    """
    mass = torch.where(counted, mass.detach(), 0.0)
    total = mass.sum(-1, keepdim=True)
    rows = total > 0
    share = mass / torch.where(rows, total, 1.0)
    # A finite stand-in for −inf: rows without any counted tile would else be NaN, in the gradient as well.
    low = torch.finfo(logits.dtype).min / 4
    predicted = torch.where(counted, logits, low).log_softmax(-1)
    each = torch.where(
        share > 0, share * (share.clamp(min=torch.finfo(share.dtype).tiny).log() - predicted), 0.0
    )
    return each.sum() / rows.sum().clamp(min=1)


def log_spread(logits: Tensor, allowed: Tensor) -> Tensor:
    """Mean over rows of the logarithm of the standard deviation of a row's logits over its allowed tiles.

    Multiplying all logits of a row by c > 1 adds log c to it, and never adds to the tiles that ``top_p``
    keeps. Unlike an entropy, it has a gradient however peaked or flat the softmax is.

    Args:
        logits: ``[B, G, rows, n]``; allowed: bool, broadcastable.

    Returns:
        a scalar; rows with fewer than two allowed tiles do not count, and without any row it is 0.
    """
    allowed = allowed.expand(logits.shape)
    count = allowed.sum(-1)
    mean = torch.where(allowed, logits, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)[..., None]
    variance = torch.where(allowed, logits - mean, 0.0).square().sum(-1) / count.clamp(min=1)
    # Equal logits have no direction in which they spread: no gradient either.
    rows = (count > 1) & (variance > 0)
    each = 0.5 * torch.where(rows, variance, 1.0).log()
    return each.sum() / rows.sum().clamp(min=1)


def log_odds(sigma: float) -> float:
    """x with σ(x) = ``sigma``."""
    return math.log(sigma / (1.0 - sigma))
