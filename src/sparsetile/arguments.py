"""What ``sparse_attention`` asks of its arguments: each check raises one error that says how to go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, LayoutError, explain
from sparsetile.layout.blocks import BlockLayout

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def check_types(**arguments: object) -> None:
    """Everything that should be a tensor is one."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ArgumentError(
                explain(name, expected="a torch.Tensor", got=type(x).__name__, fix="Convert it first.")
            )


def check_settings(scale: object, dropout: object, dropout_name: str = "dropout") -> None:
    """Raises ArgumentError unless scale is None or finite, and dropout a share below one."""
    if scale is not None and (not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ArgumentError(
            explain(
                "scale", expected="a finite Python number or None", got=repr(scale), fix="None means 1/√D."
            )
        )
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ArgumentError(
            explain(
                dropout_name,
                expected="a Python number, 0 ≤ p < 1",
                got=repr(dropout),
                fix="Pass the share of weights to drop.",
            )
        )


def check_flag(name: str, value: object) -> None:
    """Raises ArgumentError unless ``value`` is True or False: a mask in its place would count as True."""
    if value is not True and value is not False:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ArgumentError(
            explain(
                name,
                expected="True or False",
                got=got,
                fix="Masks are passed by keyword: key_padding_mask=….",
            )
        )


def check_memory(memory: object) -> None:
    """Raises ArgumentError unless ``memory`` is "auto" or "low"."""
    if memory not in ("auto", "low"):
        raise ArgumentError(
            explain(
                "memory",
                expected="'auto' or 'low'",
                got=repr(memory),
                fix="'low' is the backward without a workspace of query's size.",
            )
        )


def checked_blocks(block_size: object) -> tuple[int, int]:
    """``block_size`` as (block_q, block_k); which numbers are served is the layout's to say."""
    if type(block_size) is int:
        return block_size, block_size
    if isinstance(block_size, tuple) and len(block_size) == 2 and all(type(b) is int for b in block_size):
        return block_size
    raise ArgumentError(
        explain(
            "block_size",
            expected="an int, or a tuple of two ints (block_q, block_k)",
            got=repr(block_size),
            fix="Pass 16, 32, 64 or 128.",
        )
    )


def check_tokens_first(q: Tensor, k: Tensor, v: Tensor, function: str) -> None:
    """A module's inputs are dense tensors ``[B, N, H, D]``; ``function`` takes heads first."""
    if not (type(q) is type(k) is type(v) is Tensor):
        check_types(q=q, k=k, v=v)
    if not _dense(q, k, v):
        _check_dense(q=q, k=k, v=v)
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ArgumentError(
            explain(
                "q, k, v",
                expected="[B, N, H, D] each",
                got=f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}",
                fix=f"From [B, H, N, D] use transpose(1, 2), or sparsetile.{function}.",
            )
        )


def _dense(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.layout is k.layout is v.layout is torch.strided and not (
        q.is_nested or k.is_nested or v.is_nested
    )


def _check_dense(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.is_nested or x.layout is not torch.strided:
            raise ArgumentError(
                explain(
                    name,
                    expected="a dense tensor",
                    got="a nested one" if x.is_nested else f"layout {x.layout}",
                    fix="Pad it, and pass a key_padding_mask." if x.is_nested else "Use to_dense().",
                )
            )


def check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int, int, int]:
    """Ranks, dtypes, devices, shapes and head counts fit; returns (heads, q_len, k_len, head_dim)."""
    if not _dense(query, key, value):
        _check_dense(query=query, key=key, value=value)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ArgumentError(
            explain(
                "query, key, value",
                expected="[B, H, N, D] each",
                got=_shapes(query, key, value),
                fix="Add a batch or head dimension with unsqueeze; from [B, N, H, D] use transpose(1, 2).",
            )
        )
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in FLOATS:
        raise ArgumentError(
            explain(
                "dtypes",
                expected="one of float16, bfloat16, float32, float64, the same for all three",
                got=f"query {query.dtype}, key {key.dtype}, value {value.dtype}",
                fix="Cast them to one dtype.",
            )
        )
    if not (query.device == key.device == value.device):
        raise ArgumentError(
            explain(
                "devices",
                expected="query, key and value on one device",
                got=f"query {query.device}, key {key.device}, value {value.device}",
                fix="Move them with .to(device).",
            )
        )
    batch, heads, q_len, head_dim = query.shape
    kv_batch, kv_heads, k_len, kv_dim = key.shape
    if key.shape != value.shape or kv_batch != batch or kv_dim != head_dim:
        raise ArgumentError(
            explain(
                "shapes",
                expected="query [B, H, Nq, D]; key and value both [B, Hkv, Nk, D]",
                got=_shapes(query, key, value),
                fix="B and D are shared by all three; key and value agree in every dimension.",
            )
        )
    # Not their min(): exported, that would tie a free size to the least of the others.
    if 0 in query.shape or 0 in key.shape:
        raise ArgumentError(
            explain(
                "shapes",
                expected="no empty dimension",
                got=_shapes(query, key, value),
                fix="Skip empty calls.",
            )
        )
    if heads != kv_heads and not enable_gqa:
        raise ArgumentError(
            explain(
                "heads",
                expected=f"{heads} key-value heads, as query has",
                got=kv_heads,
                fix="Pass enable_gqa=True if groups of query heads share a key-value head.",
            )
        )
    if heads % kv_heads:
        raise ArgumentError(
            explain(
                "heads",
                expected=f"query heads that are a multiple of the {kv_heads} key-value heads",
                got=heads,
                fix="Change the head counts.",
            )
        )
    return heads, q_len, k_len, head_dim


def check_final(is_causal: bool) -> None:
    """A BlockLayout in place of a pattern takes no ``is_causal``."""
    if is_causal:
        raise ArgumentError(
            explain(
                "is_causal",
                expected="False with a BlockLayout, whose tiles are final",
                got=True,
                fix="Build it as BlockLayout.from_pattern(pattern & Causal(), …).",
            )
        )


def check_layout(layout: BlockLayout, query: Tensor, k_len: int) -> None:
    batch, heads, q_len, _ = query.shape
    if (layout.q_len, layout.k_len) != (q_len, k_len):
        raise LayoutError(
            explain(
                "layout lengths",
                expected=f"q_len {q_len} and k_len {k_len}, as the tensors have",
                got=f"q_len {layout.q_len} and k_len {layout.k_len}",
                fix="Build the layout for these lengths, or pass the Pattern and let the cache build it.",
            )
        )
    if layout.batch not in (1, batch) or layout.heads not in (1, heads):
        raise LayoutError(
            explain(
                "layout batch and heads",
                expected=f"batch 1 or {batch}, heads 1 or {heads}",
                got=f"batch {layout.batch}, heads {layout.heads}",
                fix="Build the layout for this batch and these heads, or share one with 1.",
            )
        )
    if layout.device != query.device:
        raise LayoutError(
            explain(
                "layout device",
                expected=str(query.device),
                got=str(layout.device),
                fix=f"Move it with layout.to({str(query.device)!r}).",
            )
        )


def check_mask(mask: Tensor | None, query: Tensor, k_len: int) -> None:
    if mask is None:
        return
    expected = (query.shape[0], k_len)
    if mask.dtype != torch.bool or tuple(mask.shape) != expected or mask.device != query.device:
        raise ArgumentError(
            explain(
                "key_padding_mask",
                expected=f"bool {list(expected)} on {query.device}, True = ignore the key",
                got=f"{mask.dtype} {list(mask.shape)} on {mask.device}",
                fix="For lengths use torch.arange(Nk) >= lengths[:, None].",
            )
        )


def check_bias(bias: Tensor | None, query: Tensor, k_len: int) -> None:
    if bias is None:
        return
    batch, heads, q_len, _ = query.shape
    fits = (
        bias.dim() == 4
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads)
        and tuple(bias.shape[2:]) == (q_len, k_len)
    )
    full = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not fits or bias.dtype not in (query.dtype, full) or bias.device != query.device:
        raise ArgumentError(
            explain(
                "attn_bias",
                expected=(
                    f"[{batch} or 1, {heads} or 1, {q_len}, {k_len}] in {query.dtype} or {full} "
                    f"on {query.device}"
                ),
                got=f"{list(bias.shape)} in {bias.dtype} on {bias.device}",
                fix="A boolean mask belongs into the layout: BlockLayout.from_dense_mask(mask).",
            )
        )


def checked_tile_bias(bias: Tensor | None, query: Tensor, layout: BlockLayout | None) -> Tensor | None:
    if bias is None:
        return None
    if layout is None:
        raise ArgumentError(
            explain(
                "tile_bias in a compiled or traced call",
                expected="a BlockLayout, whose tiles the bias counts",
                got="a Pattern",
                fix="Build the layout outside, and pass it in.",
            )
        )
    batches = (1, query.shape[0]) if layout.batch == 1 else (1,)
    heads = (1, query.shape[1]) if layout.heads == 1 else (1,)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shaped = bias[None, None] if bias.dim() == 1 else bias
    fits = (
        shaped.dim() == 3
        and shaped.shape[0] in batches
        and shaped.shape[1] in heads
        and shaped.shape[2] == layout.capacity
    )
    if not fits or bias.dtype != dtype or bias.device != query.device:
        sizes = " or ".join(map(str, batches)), " or ".join(map(str, heads)), str(layout.capacity)
        either = f"[{layout.capacity}] or [{', '.join(sizes)}]"
        raise ArgumentError(
            explain(
                "tile_bias",
                expected=f"{either} in {dtype} on {query.device}, one value a tile of layout.indices",
                got=f"{list(bias.shape)} in {bias.dtype} on {bias.device}",
                fix="A layout with batch or heads of its own has a tile for each, so those dimensions are 1.",
            )
        )
    return shaped
