"""Attention weights on request, of a call whose tiles were chosen for each batch element and group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.adaptive.places import Places
from sparsetile.nn.weights import _exact, scaled_logits
from sparsetile.patterns.tiles import unpack


def chosen_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    places: Places,
    bias: Tensor,
    *,
    form: str,
    average: bool,
    is_causal: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:
    """The softmax weights of a call, before dropout.

    Args:
        query, key, lse: ``[B, H, Nq, D]``, ``[B, Hkv, Nk, D]``, ``[B, H, Nq]``, as in the call.
        bias: β of each place, ``[B, G, q_blocks, k]``.
        form: ``"dense"``: with gradient; ``"sparse"``: a ``torch.sparse_bsr`` tensor without, whose lengths
            are rounded up to the block size, and that stores the tiles that any batch element or head keeps.
        average: the mean over heads ``[B, …]`` instead of ``[B, H, …]``.
        key_bias: ``[B, Nk]``, added to the logits of each key.
    """
    if form == "sparse":
        return _sparse(query, key, lse, places, bias, average, scale, key_padding_mask, key_bias)
    dense = _dense(query, key, places, bias, is_causal, scale, key_padding_mask, key_bias)
    return dense.mean(1) if average else dense


def _dense(
    query: Tensor,
    key: Tensor,
    places: Places,
    bias: Tensor,
    is_causal: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:
    layout, heads = places.layout, query.shape[1]
    logits = scaled_logits(query, key, scale)
    # One column more takes what unused places hold.
    column = torch.where(places.valid, places.column, layout.k_blocks)
    grid = bias.new_full((*column.shape[:3], layout.k_blocks + 1), -math.inf).scatter(-1, column, bias)
    grid = grid[..., :-1].repeat_interleave(heads // grid.shape[1], 1)
    pairs = grid.repeat_interleave(layout.block_q, 2)[:, :, : layout.q_len]
    logits = logits + pairs.repeat_interleave(layout.block_k, 3)[..., : layout.k_len]
    if key_bias is not None:
        logits = logits + key_bias[:, None, None]
    if is_causal:
        last = torch.arange(layout.q_len, device=query.device) + (layout.k_len - layout.q_len)
        ahead = torch.arange(layout.k_len, device=query.device) > last[:, None]
        logits = logits.masked_fill(ahead, -math.inf)
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], -math.inf)
    # A row that attends nothing has a softmax of NaN, and so has its gradient: it gets any logits, then 0.
    empty = torch.isneginf(logits).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(query.dtype)


@torch.no_grad()
def _sparse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    places: Places,
    bias: Tensor,
    average: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:
    layout, block = places.layout, places.layout.block_k
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    line, col = layout.rows_and_columns()
    row, head, element = (
        line % layout.q_blocks,
        line // layout.q_blocks % layout.heads,
        line // (layout.q_blocks * layout.heads),
    )
    stored, place = torch.unique(row * layout.k_blocks + col, return_inverse=True)
    beta = places.to_edges(bias).view(-1)[: layout.nnz].to(lse.dtype)
    bits = torch.cat((unpack(layout.masks, block), torch.ones_like(unpack(layout.masks[:1], block))))
    if not len(layout.masks):
        bits = torch.ones((1, block, block), dtype=torch.bool, device=query.device)
    ids = layout.mask_ids[: layout.nnz].long()
    within = torch.arange(block, device=query.device)
    shape = (len(stored), block, block)
    values = lse.new_zeros((batch, *shape) if average else (batch, heads, *shape))
    # One head of one batch element at a time: what is computed on the way takes no more than its tiles.
    for b in range(batch):
        for h in range(heads):
            mine = ((element == b) & (head == (h if layout.heads > 1 else 0))).nonzero().squeeze(1)
            queries = (row[mine, None] * block + within).clamp(max=layout.q_len - 1)
            keys = (col[mine, None] * block + within).clamp(max=layout.k_len - 1)
            own_q, own_k = query[b, h].to(lse.dtype)[queries], key[b, h // group].to(lse.dtype)[keys]
            with _exact(query.device.type):
                tiles = torch.matmul(own_q, own_k.mT).mul_(scale).add_(beta[mine, None, None])
            if key_bias is not None:
                tiles += key_bias[b][keys][:, None]
            kept = bits[ids[mine]]
            if key_padding_mask is not None:
                kept = kept & ~key_padding_mask[b][keys][:, None]
            total = lse[b, h].masked_fill(torch.isneginf(lse[b, h]), 0.0)[queries]
            tiles = tiles.masked_fill_(~kept, -math.inf).sub_(total[..., None]).exp_()
            (values[b] if average else values[b, h]).index_add_(0, place[mine], tiles)
    values = (values / heads if average else values).to(query.dtype)
    lead = values.shape[:-3]
    firsts = torch.arange(layout.q_blocks + 1, device=query.device) * layout.k_blocks
    starts = torch.searchsorted(stored, firsts)
    return torch.sparse_bsr_tensor(
        starts.expand(*lead, -1).contiguous(),
        (stored % layout.k_blocks).expand(*lead, -1).contiguous(),
        values,
        size=(*lead, layout.q_blocks * block, layout.k_blocks * block),
        check_invariants=False,
    )
