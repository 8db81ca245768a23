"""Key padding made ready for whole tiles: bits, notes and clean copies, against the mask itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparsetile.kernels import hopper_launch
from sparsetile.kernels.request import Request
from sparsetile.layout.blocks import BlockLayout

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the real kernels"
)


@pytest.mark.parametrize(("block", "k_len"), [(64, 300), (128, 256)])
@pytest.mark.parametrize("by_head", [False, True])
def test_bits_notes_and_copies(block: int, k_len: int, by_head: bool) -> None:
    batch, heads, dim = 2, 3, 40
    blocks = -(-k_len // block)
    layout = BlockLayout.from_dense_mask(torch.ones(1, 1, 8, k_len, dtype=torch.bool), block)
    shape = (batch, heads, k_len) if by_head else (batch, k_len)
    padding = torch.rand(shape) < 0.3
    padding[0, ..., :block] = False
    padding[1, ..., block:] = True
    padding[1, ..., k_len - 1] = False
    ignored = (padding if by_head else padding[:, None]).expand(batch, heads, k_len)
    k = (
        torch.randn(batch, k_len, heads, dim)
        .half()
        .transpose(1, 2)
        .masked_fill(ignored[..., None], torch.nan)
    )
    v = torch.randn(batch, heads, k_len, dim).half().masked_fill(ignored[..., None], torch.inf)

    kept, launches = hopper_launch._kept(k, v, Request(layout, 1.0, key_padding_mask=padding))
    assert kept is not None
    for x in (kept.k, kept.v):
        x.fill_(7)  # what no program wrote shows
    for launch in launches:
        launch.run()
    bits = (kept.words[..., None] >> torch.arange(32)) & 1
    counts = bits.view(batch, heads, blocks * block)
    assert torch.equal(counts[..., :k_len] != 0, ~ignored) and not counts[..., k_len:].any()
    tiles = torch.arange(batch * heads * blocks).view(batch, heads, blocks)
    some = torch.nn.functional.pad(ignored, (0, -k_len % block)).view(batch, heads, blocks, block).any(3)
    assert torch.equal(kept.notes.view_as(tiles), torch.where(some, tiles, -1).int())
    assert some.any() and not some.all()
    copied = some.repeat_interleave(block, 2)[..., :k_len, None]
    for got, given in ((kept.k, k), (kept.v, v)):
        expected = torch.where(copied, given.masked_fill(ignored[..., None], 0), 7)
        assert torch.equal(got, expected)


def test_no_padding_costs_no_launch() -> None:
    layout = BlockLayout.from_dense_mask(torch.ones(1, 1, 64, 64, dtype=torch.bool), 64)
    x = torch.zeros(1, 1, 64, 64).half()
    assert hopper_launch._kept(x, x, Request(layout, 1.0)) == (None, [])
