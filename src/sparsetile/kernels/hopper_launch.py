"""From a request to launches of the kernels for Hopper; what surrounds them is the Triton backend's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetile.kernels import hopper_columns, hopper_forward, hopper_rows, triton_backward, triton_forward
from sparsetile.kernels.request import Request
from sparsetile.kernels.triton_config import Target
from sparsetile.kernels.triton_launch import (
    LOG2E,
    Launch,
    Owners,
    combining,
    delta_launch,
    features_of,
    group_sum,
    heads_a_program,
    scheduled,
    strides_of,
    tile_grad_parts,
)
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.schedule import Schedule

__all__ = ["backward_launches", "features_of", "forward_launches", "tile_grad_parts"]

ROWS = 64  # queries, or keys, of a consumer


class Depth(NamedTuple):
    """How many tiles (steps, for columns) and how many items lie in shared memory at a time."""

    stages: int
    items: int = 1


# By block and head_dim; what fits. Columns hold one item.
FORWARD = {(128, 64): Depth(4, 2), (128, 128): Depth(2, 2), (64, 64): Depth(3, 2), (64, 128): Depth(2, 2)}
BACKWARD_ROWS = {(128, 64): Depth(4, 2), (128, 128): Depth(2), (64, 64): Depth(3), (64, 128): Depth(2)}
BACKWARD_COLUMNS = {(128, 64): Depth(4), (128, 128): Depth(4), (64, 64): Depth(3), (64, 128): Depth(2)}
STEP = 64  # queries of a step of the columns

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """``[B, H, N, D]`` for bulk copies of ``rows`` rows of a head."""
    swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # A dimension of size 1 may have any stride, also one that the hardware refuses.
    strides = [x.stride(i) if x.shape[i] > 1 or i == 3 else 8 * x.shape[3] for i in range(4)]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, x.shape[3]], swizzled)


def _line(x: Tensor, length: int) -> TensorDescriptor:
    """fp32 ``[B, H, pitch]``, of which ``length`` are real: what lies behind arrives as 0."""
    plain = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    strides = [x.stride(0), x.stride(1), 1]
    return TensorDescriptor(x, [*x.shape[:2], length], strides, [1, 1, STEP], plain)


def _walked(
    plan: Schedule, owners: Owners, request: Request, tile_bias: Tensor | None, q: Tensor, k: Tensor
) -> dict[str, Any]:
    """What every kernel takes of a schedule, a layout and a tile bias."""
    layout = request.layout
    biased = tile_bias is not None and plan.edges.numel() > 0
    return {
        "tile_bias": tile_bias,
        "edges": plan.edges if biased else None,
        **strides_of("t", tile_bias, "bh"),
        "items": plan.items,
        "others": plan.others,
        "mask_ids": plan.mask_ids,
        "masks": layout.masks,
        "item_count": plan.items.shape[1],
        "first_count": plan.long_items,
        "works": plan.items.shape[1] * owners.reps,
        "reps": owners.reps,
        "layout_heads": layout.heads,
        "group": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "PARTIAL": layout.masks.shape[0] > 0,
        "BATCH_SHARED": owners.batch_shared,
        "HEADS_SHARED": owners.heads_shared,
        "REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }


def _launch(
    kernel: Any, arguments: dict[str, Any], layout: BlockLayout, target: Target, names: dict[str, str]
) -> Launch:
    # Two consumers a multiprocessor either way: of one program, or of two.
    consumers = layout.block_q // ROWS
    programs = min(target.processors * 2 // consumers, arguments["works"])
    return Launch(
        kernel, programs, arguments, {"num_warps": 4, "maxnreg": 168 if consumers == 2 else 128}, names
    )


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, request: Request, target: Target
) -> list[Launch]:
    """As ``triton_launch.forward_launches``."""
    layout = request.layout
    owners = Owners.of(layout, q.shape[0], q.shape[1])
    plan = scheduled(layout, "rows", owners, target)
    depth = FORWARD[layout.block_q, q.shape[3]]
    rows = plan.slots * owners.reps * layout.block_q
    part_out = q.new_empty((rows, q.shape[3]), dtype=torch.float32) if rows else None
    part_lse = q.new_empty(rows, dtype=torch.float32) if rows else None
    arguments = {
        "q": _described(q, ROWS),
        "k": _described(k, layout.block_k),
        "v": _described(v, layout.block_k),
        "out": _described(out, ROWS),
        "lse": lse,
        "part_out": part_out,
        "part_lse": part_lse,
        **_walked(plan, owners, request, request.tile_bias, q, k),
        "counter": torch.zeros(1, dtype=torch.int32, device=q.device),
        "heads": q.shape[1],
        "q_len": layout.q_len,
        "q_blocks": layout.q_blocks,
        "scale": request.scale * LOG2E,
        "STAGES": depth.stages,
        "QS": depth.items,
    }
    launches = [_launch(hopper_forward.forward_kernel, arguments, layout, target, {})]
    if part_out is not None:
        sizes = {
            "heads": q.shape[1],
            "q_len": layout.q_len,
            "q_blocks": layout.q_blocks,
            "BLOCK_Q": layout.block_q,
        }
        tensors = {"part_out": part_out, "part_lse": part_lse, "out": out, "lse": lse}
        combine = triton_forward.combine_kernel
        launches.append(combining(combine, tensors, sizes, plan, owners, layout, q.shape[3]))
    return launches


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
    bias_grad: None,
    request: Request,
    target: Target,
) -> list[Launch]:
    """As ``triton_launch.backward_launches``: δ, then the rows, then the columns, then the sums."""
    layout, heads, dim = request.layout, q.shape[1], q.shape[3]
    block = layout.block_q
    tile_bias = features_of(request)[2]
    out_heads = heads // heads_a_program(k, q, layout, target)
    row_owners = Owners.of(layout, q.shape[0], heads)
    column_owners = Owners.of(layout, q.shape[0], out_heads)
    rows = scheduled(layout, "rows", row_owners, target)
    columns = scheduled(layout, "columns", column_owners, target)
    names, column_dk, column_dv = {}, dk, dv
    members_dk = members_dv = None
    if out_heads != k.shape[1]:
        names = {"dk": "members_dk", "dv": "members_dv"}
        members_dk, members_dv = (
            q.new_empty((q.shape[0], out_heads, *k.shape[2:]), dtype=torch.float32) for _ in range(2)
        )
        column_dk, column_dv = members_dk, members_dv

    def parts(plan: Schedule, owners: Owners) -> Tensor | None:
        count = plan.slots * owners.reps * block
        return q.new_empty((count, dim), dtype=torch.float32) if count else None

    part_dq, part_dk, part_dv = parts(rows, row_owners), parts(columns, column_owners), None
    part_dv = None if part_dk is None else torch.empty_like(part_dk)
    # Lines of a multiple of 16 bytes, as bulk copies want them.
    pitch = -(-layout.q_len // 4) * 4
    lse2, delta = (
        torch.empty((*lse.shape[:2], pitch), dtype=torch.float32, device=q.device) for _ in range(2)
    )
    row_counter, column_counter = (torch.empty(1, dtype=torch.int32, device=q.device) for _ in range(2))
    row_depth, column_depth = BACKWARD_ROWS[block, dim], BACKWARD_COLUMNS[block, dim]
    scales = {"scale": float(request.scale), "scale2": request.scale * LOG2E}
    row_arguments = {
        "q": _described(q, ROWS),
        "grad_out": _described(grad_out, ROWS),
        "k": _described(k, block),
        "v": _described(v, block),
        "dq_out": _described(dq, ROWS),
        "lse2": lse2,
        "delta": delta,
        "part_dq": part_dq,
        "tile_grad": tile_grad,
        "counter": row_counter,
        **_walked(rows, row_owners, request, tile_bias, q, k),
        **strides_of("tg", None if tile_grad is None else tile_grad[0], "bh"),
        "tile_grad_step": 0 if tile_grad is None else tile_grad[0].numel(),
        "heads": heads,
        "q_len": layout.q_len,
        "q_blocks": layout.q_blocks,
        "pitch": pitch,
        **scales,
        "STAGES": row_depth.stages,
        "QS": row_depth.items,
    }
    column_arguments = {
        "q": _described(q, STEP),
        "grad_out": _described(grad_out, STEP),
        "k": _described(k, ROWS),
        "v": _described(v, ROWS),
        "lse2": _line(lse2, layout.q_len),
        "delta": _line(delta, layout.q_len),
        "dk_out": _described(dk, ROWS),
        "dv_out": _described(dv, ROWS),
        "part_dk": part_dk,
        "part_dv": part_dv,
        "members_dk": members_dk,
        "members_dv": members_dv,
        "counter": column_counter,
        **_walked(columns, column_owners, request, tile_bias, q, k),
        "heads": out_heads,
        "k_len": layout.k_len,
        "k_blocks": layout.k_blocks,
        **scales,
        "M": STEP,
        "STAGES": column_depth.stages,
        "MEMBERS": heads // out_heads,
    }
    launches = [
        delta_launch(grad_out, out, lse, grad_lse, lse2, delta, row_counter, column_counter),
        _launch(hopper_rows.rows_kernel, row_arguments, layout, target, {"counter": "row_counter"}),
        _launch(
            hopper_columns.columns_kernel, column_arguments, layout, target, {"counter": "column_counter"}
        ),
    ]
    of_rows = {"heads": heads, "length": layout.q_len, "blocks": layout.q_blocks, "BLOCK": block}
    of_columns = {"heads": out_heads, "length": layout.k_len, "blocks": layout.k_blocks, "BLOCK": block}
    for name, part, into, sizes, plan, owners in (
        ("dq", part_dq, dq, of_rows, rows, row_owners),
        ("dk", part_dk, column_dk, of_columns, columns, column_owners),
        ("dv", part_dv, column_dv, of_columns, columns, column_owners),
    ):
        if part is not None:
            called = {"parts": f"part_{name}", "out": names.get(name, f"{name}_out")}
            tensors = {"parts": part, "out": into}
            kernel = triton_backward.sum_kernel
            launches.append(combining(kernel, tensors, sizes, plan, owners, layout, dim, called))
    if members_dk is not None and members_dv is not None:
        launches.append(group_sum(members_dk, members_dv, dk, dv))
    return launches
