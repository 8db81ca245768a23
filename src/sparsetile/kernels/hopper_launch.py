"""From a request to launches of the kernels for Hopper; what surrounds them is the Triton backend's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsetile.kernels import (
    hopper_columns,
    hopper_five,
    hopper_forward,
    hopper_rows,
    triton_backward,
    triton_padding,
)
from sparsetile.kernels.dropout import keep_scale
from sparsetile.kernels.request import Request
from sparsetile.kernels.triton_config import Target, padded_dim
from sparsetile.kernels.triton_launch import (
    LOG2E,
    Launch,
    Owners,
    combine_launch,
    delta_launch,
    features_of,
    group_sum,
    heads_a_program,
    parts_of,
    scheduled,
    strides_of,
    sum_launch,
    threshold_bits,
    tile_grad_parts,
)
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.schedule import Schedule

__all__ = ["backward_launches", "features_of", "forward_launches", "tile_grad_parts"]

ROWS = 64  # queries, or keys, of a consumer


class Depth(NamedTuple):
    """How many tiles and how many items lie in shared memory at a time."""

    stages: int
    items: int = 1


class Shares(NamedTuple):
    """Of the forward: how many tiles lie in shared memory at a time, how many keys a step has, and how many
    programs share a multiprocessor."""

    stages: int
    keys: int
    programs: int


class Steps(NamedTuple):
    """How many steps of the columns lie in shared memory at a time, and how many queries a step has."""

    stages: int
    queries: int = 64


# By block and width; what fits. In backward two programs of blocks of 64 share a multiprocessor; of wide
# heads they have registers for 32 queries.
FORWARD = {
    (128, 64): Shares(2, 64, 2),
    (128, 128): Shares(2, 128, 1),
    (64, 64): Shares(2, 64, 3),
    (64, 128): Shares(2, 64, 2),
}
BACKWARD_ROWS = {(128, 64): Depth(4, 2), (128, 128): Depth(2), (64, 64): Depth(3), (64, 128): Depth(2)}
BACKWARD_COLUMNS = {(128, 64): Steps(4), (128, 128): Steps(3), (64, 64): Steps(4), (64, 128): Steps(2, 32)}
BACKWARD_FIVE = {64: Steps(2, 128), 128: Steps(2)}  # columns and dQ in one kernel; blocks of 128
_SCALED_ENTRIES = 4096  # of dQ's sum that a program scales
MOST_QUERIES = 2**24  # of five products: past them the kernel puts what is nobody's dQ
LONG_ROW = 8  # tiles a row, on average, from which on five products are faster

# A consumer's, and those at the launch: by a program's consumers, and the programs on a multiprocessor.
REGISTERS = {(2, 1): (240, 168), (2, 2): (104, 80), (1, 2): (240, 128), (1, 3): (136, 80)}
PRODUCER_REGISTERS = 24


def width_of(dim: int) -> int:
    """Of the buffers that hold heads of ``dim``."""
    return 64 if dim <= 64 else 128


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """``[B, H, N, D]`` for bulk copies of ``rows`` rows of a head, as wide as the buffers: what lies outside
    of x arrives as zeros, and is not stored."""
    swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # A dimension of size 1 may have any stride, also one that the hardware refuses.
    strides = [x.stride(i) if x.shape[i] > 1 or i == 3 else 8 * x.shape[3] for i in range(4)]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, width_of(x.shape[3])], swizzled)


def _summed(x: Tensor) -> TensorDescriptor:
    """fp32 ``[B, H, N, D]``, contiguous, for additions of 64×64 entries."""
    swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, ROWS, 64], swizzled)


def _line(x: Tensor, length: int, step: int) -> TensorDescriptor:
    """fp32 ``[B, H, pitch]``, of which ``length`` are real: what lies behind arrives as 0."""
    plain = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    strides = [x.stride(0), x.stride(1), 1]
    return TensorDescriptor(x, [*x.shape[:2], length], strides, [1, 1, step], plain)


class Kept(NamedTuple):
    """What ``kept_kernel`` makes of a padding mask."""

    notes: Tensor
    words: Tensor
    k: Tensor
    v: Tensor


def _kept(k: Tensor, v: Tensor, request: Request) -> tuple[Kept | None, list[Launch]]:
    """Room for what the kernels read of a padding mask, and the launch that fills it; none without one."""
    padding = features_of(request)[0]
    if padding is None:
        return None, []
    layout, tiles = request.layout, k.shape[0] * k.shape[1] * request.layout.k_blocks
    notes, words = (
        torch.empty(shape, dtype=torch.int32, device=k.device)
        for shape in ((tiles,), (tiles, layout.block_k // 32))
    )
    kept = Kept(notes, words, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)))
    arguments = {
        "padding": padding,
        "k": k,
        "v": v,
        "kept_words": kept.words,
        "kept_notes": kept.notes,
        "kept_k": kept.k,
        "kept_v": kept.v,
        **strides_of("p", padding[:, None] if padding.dim() == 2 else padding, "bh"),
        **strides_of("k", k, "bhn"),
        **strides_of("v", v, "bhn"),
        "heads": k.shape[1],
        "k_len": layout.k_len,
        "k_blocks": layout.k_blocks,
        "D": k.shape[3],
        "BLOCK_D": padded_dim(k.shape[3]),
        "BLOCK_K": layout.block_k,
    }
    return kept, [Launch(triton_padding.kept_kernel, tiles, arguments, {"num_warps": 4})]


def _heeding(kept: Kept | None, layout: BlockLayout, rows: int) -> dict[str, Any]:
    """What a kernel takes of it that copies ``rows`` keys at a time."""
    return {
        "kept_notes": None if kept is None else kept.notes,
        "kept_words": None if kept is None else kept.words,
        "kept_k": None if kept is None else _described(kept.k, rows),
        "kept_v": None if kept is None else _described(kept.v, rows),
        "k_blocks": layout.k_blocks,
    }


def _dropping(request: Request) -> dict[str, Any]:
    """What every kernel takes of dropout."""
    k_tiles = request.k_tiles
    return {
        "seed": request.seed,
        "q_tiles": request.q_tiles,
        "k_tiles": k_tiles,
        **strides_of("kt", k_tiles, "h"),
        "keep_scale": keep_scale(request.dropout_p),
        "threshold": threshold_bits(request.dropout_p),
    }


def _walked(plan: Schedule, owners: Owners, request: Request, q: Tensor, k: Tensor) -> dict[str, Any]:
    """What every kernel takes of a schedule, a layout and a tile bias."""
    layout, tile_bias = request.layout, features_of(request)[2]
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
        "BLOCK_D": width_of(q.shape[3]),
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "BATCH_SHARED": owners.batch_shared,
        "HEADS_SHARED": owners.heads_shared,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }


def _launch(
    kernel: Any,
    arguments: dict[str, Any],
    layout: BlockLayout,
    target: Target,
    names: dict[str, str],
    sharing: int | None = None,
) -> Launch:
    """``sharing``: programs a multiprocessor; as many as have two consumers, unless told otherwise."""
    consumers = layout.block_q // ROWS
    sharing = sharing or 2 // consumers
    programs = min(target.processors * sharing, arguments["works"])
    arguments["REGISTERS"], most = REGISTERS[consumers, sharing]
    return Launch(kernel, programs, arguments, {"num_warps": 4, "maxnreg": most}, names)


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, request: Request, target: Target
) -> list[Launch]:
    """As ``triton_launch.forward_launches``."""
    layout = request.layout
    owners = Owners.of(layout, q.shape[0], q.shape[1])
    plan = scheduled(layout, "rows", owners, target)
    stages, keys, programs = FORWARD[layout.block_q, width_of(q.shape[3])]
    kept, begin = _kept(k, v, request)
    part_out = parts_of(plan, owners, layout, q)
    part_lse = None if part_out is None else part_out.new_empty(len(part_out))
    arguments = {
        "q": _described(q, ROWS),
        "k": _described(k, layout.block_k),
        "v": _described(v, layout.block_k),
        "out": _described(out, ROWS),
        "lse": lse,
        "part_out": part_out,
        "part_lse": part_lse,
        **_walked(plan, owners, request, q, k),
        **_dropping(request),
        **_heeding(kept, layout, layout.block_k),
        "counter": torch.zeros(1, dtype=torch.int32, device=q.device),
        "heads": q.shape[1],
        "q_len": layout.q_len,
        "q_blocks": layout.q_blocks,
        "scale": request.scale * LOG2E,
        "STAGES": stages,
        "QS": 2,
        "KEYS": keys,
    }
    launches = [*begin, _launch(hopper_forward.forward_kernel, arguments, layout, target, {}, programs)]
    if part_out is not None and part_lse is not None:
        launches.append(combine_launch(part_out, part_lse, out, lse, plan, owners, layout))
    return launches


def _five(request: Request, width: int) -> bool:
    """Whether backward runs in five products a tile, dQ added up in fp32; else in seven, without that sum."""
    # Short rows do not earn what the sum costs. With a tile bias the kernel spills at width 64.
    layout = request.layout
    long = layout.capacity >= LONG_ROW * (layout.indptr.numel() - 1)
    fits = layout.block_q == 128 and layout.q_len <= MOST_QUERIES
    return long and fits and not request.lean and (width == 128 or request.tile_bias is None)


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
    """As ``triton_launch.backward_launches``: δ, then all tiles (in one kernel, or rows and columns), then
    the sums."""
    layout, heads, width = request.layout, q.shape[1], width_of(q.shape[3])
    block, five = layout.block_q, _five(request, width)
    partial = layout.masks.shape[0] > 0
    kept, begin = _kept(k, v, request)
    out_heads = heads // heads_a_program(k, q, layout, target)
    names, column_dk, column_dv = {}, dk, dv
    members_dk = members_dv = None
    if out_heads != k.shape[1]:
        names = {"dk": "members_dk", "dv": "members_dv"}
        members_dk, members_dv = (
            q.new_empty((q.shape[0], out_heads, *k.shape[2:]), dtype=torch.float32) for _ in range(2)
        )
        column_dk, column_dv = members_dk, members_dv
    # Lines of a multiple of 16 bytes, as bulk copies want them.
    pitch = -(-layout.q_len // 4) * 4
    lse2, delta = (
        torch.empty((*lse.shape[:2], pitch), dtype=torch.float32, device=q.device) for _ in range(2)
    )
    row_counter, column_counter = (torch.empty(1, dtype=torch.int32, device=q.device) for _ in range(2))
    dq_sum = torch.empty(q.shape, dtype=torch.float32, device=q.device) if five else None
    tile_sums = {
        "tile_grad": tile_grad,
        **strides_of("tg", None if tile_grad is None else tile_grad[0], "bh"),
        "tile_grad_step": 0 if tile_grad is None else tile_grad[0].numel(),
    }
    scales = {"scale": float(request.scale), "scale2": request.scale * LOG2E}

    owners = Owners.of(layout, q.shape[0], out_heads)
    plan = scheduled(layout, "columns", owners, target)
    part_dk, part_dv = (parts_of(plan, owners, layout, q) for _ in range(2))
    stages, step = BACKWARD_FIVE[width] if five else BACKWARD_COLUMNS[block, width]
    arguments = {
        "q": _described(q, step),
        "grad_out": _described(grad_out, step),
        "k": _described(k, block if five else ROWS),
        "v": _described(v, block if five else ROWS),
        "lse2": _line(lse2, layout.q_len, step),
        "delta": _line(delta, layout.q_len, step),
        "dk_out": _described(dk, ROWS),
        "dv_out": _described(dv, ROWS),
        "part_dk": part_dk,
        "part_dv": part_dv,
        "members_dk": members_dk,
        "members_dv": members_dv,
        "counter": column_counter,
        **_walked(plan, owners, request, q, k),
        **_dropping(request),
        **_heeding(kept, layout, block if five else ROWS),
        "heads": out_heads,
        "k_len": layout.k_len,
        **scales,
        "PARTIAL": partial,
        "M": step,
        "STAGES": stages,
        "MEMBERS": heads // out_heads,
    }
    kernel = hopper_columns.columns_kernel
    if dq_sum is not None:
        kernel = hopper_five.five_kernel
        arguments |= {"dq_sum": _summed(dq_sum), **tile_sums}
    columns = [_launch(kernel, arguments, layout, target, {"counter": "column_counter"})]
    for name, part, into in (("dk", part_dk, column_dk), ("dv", part_dv, column_dv)):
        if part is not None:
            filled = names.get(name, f"{name}_out")
            columns.append(sum_launch(name, part, into, plan, owners, layout, filled))
    if members_dk is not None and members_dv is not None:
        columns.append(group_sum(members_dk, members_dv, dk, dv))
    begin.append(delta_launch(grad_out, out, lse, grad_lse, lse2, delta, row_counter, column_counter, dq_sum))
    if dq_sum is not None:
        entries = {"entries": dq.numel(), "scale": float(request.scale), "ENTRIES": _SCALED_ENTRIES}
        programs = -(-dq.numel() // _SCALED_ENTRIES)
        tensors = {"dq_sum": dq_sum, "dq_out": dq}
        end = Launch(triton_backward.scaled_kernel, programs, {**tensors, **entries}, {"num_warps": 8})
        return [*begin, *columns, end]

    owners = Owners.of(layout, q.shape[0], heads)
    plan = scheduled(layout, "rows", owners, target)
    part_dq = parts_of(plan, owners, layout, q)
    depth = BACKWARD_ROWS[block, width]
    arguments = {
        "q": _described(q, ROWS),
        "grad_out": _described(grad_out, ROWS),
        "k": _described(k, block),
        "v": _described(v, block),
        "dq_out": _described(dq, ROWS),
        "lse2": lse2,
        "delta": delta,
        "part_dq": part_dq,
        "counter": row_counter,
        **tile_sums,
        **_walked(plan, owners, request, q, k),
        **_dropping(request),
        **_heeding(kept, layout, block),
        "heads": heads,
        "q_len": layout.q_len,
        "q_blocks": layout.q_blocks,
        "pitch": pitch,
        **scales,
        "PARTIAL": partial,
        "STAGES": depth.stages,
        "QS": depth.items,
    }
    rows = [_launch(hopper_rows.rows_kernel, arguments, layout, target, {"counter": "row_counter"})]
    if part_dq is not None:
        rows.append(sum_launch("dq", part_dq, dq, plan, owners, layout, "dq_out"))
    return [*begin, *rows, *columns]
