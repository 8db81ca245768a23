"""The coarse branch against attention over pooled tokens written out in float64, and inside the module."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsetile as st
from adaptive_oracle import BLOCK, fresh, inputs, made, means, tail_padding
from sparsetile.adaptive.coarse import add_coarse
from sparsetile.errors import ArgumentError
from sparsetile.nn.adaptive import BlockSparseAdaptive


def written_out(out, q, k, v, gate, *, is_causal, padding, key_bias, scale):
    """``out + σ(g)·coarse``, heads first, every pair of query and tile in a dense matrix."""
    heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
    share = heads // k.shape[1]
    ignored = torch.zeros(len(k), k_len, dtype=torch.bool) if padding is None else padding
    if key_bias is not None:
        ignored = ignored | (key_bias == -math.inf)
    k_bar, v_bar = (means(x.transpose(1, 2), BLOCK, ignored).repeat_interleave(share, 1) for x in (k, v))
    logits = scale * torch.einsum("bhqd,bhnd->bhqn", q, k_bar)
    allowed = torch.zeros(logits.shape, dtype=torch.bool)
    for tile in range(k_bar.shape[2]):
        tokens = range(tile * BLOCK, min((tile + 1) * BLOCK, k_len))
        for b in range(len(q)):
            live = [t for t in tokens if not ignored[b, t]]
            for i in range(q_len):
                ended = (tile + 1) * BLOCK - 1 <= i + k_len - q_len
                allowed[b, :, i, tile] = bool(live) and (ended or not is_causal)
            if key_bias is not None and live:
                logits[b, :, :, tile] += key_bias[b, live].exp().mean().log()
    empty = ~allowed.any(-1, keepdim=True)
    weights = logits.masked_fill(~allowed, -math.inf).masked_fill(empty, 0.0).softmax(-1)
    coarse = weights.masked_fill(empty, 0.0) @ v_bar
    return out + gate.sigmoid().repeat_interleave(heads // len(gate))[:, None, None] * coarse


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "cache": {"is_causal": True, "q_len": 67},
    "more queries": {"is_causal": True, "q_len": 120, "k_len": 70},
    "padded": {"padded": True, "gates": 2},
    "biased": {"is_causal": True, "padded": True, "biased": True, "gates": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_those_written_out(case):
    fresh()
    settings = CASES[case]
    is_causal = settings.get("is_causal", False)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-11), (torch.bfloat16, 1e-2)):
        if dtype == torch.bfloat16 and "biased" in settings:
            continue  # the gradient of a bias in 16 bits belongs to the kernels, and is measured there
        q, k, v = inputs(q_len=settings.get("q_len", 150), k_len=settings.get("k_len", 150), dtype=dtype)
        leaves = [torch.randn(q.shape, dtype=dtype), q.detach(), k.detach(), v.detach()]
        leaves = [x.transpose(1, 2).requires_grad_() for x in leaves]
        leaves.append(torch.randn(settings.get("gates", 1), dtype=dtype).requires_grad_())
        padding = key_bias = None
        if settings.get("padded"):
            padding = tail_padding(2, 150, 70) | (torch.rand(2, 150) < 0.1)
        if settings.get("biased"):
            key_bias = torch.randn(2, 150, dtype=dtype)
            key_bias[torch.rand(2, 150) < 0.1] = -math.inf
            leaves.append(key_bias.requires_grad_())
        call = {"is_causal": is_causal, "scale": 0.7}
        got = add_coarse(
            *leaves[:5], block=BLOCK, key_padding_mask=padding, key_bias=key_bias, dropout=0.0,
            backend="auto", **call,
        )  # fmt: skip
        wide = [x.detach().double().requires_grad_() for x in leaves]
        wide_bias = wide[5] if key_bias is not None else None
        expected = written_out(*wide[:5], padding=padding, key_bias=wide_bias, **call)
        assert got.dtype == dtype
        weight = torch.randn_like(expected)
        pairs = [(got, expected)]
        pairs += zip(
            torch.autograd.grad(got, leaves, weight.to(dtype)),
            torch.autograd.grad(expected, wide, weight),
            strict=True,
        )
        # The gate's gradient is a sum over all outputs that may cancel: measured against what is summed,
        # whose errors in 16 bits add up to .4 % of its norm, give or take as much.
        closed = (1 - wide[4].detach().sigmoid()).repeat_interleave(4 // len(wide[4]))[:, None, None]
        summed = 2 * (weight * closed * (expected - wide[0])).norm().item()
        for index, (a, b) in enumerate(pairs):
            size = max(b.norm().item(), summed if index == 5 else 0.0)
            assert (a.double() - b).norm().item() <= limit * size, index
        # The gate opens onto every tile that some query sees, and what nobody sees gets nothing.
        for gradient in (pairs[3][0], pairs[4][0]):
            seen = k.shape[1] // BLOCK * BLOCK if is_causal else k.shape[1]
            some = gradient.abs().amax((1, 3)) > 0
            assert not some[:, seen:].any()
            if padding is not None:
                assert not some[padding].any()
            if key_bias is None:
                assert some[:, :seen].all() or padding is not None


@pytest.mark.parametrize("training", [False, True])
def test_in_the_module_the_future_changes_nothing(training):
    draw = fresh()
    for q_len in (150, 83):
        q, k, v = (x.detach() for x in inputs(q_len=q_len))
        module = made(q, k, coarse=True).train(training)
        with torch.no_grad():
            module.coarse_gate.fill_(3.0)
        # Next to the last token of a tile, too, where its pooled key comes into sight.
        for now in (draw.randrange(q_len - 1), q_len - 150 + 127, q_len - 150 + 126):
            torch.manual_seed(1)
            before = module(q, k, v, is_causal=True)
            later = [x.clone() for x in (q, k, v)]
            for x, first in zip(later, (now + 1, *(now + 151 - q_len,) * 2), strict=True):
                x[:, first:] = 4 * torch.randn_like(x[:, first:])
            torch.manual_seed(1)
            after = module(*later, is_causal=True)
            assert torch.equal(before[:, : now + 1], after[:, : now + 1]), now
            assert not torch.equal(before[:, now + 1 :], after[:, now + 1 :])
        if q_len == 150 and not training:
            # Nor does the length: the first tokens alone give what they gave.
            short = module(*(x[:, :-40] for x in (q, k, v)), is_causal=True)
            torch.testing.assert_close(short, module(q, k, v, is_causal=True)[:, :-40])


def test_in_the_module_it_is_added_to_what_is_there_without():
    fresh()
    q, k, v = inputs()
    plain = made(q, k, share_heads=False).eval()
    module = made(q, k, share_heads=False, coarse=True).eval()
    assert module.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["coarse_gate"]
    assert module.coarse_gate.shape == (2,) and torch.allclose(
        module.coarse_gate.sigmoid(), torch.tensor(0.05)
    )
    padding = tail_padding(2, 150, 60, 111)
    out, base = (m(q, k, v, key_padding_mask=padding) for m in (module, plain))
    expected = written_out(
        *(x.double().transpose(1, 2) for x in (base, q, k, v)), module.coarse_gate.double(), is_causal=False,
        padding=padding, key_bias=None, scale=0.25,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.last_layout.indices, plain.last_layout.indices)
    (out * torch.randn_like(out)).sum().backward()
    assert module.coarse_gate.grad.abs().min() > 0
    with torch.no_grad():
        for x in (q, k, v):
            x[padding] = math.nan
        assert torch.equal(module(q, k, v, key_padding_mask=padding)[~padding], out[~padding])
        module.coarse_gate.fill_(-math.inf)
        # A closed gate leaves exactly what was there before.
        live = [plain(q, k, v, key_padding_mask=padding), module(q, k, v, key_padding_mask=padding)]
        assert torch.equal(*(x[~padding] for x in live))
    with pytest.raises(ArgumentError, match="need_weights"):
        module(q, k, v, need_weights=True)


def test_the_gate_waits_with_the_other_parameters():
    fresh()
    q, k, v = inputs()
    config = st.AdaptiveConfig(0.6, block_size=BLOCK, coarse=True, learnable_temperature=True)
    module, twin, plain = (BlockSparseAdaptive(config) for _ in range(3))
    held = module.coarse_gate
    module.eval()(q, k, v)
    assert module.coarse_gate is held and held.shape == (1,)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(q, k, v), module(q, k, v))
    plain = made(q, k, learnable_temperature=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*coarse_gate"):
        plain.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*coarse_gate"):
        module.load_state_dict(plain.state_dict())


def test_nobody_waits_for_the_device():
    # Fake tensors have no values: what asks for one raises.
    with FakeTensorMode():
        q, k, v = inputs()
        module = BlockSparseAdaptive(
            st.AdaptiveConfig(0.5, block_size=BLOCK, coarse=True), num_heads=4, num_kv_heads=2, head_dim=16
        )
        padding = torch.zeros(2, 150, dtype=torch.bool)
        module(q, k, v, is_causal=True, key_padding_mask=padding).sum().backward()


def test_compiles_whole():
    fresh()
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (*inputs(), torch.randn(2, 150, 4, 16))]
    leaves.append(torch.randn(2, requires_grad=True))
    options = {"key_padding_mask": None, "key_bias": None, "scale": 0.3, "dropout": 0.0, "backend": "auto"}

    def call(q, k, v, out, gate):
        return add_coarse(out, q, k, v, gate, block=BLOCK, is_causal=True, **options)

    torch._dynamo.reset()
    out, expected = (f(*leaves) for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    pairs = (torch.autograd.grad(x, leaves, weight) for x in (out, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
