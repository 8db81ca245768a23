"""``sparse_attention`` and ``merge_attention``: the functions a user calls, where everything is validated."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from sparsetile import op
from sparsetile.arguments import (
    FLOATS,
    check_bias,
    check_final,
    check_flag,
    check_layout,
    check_mask,
    check_memory,
    check_settings,
    check_tensors,
    check_types,
    checked_blocks,
    checked_tile_bias,
)
from sparsetile.errors import ArgumentError, explain
from sparsetile.kernels.dropout import draw_seed
from sparsetile.kernels.select import check_name
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import Causal, Pattern


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    key_padding_mask: Tensor | None = ...,
    attn_bias: Tensor | None = ...,
    tile_bias: Tensor | None = ...,
    block_size: int | tuple[int, int] = ...,
    enable_gqa: bool = ...,
    deterministic: bool = ...,
    memory: str = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    key_padding_mask: Tensor | None = ...,
    attn_bias: Tensor | None = ...,
    tile_bias: Tensor | None = ...,
    block_size: int | tuple[int, int] = ...,
    enable_gqa: bool = ...,
    deterministic: bool = ...,
    memory: str = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    tile_bias: Tensor | None = None,
    block_size: int | tuple[int, int] = 128,
    enable_gqa: bool = False,
    deterministic: bool = False,
    memory: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys that ``pattern`` keeps, exact in value and gradient.

    Equals ``F.scaled_dot_product_attention(query, key, value, attn_mask=M)``, where ``M`` is the pattern
    written out as a dense boolean matrix, in memory and time proportional to the tiles that ``M`` touches.
    A query that may attend no key gets output 0, log-sum-exp −inf and zero gradient.

    Args:
        query: ``[B, H, Nq, D]``; float16, bfloat16, float32, or (CPU and reference) float64.
        key, value: ``[B, Hkv, Nk, D]``; with ``enable_gqa`` H may be a multiple of Hkv.
        pattern: a :class:`Pattern` (its layout is built once and cached), its text (what ``repr`` gives and
            ``parse_pattern`` reads), or a :class:`BlockLayout`.
        is_causal: also forbid keys after the query (``pattern & Causal()``). With Nq ≠ Nk the last query
            stands at the last key. Not for a BlockLayout: build that from ``pattern & Causal()``.
        scale: factor on query·key; default ``1/√D``.
        dropout_p: share of the softmax weights to drop, in [0, 1), in steps of 2⁻¹⁶. The mask depends on a
            seed drawn from the device's generator and on positions alone.
        key_padding_mask: bool ``[B, Nk]``, True = ignore this key, as in ``nn.MultiheadAttention``.
        attn_bias: ``[B or 1, H or 1, Nq, Nk]``, added to the scaled logits; −inf forbids. Dense: N² memory is
            the caller's.
        tile_bias: fp32 ``[tiles]`` or ``[B or 1, H or 1, tiles]`` in the order of ``layout.indices``: one
            value added to every logit of a tile, with gradient.
        block_size: tile edge in tokens (or (query, key) edges) for the layout of a Pattern: 16, 32, 64, 128.
        enable_gqa: allow fewer key-value heads than query heads (query head h reads ``h // (H // Hkv)``).
        deterministic: True requires gradients that are bitwise equal run to run, as
            ``torch.use_deterministic_algorithms(True)`` does for all calls. Where that asks for another form
            of backward it takes the one of ``memory="low"``. The Hopper backend alone may differ in the last
            bits of query's gradient without it; the others are the same bits either way.
        memory: ``"auto"``, or ``"low"``: backward needs no workspace of the size of query (4 bytes an element
            of it), at seven products a tile instead of five. Today only the Hopper backend has two forms.
            With a key_padding_mask it needs room for a copy of key and value in either.
        backend: ``"auto"``, ``"hopper"``, ``"triton"``, ``"cpu"`` or ``"reference"``. A named backend serves
            or raises.
        return_lse: also return the natural log-sum-exp ``[B, H, Nq]``, differentiable, for
            :func:`merge_attention`.

    Returns:
        ``[B, H, Nq, D]`` in query's dtype; with ``return_lse`` a tuple with the fp32 log-sum-exp.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above.
        LayoutError: a BlockLayout was made for other lengths, batch, heads or device.
        PatternError: the pattern does not fit the lengths.
        BackendError: no backend serves the call (the message has every reason), or q, k or v are under
            forward mode or a transform of ``torch.func``.

    Example:
        >>> import torch, sparsetile as st
        >>> q = k = v = torch.randn(1, 4, 1000, 64)
        >>> out = st.sparse_attention(q, k, v, st.Local(128) | st.Global(16), is_causal=True)
        >>> out.shape
        torch.Size([1, 4, 1000, 64])
    """
    if not (type(query) is type(key) is type(value) is Tensor):
        check_types(query=query, key=key, value=value)
    if not (key_padding_mask is attn_bias is tile_bias is None):
        optional = {"key_padding_mask": key_padding_mask, "attn_bias": attn_bias, "tile_bias": tile_bias}
        check_types(**{name: x for name, x in optional.items() if x is not None})
    query, key, value = as_autocast(query, key, value)
    heads, q_len, k_len, head_dim = check_tensors(query, key, value, enable_gqa)
    check_name(backend)
    check_flag("is_causal", is_causal)
    check_flag("deterministic", deterministic)
    check_memory(memory)
    check_settings(scale, dropout_p, "dropout_p")
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    plain = op.plain(query, key, value)
    if not plain or op.forward_mode():
        op.refuse_transforms(query, key, value, attn_bias, tile_bias)
    layout: BlockLayout | None = None
    text, geometry = "", (q_len, k_len, 0, 0, 1, 1)
    if isinstance(pattern, BlockLayout):
        layout = pattern
        check_final(is_causal)
        check_layout(layout, query, k_len)
    elif isinstance(pattern, (Pattern, str)):  # torch 2.9 cannot trace a union
        block_q, block_k = checked_blocks(block_size)
        if not plain:
            text, by_head = pattern_text(pattern, is_causal)
            geometry = (q_len, k_len, block_q, block_k, 1, heads if by_head else 1)
        else:
            blocks = (block_q, block_k)
            layout = _pattern_layout(pattern, is_causal, q_len, k_len, blocks, query.device, heads)
    else:
        raise ArgumentError(
            explain(
                "pattern",
                expected="a sparsetile Pattern, its text, or a BlockLayout",
                got=type(pattern).__name__,
                fix="For a dense boolean mask use BlockLayout.from_dense_mask(mask).",
            )
        )
    check_mask(key_padding_mask, query, k_len)
    check_bias(attn_bias, query, k_len)
    tile_bias = checked_tile_bias(tile_bias, query, layout)
    out, lse = op.attention(
        query,
        key,
        value,
        layout,
        plain=plain,
        pattern=text,
        geometry=geometry,
        tile_bias=tile_bias,
        attn_bias=attn_bias,
        key_padding_mask=key_padding_mask,
        seed=draw_seed(query.device) if dropout_p > 0.0 else None,
        scale=float(scale),
        dropout_p=float(dropout_p),
        lean=deterministic or memory == "low" or torch.are_deterministic_algorithms_enabled(),
        backend=backend,
    )
    return (out, lse) if return_lse else out


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key sets into attention over their union.

    With ``lse = log Σᵢ exp lseᵢ`` the merged output is ``Σᵢ exp(lseᵢ − lse)·outᵢ`` (Milakov and Gimelshein
    2018, arXiv:1805.02867, eq. 4): one softmax over all keys. Differentiable in every out and lse.

    Args:
        parts: pairs (out ``[..., N, D]``, lse ``[..., N]``), as ``return_lse=True`` gives.

    Returns:
        (out, lse) of the union; rows without keys in any part keep output 0 and lse −inf.

    Raises:
        ArgumentError: no parts, or shapes that differ.
    """
    if not parts:
        raise ArgumentError(
            explain(
                "merge_attention", expected="one (out, lse) pair or more", got="none", fix="Pass the pairs."
            )
        )
    first_out, first_lse = parts[0]
    for out, lse in parts:
        shape, rows = list(first_out.shape), list(first_out.shape[:-1])
        if out.shape != first_out.shape or lse.shape != first_lse.shape or out.shape[:-1] != lse.shape:
            raise ArgumentError(
                explain(
                    "merge_attention",
                    expected=f"out {shape} with lse {rows} in every part",
                    got=f"out {list(out.shape)} with lse {list(lse.shape)}",
                    fix="Merge parts of the same queries only.",
                )
            )
    lses = torch.stack([lse for _, lse in parts])
    # A row that no part serves has lse −inf everywhere; a finite stand-in keeps its value and gradient at
    # zero where −inf − (−inf) would give NaN.
    empty = torch.isneginf(lses).all(dim=0)
    total = torch.logsumexp(lses.masked_fill(empty, 0.0), dim=0)
    weights = torch.exp(lses.masked_fill(empty, -math.inf) - total).unsqueeze(-1)
    outs = torch.stack([out.to(weights.dtype) for out, _ in parts])
    return (weights * outs).sum(dim=0).to(first_out.dtype), total.masked_fill(empty, -math.inf)


def _pattern_layout(
    pattern: Pattern | str,
    is_causal: bool,
    q_len: int,
    k_len: int,
    blocks: tuple[int, int],
    device: torch.device,
    heads: int,
) -> BlockLayout:
    if isinstance(pattern, str):
        pattern = op.parsed(pattern)
    if is_causal:
        pattern = causal_of(pattern)
    return cached_layout(pattern, q_len, k_len, blocks, device, heads)


def causal_of(pattern: Pattern) -> Pattern:
    """``pattern & Causal()``, kept with the pattern: the same object at every call is found sooner."""
    known: Pattern | None = pattern.__dict__.get("_causal_memo")
    if known is None:
        known = pattern.__dict__["_causal_memo"] = pattern & Causal()
    return known


def pattern_text(pattern: Pattern | str, is_causal: bool) -> tuple[str, bool]:
    """What a compiled graph keeps of a pattern: its text and whether it differs by head."""
    if isinstance(pattern, str):
        pattern = op.parsed(pattern)
    try:
        if is_causal:
            pattern = pattern & Causal()
        return repr(pattern), pattern.needs_heads
    except (AttributeError, TypeError):
        # While it traces, the compiler hands over an object whose fields it has only noted down.
        raise ArgumentError(
            explain(
                "pattern in a compiled function",
                expected="a pattern made outside of it",
                got="one made inside",
                fix="Make the pattern before, and pass it in or close over it.",
            )
        ) from None


@lru_cache(maxsize=16)
def _known_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _knows_autocast(device_type: str) -> bool:
    """``torch.amp.is_autocast_available``, which torch 2.9 cannot trace."""
    return _known_autocast(device_type)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
pattern_text._dynamo_marked_constant = True  # type: ignore[attr-defined]
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k, v take its dtype, as F.scaled_dot_product_attention's do."""
    if not torch._C._is_any_autocast_enabled():
        return query, key, value
    kind = query.device.type
    if not _knows_autocast(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    cast = [x.to(dtype) if x.dtype in FLOATS and x.dtype != torch.float64 else x for x in (query, key, value)]
    return cast[0], cast[1], cast[2]
