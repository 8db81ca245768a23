"""The adaptive module on a GPU: against attention written out, the same bits, no waiting, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsetile as st
from adaptive_oracle import compare, fresh, inputs, made
from sparsetile.adaptive import choose, search
from sparsetile.adaptive.seen import Seen
from sparsetile.adaptive.select import select_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def there(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to("cuda", dtype).requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"per_query_head": True, "share_heads": False, "sink": True}, {"selection": "top_p"}]
)
def test_output_and_every_gradient_equal_attention_written_out(
    head_dim: int, dtype: torch.dtype, is_causal: bool, settings: dict[str, Any]
) -> None:
    fresh()
    q, k, v = there(*inputs(batch=2, q_len=1100, k_len=1100, dim=head_dim), dtype=dtype)
    options = {"block_size": 128, "learnable_temperature": True, "temperature": 1.7} | settings
    module = made(q, k, **options).cuda()
    compare(module, q, k, v, 1e-4 if dtype == torch.float32 else 1e-2, is_causal)


def test_run_to_run_the_same_bits() -> None:
    fresh()
    q, k, v = there(*inputs(batch=2, q_len=4000, k_len=4000, dim=64), dtype=torch.bfloat16)
    module = made(q, k, block_size=128, dropout=0.1, scorer_dropout=0.1, learnable_temperature=True).cuda()

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        out = module(q, k, v, is_causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), [q, k, v, *module.parameters()])]

    first = run()
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


@pytest.mark.parametrize("form", ["mlp", "bilinear"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_fused_choice_is_that_of_sorted_scores(form, is_causal: bool, noisy: bool, monkeypatch) -> None:
    fresh()
    q, k, _ = (x.detach().transpose(1, 2) for x in there(*inputs(q_len=5000, k_len=5000, dim=32)))
    module = made(q.transpose(1, 2), k.transpose(1, 2), block_size=32, form=form).cuda()
    seen = Seen.of(q, k, module.scorer, module.config, is_causal=is_causal, padding=None)
    noise = torch.tensor([1234567], device="cuda") if noisy else None
    settings = {"threshold": module.threshold, "temperature": module.temperature, "noise": noise}
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return select_tiles(*args, **kwargs)

    monkeypatch.setattr(choose, "select_tiles", counted)
    fused = choose.choose_tiles(seen, module.config, module.scorer, **settings)
    assert not calls
    monkeypatch.setattr(search, "MOST_KEPT", 0)
    sorted_ = choose.choose_tiles(seen, module.config, module.scorer, **settings)
    assert len(calls) == 1
    same = (fused.column == sorted_.column).float().mean().item()
    assert same > 0.9999  # scores whose order the rounding of their sums decides


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selection": "top_p", "distillation": "sampled", "share_heads": False},
        {"distillation": "kept", "pooling": "max_min", "form": "indexer"},
    ],
)
def test_a_training_step_waits_for_nothing(settings: dict[str, Any]) -> None:
    fresh()
    q, k, v = there(*inputs(batch=2, q_len=2000, k_len=2000, dim=64), dtype=torch.bfloat16)
    module = made(q, k, block_size=64, learnable_temperature=True, anneal_steps=10, **settings).cuda()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def step(number: int) -> None:
        loss = module(q, k, v, is_causal=True).square().mean()
        if module.config.distillation != "none":
            loss = loss + module.distillation_loss()
        if module.config.selection == "top_p":
            loss = loss + module.sparsity_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.anneal(number)

    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor() -> None:
    fresh()
    q, k, v = there(*inputs(batch=2, q_len=2000, k_len=2000, dim=64))
    module = made(q, k, block_size=64).cuda().eval()
    compiled = torch.compile(module, fullgraph=True)
    expected, out = module(q, k, v, is_causal=True), compiled(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    leaves = [q, k, v, *module.scorer.parameters()]
    weight = torch.randn_like(out)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for got, want in zip(torch.autograd.grad((out * weight).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_parameters_come_to_the_input() -> None:
    module = st.create_adaptive_block_sparse(base_sparsity=0.9, temperature=1.0, learnable_temperature=True)
    x = torch.randn(1, 3000, 2, 64, device="cuda")
    assert module(x, x, x, is_causal=True).device == x.device
    assert all(p.device.type == "cuda" for p in module.parameters())
