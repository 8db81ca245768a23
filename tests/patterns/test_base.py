"""Composition, and patterns that define ``allows`` alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sparsetile.layout import BlockLayout
from sparsetile.patterns import Causal, Documents, Full, Global, Local, Pattern, Strided


@dataclass(frozen=True, eq=False)
class Checkers(Pattern):
    """Nothing but a definition."""

    size: int

    def allows(self, q, k, head=0):
        return (q // self.size + k // self.size) % 2 == 0


def test_unions_and_intersections_are_flat():
    a, b, c = Local(1), Global(2), Causal()
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert (a | b) & c != a | (b & c)
    assert repr((a | b) & c).startswith("(Local(")


@pytest.mark.parametrize("other", [3, None, torch.ones(2)])
def test_only_patterns_combine(other):
    with pytest.raises(TypeError):
        Local(1) | other
    with pytest.raises(TypeError):
        Local(1) & other


@pytest.mark.parametrize("block_size", [16, (32, 64)])
def test_a_definition_is_enough(block_size):
    pattern = (Checkers(24) | Local(5)) & Causal()
    layout = BlockLayout.from_pattern(pattern, 150, 200, block_size)
    layout.validate()
    expected = pattern.allows(torch.arange(50, 200)[:, None], torch.arange(200))
    assert torch.equal(layout.to_dense(), expected)


def test_intersections_of_ranges_become_one_range():
    lowered = (Local(9) & Causal() & Documents([5, 5]) & Strided(4, 2)).lower()
    assert len(lowered.parts) == 2 and len(lowered.parts[0].parts) == 3
    assert (
        (Full() & Causal())
        .lower()
        .allows(torch.arange(3)[:, None], torch.arange(3))
        .equal(torch.ones(3, 3).tril().bool())
    )
