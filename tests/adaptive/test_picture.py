"""Kept tiles over dense mass: the numbers against attention written out, the picture against the tiles."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from sparsetile.adaptive import picture
from sparsetile.adaptive.picture import TileView
from sparsetile.layout.blocks import BlockLayout

BLOCK = 16


@pytest.fixture(autouse=True)
def fresh():
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)


def drawn(length=85, heads=4):
    """q, k and the layout of chosen tiles: each row's own and some of its past, by key-value head."""
    q = torch.randn(1, heads, length, 8, dtype=torch.float64)
    k = torch.randn(1, 2, length, 8, dtype=torch.float64)
    count = -(-length // BLOCK)
    chosen = (torch.rand(2, count, count) < 0.4).tril(-1) | torch.eye(count, dtype=torch.bool)
    indices = torch.where(chosen, torch.arange(count), -1)[None].repeat_interleave(heads // 2, 1)
    layout = BlockLayout.from_topk(indices.int(), length, length, BLOCK, True)
    return q, k, layout, chosen.repeat_interleave(heads // 2, 0)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_numbers_equal_attention_written_out(scale):
    q, k, layout, chosen = drawn()
    view = TileView.of(q, k, layout, scale)
    assert torch.equal(view.kept, chosen)
    logits = q @ k.repeat_interleave(2, 1).mT * (scale or 1 / math.sqrt(8))
    ahead = torch.ones(85, 85, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(ahead, -math.inf).softmax(-1)[0]
    mass = F.pad(weights, (0, 11, 0, 11)).unflatten(1, (6, 16)).unflatten(3, (6, 16)).sum((2, 4))
    torch.testing.assert_close(view.mass, mass, rtol=1e-9, atol=1e-12)
    inside = torch.stack([mass[h][chosen[h]].sum() for h in range(4)]) / 85
    torch.testing.assert_close(view.recall, inside)
    torch.testing.assert_close(view.density, chosen.sum((1, 2)) / 21)
    for h in range(4):
        best = sum(mass[h, i].topk(int(chosen[h, i].sum())).values.sum().item() for i in range(6)) / 85
        assert view.best[h].item() == pytest.approx(best)
        own = mass[h].diagonal().sum().item()
        past = sum(mass[h, i, :i].sum().item() * (chosen[h, i].sum().item() - 1) / i for i in range(1, 6))
        assert view.chance[h].item() == pytest.approx((own + past) / 85)


def test_all_tiles_have_all_the_mass():
    q, k, _, _ = drawn()
    every = torch.arange(6).tile(6, 1)
    layout = BlockLayout.from_topk(
        torch.where(every <= torch.arange(6)[:, None], every, -1)[None, None].int(), 85, 85, BLOCK, True
    )
    view = TileView.of(q, k, layout, None)
    one = torch.ones(4, dtype=torch.float64)
    for share in (view.recall, view.best, view.chance, view.density.double()):
        torch.testing.assert_close(share, one)


def test_outline_is_where_kept_meets_not_kept():
    kept = torch.rand(7, 7) < 0.5
    edges = {frozenset(line) for line in picture._outline(kept)}
    inside = {(x, y) for y, x in kept.nonzero().tolist()}
    wanted = set()
    for x, y in inside:
        sides = {
            (x - 1, y): ((x, y), (x, y + 1)),
            (x + 1, y): ((x + 1, y), (x + 1, y + 1)),
            (x, y - 1): ((x, y), (x + 1, y)),
            (x, y + 1): ((x, y + 1), (x + 1, y + 1)),
        }
        wanted |= {frozenset(line) for beside, line in sides.items() if beside not in inside}
    assert edges == wanted and len(picture._outline(kept)) == len(wanted)


@pytest.mark.parametrize(("layers", "length"), [(2, 500), (1, 33)])
def test_a_picture_of_every_layer_and_head(layers, length, tmp_path):
    pytest.importorskip("matplotlib")
    q, k, layout, _ = drawn(length)
    views = [TileView.of(q, k, layout, None)] * layers
    path = tmp_path / "kept.png"
    picture.save_grid(views, path, block=BLOCK, length=length, title="a text")
    assert path.read_bytes().startswith(b"\x89PNG")
