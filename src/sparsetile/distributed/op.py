"""The operators ``sparsetile::distributed_attention`` and its backward: a whole call over ranks in a compiled
graph.

A graph holds what a rank was asked for: tensors, texts and the name of the group. Everything else, the checks
and the agreement of the ranks among it, is done when the operator runs. So ranks that differ are told of it
there, whatever each of them compiled.

Both operators are marked as effects: PyTorch keeps them in the order of the program and keeps those whose
results nobody uses, so that the collectives of all ranks meet.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

from sparsetile import op
from sparsetile.distributed.attention import agreed, refuse_second_derivative
from sparsetile.distributed.call import Settings, sharding_by
from sparsetile.distributed.parts import biases_of, call_of, of_whole_layout
from sparsetile.distributed.ranks import Ranks
from sparsetile.errors import BackendError, explain
from sparsetile.functional import as_autocast, pattern_text
from sparsetile.kernels.dropout import draw_seed
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Pattern

_LIBRARY = torch.library.Library("sparsetile", "FRAGMENT")
_CALL = (
    "Tensor? key_padding_mask, Tensor? tile_bias, Tensor[] layout, SymInt[] geometry, str pattern, "
    "str group, str settings, SymInt[] integers, float[] floats"
)
# The agreement is a collective of the CPU, which a CUDA graph would leave out.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define(
    f"distributed_attention(Tensor q, Tensor k, Tensor v, {_CALL}, Tensor? draw, bool gradients) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "distributed_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, Tensor agreed, {_CALL}, bool tile_bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str | BlockLayout,
    ranks: Ranks,
    settings: Settings,
    key_padding_mask: Tensor | None,
    tile_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call over more than one rank, while it is traced.

    Nothing is checked here that one rank alone could have wrong: the others would wait for it.

    Raises:
        BackendError: forward mode, ``torch.export``, or tensors of a subclass.
    """
    op.refuse_transforms(query, key, value, tile_bias)
    if torch.compiler.is_exporting() or not all(type(x) in op._PLAIN_TYPES for x in (query, key, value)):
        raise BackendError(
            explain(
                "distributed attention in a graph",
                expected="plain tensors under torch.compile",
                got="tensors of a subclass, or torch.export",
                fix="Pass x.to_local() of a DTensor; export a model of one process.",
            )
        )
    query, key, value = as_autocast(query, key, value)
    tensors: list[Tensor] = []
    geometry = [0]  # of a pattern none, but autograd takes an empty list for one of tensors
    text = ""
    if isinstance(pattern, BlockLayout):
        tensors, geometry = pattern.operands(), pattern.geometry
    elif isinstance(pattern, Pattern):
        text = pattern_text(pattern, False)[0]
    else:  # what is no text either is no pattern's name, and is refused as such
        text = pattern if isinstance(pattern, str) else type(pattern).__name__
    gradients = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, tile_bias)
    )
    # Numbers may be symbols here, of which a text would keep the name.
    asked: list[object] = []
    integers, floats = [], []
    for setting in settings:
        if setting is None or isinstance(setting, (bool, str)):
            asked.append(setting)
        elif isinstance(setting, int):
            integers.append(setting)
            asked.append(_INTEGER)
        elif isinstance(setting, float):
            floats.append(setting)
            asked.append(_FLOAT)
        else:  # refused when the graph runs
            asked.append(type(setting).__name__)
    draw = None
    if isinstance(settings.dropout_p, (int, float)) and settings.dropout_p > 0.0:
        # By the graph, so that whoever has it computed again knows to draw the same.
        draw = draw_seed(torch.device("cpu"))
    out, lse, _ = torch.ops.sparsetile.distributed_attention(
        query,
        key,
        value,
        key_padding_mask,
        tile_bias,
        tensors,
        geometry,
        text,
        _name(ranks.group),
        _text(*asked),
        [*integers, 0],  # see geometry
        [*floats, 0.0],
        draw,
        gradients,
    )
    return out, lse


_INTEGER, _FLOAT = ("integer",), ("float",)
"""What stands in a text of settings for the next number of the list beside it."""


def _text(*settings: object) -> str:
    return repr(settings)


def _settings(text: str, integers: Sequence[int], floats: Sequence[float]) -> Settings:
    """Without kept tiles: they would be results of a size that the graph cannot know."""
    numbers = {_INTEGER: iter(integers), _FLOAT: iter(floats)}
    values: Any = (next(numbers[x]) if isinstance(x, tuple) else x for x in ast.literal_eval(text))
    return Settings(*values)._replace(keep=False)


def _name(group: dist.ProcessGroup | None) -> str:
    """Empty for the default group, whichever that is when the graph runs."""
    return "" if group is None or group is dist.group.WORLD else group.group_name


# As torch.compiler.assume_constant_result would mark them.
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _ranks(name: str) -> Ranks:
    return Ranks.of(_resolve_process_group(name) if name else None)  # type: ignore[arg-type]


def _pattern(q: Tensor, layout: Sequence[Tensor], geometry: Sequence[int], pattern: str) -> str | BlockLayout:
    return op._layout(q, layout, "", geometry) if layout else pattern


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tile_bias: Tensor | None,
    layout: Sequence[Tensor],
    geometry: Sequence[int],
    pattern: str,
    group: str,
    settings: str,
    integers: Sequence[int],
    floats: Sequence[float],
    draw: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ranks, asked = _ranks(group), _settings(settings, integers, floats)
    wanted = _pattern(q, layout, geometry, pattern)
    problem = None
    if asked.need_weights:
        problem = BackendError(
            explain(
                "need_weights over ranks",
                expected="False in a compiled graph, which cannot know the length of the whole sequence",
                got="True",
                fix="Leave the call out of torch.compile.",
            )
        )
    q, k, v, where, seed = agreed(q, k, v, wanted, ranks, asked, mask, tile_bias, gradients, draw, problem)
    call, whole = call_of(q, k, wanted, ranks, asked, mask, where, seed)
    out, lse, _ = call.forward(q, k, v, biases_of(tile_bias, q, whole, call.plan))
    return out.contiguous(), lse.contiguous(), torch.tensor([where.length, seed], device="cpu")


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    agreed: Tensor,
    mask: Tensor | None,
    tile_bias: Tensor | None,
    layout: Sequence[Tensor],
    geometry: Sequence[int],
    pattern: str,
    group: str,
    settings: str,
    integers: Sequence[int],
    floats: Sequence[float],
    tile_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranks, asked = _ranks(group), _settings(settings, integers, floats)
    wanted = _pattern(q, layout, geometry, pattern)
    length, seed = agreed.tolist()
    where = sharding_by(asked.order, length, ranks.size, asked.block_size)
    call, whole = call_of(q, k, wanted, ranks, asked, mask, where, seed)
    biases = biases_of(tile_bias, q, whole, call.plan)
    needed = [tile_bias_grad] * len(biases)
    dq, dk, dv, of_biases = call.backward(q, k, v, out, lse, grad_out, grad_lse, biases, needed, ())
    d_bias = lse.new_empty(0)
    if tile_bias_grad:
        assert tile_bias is not None
        d_bias = of_whole_layout(of_biases, tile_bias, call.plan)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), d_bias


def _fake_forward(q: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    agreed = torch.empty(2, dtype=torch.int64, device="cpu")
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide), agreed


def _fake_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, lse, _, _, tile_bias, *_, tile_bias_grad = call
    bias = tile_bias.new_empty(tile_bias.shape) if tile_bias_grad else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack()):
        # PyTorch computes again what a graph's checkpoint holds, but cannot where it is an effect.
        raise BackendError(
            explain(
                "distributed attention in a checkpoint in a compiled graph",
                expected="the checkpoint around the compiled function",
                got="the checkpoint inside of it",
                fix="Compile the layer, and call torch.utils.checkpoint.checkpoint(compiled, x).",
            )
        )
    q, k, v, mask, tile_bias, layout, *rest, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, mask, tile_bias, *layout)
    ctx.rest = rest


def _differentiate(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    q, k, v, out, lse, agreed, mask, tile_bias, *layout = ctx.saved_tensors
    bias_grad = tile_bias is not None and ctx.needs_input_grad[4]
    dq, dk, dv, d_bias = torch.ops.sparsetile.distributed_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, agreed, mask, tile_bias, layout, *ctx.rest, bias_grad
    )
    nothing = [None] * (2 + len(ctx.rest))
    return dq, dk, dv, None, d_bias if bias_grad else None, [None] * len(layout), *nothing


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative()
    raise AssertionError


for _operator, _kernel, _fake, _derivative, _setup in (
    ("distributed_attention", _forward, _fake_forward, _differentiate, _save_for_backward),
    ("distributed_attention_backward", _backward, _fake_backward, _no_second_derivative, None),
):
    _LIBRARY.impl(_operator, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsetile::{_operator}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"sparsetile::{_operator}", _derivative, setup_context=_setup, lib=_LIBRARY
    )
    _register_effectful_op(getattr(torch.ops.sparsetile, _operator).default, _EffectType.ORDERED)
