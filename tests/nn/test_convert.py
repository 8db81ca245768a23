"""from_dense converts a model where it stands: the same objects, and a table of what was done."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sparsetile as st
from sparsetile.errors import ArgumentError, PatternError
from sparsetile.nn.convert import from_dense
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead

EVERY_TILE = st.SparsePatternConfig("global_local", sparsity_ratio=1.0, block_size=16)


class Own(nn.MultiheadAttention):
    """A subclass, which from_dense must leave alone."""


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.shared = self.also_shared = nn.MultiheadAttention(16, 4)
        self.own = Own(16, 2)
        self.sparse = Multihead(16, 2, sparsity_ratio=0.5)
        self.wrapped = nn.MultiheadAttention(16, 2)
        self.wrapped.forward = lambda *args, **options: (args[0], None)
        self.parametrized = nn.MultiheadAttention(16, 2)
        parametrize.register_parametrization(self.parametrized, "in_proj_weight", Doubled())
        self.linear = nn.Linear(16, 16)


def test_every_attention_is_converted_and_the_rest_left(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    model = Model()
    own = model.sparse.plan
    parameters = list(model.named_parameters())
    objects = list(model.named_modules())
    assert from_dense(model, sparsity_ratio=0.25) is model
    for path in ("layers.layers.0.self_attn", "layers.layers.1.self_attn", "shared", "also_shared"):
        module = model.get_submodule(path)
        assert type(module) is Multihead
        assert module.plan.config.sparsity_ratio == 0.25
    assert type(model.own) is Own
    assert type(model.wrapped) is nn.MultiheadAttention
    assert isinstance(model.parametrized, nn.MultiheadAttention) and not isinstance(
        model.parametrized, Multihead
    )
    assert model.sparse.plan is own
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), objects, strict=True))
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    lines = capsys.readouterr().out.splitlines()

    def line(name):
        (found,) = [x for x in lines if f" {name} " in x]
        return found

    assert "block-sparse" in line("shared") and "unchanged" not in line("shared")
    assert "unchanged" in line("own") and "unchanged" in line("wrapped") and "unchanged" in line("sparse")
    text = " ".join(" ".join(lines).split())
    assert "subclass" in text and "forward was replaced" in text and "already" in text
    assert "3 of 7 nn.MultiheadAttention converted" in text


def test_the_model_itself_may_be_one():
    dense = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 40, 16)
    expected = dense(x, x, x)
    model = from_dense(dense, sparse_config=EVERY_TILE, summary=False)
    assert model is dense and type(model) is Multihead and not model.training
    for got, want in zip(model(x, x, x), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_hooks_training_and_requires_grad_stay():
    dense = nn.MultiheadAttention(16, 2, batch_first=True)
    dense.in_proj_bias.requires_grad_(False)
    dense.train(False)
    seen = []
    dense.register_forward_hook(lambda *args: seen.append("after"))
    dense.register_forward_pre_hook(lambda *args: seen.append("before"))
    dense.register_buffer("note", torch.ones(1))
    model = from_dense(nn.ModuleList([dense]), summary=False)[0]
    x = torch.randn(1, 20, 16)
    model(x, x, x, need_weights=False)
    assert seen == ["before", "after"]
    assert not model.training and not model.in_proj_bias.requires_grad
    assert "note" in model.state_dict()


def test_an_optimizer_made_before_trains_it():
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    from_dense(model, summary=False)
    before = model.self_attn.in_proj_weight.detach().clone()
    model(torch.randn(2, 20, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.self_attn.in_proj_weight, before)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}, {"add_bias_kv": True}])
def test_converted_modules_copy_pickle_and_load(options):
    dense = nn.MultiheadAttention(16, 2, **options)
    state = copy.deepcopy(dense.state_dict())
    model = from_dense(copy.deepcopy(dense), summary=False)
    dense.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(state, strict=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is Multihead and again.plan == model.plan
        assert list(again.state_dict()) == list(state)


def test_a_compiled_model_notices():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, 200, 16)
    dense = compiled(x)
    from_dense(compiled, sparse_config=st.SparsePatternConfig(st.Local(5), block_size=16), summary=False)
    assert type(layer.self_attn) is Multihead
    torch.testing.assert_close(compiled(x), layer(x))
    assert not torch.allclose(compiled(x), dense)


def test_wrong_arguments_convert_nothing():
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.raises(PatternError):
        from_dense(model, sparsity_ratio=0.0)
    with pytest.raises(ArgumentError, match="backend"):
        from_dense(model, backend="fast")
    with pytest.raises(ArgumentError, match="from_dense"):
        from_dense(model.state_dict())
    assert type(model[0]) is nn.MultiheadAttention


def test_a_model_without_attention_says_so(capsys):
    from_dense(nn.Linear(2, 2))
    assert "0 of 0" in capsys.readouterr().out
