"""The base module on one GPU against dense attention: the workload that the idea was first announced with.

``python benchmarks/module.py [--out benchmarks/results]``

B1 H8 N8192 D64 fp16 at 98 % sparsity. Rivals: matmul, softmax, matmul as PyTorch functions (the announced
comparison), and every backend of ``F.scaled_dot_product_attention``. Eager calls and CUDA graphs, the L2
overwritten before each; the host's share of a call; memory at 131,072 tokens; and the longest sequence whose
forward and backward fit into 8 GiB. Writes ``module_<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsetile as st
from sparsetile.bench.measure import peak_memory, time_call
from sparsetile.environment import provenance

BATCH, LENGTH, HEADS, WIDTH, DTYPE = 1, 8192, 8, 64, torch.float16
DEVICE = torch.device("cuda", 0)
LONG = 131_072
GIB = 2**30
DENSE = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def tensors(length: int, *, gradient: bool = False) -> list[Tensor]:
    shape = BATCH, length, HEADS, WIDTH
    return [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=gradient) for _ in range(3)]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * WIDTH**-0.5
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def dense(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return call


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_microseconds(
    calls: dict[str, Callable[[], object]], repeats: int = 300, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """What each call takes the host: calls in a row, where the GPU is done with each before the next comes.

    The calls take turns, so that whatever else the machine does falls on all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            samples[name].append((time.perf_counter() - start) / repeats * 1e6)
            torch.cuda.synchronize()
    # The first round warms up.
    return {name: {"median": statistics.median(x[1:]), "min": min(x[1:])} for name, x in samples.items()}


def both(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(call(*inputs), inputs, grad)


def speeds(ratio: float) -> dict[str, object]:
    """Milliseconds of the module and its rivals, in one run."""
    module = st.create_block_sparse_attention(variant="base", sparsity_ratio=ratio)
    density = module.density_for(LENGTH)
    calls: dict[str, Callable[..., Tensor]] = {"sparsetile": module, "naive": naive}
    calls |= {name: dense(backend) for name, backend in DENSE.items()}
    inputs, leaves = tensors(LENGTH), tensors(LENGTH, gradient=True)
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        forward = lambda call=call: call(*inputs)  # noqa: E731
        found[name] = {
            "eager_ms": time_call(forward, DEVICE).median_ms,
            "graph_ms": time_call(graphed(forward), DEVICE).median_ms,
            "forward_backward_ms": time_call(both(call, leaves), DEVICE).median_ms,
            "forward_backward_graph_ms": time_call(graphed(both(call, leaves)), DEVICE).median_ms,
        }
    ours = found["sparsetile"]
    best = {key: min(found[name][key] for name in DENSE) for key in ours}
    return {
        "sparsity_ratio": ratio,
        "requested_density": density.requested,
        "realised_density": density.realised,
        "milliseconds": found,
        "times_naive": {key: found["naive"][key] / ours[key] for key in ours},
        "times_best_dense": {key: best[key] / ours[key] for key in ours},
    }


def host() -> dict[str, dict[str, float]]:
    module = st.create_block_sparse_attention(variant="base", sparsity_ratio=0.02)
    inputs = tensors(LENGTH)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    pattern = module.plan.pattern_for()
    layout = module.layout_for(LENGTH, device=DEVICE)
    # Dense attention of 256 tokens: its host time, where 8192 would wait for the GPU.
    short = [x[:, :, :256] for x in (q, k, v)]
    return host_microseconds(
        {
            "module_forward_us": lambda: module(*inputs),
            "module_forward_causal_us": lambda: module(*inputs, is_causal=True),
            "sparse_attention_pattern_us": lambda: st.sparse_attention(q, k, v, pattern),
            "sparse_attention_layout_us": lambda: st.sparse_attention(q, k, v, layout),
            "dense_256_tokens_us": lambda: F.scaled_dot_product_attention(*short),
        }
    )


def memory() -> dict[str, float]:
    """Megabytes (10⁶) per 1,000 tokens beyond q, k, v and out, with the layout's own tensors."""
    module = st.create_block_sparse_attention(variant="base", sparsity_ratio=0.02)
    q, k, v = tensors(LONG)
    before = torch.cuda.memory_allocated()
    module(q[:, :1], k[:, :1], v[:, :1])
    torch.cuda.synchronize()
    module(q, k, v)
    layout = torch.cuda.memory_allocated() - before
    call = peak_memory(lambda: module(q, k, v), DEVICE)
    out = q.numel() * q.element_size()
    beyond = call - out + layout
    return {
        "layout_mb": layout / 1e6,
        "call_mb": (call - out) / 1e6,
        "mb_per_1k_tokens": beyond / 1e6 / (LONG / 1e3),
    }


def fits(length: int) -> bool:
    module = st.create_block_sparse_attention(variant="base", sparsity_ratio=1024 / length)
    leaves: list[Tensor] = []
    try:
        leaves = tensors(length, gradient=True)
        out = module(*leaves)
        torch.autograd.grad(out, leaves, out.detach())
        torch.cuda.synchronize()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        leaves.clear()
        out = None
        torch.cuda.empty_cache()


def longest(gib: float = 8.0, step: int = 4096) -> int:
    """Most tokens whose forward and backward PyTorch serves out of ``gib`` GiB; about eight tiles a row."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, DEVICE)
    low, high = 1, 2_097_152 // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    return low * step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    chosen = options.parse_args()
    found: dict[str, object] = {"provenance": provenance(), "workload": "B1 H8 N8192 D64 fp16"}
    # First, while nothing else has taken memory.
    found["longest_in_8_gib"] = longest()
    print(found["longest_in_8_gib"], flush=True)
    found["speeds"] = [speeds(ratio) for ratio in (0.02, 0.05, 0.1)]
    print(json.dumps(found["speeds"], indent=1), flush=True)
    found["host"] = host()
    print(json.dumps(found["host"], indent=1), flush=True)
    found["memory"] = memory()
    print(json.dumps(found["memory"], indent=1), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(DEVICE).split()[1].lower() if torch.cuda.is_available() else "cpu"
    (chosen.out / f"module_{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
