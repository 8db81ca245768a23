# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""A row added to every token of its tile, in place: PyTorch's broadcast of mixed dtypes takes five times as
long as the memory does."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsetile.kernels.triton_backend import on_device
from sparsetile.kernels.triton_config import padded_dim

_TOKENS = 32


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
