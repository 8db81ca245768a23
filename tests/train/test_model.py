"""The model: causal, plain in its parts, and ready to copy from the start."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.errors import ArgumentError
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.train.arms import attention_of_learned
from sparsetile.train.model import KEY_TAPS, QUERY_TAPS, Model, ModelConfig, rope_tables, rotate, shift

SEED = random.SystemRandom().randrange(1 << 32)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("sizes", [(0, 64, 4, 2), (2, 60, 4, 2), (2, 64, 4, 3), (2, 64, 4, 0)])
def test_impossible_sizes_are_named(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ArgumentError, match=r"expected .*got layers"):
        ModelConfig(*sizes)


def test_shift_takes_each_part_from_its_tap() -> None:
    x = torch.arange(1, 9).view(1, 8, 1).expand(1, 8, 4)
    assert shift(x, KEY_TAPS)[0].T.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 0, 0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert torch.equal(shift(x, QUERY_TAPS)[..., 0], x[..., 0])


def test_rope_depends_on_the_difference_of_positions_and_spares_the_rest() -> None:
    torch.manual_seed(SEED)
    tables = tuple(t.double() for t in rope_tables(torch.arange(50), 8, 10000.0))
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 1, 50, 16), (tables[0], tables[1])) for x in (q, k))
    scores = (turned_q @ turned_k.mT)[0, 0]
    assert torch.allclose(scores.diagonal(-7), scores[7, 0].expand(43), atol=1e-5)
    assert torch.equal(turned_q[..., 8:], q[..., 8:].expand(1, 1, 50, 8))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 50))


def test_no_byte_changes_what_is_said_before_it() -> None:
    torch.manual_seed(SEED)
    model = Model(ModelConfig(2, 64, 4, 2))
    tokens = torch.randint(0, 256, (1, 40))
    other = tokens.clone()
    at = random.Random(SEED).randrange(1, 40)
    other[0, at] = (other[0, at] + 1) % 256
    with torch.no_grad():
        a, b = model(tokens, causal), model(other, causal)
    assert torch.equal(a[:, :at], b[:, :at]) and not torch.equal(a[:, at], b[:, at]), SEED


@pytest.mark.parametrize("training", [False, True])
def test_learned_tiles_know_nothing_of_what_comes_after(training: bool) -> None:
    torch.manual_seed(SEED)
    model = Model(ModelConfig(2, 64, 4, 2), AdaptiveConfig(0.6, block_size=16)).train(training)
    attend = attention_of_learned(model)
    tokens = torch.randint(0, 256, (1, 130))
    at = random.Random(SEED).randrange(1, 130)
    other = tokens.clone()
    other[0, at:] = torch.randint(0, 256, (130 - at,))
    other[0, at] = (tokens[0, at] + 1) % 256
    outs = []
    for text in (tokens, other):
        torch.manual_seed(SEED)
        outs.append(model(text, attend))
    assert torch.equal(outs[0][:, :at], outs[1][:, :at]), SEED
    assert not torch.equal(outs[0][:, at], outs[1][:, at])


def test_a_model_that_learns_its_tiles_starts_as_one_that_does_not() -> None:
    models = []
    for adaptive in (None, AdaptiveConfig(0.6, block_size=16)):
        torch.manual_seed(SEED)
        models.append(Model(ModelConfig(2, 64, 4, 2), adaptive))
    plain, learns = (model.state_dict() for model in models)
    assert all(torch.equal(value, learns[name]) for name, value in plain.items())
    assert learns.keys() - plain.keys() == {name for name in learns if name.startswith("learned.")}


def test_every_parameter_gets_a_gradient_within_two_steps() -> None:
    torch.manual_seed(SEED)
    model = Model(ModelConfig(2, 64, 4, 2))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        tokens = torch.randint(0, 256, (2, 33))
        optimiser.zero_grad()
        F.cross_entropy(model(tokens[:, :-1], causal).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_heads_that_share_keys_start_alike_and_not_the_same() -> None:
    torch.manual_seed(SEED)
    layer = Model(ModelConfig(1, 64, 4, 2)).layers[0]
    heads, keys = layer.q.weight.view(4, 16, 64), layer.k.weight.view(2, 16, 64)
    for head in range(4):
        like = F.cosine_similarity(heads[head].flatten(), keys[head // 2].flatten(), dim=0)
        assert 0.9 < like < 0.9999, SEED


def test_bfloat16_is_near_float32_and_weights_stay_float32() -> None:
    torch.manual_seed(SEED)
    model = Model(ModelConfig(1, 64, 4, 2))
    tokens = torch.randint(0, 256, (1, 64))
    with torch.no_grad():
        wide, narrow = model(tokens, causal), model(tokens, causal, torch.bfloat16)
    assert narrow.dtype == torch.float32 and model.head.weight.dtype == torch.float32
    assert (wide - narrow).norm() / wide.norm() < 0.1
