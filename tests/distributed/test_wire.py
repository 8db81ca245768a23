"""Messages come out as they went in, in exactly the bytes that were promised."""

import pytest
import torch

from sparsetile.distributed.wire import BLOCK, Message, kept_within


def draw(shards, length, kept):
    places = torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(shards)])
    return torch.randn(shards, kept).bfloat16(), places


@pytest.mark.parametrize("trial", range(12))
def test_round_trip(trial):
    seed = torch.seed()
    shards = int(torch.randint(1, 5, ()))
    length = int(torch.randint(1, 5 * BLOCK, ()))
    kept = length if trial == 0 else int(torch.randint(1, length + 1, ()))
    tensors = int(torch.randint(0, 40, ()))
    form = Message(length, kept, tensors)
    values, places = draw(shards, length, kept)
    codes = torch.randint(0, 3, (tensors,))
    messages = form.pack(values, places, codes if tensors else None)
    assert messages.dtype == torch.uint8 and messages.shape == (shards, form.nbytes), seed
    numbers, found, states = form.unpack(messages)
    assert torch.equal(numbers, values.float()) and torch.equal(found, places), seed
    assert torch.equal(states, codes.expand(shards, -1)), seed


def test_full_and_empty_blocks():
    """A block of which all 255 entries are sent, between blocks of which none is."""
    form = Message(3 * BLOCK, BLOCK)
    places = torch.arange(BLOCK, 2 * BLOCK)[None]
    values = torch.randn(1, BLOCK).bfloat16()
    assert torch.equal(form.unpack(form.pack(values, places))[1], places)


@pytest.mark.parametrize("trial", range(20))
def test_kept_fills_the_budget_and_no_more(trial):
    seed = torch.seed()
    length, tensors = int(torch.randint(1, 10**6, ())), int(torch.randint(1, 40, ()))
    budget = int(torch.randint(0, 4 * length + 1, ()))

    def weight(kept):
        return Message(length, kept, tensors).nbytes + Message(length, kept).nbytes

    kept = kept_within(budget, length, tensors)
    if kept > 0:
        assert weight(kept) <= budget, seed
    assert kept == length or weight(max(kept, 0) + 1) > budget, seed
