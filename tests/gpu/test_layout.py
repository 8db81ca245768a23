"""Layouts on a GPU: learned indices without a single host sync, and the same tensors as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsetile as st
from sparsetile.adaptive.places import Places
from sparsetile.adaptive.select import own_tiles
from sparsetile.layout import BlockLayout
from sparsetile.layout.schedule import Direction, schedule
from sparsetile.patterns import Causal, Documents, LogStrided, Random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(2000, 2000), (512, 1024), (1000, 1337), (1500, 700)])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 16), (32, 128)])
def test_topk_never_waits_for_the_device(is_causal, lengths, blocks):
    (q_len, k_len), (block_q, block_k) = lengths, blocks
    seed = int(torch.randint(2**40, ()))
    size = (2, 3, -(-q_len // block_q), 7)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, -(-k_len // block_k) + 1, size, generator=generator)
    there = indices.cuda()
    kinds: list[tuple[Direction, int]] = [("rows", 8), ("rows", 2), ("columns", 3), ("columns", 64)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = BlockLayout.from_topk(there, q_len, k_len, blocks, is_causal)
        made = [schedule(layout, *kind) for kind in kinds]
        layout.tensors()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layout.validate()
    expected = BlockLayout.from_topk(indices, q_len, k_len, blocks, is_causal)
    for name, tensor in layout.tensors()._asdict().items():
        assert torch.equal(tensor.cpu(), getattr(expected, name)), (name, seed)
    for kind, got in zip(kinds, made, strict=True):
        want = schedule(expected, *kind)
        count = want.items.shape[1]
        assert torch.equal(got.items[:, :count].cpu(), want.items), (kind, seed)
        assert (got.items[0, count:] == -1).all(), (kind, seed)
        for name in ("others", "mask_ids", "edges"):
            tensor, wanted = (getattr(x, name)[: expected.nnz] for x in (got, want))
            assert torch.equal(tensor.cpu(), wanted), (kind, name, seed)


def test_values_of_places_never_wait_for_the_device():
    chosen = torch.rand(2, 2, 16, 16).argsort(-1)[..., :5].masked_fill(torch.rand(2, 2, 16, 5) < 0.3, -1)
    values = torch.randn(2, 2, 16, 5)
    there, bias = chosen.cuda(), values.cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        places = Places.of(there, 4, 2000, 2000, 128, False)
        edges = places.to_edges(bias)
        (grad,) = torch.autograd.grad(edges.square().sum(), bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Places.of(chosen, 4, 2000, 2000, 128, False)
    assert torch.equal(edges.cpu(), expected.to_edges(values))
    torch.testing.assert_close(grad.cpu(), 4 * values.masked_fill(~expected.valid, 0))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(2000, 2000), (2048, 2048), (1000, 1337), (1500, 700)])
@pytest.mark.parametrize("groups,k", [(1, 1), (2, 5), (4, 33), (2, 129)])
def test_places_are_those_of_the_cpu(is_causal, lengths, groups, k):
    """By kernels there, by PyTorch here; the schedule comes with the layout, and nobody waits."""
    (q_len, k_len), block = lengths, 16
    seed = int(torch.randint(2**40, ()))
    generator = torch.Generator().manual_seed(seed)
    q_blocks, k_blocks = -(-q_len // block), -(-k_len // block)
    ranked = torch.rand(2, groups, q_blocks, max(k_blocks, k), generator=generator).argsort(-1)[..., :k]
    used = torch.rand(ranked.shape, generator=generator) < 0.7
    chosen = ranked.masked_fill(~used | (ranked >= k_blocks), -1).int()
    there = chosen.cuda()
    Places.of(there, 4, q_len, k_len, block, is_causal)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        places = Places.of(there, 4, q_len, k_len, block, is_causal)
        rows = schedule(places.layout, "rows", k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Places.of(chosen, 4, q_len, k_len, block, is_causal)
    for name in ("column", "valid", "slot"):
        got, want = getattr(places, name), getattr(expected, name)
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want), (name, seed)
    for name in ("indptr", "indices", "mask_ids", "masks"):
        got, want = getattr(places.layout, name), getattr(expected.layout, name)
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want), (name, seed)
    assert torch.equal(rows.items.cpu(), schedule(expected.layout, "rows", k).items), seed
    assert rows.items is places.layout._memo["short_rows"]  # by the kernels, and not by PyTorch on the GPU
    places.layout.validate()


def test_places_can_be_captured():
    chosen = torch.full((1, 2, 16, 5), -1, dtype=torch.int32, device="cuda")
    Places.of(chosen, 4, 2000, 2000, 128, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        places = Places.of(chosen, 4, 2000, 2000, 128, True)
    for _ in range(3):
        drawn = torch.rand(1, 2, 16, 16).argsort(-1)[..., :5].int()
        chosen.copy_(drawn)
        graph.replay()
        expected = Places.of(drawn, 4, 2000, 2000, 128, True)
        for name in ("indptr", "indices", "mask_ids", "masks"):
            assert torch.equal(getattr(places.layout, name).cpu(), getattr(expected.layout, name)), name
        assert torch.equal(places.slot.cpu(), expected.slot)


def test_fake_tensors_have_places():
    with FakeTensorMode():
        fake = torch.zeros((1, 2, 4, 3), dtype=torch.int32, device="cuda")
        places = Places.of(fake, 4, 60, 90, 16, True)
    assert places.layout.indices.is_cuda and places.layout.capacity == 48


def test_what_is_kept_is_of_a_stream_and_never_of_a_capture():
    device = torch.device("cuda", torch.cuda.current_device())
    where = {"offset_tokens": 0, "block": 16, "device": device}
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = own_tiles(1003, 1003, **where)
        assert own_tiles(1003, 1003, **where) is first
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            other = own_tiles(1003, 1003, **where)
            assert other is not first and own_tiles(1003, 1003, **where) is other
        assert own_tiles(1003, 1003, **where) is first
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside, fresh = own_tiles(1003, 1003, **where), own_tiles(1004, 1004, **where)
    assert inside is not first and own_tiles(1004, 1004, **where) is not fresh
    graph.replay()
    for made, count in ((first, 1003), (other, 1003), (inside, 1003), (fresh, 1004)):
        assert torch.equal(made.cpu(), torch.arange(count))


@pytest.mark.parametrize("form", ["mlp", "bilinear"])
def test_an_adaptive_module_can_be_captured(form):
    """And replays after what was kept between calls has been replaced by that of other lengths."""
    module = st.create_adaptive_block_sparse(base_sparsity=0.7, form=form, block_size=32).cuda().eval()
    inputs = [torch.randn(1, 1000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    with torch.no_grad():
        module(*inputs, is_causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(*inputs, is_causal=True)
        for length in range(100, 140):
            module(*(x[:, :length] for x in inputs), is_causal=True)
        for x in inputs:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, module(*inputs, is_causal=True))


def test_topk_can_be_captured():
    indices = torch.randint(-1, 16, (1, 4, 16, 5), device="cuda")
    BlockLayout.from_topk(indices, 2000, 2000, 128, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout = BlockLayout.from_topk(indices, 2000, 2000, 128, True)
    for _ in range(3):
        indices.random_(-1, 16)
        graph.replay()
        assert torch.equal(
            layout.to_dense(2), BlockLayout.from_topk(indices.cpu(), 2000, 2000, 128, True).to_dense(2).cuda()
        )


def test_constructors_agree_with_the_cpu():
    pattern = (Random(0.2) | LogStrided()) & Causal()
    layout = BlockLayout.from_pattern(pattern, 1000, block_size=64, device="cuda")
    dense = layout.to_dense()
    assert dense.is_cuda and torch.equal(
        dense.cpu(), BlockLayout.from_pattern(pattern, 1000, block_size=64).to_dense()
    )
    for other in (BlockLayout.from_dense_mask(dense, 64), BlockLayout.from_flex(layout.to_flex())):
        other.validate()
        assert other.device.type == "cuda" and torch.equal(other.to_dense(), dense)


def test_definitions_take_positions_on_the_device():
    q, k = torch.arange(300, device="cuda")[:, None], torch.arange(300, device="cuda")
    for pattern in (Documents([100, 150, 50]), LogStrided(2, 8), Random(0.1, 5, 16)):
        for each in (pattern, pattern.block_aligned(32, 32)):
            there = each.allows(q, k)
            assert there.is_cuda and torch.equal(there.cpu(), each.allows(q.cpu(), k.cpu()))
