"""The multi-head module inside the rest of PyTorch: compiled, exported, checkpointed, under autocast."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sparsetile as st
from sparsetile.nn.convert import from_dense
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead

SPARSE = st.SparsePatternConfig(st.Local(20) | st.Global(5), block_size=16)
BUDGET = st.SparsePatternConfig("global_local", sparsity_ratio=0.4, block_size=16)


def module_of(config=SPARSE, **options):
    module = Multihead(16, 2, batch_first=True, sparse_config=config, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def sequences(batch=2, length=50, **options):
    return torch.randn(batch, length, 16, requires_grad=True, **options)


PADDING = torch.arange(50).expand(2, 50) >= torch.tensor([[50], [31]])
MASK = torch.rand(50, 50) < 0.3
CAUSAL = torch.ones(50, 50).triu(1).bool()
CALLS = {
    "plain": ({}, {"need_weights": False}),
    "weights": ({}, {}),
    "causal": ({}, {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True}),
    "masks": ({}, {"attn_mask": MASK, "key_padding_mask": PADDING, "average_attn_weights": False}),
    "appended": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDING}),
}


@pytest.mark.parametrize(
    ("name", "config"), [*((name, SPARSE) for name in CALLS), ("plain", BUDGET), ("causal", BUDGET)]
)
def test_compiles_whole_with_equal_gradients(name, config):
    made, call = CALLS[name]
    torch._dynamo.reset()
    module, x = module_of(config, **made), sequences()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        out = [y for y in run(x, x, x, **call) if y is not None]
        score = sum((y * torch.arange(y.numel()).view(y.shape).cos()).sum() for y in out)
        results.append((*out, *torch.autograd.grad(score, [x, *module.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_does_not_compile_again_for_other_batch_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module_of(), fullgraph=True, backend=counter)
    counts = []
    for batch in (2, 3, 5, 8):
        x = sequences(batch)
        compiled(x, x, x, need_weights=False)
        counts.append(counter.frame_count)
    # The first change of a size makes it dynamic; none after it compiles.
    assert counts[1:] == [counts[1]] * 3 and counts[1] <= 2


def test_a_converted_encoder_compiles_whole():
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    encoder = from_dense(nn.TransformerEncoder(layer, 2), sparse_config=SPARSE, summary=False)
    x = sequences()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    options = {"mask": CAUSAL.float().masked_fill(CAUSAL, -torch.inf), "is_causal": True}
    for training in (True, False):
        encoder.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x, **options), encoder(x, **options))


def test_exports_with_a_free_batch_size():
    module = module_of().eval()
    x = sequences().detach()
    batch = torch.export.Dim("batch", min=2, max=64)

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    program = torch.export.export(Self(), (x,), dynamic_shapes=({0: batch},))
    other = sequences(5).detach()
    torch.testing.assert_close(program.module()(other), module(other, other, other, need_weights=False)[0])


def test_functional_call_with_gradients():
    module, x = module_of(), sequences().detach()
    doubled = {name: (2 * value.detach()).requires_grad_() for name, value in module.named_parameters()}
    torch.func.functional_call(module, doubled, (x, x, x))[0].square().sum().backward()
    module.load_state_dict(doubled)
    module(x, x, x)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(doubled[name].grad, parameter.grad)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_autocast_gives_what_pytorchs_gives(need_weights, appended):
    dense = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=appended)
    module = from_dense(
        copy.deepcopy(dense), sparse_config=st.SparsePatternConfig("global_local", 1.0), summary=False
    )
    x = sequences()
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, x, x, need_weights=need_weights)
        want = dense(x, x, x, need_weights=need_weights)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.03, atol=0.01)
    got[0].float().sum().backward()
    assert x.grad.dtype == module.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("need_weights", [False, True])
def test_checkpointing_draws_the_same_dropout(need_weights):
    module, x = module_of(dropout=0.3, add_zero_attn=True), sequences()

    def score(x):
        return module(x, x, x, need_weights=need_weights)[0].square().sum()

    grads = []
    for run in (score, lambda x: checkpoint(score, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(x), [x, *module.parameters()]))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    made, call = CALLS[name]
    module = module_of(st.SparsePatternConfig(st.Local(4) | st.Global(2), block_size=16), **made).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    cut = {"attn_mask": (slice(20), slice(20)), "key_padding_mask": (slice(None), slice(20))}
    call = {key: value[cut[key]] if key in cut else value for key, value in call.items()}
    names, leaves = zip(*module.named_parameters(), strict=True)

    def run(x, *parameters):
        out = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, x, x), call)
        return tuple(y for y in out if y is not None)

    # The fast mode projects onto random directions, which covers every entry of every gradient.
    assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_fake_tensors_pass_without_a_trace(need_weights):
    module = module_of(BUDGET)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 123, 16)
        out, weights = module(x, x, x, need_weights=need_weights)
    assert isinstance(out, FakeTensor) and out.shape == (2, 123, 16)
    assert not need_weights or weights.shape == (2, 123, 123)
    x = torch.randn(2, 123, 16)
    assert torch.isfinite(module(x, x, x, need_weights=need_weights)[0]).all()


def test_a_short_budget_warns_once():
    module = module_of(st.SparsePatternConfig("ultra_sparse", sparsity_ratio=0.01, block_size=16))
    x = sequences(length=400)
    with pytest.warns(UserWarning, match="density"):
        module(x, x, x, need_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, x, x, need_weights=False)
