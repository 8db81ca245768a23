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


@pytest.mark.parametrize("node", [0, -2, 2.0, "2", True])
def test_nodes(node):
    with pytest.raises(ArgumentError, match="ranks_per_node"):
        DistributedSparseConfig(ranks_per_node=node)


DENSITIES = {"local_sparsity": 0.4, "global_sparsity": 0.1, "inter_node_sparsity": 0}


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, "0.1", True])
@pytest.mark.parametrize("name", list(DENSITIES))
def test_each_density_by_distance(name, density):
    with pytest.raises(ArgumentError, match=f"{name}: expected None or a density"):
        DistributedSparseConfig(ranks_per_node=2, **DENSITIES | {name: density})


def test_densities_by_distance():
    for name in DENSITIES:
        two = {key: value for key, value in DENSITIES.items() if key != name}
        with pytest.raises(ArgumentError, match="expected all three or none"):
            DistributedSparseConfig(ranks_per_node=2, **two)
    with pytest.raises(ArgumentError, match="ranks_per_node: expected a number beside densities"):
        DistributedSparseConfig(**DENSITIES)
    assert DistributedSparseConfig(ranks_per_node=2, **DENSITIES).densities == (0.4, 0.1, 0)
    assert DistributedSparseConfig(ranks_per_node=2).densities is None


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
