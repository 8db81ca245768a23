"""What a row of a causal call keeps has nothing to do with where the sequence ends."""

from __future__ import annotations

import random

import pytest
import torch

from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive


@pytest.mark.parametrize("offset", [-21, 0, 5, 37, 100])
@pytest.mark.parametrize("base_sparsity", [0.5, 0.7])
@torch.no_grad()
def test_the_end_of_a_sequence_changes_nothing_before_it(offset: int, base_sparsity: float) -> None:
    seed = random.getrandbits(30)
    torch.manual_seed(seed)
    config = AdaptiveConfig(base_sparsity=base_sparsity, block_size=16)
    attention = BlockSparseAdaptive(config, num_heads=2, head_dim=8).eval()
    q = torch.randn(1, 70, 2, 8)
    k, v = torch.randn(2, 1, 70 + offset, 2, 8)
    whole = attention(q, k, v, is_causal=True)
    for end in range(max(1, 1 - offset), 70, 3):
        part = attention(q[:, :end], k[:, : end + offset], v[:, : end + offset], is_causal=True)
        where = f"seed {seed}, end {end}"
        assert torch.allclose(part, whole[:, :end], atol=1e-5), where


@pytest.mark.parametrize("k_min", [1, 6])
@torch.no_grad()
def test_the_bound_of_a_share_of_the_mass_is_of_a_row_s_own_past(k_min: int) -> None:
    seed = random.getrandbits(30)
    torch.manual_seed(seed)
    config = AdaptiveConfig(base_sparsity=0.9, block_size=16, selection="top_p", p=0.999, k_min=k_min)
    attention = BlockSparseAdaptive(config, num_heads=2, head_dim=8).eval()
    q, k, v = torch.randn(3, 1, 400, 2, 8)
    whole = attention(q, k, v, is_causal=True)
    for end in (100, 224, 333, 384):
        part = attention(q[:, :end], k[:, :end], v[:, :end], is_causal=True)
        assert torch.allclose(part, whole[:, :end], atol=1e-5), f"seed {seed}, end {end}"
