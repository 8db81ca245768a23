"""The model of the experiment."""

from __future__ import annotations

import secrets

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.errors import ArgumentError
from sparsetile.recall.model import Model, ModelConfig
from sparsetile.recall.task import Task

TASK = Task(length=128, block=16, pairs=4, keys=8, values=4)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_answers_depend_on_the_past_alone() -> None:
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    model = Model(ModelConfig(layers=2, width=16, heads=2), TASK.symbols).double()
    tokens = torch.randint(TASK.symbols, (2, 128))
    logits = model(tokens, TASK, (dense, dense), torch.float64)
    assert logits.shape == (2, 4, 12)
    changed = tokens.clone()
    changed[:, 64 + 16 + 1 :] = torch.randint(TASK.symbols, (2, 47))
    after = model(changed, TASK, (dense, dense), torch.float64)
    assert torch.equal(after[:, :2], logits[:, :2]), seed
    assert not torch.equal(after[:, 2:], logits[:, 2:]), seed


def test_keys_are_of_the_token_before() -> None:
    torch.manual_seed(0)
    model = Model(ModelConfig(layers=1, width=16, heads=1), TASK.symbols)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return v

    tokens = torch.randint(TASK.symbols, (1, 128))
    changed = tokens.clone()
    changed[0, 40] = (tokens[0, 40] + 1) % TASK.symbols
    for x in (tokens, changed):
        model(x, TASK, (attend,))
    moved = [(a != b).any(-1).flatten().nonzero().flatten().tolist() for a, b in zip(*seen, strict=True)]
    assert moved == [[40], [41], [40]]


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="width a multiple of 8·heads"):
        ModelConfig(layers=1, width=24, heads=2)
    with pytest.raises(ArgumentError, match="layers 0"):
        ModelConfig(layers=0, width=16, heads=2)
