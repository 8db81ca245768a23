"""Arms on easy and hard inputs: what is counted is what was kept, and runs of a seed repeat."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsetile.errors import ArgumentError
from sparsetile.recall.mixed import TOP_P, Arm, Asked, MixedSettings, Reader, measured, run, start_of
from sparsetile.recall.mixed_task import MixedTask
from sparsetile.recall.model import ModelConfig

SETTINGS = MixedSettings(
    task=MixedTask(tiles=16, block=16, questions=4, votes=5, keys=12, values=6),
    model=ModelConfig(1, 16, 1),
    p=0.9,
    batch=4,
    steps=3,
    lr=0.01,
    scorer_lr=0.01,
    distillation="kept",
    distillation_weight=1.0,
    sparsity_weight=0.0,
    mean_tiles=4,
    explored=0.5,
    start_batch=4,
    start_steps=3,
    start_lr=0.01,
    held_out=8,
    device="cpu",
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 3}, "even"),
        ({"held_out": 0}, "even"),
        ({"p": 1.5}, "share of mass"),
        ({"sparsity_weight": -1.0}, "sparsity_weight: expected a number ≥ 0"),
        ({"mean_tiles": 17}, "mean_tiles: expected a number of tiles from 1 to 16"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        replace(SETTINGS, **options)


@pytest.mark.parametrize("arm", [0, 17, "top-k"])
def test_arms_that_there_are_not(arm: Arm) -> None:
    with pytest.raises(ArgumentError, match="dense, top_p, or a number of tiles from 1 to 16"):
        SETTINGS.config_of(arm)


@pytest.mark.parametrize("arm", [TOP_P, 3])
def test_what_is_counted_is_what_was_kept(arm: Arm) -> None:
    """Tiles and the share of votes found, against the module's own indices, one by one."""
    seed, task = secrets.randbits(31), SETTINGS.task
    torch.manual_seed(seed)
    model = Reader(SETTINGS.model, task.symbols)
    attend = Asked(task, SETTINGS.model, SETTINGS.config_of(arm)).eval()
    batch = task.sample(4, torch.Generator().manual_seed(3 * seed + 2))
    with torch.no_grad():
        model(batch.tokens, attend)
    assert attend.module is not None and attend.module._last is not None
    kept, chosen = attend.kept(4, torch.device("cpu")), attend.module._last.chosen
    tiles: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, list[float]] = {False: [], True: []}
    for sequence, hard in enumerate(batch.hard.tolist()):
        for question in range(task.questions):
            mine = set(chosen[sequence, 0, question].tolist()) - {-1}
            assert mine == set(kept[sequence, 0, question].nonzero()[:, 0].tolist()), seed
            wanted = set(batch.tiles[sequence, question].tolist()) - {-1}
            tiles[hard].append(len(mine))
            found[hard].append(len(mine & wanted) / len(wanted))
    result = measured(model, attend, replace(SETTINGS, held_out=4), seed)
    for hard, kind in ((False, "easy"), (True, "hard")):
        assert result["tiles"][kind] == pytest.approx(sum(tiles[hard]) / len(tiles[hard])), seed
        assert result["found"][kind] == pytest.approx(sum(found[hard]) / len(found[hard])), seed
    assert result["tiles"]["both"] == pytest.approx((result["tiles"]["easy"] + result["tiles"]["hard"]) / 2)
    if arm == 3:
        assert result["tiles"]["easy"] == result["tiles"]["hard"] == 3


def test_runs_of_a_seed_are_the_same_and_of_arms_are_not() -> None:
    seed = secrets.randbits(16)
    start = start_of(SETTINGS, seed)
    # Steered to another number of tiles, it is another run.
    steered = replace(SETTINGS, sparsity_weight=10.0, mean_tiles=1)
    steps: list[int] = []
    runs = [run(arm, seed, SETTINGS, start, lambda e: steps.append(e["step"])) for arm in (TOP_P, TOP_P, 2)]
    first, again, other = ({k: v for k, v in r.items() if k != "seconds"} for r in runs)
    assert first == again and first != other, seed
    assert steps == [3] * 3 and first["arm"] == TOP_P and first["seed"] == seed
    assert run(TOP_P, seed, steered, start, lambda e: None)["tiles"] != first["tiles"], seed
    dense = run("dense", seed, SETTINGS, start, lambda e: None)
    assert dense["tiles"]["both"] == 16 and dense["found"] == {"easy": 1.0, "hard": 1.0, "both": 1.0}
    for result in (*runs, dense):
        assert all(0 <= x <= 1 for name in ("accuracy", "found") for x in result[name].values())
