"""From a request to kernel launches: what is passed to each Triton kernel, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetile.kernels import triton_backward, triton_forward
from sparsetile.kernels.dropout import threshold
from sparsetile.kernels.request import Request
from sparsetile.kernels.triton_config import (
    ITEM_TOKENS,
    ITEMS_PER_PROCESSOR,
    Kernel,
    Target,
    Tiles,
    Work,
    chunk_override,
    padded_dim,
    tiles_for,
)
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.schedule import Direction, Schedule, chunk_for, schedule

_LOG2E = 1.4426950408889634
_SMALLEST = 2.0**-126  # a scale of 0, such that −inf times it stays −inf
_SHORT_BLOCK = 32  # tokens a program of the kernels that only combine parts


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[(programs,)](**arguments, **options)``.

    ``names`` says which tensor a parameter stands for, where other kernels call it differently.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]
    names: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> Any:
        """The compiled kernel; None in the interpreter, or if there was nothing to run."""
        if not self.programs:
            return None
        return self.kernel[(self.programs,)](**self.arguments, **self.options)


@dataclass(frozen=True)
class _Owners:
    """How tensor heads share the rows of a layout."""

    reps: int
    batch_shared: bool
    heads_shared: bool

    @staticmethod
    def of(layout: BlockLayout, batch: int, heads: int) -> _Owners:
        batch_shared, heads_shared = layout.batch == 1, layout.heads == 1
        reps = (batch if batch_shared else 1) * (heads if heads_shared else 1)
        return _Owners(reps, batch_shared, heads_shared)


def _scheduled(layout: BlockLayout, direction: Direction, owners: _Owners, target: Target) -> Schedule:
    other = layout.block_k if direction == "rows" else layout.block_q
    chunk = chunk_override() or chunk_for(
        layout,
        owners.reps,
        target.processors,
        items_per_processor=ITEMS_PER_PROCESSOR,
        at_least=max(1, ITEM_TOKENS // other),
    )
    return schedule(layout, direction, chunk)


def _strides(name: str, x: Tensor | None, letters: str) -> dict[str, int]:
    """Strides of the leading dimensions as ``s{name}_{letter}``; 0 for dimensions of size 1 and for None."""
    return {
        f"s{name}_{letter}": 0 if x is None or x.shape[i] == 1 else x.stride(i)
        for i, letter in enumerate(letters)
    }


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _bits(dropout_p: float) -> int:
    value = threshold(dropout_p)
    return value - 2**32 if value >= 2**31 else value


def features_of(request: Request) -> tuple[Tensor | None, ...]:
    """(padding as uint8, attn_bias, tile_bias, seed) as the kernels take them."""
    padding = _unit_stride(request.key_padding_mask)
    return (
        None if padding is None else padding.view(torch.uint8),
        request.attn_bias,
        _unit_stride(request.tile_bias),
        request.seed,
    )


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    plan: Schedule,
    owners: _Owners,
    tiles: Tiles,
    target: Target,
) -> dict[str, Any]:
    """Arguments that all three passes over the tiles take."""
    layout = request.layout
    padding, bias, tile_bias, seed = features_of(request)
    dim = q.shape[-1]
    return {
        "q": q,
        "k": k,
        "v": v,
        "items": plan.items,
        "others": plan.others,
        "mask_ids": plan.mask_ids,
        "masks": layout.masks,
        "edges": plan.edges if plan.edges.numel() and tile_bias is not None else None,
        "padding": padding,
        "bias": bias,
        "tile_bias": tile_bias,
        "seed": seed,
        **_strides("q", q, "bhn"),
        **_strides("k", k, "bhn"),
        **_strides("v", v, "bhn"),
        **_strides("p", padding, "b"),
        **_strides("b", bias, "bhqk"),
        **_strides("t", tile_bias, "bh"),
        "item_count": plan.items.shape[1],
        "first_count": plan.long_items,
        "reps": owners.reps,
        "heads": q.shape[1],
        "layout_heads": layout.heads,
        "group": q.shape[1] // k.shape[1],
        "q_len": layout.q_len,
        "k_len": layout.k_len,
        "keep_scale": 1.0 / (1.0 - request.dropout_p),
        "threshold": _bits(request.dropout_p),
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "M": tiles.queries,
        "N": tiles.keys,
        "BATCH_SHARED": owners.batch_shared,
        "HEADS_SHARED": owners.heads_shared,
        "PARTIAL": plan.partial,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 and target.family != "amd" else "ieee",
    }


def _tiles(kernel: Kernel, q: Tensor, request: Request, target: Target) -> Tiles:
    layout = request.layout
    featured = request.dropout_p > 0 or any(
        x is not None for x in (request.key_padding_mask, request.attn_bias, request.tile_bias)
    )
    work: Work = "featured" if featured else "partial" if layout.masks.shape[0] else "whole"
    return tiles_for(kernel, target, q.element_size(), q.shape[-1], layout.block_q, layout.block_k, work)


def _options(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, request: Request, target: Target
) -> list[Launch]:
    """Launches that fill ``out`` ``[B, H, Nq, D]`` and ``lse`` ``[B, H, Nq]`` (fp32), both contiguous."""
    layout = request.layout
    owners = _Owners.of(layout, q.shape[0], q.shape[1])
    plan = _scheduled(layout, "rows", owners, target)
    tiles = _tiles("forward", q, request, target)
    rows = plan.slots * owners.reps * layout.block_q
    part_out = q.new_empty((rows, q.shape[-1]), dtype=torch.float32) if rows else None
    part_lse = q.new_empty(rows, dtype=torch.float32) if rows else None
    arguments = {
        **_common(q, k, v, request, plan, owners, tiles, target),
        "out": out,
        "lse": lse,
        "part_out": part_out,
        "part_lse": part_lse,
        "q_blocks": layout.q_blocks,
        "scale": abs(request.scale) * _LOG2E or _SMALLEST,
        "NEGATE": request.scale < 0,
    }
    programs = plan.items.shape[1] * owners.reps * (layout.block_q // tiles.queries)
    launches = [Launch(triton_forward.forward_kernel, programs, arguments, _options(tiles))]
    if part_out is not None:
        launches.append(
            _combining(
                triton_forward.combine_kernel,
                {"part_out": part_out, "part_lse": part_lse, "out": out, "lse": lse},
                {
                    "heads": q.shape[1],
                    "q_len": layout.q_len,
                    "q_blocks": layout.q_blocks,
                    "BLOCK_Q": layout.block_q,
                },
                plan,
                owners,
                layout,
                q.shape[-1],
            )
        )
    return launches


def _combining(
    kernel: Any,
    tensors: Mapping[str, Tensor | None],
    sizes: Mapping[str, int],
    plan: Schedule,
    owners: _Owners,
    layout: BlockLayout,
    dim: int,
    names: Mapping[str, str] | None = None,
) -> Launch:
    """The launch that combines the parts of split rows (or columns)."""
    block = layout.block_q if plan.direction == "rows" else layout.block_k
    height = min(block, _SHORT_BLOCK)
    count = plan.splits.shape[1]
    arguments = {
        **tensors,
        **sizes,
        "splits": plan.splits,
        "split_count": count,
        "reps": owners.reps,
        "layout_heads": layout.heads,
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "M": height,
        "BATCH_SHARED": owners.batch_shared,
        "HEADS_SHARED": owners.heads_shared,
    }
    programs = count * owners.reps * (block // height)
    return Launch(kernel, programs, arguments, {"num_warps": 4, "num_stages": 2}, names or {})


def heads_a_program(k: Tensor, q: Tensor, layout: BlockLayout, target: Target) -> int:
    """Query heads that one program of the column pass sums over.

    The whole group of a key head, if the heads share their columns and that leaves every multiprocessor
    work; else one, and the sum over the group is taken afterwards.
    """
    group = q.shape[1] // k.shape[1]
    if layout.heads != 1 or layout.k_blocks * k.shape[0] * k.shape[1] < 2 * target.processors:
        return 1
    return group


def columns_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    request: Request,
    target: Target,
) -> list[Launch]:
    """Launches that fill contiguous ``dk`` and ``dv`` ``[B, H // p, Nk, D]``, p from ``heads_a_program``."""
    layout = request.layout
    out_heads, dim = dk.shape[1], q.shape[-1]
    owners = _Owners.of(layout, q.shape[0], out_heads)
    plan = _scheduled(layout, "columns", owners, target)
    tiles = _tiles("columns", q, request, target)
    rows = plan.slots * owners.reps * layout.block_k
    parts = [q.new_empty((rows, dim), dtype=torch.float32) if rows else None for _ in range(2)]
    arguments = {
        **_common(q, k, v, request, plan, owners, tiles, target),
        "grad_out": grad_out,
        "lse2": lse2,
        "delta": delta,
        "dk_out": dk,
        "dv_out": dv,
        "part_dk": parts[0],
        "part_dv": parts[1],
        **_strides("g", grad_out, "bhn"),
        "k_blocks": layout.k_blocks,
        "scale": float(request.scale),
        "scale2": request.scale * _LOG2E,
        "HEADS_A_PROGRAM": q.shape[1] // out_heads,
    }
    programs = plan.items.shape[1] * owners.reps * (layout.block_k // tiles.keys)
    launches = [Launch(triton_backward.columns_kernel, programs, arguments, _options(tiles))]
    if rows:
        sizes = {
            "heads": out_heads,
            "length": layout.k_len,
            "blocks": layout.k_blocks,
            "BLOCK": layout.block_k,
        }
        for name, part, out in (("dk", parts[0], dk), ("dv", parts[1], dv)):
            tensors = {"parts": part, "out": out}
            names = {"parts": f"part_{name}", "out": f"{name}_out"}
            launches.append(
                _combining(triton_backward.sum_kernel, tensors, sizes, plan, owners, layout, dim, names)
            )
    return launches


def tile_grad_parts(q: Tensor, request: Request, target: Target) -> int:
    """Parts in which the row pass computes a tile's gradient: compute tiles in a layout tile."""
    layout = request.layout
    tiles = _tiles("rows", q, request, target)
    return (layout.block_q // tiles.queries) * (layout.block_k // tiles.keys)


def rows_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse2: Tensor,
    delta: Tensor,
    dq: Tensor,
    tile_grad: Tensor | None,
    bias_grad: Tensor | None,
    request: Request,
    target: Target,
) -> list[Launch]:
    """Launches that fill ``dq`` (contiguous), ``tile_grad``, ``bias_grad`` and what the column pass reads,
    ``lse2`` and ``delta``, fp32 ``[B, H, Nq]``.

    ``lse`` and ``grad_lse`` are contiguous fp32. The biases' gradients come as fp32 zeros,
    ``[tile_grad_parts, B or 1, H or 1, capacity]`` and ``[B, H, Nq, Nk]``.
    """
    layout, dim = request.layout, q.shape[-1]
    owners = _Owners.of(layout, q.shape[0], q.shape[1])
    plan = _scheduled(layout, "rows", owners, target)
    tiles = _tiles("rows", q, request, target)
    rows = plan.slots * owners.reps * layout.block_q
    part_dq = q.new_empty((rows, dim), dtype=torch.float32) if rows else None
    arguments = {
        **_common(q, k, v, request, plan, owners, tiles, target),
        "out": out,
        "lse": lse,
        "grad_out": grad_out,
        "grad_lse": grad_lse,
        "lse2": lse2,
        "delta": delta,
        "dq_out": dq,
        "part_dq": part_dq,
        "bias_grad": bias_grad,
        "tile_grad": tile_grad,
        **_strides("o", out, "bhn"),
        **_strides("g", grad_out, "bhn"),
        **_strides("tg", None if tile_grad is None else tile_grad[0], "bh"),
        "tile_grad_step": 0 if tile_grad is None else tile_grad[0].numel(),
        "q_blocks": layout.q_blocks,
        "scale": float(request.scale),
        "scale2": request.scale * _LOG2E,
    }
    programs = plan.items.shape[1] * owners.reps * (layout.block_q // tiles.queries)
    launches = [Launch(triton_backward.rows_kernel, programs, arguments, _options(tiles))]
    if part_dq is not None:
        sizes = {
            "heads": q.shape[1],
            "length": layout.q_len,
            "blocks": layout.q_blocks,
            "BLOCK": layout.block_q,
        }
        tensors = {"parts": part_dq, "out": dq}
        names = {"parts": "part_dq", "out": "dq_out"}
        launches.append(
            _combining(triton_backward.sum_kernel, tensors, sizes, plan, owners, layout, dim, names)
        )
    return launches
