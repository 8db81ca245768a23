"""Times the exchange of gradients over a slow link, and compares what a model learns with and without it.

``python benchmarks/gradients.py [--rate 1gbit] [--ranks 4] [--device cuda]``   needs root, ``ip`` and ``tc``

Every rank lives in a network namespace of its own, behind a link shaped to ``--rate`` in both directions; the
links meet in a bridge. Backward hands over random gradients at once, so a step is the exchange and little
else; the same step without synchronisation is timed beside it and taken off. Arms alternate, and the fastest
of each counts. All ranks share this machine's cores, which selection needs and a dense exchange does not:
processor time is given beside wall time. With ``--device cuda`` gradients are on a GPU, all ranks' on the
same one, and gloo carries them.

``python benchmarks/gradients.py --learn 500`` trains the demo's language model, made small, on two processes
over the loopback device, dense and compressed, from the same weights and batches, with ``--seeds`` seeds.

Both write their part of ``benchmarks/results/gradients_<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsetile.distributed import DistributedSparseConfig
from sparsetile.distributed.buckets import cut, ring_bytes
from sparsetile.distributed.hooks import compress_gradients
from sparsetile.environment import provenance
from sparsetile.train.data import Sequences, load_corpus
from sparsetile.train.model import Model, ModelConfig

ADDRESS = "10.77.0."

ARMS: dict[str, dict[str, Any]] = {
    "DDP fp32": {},
    "DDP bf16 hook": {"gradient_hook": "bf16"},
    "topk 0.1": {"gradient_compression_ratio": 0.1},
    "topk 0.05": {"gradient_compression_ratio": 0.05},
    "topk 0.02": {"gradient_compression_ratio": 0.02},
    "topk 0.01": {"gradient_compression_ratio": 0.01},
}

LEARNERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk 0.1, 20 steps of warm-up": {"gradient_compression_ratio": 0.1, "gradient_warmup_steps": 20},
    "topk 0.1, 150 steps of warm-up": {"gradient_compression_ratio": 0.1, "gradient_warmup_steps": 150},
    "topk 0.1, 250 steps of warm-up": {"gradient_compression_ratio": 0.1, "gradient_warmup_steps": 250},
}


class Given(torch.autograd.Function):
    """A loss whose gradient is given: backward costs nothing of its own."""

    @staticmethod
    def forward(context: Any, parameter: Tensor, gradient: Tensor) -> Tensor:
        context.gradient = gradient
        return parameter.new_zeros(())

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Tensor, None]:
        return context.gradient, None


class Matrices(nn.Module):
    """``count`` square matrices."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.all = nn.ParameterList([torch.zeros(width, width) for _ in range(count)])

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        parts = [Given.apply(p, g) for p, g in zip(self.all, gradients, strict=True)]
        return torch.stack(parts).sum()


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def exchange_on_one_rank(rank: int, ranks: int, count: int, width: int, rounds: int, device: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{ADDRESS}1:29517",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    torch.manual_seed(rank)
    given = [[torch.randn(width, width, device=device) for _ in range(count)] for _ in range(2)]
    arms = {}
    for name, settings in ARMS.items():
        model = DistributedDataParallel(Matrices(count, width).to(device), gradient_as_bucket_view=True)
        compress_gradients(model, DistributedSparseConfig(**settings))
        arms[name] = model
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in [*arms, "alone"]}
    for step in range(4 + rounds):  # the first four: DDP's new buckets, residuals that fill
        for name in samples:
            model = arms.get(name, arms["DDP fp32"])
            wait_for(device)
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            if name == "alone":
                with model.no_sync():
                    model(given[step % 2]).backward()
            else:
                model(given[step % 2]).backward()
            wait_for(device)
            samples[name].append((time.perf_counter() - wall, time.process_time() - processor))
    if rank == 0:
        rows = {}
        alone = min(wall for wall, _ in samples["alone"][4:])
        for name in arms:
            walls = [wall - alone for wall, _ in samples[name][4:]]
            processors = [processor for _, processor in samples[name][4:]]
            rows[name] = {
                "exchange_ms": min(walls) * 1e3,
                "exchange_ms_median": median(walls) * 1e3,
                "processor_ms_of_rank_0": min(processors) * 1e3,
            }
        print(json.dumps({"backward_ms": alone * 1e3, "arms": rows}))
    dist.destroy_process_group()


def over_links(options: argparse.Namespace) -> dict[str, Any]:
    def call(command: str) -> None:
        subprocess.run(command.split(), check=True)

    names = [f"gradients{rank}" for rank in range(options.ranks)]
    command = [sys.executable, __file__, "--ranks", str(options.ranks), "--rounds", str(options.rounds)]
    command += [
        "--matrices",
        str(options.matrices),
        "--width",
        str(options.width),
        "--device",
        options.device,
    ]
    processes = []
    shape = f"tbf rate {options.rate} burst 256kb latency 50ms"
    try:
        call("ip link add stbridge type bridge")
        call("ip link set stbridge up")
        for rank, name in enumerate(names):
            call(f"ip netns add {name}")
            call(f"ip link add stlink{rank} type veth peer name eth0 netns {name}")
            call(f"ip link set stlink{rank} master stbridge up")
            call(f"ip -n {name} addr add {ADDRESS}{rank + 1}/24 dev eth0")
            call(f"ip -n {name} link set eth0 up")
            call(f"ip -n {name} link set lo up")
            call(f"ip netns exec {name} tc qdisc add dev eth0 root {shape}")
            call(f"tc qdisc add dev stlink{rank} root {shape}")
        for rank, name in enumerate(names):
            inside = ["ip", "netns", "exec", name, *command, "--rank", str(rank)]
            processes.append(subprocess.Popen(inside, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", "stbridge"], check=False)
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    entries = options.matrices * options.width**2
    ring = ring_bytes(entries, options.ranks)
    parameters = [(str(i), torch.empty(options.width**2, device="meta")) for i in range(options.matrices)]
    base = found["arms"]["DDP bf16 hook"]["exchange_ms"]
    for name, row in found["arms"].items():
        ratio = ARMS[name].get("gradient_compression_ratio")
        if ratio:
            buckets = cut(parameters, options.ranks, ratio, 25 * 2**20, 32)
            row["bytes_sent_by_a_rank"] = sum(bucket.sent_bytes for bucket in buckets)
            row["share_of_bf16_ring"] = row["bytes_sent_by_a_rank"] / ring
        row["times_as_fast_as_bf16_hook"] = base / row["exchange_ms"]
    found.update(
        rate=options.rate, ranks=options.ranks, entries=entries, cores=os.cpu_count(), bf16_ring_bytes=ring
    )
    return found


class NextByte(nn.Module):
    """The demo's model with dense causal attention and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(ModelConfig(layers=2, width=64, heads=4, kv_heads=2))

    def forward(self, tokens: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        logits = self.model(tokens[:, :-1], attend)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def learn_on_one_rank(rank: int, ranks: int, store: str, steps: int, seeds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    corpus = load_corpus(None)
    rows: dict[str, dict[str, list[float]]] = {
        name: {"training_loss": [], "held_out_loss": []} for name in LEARNERS
    }
    for seed, (name, settings) in product(range(seeds), LEARNERS.items()):
        data = Sequences(corpus, 256, seed, None)
        torch.manual_seed(seed)
        ddp = DistributedDataParallel(NextByte())
        compress_gradients(ddp, DistributedSparseConfig(**settings))
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=3e-3)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)
            loss = ddp(data.training(step * ranks + rank, 4).tokens.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held_out = torch.stack([ddp.module(data.held_out(i).tokens.long()) for i in range(64)]).mean()
        rows[name]["training_loss"].append(loss.item())
        rows[name]["held_out_loss"].append(held_out.item())
    if rank == 0:
        entries = sum(parameter.numel() for parameter in ddp.parameters())
        print(json.dumps({"steps": steps, "ranks": ranks, "entries": entries, "arms": rows}))
    dist.destroy_process_group()


def learn(steps: int, seeds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--learn", str(steps), "--seeds", str(seeds)]
        command += ["--store", f"{folder}/store", "--rank"]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)
        ]
        outputs = [process.communicate(timeout=7200)[0] for process in processes]
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    for row in found["arms"].values():
        dense = found["arms"]["dense"]["held_out_loss"]
        row["held_out_over_dense"] = [x / y for x, y in zip(row["held_out_loss"], dense, strict=True)]
        row["mean_over_dense"] = mean(row["held_out_over_dense"])
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rate", default="1gbit", help="of each rank's link, as tc writes it")
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--matrices", type=int, default=8)
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--rounds", type=int, default=5, help="timed steps of every arm")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the gradients")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options.add_argument("--learn", type=int, metavar="STEPS", help="train instead")
    options.add_argument("--seeds", type=int, default=3, help="of --learn")
    options.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options.add_argument("--store", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rank is not None and chosen.learn:
        learn_on_one_rank(chosen.rank, 2, chosen.store, chosen.learn, chosen.seeds)
        return
    if chosen.rank is not None:
        sizes = chosen.matrices, chosen.width
        exchange_on_one_rank(chosen.rank, chosen.ranks, *sizes, chosen.rounds, chosen.device)
        return
    machine = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name().split()[1].lower()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / f"gradients_{machine}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if chosen.learn:
        results["learning, 2 ranks"] = {**learn(chosen.learn, chosen.seeds), "provenance": provenance()}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["learning, 2 ranks"]["arms"], indent=1))
        return
    name = f"exchange, {chosen.ranks} ranks, {chosen.rate}"
    results[name] = {**over_links(chosen), "load": os.getloadavg()[0], "provenance": provenance()}
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[name]["arms"], indent=1))


if __name__ == "__main__":
    main()
