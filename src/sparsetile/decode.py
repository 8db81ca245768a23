"""``decode_attention``: a few new queries against a long cache, reading the kept tiles alone."""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from sparsetile import op
from sparsetile.arguments import FLOATS, check_flag, check_mask, check_settings, check_types, checked_blocks
from sparsetile.errors import ArgumentError, BackendError, LayoutError, PatternError, explain
from sparsetile.functional import as_autocast, causal_of
from sparsetile.kernels import cpu_decode, reference_decode
from sparsetile.kernels.decode_request import DecodeRequest
from sparsetile.kernels.select import check_name
from sparsetile.kernels.triton_backend import DTYPES, LARGEST_HEAD_DIM, device_problem
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import Pattern

MOST_QUERIES = 16
_LEAST_CAPACITY = 1 << 12


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    lengths: Tensor | None = ...,
    starts: Tensor | None = ...,
    page_table: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    scale: float | None = ...,
    block_size: int | tuple[int, int] = ...,
    enable_gqa: bool = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    lengths: Tensor | None = ...,
    starts: Tensor | None = ...,
    page_table: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    scale: float | None = ...,
    block_size: int | tuple[int, int] = ...,
    enable_gqa: bool = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int | tuple[int, int] = 128,
    enable_gqa: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the newest tokens over a cache, of which the pattern's tiles alone are read.

    Equals the last rows of :func:`sparse_attention` with ``is_causal=True`` over all tokens of a sequence so
    far. One layout of all positions serves every step, so a growing cache builds nothing anew, and lengths
    stay on the device. No gradients.

    Args:
        query: ``[B, H, Nq, D]``, the newest ``Nq`` ≤ 16 tokens.
        key, value: the cache, ``[B, Hkv, capacity, D]``, those tokens included. Slots that are not filled may
            hold anything. With ``page_table``: pages, ``[pages, Hkv, page_size, D]``, the size a multiple of
            the block; capacity is then ``pages of a sequence · page_size``.
        pattern: as for :func:`sparse_attention`, always ``& Causal()``; or a BlockLayout of as many queries
            as keys, causal already, at least ``capacity`` of them (:func:`decode_layout` makes one).
        lengths: int32 or int64 ``[B]``: slots that are filled, 0 to ``capacity``; query ``i`` stands in slot
            ``lengths − Nq + i``. Default: all. On a GPU nobody looks at the values: more than ``capacity``
            counts as that.
        starts: int32 or int64 ``[B]``: slot of each sequence's first token (left padding), from which
            positions count; what lies before is not attended. Below 0 where the cache has dropped as many
            tokens: then pass a layout of ``capacity`` and those. Not with pages.
        page_table: int32 or int64 ``[B, pages of a sequence]``: the page of each ``page_size`` slots.
        key_padding_mask: bool ``[B, capacity]``, True = ignore the key.
        scale: factor on query·key; default ``1/√D``.
        block_size: tile edge in tokens for the layout of a Pattern: 16, 32, 64, 128.
        enable_gqa: allow fewer key-value heads than query heads.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"`` (dense, float64). A named one serves
            or raises.
        return_lse: also return the natural log-sum-exp ``[B, H, Nq]``.

    Returns:
        ``[B, H, Nq, D]`` in query's dtype; with ``return_lse`` a tuple with the log-sum-exp. A query without
        keys gets 0 and −inf.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above, or a gradient is asked for.
        LayoutError: a BlockLayout does not fit.
        PatternError: the pattern depends on how many keys there are.
        BackendError: no backend serves the call.

    Example:
        >>> import torch, sparsetile as st
        >>> k = v = torch.randn(1, 2, 5000, 64)
        >>> q = torch.randn(1, 8, 1, 64)
        >>> out = st.decode_attention(q, k, v, st.Local(512, 0) | st.Global(64), enable_gqa=True)
        >>> out.shape
        torch.Size([1, 8, 1, 64])
    """
    if not (type(query) is type(key) is type(value) is Tensor):
        check_types(query=query, key=key, value=value)
    if not op.plain(query, key, value) or op.forward_mode():
        op.refuse_transforms(query, key, value)
    query, key, value = as_autocast(query, key, value)
    check_name(backend)
    check_flag("enable_gqa", enable_gqa)
    check_settings(scale, 0.0)
    capacity, page_size = _check_cache(query, key, value, page_table, enable_gqa)
    _, heads, q_len, width = query.shape
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ArgumentError(
            explain(
                "decode_attention",
                expected="tensors without gradients, or torch.no_grad()",
                got="one that requires a gradient",
                fix="Train with sparse_attention(…, is_causal=True), which is the same function.",
            )
        )
    if lengths is not None:
        lengths = _each("lengths", lengths, query)
    if starts is not None:
        starts = _each("starts", starts, query)
    if starts is not None and page_table is not None:
        raise ArgumentError(
            explain(
                "starts with page_table",
                expected="one of them",
                got="both",
                fix="Pages need no padding: begin each sequence at the start of its first page.",
            )
        )
    if key_padding_mask is not None:
        check_types(key_padding_mask=key_padding_mask)
        check_mask(key_padding_mask, query, capacity)
        if key_padding_mask.stride(1) != 1:
            key_padding_mask = key_padding_mask.contiguous()
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    if isinstance(pattern, BlockLayout):
        layout = pattern
        _check_layout(layout, query, capacity)
    else:
        layout = decode_layout(pattern, capacity, block_size, query.device, heads)
    if page_size % layout.block_k:
        raise ArgumentError(
            explain(
                "page size",
                expected=f"a multiple of the tile's {layout.block_k} keys",
                got=page_size,
                fix="Pass a smaller block_size.",
            )
        )
    if query.is_cpu:
        _check_values(lengths, starts, capacity, layout)
    request = DecodeRequest(
        layout,
        lengths,
        starts,
        page_table,
        key_padding_mask,
        q_len,
        capacity,
        page_size,
        1.0 / math.sqrt(width) if scale is None else float(scale),
    )
    out, lse = _run(backend, query, key, value, request)
    return (out, lse) if return_lse else out


def decode_layout(
    pattern: Pattern | str,
    capacity: int,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
    heads: int | None = None,
) -> BlockLayout:
    """The layout that serves every step of decoding within ``capacity`` positions, from the layout cache.

    It is made for the next power of two of positions, so that a cache that grows to any length has paid for
    its layouts no more than twice what the last one cost, and has asked for a dozen at most. Rows that are
    not reached yet take memory, and no time.

    Raises:
        PatternError: the pattern depends on how many keys there are, so that each step has another one.
    """
    if isinstance(pattern, str):
        pattern = op.parsed(pattern)
    if not isinstance(pattern, Pattern):
        raise ArgumentError(
            explain(
                "pattern",
                expected="a sparsetile Pattern, its text, or a BlockLayout",
                got=type(pattern).__name__,
                fix="For example st.Local(1024, 0) | st.Global(64).",
            )
        )
    if pattern.needs_length:
        raise PatternError(
            explain(
                "decode_attention(pattern)",
                expected="a pattern that does not depend on the number of keys",
                got=repr(pattern)[:120],
                fix="Use Budget(…, causal=True); of packed documents, decode each by itself.",
            )
        )
    positions = max(_LEAST_CAPACITY, 1 << (capacity - 1).bit_length())
    return cached_layout(
        causal_of(pattern), positions, positions, checked_blocks(block_size), torch.device(device), heads
    )


# -- checks -------------------------------------------------------------------------------------------


def _check_cache(
    query: Tensor, key: Tensor, value: Tensor, page_table: Tensor | None, enable_gqa: bool
) -> tuple[int, int]:
    """(capacity of a sequence, page size or 0) of tensors that fit one another."""
    fits = query.dim() == key.dim() == value.dim() == 4 and key.shape == value.shape
    fits = fits and 0 not in query.shape and 0 not in key.shape and query.shape[3] == key.shape[3]
    fits = fits and (page_table is not None or key.shape[0] == query.shape[0])
    if not fits or query.shape[2] > MOST_QUERIES:
        cache = "[B, Hkv, capacity, D]" if page_table is None else "[pages, Hkv, page_size, D]"
        raise ArgumentError(
            explain(
                "shapes",
                expected=f"query [B, H, 1 to {MOST_QUERIES}, D]; key and value both {cache}, none empty",
                got=f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}",
                fix="For many queries use sparse_attention(…, is_causal=True).",
            )
        )
    same = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    if not same or query.dtype not in FLOATS:
        raise ArgumentError(
            explain(
                "dtypes and devices",
                expected="one of float16, bfloat16, float32, float64 and one device for all three",
                got=", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value)),
                fix="Cast and move the query; a cache is better made right.",
            )
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if heads % key_heads or (heads != key_heads and not enable_gqa):
        raise ArgumentError(
            explain(
                "heads",
                expected=f"{heads} key-value heads, or with enable_gqa=True a number that divides them",
                got=f"{key_heads}, enable_gqa={enable_gqa}",
                fix="Pass enable_gqa=True if groups of query heads share a key-value head.",
            )
        )
    if page_table is None:
        return key.shape[2], 0
    check_types(page_table=page_table)
    whole = page_table.dtype in (torch.int32, torch.int64) and page_table.device == query.device
    if not whole or page_table.dim() != 2 or page_table.shape[0] != query.shape[0]:
        raise ArgumentError(
            explain(
                "page_table",
                expected=f"int32 or int64 [{query.shape[0]}, pages of a sequence] on {query.device}",
                got=f"{page_table.dtype} {list(page_table.shape)} on {page_table.device}",
                fix="Entry j names the page of slots j·page_size and following.",
            )
        )
    return page_table.shape[1] * key.shape[2], key.shape[2]


def _each(name: str, given: Tensor, query: Tensor) -> Tensor:
    """One integer for each sequence, on the query's device."""
    check_types(**{name: given})
    fits = given.dtype in (torch.int32, torch.int64) and tuple(given.shape) == (query.shape[0],)
    if not fits or given.device != query.device:
        raise ArgumentError(
            explain(
                name,
                expected=f"int32 or int64 [{query.shape[0]}] on {query.device}",
                got=f"{given.dtype} {list(given.shape)} on {given.device}",
                fix="One number for each sequence.",
            )
        )
    return given.contiguous()


def _check_values(
    lengths: Tensor | None,
    starts: Tensor | None,
    capacity: int,
    layout: BlockLayout,
) -> None:
    """What is only looked at where that waits for nobody, on the CPU."""
    if lengths is not None and bool(((lengths < 0) | (lengths > capacity)).any()):
        raise ArgumentError(
            explain(
                "lengths",
                expected=f"0 to {capacity}, the capacity of the cache",
                got=lengths.tolist(),
                fix="Count the keys cached, those of the queries included.",
            )
        )
    if starts is None:
        return
    ends = capacity if lengths is None else lengths.long()
    furthest = int((ends - starts.long()).max())
    if furthest > layout.q_len:
        raise LayoutError(
            explain(
                "layout lengths with starts below 0",
                expected=f"at least {furthest}, the positions that the queries reach",
                got=layout.q_len,
                fix="Make it with sparsetile.decode.decode_layout(pattern, capacity + dropped, …).",
            )
        )


def _check_layout(layout: BlockLayout, query: Tensor, capacity: int) -> None:
    heads = query.shape[1]
    fits = layout.q_len == layout.k_len >= capacity and layout.batch == 1 and layout.heads in (1, heads)
    if not fits or layout.device != query.device:
        raise LayoutError(
            explain(
                "layout",
                expected=f"as many queries as keys, at least {capacity}, batch 1, heads 1 or {heads}, on "
                f"{query.device}",
                got=repr(layout),
                fix="Make it with sparsetile.decode.decode_layout(pattern, capacity, …).",
            )
        )


# -- backends -----------------------------------------------------------------------------------------


def _run(backend: str, q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference_decode.decode(q, k, v, request)
    reasons = []
    if backend in ("auto", "cpu"):
        reason = cpu_decode.why_not(q, request)
        if reason is None:
            return cpu_decode.decode(q, k, v, request)
        reasons.append(f"cpu: {reason}")
    if backend in ("auto", "triton"):
        reason = _triton_why_not(q, k, v)
        if reason is None:
            made: tuple[Tensor, Tensor] = _launches().decode(q, k, v, request)
            return made
        reasons.append(f"triton: {reason}")
    if backend == "hopper":
        reasons.append("hopper: has no kernel for decoding; 'triton' serves H100 and H200, too")
    raise BackendError(
        explain(
            f"backend={backend!r}",
            expected="a backend that decodes this",
            got="; ".join(reasons),
            fix="Change what the reasons name; backend='reference' is dense but runs anywhere.",
        )
    )


@lru_cache(maxsize=1)
def _launches() -> ModuleType:
    """The module that prepares launches, imported when first needed: it imports Triton."""
    from sparsetile.kernels import triton_decode_launch

    return triton_decode_launch


def _triton_why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype not in DTYPES:
        return f"serves fp16, bf16 and fp32, not {q.dtype}"
    if q.shape[3] > LARGEST_HEAD_DIM:
        return f"serves head_dim 1 to {LARGEST_HEAD_DIM}, not {q.shape[3]}"
    if not (q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        return "needs q, k and v contiguous in their last dimension; call .contiguous() on them"
    return device_problem(q.device, "tensors")
