"""DistributedSparseConfig refuses what cannot be."""

import math

import pytest

from sparsetile.distributed import DistributedSparseConfig
from sparsetile.errors import ArgumentError


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, math.nan, "0.1", True])
def test_ratio(ratio):
    with pytest.raises(ArgumentError, match="gradient_compression_ratio"):
        DistributedSparseConfig(gradient_compression_ratio=ratio)


def test_memory():
    with pytest.raises(ArgumentError, match="enable_memory_optimization"):
        DistributedSparseConfig(enable_memory_optimization=1)
    config = DistributedSparseConfig(enable_memory_optimization=True, gradient_compression_ratio=1)
    assert config.gradient_compression_ratio == 1
