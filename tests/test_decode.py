"""Decoding equals the last rows of attention over the whole sequence, whatever the cache looks like."""

import math

import hypothesis.strategies as hypothesis
import pytest
import torch
from hypothesis import given

import pattern_draws
from pattern_draws import runs
from sparsetile import (
    BlockLayout,
    Budget,
    ByHead,
    Causal,
    Dilated,
    Documents,
    Full,
    Global,
    Hierarchical,
    Local,
    LogStrided,
    Random,
    Strided,
    decode_attention,
    sparse_attention,
)
from sparsetile.bench.measure import peak_memory
from sparsetile.decode import decode_layout
from sparsetile.errors import ArgumentError, BackendError, LayoutError, PatternError
from sparsetile.kernels import cpu_decode
from sparsetile.layout.cache import layout_cache

HEADS, KEY_HEADS, DIM = 4, 2, 16
PATTERNS = [
    Full(),
    Local(50, 0) | Global(9),
    Local(2, 0, unit=32) | Global(32, rows=False),
    Strided(64, 32) | Local(20),
    LogStrided(2, 16),
    Random(0.2, unit="token", by_head=True),
    Dilated(100, 3, "token"),
    ByHead([Local(10, 0), Full(), Local(90, 0) | Global(3), Strided(96, 32)]),
    *(Budget(kind, 0.3, causal=True) for kind in ("local_window", "global_local", "ultra_sparse")),
]


def drawn(batch, capacity, q_len, dtype=torch.float64):
    q = torch.randn(batch, HEADS, q_len, DIM, dtype=dtype)
    k, v = torch.randn(2, batch, KEY_HEADS, capacity, DIM, dtype=dtype).unbind(0)
    return q, k, v


def alone(q, k, v, pattern, block):
    """The definition, for one sequence: all pairs of the last queries, written out."""
    q_len, length = q.shape[2], k.shape[2]
    offset = length - q_len
    resolved = pattern.resolve(block, block, 0, length)
    at, keys = torch.arange(q_len)[:, None] + offset, torch.arange(length)
    mask = torch.stack(
        [(resolved.allows(at, keys, h) & (keys <= at)).expand(q_len, length) for h in range(HEADS)]
    )
    k, v = (x.double().repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) / math.sqrt(DIM)).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_equals_the_definition(pattern, backend):
    block = 32
    for q_len, lengths in ((1, (300, 17, 128)), (5, (257, 5, 64)), (16, (33, 290, 160))):
        q, k, v = drawn(3, 300, q_len)
        out, lse = decode_attention(
            q,
            k,
            v,
            pattern,
            lengths=torch.tensor(lengths),
            block_size=block,
            enable_gqa=True,
            return_lse=True,
            backend=backend,
        )
        for b, length in enumerate(lengths):
            expected, expected_lse = alone(
                q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], pattern, block
            )
            torch.testing.assert_close(out[b : b + 1], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(lse[b : b + 1], expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS[:8], ids=repr)
def test_a_cache_that_grows_gives_the_rows_of_one_call(pattern):
    q, k, v = drawn(2, 150, 150)
    whole = sparse_attention(q, k, v, pattern, is_causal=True, block_size=32, enable_gqa=True)
    for end in (*range(1, 36), 97, 150):
        step = decode_attention(
            q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], pattern, block_size=32, enable_gqa=True
        )
        torch.testing.assert_close(step, whole[:, :, end - 1 : end], rtol=0, atol=1e-12)


def test_a_growing_cache_builds_one_layout():
    pattern = Local(77, 0) | Global(5)
    decode_layout(pattern, 100, 32)
    before = layout_cache.stats().misses
    for end in range(100, 400, 30):
        decode_layout(pattern, end, 32)
    assert layout_cache.stats().misses == before


def garbage(x, lengths, starts=None):
    """NaN wherever a slot is not filled."""
    for b, length in enumerate(lengths):
        x[b, :, length:] = math.nan
        if starts is not None:
            x[b, :, : starts[b]] = math.nan
    return x


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padding_on_the_left_changes_nothing(backend):
    pattern, starts, lengths = Local(40, 0) | Global(7), (0, 61, 130), (200, 180, 133)
    q, k, v = drawn(3, 200, 2)
    k, v = garbage(k, lengths, starts), garbage(v, lengths, starts)
    out = decode_attention(
        q,
        k,
        v,
        pattern,
        lengths=torch.tensor(lengths),
        starts=torch.tensor(starts),
        block_size=16,
        enable_gqa=True,
        backend=backend,
    )
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = slice(b, b + 1)
        expected, _ = alone(q[own], k[own, :, start:length], v[own, :, start:length], pattern, 16)
        torch.testing.assert_close(out[own], expected, rtol=0, atol=1e-12)


def test_a_cache_that_dropped_its_first_keys():
    pattern, dropped = Local(60, 0) & Strided(2, "token"), 333
    q, k, v = drawn(1, 433, 1)
    whole = decode_attention(q, k, v, pattern, block_size=32, enable_gqa=True)
    layout = decode_layout(pattern, 433, 32, heads=HEADS)
    kept = decode_attention(
        q, k[:, :, dropped:], v[:, :, dropped:], layout, starts=torch.tensor([-dropped]), enable_gqa=True
    )
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_in_any_order(backend):
    block, page, each = 16, 32, 7
    q, k, v = drawn(2, page * each, 3)
    lengths = (page * each, 70)
    order = torch.randperm(2 * each + 3)[: 2 * each].view(2, each)
    pages = torch.full((2, 2 * each + 3, KEY_HEADS, page, DIM), math.nan, dtype=torch.float64)
    for b in range(2):
        for j in range(each):
            pages[0, order[b, j]] = k[b, :, j * page : (j + 1) * page]
            pages[1, order[b, j]] = v[b, :, j * page : (j + 1) * page]
    options = {"lengths": torch.tensor(lengths), "block_size": block, "enable_gqa": True, "return_lse": True}
    pattern = Local(40, 0) | Global(9)
    plain = decode_attention(q, k, v, pattern, **options, backend="reference")
    paged = decode_attention(q, pages[0], pages[1], pattern, page_table=order, **options, backend=backend)
    for a, b in zip(plain, paged, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_padding_masks_and_rows_without_keys():
    q, k, v = drawn(2, 100, 1)
    ignore = torch.rand(2, 100) < 0.5
    ignore[1] = True
    k[:, :, 13], v[:, :, 13] = math.nan, math.nan
    ignore[0, 13] = True
    out, lse = decode_attention(
        q, k, v, Full(), key_padding_mask=ignore, block_size=32, enable_gqa=True, return_lse=True
    )
    expected, expected_lse = alone(q[:1], k[:1, :, ~ignore[0]], v[:1, :, ~ignore[0]], Full(), 32)
    torch.testing.assert_close(out[:1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse[:1], expected_lse, rtol=0, atol=1e-12)
    assert not out[1].any() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype):
    q, k, v = drawn(2, 200, 1, dtype)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :180] for x in (k, v))
    out = decode_attention(q, k, v, Local(70, 0), block_size=32, enable_gqa=True)
    assert out.dtype == dtype
    expected, _ = alone(q, k, v, Local(70, 0), 32)
    error = (out.double() - expected).abs().max()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


def test_one_key_and_a_cache_shorter_than_a_tile():
    q, k, v = drawn(2, 5, 1)
    out, lse = decode_attention(
        q, k, v, Full(), lengths=torch.tensor([1, 5]), enable_gqa=True, return_lse=True
    )
    for b, length in enumerate((1, 5)):
        own = slice(b, b + 1)
        expected, expected_lse = alone(q[own], k[own, :, :length], v[own, :, :length], Full(), 128)
        torch.testing.assert_close(out[own], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[own], expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("q_len", [1, 16])
def test_queries_before_the_first_key_get_nothing(q_len):
    q, k, v = drawn(3, 90, q_len)
    lengths = (0, 3, 40)
    out, lse = decode_attention(
        q, k, v, Full(), lengths=torch.tensor(lengths), block_size=16, enable_gqa=True, return_lse=True
    )
    for b, length in enumerate(lengths):
        without = max(0, q_len - length)
        assert not out[b, :, :without].any() and (lse[b, :, :without] == -math.inf).all()
        assert lse[b, :, without:].isfinite().all()
        if length >= 3:
            own = slice(b, b + 1)
            some = q[own, :, without:]
            expected, _ = alone(some, k[own, :, :length], v[own, :, :length], Full(), 16)
            torch.testing.assert_close(out[own, :, without:], expected, rtol=0, atol=1e-12)


def test_long_rows_are_walked_in_steps(monkeypatch):
    q, k, v = drawn(2, 700, 5)
    options = {"lengths": torch.tensor([700, 333]), "block_size": 32, "enable_gqa": True, "return_lse": True}
    pattern = Global(40, rows=False) | Strided(96, 32) | Local(100)
    at_once = decode_attention(q, k, v, pattern, **options)
    monkeypatch.setattr(cpu_decode, "_ELEMENTS", 3 * 32 * DIM)
    for a, b in zip(at_once, decode_attention(q, k, v, pattern, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_neither_the_cache_nor_the_scores_of_all_keys_are_copied():
    q, k, v = drawn(1, 60_000, 1, torch.float32)
    call = lambda: decode_attention(q, k, v, Full(), enable_gqa=True)  # noqa: E731
    call()
    assert peak_memory(call, torch.device("cpu")) < k.nbytes
    some = lambda: decode_attention(q, k, v, Local(200, 0), enable_gqa=True)  # noqa: E731
    some()
    assert peak_memory(some, torch.device("cpu")) < k.nbytes / 20


def test_views_of_masks_and_tables():
    q, k, v = drawn(2, 128, 2)
    ignore = torch.rand(128, 4) < 0.4
    wide = torch.rand(2, 300) < 0.4
    for mask in (ignore.T[::2], wide[:, 7:135]):
        options = {"key_padding_mask": mask, "block_size": 32, "enable_gqa": True}
        expected = decode_attention(q, k, v, Full(), **{**options, "key_padding_mask": mask.contiguous()})
        for backend in ("cpu", "reference"):
            out = decode_attention(q, k, v, Full(), **options, backend=backend)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    pages = k.unflatten(2, (4, 32)).transpose(1, 2).flatten(0, 1)
    table = torch.arange(8).view(2, 4).T.contiguous().T
    for backend in ("cpu", "reference"):
        paged = decode_attention(
            q, pages, pages, Full(), page_table=table, block_size=32, enable_gqa=True, backend=backend
        )
        expected = decode_attention(q, k, k, Full(), block_size=32, enable_gqa=True)
        torch.testing.assert_close(paged, expected, rtol=0, atol=1e-12)


def test_autocast_and_any_scale():
    q, k, v = drawn(1, 100, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = decode_attention(q, k, v, Full(), enable_gqa=True)
    assert out.dtype == torch.bfloat16
    sharp = decode_attention(q, k, v, Full(), enable_gqa=True, scale=-1.5)
    expected, _ = alone(q * (-1.5 * math.sqrt(DIM)), k, v, Full(), 128)
    torch.testing.assert_close(sharp.double(), expected, rtol=0, atol=1e-5)


def test_a_layout_of_ones_own():
    q, k, v = drawn(2, 200, 3)
    mask = (torch.rand(HEADS, 220, 220) < 0.3).tril()
    layout = BlockLayout.from_dense_mask(mask, 32)
    out = decode_attention(q, k, v, layout, lengths=torch.tensor([200, 77]), enable_gqa=True)
    for b, length in enumerate((200, 77)):
        own, rows = slice(b, b + 1), mask[:, length - 3 : length, :length]
        keys, values = (x[own, :, :length].repeat_interleave(2, 1) for x in (k, v))
        scores = (q[own] @ keys.transpose(2, 3) / math.sqrt(DIM)).masked_fill(~rows, -math.inf)
        torch.testing.assert_close(out[own], scores.softmax(-1).nan_to_num() @ values, rtol=0, atol=1e-12)


@runs(60)
@given(hypothesis.data())
def test_only_patterns_that_need_no_length_are_the_same_in_a_longer_layout(data):
    length, longer = data.draw(hypothesis.integers(1, 300)), data.draw(hypothesis.integers(300, 600))
    pattern = data.draw(pattern_draws.pattern(length, 32))
    if pattern.needs_length:
        assert any(name in repr(pattern) for name in ("Documents", "Budget"))
        return
    short, long = (
        BlockLayout.from_pattern(pattern & Causal(), n, n, 32, heads=pattern_draws.HEADS)
        for n in (length, longer)
    )
    for head in range(short.heads):
        assert torch.equal(short.to_dense(head), long.to_dense(head)[:length, :length])


@pytest.mark.parametrize(
    "pattern",
    [
        Documents([60, 40]),
        Budget("local_window", 0.3),
        Local(3) | Documents([100]),
        Budget("global_local", 0.2).block_aligned(),
        Hierarchical(2, causal=True) & Local(30),
    ],
    ids=repr,
)
def test_refuses_patterns_that_change_with_each_key(pattern):
    q, k, v = drawn(1, 100, 1)
    with pytest.raises(PatternError, match="does not depend on the number of keys"):
        decode_attention(q, k, v, pattern, enable_gqa=True)


def test_refuses_bad_calls():
    q, k, v = drawn(2, 100, 1)
    call = {"enable_gqa": True}
    with pytest.raises(ArgumentError, match="1 to 16"):
        decode_attention(q.expand(2, HEADS, 17, DIM), k, v, Local(3), **call)
    with pytest.raises(ArgumentError, match="enable_gqa=True"):
        decode_attention(q, k, v, Local(3))
    with pytest.raises(ArgumentError, match="one of float16"):
        decode_attention(q.float(), k, v, Local(3), **call)
    with pytest.raises(ArgumentError, match="lengths: expected int32 or int64"):
        decode_attention(q, k, v, Local(3), lengths=torch.tensor([3]), **call)
    with pytest.raises(ArgumentError, match="requires a gradient"):
        decode_attention(q.requires_grad_(), k, v, Local(3), **call)
    q = q.detach()
    with pytest.raises(ArgumentError, match="page size: expected a multiple of the tile's 128"):
        decode_attention(q, k, v, Local(3), page_table=torch.zeros(2, 1, dtype=torch.int32), **call)
    with pytest.raises(ArgumentError, match="starts with page_table"):
        table = torch.zeros(2, 1, dtype=torch.int32)
        decode_attention(q, k, v, Local(3), page_table=table, starts=torch.tensor([0, 0]), **call)
    with pytest.raises(ArgumentError, match="lengths: expected 0 to 100"):
        decode_attention(q, k, v, Local(3), lengths=torch.tensor([3, 101]), **call)
    with pytest.raises(LayoutError, match="starts below 0: expected at least 5100"):
        decode_attention(q, k, v, Local(3), starts=torch.tensor([0, -5000]), **call)
    with pytest.raises(ArgumentError, match="key_padding_mask: expected bool"):
        decode_attention(q, k, v, Local(3), key_padding_mask=torch.zeros(2, 99, dtype=torch.bool), **call)
    with pytest.raises(BackendError, match="derivatives"):
        torch.func.vmap(lambda x: decode_attention(x, k, v, Local(3), **call))(q[None])
    with pytest.raises(LayoutError, match="as many queries as keys"):
        short = BlockLayout.from_pattern(Causal(), 90)
        decode_attention(q, k, v, short, **call)
    with pytest.raises(BackendError, match="hopper: has no kernel for decoding"):
        decode_attention(q, k, v, Local(3), backend="hopper", **call)
    with pytest.raises(ArgumentError, match="Did you mean 'triton'"):
        decode_attention(q, k, v, Local(3), backend="tritan", **call)
    with pytest.raises(BackendError, match="triton: serves fp16, bf16 and fp32"):
        decode_attention(q, k, v, Local(3), backend="triton", **call)
