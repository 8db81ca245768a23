"""PyTorch's own module samples: ours gives what nn.MultiheadAttention gives, alone and inside the layers."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from sparsetile.nn.convert import from_dense
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from sparsetile.patterns.config import SparsePatternConfig

# The import freezes torch.backends' flags for the whole process, which is not ours alone.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_modules import module_db

CASES = [
    pytest.param(kind, dtype, training, id=f"{kind.__name__}-{dtype}-{'train' if training else 'eval'}")
    for kind in (
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerEncoder,
        nn.TransformerDecoderLayer,
        nn.Transformer,
    )
    for dtype in (torch.float32, torch.float64)
    for training in (True, False)
    if kind is nn.MultiheadAttention or dtype == torch.float64
]
EVERY_TILE = SparsePatternConfig("global_local", sparsity_ratio=1.0, block_size=16)


def samples(kind, dtype, training):
    (info,) = [info for info in module_db if info.module_cls is kind]
    made = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert made
    return made


def make(kind, sample, dtype, training):
    """PyTorch's module of a sample, and ours with the same weights."""
    given = sample.constructor_input
    options = {} if kind is nn.TransformerEncoder else {"dtype": dtype}
    dense = kind(*given.args, **given.kwargs, **options).train(training)
    if kind is nn.MultiheadAttention:
        ours = Multihead(*given.args, **given.kwargs, **options, sparse_config=EVERY_TILE).train(training)
        ours.load_state_dict(dense.state_dict(), strict=True)
    else:
        ours = from_dense(copy.deepcopy(dense), sparse_config=EVERY_TILE, summary=False)
    return ours, dense


def outputs(module, sample):
    """Its outputs, and the gradients of their sum in the inputs and parameters."""
    given = sample.forward_input
    result = module(*given.args, **given.kwargs)
    result = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    wrt = [x for x in [*given.args, *module.parameters()] if x.requires_grad]
    # Weighted, since the plain sum of normalised outputs or weights is a constant.
    score = sum((x * torch.arange(x.numel(), dtype=x.dtype).view(x.shape).cos()).sum() for x in result)
    return result, torch.autograd.grad(score, wrt, allow_unused=True)


def assert_same(got, want, dtype):
    """Equal to rounding at the scale of the largest of them: small gradients are sums of large ones.

    The samples' logits reach some hundreds, so their own rounding moves a weight by as many times eps.
    """
    zero = torch.zeros(())  # an unused parameter's gradient may be None in one, and zeros in the other
    got, want = ([zero if x is None else x for x in side] for side in (got, want))
    scale = max(x.detach().abs().max() for x in want).item()
    limit = 4096 * torch.finfo(dtype).eps * max(scale, 1.0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(*torch.broadcast_tensors(a.to(dtype), b.to(dtype)), rtol=0, atol=limit)


@pytest.mark.parametrize(("kind", "dtype", "training"), CASES)
def test_samples_of_pytorch(kind, dtype, training):
    for number, sample in enumerate(samples(kind, dtype, training)):
        print(number, sample.desc, sample.constructor_input.kwargs)
        ours, dense = make(kind, sample, dtype, training)
        got, got_grads = outputs(ours, sample)
        want, want_grads = outputs(dense, sample)
        assert_same(got, want, dtype)
        assert_same(got_grads, want_grads, dtype)
        if sample.reference_fn is not None:
            given = sample.forward_input
            reference = sample.reference_fn(ours, *given.args, **given.kwargs)
            reference = reference if isinstance(reference, tuple) else (reference,)
            assert_same(got, reference, dtype)
        with torch.no_grad():
            quiet = ours(*sample.forward_input.args, **sample.forward_input.kwargs)
        assert_same(quiet if isinstance(quiet, tuple) else (quiet,), got, dtype)
