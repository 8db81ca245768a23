"""Block-MQAR: what is asked can be answered, from the right place, and from nowhere else."""

from __future__ import annotations

import secrets

import pytest
import torch
from torch import Tensor

from sparsetile.errors import ArgumentError
from sparsetile.recall.task import Batch, Task

TASK = Task(length=512, block=16, pairs=24, keys=40, values=8)


@pytest.fixture
def drawn() -> tuple[Batch, int]:
    seed = secrets.randbits(32)
    return TASK.sample(16, torch.Generator().manual_seed(seed)), seed


def queries_of(tokens: Tensor) -> Tensor:
    return tokens[:, TASK.length // 2 :: TASK.block]


def test_the_answer_follows_the_key_that_is_asked_for(drawn: tuple[Batch, int]) -> None:
    (tokens, answers, places), seed = drawn
    for row, asked, answer, place in zip(tokens, queries_of(tokens), answers, places, strict=True):
        first = row[: TASK.length // 2].tolist()
        for key, symbol, at in zip(asked.tolist(), answer.tolist(), place.tolist(), strict=True):
            assert first.count(key) == 1, seed
            assert first.index(key) + 1 == at < TASK.length // 2 and first[at] == symbol, seed


def test_nothing_else_tells_the_answer(drawn: tuple[Batch, int]) -> None:
    """Keys occur in pairs and queries alone, no key is asked for twice, answers look like noise."""
    (tokens, answers, _), seed = drawn
    half = TASK.length // 2
    assert ((tokens[:, :half] < TASK.keys).sum(-1) == TASK.pairs).all(), seed
    rest = tokens[:, half:].unflatten(-1, (-1, TASK.block))
    assert (rest[..., 0] < TASK.keys).all() and (rest[..., 1:] >= TASK.keys).all(), seed
    assert all(len(set(row)) == TASK.queries for row in queries_of(tokens).tolist()), seed
    assert ((answers >= TASK.keys) & (answers < TASK.symbols)).all(), seed
    # Guessing the commonest answer is right about 1/8 of the time: 256 answers, five standard deviations.
    assert answers.flatten().bincount().max() < 32 + 5 * 5.3, seed


def test_distances_are_random_and_say_nothing() -> None:
    seed = secrets.randbits(32)
    batch = TASK.sample(400, torch.Generator().manual_seed(seed))
    tile = (batch.places // TASK.block).double()
    # Each query's answer lies anywhere in the first half: 16 tiles, 400 draws for each of 16 queries.
    assert (tile.mean(0) - 7.5).abs().max() < 5 * 4.61 / 20, seed
    counts = tile.flatten().long().bincount(minlength=TASK.queries)
    assert len(counts) == 16 and counts.min() > 300 and counts.max() < 500, seed
    assert set((batch.places % TASK.block).flatten().tolist()) == set(range(TASK.block)), seed


def test_a_stream_is_its_seed() -> None:
    first, again, other = (TASK.sample(2, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block", 24, "one of 16, 32, 64, 128"),
        ("length", 500, "a multiple of 2 · block = 32"),
        ("pairs", 8, "16 (one for each query) to 128"),
        ("pairs", 200, "16 (one for each query) to 128"),
        ("keys", 20, "at least pairs = 24"),
        ("values", 1, "at least 2"),
    ],
)
def test_sizes_that_do_not_fit(name: str, value: int, said: str) -> None:
    sizes = {"length": 512, "block": 16, "pairs": 24, "keys": 40, "values": 8} | {name: value}
    with pytest.raises(ArgumentError) as caught:
        Task(**sizes)
    assert said in str(caught.value) and name in str(caught.value)
