"""Strips against plain indexing, and mixing against merge_attention."""

from __future__ import annotations

import math

import pytest
import torch

from sparsetile import strips
from sparsetile.functional import merge_attention
from sparsetile.strips import Line, Strip

CASES = [
    (Strip(Line(0, 1, 6), 0, 8, 1), 30, True),
    (Strip(Line(2, 2, 2), 1, 8, 4), 30, True),
    (Strip(Line(1, 1, 3), 2, 50, 7), 30, True),  # one segment: any rate
    (Strip(Line(1, 1, 3), 1, 7, 3), 30, False),  # segments of uneven steps
    (Strip(Line(0, 3, 2), 4, 9, 5), 30, False),
    (Strip(Line(0, 2, 3), 1, 20, 5, diagonal=True), 30, True),
    (Strip(Line(4, 0, 5), 0, 20, 5, diagonal=True), 30, True),  # one key head at all offsets
]


def places(strip, total):
    """(heads ``[h, 1]``, tokens ``[h, n]``) of a strip, by its definition."""
    heads = [strip.heads.start + i * strip.heads.step for i in range(strip.heads.size)]
    offsets = [strip.offset + i * strip.diagonal for i in range(strip.heads.size)]
    tokens = [[t for t in range(total) if t % strip.length % strip.rate == s] for s in offsets]
    return torch.tensor(heads)[:, None], torch.tensor(tokens)


@pytest.mark.parametrize(("strip", "total", "is_view"), CASES)
@pytest.mark.parametrize("tokens_first", [False, True])
def test_read_write_add(strip, total, is_view, tokens_first):
    x = torch.randn(2, total, 6, 3).transpose(1, 2) if tokens_first else torch.randn(2, 6, total, 3)
    heads, tokens = places(strip, total)
    got = strips.read(x, strip)
    assert torch.equal(got, x[:, heads, tokens])
    assert (got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == is_view
    values = torch.randn(got.shape)
    expected = x.clone()
    expected[:, heads, tokens] += values
    strips.add(x, strip, values)
    assert torch.equal(x, expected)
    expected[:, heads, tokens] = values
    strips.write(x, strip, values)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_take_sums_the_gradients_of_overlapping_strips(dtype):
    x = torch.randn(2, 6, 30, 3).to(dtype).requires_grad_()
    every = [strip for strip, _, _ in CASES]
    parts = strips.take(x, every)
    grads = [torch.randn(part.shape).to(dtype) for part in parts]
    (got,) = torch.autograd.grad(parts, x, grads)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for strip, grad in zip(every, grads, strict=True):
        heads, tokens = places(strip, 30)
        expected[:, heads, tokens] += grad.double()
    # Summed in fp32 and rounded once.
    torch.testing.assert_close(
        got.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-12, atol=1e-5
    )


def test_mix_is_merge_attention_where_every_strip_is_everything():
    everything = Strip(Line(0, 1, 4), 0, 10, 1)
    q = torch.randn(2, 4, 10, 3, dtype=torch.float64)
    outs = [torch.randn_like(q).requires_grad_() for _ in range(3)]
    lses = [torch.randn(2, 4, 10, dtype=torch.float64).requires_grad_() for _ in range(3)]
    got = strips.mix(q, [everything] * 3, outs, lses)
    expected = merge_attention(*zip(outs, lses, strict=True))
    weights = [torch.randn_like(x) for x in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    wanted = torch.autograd.grad(expected, (*outs, *lses), weights)
    for a, b in zip(torch.autograd.grad(got, (*outs, *lses), weights), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_mix_leaves_queries_of_no_strip_and_of_no_key():
    strip = Strip(Line(0, 1, 2), 1, 12, 4)
    q = torch.randn(1, 2, 12, 3)
    out = torch.randn(1, 2, 3, 3, requires_grad=True)
    lse = torch.randn(1, 2, 3)
    lse[0, 0, 1] = -math.inf
    lse.requires_grad_()
    mixed, total = strips.mix(q, [strip, strip], [out, out], [lse, lse])
    served = torch.zeros(1, 2, 12, dtype=torch.bool)
    served[:, :, 1::4] = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(total), served) and not mixed[~served].any()
    torch.testing.assert_close(mixed[served], out[torch.isfinite(lse)])
    torch.testing.assert_close(total[served], lse[torch.isfinite(lse)] + math.log(2))
    d_out, d_lse = torch.autograd.grad(mixed.square().sum() + total[served].sum(), (out, lse))
    assert torch.isfinite(d_out).all() and torch.isfinite(d_lse).all()
    assert not d_out[0, 0, 1].any() and d_lse[0, 0, 1] == 0


def test_mix_of_half_precision_is_summed_in_fp32_and_rounded_once():
    everything = Strip(Line(0, 1, 2), 0, 10, 1)
    grad = torch.randn(2, 2, 10, 16).bfloat16()
    outs = [(1 + torch.rand(2, 2, 10, 16)).bfloat16().requires_grad_() for _ in range(64)]
    lses = [torch.randn(2, 2, 10).requires_grad_() for _ in range(64)]
    got, _ = strips.mix(grad, [everything] * 64, outs, lses)
    exact, _ = merge_attention(*((out.double(), lse.double()) for out, lse in zip(outs, lses, strict=True)))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * 2**-8, atol=0)
    wanted = torch.autograd.grad(exact, (*outs, *lses), grad.double())
    grads = torch.autograd.grad(got, (*outs, *lses), grad)
    for a, b in zip(grads[:64], wanted[:64], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-6)
    for a, b in zip(grads[64:], wanted[64:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)
