"""Compressed reduce-scatters under ``fully_shard``: bytes, nothing lost, resumed bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from processes import run_ranks
from sparsetile.distributed import DistributedSparseConfig, compress_gradients
from sparsetile.errors import ArgumentError, CheckpointError, MismatchError

TENTH = DistributedSparseConfig(gradient_compression_ratio=0.1)


class Inner(nn.Module):
    """Parameters whose gradients are whatever the caller wants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(70, 50)), nn.Parameter(torch.zeros(129))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return (self.a * wanted["inner.a"]).sum() + (self.b * wanted["inner.b"]).sum()


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.outer = nn.Parameter(torch.zeros(41, 90))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return (self.outer * wanted["outer"]).sum() + self.inner(wanted)


def sharded(world: int, config: DistributedSparseConfig) -> tuple[nn.Module, Any]:
    model = Numbers()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, compress_gradients(model, config)


def wanted(seed: int, rank: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1000 * seed + 10 * step + rank)
    return {
        name: torch.randn(shape, generator=draw)
        for name, shape in {"inner.a": (70, 50), "inner.b": (129,), "outer": (41, 90)}.items()
    }


def averages(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of every parameter."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }


def stepped(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(values).backward()
    return averages(model)


def counted(plain: Any) -> tuple[Any, list[int]]:
    sent: list[int] = []

    def all_to_all_single(output: Tensor, given: Tensor, *splits: Any, **rest: Any) -> Any:
        sent.append(given.nbytes)
        return plain(output, given, *splits, **rest)

    return all_to_all_single, sent


def scenario(rank: int, world: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, handle = sharded(world, TENTH)
    plain = dist.all_to_all_single
    dist.all_to_all_single, sent = counted(plain)
    found["applied"] = [stepped(model, wanted(seed, rank, step)) for step in range(5)]
    found["bytes"] = (sum(sent), 5 * handle.sent_bytes, 5 * handle.ring_bytes)
    dist.all_to_all_single = plain
    found["residuals"] = {name: group.residual for name, group in handle.groups.items()}

    # Stopped after two steps and resumed: the same bits.
    model, handle = sharded(world, TENTH)
    for step in range(2):
        stepped(model, wanted(seed, rank, step))
    state = handle.state_dict()
    model, handle = sharded(world, TENTH)
    handle.load_state_dict(state)
    found["resumed"] = [stepped(model, wanted(seed, rank, step)) for step in range(2, 5)]

    config = DistributedSparseConfig(gradient_compression_ratio=0.1, gradient_warmup_steps=2)
    model, handle = sharded(world, config)
    found["warm"] = [stepped(model, wanted(seed, rank, step)) for step in range(3)]
    found["warm residuals"] = {name: group.residual for name, group in handle.groups.items()}

    model, handle = sharded(world, TENTH)
    values = wanted(seed, rank, 0)
    if rank == world - 1:
        values["inner.a"][3, 4] = float("nan")
    found["broken"] = stepped(model, values)
    found["after"] = stepped(model, wanted(seed, rank, 1))
    found["finite"] = all(bool(group.residual.isfinite().all()) for group in handle.groups.values())
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharded_gradients(world: int) -> None:
    seed = random.randrange(10**6)
    runs = run_ranks(scenario, world, seed)
    for step in range(5):
        for name in ("inner.a", "inner.b", "outer"):
            for run in runs[1:]:
                assert torch.equal(run["applied"][step][name], runs[0]["applied"][step][name]), seed
    # Σ ranks · applied + Σ residuals = Σ gradients, entry by entry; shards of FSDP are cut along dimension 0.
    for group, names in (("inner", ["a", "b"]), ("", ["outer"])):
        left = sum(run["residuals"][group].double() for run in runs)
        for shard in range(world):
            at = 0
            for short in names:
                name = f"{group}.{short}" if group else short
                true = sum(wanted(seed, r, t)[name].double() for r in range(world) for t in range(5))
                given = world * sum(a[name].double() for a in runs[0]["applied"])
                rows = -(-true.shape[0] // world)
                missing = (true - given)[shard * rows : (shard + 1) * rows].flatten()
                stays = left[shard, at : at + missing.numel()]
                torch.testing.assert_close(stays, missing, rtol=0, atol=1e-4, msg=f"{seed} {name}")
                at += rows * true[0].numel()
        assert left.abs().max() > 0.1  # a tenth of the bytes cannot have carried all of it
    for run in runs:
        counted_bytes, told, ring = run["bytes"]
        assert counted_bytes == told and 0.08 * ring < counted_bytes <= 0.1 * ring, seed
        for resumed, plain in zip(run["resumed"], run["applied"][2:], strict=True):
            assert all(torch.equal(resumed[name], plain[name]) for name in plain), seed
        for step in range(2):
            for name, got in run["warm"][step].items():
                parts = [wanted(seed, r, step)[name].bfloat16().float() for r in range(world)]
                torch.testing.assert_close(got, sum(parts) / world, rtol=1e-6, atol=1e-7, msg=f"{seed}")
        assert all(x is not None and x.abs().max() > 0 for x in run["warm residuals"].values())
        assert run["finite"] and all(run["broken"][n].isnan().all() for n in ("inner.a", "inner.b"))
        assert run["broken"]["outer"].isfinite().all() and all(
            x.isfinite().all() for x in run["after"].values()
        )


def bad(rank: int, world: int) -> dict[str, str]:
    found = {}

    def attempt(name: str, kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as caught:
            call()
        found[name] = str(caught.value)

    model, handle = sharded(world, TENTH)
    for name, settings in {
        "hook": {"gradient_hook": "bf16"},
        "cap": {"gradient_compression_ratio": 0.1, "bucket_cap_mb": 3.0},
    }.items():
        config = DistributedSparseConfig(**settings)
        attempt(name, ArgumentError, lambda config=config: compress_gradients(model, config))
    attempt("state", CheckpointError, lambda: handle.load_state_dict({}))
    small = nn.Linear(3, 2)
    fully_shard(small, mesh=init_device_mesh("cpu", (world,)))
    compress_gradients(small, TENTH)
    attempt("small", ArgumentError, lambda: small(torch.ones(1, 3)).sum().backward())
    model, _ = sharded(world, DistributedSparseConfig(gradient_compression_ratio=0.1 + 0.1 * rank))
    attempt("differ", MismatchError, lambda: stepped(model, wanted(0, rank, 0)))
    return found


def test_bad_input_raises_alike_on_every_rank() -> None:
    first, second = run_ranks(bad, 2)
    assert first == second
    assert first["hook"].startswith(
        "gradient_hook: expected \"topk\" under fully_shard, got 'bf16'. For bf16"
    )
    assert first["cap"].startswith("bucket_cap_mb: expected 25 under fully_shard, where it could not act")
    assert first["state"].startswith("residuals of gradients: expected those of the modules ['', 'inner']")
    assert "expected room for one entry a message: 4 entries a rank, got 0.1" in first["small"]
    assert "gradient_compression_ratio" in first["differ"] and "0.2" in first["differ"]
