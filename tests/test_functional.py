"""sparse_attention equals F.scaled_dot_product_attention under the dense mask; bad input says so."""

import math

import pytest
import torch
import torch.nn.functional as F

import sparsetile as st
from sparsetile.errors import ArgumentError, BackendError, LayoutError, PatternError

PATTERN = st.Local(40) | st.Global(5)


def dense_mask(pattern, q_len, k_len, block=16, head=0):
    offset = k_len - q_len
    q = torch.arange(q_len)[:, None] + offset
    return pattern.resolve(block, block, offset).allows(q, torch.arange(k_len)[None, :], head)


def inputs(batch=2, heads=4, kv_heads=4, q_len=75, k_len=75, dim=16, dtype=torch.float64, seed=None):
    seed = torch.seed() % 2**31 if seed is None else seed
    print(f"seed {seed}")
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def sdpa(q, k, v, mask, scale=None):
    rep = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("q_len", "k_len", "causal"), [(75, 75, False), (75, 75, True), (9, 75, True)])
def test_equals_masked_dense_attention_with_gradients(backend, q_len, k_len, causal):
    q, k, v = inputs(kv_heads=2, q_len=q_len, k_len=k_len)
    pattern = PATTERN & st.Causal() if causal else PATTERN
    expected = sdpa(q, k, v, dense_mask(pattern, q_len, k_len))
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), weight)
    out = st.sparse_attention(
        q, k, v, PATTERN, is_causal=causal, block_size=16, enable_gqa=True, backend=backend
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(out, (q, k, v), weight), expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"memory": "auto"}, {"memory": "low"}, {"deterministic": True}], ids=str)
def test_every_form_of_backward_equals_masked_dense_attention(options):
    q, k, v = inputs()
    expected = sdpa(q, k, v, dense_mask(PATTERN, 75, 75))
    weight = torch.randn_like(expected)
    out = st.sparse_attention(q, k, v, PATTERN, block_size=16, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    want = torch.autograd.grad(expected, (q, k, v), weight)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), weight), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_scale_padding_and_biases_act():
    q, k, v = inputs()
    mask = dense_mask(PATTERN, 75, 75)
    padding = torch.rand(2, 75) < 0.3
    padding[:, 0] = False  # the global token stays, so no row is empty
    bias = torch.randn(1, 4, 75, 75, dtype=torch.float64, requires_grad=True)
    layout = st.BlockLayout.from_pattern(PATTERN, 75, block_size=16)
    tile_bias = torch.randn(layout.capacity, dtype=torch.float64, requires_grad=True)
    dense_tiles = torch.zeros(5 * 16, 5 * 16, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(layout.q_blocks), layout.indptr.diff().long())
    tiles = torch.zeros(5, 5, dtype=torch.float64).index_put((rows, layout.indices.long()), tile_bias)
    dense_tiles = tiles.repeat_interleave(16, 0).repeat_interleave(16, 1)[:75, :75]
    allowed = mask & ~padding[:, None, None, :]
    additive = (bias + dense_tiles).masked_fill(~allowed, -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=0.7)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v, bias, tile_bias), weight)
    out = st.sparse_attention(
        q, k, v, layout, scale=0.7, key_padding_mask=padding, attn_bias=bias, tile_bias=tile_bias
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(out, (q, k, v, bias, tile_bias), weight), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_dropout_keeps_the_mean_and_follows_the_generator():
    q, k, v = inputs(dtype=torch.float32)
    plain = st.sparse_attention(q, k, v, PATTERN, block_size=16)
    torch.manual_seed(7)
    first = st.sparse_attention(q, k, v, PATTERN, block_size=16, dropout_p=0.4)
    torch.manual_seed(7)
    again = st.sparse_attention(q, k, v, PATTERN, block_size=16, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain)
    draws = torch.stack(
        [st.sparse_attention(q, k, v, PATTERN, block_size=16, dropout_p=0.4) for _ in range(200)]
    )
    error = (draws.mean(0) - plain).abs().mean() / draws.std(0).mean()
    assert error < 3 / math.sqrt(200)


def test_patterns_that_differ_by_head():
    q, k, v = inputs(heads=2, kv_heads=2)
    pattern = st.Strided(64, unit=16, head_shift=16)
    mask = torch.stack([dense_mask(pattern, 75, 75, head=h) for h in range(2)])
    keep = mask.any(-1)
    expected = sdpa(q, k, v, mask).nan_to_num() * keep[..., None]
    out = st.sparse_attention(q, k, v, pattern, block_size=16)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_rows_without_keys_are_zero_with_zero_gradient():
    q, k, v = inputs(q_len=40, k_len=8)
    out, lse = st.sparse_attention(q, k, v, st.Causal(), block_size=16, return_lse=True)
    assert torch.equal(out[:, :, :32], torch.zeros_like(out[:, :, :32]))
    assert torch.isneginf(lse[:, :, :32]).all()
    assert torch.isfinite(lse[:, :, 32:]).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 32:].sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][:, :, :32].any()


def test_autocast_takes_its_dtype():
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = st.sparse_attention(q, k, v, PATTERN, block_size=16)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_double_precision():
    q = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = st.sparse_attention(q, q, q, st.Local(9))
    assert torch.equal(out, st.sparse_attention(q, q, q, st.Local(9)))


def test_gradcheck():
    q, k, v = inputs(batch=1, heads=2, kv_heads=1, q_len=19, k_len=19, dim=16)
    layout = st.BlockLayout.from_pattern(st.Local(7) & st.Causal(), 19, block_size=16)
    tile_bias = torch.randn(layout.capacity, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, tile_bias):
        return st.sparse_attention(q, k, v, layout, tile_bias=tile_bias, enable_gqa=True, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v, tile_bias), fast_mode=True)


def test_merge_is_attention_over_the_union():
    q, k, v = inputs()
    near, far = st.Local(20), st.Full()
    mask_near, everything = dense_mask(near, 75, 75), dense_mask(far, 75, 75)
    rest = st.BlockLayout.from_dense_mask(everything & ~mask_near, block_size=16)
    parts = [
        st.sparse_attention(q, k, v, near, block_size=16, return_lse=True),
        st.sparse_attention(q, k, v, rest, return_lse=True),
    ]
    out, lse = st.merge_attention(*parts)
    expected = sdpa(q, k, v, everything)
    logits = (q @ k.transpose(-1, -2)) / 4.0
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    loss = (out * weight).sum() + lse.sin().sum()
    wanted = (expected * weight).sum() + logits.logsumexp(-1).sin().sum()
    for got, want in zip(
        torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(wanted, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_merge_keeps_empty_rows_empty():
    q, k, v = inputs(q_len=40, k_len=8)
    part = st.sparse_attention(q, k, v, st.Causal(), block_size=16, return_lse=True)
    other = st.sparse_attention(q, k, v, st.Causal() & st.Local(2), block_size=16, return_lse=True)
    out, lse = st.merge_attention(part, other)
    assert not out[:, :, :32].any()
    assert torch.isneginf(lse[:, :, :32]).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 32:].sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)


def layout75(**kwargs):
    return st.BlockLayout.from_pattern(st.Local(3), 75, block_size=16, **kwargs)


X = torch.randn(1, 4, 75, 16)
BAD = {
    "rank": (lambda: st.sparse_attention(X[0], X[0], X[0], PATTERN), ArgumentError, r"\[B, H, N, D\]"),
    "not a tensor": (lambda: st.sparse_attention([1], X, X, PATTERN), ArgumentError, "torch.Tensor"),
    "mixed dtypes": (lambda: st.sparse_attention(X, X.half(), X, PATTERN), ArgumentError, "dtypes"),
    "integers": (lambda: st.sparse_attention(X.int(), X.int(), X.int(), PATTERN), ArgumentError, "dtypes"),
    "mixed devices": (lambda: st.sparse_attention(X, X.to("meta"), X, PATTERN), ArgumentError, "devices"),
    "value of another shape": (
        lambda: st.sparse_attention(X, X, X[:, :, :9], PATTERN),
        ArgumentError,
        "shapes",
    ),
    "empty": (lambda: st.sparse_attention(X[:, :, :0], X, X, PATTERN), ArgumentError, "empty"),
    "gqa not allowed": (
        lambda: st.sparse_attention(X, X[:, :2], X[:, :2], PATTERN),
        ArgumentError,
        "enable_gqa",
    ),
    "heads do not divide": (
        lambda: st.sparse_attention(X, X[:, :3], X[:, :3], PATTERN, enable_gqa=True),
        ArgumentError,
        "multiple",
    ),
    "layout of another length": (
        lambda: st.sparse_attention(X[:, :, :9], X, X, layout75()),
        LayoutError,
        "q_len 9 and k_len 75",
    ),
    "layout of another device": (
        lambda: st.sparse_attention(X.to("meta"), X.to("meta"), X.to("meta"), layout75()),
        LayoutError,
        "device",
    ),
    "layout of other heads": (
        lambda: st.sparse_attention(
            X[:, :3],
            X[:, :3],
            X[:, :3],
            st.BlockLayout.from_pattern(st.Random(0.5, by_head=True), 75, block_size=16, heads=4),
        ),
        LayoutError,
        "heads",
    ),
    "is_causal with a layout": (
        lambda: st.sparse_attention(X, X, X, layout75(), is_causal=True),
        ArgumentError,
        "Causal",
    ),
    "dense mask as pattern": (
        lambda: st.sparse_attention(X, X, X, torch.ones(75, 75).bool()),
        ArgumentError,
        "from_dense_mask",
    ),
    "NaN scale": (lambda: st.sparse_attention(X, X, X, PATTERN, scale=math.nan), ArgumentError, "finite"),
    "dropout 1": (lambda: st.sparse_attention(X, X, X, PATTERN, dropout_p=1.0), ArgumentError, "dropout_p"),
    "padding of another length": (
        lambda: st.sparse_attention(X, X, X, PATTERN, key_padding_mask=torch.zeros(1, 3).bool()),
        ArgumentError,
        "key_padding_mask",
    ),
    "float padding": (
        lambda: st.sparse_attention(X, X, X, PATTERN, key_padding_mask=torch.zeros(1, 75)),
        ArgumentError,
        "key_padding_mask",
    ),
    "bias shape": (
        lambda: st.sparse_attention(X, X, X, PATTERN, attn_bias=torch.zeros(75, 75)),
        ArgumentError,
        "attn_bias",
    ),
    "boolean bias": (
        lambda: st.sparse_attention(X, X, X, PATTERN, attn_bias=torch.ones(1, 1, 75, 75).bool()),
        ArgumentError,
        "from_dense_mask",
    ),
    "tile bias count": (
        lambda: st.sparse_attention(X, X, X, layout75(), tile_bias=torch.zeros(3)),
        ArgumentError,
        "one value a tile",
    ),
    "block 24": (lambda: st.sparse_attention(X, X, X, PATTERN, block_size=24), LayoutError, "24"),
    "block as text": (
        lambda: st.sparse_attention(X, X, X, PATTERN, block_size="128"),
        ArgumentError,
        "block_size",
    ),
    "three blocks": (
        lambda: st.sparse_attention(X, X, X, PATTERN, block_size=(16, 16, 16)),
        ArgumentError,
        "two ints",
    ),
    "a mask for is_causal": (
        lambda: st.sparse_attention(X, X, X, PATTERN, is_causal=torch.zeros(75, 75)),
        ArgumentError,
        "is_causal",
    ),
    "text for is_causal": (
        lambda: st.sparse_attention(X, X, X, PATTERN, is_causal="no"),
        ArgumentError,
        "'no'",
    ),
    "a sparse query": (
        lambda: st.sparse_attention(X.to_sparse(), X, X, PATTERN),
        ArgumentError,
        "query: expected a dense tensor",
    ),
    "unknown memory": (
        lambda: st.sparse_attention(X, X, X, PATTERN, memory="lo"),
        ArgumentError,
        "memory: expected 'auto' or 'low', got 'lo'",
    ),
    "None for memory": (
        lambda: st.sparse_attention(X, X, X, PATTERN, memory=None),
        ArgumentError,
        "memory: expected 'auto' or 'low', got None",
    ),
    "a list for memory": (
        lambda: st.sparse_attention(X, X, X, PATTERN, memory=["low"]),
        ArgumentError,
        "memory: expected",
    ),
    "text for deterministic": (
        lambda: st.sparse_attention(X, X, X, PATTERN, deterministic="no"),
        ArgumentError,
        "deterministic: expected True or False, got 'no'",
    ),
    "scale as text": (lambda: st.sparse_attention(X, X, X, PATTERN, scale="1"), ArgumentError, "scale"),
    "padding as list": (
        lambda: st.sparse_attention(X, X, X, PATTERN, key_padding_mask=[1]),
        ArgumentError,
        "torch.Tensor",
    ),
    "unknown backend": (
        lambda: st.sparse_attention(X, X, X, PATTERN, backend="tritn"),
        ArgumentError,
        "Did you mean 'triton'",
    ),
    "backend that cannot": (
        lambda: st.sparse_attention(X.double(), X.double(), X.double(), PATTERN, backend="triton"),
        BackendError,
        "triton: ",
    ),
    "documents of another length": (
        lambda: st.sparse_attention(X, X, X, st.Documents((10, 20)), block_size=16),
        PatternError,
        "75",
    ),
    "merge of nothing": (lambda: st.merge_attention(), ArgumentError, "none"),
    "merge of other shapes": (
        lambda: st.merge_attention((X, X[..., 0]), (X[:, :2], X[:, :2, :, 0])),
        ArgumentError,
        "same queries",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_expected_got_and_fix(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    message = str(caught.value)
    assert "expected" in message
    assert "got" in message
    assert "\n" not in message


def test_meta_tensors_have_shapes_and_no_values():
    q = X.to("meta")
    out, lse = st.sparse_attention(q, q, q, layout75().to("meta"), return_lse=True)
    assert out.shape == X.shape
    assert out.device.type == "meta"
    assert lse.shape == X.shape[:3]


def test_second_derivative_raises():
    q, k, v = inputs()
    out = st.sparse_attention(q, k, v, PATTERN, block_size=16)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(BackendError, match="second derivative"):
        grad.sum().backward()


def test_a_pattern_may_be_its_text():
    q, k, v = inputs()
    for causal in (False, True):
        expected = st.sparse_attention(q, k, v, PATTERN, block_size=16, is_causal=causal)
        out = st.sparse_attention(q, k, v, repr(PATTERN), block_size=16, is_causal=causal)
        assert torch.equal(out, expected)
    with pytest.raises(PatternError, match="Did you mean Local"):
        st.sparse_attention(q, k, v, "Locl(3)")
