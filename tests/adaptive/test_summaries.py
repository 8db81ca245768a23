"""Summaries of tiles against loops over tiles and channels in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import runs
from sparsetile.adaptive import group_queries, summary_dim, tile_summaries, valid_tiles
from sparsetile.adaptive.summaries import means_beside
from sparsetile.errors import ArgumentError

POOLINGS = ("mean", "max_min", "lse")


def pooled(tokens, used, pooling, block, sub):
    """One tile: ``tokens`` [n, D] float64, ``used`` [n] bool."""
    kept = tokens[used]
    if len(kept) == 0:
        return torch.zeros(tokens.shape[1] * (2 if pooling == "max_min" else 1), dtype=torch.float64)
    if pooling == "mean":
        return kept.sum(0) / len(kept)
    if pooling == "max_min":
        return torch.cat((kept.max(0).values, kept.min(0).values))
    size = block // sub
    means = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size][used[start : start + size]]
        if len(part):
            means.append(part.sum(0) / len(part))
    channels = zip(*(m.tolist() for m in means), strict=True)
    return torch.tensor(
        [math.log(sum(math.exp(m) for m in c) / len(means)) for c in channels], dtype=torch.float64
    )


def looped(x, block, pooling, padding, sub):
    batch, heads, length, _ = x.shape
    used = torch.ones(batch, length, dtype=torch.bool) if padding is None else ~padding
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            pooled(
                                x[b, h, s : s + block].double(), used[b, s : s + block], pooling, block, sub
                            )
                            for s in range(0, length, block)
                        ]
                    )
                    for h in range(heads)
                ]
            )
            for b in range(batch)
        ]
    )


def draw(shape, length, padded, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    batch, heads, width = shape
    # As the modules hold them: [B, N, H, D] seen as [B, H, N, D].
    x = torch.randn((batch, length, heads, width), generator=rng).to(dtype).transpose(1, 2)
    padding = None
    if padded:
        # Whole runs, so that some tiles and parts are ignored altogether.
        runs_of = torch.rand((batch, -(-length // 8)), generator=rng) < 0.5
        padding = runs_of.repeat_interleave(8, 1)[:, :length]
        padding = padding ^ (torch.rand((batch, length), generator=rng) < 0.05)
    return x, padding


@runs(60)
@given(
    st.sampled_from(POOLINGS),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    st.integers(1, 150),
    st.sampled_from([8, 16, 32]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 2**40),
)
def test_summaries_are_the_definition(pooling, shape, length, block, sub, padded, dtype, seed):
    x, padding = draw(shape, length, padded, dtype, seed)
    expected = looped(x, block, pooling, padding, sub)
    filled = x if padding is None else x.masked_fill(padding[:, None, :, None], torch.nan)
    got = tile_summaries(filled, block, pooling=pooling, padding=padding, sub=sub)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide
    assert got.shape == (*shape[:2], -(-length // block), summary_dim(shape[2], pooling))
    slack = 1e-12 if wide == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=slack, atol=slack)
    if padding is not None:
        used = torch.stack([~padding[:, s : s + block].all(1) for s in range(0, length, block)], 1)
        assert torch.equal(valid_tiles(padding, block), used)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_finite_differences(pooling, padded):
    seed = int(torch.randint(2**40, ()))
    x, padding = draw((2, 1, 2), 21, padded, torch.float64, seed)
    if padding is not None:
        padding[0, 8:16] = True  # a tile without any token
    x = x.contiguous().requires_grad_()
    pool = lambda x: tile_summaries(x, 8, pooling=pooling, padding=padding)  # noqa: E731
    assert torch.autograd.gradcheck(pool, x), f"seed {seed}"
    (grad,) = torch.autograd.grad(pool(x).sum(), x)
    if padding is not None:
        assert not grad[padding[:, None, :, None].expand_as(grad)].any(), f"seed {seed}"


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("attended", [False, True])
def test_means_beside_have_the_gradient_of_both_uses(first, attended):
    seed = int(torch.randint(2**40, ()))
    x, _ = draw((2, 2, 3), 21, False, torch.float64, seed)
    x = x.contiguous().requires_grad_()

    def both(x):
        y, means = means_beside(x, 8, 1 if first else 8)
        return (y.exp(), means) if attended else means

    assert torch.autograd.gradcheck(both, x), f"seed {seed}"
    y, means = means_beside(x, 8, 1 if first else 8)
    assert torch.equal(y, x)
    assert torch.equal(means, x[:, :, ::8] if first else tile_summaries(x, 8))


@pytest.mark.parametrize("tokens", [1, 16])
def test_means_beside_of_a_sum_and_twice(tokens):
    x = torch.randn(1, 2, 37, 3, dtype=torch.float64, requires_grad=True)

    def summed(x):  # the gradient of a sum is one number in memory
        y, means = means_beside(x * 1.0, 16, tokens)
        return y.sum() + means.pow(3).sum()

    def cubed(x):
        y, means = means_beside(x * 1.0, 16, tokens)
        return y**3, means**3

    assert torch.autograd.gradcheck(summed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


def test_means_beside_take_no_memory_for_their_gradient():
    x = torch.randn(1, 2, 64, 4, requires_grad=True)
    kept = []

    class Fresh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            kept.append(torch.zeros(1, 2, 64, 4))
            return kept[0]

    y, means = means_beside(x, 16, 16)
    (grad,) = torch.autograd.grad(Fresh.apply(y) + means.sum(), x)
    assert grad.data_ptr() == kept[0].data_ptr()
    assert torch.equal(grad, torch.full_like(grad, 1 / 16))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_large_values_stay_finite(pooling):
    x = torch.tensor([-9e4, 9e4]).repeat(16)[None, None, :, None].to(torch.bfloat16)
    x = torch.cat((x, x.abs(), -x.abs()), 2)
    assert tile_summaries(x, 32, pooling=pooling).isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_neighbour_in_the_batch_changes_no_bit(pooling):
    x, padding = draw((2, 2, 5), 77, True, torch.float32, int(torch.randint(2**40, ())))
    first = tile_summaries(x, 16, pooling=pooling, padding=padding)
    x[1], padding[1] = torch.inf, torch.rand(77) < 0.5
    again = tile_summaries(x, 16, pooling=pooling, padding=padding)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[:1], tile_summaries(x[:1], 16, pooling=pooling, padding=padding[:1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_of_queries_are_means_over_heads(dtype):
    x = torch.randn(2, 6, 4, 5).to(dtype)
    got = group_queries(x, 3)
    expected = torch.stack([(x[:, 2 * g].double() + x[:, 2 * g + 1].double()) / 2 for g in range(3)], 1)
    assert got.dtype == dtype and torch.equal(got, expected.to(dtype))
    assert torch.equal(group_queries(x, 6), x)


X = torch.zeros(2, 1, 20, 4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: tile_summaries(X, 8, pooling="median"), "pooling"),
        (lambda: summary_dim(4, "median"), "pooling"),
        (lambda: tile_summaries(X[0], 8), "tile_summaries"),
        (lambda: tile_summaries(X.long(), 8), "tile_summaries"),
        (lambda: tile_summaries(X[:, :, :0], 8), "tile_summaries"),
        (lambda: tile_summaries(X, 0), "block"),
        (lambda: tile_summaries(X, 8, padding=torch.zeros(2, 19, dtype=torch.bool)), "padding"),
        (lambda: tile_summaries(X, 8, padding=torch.zeros(2, 20)), "padding"),
        (lambda: tile_summaries(X, 8, pooling="lse", sub=3), "sub"),
        (lambda: tile_summaries(X, 8, pooling="lse", sub=0), "sub"),
        (lambda: group_queries(torch.zeros(1, 6, 2, 3), 4), "groups"),
        (lambda: group_queries(torch.zeros(1, 6, 2, 3), 0), "groups"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(ArgumentError, match=rf"^{name}.*expected .*, got "):
        call()
