# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Scores of a few key tiles of each query tile, MLP or bilinear, without the gathered features in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetile.kernels.triton_backend import on_device

_VALUES = 4096
"""Features that a program holds of either side."""


# fmt: off
@triton.jit(do_not_specialize=["count", "places", "nq", "nk", "groups", "sw_g", "sshift_g"])
def pairs_kernel(
    a, b, w, shift, column, scores, count, places, nq, nk, groups, sw_g, sshift_g,
    H: tl.constexpr, BLOCK_H: tl.constexpr, ENTRIES: tl.constexpr,
):
    # fmt: on
    """``scores[e] = shift + Σ_h w_h·ReLU(a[row of e, h] + b[column of e, h])`` for ENTRIES entries; without
    weights and shift ``Σ_h a[row of e, h]·b[column of e, h]``."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    known = entry < count
    row = entry // places
    line = row // nq
    group = line % groups
    tile = line * nk + tl.load(column + entry, mask=known, other=0)
    if shift is not None:
        score = tl.load(shift + group * sshift_g, mask=known, other=0.0)
    else:
        score = tl.zeros([ENTRIES], tl.float32)
    hidden = tl.arange(0, BLOCK_H)
    keep = known[:, None] & (hidden < H)[None, :]
    of_row = tl.load(a + row[:, None] * H + hidden[None, :], mask=keep, other=0.0)
    of_key = tl.load(b + tile[:, None] * H + hidden[None, :], mask=keep, other=0.0)
    if w is not None:
        weight = tl.load(w + group[:, None] * sw_g + hidden[None, :], mask=keep, other=0.0)
        terms = weight * tl.maximum(of_row + of_key, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        terms = of_row * of_key
    score += tl.sum(terms, 1)
    tl.store(scores + entry, score, mask=known)


def pair_scores(a: Tensor, b: Tensor, w: Tensor | None, shift: Tensor | None, column: Tensor) -> Tensor:
    """Scores ``[B, G, nq, n]`` of the key tiles ``column``, without gradient.

    Args:
        a, b: ``[B, G, nq, h]`` and ``[B, G, nk, h]``, fp32: the features of query and key tiles.
        w, shift: ``[G or 1, h]`` and ``[G or 1]``, fp32: the MLP's output layer; both None: bilinear.
        column: int64 ``[B, G, nq, n]``, all in range.
    """
    _, groups, nq, hidden = a.shape
    a, b, column = a.contiguous(), b.contiguous(), column.contiguous()
    w, shift = (None if x is None else x.contiguous() for x in (w, shift))
    scores = torch.empty(column.shape, dtype=torch.float32, device=a.device)
    block = triton.next_power_of_2(hidden)
    entries = max(1, _VALUES // block)
    programs = triton.cdiv(column.numel(), entries)
    with on_device(a.device):
        pairs_kernel[(programs,)](
            a,
            b,
            w,
            shift,
            column,
            scores,
            column.numel(),
            column.shape[-1],
            nq,
            b.shape[2],
            groups,
            hidden if w is not None and w.shape[0] > 1 else 0,
            1 if shift is not None and shift.numel() > 1 else 0,
            H=hidden,
            BLOCK_H=block,
            ENTRIES=entries,
            num_warps=4,
        )
    return scores
