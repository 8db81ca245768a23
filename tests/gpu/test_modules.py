"""The modules on a GPU: moved, compiled, captured, and equal to what they compute on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsetile as st

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_both(call, *inputs: torch.Tensor):
    """What a call gives on the CPU in float64 and on the GPU, with the gradients of its inputs."""
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device, dtype)
        found.append([out, *torch.autograd.grad(out, leaves, weight)])
    return [(there.cpu().double(), here) for here, there in zip(*found, strict=True)]


def close(pairs) -> None:
    for there, here in pairs:
        torch.testing.assert_close(there, here, rtol=2e-4, atol=2e-4 * here.abs().max().item())


@pytest.mark.parametrize("kind", ["local_window", "dilated_sparse", "global_local", "ultra_sparse"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_base_module(kind: str, causal: bool) -> None:
    module = st.BlockSparseRingDilatedAttention(sparse_config=st.SparsePatternConfig(kind, 0.3))
    close(on_both(lambda *x: module(*x, is_causal=causal), *torch.randn(3, 2, 1000, 4, 24).unbind()))


@pytest.mark.parametrize("overlap", ["multiset", "once"])
@pytest.mark.parametrize("offset", ["block", "cyclic"])
def test_dilated_attention(overlap: str, offset: str) -> None:
    module = st.DilatedAttention([128, 512], [1, 4], overlap=overlap, head_offset=offset)
    close(on_both(lambda *x: module(*x, is_causal=True), *torch.randn(3, 1, 1100, 8, 32).unbind()))


@pytest.mark.parametrize("width", [64, 24])
def test_multihead_moves_between_devices(width: int) -> None:
    module = st.create_multihead_block_sparse(width, 4, 0.3, batch_first=True)
    x = torch.randn(2, 600, width)
    first = module(x, x, x, need_weights=False)[0]
    there = module.cuda()(x.cuda(), x.cuda(), x.cuda(), need_weights=False)[0]
    assert module.layout_for(600).device.type == "cuda"
    torch.testing.assert_close(there.cpu(), first, rtol=1e-3, atol=1e-4)
    half = module.half()
    assert half(*[x.cuda().half()] * 3, need_weights=False)[0].dtype == torch.float16
    back = half.cpu().float()(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(back, first, rtol=5e-3, atol=5e-3)


def test_multihead_weights_equal_the_cpus() -> None:
    module = st.create_multihead_block_sparse(64, 4, 0.3, batch_first=True).eval()
    x = torch.randn(1, 400, 64)
    _, dense = module(x, x, x)
    module.cuda()
    _, there = module(x.cuda(), x.cuda(), x.cuda())
    torch.testing.assert_close(there.cpu(), dense, rtol=1e-3, atol=1e-5)
    _, tiles = module(x.cuda(), x.cuda(), x.cuda(), weights="sparse")
    torch.testing.assert_close(tiles.to_dense()[:, :400, :400].cpu(), dense, rtol=1e-3, atol=1e-5)


def test_an_encoder_in_inference() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = st.from_dense(nn.TransformerEncoder(layer, 2), sparsity_ratio=1.0, summary=False).eval()
    dense = nn.TransformerEncoder(layer, 2).eval()
    dense.load_state_dict(model.state_dict())
    model, dense = model.cuda(), dense.cuda()
    x = torch.randn(2, 300, 64, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-3)


def test_compiled_by_inductor() -> None:
    module = st.create_block_sparse_attention("base", sparsity_ratio=0.2)
    compiled = torch.compile(module, fullgraph=True)
    inputs = [torch.randn(2, 2000, 4, 64, device="cuda", requires_grad=True) for _ in range(3)]
    expected, out = module(*inputs, is_causal=True), compiled(*inputs, is_causal=True)
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for got, want in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_cuda_graph_replays_on_new_data() -> None:
    module = st.create_block_sparse_attention("base", sparsity_ratio=0.2)
    inputs = [torch.randn(1, 2000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    module(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(*inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, module(*inputs))


def test_a_training_step_waits_for_nothing() -> None:
    model = st.create_multihead_block_sparse(64, 4, 0.2, batch_first=True).cuda()
    x = torch.randn(2, 1500, 64, device="cuda")
    model(x, x, x, need_weights=False)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, x, x, need_weights=False)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
