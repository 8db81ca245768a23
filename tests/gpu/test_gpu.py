"""The Triton backend on a GPU: a sample of ``gradient_matrix.py``, and what the interpreter cannot show."""

from __future__ import annotations

import pytest
import torch

from gpu.gradient_matrix import FEATURES, cell
from oracle import check, random_case, run
from sparsetile.kernels import triton_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_features(feature: str, dtype: str) -> None:
    result = cell(64, dtype, 64, feature)
    assert result["passed"], result


@pytest.mark.parametrize("head_dim", [1, 4, 12, 16, 35, 80, 100, 128, 256])
def test_head_dims(head_dim: int) -> None:
    result = cell(head_dim, "float16", 128, "causal")
    assert result["passed"], result


def test_everything_at_once() -> None:
    features = {"gqa", "per_head", "tile_bias", "attn_bias", "padding", "dropout", "lse", "strided"}
    check(triton_backend, random_case(block=32, q_len=300, features=features, device="cuda"))


def test_the_same_bits_every_time() -> None:
    case = random_case(
        dtype=torch.bfloat16,
        block=64,
        q_len=2000,
        features={"gqa", "tile_bias", "dropout", "lse"},
        device="cuda",
    )
    first, second = run(triton_backend, case), run(triton_backend, case)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_layout_made_on_the_device_needs_no_sync() -> None:
    from sparsetile.layout.blocks import BlockLayout

    q = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16)
    chosen = torch.randint(0, 8, (1, 4, 8, 3), device="cuda")
    layout = BlockLayout.from_topk(chosen, 1024)
    request = triton_request(layout)
    triton_backend.forward(q, q, q, request)  # compiles
    fresh = triton_request(BlockLayout.from_topk(chosen, 1024))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = triton_backend.forward(q, q, q, fresh)
        triton_backend.backward(q, None, q, q, q, out, lse, fresh, tile_bias_grad=False, attn_bias_grad=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def triton_request(layout: object) -> object:
    from sparsetile.kernels.request import Request

    return Request(layout, 0.125)  # type: ignore[arg-type]
