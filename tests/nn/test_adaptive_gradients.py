"""The output and gradients of BlockSparseAdaptive against attention written out; its losses."""

import pytest
import torch

import sparsetile as st
from adaptive_oracle import BLOCK, compare, fresh, inputs, made, run_oracle, tail_padding
from sparsetile.adaptive.seen import Seen
from sparsetile.errors import ArgumentError

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, tile": {"is_causal": True, "query_summary": "tile"},
    "heads": {"share_heads": False, "per_query_head": True},
    "groups": {"share_heads": False, "sink": True, "is_causal": True},
    "one group": {"kv_heads": 1},
    "top_p": {"selection": "top_p", "p": 0.7},
    "top_p causal": {"selection": "top_p", "p": 0.6, "is_causal": True},
    "cache": {"q_len": 67, "is_causal": True},
    "cross": {"q_len": 70, "k_len": 100, "self_attention": False},
    "more queries": {"q_len": 150, "k_len": 75, "is_causal": True},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_attention_written_out(case, padded):
    fresh()
    settings = dict(CASES[case])
    is_causal = settings.pop("is_causal", False)
    sizes = {name: settings.pop(name) for name in ("q_len", "k_len", "kv_heads") if name in settings}
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        q, k, v = inputs(**sizes, dtype=dtype)
        padding = tail_padding(len(q), k.shape[1], k.shape[1] // 2) if padded else None
        module = made(q, k, dtype=dtype, learnable_temperature=True, temperature=1.7, **settings)
        compare(module, q, k, v, limit, is_causal, padding)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_in_bfloat16(is_causal):
    fresh()
    q, k, v = inputs(batch=3, q_len=512, k_len=512, dtype=torch.bfloat16)
    module = made(q, k, learnable_temperature=True, temperature=2.0)
    compare(module, q, k, v, 1e-2, is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_parameter_has_a_gradient_by_default(is_causal):
    fresh()
    module = st.create_adaptive_block_sparse(base_sparsity=0.9, temperature=1.0, learnable_temperature=True)
    q, k, v = inputs(batch=1, q_len=4096, k_len=4096, heads=1, kv_heads=1)
    out = module(q, k, v, is_causal=is_causal)
    (out * torch.randn_like(out)).sum().backward()
    named = dict(module.named_parameters()) | {"q": q, "k": k, "v": v}
    assert len(named) == 10
    for name, x in named.items():
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "settings", [{}, {"selection": "top_p", "form": "indexer"}, {"form": "bilinear", "pooling": "lse"}]
)
def test_run_to_run_the_same_bits(settings):
    fresh()
    q, k, v = inputs(q_len=300, k_len=300)
    module = made(q, k, dropout=0.2, scorer_dropout=0.2, learnable_temperature=True, **settings)
    weight = torch.randn_like(q)

    def grads():
        torch.manual_seed(5)
        out = module(q, k, v, is_causal=True)
        leaves = [q, k, v, *module.parameters()]
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    first = grads()
    torch.set_num_threads(2)
    try:
        pairs = list(zip(first, grads(), strict=True)), list(zip(grads(), grads(), strict=True))
    finally:
        torch.set_num_threads(1)
    for a, b in pairs[1]:
        assert torch.equal(a, b)
    assert torch.equal(*pairs[0][0])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("start", [0.02, 30.0])
def test_sparsity_loss_steers_the_density(is_causal, start):
    fresh()
    q, k, v = (x.detach() for x in inputs(batch=1, q_len=512, k_len=512, heads=2, kv_heads=1))
    module = made(q, k, base_sparsity=0.75, selection="top_p", p=0.9, k_max=32, temperature=start,
                  learnable_temperature=True)  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    module(q, k, v, is_causal=is_causal)
    first = module.last_density.item()
    assert abs(first - 0.25) > 0.1
    for _ in range(120):
        optimizer.zero_grad()
        module(q, k, v, is_causal=is_causal)
        module.sparsity_loss().backward()
        optimizer.step()
    assert module.sparsity_loss().item() == pytest.approx((module.last_density.item() - 0.25) ** 2, abs=1e-6)
    assert abs(module.last_density.item() - 0.25) < 0.05, (first, module.last_density.item())


@pytest.mark.parametrize("kind", ["kept", "sampled"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_distillation_loss(kind, is_causal):
    fresh()
    q, k, v = inputs(dtype=torch.float64)
    module = made(q, k, dtype=torch.float64, learnable_temperature=True, distillation=kind, temperature=1.5,
                  base_sparsity=0.5)  # fmt: skip
    padding = tail_padding(2, 150, 100)
    torch.manual_seed(3)
    out = module(q, k, v, is_causal=is_causal, key_padding_mask=padding)
    loss = module.distillation_loss()
    reached = [q, k, v, *module.parameters()]
    grads = torch.autograd.grad(loss, reached, allow_unused=True, retain_graph=True)
    named = dict(zip(["q", "k", "v", *(n for n, _ in module.named_parameters())], grads, strict=True))
    for name, grad in named.items():
        # One value for all scores of a row moves no softmax: b2 has a gradient, and it is zero.
        assert (grad is not None) == name.startswith("scorer."), name
        assert grad is None or name == "scorer.b2" or grad.abs().max() > 0, name
    assert named["scorer.b2"].abs().max() < 1e-12
    out.sum().backward()  # the graph of the output is still there
    if kind == "kept":
        _, _, weights, _ = run_oracle(module, q, k, v, is_causal, padding)
        assert loss.item() == pytest.approx(
            kept_divergence(module, q, k, weights, is_causal, padding), rel=1e-9
        )
    module.eval()
    module(q, k, v)
    with pytest.raises(ArgumentError, match="in training"):
        module.distillation_loss()


def kept_divergence(module, q, k, weights, is_causal, padding):
    """The loss of docs/adaptive.md, row by row."""
    seen = Seen.of(
        q.transpose(1, 2),
        k.transpose(1, 2),
        module.scorer,
        module.config,
        is_causal=is_causal,
        padding=padding,
    )
    scores = module.scorer.rows(seen.features, 0, seen.shape[2]).detach() / module.temperature.detach()
    chosen, total, rows = module._last.chosen, 0.0, 0
    for b in range(chosen.shape[0]):
        for g in range(chosen.shape[1]):
            for i in range(chosen.shape[2]):
                tiles = [j for j in chosen[b, g, i].tolist() if j >= 0]
                tiles = [j for j in tiles if (j < i if is_causal else j != i)]
                rows_i = weights.detach()[b, 2 * g : 2 * g + 2, i * BLOCK : (i + 1) * BLOCK]
                shares = [rows_i[..., j * BLOCK : (j + 1) * BLOCK].sum().item() for j in tiles]
                mass = torch.tensor(shares, dtype=torch.float64)
                if not tiles or mass.sum() == 0:
                    continue
                share, predicted = mass / mass.sum(), scores[b, g, i, tiles].log_softmax(0)
                total += (share * (share.log() - predicted))[share > 0].sum().item()
                rows += 1
    return total / rows
