"""Training and measuring one arm: equal starts, equal data, what is measured is so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import ArgumentError
from sparsetile.recall.arms import attends_of
from sparsetile.recall.loop import CHECKS, Diverged, Settings, accuracy, measured, run, start_of
from sparsetile.recall.model import Model, ModelConfig
from sparsetile.recall.task import Task

SETTINGS = Settings(
    task=Task(length=256, block=16, pairs=8, keys=16, values=4),
    model=ModelConfig(layers=1, width=32, heads=1),
    density=0.2,
    batch=2,
    steps=8,
    lr=0.001,
    short_length=64,
    short_batch=16,
    short_steps=120,
    short_lr=0.01,
    adaptive=AdaptiveConfig(form="bilinear", hidden_dim=32, distillation="kept"),
    scorer_lr=0.003,
    distillation_weight=1.0,
    explored=0.5,
    held_out=16,
    device="cpu",
    dtype="fp32",
)


@pytest.fixture(scope="module")
def start() -> dict[str, torch.Tensor]:
    return start_of(SETTINGS, 3)


def test_settings_of_the_arms_agree() -> None:
    assert SETTINGS.adaptive.block_size == 16 and SETTINGS.adaptive.density == 0.2
    short = SETTINGS.short_task()
    assert (short.length, short.pairs, short.keys) == (64, 2, 16)
    with pytest.raises(ArgumentError, match="a multiple of 2 · block"):
        replace(SETTINGS, short_length=40)


def test_dense_attention_over_short_sequences_recalls_at_full_length(start: dict[str, torch.Tensor]) -> None:
    again = start_of(replace(SETTINGS, short_steps=1), 3)
    assert any(not torch.equal(again[name], start[name]) for name in start)
    events: list[dict[str, Any]] = []
    found = run("dense", 3, SETTINGS, start, events.append)
    assert found["checks"][0]["accuracy"] > 0.9 and found["accuracy"] > 0.9
    assert found["recall"] == found["within"] == found["density"] == 1.0
    assert [check["step"] for check in found["checks"]] == list(range(CHECKS + 1))
    assert [e["step"] for e in events if e["event"] == "step"] == [8]


def test_arms_start_alike_and_what_is_kept_bounds_what_is_right(start: dict[str, torch.Tensor]) -> None:
    arms = {arm: run(arm, 3, SETTINGS, start, lambda event: None) for arm in ("learned", "moba", "local")}
    # W = I: the first choices of the learned arm are MoBA's, and its bias hardly moves a sharp answer.
    first = {arm: found["checks"][0]["accuracy"] for arm, found in arms.items()}
    assert abs(first["learned"] - first["moba"]) < 0.15 and first["moba"] > first["local"]
    for found in arms.values():
        # Beyond what is within reach only guesses are right: a quarter, and some luck.
        assert found["accuracy"] < found["within"] + 0.6 * (1 - found["within"])
        assert 0.0 <= found["recall"] <= 1.0 + 1e-6 and 0.15 < found["density"] < 0.25


def test_accuracy_is_the_same_measured_alone(start: dict[str, torch.Tensor]) -> None:
    model = Model(SETTINGS.model, SETTINGS.task.symbols)
    model.load_state_dict(start)
    attends = attends_of("oracle", SETTINGS.shape(256), 1, SETTINGS.adaptive)
    whole = measured(model, attends, SETTINGS, 3, 8)
    assert accuracy(model, attends, SETTINGS, 3, 8) == pytest.approx(whole["accuracy"])
    assert whole["recall"] == pytest.approx(1.0) and attends[0].training


def test_a_loss_that_is_not_finite_is_an_error(start: dict[str, torch.Tensor]) -> None:
    broken = {name: torch.full_like(value, torch.nan) for name, value in start.items()}
    with pytest.raises(Diverged, match=r"the loss of local .* Lower --lr"):
        run("local", 3, SETTINGS, broken, lambda event: None)
