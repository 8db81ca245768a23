"""Rows added to the tokens of their tiles; in the interpreter if there is no GPU."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from sparsetile.kernels.triton_spread import add_means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 24, 128])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("strided", [False, True])
def test_every_token_gets_its_share(dtype: torch.dtype, dim: int, block: int, strided: bool) -> None:
    seed = random.getrandbits(40)
    torch.manual_seed(seed)
    length = random.Random(seed).randrange(1, 3 * block)
    tiles = -(-length // block)
    x = torch.randn(2, 3, length, dim, device=DEVICE).to(dtype)
    if strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.randn(2, 3, tiles, dim, device=DEVICE)
    expected = x.float().clone()
    for tile in range(tiles):
        piece = slice(tile * block, min((tile + 1) * block, length))
        expected[:, :, piece] += rows[:, :, tile : tile + 1] / (piece.stop - piece.start)
    strides = x.stride()
    add_means(x, rows, block)
    assert x.stride() == strides
    torch.testing.assert_close(
        x, expected.to(dtype), rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=1e-6, msg=f"seed {seed}"
    )
