"""The operators ``sparsetile::attention`` and ``sparsetile::attention_backward``.

They carry a layout as a flat list of tensors, so PyTorch's dispatcher, ``torch.compile`` and
``torch.export`` see ordinary tensor operators with fake kernels and autograd. A compiled graph cannot hold
the cache's layout objects, so there a pattern travels as its text and the operator asks the cache when it
runs.

Passing a Python-defined operator costs the host about a fifth of a millisecond, as much as a short sequence
takes on a GPU. So plain tensors outside of any graph or mode go through ``_Attention``, an autograd function
around the same forward and backward; whoever traces, compiles or intercepts meets the operators.

Validation is not done here: ``functional.sparse_attention`` is the one door.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsetile.errors import BackendError, explain
from sparsetile.kernels.request import Gradients, Request
from sparsetile.kernels.select import choose
from sparsetile.layout.blocks import BlockLayout, memo_of
from sparsetile.layout.build import Transpose
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import parse_pattern

_LIBRARY = torch.library.Library("sparsetile", "DEF")
_CALL = (
    "Tensor[] layout, str pattern, SymInt[] geometry, Tensor? tile_bias, Tensor? attn_bias, "
    "Tensor? key_padding_mask, Tensor? seed, float scale, float dropout_p, bool lean, str backend"
)
_LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}, bool tile_bias_grad, bool attn_bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


parsed = lru_cache(maxsize=256)(parse_pattern)
"""``parse_pattern``, once for each text."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | None,
    *,
    plain: bool,
    pattern: str = "",
    geometry: Sequence[int] = (),
    tile_bias: Tensor | None,
    attn_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    lean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Dispatch one validated call; returns (out, lse).

    Either a layout, or the text of a pattern with geometry (q_len, k_len, block_q, block_k, batch, heads);
    that of a layout ends in its ``row_bound``.
    ``plain`` is what :func:`plain` says of q, k, v.
    """
    features = (tile_bias, attn_bias, key_padding_mask, seed, scale, dropout_p, lean)
    call: tuple[Any, ...]
    if layout is None:
        call = ([], pattern, list(geometry), *features, backend)
    elif plain:
        request = _make_request(layout, *features)
        if _differentiable(q, k, v, tile_bias, attn_bias):
            out, lse = _Attention.apply(q, k, v, tile_bias, attn_bias, request, backend)
            return out, lse
        return run(q, k, v, request, backend)
    else:
        call = _call(layout, features, backend)
    result = torch.ops.sparsetile.attention(q, k, v, *call)
    return result[0], result[1]


def _call(layout: BlockLayout, features: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
    """What the operators' schema calls ``_CALL``, for a layout; features from tile_bias to lean."""
    return (layout.operands(), "", layout.geometry, *features, backend)


def plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nobody watches: real tensors of no subclass, no graph, no dispatch mode, no functorch level."""
    return (
        not torch.compiler.is_compiling()
        and type(q) in _PLAIN_TYPES
        and type(k) in _PLAIN_TYPES
        and type(v) in _PLAIN_TYPES
        and (q.is_cpu or q.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def forward_mode() -> bool:
    """Whether forward-mode derivatives are on; where that changes, the compiler traces again."""
    return forward_ad._current_level >= 0


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise BackendError for tensors that forward mode or a transform of ``torch.func`` follows: operators
    defined in Python pass on neither, and ``jvp`` would give a tangent of zero without a word."""
    if torch.compiler.is_compiling():
        carried = forward_mode()
    else:
        functorch = torch._C._functorch
        # Inside a transform any tensor at all unpacks to a tangent.
        dual = forward_mode() and functorch.peek_interpreter_stack() is None
        carried = any(
            functorch.is_gradtrackingtensor(x)
            or functorch.is_batchedtensor(x)
            or (dual and forward_ad.unpack_dual(x).tangent is not None)
            for x in tensors
            if x is not None
        )
    if carried:
        raise BackendError(
            explain(
                "derivatives",
                expected="backward() or torch.autograd.grad",
                got="forward mode or a transform of torch.func (grad, vjp, jvp, vmap)",
                fix="torch.func.functional_call with torch.autograd.grad does work.",
            )
        )


def _differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd needs to hear of a function of these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


class _Attention(torch.autograd.Function):
    """The same forward and backward as the operators', without their passage through the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tile_bias: Tensor | None,
        attn_bias: Tensor | None,
        request: Request,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v, request, backend)
        ctx.set_materialize_grads(False)
        # Biases and mask are kept by autograd, which notices if they are changed in place before backward.
        ctx.save_for_backward(q, k, v, out, lse, tile_bias, attn_bias, request.key_padding_mask)
        ctx.request = replace(request, tile_bias=None, attn_bias=None, key_padding_mask=None)
        ctx.backend = backend
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, tile_bias, attn_bias, mask = ctx.saved_tensors
        request = replace(ctx.request, tile_bias=tile_bias, attn_bias=attn_bias, key_padding_mask=mask)
        needs = ctx.needs_input_grad
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if torch.is_grad_enabled():  # create_graph=True: the operator knows how to refuse a second derivative
            settings = (request.seed, request.scale, request.dropout_p, request.lean)
            call = _call(request.layout, (tile_bias, attn_bias, mask, *settings), ctx.backend)
            dq, dk, dv, d_tile, d_attn = torch.ops.sparsetile.attention_backward(
                grad_out, grad_lse, q, k, v, out, lse, *call, needs[3], needs[4]
            )
        else:
            dq, dk, dv, d_tile, d_attn = run_backward(
                grad_out, grad_lse, q, k, v, out, lse, request, ctx.backend, needs[3], needs[4]
            )
        d_tile_bias = _sum_to_shape(d_tile, tile_bias) if needs[3] else None
        d_attn_bias = _sum_to_shape(d_attn, attn_bias) if needs[4] else None
        return dq, dk, dv, d_tile_bias, d_attn_bias, None, None


def _layout(q: Tensor, tensors: Sequence[Tensor], pattern: str, geometry: Sequence[int]) -> BlockLayout:
    q_len, k_len, block_q, block_k, batch, heads, *bound = geometry
    if pattern:
        spelled = parsed(pattern)
        by_head = heads if spelled.needs_heads else None
        return cached_layout(spelled, q_len, k_len, (block_q, block_k), q.device, by_head)
    # A layout of learned indices has no transpose before a backward pass asks for it.
    indptr, indices, mask_ids, masks, *turned = tensors
    return BlockLayout(
        indptr,
        indices,
        mask_ids,
        masks,
        q_len=q_len,
        k_len=k_len,
        block_q=block_q,
        block_k=block_k,
        batch=batch,
        heads=heads,
        given=Transpose(*turned) if turned else None,
        row_bound=bound[0] or None if bound else None,
        _memo=memo_of(tensors[0]),
    )


def _make_request(
    layout: BlockLayout,
    tile_bias: Tensor | None,
    attn_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    lean: bool,
) -> Request:
    return Request(
        layout=layout,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        key_padding_mask=key_padding_mask,
        attn_bias=attn_bias,
        tile_bias=tile_bias,
        lean=lean,
    )


def _request(
    q: Tensor, tensors: Sequence[Tensor], pattern: str, geometry: Sequence[int], *features: Any
) -> Request:
    return _make_request(_layout(q, tensors, pattern, geometry), *features)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def run(q: Tensor, k: Tensor, v: Tensor, request: Request, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of one validated call, both contiguous; nothing is recorded for a gradient."""
    if not (q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    out, lse = choose(backend, q, k, v, request).forward(q, k, v, request)
    return out.contiguous(), lse.contiguous()


def run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    request: Request,
    backend: str,
    tile_bias_grad: bool,
    attn_bias_grad: bool,
) -> Gradients:
    """Gradients of one call. ``out`` and ``lse`` may be those of an attention of which the keys are a part:
    then the gradients are this part's share of that attention's."""
    q, k, v, grad_out = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(grad_out)
    return choose(backend, q, k, v, request).backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        request,
        tile_bias_grad=tile_bias_grad,
        attn_bias_grad=attn_bias_grad,
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    *parts, backend = call
    return run(q, k, v, _request(q, *parts), backend)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    *parts, backend, tile_bias_grad, attn_bias_grad = call
    request = _request(q, *parts)
    grads = run_backward(
        grad_out, grad_lse, q, k, v, out, lse, request, backend, tile_bias_grad, attn_bias_grad
    )
    return tuple(lse.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("sparsetile::attention", lib=_LIBRARY)
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.register_fake("sparsetile::attention_backward", lib=_LIBRARY)
def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, geometry, tile_bias, *_, tile_bias_grad, attn_bias_grad = call
    batch, heads = q.shape[:2]
    tile_shape: tuple[int, ...] = (0,)
    if tile_bias_grad:
        layout_batch, layout_heads = geometry[4], geometry[5]
        tile_shape = (
            batch if layout_batch == 1 else 1,
            heads if layout_heads == 1 else 1,
            tile_bias.shape[-1],
        )
    bias_shape = (batch, heads, q.shape[2], k.shape[2]) if attn_bias_grad else (0,)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        lse.new_empty(tile_shape),
        lse.new_empty(bias_shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, layout, pattern, geometry, tile_bias, attn_bias, key_padding_mask, seed, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, tile_bias, attn_bias, key_padding_mask, seed, *layout)
    ctx.pattern, ctx.geometry, ctx.settings = pattern, geometry, settings


def _sum_to_shape(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, tile_bias, attn_bias, key_padding_mask, seed, *layout = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    tile_bias_grad = tile_bias is not None and ctx.needs_input_grad[6]
    attn_bias_grad = attn_bias is not None and ctx.needs_input_grad[7]
    dq, dk, dv, d_tile, d_attn = torch.ops.sparsetile.attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        layout,
        ctx.pattern,
        ctx.geometry,
        tile_bias,
        attn_bias,
        key_padding_mask,
        seed,
        *ctx.settings,
        tile_bias_grad,
        attn_bias_grad,
    )
    d_tile_bias = _sum_to_shape(d_tile, tile_bias) if tile_bias_grad else None
    d_attn_bias = _sum_to_shape(d_attn, attn_bias) if attn_bias_grad else None
    no_grads = [None] * 6  # key_padding_mask, seed, scale, dropout_p, lean, backend
    return dq, dk, dv, [None] * len(layout), None, None, d_tile_bias, d_attn_bias, *no_grads


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    raise BackendError(
        "sparse_attention has no second derivative: expected one backward pass, got create_graph=True or a "
        "gradient of a gradient. Use F.scaled_dot_product_attention's math backend where you need it."
    )


torch.library.register_autograd(
    "sparsetile::attention", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY
)
torch.library.register_autograd("sparsetile::attention_backward", _no_second_derivative, lib=_LIBRARY)
