"""Arms: equal tiles, each by its own rule, exact attention over them."""

from __future__ import annotations

import math
import secrets

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import ArgumentError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns.budget import tiles_for
from sparsetile.recall.arms import (
    ARMS,
    Attend,
    Learned,
    Shape,
    attends_of,
    check_tiles,
    mass_in,
    tiles_of,
    true_mass,
)

SHAPE = Shape(length=512, block=16, density=0.2, heads=2, head_dim=16, device=torch.device("cpu"))
CONFIG = AdaptiveConfig(base_sparsity=0.8, block_size=16, form="bilinear", hidden_dim=16, distillation="kept")


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, 512, 16, generator=generator) for _ in range(3))
    return q, k, v


def made(arm: str) -> Attend:
    return attends_of(arm, SHAPE, 1, CONFIG)[0]


def over(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Dense attention under the mask of the tiles ``kept`` and of causality."""
    grid = torch.zeros(2, 2, 32, 33, dtype=torch.bool)
    grid.scatter_(-1, torch.where(kept < 0, 32, kept).long().expand(2, 2, -1, -1), True)
    mask = grid[..., :32].repeat_interleave(16, 2).repeat_interleave(16, 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & torch.ones(512, 512).tril().bool())


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "dense"])
def test_every_row_keeps_its_budget_and_attends_to_it(arm: str) -> None:
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    attend = made(arm).eval()
    q, k, v = drawn(seed)
    out = attend(q, k, v)
    assert attend.kept is not None, seed
    budget = tiles_for(0.2, torch.arange(32) + 1)
    assert ((attend.kept >= 0).sum(-1) == budget).all(), seed
    # The own tile is always there, and none of the future.
    own = torch.arange(32)[:, None]
    assert (attend.kept == own).any(-1).all() and (attend.kept <= own).all(), seed
    if not isinstance(attend, Learned):  # whose bias has its own tests
        torch.testing.assert_close(out, over(q, k, v, attend.kept), atol=2e-5, rtol=1e-4)
    check_tiles(arm, attend)


def test_the_oracle_picks_the_tile_of_the_answer_and_moba_the_best_mean() -> None:
    seed = secrets.randbits(32)
    q, k, v = drawn(seed)
    q, k = 0.1 * q, 0.1 * k
    places = torch.randint(16, (2, 2, 15), generator=torch.Generator().manual_seed(seed)) * 16 + 5
    # The first query of tiles 17 … 31 is like one key, somewhere in the first half.
    unlike = torch.eye(16)[torch.arange(15)] * 8
    queries = torch.arange(17, 32) * 16
    for batch in range(2):
        for head in range(2):
            q[batch, head, queries] = unlike
            for number, place in enumerate(places[batch, head].tolist()):
                k[batch, head, place + number % 3] += unlike[number]
    tile = (places // 16)[..., None]
    for arm in ("oracle", "moba"):
        attend = made(arm)
        attend(q, k, v)
        assert attend.kept is not None
        assert (attend.kept[:, :, 17:] == tile).any(-1).all(), (arm, seed)
    mass = true_mass(q, k, 16, 17, 32)
    assert (mass.gather(-1, tile) > 0.5).all(), seed


def test_true_mass_is_that_of_dense_attention() -> None:
    seed = secrets.randbits(32)
    q, k, _ = drawn(seed)
    logits = q.double() @ k.double().mT / 4 + torch.full((512, 512), -math.inf).triu(1)
    dense = logits.softmax(-1)[:, :, ::16].unflatten(-1, (32, 16)).sum(-1)
    torch.testing.assert_close(true_mass(q, k, 16, 3, 20).double(), dense[:, :, 3:20], atol=1e-5, rtol=1e-4)
    kept = torch.tensor([4, 0, -1, -1]).expand(2, 2, 17, -1)
    expected = dense[:, :, 3:20, 0] + dense[:, :, 3:20, 4]
    torch.testing.assert_close(mass_in(dense[:, :, 3:20], kept), expected)


def test_tiles_of_a_layout_are_its_rows() -> None:
    chosen = torch.tensor([[0, -1, -1], [1, 0, -1], [-1, -1, -1], [3, 1, 0]])
    layout = BlockLayout.from_topk(chosen.expand(2, 1, -1, -1), 64, 64, 16, True)
    expected = torch.tensor([[0, -1, -1], [0, 1, -1], [-1, -1, -1], [0, 1, 3]])
    assert torch.equal(tiles_of(layout), expected.expand(2, 1, -1, -1))


def test_the_untrained_scorer_is_frozen_random_and_quiet() -> None:
    (learned,), (untrained,) = (attends_of(arm, SHAPE, 1, CONFIG) for arm in ("learned", "untrained"))
    assert isinstance(learned, Learned) and isinstance(untrained, Learned)
    q, k, v = (x.requires_grad_() for x in drawn(secrets.randbits(32)))
    for attend in (learned, untrained):
        attend(q, k, v).square().sum().backward()
    assert all(p.grad is not None for p in learned.parameters())
    assert not any(p.requires_grad for p in untrained.parameters())
    assert untrained.extra_loss() is None and learned.extra_loss() is not None
    assert learned.module.config.exploration and not untrained.module.config.exploration
    scorer = untrained.module.scorer
    assert not torch.equal(scorer.w_q, scorer.w_k)
    learned.explore(False)
    untrained.explore(True)
    assert not learned.module.config.exploration and not untrained.module.config.exploration


def test_random_tiles_stay_the_same_and_differ_by_seed() -> None:
    torch.manual_seed(1)
    first = made("random").kept
    torch.manual_seed(1)
    again = made("random").kept
    other = made("random").kept
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"one of dense, oracle, .* Did you mean 'learned'"):
        attends_of("lerned", SHAPE, 1, CONFIG)
    attend = made("local")
    assert attend.kept is not None
    attend.kept = attend.kept.clone()
    attend.kept[0, 0, 20, 1] = -1
    with pytest.raises(ArgumentError, match="'local': expected 4 tiles in row 20"):
        check_tiles("local", attend)
