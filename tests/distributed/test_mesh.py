"""Attention over one dimension of a mesh, inside of models that PyTorch replicates, shards or recomputes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import sparsetile as st
from processes import NO_THREAD_LEFT, run_ranks, torchrun
from sparsetile.distributed import Sharding, shard_sequence
from sparsetile.errors import BackendError

SEED = random.SystemRandom().randrange(1 << 32)
CONFIG = st.SparsePatternConfig("global_local", 0.4, block_size=16, global_tokens=16)
LENGTH, WIDTH, HEADS, BATCH = 100, 16, 2, 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Block(nn.Module):
    """Attention and a linear layer around it, and what recomputes either."""

    def __init__(self, attention: nn.Module, recompute: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention, self.recompute = attention, recompute

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))
        attend = self._maybe(self._attend, "attention")
        return x + self.out(attend(q, k, v).flatten(2)).tanh()

    def _attend(self, *qkv: Tensor) -> Tensor:
        out: Tensor = self.attention(*qkv, is_causal=True)
        return out

    def _maybe(self, run: Callable[..., Tensor], what: str) -> Callable[..., Tensor]:
        if self.recompute != what:
            return run
        return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)


class Small(nn.Module):
    def __init__(
        self, group: Any = None, order: str = "contiguous", lean: bool = False, again: str = ""
    ) -> None:
        super().__init__()
        config = st.DistributedSparseConfig(enable_memory_optimization=lean)
        attention = (
            st.BlockSparseRingDilatedAttention(sparse_config=CONFIG)
            if group is None
            else st.BlockSparseRingDistributedDilatedAttention(
                sparse_config=CONFIG, group=group, order=order, distributed_config=config
            )
        )
        self.again = again
        self.blocks = nn.ModuleList(Block(attention, again) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again == "block" else block(x)
        out: Tensor = self.head(x)
        return out


def data(length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(SEED)
    return torch.randn(BATCH, length, WIDTH).double(), torch.randn(BATCH, length, 3).double()


def of_one_process(length: int) -> tuple[Small, Tensor]:
    """The model with its gradients of the whole batch, and its loss: the mean over all tokens."""
    x, target = data(length)
    torch.manual_seed(SEED)
    model = Small().double()
    loss = (model(x) - target).square().sum() / (BATCH * length)
    loss.backward()
    return model, loss.detach()


def share(mesh: DeviceMesh, where: Sharding, x: Tensor) -> Tensor:
    """This rank's tokens of its rows of the batch."""
    dp = mesh["dp"]
    return shard_sequence(x.chunk(dp.size())[dp.get_local_rank()], 1, where, mesh["cp"])


def spread(
    mesh: DeviceMesh, length: int, wrap: Callable[[Small], nn.Module], factor: float, **how: Any
) -> tuple[nn.Module, Tensor]:
    """As :func:`of_one_process`, over the mesh; ``factor`` undoes what ``wrap`` divides gradients by."""
    torch.manual_seed(SEED)
    model = Small(mesh["cp"], **how).double()
    where = model.blocks[0].attention.sharding_for(length)
    x, target = (share(mesh, where, y) for y in data(length))
    wrapped = wrap(model)
    loss = (wrapped(x) - target).square().sum() / (BATCH * length)
    (loss * factor).backward()
    total = loss.detach()
    dist.all_reduce(total)
    return wrapped, total


def assert_same(got: dict[str, Tensor], length: int, loss: Tensor, how: dict[str, Any]) -> None:
    reference, wanted = of_one_process(length)
    torch.testing.assert_close(loss, wanted, **EXACT)
    want = dict(reference.named_parameters())
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(
            grad, want[name].grad, **EXACT, msg=lambda text, name=name: f"{name}, {how}, seed {SEED}: {text}"
        )


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


WAYS = [
    {},
    {"order": "balanced", "lean": True},
    {"again": "attention"},
    {"again": "block", "order": "balanced"},
    {"again": "attention", "lean": True},
]


def mesh_of(dp: int, cp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (dp, cp), mesh_dim_names=("dp", "cp"))


# -- replicated -------------------------------------------------------------------------------------------


def ddp_over_dp(rank: int, world: int) -> None:
    mesh = mesh_of(2, 2)

    def wrap(model: Small) -> nn.Module:
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group())

    for how in WAYS:
        model, loss = spread(mesh, LENGTH, wrap, 2, **how)
        for p in model.parameters():
            dist.all_reduce(p.grad, group=mesh["cp"].get_group())
        assert_same(grads(model.module), LENGTH, loss, how)


def test_ddp_averages_over_one_dimension_and_the_other_is_summed() -> None:
    run_ranks(ddp_over_dp, 4)


def ddp_over_all(rank: int, world: int) -> None:
    mesh = mesh_of(2, 2)

    # Small buckets, so that gradients travel while attention's backward exchanges tiles.
    def wrap(model: Small) -> nn.Module:
        return DistributedDataParallel(model, bucket_cap_mb=0.001)

    for how in WAYS:
        model, loss = spread(mesh, LENGTH, wrap, world, **how)
        assert_same(grads(model.module), LENGTH, loss, how)


def test_ddp_averages_over_both_dimensions() -> None:
    run_ranks(ddp_over_all, 4)


# -- sharded ----------------------------------------------------------------------------------------------


def fsdp(rank: int, world: int) -> None:
    mesh = mesh_of(2, 2)
    flat = mesh._flatten("all")
    # Over all ranks at once; and sharded over cp, replicated over dp.
    for over, how in [*((flat, how) for how in WAYS), (mesh, WAYS[3])]:

        def wrap(model: Small, over: DeviceMesh = over) -> nn.Module:
            for block in model.blocks:
                fully_shard(block, mesh=over)
            return fully_shard(model, mesh=over)

        model, loss = spread(mesh, LENGTH, wrap, world, **how)
        # Each rank keeps a part of every parameter.
        assert all(p.to_local().numel() < p.numel() for p in model.parameters())
        assert_same(grads(model), LENGTH, loss, how)


def test_fsdp() -> None:
    run_ranks(fsdp, 4)


# -- recomputed -------------------------------------------------------------------------------------------


def recomputed(rank: int, world: int) -> None:
    mesh = mesh_of(1, world)
    # 33 tokens are 3 tiles: the last rank of four holds none.
    for length in (33, LENGTH):
        for how in WAYS[2:]:
            model, loss = spread(mesh, length, lambda m: m, 1, **how)
            for p in model.parameters():
                dist.all_reduce(p.grad)
            assert_same(grads(model), length, loss, how)


def test_recomputing_where_ranks_hold_unlike_much() -> None:
    run_ranks(recomputed, 4)


def counted(rank: int, world: int) -> tuple[int, int]:
    """Calls of attention's forward without and with recomputing: what is recomputed runs twice."""
    found = []
    for again in ("", "attention"):
        calls: list[int] = []

        def wrap(model: Small, calls: list[int] = calls) -> nn.Module:
            model.blocks[0].attention.register_forward_pre_hook(lambda *_: calls.append(1))
            return model

        spread(mesh_of(1, 2), LENGTH, wrap, 1, again=again)
        found.append(len(calls))
    return found[0], found[1]


def test_recomputing_recomputes() -> None:
    # Both blocks have the one attention.
    assert run_ranks(counted, 2) == [(2, 4)] * 2


def refused(rank: int, world: int) -> None:
    mesh = mesh_of(1, 2)
    model = Small(mesh["cp"]).double()
    where = model.blocks[0].attention.sharding_for(LENGTH)
    x = share(mesh, where, data(LENGTH)[0])
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    with pytest.raises(BackendError, match="outside of modes"):
        checkpoint(model.blocks[0], x, use_reentrant=False, context_fn=contexts)
    whole = distribute_tensor(torch.zeros(1, LENGTH, 2, 8), mesh["cp"], [Shard(1)])
    with pytest.raises(BackendError, match="plain tensors"):
        model.blocks[0].attention(whole, whole, whole)


def test_selective_recomputing_and_distributed_tensors_are_refused() -> None:
    run_ranks(refused, 2)


# -- trained ----------------------------------------------------------------------------------------------


def trained(rank: int, world: int) -> list[float]:
    mesh = mesh_of(2, 2)
    torch.manual_seed(SEED)
    model = Small(mesh["cp"], again="block").double()
    where = model.blocks[0].attention.sharding_for(LENGTH)
    alone = of_one_process(LENGTH)[0]
    wrapped = DistributedDataParallel(model)
    both = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (alone, wrapped)]
    x, target = data(LENGTH)
    mine = [share(mesh, where, y) for y in (x, target)]
    losses = []
    for _ in range(5):
        for optimiser in both:
            optimiser.zero_grad()
        want = (alone(x) - target).square().sum() / (BATCH * LENGTH)
        want.backward()
        loss = (wrapped(mine[0]) - mine[1]).square().sum() / (BATCH * LENGTH)
        (loss * world).backward()
        for optimiser in both:
            optimiser.step()
        total = loss.detach()
        dist.all_reduce(total)
        assert total.item() == pytest.approx(want.item(), rel=1e-9), SEED
        losses.append(total.item())
    return losses


def test_steps_of_an_optimiser_stay_those_of_one_process() -> None:
    losses = run_ranks(trained, 4)
    assert all(of_rank == losses[0] for of_rank in losses) and losses[0][-1] < losses[0][0]


def test_the_example_of_the_docs_runs_over_ranks(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    section = page.read_text().split("\n## With data parallelism\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "example.py").write_text(code + NO_THREAD_LEFT)
    printed = []
    for processes in (1, 4):
        done = torchrun(processes, [str(tmp_path / "example.py")])
        assert done.returncode == 0, done.stderr
        printed.append([float(x) for x in done.stdout.split()])
    # The loss and the norm of the gradient, the same for one process as for four.
    assert printed[1] == pytest.approx(printed[0], rel=1e-5) and len(printed[0]) == 2
