"""Memory of a training loop over sequences of varying length, with and without the pool for messages.

``python benchmarks/pool.py [--out benchmarks/results] [--steps 40] [--tokens 131072]``   needs a GPU

Two ranks share one GPU and exchange over gloo. Each trains two blocks (attention over a pattern that brings
it most of the other's keys, and an MLP) in bf16, on lengths drawn anew in each step from half of ``--tokens``
to all of it. Arms, each in processes of its own: PyTorch's allocator alone, with
``expandable_segments:True``, and both again with messages in :class:`BufferPool`. Writes ``pool_<machine>.json``: the most
memory that a rank had reserved, and that its tensors took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparsetile as st
from sparsetile.distributed import Sharding, distributed_attention, exchange
from sparsetile.distributed.pool import BufferPool, Lease
from sparsetile.environment import provenance

HEADS, WIDTH, BLOCK = 16, 64, 128
PATTERN = st.Local(8192) | st.Strided(1024)
DEVICE = torch.device("cuda", 0)


class Allocated(BufferPool):
    """The same interface, and nothing kept: what is given back goes to PyTorch's allocator."""

    def _take_back(self, buffer: Any) -> None:
        super()._take_back(buffer)
        self.trim()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.outputs = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(HEADS * WIDTH, 4 * HEADS * WIDTH),
            nn.GELU(),
            nn.Linear(4 * HEADS * WIDTH, HEADS * WIDTH),
        )

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        q, k, v = self.inputs(x).view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        out = distributed_attention(q, k, v, PATTERN, is_causal=True, block_size=BLOCK, keep=keep)
        x = x + self.outputs(out.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def on_one_rank(rank: int, store: str, steps: int, tokens: int, pooled: bool, keep: bool) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    pool = (BufferPool if pooled else Allocated)(DEVICE)
    exchange.pool_of = lambda _: pool  # type: ignore[assignment]
    torch.manual_seed(0)
    model = nn.ModuleList([Block() for _ in range(2)]).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    draw = random.Random(0)
    for _ in range(steps):
        where = Sharding.contiguous(draw.randrange(tokens // 2, tokens), 2, BLOCK)
        x = torch.randn(1, where.tokens_of(rank), HEADS * WIDTH, device=DEVICE, dtype=torch.bfloat16)
        for block in model:
            x = block(x, keep)
        x.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    now = pool.statistics()
    assert isinstance(pool.lease((1,)), Lease)
    if rank == 0:
        found = {
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "leases": now.leases,
            "allocations": now.allocations,
            "peak_bytes_of_messages": now.peak_bytes,
        }
        print(json.dumps(found))
    dist.destroy_process_group()


def arm(options: argparse.Namespace, pooled: bool, expandable: bool, keep: bool) -> dict[str, Any]:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    environment["PYTORCH_ALLOC_CONF"] = environment["PYTORCH_CUDA_ALLOC_CONF"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--steps", str(options.steps), "--tokens", str(options.tokens)]
        command += ["--store", f"{folder}/store", *(["--pooled"] * pooled), *(["--keep"] * keep), "--rank"]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return {"pool": pooled, "expandable_segments": expandable, "keep": keep, **found}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--tokens", type=int, default=131_072)
    for flag in ("--rank", "--store"):
        options.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--pooled", "--keep"):
        options.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rank is not None:
        on_one_rank(int(chosen.rank), chosen.store, chosen.steps, chosen.tokens, chosen.pooled, chosen.keep)
        return
    rows = []
    for keep in (False, True):
        for expandable in (False, True):
            for pooled in (False, True):
                rows.append(arm(chosen, pooled, expandable, keep))
                print(json.dumps(rows[-1]), flush=True)
    machine = torch.cuda.get_device_name().split()[1].lower()
    chosen.out.mkdir(parents=True, exist_ok=True)
    result = {"provenance": provenance(), "steps": chosen.steps, "tokens": chosen.tokens, "arms": rows}
    (chosen.out / f"pool_{machine}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
