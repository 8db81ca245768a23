"""The dropout mask: its statistics, and that it depends on the seed and the position alone."""

import math

import pytest
import torch

from oracle import random_case, run
from sparsetile.kernels import cpu, reference
from sparsetile.kernels.dropout import draw_seed, keep_mask, mix, threshold


def masks(p, seed=None, heads=4, q_len=256, k_len=256):
    seed = draw_seed(torch.device("cpu")) if seed is None else seed
    print(f"seed {seed.item()}")
    stream = torch.arange(heads).view(-1, 1, 1)
    return keep_mask(seed, p, stream, torch.arange(q_len)[:, None], torch.arange(k_len)).double()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_the_rate_is_p(p):
    kept = masks(p)
    spread = math.sqrt(p * (1 - p))
    assert abs(kept.mean().item() - (1 - p)) < 6 * spread / math.sqrt(kept.numel())
    for axis in ((0, 1), (0, 2), (1, 2)):
        means = kept.mean(axis)
        limit = 6 * spread / math.sqrt(kept.numel() / means.numel())
        assert (means - (1 - p)).abs().max() < limit


def test_neighbours_are_independent():
    x = masks(0.5) - 0.5
    limit = 6 * 0.25 / math.sqrt(x.numel() * 0.9)
    for shifted in (x.roll(1, 0), x.roll(1, 1), x.roll(1, 2), x.roll((1, 1), (1, 2)), x.transpose(1, 2)):
        product = x * shifted
        if shifted is not x.transpose(1, 2):
            assert abs(product.mean().item()) < limit * 1.5


def test_seeds_differ_in_either_half():
    base = torch.tensor([123456789])
    for other in (base + 1, base + (1 << 32), base + (1 << 61)):
        same = (masks(0.5, base) == masks(0.5, other)).double().mean().item()
        assert abs(same - 0.5) < 0.01


def test_any_part_of_the_mask_is_the_mask():
    seed = draw_seed(torch.device("cpu"))
    whole = masks(0.4, seed)
    part = keep_mask(seed, 0.4, torch.tensor(2), torch.arange(40, 90)[:, None], torch.arange(7, 200))
    assert torch.equal(part.double(), whole[2, 40:90, 7:200])


def test_mix_is_a_bijection_on_32_bits_and_threshold_never_drops_all():
    x = torch.randint(0, 2**32, (200_000,)).unique()
    mixed = mix(x)
    assert mixed.unique().numel() == x.numel()
    assert mixed.min() >= 0 and mixed.max() < 2**32
    assert threshold(0.5) == 2**31
    assert threshold(1 - 1e-12) < 2**32


@pytest.mark.parametrize("block", [16, 128])
def test_backends_drop_the_same_weights(block):
    """With one-hot values the output is the dropped weight matrix itself."""
    length = 96
    mask = torch.rand(1, 1, length, length) < 0.6
    case = random_case(
        dtype=torch.float64,
        head_dim=length,
        q_len=length,
        block=block,
        features={"dropout", "gqa"},
        mask=mask,
    )
    case.v = torch.eye(length, dtype=torch.float64).expand(2, 2, length, length).contiguous()
    expected, got = run(reference, case)["out"], run(cpu, case)["out"]
    assert torch.equal(expected == 0, got == 0)
    dropped = case.mask & (got == 0)
    rate = dropped.sum() / case.mask.expand_as(got).sum()
    assert abs(rate.item() - case.dropout_p) < 0.03


def test_expectation_over_seeds_is_attention_without_dropout():
    case = random_case(
        dtype=torch.float64, q_len=24, k_len=24, batch=1, heads=2, head_dim=16, features={"dropout"}
    )
    outs = []
    for _ in range(400):
        case.dropout_seed = draw_seed(torch.device("cpu"))
        outs.append(cpu.forward(case.q, case.k, case.v, case.request())[0])
    stack = torch.stack(outs)
    case.dropout_p, case.dropout_seed = 0.0, None
    plain = cpu.forward(case.q, case.k, case.v, case.request())[0]
    error = (stack.mean(0) - plain) / (stack.std(0) / math.sqrt(len(outs)) + 1e-9)
    assert error.pow(2).mean().sqrt() < 1.3
