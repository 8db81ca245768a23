"""One rank of the gradient tests: ``gradient_worker.py RANK WORLD FOLDER SEED``.

Runs every scenario below in one process group and saves what each returns as ``FOLDER/rankRANK.pt``.
"""

import copy
import dataclasses
import io
import math
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.hooks import compress_gradients
from sparsetile.errors import ArgumentError, MismatchError

TENTH = {"gradient_compression_ratio": 0.1, "bucket_cap_mb": 0.03, "bucket_max_tensors": 3}


class Numbers(nn.Module):
    """Parameters whose gradients are whatever the caller wants: the loss is their product with it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        shapes = {"a": (70, 50), "b": (3,), "c": (41, 90), "d": (129,), "e": (2000,), "f": ()}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, wanted):
        return sum((getattr(self, name) * value).sum() for name, value in wanted.items())


def wanted(seed, rank, step, names="abcdef", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed * 1000 + step * 10 + rank)
    drawn = {
        name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in Numbers().named_parameters()
    }
    return {name: drawn[name] for name in names}


class Count:
    """Bytes that this rank hands to the collectives for other ranks."""

    def __enter__(self):
        self.sent = 0
        self.plain = dist.all_to_all_single, dist.all_gather, dist.all_reduce
        rank, world = dist.get_rank(), dist.get_world_size()

        def all_to_all_single(output, input, output_splits=None, input_splits=None, **rest):
            own = input_splits[rank] / sum(input_splits)
            self.sent += round(input.nbytes * (1 - own))
            return self.plain[0](output, input, output_splits, input_splits, **rest)

        def all_gather(outputs, tensor, **rest):
            self.sent += (world - 1) * tensor.nbytes
            return self.plain[1](outputs, tensor, **rest)

        def all_reduce(*args, **rest):
            raise AssertionError("the exchange does not reduce through the backend")

        dist.all_to_all_single, dist.all_gather, dist.all_reduce = all_to_all_single, all_gather, all_reduce
        return self

    def __exit__(self, *error):
        dist.all_to_all_single, dist.all_gather, dist.all_reduce = self.plain


def wrapped(model, settings, **options):
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01, **options)
    return ddp, compress_gradients(ddp, DistributedSparseConfig(**settings))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def residuals(exchange):
    return exchange.state_dict()["residuals"]


def nothing_lost(rank, seed, dtype):
    """Steps of known gradients: what was applied, what stays, what was there, and the bytes of each step."""
    model = Numbers(dtype)
    ddp, exchange = wrapped(model, TENTH)
    own, applied, sent, stays = [], [], [], []
    for step in range(6):
        model.zero_grad()
        own.append(wanted(seed, rank, step, dtype=dtype))
        with Count() as count:
            ddp(own[-1]).backward()
        sent.append(count.sent)
        applied.append(gradients(model))
        stays.append(residuals(exchange))
    return {
        "own": own,
        "applied": applied,
        "stays": stays,
        "sent": sent,
        "promised": exchange.sent_bytes,
        "ring": exchange.ring_bytes,
    }


def whole(rank, seed):
    """Everything sent: by ratio 1, as a warm-up step, and as a selection that keeps all."""
    out = {"own": wanted(seed, rank, 0)}
    for name, settings in (
        ("ratio", {"gradient_compression_ratio": 1.0, "gradient_hook": "topk"}),
        ("warmup", {**TENTH, "gradient_warmup_steps": 1}),
        ("all", TENTH),
    ):
        model = Numbers()
        ddp, exchange = wrapped(model, settings)
        if name == "all":
            exchange.buckets = [dataclasses.replace(b, kept=b.length) for b in exchange.buckets]
        with Count() as count:
            ddp(out["own"]).backward()
        out[name] = {"applied": gradients(model), "sent": count.sent, "ring": exchange.ring_bytes}
    return out


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 1))


def train(ddp, seed, rank, steps, optimizer):
    slope = torch.randn(20, generator=torch.Generator().manual_seed(seed)) / 4
    losses = []
    for step in steps:
        x = torch.randn(32, 20, generator=torch.Generator().manual_seed(seed * 999 + step * 10 + rank))
        loss = (ddp(x).squeeze(1) - (x @ slope).abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resumed(rank, seed):
    """Seven steps at once, twice; and three, saved, loaded into fresh objects, and four more."""
    settings = {**TENTH, "gradient_warmup_steps": 2}

    def start():
        model = network(seed)
        ddp, exchange = wrapped(model, settings)
        return model, ddp, exchange, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    out = {}
    for name in ("once", "again"):
        model, ddp, exchange, optimizer = start()
        train(ddp, seed, rank, range(7), optimizer)
        out[name] = copy.deepcopy(model.state_dict()), residuals(exchange), exchange.step
    model, ddp, exchange, optimizer = start()
    train(ddp, seed, rank, range(3), optimizer)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), exchange.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, ddp, exchange, optimizer = start()
    for thing, state in zip((model, optimizer, exchange), states, strict=True):
        thing.load_state_dict(state)
    train(ddp, seed, rank, range(3, 7), optimizer)
    out["resumed"] = model.state_dict(), residuals(exchange), exchange.step
    return out


def learned(rank, seed):
    """Last losses of a small network, dense and compressed."""
    out = {}
    for name, settings in (("dense", {}), ("topk", TENTH)):
        model = network(seed)
        ddp, _ = wrapped(model, settings)
        losses = train(ddp, seed, rank, range(120), torch.optim.Adam(model.parameters(), lr=3e-3))
        out[name] = sum(losses[-20:]) / 20, losses[0]
    return out


def accumulated(rank, seed):
    """Two backward passes, the first without synchronisation, against one of their sum."""
    own = [wanted(seed, rank, step) for step in range(2)]
    out = []
    for passes in (own, [{name: own[0][name] + own[1][name] for name in own[0]}]):
        model = Numbers()
        ddp, exchange = wrapped(model, TENTH)
        for index, values in enumerate(passes):
            with nullcontext() if index == len(passes) - 1 else ddp.no_sync():
                ddp(values).backward()
        out.append((gradients(model), residuals(exchange)))
    return out


def unused(rank, seed):
    """Parameter c is used by all, then by rank 0 alone, then by nobody, then by all."""
    model = Numbers()
    ddp, exchange = wrapped(model, TENTH, find_unused_parameters=True)
    out = {"own": [], "applied": [], "stays": []}
    for step, users in enumerate(("all", "first", "none", "all")):
        without = users == "none" or (users == "first" and rank)
        model.zero_grad()
        out["own"].append(wanted(seed, rank, step, "abdef" if without else "abcdef"))
        ddp(out["own"][-1]).backward()
        out["applied"].append(gradients(model))
        out["stays"].append(residuals(exchange))
    return out


def static(rank, seed):
    """The same steps with and without a static graph and gradients that are views of buckets."""
    out = []
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        model = Numbers()
        ddp, exchange = wrapped(model, TENTH, **options)
        for step in range(3):
            model.zero_grad()
            ddp(wanted(seed, rank, step)).backward()
        out.append((gradients(model), residuals(exchange)))
    return out


def broken(rank, seed):
    """One NaN (then one Inf) on the last rank in the second of four steps."""
    out = {}
    for value in (math.nan, math.inf):
        model = Numbers()
        ddp, exchange = wrapped(model, TENTH)
        steps = []
        for step in range(4):
            model.zero_grad()
            own = wanted(seed, rank, step)
            if step == 1 and rank == dist.get_world_size() - 1:
                own["c"][3, 4] = value
            ddp(own).backward()
            steps.append((own, gradients(model), residuals(exchange)))
        out[str(value)] = steps
    return out


def disagreement(rank, seed):
    """Rank 1 asks for another ratio; then for a dtype that cannot be served."""
    out = []
    for settings, dtype in (
        ({"gradient_compression_ratio": 0.1 + 0.1 * rank}, torch.float32),
        (TENTH, torch.float64),
    ):
        try:
            wrapped(Numbers(dtype), settings)
        except MismatchError as error:
            out.append(str(error))
    return out


def others(rank, seed):
    """PyTorch's own hooks by the same option."""
    out = {"own": wanted(seed, rank, 0)}
    model = Numbers()
    ddp, _ = wrapped(model, {"gradient_hook": "bf16"})
    ddp(out["own"]).backward()
    out["bf16"] = gradients(model)
    try:
        wrapped(Numbers(), {"gradient_hook": "powersgd", "gradient_warmup_steps": 2})
    except ArgumentError as error:
        out["powersgd"] = str(error)
    return out


def main():
    rank, world, folder, seed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    out = {f"nothing_lost {dtype}": nothing_lost(rank, seed, getattr(torch, dtype)) for dtype in sys.argv[5:]}
    for scenario in (whole, resumed, learned, accumulated, unused, static, broken, disagreement, others):
        out[scenario.__name__] = scenario(rank, seed)
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
