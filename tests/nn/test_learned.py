"""The multi-head module with learned tiles: equal to attention written out, in all that it is asked for."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsetile as st
from adaptive_oracle import BLOCK, dense_adaptive, fresh, tiles_of
from sparsetile.errors import ArgumentError, CheckpointError, PatternError
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead

CONFIG = st.AdaptiveConfig(0.6, 1.7, True, block_size=BLOCK)


def module_of(*args, config=CONFIG, **options):
    """A module whose parameters are none of them at their initial value."""
    module = Multihead(*args, sparse_config=config, **options)
    with torch.no_grad():
        for name, x in module.named_parameters():
            if name.startswith("learned.scorer"):
                x.normal_()
            elif not name.startswith("learned"):
                x.normal_(std=0.4)
    return module


def written_out(module, query, key, value, *, is_causal=False, padding=None, key_bias=None):
    """(leaves by name, output ``[B, L, E]``, weights ``[B, H, L, S]``, θ and log τ as read) of inputs
    ``[B, N, E]``: float64, dense, over the tiles of the last forward.
    """
    own = dict(module.named_parameters()) | {"learned.log_temperature": module.learned.log_temperature}
    leaf = {name: x.detach().double().requires_grad_() for name, x in own.items()}
    named = {"query": query, "key": key, "value": value}
    leaf |= {name: x.detach().double().requires_grad_() for name, x in named.items()}
    if module.in_proj_weight is not None:
        matrices = leaf["in_proj_weight"].chunk(3)
    else:
        matrices = [leaf[f"{x}_proj_weight"] for x in "qkv"]
    biases = leaf["in_proj_bias"].chunk(3) if "in_proj_bias" in leaf else [None] * 3
    heads, (batch, q_len) = module.num_heads, query.shape[:2]
    q, k, v = (
        F.linear(leaf[name], w, b).unflatten(-1, (heads, -1))
        for name, w, b in zip(named, matrices, biases, strict=True)
    )
    parameters = {name.removeprefix("learned.scorer."): x for name, x in leaf.items()}
    parameters |= {"theta": leaf["learned.threshold"], "log_tau": leaf["learned.log_temperature"]}
    across = key is not query
    out, weights, read = dense_adaptive(
        replace(module.learned.config, self_attention=not across),
        parameters,
        *(q, k, v),
        tiles_of(module.learned.last_layout, batch, heads),
        is_causal=is_causal,
        padding=padding,
        first=is_causal or across,
        scale=1 / math.sqrt(module.head_dim),
        key_bias=key_bias,
    )
    out = F.linear(out.flatten(2), leaf["out_proj.weight"], leaf.get("out_proj.bias"))
    return leaf, out.view(batch, q_len, -1), weights, read


def assert_equal_gradients(module, tensors, leaf, read, limit):
    """Of every parameter and input. Scalars sum over tiles what may cancel: see test_adaptive_gradients."""
    unit = {name: x.grad.norm().item() for name, x in zip(("theta", "log_tau"), read, strict=True)}
    unit = {"learned.threshold": unit["theta"], "learned.log_temperature": unit["log_tau"]}
    unit["learned.scorer.b2"] = unit["learned.threshold"]
    own = dict(module.named_parameters()) | dict(zip(("query", "key", "value"), tensors, strict=True))
    if tensors[0] is tensors[1]:
        leaf["query"].grad += leaf["key"].grad + leaf["value"].grad
        del own["key"], own["value"]
    least = 0.1 * math.sqrt(BLOCK * module.head_dim)
    for name, x in own.items():
        want = leaf[name].grad
        size = max(want.norm().item(), unit.get(name, 0.0), least)
        error = (x.grad.double() - want).norm().item() / size
        assert error <= limit, f"{name}: {error:.3g} above {limit:.3g}"


def drawn(rng):
    """Constructor, batched or not, self-attention or not, L, S, causal, kind of padding, form of weights."""
    heads = rng.choice([1, 2, 4])
    made = {"embed_dim": 8 * heads, "num_heads": heads, "bias": rng.random() < 0.7}
    made["batch_first"] = rng.random() < 0.5
    is_causal, itself = rng.random() < 0.4, rng.random() < 0.5
    if not itself and rng.random() < 0.5:
        made |= {"kdim": 5, "vdim": 7}
    q_len = rng.randrange(70, 150)
    k_len = q_len if is_causal or itself or rng.random() < 0.5 else rng.randrange(70, 150)
    padding = rng.choice([None, "bool", "−inf", "added"])
    form = rng.choice([None, "dense", "sparse"])
    return made, rng.random() < 0.8, itself, q_len, k_len, is_causal, padding, form


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(12))
def test_equals_attention_written_out(dtype, case):
    rng = fresh()
    made, batched, itself, q_len, k_len, is_causal, kind, form = drawn(rng)
    average, batch = rng.random() < 0.5, 2 if batched else 1
    print(made, batched, itself, q_len, k_len, is_causal, kind, form, average)
    module = module_of(**made, dtype=dtype)
    widths = (module.embed_dim, module.kdim, module.vdim)
    tensors = [
        torch.randn(batch, n, width, dtype=dtype).requires_grad_()
        for n, width in zip((q_len, k_len, k_len), widths, strict=True)
    ]
    tensors = [tensors[0]] * 3 if itself else tensors
    ignored = torch.arange(k_len) >= torch.tensor([[k_len - 31], [k_len]])[:batch]
    added = torch.randn(batch, k_len, dtype=torch.float64)
    masks = {
        None: None,
        "bool": ignored,
        "−inf": torch.zeros(batch, k_len).masked_fill(ignored, -math.inf),
        "added": added.masked_fill(ignored, -math.inf),
    }
    given = {"need_weights": form is not None, "average_attn_weights": average}
    if form == "sparse":
        given["weights"] = "sparse"
    if masks[kind] is not None:
        given["key_padding_mask"] = masks[kind] if batched else masks[kind][0]
    if is_causal:
        given |= {"attn_mask": torch.zeros(1, 1).expand(q_len, q_len), "is_causal": True}

    def placed(x):
        return x[0] if not batched else x if module.batch_first else x.transpose(0, 1)

    placed_tensors = [placed(tensors[0])] * 3 if itself else map(placed, tensors)
    out, shares = module(*placed_tensors, **given)
    leaf, expected, weights, read = written_out(
        module,
        *tensors,
        is_causal=is_causal,
        padding=None if kind is None else ignored,
        key_bias=added if kind == "added" else None,
    )
    limit = 1e-4 if dtype == torch.float32 else 1e-9
    expected = placed(expected)
    assert out.shape == expected.shape and out.dtype == dtype
    assert (out.double() - expected).norm() <= limit * expected.norm()
    weights = weights.mean(1) if average else weights
    if form is not None:
        if form == "sparse":
            assert shares.layout is torch.sparse_bsr
            shares = shares.to_dense()[..., :q_len, :k_len]
        assert shares.shape == (weights if batched else weights[0]).shape
        torch.testing.assert_close(shares.double(), weights if batched else weights[0], rtol=0, atol=limit)
    direction = torch.randn_like(out).double()
    score, wanted = (out * direction).sum(), (expected * direction).sum()
    if form == "dense":
        direction = torch.randn(weights.shape).double()
        score = score + (shares * (direction if batched else direction[0])).sum()
        wanted = wanted + (weights * direction).sum()
    for x in read:
        x.retain_grad()
    score.backward()
    wanted.backward()
    assert_equal_gradients(module, tensors, leaf, read, limit)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_keeps_its_order(padded):
    rng = fresh()
    model = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True).eval()
    st.from_dense(model, sparse_config=CONFIG, summary=False)
    source, target = torch.randn(1, 100, 16), torch.randn(1, 90, 16)
    ignored = torch.arange(100)[None] >= 61 if padded else None
    causal = nn.Transformer.generate_square_subsequent_mask(90)
    for _ in range(3):
        now = rng.randrange(89)
        later = target.clone()
        later[:, now + 1 :] = 4 * torch.randn_like(later[:, now + 1 :])
        # Nothing tells cross-attention that its queries come one after the other.
        outs = [model(source, x, tgt_mask=causal, memory_key_padding_mask=ignored) for x in (target, later)]
        assert torch.equal(outs[0][:, : now + 1], outs[1][:, : now + 1]), now
        assert not torch.equal(outs[0][:, now + 1 :], outs[1][:, now + 1 :])


@pytest.mark.parametrize("training", [False, True])
def test_the_future_changes_nothing(training):
    rng = fresh()
    module = module_of(32, 4, batch_first=True, dropout=0.2).train(training)
    x = torch.randn(2, 180, 32)
    call = {"attn_mask": torch.zeros(1, 1).expand(180, 180), "is_causal": True, "need_weights": False}
    for _ in range(4):
        now = rng.randrange(179)
        later = x.clone()
        later[:, now + 1 :] = 4 * torch.randn_like(later[:, now + 1 :])
        outs = []
        for y in (x, later):
            torch.manual_seed(1)
            outs.append(module(y, y, y, **call)[0])
        # The projections of one token are one row of a product, whose rounding no other row moves.
        assert torch.equal(outs[0][:, : now + 1], outs[1][:, : now + 1]), now
        assert not torch.equal(outs[0][:, now + 1 :], outs[1][:, now + 1 :])


def test_dense_weights_in_training_are_those_that_made_the_output():
    fresh()
    module = module_of(16, 2, batch_first=True, dropout=0.4)
    x = torch.randn(2, 90, 16)
    out, weights = module(x, x, x, average_attn_weights=False)
    assert (weights == 0).float().mean() > 0.4
    v = F.linear(x, *(y.chunk(3)[2] for y in (module.in_proj_weight, module.in_proj_bias)))
    mixed = weights @ v.unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj(mixed.transpose(1, 2).flatten(2)), out)
    module.dropout = 1.0
    for need_weights in (False, True):
        assert torch.equal(module(x, x, x, need_weights=need_weights)[0], module.out_proj.bias.expand_as(x))


def test_a_coarse_branch_is_the_submodules():
    fresh()
    config = st.AdaptiveConfig(0.6, block_size=BLOCK, coarse=True)
    module = module_of(16, 2, config=config, batch_first=True).eval()
    x, padding = torch.randn(2, 90, 16), torch.arange(90) >= torch.tensor([[90], [51]])
    out, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
    q, k, v = (y.unflatten(-1, (2, -1)) for y in module._project(x, x, x))
    inner = module.learned(q, k, v, key_padding_mask=padding)
    torch.testing.assert_close(out, module.out_proj(inner.flatten(2)))
    with pytest.raises(ArgumentError, match="need_weights"):
        module(x, x, x)


@pytest.mark.parametrize("kind", ["kept", "sampled"])
def test_losses_of_an_encoder_reach_their_scorers_alone(kind):
    fresh()
    config = st.AdaptiveConfig(0.6, block_size=BLOCK, distillation=kind)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    st.from_dense(model, sparse_config=config, summary=False)
    padding = torch.arange(150) >= torch.tensor([[150], [97]])
    model(torch.randn(2, 150, 16), src_key_padding_mask=padding)
    learned = [x for x in model.modules() if isinstance(x, st.BlockSparseAdaptive)]
    assert len(learned) == 2 and all(0.3 < x.last_density < 0.6 for x in learned)
    sum(x.distillation_loss() for x in learned).backward()
    for name, x in model.named_parameters():
        # One value for all scores of a row moves no softmax: b2's gradient is rounding.
        reached = x.grad is not None and x.grad.abs().max() > 1e-6
        assert reached == ("learned.scorer" in name and "b2" not in name), name
    with pytest.raises(ArgumentError, match="top_k"):
        learned[0].sparsity_loss()


def test_kept_mass_of_a_call_with_an_added_key_mask():
    fresh()
    config = st.AdaptiveConfig(0.6, block_size=BLOCK, distillation="kept", exploration=False)
    module = module_of(16, 2, config=config, batch_first=True, dtype=torch.float64)
    x, added = torch.randn(1, 100, 16, dtype=torch.float64), 2 * torch.randn(1, 100, dtype=torch.float64)
    _, weights = module(x, x, x, key_padding_mask=added, average_attn_weights=False)
    loss = module.learned.distillation_loss()
    tiles = tiles_of(module.learned.last_layout, 1, 2)[0] & ~torch.eye(7, dtype=torch.bool)
    mass = F.pad(weights[0], (0, 12, 0, 12)).unflatten(1, (7, 16)).unflatten(3, (7, 16)).sum((2, 4))
    q, k, _ = (y.unflatten(-1, (2, -1))[0].transpose(0, 1) for y in module._project(x, x, x))
    bars = [torch.stack([p.mean(1) for p in y.split(16, 1)], 1) for y in (q, k)]
    scorer, terms = module.learned.scorer, []
    for h in range(2):
        for i in range(7):
            kept = tiles[h, i].nonzero()[:, 0]
            hidden = bars[0][h, i] @ scorer.w_q.T + bars[1][h, kept] @ scorer.w_k.T + scorer.b1
            scores = (hidden.relu() @ scorer.w2 + scorer.b2) / config.temperature
            share = mass[h, i, kept] / mass[h, i, kept].sum()
            terms.append(F.kl_div(scores.log_softmax(0), share, reduction="sum"))
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)


def test_a_dense_model_is_converted_with_its_weights():
    fresh()
    dense = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    before = dict(dense.named_parameters())
    layer = st.from_dense(dense, sparse_config=CONFIG, summary=False)
    after = dict(layer.named_parameters())
    assert all(after[name] is x for name, x in before.items())
    fresh_names = {name for name in after if name not in before}
    assert fresh_names and all(name.startswith("self_attn.learned.") for name in fresh_names)
    x = torch.randn(2, 70, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(70)
    layer.eval()
    assert not layer.self_attn.learned.training
    out = layer(x, src_mask=causal, is_causal=True)
    with torch.no_grad():
        # No fused dense attention runs in its place.
        torch.testing.assert_close(layer(x, src_mask=causal, is_causal=True), out, rtol=0, atol=1e-6)
    tiles = layer.self_attn.learned.last_layout.nnz
    assert tiles < 2 * 2 * 5 * 6 / 2
    layer.train()
    assert not torch.equal(
        layer(x, src_mask=causal, is_causal=True), layer(x, src_mask=causal, is_causal=True)
    )
    appended = nn.MultiheadAttention(16, 2, add_zero_attn=True)
    assert type(st.from_dense(appended, sparse_config=CONFIG, summary=False)) is nn.MultiheadAttention


def test_checkpoints():
    fresh()
    dense = nn.MultiheadAttention(16, 2)
    module = module_of(16, 2)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*learned.threshold.*learned.scorer.w_q"):
        module.load_state_dict(dense.state_dict())
    found = module.load_state_dict(dense.state_dict(), strict=False)
    assert all(name.startswith("learned.") for name in found.missing_keys) and not found.unexpected_keys
    assert torch.equal(module.in_proj_weight, dense.in_proj_weight)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = Multihead(16, 2, sparse_config=CONFIG)
    again.load_state_dict(torch.load(file))
    x = torch.randn(100, 2, 16)
    module(x, x, x)  # leaves what no copy takes along
    for other in (again, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x, x, x)[0], module.eval()(x, x, x)[0])
    with pytest.raises(CheckpointError, match=r"scorer.w_q: expected shape \[32, 16\]"):
        Multihead(32, 2, sparse_config=CONFIG).learned.load_state_dict(module.learned.state_dict())
    with pytest.raises(CheckpointError, match=r"learned.scorer.w_q"):
        module.load_state_dict(Multihead(32, 2, sparse_config=CONFIG).state_dict())


def test_nested_and_empty_inputs():
    fresh()
    module = module_of(16, 2, batch_first=True).eval()
    pieces = [torch.randn(n, 16) for n in (70, 33)]
    nested = torch.nested.nested_tensor(pieces)
    out, _ = module(nested, nested, nested, need_weights=False)
    padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    beyond = torch.arange(70) >= torch.tensor([[70], [33]])
    wanted, _ = module(padded, padded, padded, beyond, need_weights=False)
    for n, got, want in zip((70, 33), out.unbind(), wanted, strict=True):
        torch.testing.assert_close(got, want[:n])
    x = torch.randn(0, 50, 16)
    out, weights = module(x, x, x)
    assert out.shape == (0, 50, 16) and weights.shape == (0, 50, 50)


def test_compiles_whole_and_under_autocast():
    fresh()
    torch._dynamo.reset()
    module, x = module_of(16, 2, batch_first=True).eval(), torch.randn(2, 90, 16, requires_grad=True)
    padding = torch.arange(90) >= torch.tensor([[90], [61]])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        out, weights = run(x, x, x, key_padding_mask=padding)
        leaves = [x, *module.parameters()]
        results.append([out, weights, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(x, x, x)
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x, x, x)[0], rtol=0.1, atol=0.15)


def test_ways_to_make_it():
    for made in (
        Multihead(32, 2, sparse_config=CONFIG),
        st.create_multihead_block_sparse(32, 2, sparse_config=CONFIG),
        st.create_multihead_block_sparse(32, 2, adaptive_config=CONFIG),
        st.create_block_sparse_attention(embed_dim=32, num_heads=2, adaptive_config=CONFIG),
    ):
        assert type(made) is Multihead and made.learned.config == CONFIG
        assert repr(CONFIG) in repr(made)
    preset = st.get_block_sparse_preset("adaptive_standard")
    made = preset.create(embed_dim=32, num_heads=2, bias=False)
    assert made.learned.config == preset.adaptive_config and made.in_proj_bias is None
    assert Multihead(32, 2).learned is None


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(80, 80)), ArgumentError, "is_causal=True"),
        (
            lambda m, x: m(x, x, x, attn_mask=torch.ones(80, 80).triu(1).bool()),
            ArgumentError,
            "fixed pattern",
        ),
        (
            lambda m, x: m(x[:, :9], x, x, attn_mask=torch.zeros(9, 80), is_causal=True),
            ArgumentError,
            "L 9, S 80",
        ),
        (lambda m, x: m(x, x, x, is_causal=True), RuntimeError, "is_causal=True"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 80)), AssertionError, r"\[1, 80\]"),
        (lambda m, x: m.layout_for(80), ArgumentError, "last_layout"),
        (lambda m, x: m.density_for(80), ArgumentError, "chooses tiles for each input"),
        (lambda m, x: Multihead(16, 2, sparse_config=CONFIG, add_bias_kv=True), ArgumentError, "no tile"),
        (lambda m, x: Multihead(16, 2, sparse_config=CONFIG, sparsity_ratio=0.1), PatternError, "base_spars"),
        (lambda m, x: st.from_dense(m, sparse_config=CONFIG, dilation_rates=[1]), PatternError, "dilation"),
        (
            lambda m, x: st.create_multihead_block_sparse(
                16, 2, sparse_config=CONFIG, adaptive_config=CONFIG
            ),
            ArgumentError,
            "drop one",
        ),
        (
            lambda m, x: st.BlockSparseRingDilatedAttention(sparse_config=CONFIG),
            PatternError,
            "the multi-head variant",
        ),
    ],
)
def test_errors(call, error, text):
    module = Multihead(16, 2, batch_first=True, sparse_config=CONFIG)
    with pytest.raises(error, match=text):
        call(module, torch.randn(1, 80, 16))
