# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Means of tiles, and their gradient: PyTorch's sum of mixed dtypes takes five times as long as the memory
does, its mean of 16 bits a tenth longer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetile.kernels.triton_backend import on_device
from sparsetile.kernels.triton_config import padded_dim

_TOKENS = 32


# fmt: off
@triton.jit(do_not_specialize=["heads", "length", "tiles"])
def means_kernel(
    x, means, sx_b, sx_h, sx_n, heads, length, tiles, rate, last_rate,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):
    # fmt: on
    """One program a tile of one head; the heads of a token, which often lie side by side, at one time."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    tile = (tl.program_id(0) // heads % tiles).to(tl.int64)
    batch = (tl.program_id(0) // heads // tiles).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    known = dims < D
    x += batch * sx_b + head * sx_h
    total = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    for start in tl.static_range(0, BLOCK, TOKENS):
        token = tile * BLOCK + start + tl.arange(0, TOKENS)
        keep = (token < length)[:, None] & known[None, :]
        total += tl.load(x + token[:, None] * sx_n + dims[None, :], mask=keep, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) * tl.where(tile == tiles - 1, last_rate, rate)
    tl.store(means + ((batch * heads + head) * tiles + tile) * D + dims, mean, mask=known)


# fmt: off
@triton.jit(do_not_specialize=["heads", "length", "tiles"])
def spread_kernel(
    x, rows, sx_b, sx_h, sx_n, sr_b, sr_h, sr_n, heads, length, tiles, rate, last_rate,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):
    # fmt: on
    """One program a tile of one head."""
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    line = tl.program_id(0) // tiles
    batch = (line // heads).to(tl.int64)
    head = (line % heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    known = dims < D
    row = tl.load(rows + batch * sr_b + head * sr_h + tile * sr_n + dims, mask=known, other=0.0)
    row = row * tl.where(tile == tiles - 1, last_rate, rate)
    x += batch * sx_b + head * sx_h
    for start in range(0, BLOCK, TOKENS):
        token = tile * BLOCK + start + tl.arange(0, TOKENS)
        at = x + token[:, None] * sx_n + dims[None, :]
        keep = (token < length)[:, None] & known[None, :]
        value = tl.load(at, mask=keep, other=0.0)
        tl.store(at, (value.to(row.dtype) + row[None, :]).to(x.dtype.element_ty), mask=keep)


def tile_means(x: Tensor, block: int) -> Tensor:
    """Means of tiles of ``block`` tokens, ``[B, H, ⌈N/block⌉, D]`` fp32, without gradient.

    Args:
        x: ``[B, H, N, D]``, fp32 or 16 bits, the last dimension contiguous.
        block: tokens of a tile, a power of two from 16 on.
    """
    batch, heads, length, dim = x.shape
    tiles = -(-length // block)
    means = torch.empty((batch, heads, tiles, dim), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        means_kernel[(batch * heads * tiles,)](
            x,
            means,
            *x.stride()[:3],
            heads,
            length,
            tiles,
            1.0 / block,
            1.0 / (length - (tiles - 1) * block),
            D=dim,
            BLOCK_D=padded_dim(dim),
            BLOCK=block,
            TOKENS=min(block, _TOKENS),
            num_warps=4,
        )
    return means


def add_means(x: Tensor, rows: Tensor, block: int) -> None:
    """``x[b, h, t] += rows[b, h, t // block] / (tokens of the tile)``, computed in the dtype of ``rows``.

    Args:
        x: ``[B, H, N, D]``, the last dimension contiguous.
        rows: ``[B, H, ⌈N/block⌉, D]`` fp32, the last dimension contiguous.
        block: tokens of a tile, a multiple of 16.
    """
    batch, heads, length, dim = x.shape
    tiles = rows.shape[2]
    last = length - (tiles - 1) * block
    with on_device(x.device):
        spread_kernel[(batch * heads * tiles,)](
            x,
            rows,
            *x.stride()[:3],
            *rows.stride()[:3],
            heads,
            length,
            tiles,
            1.0 / block,
            1.0 / last,
            D=dim,
            BLOCK_D=padded_dim(dim),
            BLOCK=block,
            TOKENS=min(block, _TOKENS),
            num_warps=4,
        )
