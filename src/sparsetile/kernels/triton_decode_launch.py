"""From a decoding request to kernel launches, prepared once for each kind of call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetile.kernels.decode_request import DecodeRequest
from sparsetile.kernels.triton_backend import on_device
from sparsetile.kernels.triton_config import Target, padded_dim, target_of
from sparsetile.kernels.triton_decode import decode_kernel, merge_kernel
from sparsetile.kernels.triton_launch import LOG2E, Launch
from sparsetile.kernels.triton_replay import current_stream
from sparsetile.layout.blocks import BlockLayout

_HIP = torch.version.hip is not None
_MEMO = "triton_decoding"
_MOST = 64
"""Kinds of calls that one layout keeps."""

_STEPS = {"hopper": (1 << 15, 4), "blackwell": (1 << 15, 4), "ampere": (1 << 14, 3), "amd": (1 << 13, 2)}
"""Bytes of keys, and as many of values, that a program reads at a step, and stages. Measured on an H200 in 16
bits; what is between the stages counts as well, so the others have less than their memory would hold."""

_PROGRAMS_A_PROCESSOR = 2
_LEAST_BYTES = 1 << 15
"""Of keys that are worth a program of their own: less is merged for longer than it is read."""

_MOST_SPLITS = 256
_PARTS_AT_ONCE = 32
_ALIGNMENT = 128  # elements of a scratch buffer
_TENSORS = ("q", "k", "v", "out", "lse", "lengths", "starts", "pages", "padding")
_SIZES = (
    *("sq_b", "sq_h", "sq_n", "sk_b", "sk_h", "sk_n", "sv_b", "sv_h", "sv_n"),
    *("st_b", "sp_b", "capacity"),
)
"""What each call brings anew, in the order in which the kernel takes it."""


@dataclass(frozen=True)
class Shape:
    """How a call is cut.

    Attributes:
        units: heads that have rows of their own: key heads, or query heads where layouts differ by head.
        group: query heads of a unit.
        tall: rows of a product: queries of all heads of the group, filled up.
        works: programs for each split.
        busy: those of them that have keys, if all queries of a sequence stand in one row of the layout.
        keys: keys a step.
        least: steps that are worth a program of their own.
    """

    units: int
    group: int
    tall: int
    works: int
    busy: int
    keys: int
    least: int
    warps: int
    stages: int

    @staticmethod
    def of(q: Tensor, key_heads: int, layout: BlockLayout, target: Target) -> Shape:
        batch, heads, q_len, width = q.shape
        units, group = (heads, 1) if layout.heads > 1 else (key_heads, heads // key_heads)
        rows, line = q_len * group, padded_dim(width) * q.element_size()
        step, stages = _STEPS[target.family]
        tall = min(64 if line <= 256 else 32, padded_dim(rows))
        most = 128
        if q.element_size() == 4:  # products in three parts hold each operand twice, in registers
            tall, most, step, stages = 16, 64, min(step, 1 << 14), min(stages, 3)
        elif tall > 16:
            step //= 2
        busy = batch * units * -(-rows // tall)
        works = busy if q_len == 1 else 2 * busy
        keys = min(layout.block_k, most, max(16, step // line))
        least = max(1, _LEAST_BYTES // (keys * line))
        return Shape(units, group, tall, works, busy, keys, least, 4, stages)


def splits_for(shape: Shape, longest: int, processors: int) -> int:
    """Programs that share a row of at most ``longest`` steps: as many as run at once, and in the longest row
    none with less than is worth it."""
    most = min(longest // shape.least, _MOST_SPLITS)
    return max(1, min(_PROGRAMS_A_PROCESSOR * processors // shape.busy, most))


def longest_row(layout: BlockLayout) -> int:
    """Tiles of the longest row; looked up on the device once for each layout."""
    if layout.row_bound is not None:
        return layout.row_bound
    known = layout._memo.get("longest_row")
    if not isinstance(known, int):
        known = layout._memo["longest_row"] = int(layout.row_counts().max())
    return known


def launches(
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    parts: tuple[Tensor, Tensor] | None,
    splits: int,
    shape: Shape,
    request: DecodeRequest,
    target: Target,
) -> list[Launch]:
    """The launches of a call.

    Args:
        tensors, sizes: in the order of ``_TENSORS`` and ``_SIZES``.
        parts: fp32 ``[splits, B, H, Nq, D]`` and ``[splits, B, H, Nq]``, flat; None for one split.
    """
    layout, named = request.layout, dict(zip(_TENSORS, tensors, strict=True))
    q, k, out, lse = (named[name] for name in ("q", "k", "out", "lse"))
    assert q is not None and k is not None and lse is not None
    width, rows = q.shape[3], lse.numel()
    widths = {"D": width, "BLOCK_D": padded_dim(width)}
    arguments: dict[str, Any] = {
        **named,
        **dict(zip(_SIZES, sizes, strict=True)),
        "scale": request.scale * LOG2E,
        "indptr": layout.indptr,
        "others": layout.indices,
        "mask_ids": layout.mask_ids,
        "masks": layout.masks,
        "works": shape.works,
        "units": shape.units,
        "row_count": rows,
        "splits": splits,
        "least": shape.least,
        "q_blocks": layout.q_blocks,
        "layout_h": layout.q_blocks if layout.heads > 1 else 0,
        **widths,
        "BLOCK_Q": layout.block_q,
        "BLOCK_K": layout.block_k,
        "M": shape.tall,
        "N": shape.keys,
        "QUERIES": q.shape[2],
        "GROUP": shape.group,
        "SHARING": shape.units // k.shape[1],
        "PAGE": request.page_size,
        "PARTIAL": layout.masks.shape[0] > 0,
        "DIRECT": parts is None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 and target.family != "amd" else "ieee",
    }
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    if parts is None:
        return [Launch(decode_kernel, shape.works, arguments, options)]
    arguments |= {"out": parts[0], "lse": parts[1]}
    merged = {"part_out": parts[0], "part_lse": parts[1], "out": out, "lse": lse, "row_count": rows}
    merged |= {"splits": splits, **widths, "PARTS": min(_PARTS_AT_ONCE, padded_dim(splits))}
    return [
        Launch(decode_kernel, shape.works * splits, arguments, options),
        Launch(merge_kernel, rows, merged, {"num_warps": 4, "num_stages": 1}),
    ]


@dataclass(frozen=True, eq=False)
class _Kind:
    """What calls of a kind share: splits, and the compiled kernels (none in the interpreter) with the
    arguments that stay the same."""

    splits: int
    starts: tuple[tuple[Callable[..., object], tuple[Any, ...]], ...]


class _Kinds(dict[object, _Kind]):
    """The kinds of calls on a layout. Copies and pickles are empty: kernels live in a process."""

    def __reduce__(self) -> tuple[type[_Kinds], tuple[()]]:
        return _Kinds, ()


def decode(q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and natural LSE ``[B, H, Nq]`` fp32."""
    batch, heads, q_len, width = q.shape
    device, layout, padding = q.device, request.layout, request.key_padding_mask
    out = q.new_empty(batch, heads, q_len, width)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=device)
    table = request.page_table
    if padding is not None:
        padding = padding.view(torch.uint8)
    tensors = (q, k, v, out, lse, request.lengths, request.starts, table, padding)
    sizes = (
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(0 if table is None else table.stride(0), 0 if padding is None else padding.stride(0)),
        request.capacity,
    )
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    kind = _kind_of(tensors, pointers, sizes, request)
    kinds = layout._memo.get(_MEMO)
    if not isinstance(kinds, _Kinds):
        kinds = layout._memo[_MEMO] = _Kinds()
    known = kinds.get(kind)
    if known is not None and known.starts:
        _replay(known, pointers, sizes, request.scale * LOG2E, lse.numel(), width, device)
        return out, lse
    target = target_of(device)
    shape = Shape.of(q, k.shape[1], layout, target)
    splits = splits_for(shape, longest_row(layout) * (layout.block_k // shape.keys), target.processors)
    parts = None
    if splits > 1:
        begin, size = _scratch(lse.numel() * splits, width)
        scratch = torch.empty(size, dtype=torch.float32, device=device)
        parts = scratch[: lse.numel() * splits * width], scratch[begin:]
    made = launches(tensors, sizes, parts, splits, shape, request, target)
    with on_device(device):
        compiled = [(launch, launch.run()) for launch in made]
    starts = tuple(
        (binary[launch.programs, 1, 1], _fixed(launch)) for launch, binary in compiled if binary is not None
    )
    if len(kinds) >= _MOST:
        kinds.clear()
    kinds[kind] = _Kind(splits, starts)
    return out, lse


def _replay(
    known: _Kind,
    pointers: list[int | None],
    sizes: tuple[int, ...],
    scale: float,
    rows: int,
    width: int,
    device: torch.device,
) -> None:
    """Start the kernels of a kind of call on the current stream."""
    with on_device(device):
        stream = current_stream(device)
        start, fixed = known.starts[0]
        if known.splits == 1:
            start(*pointers, *sizes, scale, *fixed, stream=stream)
            return
        begin, size = _scratch(rows * known.splits, width)
        scratch = torch.empty(size, dtype=torch.float32, device=device)
        first = scratch.data_ptr()
        final, parts = pointers[3:5], (first, first + 4 * begin)
        pointers[3:5] = parts
        start(*pointers, *sizes, scale, *fixed, stream=stream)
        start, fixed = known.starts[1]
        start(*parts, *final, *fixed, stream=stream)


def _scratch(lines: int, width: int) -> tuple[int, int]:
    """Where the LSEs of the parts begin in a buffer of fp32 that holds the parts first, and its size."""
    begin = -(-lines * width // _ALIGNMENT) * _ALIGNMENT
    return begin, begin + lines


def _fixed(launch: Launch) -> tuple[Any, ...]:
    """The arguments after those that each call brings anew."""
    brought = len(_TENSORS) + len(_SIZES) + 1 if launch.kernel is decode_kernel else 4
    values = [launch.arguments[name] for name in launch.kernel.arg_names[brought:]]
    return tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in values)


def _kind_of(
    tensors: tuple[Tensor | None, ...],
    pointers: list[int | None],
    sizes: tuple[int, ...],
    request: DecodeRequest,
) -> tuple[object, ...]:
    """All that the launches, and Triton's specialisation of their kernels, take from a call.

    Of a stride Triton asks whether it is 1, whether 16 divides it and whether it fits 32 bits; so a cache
    that grows by being copied stays of its kind.
    """
    q, k = tensors[:2]
    assert q is not None and k is not None
    together = 0
    for at in pointers:
        together |= at or 0
    key = [q.shape, q.dtype, k.shape[1], request.page_size, q.get_device()]
    key += [-1 if size == 1 else (size & 15 == 0) + 2 * (size >= 2**31) for size in sizes]
    key += [None if x is None else x.dtype for x in tensors[5:]]
    key.append(together & 15 == 0 or tuple([at is not None and at & 15 == 0 for at in pointers]))
    if _HIP:
        key += [x is not None and x.untyped_storage().nbytes() < 2**31 for x in tensors]
    return tuple(key)
