"""Selection against torch.topk, and nothing lost between what is sent and what stays."""

import math

import pytest
import torch

from sparsetile.distributed import selection
from sparsetile.distributed.selection import BROKEN, LIVE, ZERO, code_of, largest, release, split


def oracle(row, kept):
    """The first of equal entries win: a stable sort."""
    return row.abs().double().sort(descending=True, stable=True).indices[:kept].sort().values


@pytest.mark.parametrize("trial", range(10))
def test_largest(trial):
    seed = torch.seed()
    length = int(torch.randint(1, 3000, ()))
    rows = torch.randn(3, length)
    if trial % 2:
        rows = (rows * 2).round()  # many equal entries, many zeros
    for kept in {1, length, int(torch.randint(1, length + 1, ()))}:
        found = largest(rows, kept)
        assert torch.equal(found, torch.stack([oracle(row, kept) for row in rows])), seed


@pytest.mark.parametrize("kept", [700, 3000, 20000])
@pytest.mark.parametrize("kind", ["normal", "equal", "sparse", "heavy", "sorted"])
def test_largest_of_long_rows(kind, kept):
    """Rows long enough that a sample suggests the candidates, also where the sample is wrong."""
    seed = torch.seed()
    length = 5 * selection._SAMPLE + 7
    row = torch.randn(length)
    if kind == "equal":
        row = (row * 2).round()
    elif kind == "sparse":
        row[torch.rand(length) < 0.99] = 0
    elif kind == "heavy":
        row = row**9
    elif kind == "sorted":
        row = torch.where(torch.arange(length) % 5 == 0, row * 100, row)  # just what the sample looks at
    assert torch.equal(largest(row[None], kept)[0], oracle(row, kept)), seed


@pytest.mark.parametrize("divisor", [1, 3, 16])
def test_split_loses_nothing(divisor):
    seed = torch.seed()
    values = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    sent, stays = split(values, divisor)
    back = sent.double() * divisor + stays.double()
    assert ((back - values.double()).abs() <= values.double().abs() * 2**-24).all(), seed
    assert (
        (sent.double() - values.double() / divisor).abs() <= values.double().abs() / divisor * 2**-8
    ).all()
    huge = torch.tensor([torch.finfo(torch.float32).max])
    sent, stays = split(huge, 1)
    assert sent.isinf().all() and (stays == 0).all()


@pytest.mark.parametrize("divisor", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_release(share, divisor):
    """Idle entries neither leave nor change; sent and stayed add up to what was there."""
    seed = torch.seed()
    before = torch.randn(3, 500)
    idle = torch.rand(3, 500) < share
    rows = before.clone()
    values, places = release(rows, 40, divisor, idle if share else None)
    sent = torch.zeros_like(before).scatter_(1, places, values.float())
    assert torch.equal(rows[idle], before[idle]) and (sent[idle] == 0).all(), seed
    torch.testing.assert_close(rows.double() + divisor * sent.double(), before.double(), rtol=2e-7, atol=0)
    assert torch.equal(places, largest(before.masked_fill(idle, 0), 40)), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_code(dtype):
    gradient = torch.zeros(3, 5, dtype=dtype)
    assert code_of(gradient) == ZERO
    for value, code in (
        (-1e-6, LIVE),
        (2.0, LIVE),
        (math.nan, BROKEN),
        (-math.inf, BROKEN),
        (math.inf, BROKEN),
    ):
        gradient[1, 2] = value
        assert code_of(gradient) == code
