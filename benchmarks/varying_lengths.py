"""Memory of training over sequences of varying length, by the settings of PyTorch's allocator.

``python benchmarks/varying_lengths.py [--out benchmarks/results] [--steps 40] [--tokens 131072]``

Needs a GPU. Two ranks share it and exchange over gloo. Each trains two blocks (attention over a pattern that
brings it most of the other's keys, which are not kept for backward, and an MLP) in bf16, on lengths drawn
anew in each step from half of ``--tokens`` to all of it. Each setting has processes of its own. Writes
``varying_lengths_<machine>.json``: the most memory that a rank had reserved, and that its tensors took.
``--device cpu`` shows that the script runs; nothing is measured then.
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
from sparsetile.distributed import Sharding, distributed_attention
from sparsetile.environment import provenance

HEADS, WIDTH, BLOCK = 16, 64, 128
PATTERN = st.Local(8192) | st.Strided(1024)
SETTINGS = ("", "roundup_power2_divisions:4", "garbage_collection_threshold:0.6", "expandable_segments:True")


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


def trained(rank: int, steps: int, tokens: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = nn.ModuleList([Block() for _ in range(2)]).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    draw = random.Random(0)
    for _ in range(steps):
        where = Sharding.contiguous(draw.randrange(tokens // 2, tokens), 2, BLOCK)
        x = torch.randn(1, where.tokens_of(rank), HEADS * WIDTH, device=device, dtype=dtype)
        for block in model:
            x = block(x)
        x.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cpu":
        return {}
    statistics = torch.cuda.memory_stats()
    return {
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "cuda_allocations": statistics["num_device_alloc"],
        "retries": statistics["num_alloc_retries"],
    }


def on_one_rank(chosen: argparse.Namespace) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{chosen.store}",
        rank=chosen.rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    found = trained(chosen.rank, chosen.steps, chosen.tokens, torch.device(chosen.device))
    if chosen.rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def arm(chosen: argparse.Namespace, setting: str) -> dict[str, Any]:
    # The second name is that of PyTorch up to 2.9.
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--store", f"{folder}/store", "--device", chosen.device]
        command += ["--steps", str(chosen.steps), "--tokens", str(chosen.tokens), "--rank"]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(2)
        ]
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        return {"setting": setting, "failed": codes}
    return {"setting": setting, **json.loads(outputs[0].splitlines()[-1])}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--tokens", type=int, default=131_072)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options.add_argument("--store", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rank is not None:
        on_one_rank(chosen)
        return
    arms: list[dict[str, Any]] = []
    result = {"provenance": provenance(), "steps": chosen.steps, "tokens": chosen.tokens, "arms": arms}
    for setting in SETTINGS:
        arms.append(arm(chosen, setting))
        print(json.dumps(arms[-1]), flush=True)
        if chosen.device == "cuda":
            chosen.out.mkdir(parents=True, exist_ok=True)
            machine = torch.cuda.get_device_name().split()[1].lower()
            (chosen.out / f"varying_lengths_{machine}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
