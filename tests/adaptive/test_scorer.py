"""The split form against the network on concatenated pairs, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pattern_draws import runs
from sparsetile.adaptive import ImportanceScorer
from sparsetile.errors import ArgumentError

FORMS = ("mlp", "bilinear", "indexer")


def of_group(scorer, name, g):
    parameter = getattr(scorer, name).double()
    return parameter if scorer.num_heads is None else parameter[g]


def dense(scorer, q, k):
    """Every pair's score from the definition, [B, G, nq, nk], float64."""
    q, k = q.double(), k.double()
    per_group = []
    for g in range(q.shape[1]):
        x, y = q[:, g, :, None, :], k[:, g, None, :, :]
        w_q, w_k = of_group(scorer, "w_q", g), of_group(scorer, "w_k", g)
        if scorer.form == "mlp":
            both = torch.cat(torch.broadcast_tensors(x, y), -1)
            hidden = nn.functional.linear(both, torch.cat((w_q, w_k), -1), of_group(scorer, "b1", g)).relu()
            out = nn.functional.linear(hidden, of_group(scorer, "w2", g)[None])[..., 0]
            per_group.append(out + of_group(scorer, "b2", g))
        elif scorer.form == "bilinear":
            per_group.append(torch.einsum("bqxi,ij,bxkj->bqk", x, w_q.T @ w_k, y) / math.sqrt(scorer.d_head))
        else:
            gate = nn.functional.linear(x, of_group(scorer, "w_gate", g))[..., 0, :]
            width = scorer.hidden_dim // scorer.sub_heads
            total = 0.0
            for j in range(scorer.sub_heads):
                piece = slice(j * width, (j + 1) * width)
                product = (nn.functional.linear(x, w_q[piece]) * nn.functional.linear(y, w_k[piece])).sum(-1)
                total = total + gate[..., j, None] * product.relu()
            per_group.append(total / math.sqrt(scorer.sub_heads * width))
    return torch.stack(per_group, 1)


def every_column(shape):
    return torch.arange(shape[3]).expand(shape)


def draw(form, shared, shape, width, hidden, dtype, seed, dropout=0.0):
    torch.manual_seed(seed)
    batch, groups, nq, nk = shape
    heads = None if shared else groups
    scorer = ImportanceScorer(width, hidden, num_heads=heads, form=form, sub_heads=2, dropout=dropout)
    scorer = scorer.to(dtype)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    q, k = torch.randn((batch, groups, nq, width)), torch.randn((batch, groups, nk, width))
    return scorer, q.to(dtype), k.to(dtype)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@runs(60)
@given(
    st.sampled_from(FORMS),
    st.booleans(),
    SHAPES,
    st.integers(1, 12),
    st.integers(1, 8),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 2**40),
)
def test_rows_and_pairs_are_the_definition(form, shared, shape, width, half, dtype, seed):
    scorer, q, k = draw(form, shared, shape, width, 2 * half, dtype, seed)
    expected = dense(scorer, q, k)
    features = scorer.features(q, k)
    start = seed % shape[2]
    rows = scorer.rows(features, start, shape[2])
    pairs = scorer.pairs(features, every_column(shape))
    with torch.no_grad():
        quiet = scorer.rows(features, start, shape[2])
    # Half precision holds the parameters and summaries; what is computed from them is float32.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert rows.dtype == pairs.dtype == quiet.dtype == wide
    slack = 1e-12 if wide == torch.float64 else 1e-5
    for got, at in ((rows, start), (quiet, start), (pairs, 0)):
        torch.testing.assert_close(got.double(), expected[:, :, at:], rtol=slack, atol=slack * 5)


def test_the_mlp_is_two_linear_layers_on_the_concatenation():
    seed = int(torch.randint(2**40, ()))
    scorer, q, k = draw("mlp", True, (2, 3, 4, 5), 6, 8, torch.float64, seed)
    network = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 1)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.cat((scorer.w_q, scorer.w_k), 1))
        network[0].bias.copy_(scorer.b1)
        network[3].weight.copy_(scorer.w2[None])
        network[3].bias.copy_(scorer.b2)
    q.requires_grad_()
    k.requires_grad_()
    both = torch.broadcast_tensors(q[:, :, :, None], k[:, :, None])
    expected = network(torch.cat(both, -1))[..., 0]
    scores = scorer.pairs(scorer.features(q, k), every_column((2, 3, 4, 5)))
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(expected)
    grads = torch.autograd.grad((scores * probe).sum(), (q, k, scorer.w_q, scorer.w_k, scorer.b1, scorer.w2))
    wanted = torch.autograd.grad((expected * probe).sum(), (q, k, *network.parameters()))
    wanted = (*wanted[:2], wanted[2][:, :6], wanted[2][:, 6:], wanted[3], wanted[4][0])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, msg=f"seed {seed}")


def test_layers_start_as_linear_layers_do():
    mlp = ImportanceScorer(50, 200, num_heads=4)
    indexer = ImportanceScorer(50, 200, num_heads=4, form="indexer")
    cases = [(mlp, "w_q", 100), (mlp, "w_k", 100), (mlp, "b1", 100), (mlp, "w2", 200)]
    cases += [(indexer, "w_q", 50), (indexer, "w_k", 50), (indexer, "w_gate", 50)]
    for scorer, name, inputs in cases:
        values = getattr(scorer, name)
        bound = 1 / math.sqrt(inputs)
        assert values.abs().max() <= bound
        # Uniform on ±bound has deviation bound/√3; 800 values and more.
        assert abs(values.std().item() * math.sqrt(3) / bound - 1) < 0.1


@pytest.mark.parametrize("shared", [True, False])
def test_the_bilinear_form_starts_as_mean_pooling(shared):
    scorer = ImportanceScorer(12, 16, num_heads=None if shared else 2, form="bilinear")
    q, k = torch.randn(3, 2, 4, 12), torch.randn(3, 2, 5, 12)
    scores = scorer.rows(scorer.features(q, k), 0, 4)
    torch.testing.assert_close(scores, q @ k.mT / math.sqrt(12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["pairs", "rows"])
def test_gradients_are_those_of_finite_differences(form, shared, way):
    seed = int(torch.randint(2**40, ()))
    scorer, q, k = draw(form, shared, (2, 2, 3, 4), 3, 4, torch.float64, seed)
    # Repeats and gaps, as kept tiles have.
    column = torch.randint(4, (2, 2, 3, 5))
    names = [name for name, _ in scorer.named_parameters()]

    def run(q, k, *values):
        def call():
            features = scorer.features(q, k)
            return scorer.pairs(features, column) if way == "pairs" else scorer.rows(features, 1, 3)

        return torch.func.functional_call(
            _Call(scorer, call), {f"scorer.{n}": v for n, v in zip(names, values, strict=True)}, ()
        )

    values = [p.detach().clone().requires_grad_() for p in scorer.parameters()]
    inputs = (q.requires_grad_(), k.requires_grad_(), *values)
    assert torch.autograd.gradcheck(run, inputs), f"seed {seed}"
    for name, grad in zip(["q", "k", *names], torch.autograd.grad(run(*inputs).sum(), inputs), strict=True):
        assert grad.any(), f"{name}, seed {seed}"


class _Call(nn.Module):
    """Calls a closure over ``scorer``, whose parameters ``functional_call`` can then replace."""

    def __init__(self, scorer, call):
        super().__init__()
        self.scorer = scorer
        self.call = call

    def forward(self):
        return self.call()


@pytest.mark.parametrize("form", FORMS)
def test_dropout_acts_in_pairs_in_training_alone(form):
    shape = (1, 2, 3, 4)
    scorer, q, k = draw(form, True, shape, 6, 8, torch.float32, int(torch.randint(2**40, ())), dropout=0.4)
    features = scorer.features(q, k)
    where = every_column(shape)
    expected = dense(scorer, q, k)
    for training in (True, False):
        scorer.train(training)
        torch.testing.assert_close(scorer.rows(features, 0, 3).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.pairs(features, where).double(), expected, rtol=1e-4, atol=1e-4)
    scorer.train()
    draws = torch.stack([scorer.pairs(features, where).detach() for _ in range(3000)]).double()
    spread = draws.std(0)
    # Five standard errors; a pair whose terms are all zero has no spread.
    assert ((draws.mean(0) - expected).abs() <= 5 * spread / math.sqrt(3000) + 1e-5).all()
    assert spread.any()


def test_autocast_changes_no_bit():
    scorer, q, k = draw("mlp", True, (1, 2, 3, 4), 6, 8, torch.float32, int(torch.randint(2**40, ())))
    plain = scorer.features(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = scorer.features(q, k)
        rows, pairs = scorer.rows(features, 0, 3), scorer.pairs(features, every_column((1, 2, 3, 4)))
    assert torch.equal(features.a, plain.a)
    assert torch.equal(rows, scorer.rows(plain, 0, 3))
    assert torch.equal(pairs, scorer.pairs(plain, every_column((1, 2, 3, 4))))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_pairs_are_the_same_bits_every_time(form):
    scorer, q, k = draw(form, False, (2, 2, 30, 30), 8, 8, torch.float32, int(torch.randint(2**40, ())))
    column = torch.randint(30, (2, 2, 30, 160))
    q.requires_grad_()
    k.requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grads = []
        for _ in range(3):
            score = scorer.pairs(scorer.features(q, k), column)
            grads.append(torch.autograd.grad((score * score).sum(), (q, k, *scorer.parameters())))
    finally:
        torch.set_num_threads(threads)
    for other in grads[1:]:
        assert all(torch.equal(x, y) for x, y in zip(grads[0], other, strict=True))


def test_made_on_another_device_and_in_another_dtype():
    for form in FORMS:
        scorer = ImportanceScorer(8, 4, form=form, device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in scorer.parameters())
        assert scorer.state_dict().keys() == dict(scorer.named_parameters()).keys()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"d_head": 0}, "d_head"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"hidden_dim": -4}, "hidden_dim"),
        ({"hidden_dim": 4.0}, "hidden_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"dropout": "0.1"}, "dropout"),
        ({"form": "cosine"}, "form"),
        ({"form": "indexer", "sub_heads": 3}, "sub_heads"),
        ({"form": "indexer", "sub_heads": 0}, "sub_heads"),
    ],
)
def test_bad_arguments(change, name):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .*, got "):
        ImportanceScorer(**{"d_head": 8, "hidden_dim": 16} | change)


@pytest.mark.parametrize(
    ("heads", "q_shape", "k_shape"),
    [
        (None, (1, 2, 3, 7), (1, 2, 3, 7)),
        (None, (1, 2, 3, 8), (1, 2, 3, 7)),
        (None, (1, 2, 3, 8), (2, 2, 3, 8)),
        (None, (2, 3, 8), (2, 3, 8)),
        (3, (1, 2, 3, 8), (1, 2, 3, 8)),
    ],
)
def test_summaries_that_do_not_fit(heads, q_shape, k_shape):
    scorer = ImportanceScorer(8, 4, num_heads=heads)
    with pytest.raises(ArgumentError, match="features"):
        scorer.features(torch.zeros(q_shape), torch.zeros(k_shape))
