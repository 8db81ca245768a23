"""Weights on request, of tiles that were chosen for each batch element and group."""

import pytest
import torch

from adaptive_oracle import fresh, inputs, made, run_oracle, tail_padding


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kv_heads": 1}, {"is_causal": True, "q_len": 67, "padded": True}])
def test_weights(settings, average):
    fresh()
    is_causal, padded = settings.get("is_causal", False), settings.get("padded", False)
    q, k, v = inputs(
        q_len=settings.get("q_len", 150), kv_heads=settings.get("kv_heads", 2), dtype=torch.float64
    )
    padding = tail_padding(2, 150, 70) if padded else None
    module = made(q, k, dtype=torch.float64).eval()
    call = {"is_causal": is_causal, "key_padding_mask": padding, "average_attn_weights": average}
    out, dense = module(q, k, v, need_weights=True, **call)
    _, expected, weights, _ = run_oracle(module, q, k, v, is_causal, padding)
    weights = weights.mean(1) if average else weights
    torch.testing.assert_close(dense, weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    _, sparse = module(q, k, v, need_weights=True, weights="sparse", **call)
    assert sparse.layout is torch.sparse_bsr
    torch.testing.assert_close(sparse.to_dense()[..., : q.shape[1], :150], weights, rtol=1e-9, atol=1e-12)
