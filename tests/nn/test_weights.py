"""Weights on request are the weights of the call's own softmax, dense or on its tiles."""

import math

import pytest
import torch

import sparsetile as st
from sparsetile.errors import ArgumentError
from sparsetile.nn import weights as module
from sparsetile.nn.weights import attention_weights, check_form, dense_weights, sparse_weights

PATTERN = st.Local(20) | st.Global(5)
BY_HEAD = st.Strided(64, unit=16, head_shift=16)


def case(pattern, features="", q_len=70, k_len=70, heads=4, kv_heads=4, dtype=torch.float64):
    """q, k, the options of the call, its log-sum-exp, and the weights by a dense softmax."""
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    torch.manual_seed(seed)
    q = torch.randn(2, heads, q_len, 8, dtype=dtype, requires_grad=True)
    k = torch.randn(2, kv_heads, k_len, 8, dtype=dtype, requires_grad=True)
    options = {"block_size": 16}
    if "scale" in features:
        options["scale"] = 0.7
    if "padding" in features:
        options["key_padding_mask"] = torch.rand(2, k_len) < 0.3
    if "bias" in features:
        bias = torch.randn(1, heads, q_len, k_len, dtype=dtype)
        options["attn_bias"] = bias.masked_fill(torch.rand(q_len, k_len) < 0.1, -math.inf).requires_grad_()
    layout = st.BlockLayout.from_pattern(pattern, q_len, k_len, 16, heads=heads)
    allowed = torch.stack([layout.to_dense(h) for h in range(layout.heads)])
    scale = options.get("scale", 1 / math.sqrt(8))
    logits = scale * q @ k.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2)
    if "bias" in features:
        logits = logits + options["attn_bias"]
    if "padding" in features:
        allowed = allowed & ~options["key_padding_mask"][:, None, None, :]
    logits = logits.masked_fill(~allowed, -math.inf)
    empty = logits.isneginf().all(-1, keepdim=True)
    expected = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    _, lse = st.sparse_attention(q, k, k, pattern, return_lse=True, enable_gqa=True, **options)
    return q, k, options, lse, expected


@pytest.mark.parametrize("pattern", [PATTERN, PATTERN & st.Causal(), BY_HEAD], ids=["", "causal", "heads"])
@pytest.mark.parametrize(("q_len", "k_len"), [(70, 70), (33, 90)])
@pytest.mark.parametrize("average", [False, True])
def test_both_forms_equal_a_dense_softmax(pattern, q_len, k_len, average):
    q, k, options, lse, expected = case(pattern, "scale padding bias", q_len, k_len)
    expected = expected.mean(1) if average else expected
    dense = attention_weights(q, k, lse, pattern, average=average, **options)
    torch.testing.assert_close(dense, expected, rtol=1e-9, atol=1e-12)
    sparse = attention_weights(q, k, lse, pattern, weights="sparse", average=average, **options)
    assert sparse.layout is torch.sparse_bsr
    rows, columns = -(-q_len // 16) * 16, -(-k_len // 16) * 16
    assert sparse.shape == (*expected.shape[:-2], rows, columns)
    written = sparse.to_dense()
    torch.testing.assert_close(written[..., :q_len, :k_len], expected, rtol=1e-9, atol=1e-12)
    assert written.count_nonzero() == written[..., :q_len, :k_len].count_nonzero()


def test_a_sparse_tensor_is_valid_and_holds_the_tiles_alone():
    q, k, options, lse, _ = case(PATTERN)
    layout = st.BlockLayout.from_pattern(PATTERN, 70, block_size=16)
    sparse = sparse_weights(q, k, lse, PATTERN, **options)
    assert sparse.values().shape == (2, 4, layout.nnz, 16, 16)
    again = torch.sparse_bsr_tensor(
        sparse.crow_indices(), sparse.col_indices(), sparse.values(), sparse.shape, check_invariants=True
    )
    assert st.BlockLayout.from_bsr(again[0, 0], q_len=70, k_len=70).nnz == layout.nnz


def test_a_bias_for_all_heads():
    q, k, options, _, _ = case(PATTERN)
    options["attn_bias"] = torch.randn(2, 1, 70, 70, dtype=q.dtype)
    _, lse = st.sparse_attention(q, k, k, PATTERN, return_lse=True, **options)
    sparse = sparse_weights(q, k, lse, PATTERN, **options).to_dense()[..., :70, :70]
    torch.testing.assert_close(sparse, dense_weights(q, k, PATTERN, **options))
    options["attn_bias"] = options["attn_bias"].expand(2, 4, 70, 70)
    torch.testing.assert_close(sparse, dense_weights(q, k, PATTERN, **options))


def test_ignored_keys_may_hold_anything():
    q, k, options, lse, expected = case(PATTERN, "padding")
    hidden = options["key_padding_mask"][:, None, :, None]
    for value in (math.nan, math.inf, 1e6):
        dirty = k.masked_fill(hidden, value)
        for form in ("dense", "sparse"):
            got = attention_weights(q, dirty, lse, PATTERN, weights=form, average=False, **options)
            got = got if form == "dense" else got.to_dense()[..., :70, :70]
            torch.testing.assert_close(got, expected)


def test_grouped_key_heads():
    q, k, options, lse, expected = case(PATTERN, heads=4, kv_heads=2)
    torch.testing.assert_close(dense_weights(q, k, PATTERN, **options), expected)
    sparse = sparse_weights(q, k, lse, PATTERN, **options).to_dense()[..., :70, :70]
    torch.testing.assert_close(sparse, expected)


@pytest.mark.parametrize("features", ["", "padding bias"])
def test_dense_weights_carry_the_gradient_of_the_softmax(features):
    q, k, options, _, expected = case(PATTERN, features)
    inputs = [q, k, *([options["attn_bias"]] if "bias" in features else [])]
    direction = torch.randn_like(expected)
    dense = dense_weights(q, k, repr(PATTERN), **options)
    wanted = torch.autograd.grad(expected, inputs, direction)
    for got, want in zip(torch.autograd.grad(dense, inputs, direction), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_weights_sum_to_one(dtype):
    q, k, options, lse, _ = case(PATTERN, dtype=dtype)
    dense = dense_weights(q, k, PATTERN, **options)
    assert dense.dtype == dtype
    # Rounding of each weight to dtype is all that is lost.
    error = (dense.float().sum(-1) - 1).abs().max()
    assert error < torch.finfo(dtype).eps
    sparse = sparse_weights(q, k, lse, PATTERN, **options)
    torch.testing.assert_close(sparse.to_dense()[..., :70, :70], dense)
    average = sparse_weights(q, k, lse, PATTERN, average=True, **options).to_dense()[..., :70, :70]
    assert average.dtype == dtype
    # Summed over heads before it is rounded.
    exact = dense_weights(q.double(), k.double(), PATTERN, **options).mean(1)
    torch.testing.assert_close(average.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=2**-24)


def test_weights_under_autocast_keep_the_precision_of_the_statistics():
    q, k, options, lse, expected = case(PATTERN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = dense_weights(q, k, PATTERN, **options)
        sparse = sparse_weights(q, k, lse, PATTERN, **options)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sparse.to_dense()[..., :70, :70], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("average", [False, True])
def test_weights_of_a_call_under_autocast_are_of_what_it_attended(form, average):
    torch.manual_seed(seed := torch.seed() % 2**31)
    print(f"seed {seed}")
    module = st.BlockSparseRingDilatedAttention(sparse_config=st.SparsePatternConfig(PATTERN, block_size=16))
    q, k, v = (3 * torch.randn(2, 80, 4, 64) for _ in range(3))
    options = {"need_weights": True, "weights": form, "average_attn_weights": average}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, weights = module(q, k, v, **options)
    _, exact = module(q.bfloat16().double(), k.bfloat16().double(), v.double(), **options)
    weights, exact = (x if form == "dense" else x.to_dense() for x in (weights, exact))
    assert weights.dtype == torch.bfloat16
    assert (weights.double() - exact).abs().max() < 2**-8


def test_compiles_without_graph_breaks():
    q, k, options, _, expected = case(PATTERN, "padding")

    def written(q, k):
        return dense_weights(q, k, PATTERN, **options)

    compiled = torch.compile(written, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), expected)


def test_past_the_size_the_ways_out_are_named(monkeypatch):
    q, k, options, lse, expected = case(PATTERN)
    monkeypatch.setattr(module, "DENSE_LIMIT", expected.numel() * 8)
    dense_weights(q, k, PATTERN, **options)
    monkeypatch.setattr(module, "DENSE_LIMIT", expected.numel() * 8 - 1)
    with pytest.raises(ArgumentError, match=r'need_weights=False.*weights="sparse"'):
        dense_weights(q, k, PATTERN, **options)
    assert sparse_weights(q, k, lse, PATTERN, **options).shape == (2, 4, 80, 80)


def test_sparse_weights_of_a_long_sequence_stay_small():
    q = torch.randn(1, 2, 40_000, 8)
    _, lse = st.sparse_attention(q, q, q, st.Local(100), return_lse=True)
    sparse = sparse_weights(q, q, lse, st.Local(100), average=True)
    layout = st.BlockLayout.from_pattern(st.Local(100), 40_000)
    assert sparse.values().shape == (1, layout.nnz, 128, 128)
    total = torch.sparse_bsr_tensor(
        sparse.crow_indices()[0],
        sparse.col_indices()[0],
        sparse.values()[0],
        sparse.shape[1:],
        check_invariants=True,
    ) @ torch.ones(sparse.shape[-1], 1)
    torch.testing.assert_close(total[:40_000], torch.ones(40_000, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "need"), [("dens", True), ("sparse", False), (None, True)])
def test_an_unknown_or_idle_form_is_rejected(form, need):
    with pytest.raises(ArgumentError, match="weights"):
        check_form(form, need)
