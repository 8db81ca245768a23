"""The Triton backend on a GPU: a sample of ``gradient_matrix.py``, and what the interpreter cannot show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsetile as st
from gpu.gradient_matrix import FEATURES, cell
from oracle import check, random_case, run
from sparsetile.kernels import triton_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_features(feature: str, dtype: str) -> None:
    result = cell(64, dtype, 64, feature)
    assert result["passed"], result


@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
def test_head_dims(head_dim: int) -> None:
    result = cell(head_dim, "float16", 128, "causal")
    assert result["passed"], result


@pytest.mark.parametrize("head_dim", [1, 4, 12, 35, 100, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_head_dim_equals_itself_filled_with_zeros(head_dim: int, dtype: torch.dtype) -> None:
    # Dense attention computes such widths in fp32, so its error is no measure for 16 bits.
    full = max(16, 1 << (head_dim - 1).bit_length())
    pattern = st.Local(70) | st.Global(3)
    results = []
    for width in (head_dim, full):
        torch.manual_seed(5)
        leaves = [
            F.pad(torch.randn(2, 3, 300, head_dim, device="cuda", dtype=dtype), (0, width - head_dim))
            for _ in range(3)
        ]
        grad = F.pad(torch.randn(2, 3, 300, head_dim, device="cuda", dtype=dtype), (0, width - head_dim))
        leaves = [x.requires_grad_() for x in leaves]
        out = st.sparse_attention(*leaves, pattern, is_causal=True, scale=head_dim**-0.5, backend="triton")
        results.append([x[..., :head_dim] for x in (out, *torch.autograd.grad(out, leaves, grad))])
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)


def test_everything_at_once() -> None:
    features = {"gqa", "per_head", "tile_bias", "attn_bias", "padding", "dropout", "lse", "strided"}
    check(triton_backend, random_case(block=32, q_len=300, features=features, device="cuda"))
    of_parts = {"gqa", "per_head", "placed", "padding_by_head", "lse"}
    check(triton_backend, random_case(block=32, q_len=300, features=of_parts, device="cuda"))


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
