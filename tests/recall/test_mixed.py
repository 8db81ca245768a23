"""Easy and hard inputs: all votes together tell the answer, and what is counted is what was kept."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsetile.errors import ArgumentError
from sparsetile.recall.mixed import (
    TOP_P,
    Arm,
    Asked,
    MixedBatch,
    MixedSettings,
    MixedTask,
    Reader,
    measured,
    run,
    start_of,
)
from sparsetile.recall.model import ModelConfig

TASK = MixedTask(tiles=16, block=16, questions=8, votes=5, keys=12, values=6)
SETTINGS = MixedSettings(
    task=replace(TASK, questions=4),
    model=ModelConfig(1, 16, 1),
    p=0.9,
    batch=4,
    steps=3,
    lr=0.01,
    scorer_lr=0.01,
    distillation="kept",
    distillation_weight=1.0,
    explored=0.5,
    start_batch=4,
    start_steps=3,
    start_lr=0.01,
    held_out=8,
    device="cpu",
)


@pytest.fixture
def drawn() -> tuple[MixedBatch, int]:
    seed = secrets.randbits(32)
    return TASK.sample(32, torch.Generator().manual_seed(seed)), seed


def pairs_of(memory: list[int]) -> list[tuple[int, int, int]]:
    """(tile, key, value) of every key in a memory."""
    return [(at // TASK.block, x, memory[at + 1]) for at, x in enumerate(memory) if x < TASK.keys]


def test_the_answer_is_what_most_votes_say(drawn: tuple[MixedBatch, int]) -> None:
    batch, seed = drawn
    assert batch.hard.tolist() == [False, True] * 16
    for tokens, answers, hard, tiles in zip(*batch, strict=True):
        memory, asked = tokens[: TASK.memory].tolist(), tokens[TASK.memory :: TASK.block].tolist()
        assert len(set(asked)) == TASK.questions, seed
        for key, answer, where in zip(asked, answers.tolist(), tiles.tolist(), strict=True):
            found = [(tile, value) for tile, symbol, value in pairs_of(memory) if symbol == key]
            assert {tile for tile, _ in found} == set(where) - {-1}, seed
            votes = Counter(value for _, value in found).most_common()
            assert votes[0][0] == answer, seed
            # In tiles of their own, and a majority of one: to miss a tile may be to be misled.
            assert [count for _, count in votes] == ([3, 2] if hard else [1]), seed
            assert len(set(where)) == (5 if hard else 2), seed


def test_nothing_but_the_votes_tells_the_answer(drawn: tuple[MixedBatch, int]) -> None:
    """Questions hold their key alone; both kinds have as many pairs in a tile; answers are uniform."""
    (tokens, answers, _, _), seed = drawn
    asked = tokens[:, TASK.memory :].unflatten(1, (-1, TASK.block))
    assert (asked == asked[..., :1]).all() and (asked < TASK.keys).all(), seed
    memory = tokens[:, : TASK.memory]
    keys, values = memory < TASK.keys, (memory >= TASK.keys) & (memory < TASK.symbols - 1)
    assert torch.equal(keys[:, :-1], values[:, 1:]), seed
    # Three questions a round fill 15 of 16 tiles; the third round has two.
    load = keys.unflatten(1, (-1, TASK.block)).sum(-1)
    assert (load.sum(1) == TASK.questions * TASK.votes).all() and load.max() <= 3, seed
    assert ((answers >= TASK.keys) & (answers < TASK.symbols - 1)).all(), seed
    # 256 answers of 6 values: five standard deviations.
    assert answers.flatten().bincount().max() < 256 / 6 + 5 * 6.0, seed


def test_places_are_random() -> None:
    seed = secrets.randbits(32)
    batch = TASK.sample(400, torch.Generator().manual_seed(seed))
    first = batch.tiles[..., 0].double()
    # 400 draws of 16 tiles for each question, easy or hard: standard deviation 4.61.
    assert (first.mean(0) - 7.5).abs().max() < 5 * 4.61 / 20, seed
    inside = (batch.tokens[:, : TASK.memory] < TASK.keys).nonzero()[:, 1] % TASK.block
    counts = inside.bincount(minlength=TASK.block)
    assert (counts[1::2] == 0).all() and counts[::2].min() > 0.8 * 400 * 40 / 8, seed


def test_a_stream_is_its_seed() -> None:
    first, again, other = (TASK.sample(2, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block", 24, "one of 16, 32, 64, 128"),
        ("votes", 4, "an odd number ≥ 3"),
        ("tiles", 9, "at least 2 · votes = 10"),
        ("questions", 17, "1 to 16"),
        ("keys", 8, "above questions = 8"),
        ("values", 1, "at least 2"),
    ],
)
def test_sizes_that_do_not_fit(name: str, value: int, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        replace(TASK, **{name: value})
    assert said in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"), [({"batch": 3}, "even"), ({"held_out": 0}, "even"), ({"p": 1.5}, "share of mass")]
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
    steps: list[int] = []
    runs = [run(arm, seed, SETTINGS, start, lambda e: steps.append(e["step"])) for arm in (TOP_P, TOP_P, 2)]
    first, again, other = ({k: v for k, v in r.items() if k != "seconds"} for r in runs)
    assert first == again and first != other, seed
    assert steps == [3] * 3 and first["arm"] == TOP_P and first["seed"] == seed
    dense = run("dense", seed, SETTINGS, start, lambda e: None)
    assert dense["tiles"]["both"] == 16 and dense["found"] == {"easy": 1.0, "hard": 1.0, "both": 1.0}
    for result in (*runs, dense):
        assert all(0 <= x <= 1 for name in ("accuracy", "found") for x in result[name].values())
