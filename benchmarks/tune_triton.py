"""Sweeps tile choices of the Triton kernels on a GPU, beside compiled FlexAttention in the same run.

    PYTHONPATH=src python benchmarks/tune_triton.py [--out FOLDER] [--minutes 8] [--only SUBSTRING]

Cases: whole 128×128 tiles; 8K B4 H16, 32K B1 H16, 128K B1 H8; head_dim 64 and 128; local, random and
global+local patterns; bf16. Every candidate of every kernel is compiled first, in parallel processes filling
Triton's cache. Prints each case as it is done, then each kernel's choices by geometric mean; writes JSON.
Times are medians of ``triton.testing.do_bench`` in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
CANDIDATES: dict[tuple[str, int], list[tuple[Any, ...]]] = {
    ("forward", 64): [
        (128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 3),
    ],
    ("forward", 128): [
        (64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2),
    ],
    ("backward", 64): [
        ((64, 64), (64, 64), 4, 3), ((64, 64), (32, 64), 4, 3), ((64, 64), (64, 64), 4, 2),
        ((128, 64), (64, 128), 8, 3), ((128, 64), (64, 128), 8, 2),
    ],
    ("backward", 128): [
        ((128, 64), (32, 128), 8, 3), ((64, 64), (32, 64), 4, 2), ((64, 32), (32, 64), 4, 3),
        ((64, 32), (32, 64), 4, 2), ((128, 64), (64, 128), 8, 2), ((128, 64), (64, 128), 8, 3),
        ((128, 32), (32, 128), 8, 3),
    ],
}  # fmt: skip
"""By kernel and head_dim: (queries, keys, warps, stages) of forward; of backward (queries, keys) of its rows,
the same of its columns, warps, stages. The first is the table's for whole tiles."""

CHUNKS = (16, 32, 64, 128)
"""Longest items tried for patterns with long rows."""

SIZES = {"8K": (4, 16, 8192), "32K": (1, 16, 32768), "128K": (1, 8, 131072)}
PATTERNS = {
    "8K": {"local": (0, 1), "random": 6, "global+local": (1, 1)},
    "32K": {"local": (0, 5), "random": 26, "global+local": (3, 7)},
    "128K": {"local": (0, 10), "global+local": (5, 10)},
}


def tiles_of(pattern: Any, blocks: int) -> Tensor:
    """Boolean ``[blocks, blocks]``: (global rows and columns, window) or a count of random tiles a row."""
    if isinstance(pattern, int):
        rng = torch.Generator().manual_seed(0)
        order = torch.rand(blocks, blocks, generator=rng).argsort(1)
        return torch.zeros(blocks, blocks, dtype=torch.bool).scatter(1, order[:, :pattern], True)
    whole, window = pattern
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)
    near = (column >= row - window // 2) & (column < row - window // 2 + window)
    return near | (row < whole) | (column < whole)


def problem(batch: int, heads: int, length: int, dim: int, tiles: Tensor) -> dict[str, Any]:
    from sparsetile.kernels.request import Request
    from sparsetile.layout.blocks import BlockLayout

    torch.manual_seed(0)
    shape = (batch, heads, length, dim)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    layout = BlockLayout.from_block_mask(tiles, length, block_size=BLOCK).to("cuda")
    return {"q": q, "k": k, "v": v, "grad": grad, "request": Request(layout, dim**-0.5)}


def tiles_as(kernel: str, choice: tuple[Any, ...]) -> Any:
    from sparsetile.kernels.triton_config import Pair, Tiles

    return Tiles(*choice) if kernel == "forward" else Pair(*choice)


def name_of(choice: tuple[Any, ...]) -> str:
    return "x".join(str(part).replace(" ", "") for part in choice)


def launches(kernel: str, p: dict[str, Any]) -> list[Any]:
    """The launches of one kernel, with outputs and statistics of the right shapes."""
    from sparsetile.kernels import triton_launch as plan
    from sparsetile.kernels.triton_config import target_of

    q, k, v, grad, request = (p[name] for name in ("q", "k", "v", "grad", "request"))
    target = target_of(q.device)
    out, statistic = torch.empty_like(q), torch.zeros(q.shape[:3], device=q.device)
    if kernel == "forward":
        return plan.forward_launches(q, k, v, out, statistic, request, target)
    if kernel == "backward":
        saved = (torch.zeros_like(q), statistic, grad, None)
        grads = (out, torch.empty_like(k), torch.empty_like(v))
        return plan.backward_launches(q, k, v, *saved, *grads, None, None, request, target)
    raise ValueError(f"no kernel {kernel!r}")


def milliseconds(work: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(work, warmup=10, rep=60, return_mode="median"))


def run_all(steps: list[Any]) -> None:
    for step in steps:
        step.run()


def warm(task: tuple[str, int, tuple[Any, ...]]) -> str:
    """Compile one candidate, with and without split rows, into Triton's cache."""
    from sparsetile.kernels.triton_config import override

    kernel, dim, choice = task
    try:
        small = problem(1, 2, 1024, dim, torch.ones(8, 8, dtype=torch.bool))
        for chunk in (8, 4):
            with override(**{kernel: tiles_as(kernel, choice)}, chunk=chunk):
                run_all(launches(kernel, small))
        torch.cuda.synchronize()
    except Exception as problem_met:
        return f"{task}: {type(problem_met).__name__}: {str(problem_met)[:120]}"
    return ""


def flex_block_mask(tiles: Tensor, length: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    tiles = tiles.cuda()
    counts = tiles.sum(1, dtype=torch.int32)[None, None]
    indices = tiles.byte().argsort(dim=1, descending=True, stable=True).int()[None, None]
    nothing = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(
        nothing, indices, counts, indices, BLOCK_SIZE=BLOCK, seq_lengths=(length, length)
    )


def flex_times(p: dict[str, Any], tiles: Tensor, flex: Any) -> tuple[float, float]:
    mask = flex_block_mask(tiles, p["q"].shape[2])
    q, k, v = (p[name].detach().requires_grad_() for name in "qkv")
    out = flex(q, k, v, block_mask=mask)
    with torch.no_grad():
        forward = milliseconds(lambda: flex(q, k, v, block_mask=mask))
    backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), p["grad"], retain_graph=True))
    return forward, backward


def backend_times(p: dict[str, Any]) -> tuple[float, float]:
    from sparsetile.kernels import triton_backend

    q, k, v, grad, request = (p[name] for name in ("q", "k", "v", "grad", "request"))
    out, lse = triton_backend.forward(q, k, v, request)
    forward = milliseconds(lambda: triton_backend.forward(q, k, v, request))
    asked = {"tile_bias_grad": False, "attn_bias_grad": False}
    backward = milliseconds(lambda: triton_backend.backward(grad, None, q, k, v, out, lse, request, **asked))
    return forward, backward


def sweep(p: dict[str, Any], kernel: str, dim: int, splits: bool, failed: set[str]) -> dict[str, float]:
    from sparsetile.kernels.triton_config import override

    times: dict[str, float] = {}
    for choice in CANDIDATES[kernel, dim]:
        name = name_of(choice)
        if f"{kernel} {dim} {name}" in failed:
            continue
        with override(**{kernel: tiles_as(kernel, choice)}):
            times[name] = milliseconds(partial(run_all, launches(kernel, p)))
    if splits:
        for chunk in CHUNKS:
            with override(chunk=chunk):
                times[f"table, chunk {chunk}"] = milliseconds(partial(run_all, launches(kernel, p)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=14)
    options = parser.parse_args()
    started = time.perf_counter()
    path = Path(options.out) / "tune_triton.json"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cases": {},
    }

    tasks = [(kernel, dim, choice) for (kernel, dim), choices in CANDIDATES.items() for choice in choices]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        answers = zip(tasks, pool.map(warm, tasks, chunksize=1), strict=True)
        failures = [(task, why) for task, why in answers if why]
    failed = {f"{kernel} {dim} {name_of(choice)}" for (kernel, dim, choice), _ in failures}
    for _, why in failures:
        print("cannot run", why)
    print(f"compiled {len(tasks)} candidates in {time.perf_counter() - started:.0f} s", flush=True)

    from torch._dynamo import config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    for name in ("cache_size_limit", "recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, 1000)
    flex = torch.compile(flex_attention, dynamic=False)

    order = [(size, dim) for size in ("32K", "8K", "128K") for dim in (128, 64)]
    for size, dim in order:
        batch, heads, length = SIZES[size]
        for pattern, shape in PATTERNS[size].items():
            case = f"{size} D{dim} {pattern}"
            if options.only not in case or time.perf_counter() - started > 60 * options.minutes:
                continue
            tiles = tiles_of(shape, length // BLOCK)
            p = problem(batch, heads, length, dim, tiles)
            ours = backend_times(p)
            theirs = flex_times(p, tiles, flex)
            row: dict[str, Any] = {"density": tiles.float().mean().item(), "ours": ours, "flex": theirs}
            pairs = (
                f"forward {ours[0]:.3f} (flex {theirs[0]:.3f}), backward {ours[1]:.3f} (flex {theirs[1]:.3f})"
            )
            print(f"{case}: {pairs}")
            for kernel in ("forward", "backward"):
                times = row[kernel] = sweep(p, kernel, dim, pattern == "global+local", failed)
                cells = "  ".join(f"{name} {ms:.3f}" for name, ms in times.items())
                print(f"  {kernel:8} {cells}", flush=True)
            result["cases"][case] = row
            path.write_text(json.dumps(result, indent=1))

    for (kernel, dim), choices in CANDIDATES.items():
        means = []
        for choice in choices:
            name = name_of(choice)
            found = [row[kernel].get(name) for case, row in result["cases"].items() if f"D{dim} " in case]
            if found and all(found):
                means.append((math.exp(sum(map(math.log, found)) / len(found)), name))
        print(f"best {kernel} D{dim}:", "  ".join(f"{name} {mean:.3f}" for mean, name in sorted(means)))
    print(f"{time.perf_counter() - started:.0f} s, wrote {path}")


if __name__ == "__main__":
    main()
