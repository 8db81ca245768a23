"""dilated_attention against its definition, written out token by token in float64."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from sparsetile import dilated
from sparsetile.dilated import dilated_attention
from sparsetile.errors import ArgumentError, BackendError, PatternError
from sparsetile.patterns import parse_pattern


def offset_of(head, heads, rate, rule):
    if rule == "cyclic":
        return head % rate
    return head // math.ceil(heads / rate)


def branch_masks(total, heads, lengths, rates, rule, causal):
    """Who attends whom in each branch: bool ``[branches, heads, N, N]``, by asking each pair."""
    masks = torch.zeros(len(lengths), heads, total, total, dtype=torch.bool)
    for i, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        for h in range(heads):
            s = offset_of(h, heads, r, rule)
            kept = [t for t in range(total) if (t % w) % r == s]
            for p, t in product(kept, kept):
                masks[i, h, p, t] = p // w == t // w and (t <= p or not causal)
    return masks


def oracle(q, k, v, masks, overlap, scale=None, padding=None):
    """Output and log-sum-exp: exponentials of all branches added up, a key once or once a branch."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    logits = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    times = masks.sum(0) if overlap == "multiset" else masks.any(0).long()
    times = times.expand(logits.shape)
    if padding is not None:
        times = times.masked_fill(padding[:, None, None, :], 0)
    peak = logits.detach().amax(-1, keepdim=True)
    powers = times * torch.exp(logits - peak)
    total = powers.sum(-1, keepdim=True)
    served = total > 0
    out = (powers / torch.where(served, total, 1.0)) @ v
    lse = torch.where(served, peak + torch.where(served, total, 1.0).log(), -math.inf)
    return out, lse.squeeze(-1)


def tensors(gen, batch, heads, key_heads, total, dim, dtype=torch.float64):
    """Fresh q, k, v; half the time as views of [B, N, H, D] storage. What is drawn later follows too."""
    rng = torch.manual_seed(gen.getrandbits(40))
    made = []
    for n in (heads, key_heads, key_heads):
        if gen.random() < 0.5:
            x = (
                torch.randn(batch, total, n, dim, generator=rng, dtype=torch.float64)
                .to(dtype)
                .transpose(1, 2)
            )
        else:
            x = torch.randn(batch, n, total, dim, generator=rng, dtype=torch.float64).to(dtype)
        made.append(x.requires_grad_())
    return made


def compare(q, k, v, lengths, rates, tolerance, overlap="multiset", rule="block", causal=False, **options):
    """Output, log-sum-exp and all gradients of one random case against the oracle."""
    masks = branch_masks(q.shape[2], q.shape[1], lengths, rates, rule, causal)
    padding = options.get("key_padding_mask")
    out, lse = dilated_attention(
        q,
        k,
        v,
        lengths,
        rates,
        is_causal=causal,
        overlap=overlap,
        head_offset=rule,
        return_lse=True,
        **options,
    )
    expected, expected_lse = oracle(q, k, v, masks, overlap, options.get("scale"), padding)
    assert out.dtype == q.dtype
    served = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), served)
    assert torch.equal(torch.isneginf(lse), ~served)
    assert not out[~served].any()
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    loss = (out * grad_out).sum() + (lse * grad_lse)[served].sum()
    want = (expected * grad_out).sum() + (expected_lse * grad_lse)[served].sum()
    pairs = [(out, expected), (lse[served], expected_lse[served])]
    pairs += zip(torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(want, (q, k, v)), strict=True)
    for got, exact in pairs:
        unit = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
        assert (got - exact).abs().max().item() <= tolerance * unit if exact.numel() else True


def random_case(seed):
    gen = random.Random(seed)
    share, key_heads = gen.choice([1, 1, 2, 3, 4]), gen.choice([1, 2, 3, 4])
    lengths, rates = [], []
    for _ in range(gen.randint(1, 4)):
        rate = gen.choice([1, 1, 2, 3, 4, 8])
        lengths.append(
            gen.choice([rate * gen.randint(1, 12), rate * gen.randint(1, 12), gen.randint(rate, 60)])
        )
        rates.append(rate)
    total = gen.choice([math.lcm(*lengths), gen.randint(1, 70), 24, 48])
    total = total if total <= 96 else 64
    q, k, v = tensors(gen, gen.choice([1, 2]), share * key_heads, key_heads, total, gen.choice([8, 16]))
    options = {"overlap": gen.choice(["multiset", "once"]), "rule": gen.choice(["block", "cyclic"])}
    if gen.random() < 0.3:
        options["key_padding_mask"] = torch.rand(len(q), total) < 0.4
    if gen.random() < 0.3:
        options["scale"] = 0.3
    compare(q, k, v, lengths, rates, 1e-11, causal=gen.random() < 0.5, enable_gqa=share > 1, **options)


@pytest.mark.parametrize("part", range(6))
def test_random_cases(part):
    for _ in range(6):
        seed = random.SystemRandom().getrandbits(32)
        print(f"replay with random_case({seed})")
        random_case(seed)


SHAPES = [
    (64, 8, 8, [16, 64], [1, 4]),  # rates divide the heads: strips by offset or across
    (64, 2, 2, [16, 32, 64], [2, 8, 16]),  # fewer heads than offsets
    (60, 6, 3, [20, 40], [4, 5]),  # ragged last segment, rates that divide neither heads nor N
    (50, 6, 2, [12, 18], [5, 4]),  # rates that do not divide their segments: uneven steps
    (40, 12, 4, [10, 40], [2, 8]),  # query heads of one offset cut across key heads
    (48, 8, 1, [16, 48], [4, 8]),  # one key head for all offsets
    (7, 4, 4, [16, 64], [1, 12]),  # shorter than every segment and than a rate
    (5, 8, 4, [16, 64], [3, 8]),  # shorter than a rate has offsets: heads without any token
    (33, 3, 3, [8, 11], [8, 11]),  # one token a segment
    (33, 4, 2, [1, 33], [1, 1]),  # no dilation; segments of one token
]


@pytest.mark.parametrize("rule", ["block", "cyclic"])
@pytest.mark.parametrize("overlap", ["multiset", "once"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("total", "heads", "key_heads", "lengths", "rates"), SHAPES)
def test_equals_the_definition(total, heads, key_heads, lengths, rates, causal, overlap, rule):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    q, k, v = tensors(random.Random(seed), 2, heads, key_heads, total, 16)
    compare(q, k, v, lengths, rates, 1e-11, overlap, rule, causal, enable_gqa=heads != key_heads)


@pytest.mark.parametrize("overlap", ["multiset", "once"])
def test_float32(overlap):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    q, k, v = tensors(random.Random(seed), 2, 4, 2, 96, 32, torch.float32)
    compare(q, k, v, [16, 32, 96], [1, 2, 8], 5e-6, overlap, "block", True, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overlap", ["multiset", "once"])
def test_half_precision_is_as_accurate_as_dense_attention(dtype, overlap):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    inputs = tensors(random.Random(seed), 2, 4, 2, 96, 32, dtype)
    masks = branch_masks(96, 4, [16, 32, 96], [1, 2, 8], "block", True)
    times = masks.sum(0) if overlap == "multiset" else masks.any(0).long()
    exact = oracle(*inputs, masks, overlap)[0]
    options = {"is_causal": True, "overlap": overlap, "enable_gqa": True}
    ours = dilated_attention(*inputs, [16, 32, 96], [1, 2, 8], **options)
    bias = times.log().to(dtype).expand(2, -1, -1, -1)
    dense = F.scaled_dot_product_attention(*inputs, attn_mask=bias, enable_gqa=True)
    weight = torch.randn_like(ours)
    answers = [(x, *torch.autograd.grad(x, inputs, weight.to(x.dtype))) for x in (exact, ours, dense)]
    for name, best, got, other in zip(("out", "q", "k", "v"), *answers, strict=True):
        error, dense_error = ((x.double() - best.double()).norm() for x in (got, other))
        assert error <= 1.1 * dense_error, name


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_every_backend_reads_the_strips(key_heads):
    # Heads of all offsets in one call, in heads that are strided, and from one key head: views that only
    # their strides tell apart.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, h, 32, 16, device=device) for h in (4, key_heads, key_heads))
    for rates in ([1, 2], [2, 4]):
        out, triton, reference = (
            dilated_attention(q, k, v, [16, 32], rates, is_causal=True, enable_gqa=True, backend=backend)
            for backend in ("auto", "triton", "reference")
        )
        torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(triton, reference, rtol=1e-5, atol=1e-6)


def test_one_undilated_segment_is_dense_attention():
    q, k, v = (torch.randn(2, 3, 70, 16) for _ in range(3))
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out = dilated_attention(q, k, v, [70], [1], is_causal=causal)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_a_branch_given_twice_changes_only_the_log_sum_exp():
    q, k, v = (torch.randn(1, 4, 64, 16, dtype=torch.float64) for _ in range(3))
    single, lse = dilated_attention(q, k, v, [32], [4], return_lse=True)
    twice, lse_twice = dilated_attention(q, k, v, [32, 32], [4, 4], return_lse=True)
    once, lse_once = dilated_attention(q, k, v, [32, 32], [4, 4], overlap="once", return_lse=True)
    torch.testing.assert_close(twice, single)
    torch.testing.assert_close(lse_twice, lse + math.log(2))
    assert torch.equal(once, single) and torch.equal(lse_once, lse)


def test_head_offsets():
    # As torchscale: heads are padded to a multiple of r and cut into r groups, the i-th at offset i.
    assert dilated.head_offsets(8, 4, "block") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dilated.head_offsets(12, 8, "block") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert dilated.head_offsets(3, 16, "block") == [0, 1, 2]
    assert dilated.head_offsets(8, 1, "block") == [0] * 8
    assert dilated.head_offsets(8, 3, "cyclic") == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("overlap", ["multiset", "once"])
@pytest.mark.parametrize("rule", ["block", "cyclic"])
@pytest.mark.parametrize("total", [64, 61])
@pytest.mark.parametrize("storage", ["heads first", "tokens first"])
def test_kernels_read_views_and_calls_are_few(monkeypatch, overlap, rule, total, storage):
    seen = []
    original = dilated.sparse_attention

    def watched(q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(dilated, "sparse_attention", watched)
    if storage == "heads first":
        inputs = [torch.randn(2, 8, total, 16) for _ in range(3)]
    else:
        inputs = [torch.randn(2, total, 8, 16).transpose(1, 2) for _ in range(3)]
    dilated_attention(*inputs, [16, 32, 64], [1, 4, 8], overlap=overlap, head_offset=rule)
    for call in seen:
        for got, whole in zip(call, inputs, strict=True):
            assert got.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert got.stride(-1) == 1
    # One for r = 1. Of r = 4, pairs of heads share an offset: 4 strips by offset, 2 across. Of r = 8, 8 or 1.
    assert len(seen) == (1 + 2 + 1 if total == 64 else 1 + 4 + 8)
    # Each query of a branch is computed once.
    assert sum(q.numel() for q, _, _ in seen) == sum(
        2 * 16 * sum((t % w) % r == offset_of(h, 8, r, rule) for h in range(8) for t in range(total))
        for w, r in ((16, 1), (32, 4), (64, 8))
    )


@pytest.mark.parametrize("total", [64, 61])
def test_heads_of_one_offset_share_a_layout(total):
    """Overlap "once" makes a pattern for each strip; one that differs by head has a layout for each head."""
    one_segment, divides = (False, True), (True, total % 4 == 0)
    calls = dilated._make_calls((16, 64), (1, 4), 16, 16, "once", "block", False, one_segment, divides)
    by_head = [parse_pattern(call.pattern).needs_heads for call in calls]
    assert by_head == [call.query.diagonal for call in calls]
    # One call for 16 heads of rate 1, and four of rate 4: each of four heads of one offset.
    assert len(calls) == 5 and not any(by_head)


def test_dropout_keeps_the_mean_and_follows_the_generator():
    q, k, v = (torch.randn(1, 4, 64, 16) for _ in range(3))

    def run(p):
        return dilated_attention(q, k, v, [16, 64], [1, 2], dropout_p=p, head_offset="cyclic")

    plain = run(0.0)
    assert torch.equal(plain, dilated_attention(q, k, v, [16, 64], [1, 2], head_offset="cyclic"))
    torch.manual_seed(7)
    first = run(0.4)
    torch.manual_seed(7)
    again = run(0.4)
    assert torch.equal(first, again) and not torch.allclose(first, plain)
    draws = torch.stack([run(0.4) for _ in range(150)])
    # A mean of n draws is a normal variable of 1/√n of their deviation: its size is 0.8 of that on average.
    error = (draws.mean(0) - plain).abs().mean() / draws.std(0).mean()
    assert error < 1 / math.sqrt(150)


def test_dropout_reaches_every_strip():
    # One strip for each head and for each branch; under ones as values a kept row without dropout is 1.
    q, k = torch.zeros(2, 1, 2, 256, 16).unbind()
    v = torch.ones(1, 2, 256, 16)
    for rate in (2, 1):
        out = dilated_attention(q, k, v, [64], [rate], dropout_p=0.5, head_offset="cyclic")[..., 0]
        for head in range(2):
            rows = out[0, head, head % rate :: rate]
            assert ((rows - 1).abs() > 1e-3).float().mean() > 0.5
    # Rows 1, 3, … of head 0 see the first branch alone, the others mostly the second.
    mixed = dilated_attention(q, k, v, [4, 256], [1, 2], dropout_p=0.5, head_offset="cyclic")[0, 0, :, 0]
    assert mixed[1::2].std() > 0.3 and 0.04 < mixed[::2].std() < 0.2


@pytest.mark.parametrize("overlap", ["multiset", "once"])
def test_dropout_drops_its_share(overlap):
    # Equal weights and values of 1: an output times 1 − p is the share of its weights that were kept.
    q = k = torch.zeros(1, 4, 256, 16)
    v = torch.ones(1, 4, 256, 16)
    out = dilated_attention(q, k, v, [64, 256], [1, 4], dropout_p=0.25, overlap=overlap)
    kept = out[..., 0] * 0.75
    # A query has 64 weights of the first branch, and some have more of the second.
    deviation = math.sqrt(0.25 * 0.75 / (4 * 256 * 64))
    assert abs(kept.mean().item() - 0.75) < 5 * deviation
    assert kept.std() > 0.01


@pytest.mark.parametrize("overlap", ["multiset", "once"])
@pytest.mark.parametrize("rates", [[1, 4], [3, 5]])
def test_key_padding(overlap, rates):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    q, k, v = tensors(random.Random(seed), 2, 8, 4, 64, 16)
    padding = torch.rand(2, 64) < 0.5
    padding[1, :40] = True
    compare(q, k, v, [16, 32], rates, 1e-11, overlap, enable_gqa=True, key_padding_mask=padding)
    # Ignored keys may hold anything.
    clean = dilated_attention(q, k, v, [16, 32], rates, enable_gqa=True, key_padding_mask=padding)
    hidden = padding[:, None, :, None]
    dirty = (x.masked_fill(hidden, math.nan) for x in (k, v))
    out = dilated_attention(q, *dirty, [16, 32], rates, enable_gqa=True, key_padding_mask=padding)
    assert torch.equal(out, clean)


@pytest.mark.parametrize("overlap", ["multiset", "once"])
def test_gradcheck(overlap):
    q, k, v = tensors(random.Random(3), 1, 4, 2, 21, 8)

    def run(q, k, v):
        options = {"is_causal": True, "overlap": overlap, "enable_gqa": True, "return_lse": True}
        out, lse = dilated_attention(q, k, v, [6, 12, 21], [1, 3, 4], **options)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_only_the_log_sum_exp_or_only_the_output():
    q, k, v = tensors(random.Random(4), 1, 4, 4, 32, 8)
    masks = branch_masks(32, 4, [8, 32], [1, 4], "block", False)
    for which in (0, 1):
        got = dilated_attention(q, k, v, [8, 32], [1, 4], return_lse=True)[which].sum()
        want = oracle(q, k, v, masks, "multiset")[which].sum()
        wanted = torch.autograd.grad(want, (q, k, v), allow_unused=True)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), allow_unused=True), wanted, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(q) if a is None else a, torch.zeros_like(q) if b is None else b
            )


def test_autocast_takes_its_dtype():
    q, k, v = (torch.randn(1, 4, 64, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dilated_attention(q, k, v, [16, 64], [1, 4])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and torch.isfinite(q.grad).all()


MEMORY = """
import resource, torch
from sparsetile.dilated import dilated_attention
torch.set_num_threads(1)
n = 65536
q, k, v = (torch.randn(1, 4, n, 16, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for overlap in ("multiset", "once"):
    out = dilated_attention(q, k, v, [512, 4096, n], [4, 32, 512], is_causal=True, overlap=overlap)
    out.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_grows_with_the_length_alone():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    # One tensor is 16 MiB; a bit for each pair of one head would be 512 MiB.
    assert int(done.stdout) < 300 * 2**20


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"segment_lengths": []}, PatternError, "not empty"),
        ({"dilation_rates": [1]}, PatternError, "as many rates"),
        ({"dilation_rates": [1, 65]}, PatternError, "no rate above"),
        ({"dilation_rates": [1, 0]}, PatternError, "from 1"),
        ({"segment_lengths": [16, 64.0]}, PatternError, "from 1"),
        ({"overlap": "twice"}, ArgumentError, "overlap: expected 'multiset' or 'once', got 'twice'"),
        ({"head_offset": None}, ArgumentError, "head_offset: expected 'block' or 'cyclic', got None"),
        ({"scale": math.nan}, ArgumentError, "scale"),
        ({"dropout_p": 1.0}, ArgumentError, "dropout_p"),
        ({"backend": "cuda"}, ArgumentError, "backend"),
        ({"is_causal": torch.zeros(64, 64)}, ArgumentError, "is_causal"),
        ({"backend": "triton"}, BackendError, "float64"),
        ({"query": None}, ArgumentError, "query: expected a torch.Tensor"),
        ({"query": torch.zeros(4, 64, 16)}, ArgumentError, r"\[B, H, N, D\]"),
        ({"query": torch.zeros(1, 4, 60, 16).double()}, ArgumentError, "self-attention"),
        ({"query": torch.zeros(1, 8, 64, 16).double()}, ArgumentError, "enable_gqa"),
        ({"query": torch.zeros(1, 4, 64, 16).half()}, ArgumentError, "dtype"),
        ({"key_padding_mask": torch.zeros(1, 60, dtype=torch.bool)}, ArgumentError, "key_padding_mask"),
        ({"key_padding_mask": [True]}, ArgumentError, "key_padding_mask: expected a torch.Tensor"),
    ],
)
def test_errors_say_what_to_do(change, error, says):
    tensor = torch.zeros(1, 4, 64, 16, dtype=torch.float64)
    arguments = {"query": tensor, "key": tensor, "value": tensor}
    arguments |= {"segment_lengths": [16, 64], "dilation_rates": [1, 4]}
    with pytest.raises(error, match=says):
        dilated_attention(**(arguments | change))
