"""Inside PyTorch's transformer layers the sparse forward runs, in training and in inference, as theirs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetile as st
from sparsetile.kernels import cpu
from sparsetile.nn.convert import from_dense
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from sparsetile.patterns.config import SparsePatternConfig

EVERY_TILE = SparsePatternConfig("global_local", sparsity_ratio=1.0, block_size=16)
SPARSE = SparsePatternConfig(st.Local(20) | st.Global(5), block_size=16)
DENSE_OPS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "scaled_dot_product")
WIDTH, HEADS = 16, 2


@pytest.fixture
def calls(monkeypatch):
    """One entry for each time the sparse kernel ran."""
    seen = []
    forward = cpu.forward

    def counted(*args):
        seen.append(args)
        return forward(*args)

    monkeypatch.setattr(cpu, "forward", counted)
    return seen


def layer_options(**options):
    return {"dropout": 0.0, "batch_first": True, "dim_feedforward": 32, **options}


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **layer_options(**options))


def encoder(**options):
    return nn.TransformerEncoder(encoder_layer(**options), 3)


def decoder_layer(**options):
    return nn.TransformerDecoderLayer(WIDTH, HEADS, **layer_options(**options))


def transformer(**options):
    return nn.Transformer(WIDTH, HEADS, 2, 2, **layer_options(**options))


# How each is called, and how many attentions it holds.
KINDS = {
    "attention": (
        lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda m, x: m(x, x, x)[0],
        1,
    ),
    "encoder layer": (encoder_layer, lambda m, x: m(x), 1),
    "encoder": (encoder, lambda m, x: m(x), 3),
    "decoder layer": (decoder_layer, lambda m, x: m(x, x.flip(1)), 2),
    "transformer": (transformer, lambda m, x: m(x, x.flip(1)), 6),
}


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_sparse_forward_runs_in_training_and_in_inference(kind, training, calls):
    make, call, attentions = KINDS[kind]
    dense = randomised(make().double())
    module = from_dense(copy.deepcopy(dense), sparse_config=EVERY_TILE, summary=False).train(training)
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        out = call(module, x)
    assert len(calls) == attentions
    torch.testing.assert_close(out, call(dense.train(training), x), rtol=1e-9, atol=1e-10)
    assert len(calls) == attentions
    with torch.set_grad_enabled(training), Operators() as operators:
        call(module, x)
    assert "sparsetile::attention" in operators.names
    assert not [name for name in operators.names if any(dense_op in name for dense_op in DENSE_OPS)]


def test_pytorchs_own_fast_path_would_have_run_here():
    """Guards the test above: its modules are those for which PyTorch's fused inference path runs."""
    for kind in ("attention", "encoder layer", "encoder"):
        make, call, _ = KINDS[kind]
        with torch.no_grad(), Operators() as operators:
            call(make().eval(), torch.randn(2, 50, WIDTH))
        fused = DENSE_OPS[1] if kind == "attention" else DENSE_OPS[0]
        assert any(fused in name for name in operators.names)


def test_layers_made_with_it_from_the_start(calls):
    layer = encoder_layer()
    layer.self_attn = Multihead(WIDTH, HEADS, batch_first=True, sparse_config=SPARSE)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        stack = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        stack(torch.randn(2, 50, WIDTH), src_key_padding_mask=torch.arange(50).expand(2, 50) > 30)
    assert len(calls) == 2


@pytest.mark.parametrize("converted", ["by from_dense", "by hand"])
@pytest.mark.parametrize("quiet", [False, True])
def test_padded_batches_through_an_encoder(converted, quiet, calls):
    dense = randomised(encoder().double()).train(not quiet)
    module = copy.deepcopy(dense)
    if converted == "by from_dense":
        module = from_dense(module, sparse_config=EVERY_TILE, summary=False)
        assert not module.use_nested_tensor
    else:  # the encoder packs the batch into a nested tensor, which its layers' attention receives
        for layer in module.layers:
            old = layer.self_attn
            layer.self_attn = Multihead(
                WIDTH, HEADS, batch_first=True, sparse_config=EVERY_TILE, dtype=torch.float64
            )
            layer.self_attn.load_state_dict(old.state_dict())
        module.train(not quiet)
        assert module.use_nested_tensor
    x = torch.randn(3, 50, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([50, 7, 31])
    padding = torch.arange(50) >= lengths[:, None]
    with torch.set_grad_enabled(not quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = module(x, src_key_padding_mask=padding)
        assert len(calls) == 3
        want = dense(x, src_key_padding_mask=padding)
    # PyTorch's nested path leaves zeros at padded places, ours what the layers make of them.
    torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("hint", [None, True])
def test_a_causal_mask_becomes_the_causal_pattern(padded, hint, calls):
    """The encoder finds out by itself that its mask is causal, and passes it with the hint."""
    dense = randomised(encoder().double())
    module = from_dense(copy.deepcopy(dense), sparse_config=EVERY_TILE, summary=False)
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(50, dtype=torch.float64)
    padding = torch.arange(50).expand(2, 50) >= torch.tensor([[50], [31]]) if padded else None
    got = module(x, mask=mask, src_key_padding_mask=padding, is_causal=hint)
    assert len(calls) == 3
    for *_, request in calls:
        assert (request.layout.to_dense() == torch.ones(50, 50).tril().bool()).all()
        # No L × L of bias: the encoder makes padding a float row, which stays one row.
        assert request.attn_bias is None or request.attn_bias.untyped_storage().nbytes() == 2 * 50 * 8
    want = dense(x, mask=mask, src_key_padding_mask=padding, is_causal=hint)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_cross_attention_with_a_causal_hint_of_other_lengths():
    dense = randomised(decoder_layer().double())
    module = from_dense(copy.deepcopy(dense), sparse_config=EVERY_TILE, summary=False)
    tgt, memory = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (30, 50))
    masks = {
        "tgt_mask": torch.ones(30, 30).triu(1).bool(),
        "memory_mask": torch.ones(30, 50).triu(1).bool(),
        "tgt_is_causal": True,
        "memory_is_causal": True,
    }
    torch.testing.assert_close(
        module(tgt, memory, **masks), dense(tgt, memory, **masks), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
def test_sparse_layers_equal_dense_ones_under_the_layouts_mask(kind):
    make, call, _ = KINDS[kind]
    dense = randomised(make().double())
    module = from_dense(copy.deepcopy(dense), sparse_config=SPARSE, summary=False)
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = ~module.self_attn.layout_for(50).to_dense()
    masked = (
        dense(x, src_mask=mask)
        if kind == "encoder layer"
        else dense(x, x.flip(1), tgt_mask=mask, memory_mask=mask)
    )
    out = call(module, x)
    torch.testing.assert_close(out, masked, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, *module.parameters()], weight)
    want = torch.autograd.grad(masked, [x, *dense.parameters()], weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def losses_of(model, head, steps):
    """Losses of learning to name the token seen some places before."""
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    draws = torch.Generator().manual_seed(11)
    table = torch.randn(20, WIDTH, generator=draws)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(20, (4, 48), generator=draws)
        guess = head(model(table[tokens]))
        loss = nn.functional.cross_entropy(guess[:, 3:].flatten(0, 1), tokens[:, :-3].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_twelve_layers_train_alike_for_fifty_steps():
    def run(convert):
        torch.manual_seed(5)
        model = nn.TransformerEncoder(encoder_layer(norm_first=True), 12, enable_nested_tensor=False)
        head = nn.Linear(WIDTH, 20)
        if convert:
            from_dense(model, sparsity_ratio=1.0, summary=False)
            assert sum(isinstance(m, Multihead) for m in model.modules()) == 12
        return losses_of(model, head, 50)

    dense, sparse = run(False), run(True)
    assert dense[-1] < dense[0]
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-4)
