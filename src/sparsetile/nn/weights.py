"""Attention weights on request: dense, with gradient, or block-sparse in the memory of the kept tiles.

Sparse weights come from the log-sum-exp that the attention kernel returned: the weight of a kept pair is
``exp(scale·q·k + bias − lse)``. Dense ones are a softmax of their own, because a gradient that goes partly
through the logits and partly through the log-sum-exp loses what the softmax subtracts first.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sparsetile import op
from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import as_autocast, pattern_text
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import Pattern
from sparsetile.patterns.tiles import unpack

DENSE_LIMIT = 1 << 30
"""Bytes of ``[B, H, Nq, Nk]`` weights up to which they are made dense."""

FORMS = ("dense", "sparse")

_ABSENT = -2


def check_form(form: object, need_weights: bool) -> None:
    """Raise ArgumentError unless ``form`` is one of :data:`FORMS`, and can act."""
    if form not in FORMS or (form == "sparse" and not need_weights):
        raise ArgumentError(
            explain(
                "weights",
                expected="'dense', or with need_weights=True 'sparse'",
                got=f"{form!r} with need_weights={need_weights}",
                fix="'sparse' returns a torch.sparse_bsr tensor of the kept tiles.",
            )
        )


def check_dense_size(query: Tensor, k_len: int) -> None:
    """Raise ArgumentError if dense weights of ``query`` ``[B, H, Nq, D]`` would pass :data:`DENSE_LIMIT`."""
    batch, heads, q_len, _ = query.shape
    size = batch * heads * q_len * k_len * query.dtype.itemsize
    if size > DENSE_LIMIT:
        raise ArgumentError(
            explain(
                "need_weights=True",
                expected=f"dense weights of at most {DENSE_LIMIT / 2**30:g} GiB",
                got=f"{size / 2**30:.3g} GiB for [{batch}, {heads}, {q_len}, {k_len}] in {query.dtype}",
                fix='Pass need_weights=False if you do not use them, or weights="sparse" for a '
                "torch.sparse_bsr tensor that holds the kept tiles alone.",
            )
        )


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    weights: str = "dense",
    average: bool = True,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """The softmax weights of a ``sparse_attention`` call, before dropout, in either form.

    Args:
        weights: ``"dense"`` (:func:`dense_weights`) or ``"sparse"`` (:func:`sparse_weights`).
        average: the mean over heads ``[B, …]`` instead of ``[B, H, …]``.

    The other arguments, results and errors are theirs.
    """
    check_form(weights, True)
    # What the call attended: under autocast, query and key rounded as it did.
    query, key, _ = as_autocast(query, key, key)
    if weights == "sparse":
        return sparse_weights(
            query,
            key,
            lse,
            pattern,
            average=average,
            scale=scale,
            key_padding_mask=key_padding_mask,
            attn_bias=attn_bias,
            block_size=block_size,
        )
    dense = dense_weights(
        query,
        key,
        pattern,
        scale=scale,
        key_padding_mask=key_padding_mask,
        attn_bias=attn_bias,
        block_size=block_size,
    )
    return dense.mean(1) if average else dense


def dense_weights(
    query: Tensor,
    key: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    appended: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """The softmax weights of a ``sparse_attention`` call, written out.

    Args:
        query, key: ``[B, H, Nq, D]``, ``[B, Hkv, Nk, D]`` with H a multiple of Hkv, as in the call.
        pattern: that of the call (or its text), with ``& Causal()`` if it was causal; or a layout of these
            queries and keys, batch 1, which has its own block size.
        appended: ``[1, H, n, D]`` further keys that every query attends.
        scale, key_padding_mask, attn_bias, block_size: as in the call.

    Returns:
        ``[B, H, Nq, Nk + n]`` in query's dtype, differentiable; rows that attend nothing are 0.

    Raises:
        ArgumentError: they would take more than :data:`DENSE_LIMIT` bytes.
    """
    heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
    check_dense_size(query, k_len + (0 if appended is None else appended.shape[2]))
    logits = scaled_logits(query, key, scale)
    if logits.numel():
        if isinstance(pattern, BlockLayout):
            kept = _pairs(pattern)
        else:
            text, by_head = pattern_text(pattern, False)
            geometry = [q_len, k_len, block_size, heads if by_head else 1]
            if op.plain(query, key, key):
                kept = _written_out(text if isinstance(pattern, str) else pattern, geometry, query.device)
            else:
                kept = torch.ops.sparsetile.allowed_pairs(query, text, geometry)
        if attn_bias is not None:
            logits = logits + attn_bias
        if key_padding_mask is not None:
            kept = kept & ~key_padding_mask[:, None, None, :]
        logits = logits.masked_fill(~kept, -math.inf)
    if appended is not None:
        logits = torch.cat((logits, scaled_logits(query, appended, scale)), -1)
    if not logits.numel():
        return logits.to(query.dtype)
    # A row that attends nothing has a softmax of NaN, and so has its gradient: it gets any logits, then 0.
    empty = torch.isneginf(logits).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(query.dtype)


def scaled_logits(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """``scale·q·kᵀ`` ``[B, H, Nq, Nk]`` in the precision of the kernels' statistics, autocast or not."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key = key.repeat_interleave(group, 1)
    with _exact(query.device.type):
        return torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scale


def _exact(device_type: str) -> AbstractContextManager[object]:
    """Where products keep the dtype of their factors, autocast or not."""
    # The meta device is the one that has no autocast to switch off.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@torch.no_grad()
def sparse_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    average: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """The softmax weights of a ``sparse_attention`` call on its kept tiles, in memory O(tiles).

    Runs outside of compiled graphs, and gives no gradient.

    Args:
        lse: ``[B, H, Nq]``, what the call returned.
        average: the mean over heads instead of each head's own.

    The other arguments are those of :func:`dense_weights`.

    Returns:
        ``torch.sparse_bsr`` tensor ``[B, H, Nq′, Nk′]``, or its mean over heads ``[B, Nq′, Nk′]`` if
        ``average``, in query's dtype. A BSR tensor holds whole blocks, so Nq′ and Nk′ are the lengths rounded
        up to ``block_size``; the weights past Nq and Nk are 0. Where the pattern differs by head, every head
        stores the tiles of all.
    """
    batch, heads, q_len, dim = query.shape
    k_len, group = key.shape[2], heads // key.shape[1]
    if isinstance(pattern, BlockLayout):
        layout, block_size = pattern, pattern.block_q
    else:
        pattern = op.parsed(pattern) if isinstance(pattern, str) else pattern
        layout = cached_layout(pattern, q_len, k_len, block_size, query.device, heads)
    row, col, mask_ids = _shared_tiles(layout)
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    within = torch.arange(block_size, device=query.device)
    # Past the ends the last token stands in: the layout's own masks forbid those pairs.
    queries = (row[:, None] * block_size + within).clamp(max=q_len - 1)
    keys = (col[:, None] * block_size + within).clamp(max=k_len - 1)
    absent_and_whole = torch.tensor([False, True], device=query.device)[:, None, None]
    bits = torch.cat((unpack(layout.masks, block_size), absent_and_whole.expand(2, block_size, block_size)))
    shape = (batch, len(row), block_size, block_size)
    values = query.new_empty((batch, heads, *shape[1:])) if not average else lse.new_zeros(shape)
    # One head at a time: what is computed on the way takes no more than one head's tiles.
    for head in range(heads):
        own_queries = query[:, head].to(lse.dtype)[:, queries]
        own_keys = key[:, head // group].to(lse.dtype)[:, keys]
        with _exact(query.device.type):
            tiles = torch.matmul(own_queries, own_keys.transpose(-1, -2)).mul_(scale)
        if attn_bias is not None:
            own = attn_bias[:, head if attn_bias.shape[1] > 1 else 0]
            tiles += own[:, queries[:, :, None], keys[:, None, :]]
        kept = bits[mask_ids[head if layout.heads > 1 else 0]]
        if key_padding_mask is not None:
            kept = kept & ~key_padding_mask[:, keys][:, :, None, :]
        # Rows that attend nothing have lse −inf, and −inf − (−inf) is NaN.
        total = lse[:, head].masked_fill(torch.isneginf(lse[:, head]), 0.0)[:, queries]
        tiles = tiles.masked_fill_(~kept, -math.inf).sub_(total[..., None]).exp_()
        if average:
            values += tiles
        else:
            values[:, head] = tiles
    if average:
        values = (values / heads).to(query.dtype)
    lead = values.shape[:-3]
    starts = torch.searchsorted(row, torch.arange(layout.q_blocks + 1, device=row.device))
    return torch.sparse_bsr_tensor(
        starts.expand(*lead, -1).contiguous(),
        col.expand(*lead, -1).contiguous(),
        values,
        size=(*lead, layout.q_blocks * block_size, layout.k_blocks * block_size),
        check_invariants=False,
    )


def _shared_tiles(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns ``[T]`` of the tiles that any head keeps, and their mask ids ``[heads, T]``."""
    line, col = layout.rows_and_columns()
    if layout.heads == 1:
        return line, col, layout.mask_ids[None, : layout.nnz].long()
    head, row = line // layout.q_blocks, line % layout.q_blocks
    places, index = torch.unique(row * layout.k_blocks + col, return_inverse=True)
    ids = torch.full((layout.heads, len(places)), _ABSENT, device=line.device)
    ids[head, index] = layout.mask_ids[: layout.nnz].long()
    return places // layout.k_blocks, places % layout.k_blocks, ids


def _written_out(pattern: Pattern | str, geometry: list[int], device: torch.device) -> Tensor:
    q_len, k_len, block, heads = geometry
    pattern = op.parsed(pattern) if isinstance(pattern, str) else pattern
    return _pairs(cached_layout(pattern, q_len, k_len, block, device, heads))


def _pairs(layout: BlockLayout) -> Tensor:
    """bool ``[layout.heads, Nq, Nk]``."""
    return torch.stack([layout.to_dense(head) for head in range(layout.heads)])


@torch.library.custom_op("sparsetile::allowed_pairs", mutates_args=())
def _allowed_pairs(like: Tensor, pattern: str, geometry: list[int]) -> Tensor:
    """bool ``[heads or 1, Nq, Nk]``; a graph holds a pattern as its text, and asks when it runs."""
    return _written_out(pattern, geometry, like.device)


@_allowed_pairs.register_fake
def _fake_allowed_pairs(like: Tensor, pattern: str, geometry: list[int]) -> Tensor:
    q_len, k_len, _, heads = geometry
    return like.new_empty((heads, q_len, k_len), dtype=torch.bool)
