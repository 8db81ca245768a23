"""``allows`` of ranges and random patterns against their definitions, written out with plain integers."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from sparsetile.errors import PatternError
from sparsetile.patterns import Causal, Documents, Full, Global, Local, Random

FROM, TO = -40, 60


def table(pattern, keys=TO, head=0):
    return pattern.allows(torch.arange(FROM, TO)[:, None], torch.arange(keys), head).expand(TO - FROM, keys)


def spelled(rule, keys=TO):
    return torch.tensor([[bool(rule(q, k)) for k in range(keys)] for q in range(FROM, TO)])


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (Full(), lambda q, k: True),
        (Causal(), lambda q, k: k <= q),
        (Local(5), lambda q, k: -5 <= k - q <= 5),
        (Local(0), lambda q, k: k == q),
        (Local(7, 0), lambda q, k: q - 7 <= k <= q),
        (Local(0, 9), lambda q, k: q <= k <= q + 9),
        (Global(4), lambda q, k: q < 4 or k < 4),
        (Global(4, rows=False), lambda q, k: k < 4),
        (Global(4, columns=False), lambda q, k: q < 4),
        (Local(3) | Global(2) & Causal(), lambda q, k: abs(q - k) <= 3 or (k <= q and (q < 2 or k < 2))),
        ((Local(3) | Global(2)) & Causal(), lambda q, k: k <= q and (abs(q - k) <= 3 or q < 2 or k < 2)),
    ],
    ids=lambda value: None if callable(value) else repr(value),
)
def test_allows_is_the_definition(pattern, rule):
    assert torch.equal(table(pattern), spelled(rule))


def test_documents_hold_together_and_nothing_else():
    lengths = [5, 1, 17, 30]
    owner = [number for number, n in enumerate(lengths) for _ in range(n)]

    def rule(q, k):
        return 0 <= q < 53 and k < 53 and owner[q] == owner[k]

    assert torch.equal(table(Documents(lengths)), spelled(rule))
    assert Documents(lengths) == Documents(tuple(lengths)) == Documents(torch.tensor(lengths))


@pytest.mark.parametrize("density", [1.0, 0.5, 1 / 3, 0.3, 0.07, 0.01])
@pytest.mark.parametrize("unit", ["token", 4])
def test_random_keeps_one_unit_of_each_stratum(density, unit):
    seed = int(torch.randint(2**40, ()))
    size = 1 if unit == "token" else unit
    kept = Random(density, seed, unit).allows(torch.arange(30)[:, None], torch.arange(1000 * size))
    units = kept.reshape(30, 1000, size)
    assert (units.all(-1) == units.any(-1)).all(), seed
    step = (1 / Fraction(repr(density))).limit_denominator(1 << 20)
    borders = [int(step * s) for s in range(int(1000 / step) + 1)]
    for start, end in pairwise(borders):
        assert (units[:, start:end, 0].sum(1) == 1).all(), (seed, start, end)
    assert torch.equal(
        kept[:4], Random(density, seed, unit).allows(torch.arange(4)[:, None], torch.arange(1000 * size))
    )


def test_random_differs_by_seed_and_by_head_only_if_asked():
    seed = int(torch.randint(2**40, ()))
    assert not torch.equal(table(Random(0.1, seed, 1)), table(Random(0.1, seed + 1, 1))), seed
    assert not torch.equal(table(Random(0.1, seed, 1)), table(Random(0.1, seed + 2**32, 1))), seed
    assert torch.equal(table(Random(0.1, seed, 1), head=1), table(Random(0.1, seed, 1))), seed
    by_head = Random(0.1, seed, 1, by_head=True)
    assert not torch.equal(table(by_head, head=1), table(by_head)), seed
    heads = torch.tensor([2, 0])[:, None, None]
    both = by_head.allows(torch.arange(FROM, TO)[:, None], torch.arange(TO), heads)
    assert torch.equal(both, torch.stack((table(by_head, head=2), table(by_head, head=0)))), seed


def test_values_compare_hash_and_pickle():
    pattern = (Local(4, 2) | Global(3)) & Documents([3, 4])
    same = (Local(4, 2) | Global(3)) & Documents([3, 4])
    assert pattern == same and hash(pattern) == hash(same)
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert Local(3) == Local(3, 3) != Local(3, 4)
    assert Global(3) != Local(3)
    with pytest.raises(AttributeError):
        pattern.parts = ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Local(-1),
        lambda: Local(1, -1),
        lambda: Local(1.5),
        lambda: Local(True),
        lambda: Local(2**60),
        lambda: Documents([2**60]),
        lambda: Global(0),
        lambda: Global(2, rows=False, columns=False),
        lambda: Global(2, rows=1),
        lambda: Documents([]),
        lambda: Documents([3, 0]),
        lambda: Documents([3, 1.0]),
        lambda: Documents(7),
        lambda: Documents(torch.ones(2, 2, dtype=torch.int64)),
        lambda: Documents(torch.ones(2)),
        lambda: Random(0),
        lambda: Random(1.5),
        lambda: Random(float("nan")),
        lambda: Random(True),
        lambda: Random(0.5, seed=0.1),
        lambda: Random(0.5, unit=0),
        lambda: Random(0.5, unit="blocks"),
        lambda: Random(0.5, by_head=1),
    ],
)
def test_impossible_parameters(make):
    with pytest.raises(PatternError, match=r"expected .*, got .*\. \S"):
        make()


def test_lengths_are_checked():
    pattern = Local(3) | (Documents([3, 4]) & Causal())
    pattern.check(7, 7)
    pattern.check(2, 7)
    with pytest.raises(PatternError, match="sum to k_len = 8"):
        pattern.check(8, 8)
