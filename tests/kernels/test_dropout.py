"""The dropout mask: its statistics, and that it depends on the seed and the position alone."""

import math
import random

import pytest
import torch

from oracle import random_case, run
from sparsetile.kernels import cpu, reference
from sparsetile.kernels.dropout import draw_seed, keep_mask, keep_scale, keep_tiles, mix, threshold


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


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_weights_are_independent_at_all_distances(p):
    """Those that share a word among them, 8 apart: standardised covariances, as a Fourier transform gives
    them; how much there is of any one wave; and the spread of tiles' sums."""
    share = threshold(p) / 2**16
    x = (1 - masks(p, heads=1, q_len=512, k_len=4096)[0] - share) / math.sqrt(share * (1 - share))
    power = torch.fft.fft2(x).abs().square() / x.numel()
    # Exponentially distributed; most come twice.
    assert power.max() < math.log(power.numel()) + 14
    covariance = torch.fft.ifft2(power).real * math.sqrt(x.numel())
    covariance[0, 0] = 0.0
    assert covariance.abs().max() < 7
    tiles = x.view(32, 16, 256, 16).sum((1, 3)) / 16
    assert abs(tiles.var().item() - 1) < 6 * math.sqrt(2 / tiles.numel()) + 1e-2


def test_the_bits_are_those_of_the_formula():
    """Written out for single weights in Python's integers."""

    def mixed(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    def folded(x, factor):
        return (x * factor >> 32) ^ (x * factor % 2**32)

    seed = random.getrandbits(62)
    for _ in range(200):
        line, query, key = random.randrange(64), random.randrange(2**20), random.randrange(2**20)
        cells = [8 * (i // 16) + i % 8 for i in (query, key)]
        stream = mixed(seed % 2**32 ^ mixed(((seed >> 32) + line) % 2**32))
        row = folded(stream ^ cells[0] * 0x85EBCA6B % 2**32, 0xC2B2AE35)
        word = folded(folded(row ^ cells[1] * 0x9E3779B1 % 2**32, 0xD2511F53), 0xCD9E8D57)
        if query // 8 % 2:
            word = folded(word, 0xA0761D65)
        bits = word >> 16 if key // 8 % 2 else word % 2**16
        for p in (0.1, 0.5):
            at = (torch.tensor([i]) for i in (seed, line, query, key))
            tensors = dict(zip(("seed", "batch_head", "query", "key"), at, strict=True))
            assert keep_mask(dropout_p=p, **tensors).item() == (bits >= round(p * 2**16))


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


def test_whole_tiles_are_parts_of_the_mask():
    """Of any place and size, one each of two heads and three tiles of keys."""
    seed, p, rows, keys = (
        draw_seed(torch.device("cpu")),
        0.3,
        16 * random.randint(1, 5),
        16 * random.randint(1, 5),
    )
    line, query, key = torch.tensor([[3], [9]]), torch.tensor([[32], [2**20]]), torch.tensor([[0, 48, 2**30]])
    kept = keep_tiles(seed, p, line, query, key, (rows, keys))
    at = (x[..., None, None] for x in (line, query, key))
    whole = keep_mask(
        seed, p, next(at), next(at) + torch.arange(rows)[:, None], next(at) + torch.arange(keys)
    )
    assert torch.equal(kept, whole) and kept.shape == (2, 3, rows, keys)


def test_mix_is_a_bijection_on_32_bits():
    x = torch.randint(0, 2**32, (200_000,)).unique()
    mixed = mix(x)
    assert mixed.unique().numel() == x.numel()
    assert mixed.min() >= 0 and mixed.max() < 2**32


def test_some_are_kept_and_some_are_not_for_any_p():
    assert threshold(0.5) == 2**15 and keep_scale(0.5) == 2.0 and keep_scale(0.0) == 1.0
    for p in (1e-12, 1e-6, 0.1, 1 - 1e-6, 1 - 1e-12):
        assert 0 < threshold(p) < 2**16
        assert abs(threshold(p) / 2**16 - p) <= 2**-16
        assert keep_scale(p) * (2**16 - threshold(p)) == 2**16


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
