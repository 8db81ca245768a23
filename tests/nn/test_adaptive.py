"""AdaptiveConfig refuses what cannot be."""

import math

import pytest

from sparsetile.errors import ArgumentError
from sparsetile.nn.adaptive import AdaptiveConfig


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"base_sparsity": 1.0}, "base_sparsity"),
        ({"base_sparsity": -0.1}, "base_sparsity"),
        ({"base_sparsity": math.nan}, "base_sparsity"),
        ({"base_sparsity": "0.9"}, "base_sparsity"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"learnable_temperature": 1}, "learnable_temperature"),
    ],
)
def test_errors(settings, text):
    with pytest.raises(ArgumentError, match=text):
        AdaptiveConfig(**settings)


def test_bounds_are_served():
    assert AdaptiveConfig(0.0, 1e-3, True).base_sparsity == 0.0
