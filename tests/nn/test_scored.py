"""Parameters that wait for the first forward: copies, checkpoints, optimizers; and the temperature."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import sparsetile as st
from sparsetile.errors import ArgumentError, CheckpointError
from sparsetile.nn.adaptive import BlockSparseAdaptive


def lazy(**settings):
    config = st.AdaptiveConfig(
        **{"base_sparsity": 0.5, "block_size": 16, "learnable_temperature": True} | settings
    )
    return BlockSparseAdaptive(config).eval()


def inputs(dim=16, heads=4, kv_heads=2, dtype=torch.float32):
    return [torch.randn(2, 100, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("form", ["mlp", "bilinear", "indexer"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_first_forward_makes_the_parameters(form, shared):
    module = lazy(form=form, share_heads=shared, pooling="max_min", hidden_dim=8)
    held = dict(module.named_parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert module.has_uninitialized_params()
    q, k, v = inputs()
    out = module(q, k, v)
    assert not module.has_uninitialized_params() and not any(map(is_lazy, module.parameters()))
    # The objects that an optimizer may hold are the parameters.
    assert all(x is held[name] for name, x in module.named_parameters())
    assert module.scorer.w_q.shape == ((8, 32) if shared else (2, 8, 32))
    assert module.threshold.shape == ((1,) if shared else (2,)) and not module.scorer.training
    sigma = torch.sigmoid((0.0 - module.threshold) / module.temperature)
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.9))
    out.square().sum().backward()
    optimizer.step()
    assert not torch.equal(module(q, k, v), out)


@pytest.mark.parametrize("ready", [False, True])
def test_copies_pickles_and_files(ready, tmp_path):
    module = lazy()
    q, k, v = inputs()
    if ready:
        module(q, k, v)
    torch.save(module, tmp_path / "module.pt")
    twins = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ]
    outs = []
    for twin in [module, *twins]:
        torch.manual_seed(0)
        outs.append(twin(q, k, v))
        assert twin.has_uninitialized_params() is False and repr(twin) == repr(module)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_nothing_of_a_call_travels():
    module = lazy(distillation="kept").train()
    q, k, v = inputs()
    module(q.requires_grad_(), k, v)
    assert not any(name.startswith("_") or "last" in name for name in module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with pytest.raises(ArgumentError, match="Call the module first"):
            twin.last_layout  # noqa: B018


def test_checkpoints(tmp_path):
    q, k, v = inputs()
    trained = nn.Sequential(lazy(share_heads=False))
    with torch.no_grad():
        trained[0](q, k, v)
        for x in trained.parameters():
            x.normal_()
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = trained[0](q, k, v)
    for module in (nn.Sequential(lazy(share_heads=False)), copy.deepcopy(trained)):
        held = dict(module.named_parameters())
        module.load_state_dict(state)
        assert all(x is held[name] for name, x in module.named_parameters())
        assert torch.equal(module[0](q, k, v), expected)
    waiting = nn.Sequential(lazy(share_heads=False))
    waiting.load_state_dict(nn.Sequential(lazy(share_heads=False)).state_dict())
    assert waiting[0].has_uninitialized_params()


@pytest.mark.parametrize(
    ("theirs", "dim", "ready"),
    [
        ({}, 32, True),
        ({"hidden_dim": 8}, 16, True),
        ({"hidden_dim": 8}, 16, False),
        ({"share_heads": False}, 16, True),
        ({"share_heads": False}, 16, False),
    ],
)
def test_a_checkpoint_of_another_size(theirs, dim, ready):
    other, own = lazy(**theirs), lazy()
    other(*inputs(dim))
    if ready:
        own(*inputs())
    with pytest.raises(CheckpointError, match=r"checkpoint, 0\..*expected.*got"):
        nn.Sequential(own).load_state_dict(nn.Sequential(other).state_dict())


def test_a_checkpoint_of_more_groups_or_of_no_forward():
    own, other = lazy(share_heads=False), lazy(share_heads=False)
    own(*inputs())
    other(*inputs(kv_heads=4))
    with pytest.raises(CheckpointError, match="same head_dim"):
        own.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="saved before a forward"):
        own.load_state_dict(lazy(share_heads=False).state_dict())


def test_dtypes_follow():
    module = lazy().double()
    q, k, v = inputs(dtype=torch.float64)
    assert module(q, k, v).dtype == torch.float64
    assert {x.dtype for x in module.parameters()} == {torch.float64}
    module.to(torch.bfloat16)
    assert module(*(x.bfloat16() for x in (q, k, v))).dtype == torch.bfloat16
    made = BlockSparseAdaptive(num_heads=4, head_dim=16, device="meta", dtype=torch.float64)
    assert made.threshold.device.type == "meta" and made.scorer.w_q.dtype == torch.float64
    assert not hasattr(made, "_initialize_hook")


def test_annealing():
    fixed = lazy(learnable_temperature=False, temperature=2.0, min_temperature=0.5, anneal_steps=4)
    assert [fixed.anneal(step) for step in (0, 2, 4, 9)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    assert fixed.temperature.item() == pytest.approx(0.5)
    assert "log_temperature" in fixed.state_dict() and "log_temperature" not in dict(fixed.named_parameters())
    learned = lazy(temperature=2.0, min_temperature=0.5, anneal_steps=4)
    for start, step, expected in ((0.01, 0, 0.5), (1.2, 0, 1.2), (1.2, 2, 1.0), (9.0, 4, 0.5)):
        with torch.no_grad():
            learned.log_temperature.fill_(math.log(start))
        learned.anneal(step)
        assert learned.temperature.item() == pytest.approx(expected)
    plain = lazy(temperature=3.0)
    assert plain.anneal(7) == 3.0 and plain.temperature.item() == pytest.approx(3.0)
