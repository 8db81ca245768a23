"""The sampled float64 reference equals dense attention in float64, and the errors are what they say."""

from __future__ import annotations

import pytest
import torch

from sparsetile.bench import accuracy
from sparsetile.layout.blocks import BlockLayout


@pytest.fixture
def generator() -> torch.Generator:
    made = torch.Generator()
    print(f"generator seed {made.seed()}")
    return made


def dense_attention(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 4)])
def test_exact_rows_and_gradients(generator, batch, heads):
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v, grad = draw(2, 4, 75, 8), draw(2, 2, 90, 8), draw(2, 2, 90, 8), draw(2, 4, 75, 8)
    mask = torch.rand(batch, heads, 75, 90, generator=generator) < 0.2
    mask[:, :, 5] = False
    layout = BlockLayout.from_dense_mask(mask, 16)
    every = torch.ones_like(mask)
    for used, causal, dense in (
        (layout, False, mask),
        (None, False, every),
        (None, True, every.tril(90 - 75)),
    ):
        sample = accuracy.draw_sample(q, 40, generator)
        exact = accuracy.exact(q, k, v, grad, sample, used, causal=causal)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dense_attention(*leaves, dense)
        gradients = torch.autograd.grad(out, leaves, accuracy.sparse_gradient(sample, grad))
        torch.testing.assert_close(exact.out, out[tuple(sample)].detach())
        assert accuracy.output_error(out.detach(), exact) < 1e-12
        errors = accuracy.gradient_errors(*(g.nan_to_num(0.0) for g in gradients), exact)
        assert set(errors) == {"dq", "dk", "dv"}
        assert max(errors.values()) < 1e-12
        wrong = out.detach().clone()
        wrong[tuple(sample)] *= 1.5
        assert accuracy.output_error(wrong, exact) == pytest.approx(0.5)


def test_errors_see_keys_that_must_not_matter(generator):
    q, k, v, grad = (torch.randn(1, 1, 40, 4, generator=generator) for _ in range(4))
    layout = BlockLayout.from_dense_mask(torch.eye(40, dtype=torch.bool), 16)
    exact = accuracy.exact(q, k, v, grad, accuracy.draw_sample(q, 3, generator), layout)
    dv = torch.zeros_like(v)
    for place, want in exact.dv.items():
        dv[place] = want.float()
    assert accuracy.gradient_errors(q, k, dv, exact)["dv"] < 1e-6
    untouched = (exact.dv[0, 0].abs().sum(1) == 0).nonzero()[0]
    dv[0, 0, untouched] = float("nan")
    assert accuracy.gradient_errors(q, k, dv, exact)["dv"] != pytest.approx(0)


def test_sample_has_no_query_twice_and_both_ends(generator):
    q = torch.empty(3, 5, 20, 2)
    sample = accuracy.draw_sample(q, 30, generator)
    triples = set(zip(*(index.tolist() for index in sample), strict=True))
    assert len(triples) == len(sample.query) <= 30
    assert len({triple[:2] for triple in triples}) == 2
    assert {0, 19} <= set(sample.query.tolist())


@pytest.mark.parametrize("block", [16, 64])
def test_kept_keys_is_a_row_of_the_layout(generator, block):
    mask = torch.rand(2, 3, 50, 70, generator=generator) < 0.1
    mask[0, 0, :, 16:32] = True
    layout = BlockLayout.from_dense_mask(mask, block)
    for b, h, i in ((0, 0, 0), (0, 2, 49), (1, 1, 17)):
        assert torch.equal(accuracy.kept_keys(layout, b, h, i), mask[b, h, i].nonzero().flatten())
