"""The multi-head module equals nn.MultiheadAttention under its layout's mask, whatever is asked of it."""

import copy
import io
import math
import pickle
import random
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsetile as st
from sparsetile.errors import ArgumentError, PatternError, SparsetileError
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from sparsetile.patterns.config import SparsePatternConfig

# The first five keys are kept by every query, so that no row of the masks drawn below is empty.
SPARSE = SparsePatternConfig(pattern_type=st.Local(20) | st.Global(5), block_size=16)
BY_HEAD = SparsePatternConfig(
    pattern_type=st.Strided(48, unit=16, head_shift=16) | st.Local(10) | st.Global(5), block_size=16
)


def pair(*args, sparse_config=SPARSE, **options):
    """Our module and PyTorch's with the same weights, none of them at its initial zero."""
    dense = nn.MultiheadAttention(*args, **options)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.3)
    ours = Multihead(*args, sparse_config=sparse_config, **options)
    ours.load_state_dict(dense.state_dict(), strict=True)
    return ours, dense


def kept(module, q_len, k_len, is_causal=False):
    layout = module.layout_for(q_len, k_len, is_causal)
    return torch.stack([layout.to_dense(head) for head in range(layout.heads)])


def forbidden(module, q_len, k_len, attn_mask, is_causal, batch):
    """What nn.MultiheadAttention needs as attn_mask to do the same: float [L, S] or [B·H, L, S]."""
    mask = torch.zeros(q_len, k_len).masked_fill(~kept(module, q_len, k_len, is_causal), -math.inf)
    if mask.shape[0] > 1:
        mask = mask.repeat(batch, 1, 1)
    elif attn_mask is None or attn_mask.dim() == 2:
        mask = mask[0]
    if attn_mask is not None:
        added = attn_mask
        if added.dtype == torch.bool:
            added = torch.zeros(added.shape).masked_fill(added, -math.inf)
        mask = mask + added
    return mask.double()


def as_float(mask):
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)


def draw(rng):
    """A constructor's and a call's options, among all that nn.MultiheadAttention takes."""
    heads = rng.choice([1, 2, 4])
    width = heads * rng.choice([4, 8])
    made = {
        "embed_dim": width,
        "num_heads": heads,
        "bias": rng.random() < 0.7,
        "add_bias_kv": rng.random() < 0.3,
        "add_zero_attn": rng.random() < 0.3,
        "batch_first": rng.random() < 0.5,
        "dtype": torch.float64,
    }
    if rng.random() < 0.4:
        made["kdim"] = rng.choice([3, width])
        made["vdim"] = rng.choice([5, width])
    batch = rng.choice([None, 1, 3])
    q_len = rng.choice([1, 17, 50, 64])
    same = rng.random() < 0.4 and "kdim" not in made
    k_len = q_len if same else rng.choice([6, 17, 50, 70])
    call = {"need_weights": rng.random() < 0.5, "average_attn_weights": rng.random() < 0.5}
    lead = () if batch is None else (batch,)
    if rng.random() < 0.5:
        padding = torch.rand(*lead, k_len) < 0.3
        padding[..., 0] = False
        call["key_padding_mask"] = padding if rng.random() < 0.5 else torch.randn(*lead, k_len).double()
    if rng.random() < 0.6:
        shape = (q_len, k_len) if rng.random() < 0.5 else ((batch or 1) * heads, q_len, k_len)
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False
        call["attn_mask"] = mask if rng.random() < 0.5 else torch.randn(shape).double()
    if rng.random() < 0.25:
        call["attn_mask"] = torch.ones(q_len, k_len).triu(1).bool()
        call["is_causal"] = True
    return made, batch, q_len, k_len, same, call


def inputs(made, batch, q_len, k_len, same):
    width, first = made["embed_dim"], made["batch_first"]

    def make(length, features):
        shape = (length, features) if batch is None else (batch, length, features)
        x = torch.randn(shape, dtype=torch.float64)
        return (x if batch is None or first else x.transpose(0, 1)).requires_grad_()

    query = make(q_len, width)
    if same:
        return [query] * 3
    key = make(k_len, made.get("kdim", width))
    return [query, key, key if "kdim" not in made else make(k_len, made["vdim"])]


@pytest.mark.parametrize("config", [SPARSE, BY_HEAD], ids=["shared", "by head"])
@pytest.mark.parametrize("case", range(40))
def test_equals_dense_attention_under_the_layouts_mask(config, case):
    seed = random.SystemRandom().getrandbits(30)
    torch.manual_seed(seed)
    made, batch, q_len, k_len, same, call = draw(random.Random(seed))
    print(seed, made, batch, q_len, k_len, same, {k: getattr(v, "shape", v) for k, v in call.items()})
    ours, dense = pair(sparse_config=config, **made)
    tensors = inputs(made, batch, q_len, k_len, same)
    out, weights = ours(*tensors, **call)
    # For L ≠ S the hint is followed through the mask, within the pattern that is not causal.
    causal = call.get("is_causal", False) and q_len == k_len
    mask = forbidden(ours, q_len, k_len, call.get("attn_mask"), causal, batch or 1)
    padding = as_float(call.get("key_padding_mask"))
    plain = {name: call[name] for name in ("need_weights", "average_attn_weights")}
    wanted, wanted_weights = dense(*tensors, attn_mask=mask, key_padding_mask=padding, **plain)
    assert out.shape == wanted.shape
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    assert (weights is None) == (wanted_weights is None)
    score, wanted_score = (out * wanted.detach()).sum(), (wanted * wanted.detach()).sum()
    if weights is not None:
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-9, atol=1e-11)
        direction = torch.randn_like(weights)
        score, wanted_score = (
            score + (weights * direction).sum(),
            wanted_score + (wanted_weights * direction).sum(),
        )
    distinct = list({id(x): x for x in tensors}.values())
    got = torch.autograd.grad(score, [*distinct, *ours.parameters()])
    want = torch.autograd.grad(wanted_score, [*distinct, *dense.parameters()])
    names = ["query", "key", "value"][: len(distinct)] + [name for name, _ in ours.named_parameters()]
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("shape", [(40, 40), (6, 40, 40)])
def test_masks_that_are_learned_get_their_gradient(shape, need_weights):
    ours, dense = pair(16, 2, batch_first=True, dtype=torch.float64, add_zero_attn=True)
    x = torch.randn(3, 40, 16, dtype=torch.float64)
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    padding = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    out, weights = ours(x, x, x, padding, need_weights, mask)
    pattern = forbidden(ours, 40, 40, None, False, 3)
    wanted, wanted_weights = dense(x, x, x, padding, need_weights, mask + pattern)
    direction = torch.randn_like(out)
    score, wanted_score = (out * direction).sum(), (wanted * direction).sum()
    if need_weights:
        score, wanted_score = score + weights.square().sum(), wanted_score + wanted_weights.square().sum()
    got, want = (torch.autograd.grad(y, (mask, padding)) for y in (score, wanted_score))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["global_local", "local_window", "ultra_sparse"])
def test_with_density_one_equals_dense_attention(kind):
    ours, dense = pair(
        32, 4, batch_first=True, dtype=torch.float64, sparse_config=SparsePatternConfig(kind, 1.0)
    )
    x = torch.randn(2, 300, 32, dtype=torch.float64)
    for need_weights in (False, True):
        for got, want in zip(
            ours(x, x, x, None, need_weights), dense(x, x, x, None, need_weights), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_single_precision_rounds_no_more_than_pytorch():
    ours, dense = pair(64, 4, batch_first=True, sparse_config=SparsePatternConfig("global_local", 1.0))
    x = torch.randn(2, 300, 64)
    exact = copy.deepcopy(dense).double()(x.double(), x.double(), x.double(), need_weights=False)[0]
    mine, theirs = ((m(x, x, x, need_weights=False)[0] - exact).abs().mean() for m in (ours, dense))
    assert mine < 1.5 * theirs


def test_the_density_asked_for_is_used():
    module = Multihead(16, 2, batch_first=True, sparsity_ratio=0.25)
    x = torch.randn(1, 2048, 16)
    _, weights = module(x, x, x)
    tiles = weights[0].detach().view(16, 128, 16, 128).ne(0).any(3).any(1)
    assert torch.equal(tiles.sum(1), torch.full((16,), 4))
    assert module.layout_for(2048).nnz == 64
    assert module.density_for(2048).realised == pytest.approx(0.25)


def test_weights_are_of_the_tiles_of_the_blocks_asked_for():
    config = SparsePatternConfig("local_window", 0.3, block_size=16)
    ours, dense = pair(16, 2, batch_first=True, dtype=torch.float64, sparse_config=config)
    x = torch.randn(2, 96, 16, dtype=torch.float64)
    wanted, wanted_weights = dense(x, x, x, attn_mask=forbidden(ours, 96, 96, None, False, 2))
    for form in ("dense", "sparse"):
        out, weights = ours(x, x, x, weights=form)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(weights if form == "dense" else weights.to_dense(), wanted_weights)


def test_a_density_that_cannot_be_warns_once():
    config = SparsePatternConfig("ultra_sparse", 0.001, block_size=16)
    x = torch.randn(400, 1, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_data = x.to("meta")
        Multihead(16, 2, device="meta", sparse_config=config)(without_data, without_data, without_data)
    module = Multihead(16, 2, sparse_config=config)
    with pytest.warns(UserWarning, match=r"Multihead.* asked for density 0\.001, computes .* at 400 × 400"):
        module(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, x, x, need_weights=False)
        module(x[:300], x, x)


def test_constructor_says_what_contradicts():
    with pytest.raises(PatternError, match="sparsity_ratio"):
        Multihead(16, 2, sparsity_ratio=0.1, sparse_config=SPARSE)
    with pytest.raises(PatternError, match="segment_lengths"):
        Multihead(16, 2, segment_lengths=[64], sparse_config=SPARSE)
    with pytest.raises(ArgumentError, match="backend"):
        Multihead(16, 2, backend="cuda")
    with pytest.raises(AssertionError):
        Multihead(16, 3)
    branched = Multihead(16, 2, segment_lengths=[1024, 4096], dilation_rates=[1, 4], sparsity_ratio=0.2)
    assert branched.plan.config.pattern_type == "dilated_sparse"
    assert branched.plan.dilation_rates == (1, 4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_rows_that_attend_nothing(need_weights, appended):
    ours, _ = pair(16, 2, batch_first=True, dtype=torch.float64, add_zero_attn=appended)
    x = torch.randn(2, 30, 16, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(x, x, x, padding, need_weights)
    # Attention 0 before the output projection; with an appended zero key all weight is on its zero value.
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(30, 16))
    if need_weights:
        assert not weights[1, :, :30].any()
    (out.sum() + (weights.sum() if need_weights else 0)).backward()
    assert all(torch.isfinite(p.grad).all() for p in [x, *ours.parameters()])


def test_state_dicts_load_strictly_both_ways():
    for options in (
        {},
        {"kdim": 5, "vdim": 7},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
    ):
        dense, ours = nn.MultiheadAttention(16, 2, **options), Multihead(16, 2, **options)
        assert list(ours.state_dict()) == list(dense.state_dict())
        assert not list(ours.buffers())
        ours.load_state_dict(dense.state_dict(), strict=True)
        dense.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}])
def test_initial_weights_are_those_of_pytorch(options):
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(16, 2, **options)
    torch.manual_seed(3)
    ours = Multihead(16, 2, **options)
    for _ in range(2):
        for a, b in zip(ours.parameters(), dense.parameters(), strict=True):
            assert torch.equal(a, b)
        torch.manual_seed(4)
        dense._reset_parameters()
        torch.manual_seed(4)
        ours._reset_parameters()
    assert ours._qkv_same_embed_dim is False


X = torch.randn(2, 6, 16)
ERRORS = {
    "four dimensions": lambda m: m(X[None], X[None], X[None]),
    "mixed dimensions": lambda m: m(X, X[0], X[0]),
    "embed_dim": lambda m: m(X[..., :8], X, X),
    "value length": lambda m: m(X, X, X[:, :5]),
    "value width": lambda m: m(X, X, X[..., :8]),
    "batch": lambda m: m(X, X[:1], X[:1]),
    "key width": lambda m: m(X, X[..., :8], X[..., :8]),
    "mask of integers": lambda m: m(X, X, X, attn_mask=torch.zeros(6, 6, dtype=torch.long)),
    "padding of integers": lambda m: m(X, X, X, key_padding_mask=torch.zeros(2, 6, dtype=torch.long)),
    "mask shape": lambda m: m(X, X, X, attn_mask=torch.zeros(6, 5)),
    "mask heads": lambda m: m(X, X, X, attn_mask=torch.zeros(2, 6, 6)),
    "mask of four dimensions": lambda m: m(X, X, X, attn_mask=torch.zeros(2, 2, 6, 6)),
    "padding shape": lambda m: m(X, X, X, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)),
    "padding batch": lambda m: m(X, X, X, key_padding_mask=torch.zeros(3, 6, dtype=torch.bool)),
    "padding dimensions": lambda m: m(X, X, X, key_padding_mask=torch.zeros(6, dtype=torch.bool)),
    "causal without mask": lambda m: m(X, X, X, is_causal=True),
    "unbatched mask": lambda m: m(X[0], X[0], X[0], attn_mask=torch.zeros(3, 6, 6)),
    "unbatched padding": lambda m: m(X[0], X[0], X[0], key_padding_mask=torch.zeros(1, 6, dtype=torch.bool)),
    "dtype": lambda m: m(X.double(), X.double(), X.double()),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_pytorch_rejects_is_rejected_with_an_error_of_its_kind(name):
    ours, dense = pair(16, 2, batch_first=True)
    with pytest.raises((AssertionError, RuntimeError)) as theirs:
        ERRORS[name](dense)
    with pytest.raises(theirs.type) as caught:
        ERRORS[name](ours)
    if name not in ("key width", "dtype"):  # these are the projection's own
        assert isinstance(caught.value, SparsetileError)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"key": None}, "key: expected a torch.Tensor, got NoneType"),
        ({"attn_mask": [[0.0]]}, "attn_mask: expected a torch.Tensor, got list"),
        ({"key_padding_mask": [True]}, "key_padding_mask: expected a torch.Tensor, got list"),
        (
            {"attn_mask": torch.zeros(6, 6, device="meta")},
            "attn_mask: expected a tensor on cpu, got one on meta",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 6, device="meta")},
            "key_padding_mask: expected a tensor on cpu",
        ),
    ],
)
def test_arguments_of_another_type_or_device_are_named(arguments, says):
    with pytest.raises(ArgumentError, match=re.escape(says)):
        Multihead(16, 2, batch_first=True)(**({"query": X, "key": X, "value": X} | arguments))


def test_a_dropout_that_cannot_be_is_rejected():
    for dropout in (-0.1, 1.1):
        with pytest.raises(ValueError, match="dropout"):
            Multihead(16, 2, dropout=dropout, batch_first=True)(X, X, X, need_weights=False)


def test_weights_past_a_gibibyte_name_the_ways_out():
    module = Multihead(16, 2, batch_first=True, sparse_config=SparsePatternConfig(st.Local(64)))
    x = torch.randn(1, 12_000, 16)
    with pytest.raises(ArgumentError, match=r'need_weights=False.*weights="sparse"'):
        module(x, x, x)
    out, weights = module(x, x, x, weights="sparse")
    assert weights.layout is torch.sparse_bsr
    assert torch.equal(out, module(x, x, x, need_weights=False)[0])


def test_long_sequences_take_no_memory_in_their_square():
    """60,000² logits of one head would take 14 GiB."""
    module = Multihead(8, 1, batch_first=True, sparse_config=SparsePatternConfig(st.Local(64)))
    x = torch.randn(1, 60_000, 8, requires_grad=True)
    unread = torch.zeros(1, 1).expand(60_000, 60_000)
    for padding in (torch.arange(60_000)[None] > 50_000, torch.randn(1, 60_000)):
        out, _ = module(x, x, x, padding, need_weights=False, attn_mask=unread, is_causal=True)
        out.sum().backward()
    late = x.detach().clone()
    late[:, 40_000:] += 1
    early, changed = (
        module(y, y, y, need_weights=False, attn_mask=unread, is_causal=True)[0][:, :40_000]
        for y in (x, late)
    )
    assert torch.equal(early, changed)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_sparse_weights_are_the_dense_ones(unbatched, average):
    ours, _ = pair(16, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 50, 16, dtype=torch.float64)
    x = x[0] if unbatched else x
    _, dense = ours(x, x, x, average_attn_weights=average)
    _, sparse = ours(x, x, x, average_attn_weights=average, weights="sparse")
    torch.testing.assert_close(sparse.to_dense()[..., :50, :50], dense)


def test_sparse_weights_of_appended_keys_say_why_not():
    module = Multihead(16, 2, batch_first=True, add_zero_attn=True)
    with pytest.raises(ArgumentError, match="add_zero_attn"):
        module(X, X, X, weights="sparse")
    with pytest.raises(ArgumentError, match="weights"):
        module(X, X, X, need_weights=False, weights="sparse")


@pytest.mark.parametrize("appended", [False, True])
def test_weights_that_dropout_left_make_the_output(appended):
    ours, _ = pair(16, 2, dropout=0.4, batch_first=True, dtype=torch.float64, add_bias_kv=appended)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    out, weights = ours(x, x, x, average_attn_weights=False)
    whole = ours.eval()(x, x, x, average_attn_weights=False)[1]
    assert weights.shape == (2, 2, 40, 40 + appended)
    left = weights != 0
    torch.testing.assert_close(weights[left], whole[left] / 0.6)
    share = left.sum() / (whole != 0).sum()
    assert abs(share - 0.6) < 0.06
    v = F.linear(x, ours.in_proj_weight[32:], ours.in_proj_bias[32:]).view(2, 40, 2, 8).transpose(1, 2)
    if appended:
        v = torch.cat((v, ours.bias_v.view(1, 2, 1, 8).expand(2, -1, -1, -1)), 2)
    torch.testing.assert_close(out, ours.out_proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("appended", [False, True])
def test_dropout_keeps_the_mean_and_acts_in_training_alone(appended):
    ours, _ = pair(16, 2, dropout=0.3, batch_first=True, add_bias_kv=appended, add_zero_attn=appended)
    x = torch.randn(1, 40, 16)
    whole = ours.eval()(x, x, x, need_weights=False)[0]
    assert torch.equal(whole, ours(x, x, x, need_weights=False)[0])
    ours.train()
    with torch.no_grad():
        draws = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(300)])
    error = (draws.mean(0) - whole).abs().mean() / draws.std(0).mean()
    assert error < 3 / math.sqrt(300)


def test_all_dropped_leaves_the_bias():
    for appended in (False, True):
        ours, _ = pair(16, 2, dropout=1.0, batch_first=True, add_bias_kv=appended)
        for need_weights in (False, True):
            out, _ = ours(X, X, X, need_weights=need_weights)
            torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))


@pytest.mark.parametrize("shapes", [(0, 6, 6), (2, 0, 6), (2, 6, 0)], ids=["batch", "queries", "keys"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty_inputs(shapes, need_weights):
    batch, q_len, k_len = shapes
    for appended in (False, True):
        ours, dense = pair(16, 2, batch_first=True, add_bias_kv=appended)
        query, key = torch.randn(batch, q_len, 16), torch.randn(batch, k_len, 16)
        got, want = (m(query, key, key, need_weights=need_weights) for m in (ours, dense))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        for out, module in ((got[0], ours), (want[0], dense)):
            out.sum().backward()
            assert module.in_proj_weight.grad[:32].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    ours, dense = pair(32, 2, batch_first=True)
    x = torch.randn(2, 50, 32).to(dtype)
    exact = forbidden(ours, 50, 50, None, False, 2)
    wanted, wanted_weights = dense.double()(x.double(), x.double(), x.double(), attn_mask=exact)
    out, weights = ours.to(dtype)(x, x, x)
    assert out.dtype == weights.dtype == dtype
    scale = wanted.abs().max()
    assert (out.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * scale
    assert (weights.double() - wanted_weights).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_of_single_precision_are_not_rounded_to_half(dtype):
    ours, _ = pair(32, 2, batch_first=True)
    ours = ours.to(dtype)
    x, mask, padding = torch.randn(2, 50, 32).to(dtype), torch.randn(50, 50), torch.randn(2, 50)
    for need_weights in (False, True):
        for masks in ({"attn_mask": mask}, {"key_padding_mask": padding}):
            expected, _ = ours(x, x, x, need_weights=need_weights, **masks)
            # One number for all keys changes no softmax; in half precision it would swallow the rest.
            moved = {name: value + 3000.0 for name, value in masks.items()}
            out, _ = ours(x, x, x, need_weights=need_weights, **moved)
            limit = 8 * torch.finfo(dtype).eps * expected.abs().max()
            assert (out - expected).abs().max() < limit


def test_factory_arguments_meta_and_moves():
    made = Multihead(
        16, 2, 0.0, True, False, False, None, None, True, "meta", torch.bfloat16, sparse_config=SPARSE
    )
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in made.parameters())
    ours, _ = pair(16, 2, batch_first=True)
    made = made.to_empty(device="cpu").float()
    made.load_state_dict(ours.state_dict())
    x = torch.randn(2, 40, 16)
    expected = ours(x, x, x)[0]
    assert torch.equal(made(x, x, x)[0], expected)
    # After use: another dtype, another length, and back.
    assert made.double()(x.double(), x.double(), x.double())[0].dtype == torch.float64
    made.float().to("meta")
    on_meta = x.to("meta")
    for need_weights in (False, True):
        assert made(on_meta, on_meta, on_meta, need_weights=need_weights)[0].is_meta
    assert ours(x[:, :23], x[:, :23], x[:, :23])[0].shape == (2, 23, 16)
    assert torch.equal(ours(x, x, x)[0], expected)


def test_copies_and_pickles():
    ours, _ = pair(16, 2, batch_first=True)
    expected = ours(X, X, X)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(again(X, X, X)[0], expected)
        assert again.plan == ours.plan
        assert again._qkv_same_embed_dim is False
        again._reset_parameters()


def test_nested_sequences_are_padded_for_the_while():
    ours, _ = pair(16, 2, batch_first=True)
    parts = [torch.randn(n, 16) for n in (50, 3, 31)]
    nested = torch.nested.as_nested_tensor(parts)
    out, weights = ours(nested, nested, nested, need_weights=False)
    assert weights is None
    for got, part in zip(out.unbind(), parts, strict=True):
        padded = F.pad(part, (0, 0, 0, 50 - len(part)))
        beyond = torch.arange(50) >= len(part)
        want = ours(padded, padded, padded, key_padding_mask=beyond, need_weights=False)[0][: len(part)]
        torch.testing.assert_close(got, want)
    with pytest.raises(AssertionError, match="nested"):
        ours(nested, nested, nested)
    with pytest.raises(AssertionError, match="nested"):
        ours(nested, X, X, need_weights=False)


def test_repr_shows_the_pattern():
    assert "Local(left=20, right=20)" in repr(pair(16, 2)[0])


def test_a_longer_causal_mask_serves_where_the_hint_says_all():
    # As in nn.MultiheadAttention, which never looks at it then.
    ours = Multihead(16, 2, batch_first=True, sparsity_ratio=1.0)
    x = torch.randn(1, 30, 16)
    long = nn.Transformer.generate_square_subsequent_mask(50)
    out, _ = ours(x, x, x, attn_mask=long, is_causal=True, need_weights=False)
    wanted, _ = ours(x, x, x, attn_mask=long[:30, :30], is_causal=True, need_weights=False)
    assert torch.equal(out, wanted)
