"""Decoding on a GPU: real sizes, every form of a cache, graphs, and a host that waits for nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sparsetile as st
from sparsetile.kernels import triton_decode_launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def caches(batch: int, heads: int, capacity: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    return (torch.randn(batch, heads, capacity, width, device="cuda", dtype=dtype) for _ in range(2))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: st.Pattern,
    got: tuple[Tensor, Tensor],
    block: int,
    **given: Tensor,
) -> None:
    """Compares with the pattern's definition, written out in float64 for the rows of the queries."""
    out, lse = got
    batch, heads, q_len, width = q.shape
    group, capacity = heads // k.shape[1], k.shape[2]
    resolved = pattern.resolve(block, block, 0, capacity)
    for b in range(batch):
        start = int(given["starts"][b]) if "starts" in given else 0
        end = int(given["lengths"][b]) if "lengths" in given else capacity
        at = torch.arange(end - start - q_len, end - start)[:, None]
        keys = torch.arange(end - start)
        ignored = given["padding"][b, start:end].cpu() if "padding" in given else torch.tensor(False)
        for h in range(heads):
            allowed = resolved.allows(at, keys, h) & (keys <= at) & (at >= 0) & ~ignored
            allowed = allowed.expand(q_len, end - start).cuda()
            own = k[b, h // group, start:end].double(), v[b, h // group, start:end].double()
            seen = allowed.any(0)[:, None]
            keys_of, values = (x.masked_fill(~seen, 0) for x in own)
            scores = (q[b, h].double() @ keys_of.T / math.sqrt(width)).masked_fill(~allowed, -math.inf)
            expected_lse = scores.logsumexp(-1) if end > start else torch.full((q_len,), -math.inf).cuda()
            weights = torch.exp(scores - expected_lse.masked_fill(expected_lse == -math.inf, 0)[:, None])
            expected = weights @ values
            error = (out[b, h].double() - expected).abs().max() / expected.abs().max().clamp(min=0.05)
            assert error <= ERROR[q.dtype], (b, h, float(error))
            finite = expected_lse > -math.inf
            assert torch.equal(lse[b, h] > -math.inf, finite)
            assert (lse[b, h].double() - expected_lse)[finite].abs().max() <= 2e-4 if finite.any() else True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "key_heads"), [(64, 2), (80, 8), (128, 2), (256, 1)])
@pytest.mark.parametrize("q_len", [1, 4, 16])
def test_equals_the_definition(width: int, key_heads: int, q_len: int, dtype: torch.dtype) -> None:
    q = torch.randn(3, 8, q_len, width, device="cuda", dtype=dtype)
    k, v = caches(3, key_heads, 9000, width, dtype)
    lengths = torch.tensor([9000, 4099, 1030], device="cuda")
    for pattern in (st.Local(700, 0) | st.Global(64), st.Strided(512), st.Strided(9, "token")):
        got = st.decode_attention(q, k, v, pattern, lengths=lengths, enable_gqa=True, return_lse=True)
        check(q, k, v, pattern, got, 128, lengths=lengths)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_smaller_tiles_and_heads_of_their_own(block: int) -> None:
    q = torch.randn(2, 8, 3, 64, device="cuda", dtype=torch.bfloat16)
    k, v = caches(2, 2, 5000, 64, torch.bfloat16)
    by_head = st.ByHead([st.Local(50 * h + 9, 0) | st.Global(h + 1) for h in range(8)])
    for pattern in (st.Local(300, 0), st.Random(0.1, by_head=True), by_head):
        got = st.decode_attention(q, k, v, pattern, block_size=block, enable_gqa=True, return_lse=True)
        check(q, k, v, pattern, got, block)


@pytest.mark.parametrize("q_len", [1, 5])
def test_padding_and_garbage(q_len: int) -> None:
    q = torch.randn(4, 4, q_len, 128, device="cuda", dtype=torch.bfloat16)
    k, v = caches(4, 2, 6000, 128, torch.bfloat16)
    lengths = torch.tensor([6000, 3500, 2, 40], device="cuda", dtype=torch.int32)
    starts = torch.tensor([0, 1234, 0, 40], device="cuda")
    for b in range(4):
        for x in (k, v):
            x[b, :, int(lengths[b]) :], x[b, :, : int(starts[b])] = math.nan, math.nan
    padding = torch.rand(4, 6000, device="cuda") < 0.3
    k.transpose(1, 2)[padding] = math.nan
    pattern = st.Local(900, 0) | st.Global(33)
    given = {"lengths": lengths, "starts": starts}
    options = {"key_padding_mask": padding, "enable_gqa": True, "return_lse": True}
    got = st.decode_attention(q, k, v, pattern, **given, **options)
    check(q, k, v, pattern, got, 128, **given, padding=padding)


@pytest.mark.parametrize("q_len", [1, 7])
def test_pages_are_the_cache(q_len: int) -> None:
    size, each = 256, 30
    q = torch.randn(3, 16, q_len, 64, device="cuda", dtype=torch.float16)
    k, v = caches(3, 2, size * each, 64, torch.float16)
    order = torch.randperm(3 * each + 5, device="cuda")[: 3 * each].view(3, each)
    lengths = torch.tensor([size * each, 4000, 257], device="cuda")
    pages = torch.full((2, 3 * each + 5, 2, size, 64), math.nan, device="cuda", dtype=torch.float16)
    for at, x in enumerate((k, v)):
        pages[at, order.flatten()] = x.unflatten(2, (each, size)).transpose(1, 2).flatten(0, 1)
    # What the table says of pages that are not filled means nothing.
    table = order.int()
    table[2, 2:] = -1
    pattern = st.Local(1000, 0) | st.Strided(1024)
    options = {"lengths": lengths, "enable_gqa": True, "return_lse": True}
    paged = st.decode_attention(q, *pages, pattern, page_table=table, **options)
    check(q, k, v, pattern, paged, 128, lengths=lengths)
    for a, b in zip(paged, st.decode_attention(q, k, v, pattern, **options), strict=True):
        assert torch.equal(a, b)


def test_strides_of_any_cache() -> None:
    q = torch.randn(2, 1, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches(2, 2, 3000, 128, torch.bfloat16))
    pattern = st.Local(400, 0)
    for end in (3000, 2999, 17):
        some = k[:, :, :end], v[:, :, :end]
        got = st.decode_attention(q, *some, pattern, enable_gqa=True, return_lse=True)
        check(q, *some, pattern, got, 128)


def test_a_cache_past_two_to_the_31_elements() -> None:
    q = torch.randn(3, 2, 1, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.empty(3, 2, 3_000_000, 128, device="cuda", dtype=torch.bfloat16)
    for b in range(3):
        k[b].normal_()
    pattern = st.Local(3000, 0) | st.Global(64, rows=False)
    got = st.decode_attention(q, k, k, pattern, return_lse=True)
    check(q, k, k, pattern, got, 128)


def test_a_replayed_call_is_the_call_and_waits_for_nothing() -> None:
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    pattern = st.Local(500, 0) | st.Global(64)
    kept = torch.randn(2, 2, 2, 4000, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([900, 30], device="cuda")
    st.decode_attention(q, *kept, pattern, lengths=lengths, enable_gqa=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for grown in (0, 1, 800, 2500):
            options = {"lengths": lengths + grown, "enable_gqa": True, "return_lse": True}
            results.append((lengths + grown, st.decode_attention(q, *kept, pattern, **options)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ends, got in results:
        check(q, *kept, pattern, got, 128, lengths=ends)
    # A cache that is copied to grow is of the same kind, so its kernels are those of the step before.
    layout = st.decode.decode_layout(pattern, 4000, 128, "cuda", 8)
    kinds = layout._memo[triton_decode_launch._MEMO]
    before = None
    for end in (3000, 3001, 3002):
        grown = tuple(x[:, :, :end].contiguous() for x in kept)
        got = st.decode_attention(q, *grown, pattern, enable_gqa=True, return_lse=True)
        check(q, *grown, pattern, got, 128)
        assert before in (None, len(kinds))
        before = len(kinds)


def test_a_graph_follows_the_lengths() -> None:
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = caches(2, 2, 5000, 128, torch.bfloat16)
    lengths = torch.tensor([100, 4000], device="cuda")
    pattern = st.Local(800, 0) | st.Global(10)

    def call() -> tuple[Tensor, Tensor]:
        return st.decode_attention(q, k, v, pattern, lengths=lengths, enable_gqa=True, return_lse=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for step in (0, 1, 900):
        lengths.copy_(torch.tensor([100, 4000]) + step)
        graph.replay()
        check(q, k, v, pattern, got, 128, lengths=lengths)
