"""Arms: what a comparison trains, and that each attends what it says."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from sparsetile.errors import PatternError
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.patterns import Causal, parse_pattern
from sparsetile.train.arms import (
    Arm,
    attention_of,
    attention_of_learned,
    compared,
    default_pattern,
    named,
    window_of,
)
from sparsetile.train.model import Model, ModelConfig

SEED = random.SystemRandom().randrange(1 << 32)
MODEL = ModelConfig(1, 64, 4, 2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("context", [1000, 4096, 32768, 131072])
def test_the_default_pattern_reaches_everything_in_one_layer(context: int) -> None:
    heads, block = 4, 64
    pattern = (parse_pattern(default_pattern(context, heads, block)) & Causal()).resolve(block, block)
    q = torch.tensor([context - 1, context // 2, 130])
    k = torch.arange(context)
    reached = torch.stack([pattern.allows(q[:, None], k, head) for head in range(heads)]).any(0)
    assert torch.equal(reached, k <= q[:, None])


def test_of_eight_heads_two_reach_each_tile_at_a_quarter_of_the_cost() -> None:
    context, block = 32768, 128
    pattern = (parse_pattern(default_pattern(context, 8, block)) & Causal()).resolve(block, block)
    k = torch.arange(0, context - 1024, block)
    reached = torch.stack([pattern.allows(torch.tensor(context - 1), k, head) for head in range(8)])
    assert (reached.sum(0) == 2).all()
    model = ModelConfig(1, 64, 8, 2)
    _, density = attention_of(Arm("pattern", default_pattern(context, 8, block)), model, context, block, CPU)
    assert density < 0.27


def test_a_comparison_is_the_pattern_dense_and_its_window() -> None:
    arms = compared("Strided(256) | Local(40, 3) | Local(20)", 4096, 4, 64)
    assert [arm.attention for arm in arms] == [
        "Strided(256) | Local(40, 3) | Local(20)",
        "dense",
        "Local(40)",
    ]
    assert compared("dense", 4096, 4, 64)[0].attention == default_pattern(4096, 4, 64)
    assert window_of(parse_pattern("(Global(3) | Local(7)) & Causal()")) == 7
    with pytest.raises(PatternError, match="Local"):
        compared("Global(16)", 4096, 4, 64)


def test_arms_by_name_are_those_of_a_comparison_and_one_that_learns() -> None:
    config = AdaptiveConfig(0.75, block_size=64, distillation="kept")
    fixed = compared("Local(40) | Strided(256)", 4096, 4, 64)
    arms = named(["adaptive", "window", "dense", "pattern"], "Local(40) | Strided(256)", 4096, 4, 64, config)
    assert [arms[3], arms[2], arms[1]] == fixed and all(arm.adaptive is None for arm in fixed)
    assert arms[0] == Arm("adaptive", "adaptive(base_sparsity=0.75, distillation='kept')", config)
    # A window needs a Local part, a pattern alone does not.
    assert named(["pattern"], "Global(16)", 4096, 4, 64, config) == [Arm("pattern", "Global(16)")]
    assert named(["pattern"], "dense", 4096, 4, 64, config)[0].attention == default_pattern(4096, 4, 64)
    with pytest.raises(PatternError, match="Local"):
        named(["window"], "Global(16)", 4096, 4, 64, config)
    with pytest.raises(PatternError):
        named(["pattern"], "Local(", 4096, 4, 64, config)


def test_each_layer_that_learns_has_an_attention_of_its_own() -> None:
    torch.manual_seed(SEED)
    model = Model(ModelConfig(2, 64, 4, 2), AdaptiveConfig(0.6, block_size=16)).eval()
    q, k, v = torch.randn(1, 4, 130, 16), *torch.randn(2, 1, 2, 130, 16)
    outs = [attend(q, k, v) for attend in attention_of_learned(model)]
    for out, learned in zip(outs, model.learned, strict=True):
        want = learned(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        assert torch.equal(out, want.transpose(1, 2)), SEED
    assert not torch.equal(*outs)


@pytest.mark.parametrize("text", ["Local(20) | Strided(64, head_shift=16)", "Local(33)", "dense"])
def test_an_arm_attends_what_it_says(text: str) -> None:
    torch.manual_seed(SEED)
    length = random.Random(SEED).randrange(65, 200)
    attend, density = attention_of(Arm("pattern", text), MODEL, length, 16, CPU)
    q = torch.randn(2, 4, length, 16)
    k, v = torch.randn(2, 2, 2, length, 16)
    positions = torch.arange(length)
    mask = (positions <= positions[:, None]).expand(4, length, length)
    if text != "dense":
        pattern = parse_pattern(text).resolve(16, 16)
        mask = mask & torch.stack([pattern.allows(positions[:, None], positions, head) for head in range(4)])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(attend(q, k, v), expected, atol=2e-5), SEED
    tiles = F.pad(mask, (0, -length % 16, 0, -length % 16)).unflatten(1, (-1, 16)).unflatten(3, (-1, 16))
    rows = -(-length // 16)
    assert density == pytest.approx(tiles.any(4).any(2).sum().item() / (4 * rows * (rows + 1) / 2))


@pytest.mark.parametrize("text", ["Local(", "Local(-1)", "print(1)", "Strided(100)", ""])
def test_a_bad_pattern_is_named(text: str) -> None:
    with pytest.raises(PatternError):
        attention_of(Arm("pattern", text), MODEL, 256, 16, CPU)
