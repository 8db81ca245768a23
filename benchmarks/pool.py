"""Memory of a training loop over sequences of varying length, with and without the pool for messages.

``python benchmarks/pool.py [--out benchmarks/results] [--steps 40] [--tokens 131072]``   needs a GPU

Two ranks share one GPU and exchange over gloo. Each trains two blocks (attention over a pattern that brings
it most of the other's keys, which are not kept for backward, and an MLP) in bf16, on lengths drawn anew in
each step from half of ``--tokens`` to all of it. Arms, each in processes of its own: PyTorch's allocator
alone, with ``expandable_segments:True``, and both again with messages in a BufferPool. Writes
``pool_<machine>.json``: the most memory that a rank had reserved, and that its tensors took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparsetile as st
from sparsetile.distributed import Sharding, distributed_attention, exchange
from sparsetile.distributed.pool import BufferPool, PoolStatistics
from sparsetile.environment import provenance

HEADS, WIDTH, BLOCK = 16, 64, 128
PATTERN = st.Local(8192) | st.Strided(1024)
DEVICE = torch.device("cuda", 0)


@dataclass
class Given:
    tensor: Any

    def release(self) -> None:
        self.tensor = None


class Allocated:
    """What the exchange asks of a pool, from PyTorch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0

    def lease(self, shape: Sequence[int], dtype: torch.dtype) -> Given:
        self.count += 1
        return Given(torch.empty(*shape, dtype=dtype, device=self.device))

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(self.count, self.count)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = HEADS * WIDTH
        self.inputs, self.outputs = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.mlp = nn.Sequential(nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, wide))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        out = distributed_attention(q, k, v, PATTERN, is_causal=True, block_size=BLOCK, keep=False)
        x = x + self.outputs(out.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def on_one_rank(rank: int, store: str, steps: int, tokens: int, pooled: bool) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    pool: Any = BufferPool(DEVICE) if pooled else Allocated(DEVICE)
    exchange.pool_of = lambda _: pool
    torch.manual_seed(0)
    model = nn.ModuleList([Block() for _ in range(2)]).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")
    draw = random.Random(0)
    for _ in range(steps):
        where = Sharding.contiguous(draw.randrange(tokens // 2, tokens), 2, BLOCK)
        x = torch.randn(1, where.tokens_of(rank), HEADS * WIDTH, device=DEVICE, dtype=torch.bfloat16)
        for block in model:
            x = block(x)
        x.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        now = pool.statistics()
        found = {
            "reserved_bytes": torch.cuda.max_memory_reserved() if DEVICE.type == "cuda" else None,
            "allocated_bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None,
            "leases": now.leases,
            "allocations": now.allocations,
            "peak_bytes_of_messages": now.peak_bytes,
        }
        print(json.dumps(found))
    dist.destroy_process_group()


def arm(options: argparse.Namespace, pooled: bool, expandable: bool) -> dict[str, Any]:
    setting = f"expandable_segments:{expandable}"
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--steps", str(options.steps), "--tokens", str(options.tokens)]
        command += ["--store", f"{folder}/store", *(["--pooled"] * pooled), "--rank"]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return {"pool": pooled, "expandable_segments": expandable, **found}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--tokens", type=int, default=131_072)
    options.add_argument("--pooled", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options.add_argument("--store", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rank is not None:
        on_one_rank(chosen.rank, chosen.store, chosen.steps, chosen.tokens, chosen.pooled)
        return
    rows = []
    for expandable, pooled in product((False, True), (False, True)):
        rows.append(arm(chosen, pooled, expandable))
        print(json.dumps(rows[-1]), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name().split()[1].lower()
    result = {"provenance": provenance(), "steps": chosen.steps, "tokens": chosen.tokens, "arms": rows}
    (chosen.out / f"pool_{machine}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
