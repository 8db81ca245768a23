"""Times the CPU backend against dense attention.

``python benchmarks/cpu_kernels.py [--threads 2] [--rounds 5]``

B1 H8 N8192 D64 fp32, whole tiles of 128, at 1 and 6 tiles a row of 64. Dense and sparse calls alternate, so
that both meet the same machine; the fastest of each is reported, as wall time and as processor time (which
a busy machine disturbs less). Writes ``benchmarks/results/cpu_kernels.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsetile.environment import provenance
from sparsetile.kernels import cpu
from sparsetile.kernels.request import Request
from sparsetile.layout.blocks import BlockLayout

BATCH, HEADS, LENGTH, WIDTH, BLOCK = 1, 8, 8192, 64, 128
BLOCKS = LENGTH // BLOCK


def whole_tiles() -> dict[str, torch.Tensor]:
    """Block masks by name."""
    at = torch.arange(BLOCKS)
    scattered = torch.zeros(BLOCKS, BLOCKS, dtype=torch.bool)
    scattered.scatter_(1, torch.rand(BLOCKS, BLOCKS).argsort(1)[:, :6], True)
    with_global = at[:, None] == at
    with_global[0], with_global[:, 0] = True, True
    return {
        "own tile, 1/64": at[:, None] == at,
        "one other tile, 1/64": torch.eye(BLOCKS, dtype=torch.bool)[torch.randperm(BLOCKS)],
        "window of six, 6/64": ((at[:, None] - at) % BLOCKS) < 6,
        "six anywhere, 6/64": scattered,
        "own and global, 3/64": with_global,
    }


def clock(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of wall and of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def fastest(samples: list[tuple[float, float]]) -> dict[str, float]:
    return {"wall_ms": min(s[0] for s in samples), "processor_ms": min(s[1] for s in samples)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--rounds", type=int, default=5, help="times that every call is repeated")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    q, k, v, grad = (torch.randn(BATCH, HEADS, LENGTH, WIDTH) for _ in range(4))

    def dense() -> None:
        F.scaled_dot_product_attention(q, k, v)

    def dense_both() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)

    calls: dict[str, Callable[[], object]] = {"dense forward": dense, "dense forward+backward": dense_both}
    densities = {}
    for name, tiles in whole_tiles().items():
        request = Request(BlockLayout.from_block_mask(tiles, LENGTH, block_size=BLOCK), WIDTH**-0.5)
        densities[name] = tiles.double().mean().item()

        def forward(request: Request = request) -> tuple[torch.Tensor, torch.Tensor]:
            return cpu.forward(q, k, v, request)

        def both(request: Request = request) -> None:
            out, lse = cpu.forward(q, k, v, request)
            cpu.backward(grad, None, q, k, v, out, lse, request, tile_bias_grad=False, attn_bias_grad=False)

        calls[f"{name} forward"], calls[f"{name} forward+backward"] = forward, both
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    load_before = os.getloadavg()
    for turn in range(chosen.rounds):
        for name, call in calls.items():
            repeats = 1 if name.startswith("dense") else 4
            if turn == 0:
                call()
            samples[name] += [clock(call) for _ in range(repeats)]
    times = {name: fastest(found) for name, found in samples.items()}
    rows = []
    for name, density in densities.items():
        for phase in ("forward", "forward+backward"):
            ours, theirs = times[f"{name} {phase}"], times[f"dense {phase}"]
            row = {
                "pattern": name,
                "density": density,
                "phase": phase,
                **ours,
                "dense_wall_ms": theirs["wall_ms"],
                "speedup_wall": theirs["wall_ms"] / ours["wall_ms"],
                "speedup_processor": theirs["processor_ms"] / ours["processor_ms"],
            }
            rows.append(row)
            print(
                f"{name:24} {phase:17} {ours['wall_ms']:8.1f} ms  dense {theirs['wall_ms']:8.1f} ms  "
                f"{row['speedup_wall']:5.1f}x  processor time {row['speedup_processor']:5.1f}x  "
                f"ideal {1 / density:.1f}x"
            )
    result = {
        "shape": {"B": BATCH, "H": HEADS, "N": LENGTH, "D": WIDTH, "block": BLOCK, "dtype": "float32"},
        "threads": chosen.threads,
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "rows": rows,
        "provenance": provenance(),
    }
    path = Path(__file__).parent / "results" / "cpu_kernels.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
