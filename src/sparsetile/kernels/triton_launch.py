"""From a request to kernel launches: what is passed to each Triton kernel, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetile.kernels import triton_backward, triton_forward
from sparsetile.kernels.dropout import keep_scale, threshold
from sparsetile.kernels.request import Request
from sparsetile.kernels.triton_config import (
    ITEM_TOKENS,
    ITEMS_PER_PROCESSOR,
    Target,
    backward_tiles,
    chunk_override,
    forward_tiles,
    padded_dim,
)
from sparsetile.kernels.triton_table import Pair, Tiles, Work
from sparsetile.kernels.triton_tiles import GRAD_ROWS
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.schedule import Direction, Schedule, chunk_for, schedule

LOG2E = 1.4426950408889634
_SMALLEST = 2.0**-126  # a scale of 0, such that −inf times it stays −inf
_SHORT_BLOCK = 32  # tokens a program of the kernels that only combine parts
_SUM_ENTRIES = 2048  # of dk and dv that a program sums over a group's heads
_SHORT_ROW = 2  # tiles a row, on average, up to which a row counts as short
_SHORT: dict[Work, Work] = {"whole": "short whole", "partial": "short partial"}


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
class Owners:
    """How tensor heads share the rows of a layout: ``reps`` of them run each."""

    reps: int
    batch_shared: bool
    heads_shared: bool

    @staticmethod
    def of(layout: BlockLayout, batch: int, heads: int) -> Owners:
        batch_shared, heads_shared = layout.batch == 1, layout.heads == 1
        reps = (batch if batch_shared else 1) * (heads if heads_shared else 1)
        return Owners(reps, batch_shared, heads_shared)


def scheduled(layout: BlockLayout, direction: Direction, owners: Owners, target: Target) -> Schedule:
    """The schedule of the rows, or columns, whose longest item suits the GPU."""
    other = layout.block_k if direction == "rows" else layout.block_q
    chunk = chunk_override() or chunk_for(
        layout,
        owners.reps,
        target.processors,
        items_per_processor=ITEMS_PER_PROCESSOR,
        at_least=max(1, ITEM_TOKENS // other),
    )
    return schedule(layout, direction, chunk)


def strides_of(name: str, x: Tensor | None, letters: str) -> dict[str, int]:
    """Strides of the leading dimensions as ``s{name}_{letter}``; 0 for dimensions of size 1 and for None."""
    return {
        f"s{name}_{letter}": 0 if x is None or x.shape[i] == 1 else x.stride(i)
        for i, letter in enumerate(letters)
    }


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def threshold_bits(dropout_p: float) -> int:
    """The threshold of 16 bits above another 16, as an int32."""
    value = threshold(dropout_p) << 16
    return value - 2**32 if value >= 2**31 else value


def features_of(request: Request) -> tuple[Tensor | None, ...]:
    """(padding as uint8, attn_bias, tile_bias, seed, q_tiles, k_tiles) as the kernels take them."""
    padding = _unit_stride(request.key_padding_mask)
    return (
        None if padding is None else padding.view(torch.uint8),
        request.attn_bias,
        _unit_stride(request.tile_bias),
        request.seed,
        request.q_tiles,
        request.k_tiles,
    )


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    owners: Owners,
    target: Target,
) -> dict[str, Any]:
    """Arguments that forward and backward take; backward takes the ``owners`` of its columns."""
    layout = request.layout
    padding, bias, tile_bias, seed, q_tiles, k_tiles = features_of(request)
    by_head = padding[:, None] if padding is not None and padding.dim() == 2 else padding
    dim = q.shape[-1]
    return {
        "q": q,
        "k": k,
        "v": v,
        "masks": layout.masks,
        "padding": padding,
        "bias": bias,
        "tile_bias": tile_bias,
        "seed": seed,
        "q_tiles": q_tiles,
        "k_tiles": k_tiles,
        **strides_of("q", q, "bhn"),
        **strides_of("k", k, "bhn"),
        **strides_of("v", v, "bhn"),
        **strides_of("p", by_head, "bh"),
        **strides_of("b", bias, "bhqk"),
        **strides_of("t", tile_bias, "bh"),
        **strides_of("kt", k_tiles, "h"),
        "reps": owners.reps,
        "heads": q.shape[1],
        "layout_heads": layout.heads,
        "group": q.shape[1] // k.shape[1],
        "q_len": layout.q_len,
        "k_len": layout.k_len,
        "keep_scale": keep_scale(request.dropout_p),
        "threshold": threshold_bits(request.dropout_p),
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "BATCH_SHARED": owners.batch_shared,
        "HEADS_SHARED": owners.heads_shared,
        "PARTIAL": layout.masks.shape[0] > 0,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 and target.family != "amd" else "ieee",
    }


def _walked(plan: Schedule, request: Request, side: str = "") -> dict[str, Any]:
    """A schedule as a kernel takes it; ``side`` begins the names."""
    return {
        f"{side}items": plan.items,
        f"{side}others": plan.others,
        f"{side}mask_ids": plan.mask_ids,
        f"{side}edges": plan.edges if plan.edges.numel() and request.tile_bias is not None else None,
        f"{side}item_count": plan.items.shape[1],
        f"{side}first_count": plan.long_items,
    }


def _work(request: Request) -> Work:
    """What the layout and the features make of a call; that its rows are short matters to backward alone."""
    layout = request.layout
    if not (request.key_padding_mask is request.attn_bias is None):
        return "featured"
    return "partial" if layout.masks.shape[0] else "whole"


def _options(tiles: Tiles | Pair) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, request: Request, target: Target
) -> list[Launch]:
    """Launches that fill ``out`` ``[B, H, Nq, D]`` and ``lse`` ``[B, H, Nq]`` (fp32), both contiguous."""
    layout = request.layout
    owners = Owners.of(layout, q.shape[0], q.shape[1])
    plan = scheduled(layout, "rows", owners, target)
    blocks = layout.block_q, layout.block_k
    tiles = forward_tiles(target, q.element_size(), q.shape[-1], *blocks, _work(request))
    part_out = parts_of(plan, owners, layout, q)
    part_lse = None if part_out is None else part_out.new_empty(len(part_out))
    arguments = {
        **_common(q, k, v, request, owners, target),
        **_walked(plan, request),
        "M": tiles.queries,
        "N": tiles.keys,
        "out": out,
        "lse": lse,
        "part_out": part_out,
        "part_lse": part_lse,
        "q_blocks": layout.q_blocks,
        "scale": abs(request.scale) * LOG2E or _SMALLEST,
        "NEGATE": request.scale < 0,
    }
    programs = plan.items.shape[1] * owners.reps * (layout.block_q // tiles.queries)
    launches = [Launch(triton_forward.forward_kernel, programs, arguments, _options(tiles))]
    if part_out is not None and part_lse is not None:
        launches.append(combine_launch(part_out, part_lse, out, lse, plan, owners, layout))
    return launches


def parts_of(plan: Schedule, owners: Owners, layout: BlockLayout, q: Tensor) -> Tensor | None:
    """fp32 lines for the parts of split rows (or columns); None if none is split."""
    block = layout.block_q if plan.direction == "rows" else layout.block_k
    count = plan.slots * owners.reps * block
    return q.new_empty((count, q.shape[-1]), dtype=torch.float32) if count else None


def combine_launch(
    part_out: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Schedule,
    owners: Owners,
    layout: BlockLayout,
) -> Launch:
    """The launch that combines the parts of split rows into ``out`` and ``lse``."""
    tensors = {"part_out": part_out, "part_lse": part_lse, "out": out, "lse": lse}
    sizes = {
        "heads": out.shape[1],
        "q_len": layout.q_len,
        "q_blocks": layout.q_blocks,
        "BLOCK_Q": layout.block_q,
    }
    return _combining(triton_forward.combine_kernel, tensors, sizes, plan, owners, layout, out.shape[-1])


def sum_launch(
    name: str, part: Tensor, into: Tensor, plan: Schedule, owners: Owners, layout: BlockLayout, filled: str
) -> Launch:
    """The launch that sums the parts of gradient ``name`` over split rows (or columns) into ``into``, the
    tensor that recordings know as ``filled``."""
    by_rows = plan.direction == "rows"
    sizes = {
        "heads": into.shape[1],
        "length": layout.q_len if by_rows else layout.k_len,
        "blocks": layout.q_blocks if by_rows else layout.k_blocks,
        "BLOCK": layout.block_q if by_rows else layout.block_k,
    }
    called = {"parts": f"part_{name}", "out": filled}
    tensors = {"parts": part, "out": into}
    kernel = triton_backward.sum_kernel
    return _combining(kernel, tensors, sizes, plan, owners, layout, into.shape[-1], called)


def _combining(
    kernel: Any,
    tensors: Mapping[str, Tensor | None],
    sizes: Mapping[str, int],
    plan: Schedule,
    owners: Owners,
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
    """Query heads that one column program of backward sums over.

    The whole group of a key head, if the heads share their columns and that leaves every multiprocessor
    work; else one, and a launch of its own sums over the group.
    """
    group = q.shape[1] // k.shape[1]
    if layout.heads != 1 or layout.k_blocks * k.shape[0] * k.shape[1] < 2 * target.processors:
        return 1
    return group


def _backward_tiles(q: Tensor, request: Request, target: Target) -> Pair:
    layout, work = request.layout, _work(request)
    if layout.capacity <= _SHORT_ROW * (layout.indptr.numel() - 1):
        work = _SHORT.get(work, work)
    return backward_tiles(target, q.element_size(), q.shape[-1], layout.block_q, layout.block_k, work)


def tile_grad_parts(layout: BlockLayout) -> int:
    """Parts in which backward computes the gradient of a tile's bias: one for each few of its queries."""
    return layout.block_q // int(GRAD_ROWS)


def delta_launch(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    lse2: Tensor,
    delta: Tensor,
    row_counter: Tensor | None = None,
    column_counter: Tensor | None = None,
    dq_sum: Tensor | None = None,
) -> Launch:
    """The launch that fills ``lse2`` and ``delta``, fp32 ``[B, H, ≥ Nq]``, and sets the counters and
    ``dq_sum`` to 0; the LSEs are contiguous fp32."""
    batch, heads, q_len, dim = out.shape
    height = 64 if dim <= 128 else 32
    arguments = {
        "grad_out": grad_out,
        "out": out,
        "lse": lse,
        "grad_lse": grad_lse,
        "lse2": lse2,
        "delta": delta,
        "dq_sum": dq_sum,
        "row_counter": row_counter,
        "column_counter": column_counter,
        **strides_of("g", grad_out, "bhn"),
        **strides_of("o", out, "bhn"),
        "heads": heads,
        "q_len": q_len,
        "pitch": lse2.shape[2],
        "D": dim,
        "BLOCK_D": padded_dim(dim),
        "M": height,
    }
    programs = batch * heads * -(-q_len // height)
    return Launch(triton_backward.delta_kernel, programs, arguments, {"num_warps": 4, "num_stages": 2})


def backward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    tile_grad: Tensor | None,
    bias_grad: Tensor | None,
    request: Request,
    target: Target,
) -> list[Launch]:
    """Launches that fill ``dq``, ``dk``, ``dv``, ``tile_grad`` and ``bias_grad``: δ, then all tiles, then the
    sums of what was split and of the heads of a group.

    All are contiguous, as are ``lse`` and ``grad_lse``, fp32. The biases' gradients come as fp32 zeros,
    ``[tile_grad_parts, B or 1, H or 1, capacity]`` and ``[B, H, Nq, Nk]``.
    """
    layout, heads = request.layout, q.shape[1]
    out_heads = heads // heads_a_program(k, q, layout, target)
    # What the columns fill: the results, or each query head's share of them.
    names, column_dk, column_dv = {}, dk, dv
    if out_heads != k.shape[1]:
        names = {"dk_out": "members_dk", "dv_out": "members_dv"}
        column_dk, column_dv = (
            q.new_empty((q.shape[0], out_heads, *k.shape[2:]), dtype=torch.float32) for _ in range(2)
        )
    row_owners = Owners.of(layout, q.shape[0], heads)
    column_owners = Owners.of(layout, q.shape[0], out_heads)
    rows = scheduled(layout, "rows", row_owners, target)
    columns = scheduled(layout, "columns", column_owners, target)
    tiles = _backward_tiles(q, request, target)
    lse2, delta = (torch.empty_like(lse) for _ in range(2))
    part_dq = parts_of(rows, row_owners, layout, q)
    part_dk, part_dv = (parts_of(columns, column_owners, layout, q) for _ in range(2))
    arguments = {
        **_common(q, k, v, request, column_owners, target),
        **_walked(rows, request, "row_"),
        **_walked(columns, request, "column_"),
        "grad_out": grad_out,
        "lse2": lse2,
        "delta": delta,
        "dq_out": dq,
        "dk_out": column_dk,
        "dv_out": column_dv,
        "part_dq": part_dq,
        "part_dk": part_dk,
        "part_dv": part_dv,
        "bias_grad": bias_grad,
        "tile_grad": tile_grad,
        **strides_of("g", grad_out, "bhn"),
        **strides_of("tg", None if tile_grad is None else tile_grad[0], "bh"),
        "tile_grad_step": 0 if tile_grad is None else tile_grad[0].numel(),
        "q_blocks": layout.q_blocks,
        "k_blocks": layout.k_blocks,
        "scale": float(request.scale),
        "scale2": request.scale * LOG2E,
        "ROWS_M": tiles.rows[0],
        "ROWS_N": tiles.rows[1],
        "COLUMNS_M": tiles.columns[0],
        "COLUMNS_N": tiles.columns[1],
        "HEADS_A_PROGRAM": heads // out_heads,
    }
    programs = rows.items.shape[1] * row_owners.reps * (layout.block_q // tiles.rows[0])
    programs += columns.items.shape[1] * column_owners.reps * (layout.block_k // tiles.columns[1])
    launches = [
        delta_launch(grad_out, out, lse, grad_lse, lse2, delta),
        Launch(triton_backward.backward_kernel, programs, arguments, _options(tiles), names),
    ]
    for name, part, into, plan, owners in (
        ("dq", part_dq, dq, rows, row_owners),
        ("dk", part_dk, column_dk, columns, column_owners),
        ("dv", part_dv, column_dv, columns, column_owners),
    ):
        if part is not None:
            filled = names.get(f"{name}_out", f"{name}_out")
            launches.append(sum_launch(name, part, into, plan, owners, layout, filled))
    if names:
        launches.append(group_sum(column_dk, column_dv, dk, dv))
    return launches


def group_sum(members_dk: Tensor, members_dv: Tensor, dk: Tensor, dv: Tensor) -> Launch:
    """The launch that sums ``[B, H, Nk, D]`` over the heads of each group into ``[B, Hkv, Nk, D]``."""
    batch, kv_heads, k_len, dim = dk.shape
    arguments = {
        "members_dk": members_dk,
        "members_dv": members_dv,
        "dk_out": dk,
        "dv_out": dv,
        "members": members_dk.shape[1] // kv_heads,
        "entries": k_len * dim,
        "ENTRIES": _SUM_ENTRIES,
    }
    programs = batch * kv_heads * -(-k_len * dim // _SUM_ENTRIES)
    return Launch(triton_backward.group_sum_kernel, programs, arguments, {"num_warps": 4, "num_stages": 2})
