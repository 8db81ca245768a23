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


@pytest.mark.parametrize("most", [0, -16, 1.5, "16", True])
def test_stages(most):
    with pytest.raises(ArgumentError, match="max_remote_tokens"):
        DistributedSparseConfig(max_remote_tokens=most)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_hook": "top"},
        {"gradient_warmup_steps": -1, "gradient_hook": "topk"},
        {"gradient_warmup_steps": 1, "gradient_hook": "powersgd"},
        {"bucket_max_tensors": 0, "gradient_hook": "topk"},
        {"bucket_cap_mb": 0, "gradient_hook": "topk"},
        {"bucket_cap_mb": math.inf, "gradient_hook": "topk"},
        {"powersgd_rank": True, "gradient_hook": "powersgd", "gradient_warmup_steps": 2},
        # Fields that could not act.
        {"bucket_cap_mb": 50},
        {"bucket_max_tensors": 8, "gradient_hook": "bf16"},
        {"gradient_compression_ratio": 0.1, "gradient_hook": "bf16"},
        {"gradient_compression_ratio": 0.1, "gradient_hook": "powersgd", "gradient_warmup_steps": 2},
        {"powersgd_rank": 4, "gradient_compression_ratio": 0.1},
    ],
)
def test_gradient_fields(settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        DistributedSparseConfig(**settings)


def test_hook():
    assert DistributedSparseConfig().hook is None
    assert DistributedSparseConfig(gradient_compression_ratio=0.1).hook == "topk"
    assert DistributedSparseConfig(gradient_hook="topk", bucket_cap_mb=1.5).hook == "topk"
    assert DistributedSparseConfig(gradient_hook="powersgd", gradient_warmup_steps=2).hook == "powersgd"
