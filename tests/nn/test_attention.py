"""The base module: exact over its layout, with what PyTorch users do to modules."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

import sparsetile as st
from sparsetile.errors import ArgumentError, PatternError
from sparsetile.layout.cache import layout_cache

KINDS = ("local_window", "dilated_sparse", "global_local", "ultra_sparse")


def inputs(batch=2, q_len=150, k_len=150, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, q_len, heads, dim), (batch, k_len, kv_heads, dim), (batch, k_len, kv_heads, dim)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def dense(q, k, v, mask):
    share = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ratio", [0.3, None])
@pytest.mark.filterwarnings("ignore::UserWarning")  # ultra_sparse has its least; tested below
def test_equals_dense_attention_under_the_layouts_mask(kind, causal, ratio):
    config = st.SparsePatternConfig(kind, sparsity_ratio=ratio, block_size=16)
    module = st.BlockSparseRingDilatedAttention(sparse_config=config)
    q, k, v = inputs(q_len=100)
    mask = module.layout_for(100, 150, causal).to_dense()
    expected = dense(q, k, v, mask)
    weight = torch.randn_like(expected)
    out = module(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(expected, (q, k, v), weight)
    for got, want in zip(torch.autograd.grad(out, (q, k, v), weight), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_one_softmax_over_all_tiles():
    # Tiles softmaxed alone, each with its own denominator, would give 2 here.
    module = st.BlockSparseRingDilatedAttention(
        sparse_config=st.SparsePatternConfig("local_window", sparsity_ratio=0.5, block_size=16)
    )
    q, k = torch.zeros(2, 1, 64, 1, 16).unbind()
    out = module(q, k, torch.ones(1, 64, 1, 16))
    torch.testing.assert_close(out, torch.ones(1, 64, 1, 16))


def test_ratios_differ_in_tiles_and_output():
    q, k, v = inputs(q_len=256, k_len=256)
    made = [
        st.BlockSparseRingDilatedAttention(
            sparse_config=st.SparsePatternConfig("global_local", sparsity_ratio=r, block_size=16)
        )
        for r in (0.1, 0.3, 1.0)
    ]
    counts = [m.layout_for(256).nnz for m in made]
    assert counts == [16 * 2, 16 * 5, 16 * 16]
    outs = [m(q, k, v) for m in made]
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])
    torch.testing.assert_close(outs[2], dense(q, k, v, None), rtol=1e-10, atol=1e-10)


def test_segments_and_rates_act():
    q, k, v = inputs(q_len=1024, k_len=1024, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outs = [
            st.BlockSparseRingDilatedAttention(w, r, st.SparsePatternConfig("dilated_sparse", ratio, 16))(
                q, k, v
            )
            for w, r, ratio in (
                ([256], [1], 0.1),
                ([512], [2], 0.1),
                ([256, 1024], [1, 4], 0.1),
                ([256], [1], None),
                ([256], [2], None),
            )
        ]
    for i, a in enumerate(outs):
        for b in outs[i + 1 :]:
            assert not torch.allclose(a, b)


def test_padding_weights_and_scale():
    module = st.BlockSparseRingDilatedAttention(
        sparse_config=st.SparsePatternConfig("local_window", sparsity_ratio=0.4, block_size=16), scale=0.4
    )
    q, k, v = inputs(q_len=80, k_len=80)
    padding = torch.zeros(2, 80, dtype=torch.bool)
    padding[1, 50:] = True
    mask = module.layout_for(80).to_dense() & ~padding[:, None, None, :]
    logits = (q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT) * 0.4
    expected = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    out, weights = module(q, k, v, key_padding_mask=padding, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        out, (expected @ v.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2), rtol=1e-9, atol=1e-10
    )
    _, averaged = module(q, k, v, key_padding_mask=padding, need_weights=True)
    torch.testing.assert_close(averaged, expected.mean(1), rtol=1e-9, atol=1e-10)
    _, tiles = module(q, k, v, key_padding_mask=padding, need_weights=True, weights="sparse")
    assert tiles.layout is torch.sparse_bsr
    torch.testing.assert_close(tiles.to_dense()[:, :80, :80], expected.mean(1), rtol=1e-9, atol=1e-10)


def test_dropout_acts_in_training_alone():
    module = st.BlockSparseRingDilatedAttention(sparsity_ratio=1.0, dropout=0.4)
    q, k, v = (x.detach() for x in inputs())
    assert not torch.equal(module(q, k, v), module(q, k, v))
    module.eval()
    assert torch.equal(module(q, k, v), module(q, k, v))


def test_density_report_and_warning():
    module = st.create_block_sparse_attention("base", segment_lengths=[2048], sparsity_ratio=0.5)
    report = module.density_for(8192)
    assert report.requested == 0.5 and report.realised == 0.25 and report.reason is not None
    x = torch.randn(1, 8192, 1, 16)
    with pytest.warns(UserWarning, match=r"asked for density 0.5, computes 0.25 at 8192 × 8192 tokens"):
        module(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, x, x)  # once is enough
        fitting = st.create_block_sparse_attention("base", segment_lengths=[2048], sparsity_ratio=0.2)
        fitting(x, x, x)
    assert fitting.density_for(8192) == (0.2, 13 / 64, None)


def test_layouts_come_from_the_shared_cache_across_copies():
    module = st.BlockSparseRingDilatedAttention([512], [2], sparsity_ratio=0.25)
    x = torch.randn(1, 700, 1, 16)
    out = module(x, x, x, is_causal=True)
    layout = module.layout_for(700, is_causal=True)
    before = layout_cache.stats()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.layout_for(700, is_causal=True) is layout
        assert torch.equal(twin(x, x, x, is_causal=True), out)
        assert twin(x.half(), x.half(), x.half()).dtype == torch.float16
        assert twin(x[:, :300], x[:, :300], x[:, :300]).shape == (1, 300, 1, 16)
    after = layout_cache.stats()
    assert after.hits > before.hits and not module.state_dict() and not list(module.buffers())


def test_saved_and_loaded(tmp_path):
    module = st.BlockSparseRingDilatedAttention(sparsity_ratio=0.3)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = torch.randn(1, 300, 2, 16)
    assert torch.equal(loaded(x, x, x), module(x, x, x)) and repr(loaded) == repr(module)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: st.BlockSparseRingDilatedAttention([64], [1, 2]), PatternError, "as many rates as lengths"),
        (lambda: st.BlockSparseRingDilatedAttention([64], [128]), PatternError, "no rate above"),
        (lambda: st.BlockSparseRingDilatedAttention([], []), PatternError, "not empty"),
        (lambda: st.BlockSparseRingDilatedAttention([-4], [1]), PatternError, "from 1"),
        (lambda: st.BlockSparseRingDilatedAttention(64, 1), PatternError, "got 64 and 1"),
        (lambda: st.BlockSparseRingDilatedAttention(64), PatternError, "two lists"),
        (lambda: st.BlockSparseRingDilatedAttention(scale=math.nan), ArgumentError, "finite"),
        (lambda: st.BlockSparseRingDilatedAttention(scale=torch.ones(1)), ArgumentError, "Python number"),
        (lambda: st.BlockSparseRingDilatedAttention(backend=["cpu"]), ArgumentError, "Did you mean 'cpu'"),
        (lambda: st.BlockSparseRingDilatedAttention(sparsity_ratio=0.0), PatternError, "0"),
        (lambda: st.BlockSparseRingDilatedAttention(dropout=1.0), ArgumentError, "0 ≤ p < 1"),
        (lambda: st.BlockSparseRingDilatedAttention(backend="gpu"), ArgumentError, "gpu"),
        (lambda: st.BlockSparseRingDilatedAttention(ring=object()), ArgumentError, "process group"),
        (
            lambda: st.BlockSparseRingDilatedAttention(sparse_config="local"),
            PatternError,
            "SparsePatternConfig",
        ),
        (
            lambda: st.BlockSparseRingDilatedAttention(
                sparse_config=st.SparsePatternConfig("local_window"), sparsity_ratio=0.1
            ),
            PatternError,
            "None beside a sparse_config",
        ),
        (
            lambda: st.BlockSparseRingDilatedAttention([64], [1], st.SparsePatternConfig("local_window")),
            PatternError,
            "has no branches",
        ),
    ],
)
def test_errors_of_construction(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_errors_of_a_call():
    module = st.BlockSparseRingDilatedAttention()
    x = torch.randn(1, 40, 2, 16)
    with pytest.raises(ArgumentError, match=r"\[B, N, H, D\]"):
        module(x[0], x[0], x[0])
    with pytest.raises(ArgumentError, match=r"k: expected a torch\.Tensor"):
        module(x, None, None)
    with pytest.raises(ArgumentError, match=r"is_causal: expected True or False, got a tensor \[1, 40\]"):
        module(x, x, x, torch.zeros(1, 40, dtype=torch.bool))
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x[0], x[0, :9]], layout=layout)
        with pytest.raises(ArgumentError, match="nested"):
            module(nested, nested, nested)
    with pytest.raises(ArgumentError, match="to_dense"):
        module(x.to_sparse(), x, x)
    with pytest.raises(ArgumentError, match="weights"):
        module(x, x, x, weights="sparse")
    with pytest.raises(ArgumentError, match="key_padding_mask"):
        module(x, x, x, key_padding_mask=torch.zeros(1, 39, dtype=torch.bool))
    long = torch.zeros(1, 1, 1, 16).expand(1, 40_000, 1, 16)
    with pytest.raises(ArgumentError, match="need_weights=False"):
        module(long, long, long, need_weights=True)


def test_layouts_are_made_on_the_cpu_under_any_default_device():
    module = st.BlockSparseRingDilatedAttention(sparsity_ratio=0.21)
    with torch.device("meta"):
        layout = module.layout_for(1234)
    assert layout.device.type == "cpu" and layout.nnz == 10 * 2
