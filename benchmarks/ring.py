"""One sequence over several GPUs of one host, beside PyTorch's own context-parallel ring attention.

``python benchmarks/ring.py [--ranks 2] [--tokens 524288 1048576] [--out benchmarks/results]``

B1 H16 D128 bf16 causal, forward + backward: sparsetile with a window of 0.8 % of the causal triangle, and
with a window, global tokens and dilation at 2 %; ``torch.distributed.tensor.experimental.context_parallel``
around ``F.scaled_dot_product_attention`` (flash, load-balanced, both ways to pass keys on) on the same GPUs
in the same run. Beside each ratio stands the bound by floating-point operations, 1 ÷ density. Then the same
call on one GPU. ``--device cpu`` shows that the script runs; there is no rival then.
Writes ``ring_<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsetile as st
from sparsetile.distributed import Sharding, distributed_attention
from sparsetile.environment import provenance

HEADS, WIDTH, BLOCK = 16, 128, 128


def patterns(tokens: int) -> dict[str, st.Pattern]:
    """0.8 % and 2 % of the causal triangle, whose rows have half as many tiles as the sequence."""
    row = tokens / BLOCK / 2
    window = max(1, int(0.008 * row)) * BLOCK
    part = max(1, int(0.02 * row / 3)) * BLOCK
    step = max(1, tokens // part)
    return {
        "local, 0.8 %": st.Local(window - BLOCK, 0).block_aligned(),
        "local + global + dilated, 2 %": (
            st.Local(part, 0) | st.Global(2 * part, rows=False) | st.Strided(step * BLOCK)
        ).block_aligned(),
    }


def timed(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median milliseconds, of the slowest rank."""
    samples = []
    for number in range(repeats + 2):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = torch.tensor((time.perf_counter() - start) * 1e3, device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if number >= 2:
            samples.append(took.item())
    return statistics.median(samples)


def ours(
    tokens: int, pattern: st.Pattern, mesh: DeviceMesh | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    size = 1 if mesh is None else mesh.size()
    rank = 0 if mesh is None else mesh.get_local_rank()
    where = Sharding.balanced(tokens, size, BLOCK)
    shape = 1, HEADS, where.tokens_of(rank), WIDTH
    leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, device=device, dtype=dtype)
    alone: dict[str, Any] = {} if mesh is not None else {"is_causal": True}

    def call() -> Tensor:
        if mesh is None:
            return st.sparse_attention(*leaves, pattern, block_size=BLOCK, **alone)
        return distributed_attention(
            *leaves, pattern, group=mesh, order="balanced", is_causal=True, block_size=BLOCK
        )

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), leaves, grad)

    found = {"forward_ms": timed(forward, device), "forward_backward_ms": timed(both, device)}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def rival(tokens: int, mesh: DeviceMesh, device: torch.device, rotate: str) -> dict[str, float]:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    shape = 1, HEADS, tokens, WIDTH
    leaves = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with ExitStack() as stack:
        stack.enter_context(context_parallel(mesh, buffers=leaves, buffer_seq_dims=[2, 2, 2]))
        stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        grad = torch.randn_like(leaves[0])

        def forward() -> None:
            with torch.no_grad():
                F.scaled_dot_product_attention(*leaves, is_causal=True)

        def both() -> None:
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            torch.autograd.grad(out, leaves, grad)

        return {"forward_ms": timed(forward, device, 3), "forward_backward_ms": timed(both, device, 3)}


def one(rank: int, chosen: argparse.Namespace, store: str) -> None:
    gpu = chosen.device == "cuda"
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{store}", rank=rank, world_size=chosen.ranks
    )
    mesh = init_device_mesh(chosen.device, (chosen.ranks,), mesh_dim_names=("cp",))
    dtype = torch.bfloat16 if gpu else torch.float32
    found: dict[str, Any] = {"provenance": provenance(), "ranks": chosen.ranks, "cases": []}
    for tokens in chosen.tokens:
        rivals = {}
        if gpu:
            for rotate in ("allgather", "alltoall"):
                rivals[rotate] = rival(tokens, mesh, device, rotate)
                torch.cuda.empty_cache()
        for name, pattern in patterns(tokens).items():
            layout = st.BlockLayout.from_pattern(pattern & st.Causal(), tokens, block_size=BLOCK)
            case: dict[str, Any] = {
                "tokens": tokens,
                "pattern": name,
                "causal_density": layout.causal_density,
            }
            case["flop_bound"] = 1 / case["causal_density"]
            case["sparsetile"] = ours(tokens, pattern, mesh, device, dtype)
            case["torch ring"] = rivals
            if rivals:
                best = min(x["forward_backward_ms"] for x in rivals.values())
                case["times_torch"] = best / case["sparsetile"]["forward_backward_ms"]
            case["one rank"] = ours(tokens, pattern, None, device, dtype)
            each = case["one rank"]["forward_backward_ms"] / case["sparsetile"]["forward_backward_ms"]
            case["speedup_over_one_rank"] = each
            found["cases"].append(case)
            if rank == 0:
                print(json.dumps(case, indent=1), flush=True)
    if rank == 0:
        machine = torch.cuda.get_device_name(device).split()[1].lower() if gpu else "cpu"
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / f"ring_{machine}.json").write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--tokens", type=int, nargs="+", default=[524_288, 1_048_576])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one, (chosen, str(Path(folder) / "store")), nprocs=chosen.ranks)


if __name__ == "__main__":
    main()
