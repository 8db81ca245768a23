"""One arm's training: it learns, it is the same every time, and a resumed run is the run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetile.errors import CheckpointError
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.train.arms import Arm
from sparsetile.train.checkpoint import load_checkpoint
from sparsetile.train.data import Corpus, Planting
from sparsetile.train.loop import Settings, Trainer, train
from sparsetile.train.model import ModelConfig

SEED = random.SystemRandom().randrange(1 << 32)
PATTERN = Arm("pattern", "Local(16) | Strided(32, head_shift=16)")
LEARNED = Arm(
    "adaptive",
    "adaptive(…)",
    AdaptiveConfig(0.6, learnable_temperature=True, block_size=16, distillation="kept"),
)
SETTINGS = Settings(
    model=ModelConfig(1, 32, 2, 1),
    context=256,
    batch=2,
    block=16,
    lr=0.01,
    seed=SEED,
    device="cpu",
    dtype="fp32",
    planting=Planting(16, 21, 0.25),
    held_out_sequences=3,
    steps=20,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    text = torch.frombuffer(
        bytearray(b"the quick brown fox jumps over the lazy dog. " * 200), dtype=torch.uint8
    )
    return Corpus(text[:8000], text[8000:], "a fox", "fox")


def run(settings: Settings, corpus: Corpus, arm: Arm = PATTERN, **more: Any) -> dict[str, Any]:
    result = train(arm, settings, corpus, lambda event: None, **more)
    for part in (result, *result["checks"]):
        part.pop("seconds")
    for name in ("tokens_per_second", "peak_memory"):
        result.pop(name)
    result["losses"] = [(step, bits) for step, _, bits in result["losses"]]
    return result


@pytest.mark.parametrize("arm", [PATTERN, LEARNED], ids=["pattern", "adaptive"])
def test_two_halves_with_a_resume_between_are_the_whole_bit_by_bit(
    corpus: Corpus, tmp_path: Path, arm: Arm
) -> None:
    whole = run(replace(SETTINGS, checkpoint=str(tmp_path / "whole.pt")), corpus, arm)
    parts = replace(SETTINGS, checkpoint=str(tmp_path / "parts.pt"))
    # The first half makes one held-out check more, at its end, and saves before that.
    run(parts, corpus, arm, stop_after=10)
    torch.manual_seed(SEED + 1)
    resumed = run(replace(parts, resume=True, steps=None), corpus, arm)
    assert resumed == whole
    a, b = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for number, state in a["optimiser"]["state"].items():
        assert all(torch.equal(state[name], b["optimiser"]["state"][number][name]) for name in state)


def test_runs_of_one_seed_are_equal_and_of_another_not(corpus: Corpus) -> None:
    short = replace(SETTINGS, steps=4)
    first = run(short, corpus)
    assert run(short, corpus) == first
    assert run(replace(short, seed=SEED + 1), corpus)["losses"] != first["losses"]


def test_every_arm_sees_the_same_data_from_the_same_start(corpus: Corpus) -> None:
    arms = [PATTERN, Arm("dense", "dense"), Arm("window alone", "Local(16)"), LEARNED]
    trainers = [Trainer(arm, SETTINGS, corpus) for arm in arms]
    first = trainers[0].model.state_dict()
    for trainer in trainers[1:]:
        theirs = trainer.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in first.items())
        ours, theirs = trainer.sequences.training(5, 2), trainers[0].sequences.training(5, 2)
        assert torch.equal(ours.tokens, theirs.tokens)


def test_training_lowers_the_held_out_bits(corpus: Corpus) -> None:
    events: list[dict[str, Any]] = []
    result = train(PATTERN, replace(SETTINGS, steps=40), corpus, events.append)
    assert result["held_out"]["text"] < 2.5 < 4.0 < result["checks"][0]["text"], SEED
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 41))
    assert steps[-1]["progress"] == 1.0 and steps[-1]["tokens_per_second"] > 0
    assert len([event for event in events if event["event"] == "check"]) == 8 == len(result["checks"])
    assert result["steps"] == 40 and 0 < result["density"] < 1


@pytest.mark.parametrize("distillation", ["none", "kept", "sampled"])
def test_what_chooses_tiles_is_trained_and_judged_without_noise(corpus: Corpus, distillation: str) -> None:
    assert LEARNED.adaptive is not None
    arm = replace(LEARNED, adaptive=replace(LEARNED.adaptive, distillation=distillation))
    trainer = Trainer(arm, replace(SETTINGS, model=ModelConfig(2, 32, 2, 1)), corpus)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    moved = {
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved >= {name for name in before if name.startswith("learned.")}, SEED
    # The generator moves between the two: nothing is drawn for held-out text.
    assert trainer.held_out(2) == trainer.held_out(2)
    assert all(module.training for module in trainer.learned)
    # 16 rows of at most 16 tiles: ⌊0.4·t + ½⌋ of them, at least one.
    assert trainer.density() == pytest.approx(sum(max(1, int(0.4 * t + 0.5)) for t in range(1, 17)) / 136)


def test_a_trial_step_draws_nothing(corpus: Corpus) -> None:
    trainer = Trainer(LEARNED, SETTINGS, corpus)
    state = torch.get_rng_state()
    trainer._try_step()
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_time_ends_by_the_clock_of_training(corpus: Corpus) -> None:
    result = train(PATTERN, replace(SETTINGS, steps=None, seconds=0.3), corpus, lambda event: None)
    assert result["seconds"] >= 0.3
    assert result["losses"][-2][1] < 0.3 if result["steps"] > 1 else True


def test_held_out_bits_of_an_untrained_guess_are_eight_where_nothing_is_known(corpus: Corpus) -> None:
    trainer = Trainer(PATTERN, SETTINGS, corpus)
    with torch.no_grad():
        trainer.model.head.weight.zero_()
    found = trainer.held_out(2)
    assert found.pop("copy_start") == pytest.approx([8.0] * 4)
    assert found == pytest.approx({"text": 8.0, "source": 8.0, "copy": 8.0, "copy_after_start": 8.0})
    assert set(Trainer(PATTERN, replace(SETTINGS, planting=None), corpus).held_out(1)) == {"text"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": ModelConfig(1, 64, 2, 1)}, "width"),
        ({"context": 192}, "context"),
        ({"seed": SEED + 1}, "seed"),
        ({"lr": 0.02}, "lr"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    corpus: Corpus, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    saved = replace(SETTINGS, steps=1, checkpoint=str(tmp_path / "run.pt"))
    Trainer(PATTERN, saved, corpus).save(tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=rf"run\.pt: expected .*{named}"):
        run(replace(saved, resume=True, **change), corpus)
    with pytest.raises(CheckpointError, match="attention dense"):
        run(replace(saved, resume=True), corpus, Arm("dense", "dense"))
    with pytest.raises(CheckpointError, match=r"expected attention adaptive.*got attention Local\(16\)"):
        run(replace(saved, resume=True), corpus, LEARNED)


def test_a_loss_that_is_no_number_ends_the_run(corpus: Corpus) -> None:
    trainer = Trainer(PATTERN, SETTINGS, corpus)
    with torch.no_grad():
        trainer.model.embed.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no longer finite at step 1"):
        trainer.run(lambda event: None)
