"""The stream of easy and hard inputs: all votes together tell the answer, and nothing else does."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sparsetile.errors import ArgumentError
from sparsetile.recall.mixed_task import MixedBatch, MixedTask

TASK = MixedTask(tiles=16, block=16, questions=8, votes=5, keys=12, values=6)


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
