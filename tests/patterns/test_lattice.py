"""Patterns of the distance in units against their definitions, written out with plain integers."""

from __future__ import annotations

import pytest
import torch

from sparsetile.errors import PatternError
from sparsetile.patterns import Dilated, Local, LogStrided, Random, Strided

FROM, TO = -40, 70


def table(pattern, head=0):
    return pattern.allows(torch.arange(FROM, TO)[:, None], torch.arange(TO), head)


def spelled(rule):
    return torch.tensor([[bool(rule(q, k)) for k in range(TO)] for q in range(FROM, TO)])


@pytest.mark.parametrize("unit", ["token", 1, 3, 8])
@pytest.mark.parametrize("rate", [1, 2, 5])
def test_dilated(unit, rate):
    u = 1 if unit == "token" else unit
    rule = lambda q, k: q // 24 == k // 24 and (q // u - k // u) % rate == 0  # noqa: E731
    assert torch.equal(table(Dilated(24, rate, unit)), spelled(rule))


@pytest.mark.parametrize(("stride", "unit", "shift"), [(6, 1, 0), (6, 3, 3), (12, 4, -4), (5, "token", 2)])
def test_strided(stride, unit, shift):
    u = 1 if unit == "token" else unit
    for head in range(4):
        rule = lambda q, k, h=head: (q // u - k // u - h * (shift // u)) % (stride // u) == 0  # noqa: E731
        assert torch.equal(table(Strided(stride, unit, shift), head), spelled(rule))


def test_shifted_heads_together_reach_everything():
    pattern = Strided(32, 8, head_shift=8)
    reached = pattern.allows(torch.arange(TO)[:, None], torch.arange(TO), torch.arange(4)[:, None, None])
    assert (reached.sum(0) == 1).all()
    assert pattern.needs_heads and not Strided(32, 8).needs_heads
    assert (Local(3) | pattern).needs_heads and (pattern & Local(3)).block_aligned().needs_heads


@pytest.mark.parametrize("base", [2, 3])
@pytest.mark.parametrize("unit", ["token", 5])
def test_log_strided(base, unit):
    u = 1 if unit == "token" else unit
    near = {0} | {sign * base**j for j in range(8) for sign in (1, -1)}
    assert torch.equal(table(LogStrided(base, unit)), spelled(lambda q, k: q // u - k // u in near))


@pytest.mark.parametrize(
    "pattern", [Dilated(256, 2), Strided(256), LogStrided(), Random(0.5), Local(3) | Strided(256)], ids=repr
)
def test_block_units_need_resolving(pattern):
    with pytest.raises(PatternError, match="resolve"):
        pattern.allows(torch.tensor(3), torch.tensor(1))
    with pytest.raises(PatternError, match="square tiles"):
        pattern.resolve(64, 32)
    resolved = pattern.resolve(64, 64)
    assert resolved.allows(torch.tensor(3), torch.tensor(1)).dtype == torch.bool
    assert resolved.resolve(128, 16) == resolved


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dilated(0, 2),
        lambda: Dilated(8, 0),
        lambda: Dilated(8, 2, unit=-1),
        lambda: Strided(0),
        lambda: Strided(10, unit=4),
        lambda: Strided(8, unit=4, head_shift=2),
        lambda: Strided(8, unit=4, head_shift=0.0),
        lambda: Strided(100).resolve(64, 64),
        lambda: LogStrided(1),
        lambda: LogStrided(2, unit=None),
    ],
)
def test_impossible_parameters(make):
    with pytest.raises(PatternError, match=r"expected .*, got .*\. \S"):
        make()
