"""The quantities of the losses, against their definitions."""

import math
import random

import pytest
import torch

from sparsetile.adaptive import losses


@pytest.fixture(autouse=True)
def fresh():
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    torch.manual_seed(seed)


def test_divergence():
    mass, logits = torch.rand(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    counted = torch.rand(3, 5, 7) < 0.6
    counted[0, 0] = False
    mass[0, 1] = 0.0
    mass[counted & (torch.rand(3, 5, 7) < 0.1)] = 0.0
    logits.requires_grad_()
    got = losses.divergence(mass, logits, counted)
    each = []
    for m, s, c in zip(mass.flatten(0, 1), logits.flatten(0, 1), counted.flatten(0, 1), strict=True):
        m, s = m[c], s[c]
        if m.sum() > 0:
            each.append(torch.nn.functional.kl_div(s.log_softmax(0), m / m.sum(), reduction="sum"))
    torch.testing.assert_close(got, torch.stack(each).mean())
    grad, wanted = (
        torch.autograd.grad(got, logits)[0],
        torch.autograd.grad(torch.stack(each).mean(), logits)[0],
    )
    torch.testing.assert_close(grad, wanted)
    assert losses.divergence(mass, logits, torch.zeros_like(counted)).item() == 0.0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_mass(is_causal, biased):
    batch, heads, q_len, k_len, block, dim = 2, 4, 75, 107, 16, 8
    q = torch.randn(batch, heads, q_len, dim, dtype=torch.float64)
    k, v = torch.randn(2, batch, 2, k_len, dim, dtype=torch.float64).unbind()
    padding = torch.rand(batch, k_len) < 0.2
    padding[1, :60] = True
    key_bias = torch.randn(batch, k_len, dtype=torch.float64) if biased else None
    logits = 0.3 * q @ k.repeat_interleave(2, 1).mT
    if biased:
        logits = logits + key_bias[:, None, None]
    logits = logits.masked_fill(padding[:, None, None], -math.inf)
    if is_causal:
        ahead = torch.arange(k_len) > torch.arange(q_len)[:, None] + k_len - q_len
        logits = logits.masked_fill(ahead, -math.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    for row in range(5):
        mass = losses.dense_mass(
            *(q, k, v),
            torch.tensor([row]),
            block,
            is_causal=is_causal,
            key_padding_mask=padding,
            key_bias=key_bias,
            scale=0.3,
            backend="cpu",
        )
        rows = weights[:, :, row * block : (row + 1) * block]
        wanted = torch.stack([x.sum((-2, -1)) for x in rows.split(block, -1)], -1)
        torch.testing.assert_close(mass, wanted, rtol=1e-9, atol=1e-12)


def test_log_spread():
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64).requires_grad_()
    allowed = torch.rand(2, 1, 4, 6) < 0.7
    allowed[0, 0, 0] = False
    allowed[0, 0, 1] = torch.arange(6) == 2
    got = losses.log_spread(logits, allowed)
    rows = zip(logits.flatten(0, 2), allowed.expand(logits.shape).flatten(0, 2), strict=True)
    each = [row[c].std(correction=0).log() for row, c in rows if c.sum() > 1]
    torch.testing.assert_close(got, torch.stack(each).mean())
    torch.testing.assert_close(losses.log_spread(3 * logits, allowed), got + math.log(3))
    flat = torch.ones(1, 1, 2, 6, requires_grad=True)
    losses.log_spread(flat, allowed[:1, :, 2:4]).backward()
    assert (flat.grad == 0).all()
