"""What ``nn.MultiheadAttention`` takes besides its inputs, checked and brought into the kernels' terms."""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from sparsetile.errors import ArgumentError, explain


class MultiheadError(ArgumentError, AssertionError, RuntimeError):
    """A call that ``nn.MultiheadAttention`` rejects too.

    It raises AssertionError for some of these and RuntimeError for others; this is both, so code that
    catches either keeps working.
    """


class Masks(NamedTuple):
    """Masks as ``sparse_attention`` takes them.

    Attributes:
        is_causal: the causal pattern stands for the dense mask.
        padding: bool ``[B, S]``, True = ignore the key.
        bias: ``[B or 1, H or 1, L, S]``, added to the scaled logits.
    """

    is_causal: bool
    padding: Tensor | None
    bias: Tensor | None


def _reject(what: str, expected: str, got: object, fix: str) -> NoReturn:
    raise MultiheadError(explain(what, expected=expected, got=got, fix=fix))


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, batch_first: bool, fused: bool
) -> None:
    """Raises MultiheadError for shapes that do not fit."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        _reject(
            "query, key, value",
            "all of 3 dimensions (batched) or all of 2 (unbatched)",
            shapes,
            "Add the batch dimension with unsqueeze.",
        )
    if query.shape[-1] != embed_dim:
        _reject(
            "query", f"{embed_dim} features, the embed_dim", shapes, "Project the query to embed_dim first."
        )
    if key.shape[:-1] != value.shape[:-1] or (fused and key.shape[-1] != value.shape[-1]):
        _reject(
            "key and value", "one length and batch, and one width", shapes, "For widths use kdim and vdim."
        )
    lead = 0 if batch_first else 1
    if query.dim() == 3 and query.shape[lead] != key.shape[lead]:
        order = "[batch, length, features]" if batch_first else "[length, batch, features]"
        _reject("query and key", f"one batch size, in the order {order}", shapes, "See batch_first.")


def masks_of(
    query: Tensor,
    k_len: int,
    *,
    batched: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Masks:
    """The masks of a call in the kernels' terms.

    Args:
        query: the projected query ``[B, H, L, D]``.
        k_len: S.
        batched: whether the call's input had a batch dimension.
        key_padding_mask, attn_mask, is_causal: as ``nn.MultiheadAttention.forward`` takes them.

    Raises:
        MultiheadError: a mask of another shape or dtype, or ``is_causal`` without a mask.
    """
    batch, heads, q_len, _ = query.shape
    padding = bias = None
    if is_causal and attn_mask is None:
        _reject(
            "is_causal=True",
            "an attn_mask beside it, since it is a hint that attn_mask is causal",
            "attn_mask=None",
            "Pass nn.Transformer.generate_square_subsequent_mask(L); where L = S it is not read, so that "
            "torch.zeros(1, 1).expand(L, L) will do for a long sequence.",
        )
    if attn_mask is not None:
        _check_kind("attn_mask", attn_mask)
        # With L = S the hint says all that the mask says. With other lengths torch's causal mask starts at
        # the top left and ours ends at the bottom right, so the mask itself is used.
        is_causal = is_causal and q_len == k_len
        flat, full = (q_len, k_len), (batch * heads, q_len, k_len)
        if not is_causal:
            if tuple(attn_mask.shape) not in (flat, full):
                _reject(
                    "attn_mask",
                    f"[{q_len}, {k_len}] or [{batch}·{heads}, {q_len}, {k_len}]",
                    list(attn_mask.shape),
                    "See the docs of nn.MultiheadAttention.",
                )
            _check_device("attn_mask", attn_mask, query)
            bias = _additive(attn_mask, query.dtype)
            bias = bias[None, None] if bias.dim() == 2 else bias.view(batch, heads, q_len, k_len)
    if key_padding_mask is not None:
        _check_kind("key_padding_mask", key_padding_mask)
        _check_device("key_padding_mask", key_padding_mask, query)
        expected = (batch, k_len) if batched else (k_len,)
        if tuple(key_padding_mask.shape) != expected:
            _reject(
                "key_padding_mask",
                str(list(expected)),
                list(key_padding_mask.shape),
                "It has one entry a key, True where the key is to be ignored.",
            )
        key_padding_mask = key_padding_mask.view(batch, k_len)
        if key_padding_mask.dtype == torch.bool:
            padding = key_padding_mask
        else:
            added = _additive(key_padding_mask, query.dtype)[:, None, None, :]
            # Alone it stays one row for all queries: expanded, not written out.
            bias = added.expand(batch, 1, q_len, k_len) if bias is None else bias + added
    return Masks(is_causal, padding, bias)


def _check_device(name: str, mask: Tensor, query: Tensor) -> None:
    if mask.device != query.device:
        _reject(name, f"a tensor on {query.device}", f"one on {mask.device}", "Move it with .to(device).")


def _check_kind(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor):
        _reject(name, "a torch.Tensor", type(mask).__name__, "Convert it first.")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _reject(name, "a bool or floating-point tensor", mask.dtype, "mask.bool() makes True = not allowed.")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as 0 and −inf; a float mask in a dtype that the kernels add to logits of ``dtype``."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(mask, -math.inf)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    return mask if mask.dtype in (dtype, full) else mask.to(full)
