"""DilatedAttention: the function over [B, N, H, D], and what PyTorch users do to modules."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sparsetile.dilated import dilated_attention
from sparsetile.errors import ArgumentError, PatternError
from sparsetile.nn.dilated import DilatedAttention


def inputs(batch=2, length=60, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def gradients(out, inputs):
    weight = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return torch.autograd.grad(out, inputs, weight)


@pytest.mark.parametrize("overlap", ["multiset", "once"])
@pytest.mark.parametrize("rule", ["block", "cyclic"])
def test_is_the_function_over_tokens_first(overlap, rule):
    q, k, v = inputs()
    module = DilatedAttention([20, 60], [2, 4], overlap=overlap, head_offset=rule, scale=0.4)
    padding = torch.rand(2, 60) < 0.3
    for causal, mask in ((False, None), (True, padding)):
        out = module(q, k, v, is_causal=causal, key_padding_mask=mask)
        expected = dilated_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            [20, 60],
            [2, 4],
            is_causal=causal,
            scale=0.4,
            overlap=overlap,
            head_offset=rule,
            enable_gqa=True,
            key_padding_mask=mask,
        )
        assert torch.equal(out, expected.transpose(1, 2))


def test_drops_in_training_only():
    q, k, v = inputs(dtype=torch.float32)
    module = DilatedAttention([20, 60], [1, 4], dropout=0.5)
    plain = DilatedAttention([20, 60], [1, 4])(q, k, v)
    assert not torch.allclose(module(q, k, v), plain)
    assert torch.equal(module.eval()(q, k, v), plain)


def test_copies_pickles_and_has_no_state():
    q, k, v = inputs()
    module = DilatedAttention([20, 60], [1, 4], overlap="once", dropout=0.1).eval()
    out = module(q, k, v)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(q, k, v), out)
        assert repr(again) == repr(module)
    assert not module.state_dict() and not list(module.buffers())
    assert "segment_lengths=(20, 60), dilation_rates=(1, 4), overlap='once'" in repr(module)


@pytest.mark.parametrize(
    ("overlap", "rule", "length", "rates"),
    [("multiset", "block", 64, [1, 4]), ("once", "block", 64, [1, 4]), ("once", "cyclic", 61, [1, 3])],
)
def test_compiles_as_one_graph_for_all_batches(overlap, rule, length, rates):
    module = DilatedAttention([16, 64], rates, overlap=overlap, head_offset=rule)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        operands = inputs(batch, length)
        for x in operands:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        out, expected = compiled(*operands, is_causal=True), module(*operands, is_causal=True)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for got, want in zip(gradients(out, operands), gradients(expected, operands), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_compiles_for_inference_at_any_length():
    module = DilatedAttention([16, 64], [1, 4])
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (100, 70, 130, 180, 95):
        operands = [x.detach() for x in inputs(length=length)]
        torch.testing.assert_close(compiled(*operands), module(*operands), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        operands = inputs(length=100)
        torch.testing.assert_close(compiled(*operands), module(*operands), rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 4


def test_compiled_dropout_follows_the_generator():
    q, k, v = inputs(length=64)
    module = DilatedAttention([16, 64], [1, 4], dropout=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(compiled(q, k, v))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_exports():
    operands = tuple(x.detach() for x in inputs(length=64))
    module = DilatedAttention([16, 64], [1, 4], overlap="once")
    program = torch.export.export(module, operands)
    torch.testing.assert_close(program.module()(*operands), module(*operands))


def test_checkpointing_and_functional_call():
    operands = inputs()
    module = DilatedAttention([20, 60], [2, 4], dropout=0.2)
    torch.manual_seed(3)
    expected = gradients(module(*operands), operands)
    torch.manual_seed(3)
    got = gradients(checkpoint(module, *operands, use_reentrant=False), operands)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    module.eval()
    out = torch.func.functional_call(module, {}, tuple(operands))
    assert torch.equal(out, module(*operands))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"segment_lengths": [16]}, PatternError, "as many rates"),
        ({"dilation_rates": [1, 100]}, PatternError, "no rate above"),
        ({"overlap": "union"}, ArgumentError, "overlap"),
        ({"head_offset": "torchscale"}, ArgumentError, "head_offset"),
        ({"dropout": 1.0}, ArgumentError, "dropout"),
        ({"scale": float("inf")}, ArgumentError, "scale"),
        ({"backend": "tritn"}, ArgumentError, "Did you mean 'triton'"),
    ],
)
def test_refuses_at_construction(options, error, says):
    with pytest.raises(error, match=says):
        DilatedAttention(**({"segment_lengths": [16, 64], "dilation_rates": [1, 4]} | options))


def test_refuses_other_shapes():
    q, k, v = inputs()
    module = DilatedAttention([16], [1])
    with pytest.raises(ArgumentError, match=r"\[B, N, H, D\]"):
        module(q[0], k[0], v[0])
    with pytest.raises(ArgumentError, match="self-attention"):
        module(q[:, :10], k, v)
