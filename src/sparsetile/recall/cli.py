"""``sparsetile recall``: arguments, sizes, progress and files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sparsetile.adaptive.config import DISTILLATIONS, AdaptiveConfig
from sparsetile.adaptive.scorer import FORMS
from sparsetile.adaptive.summaries import POOLINGS
from sparsetile.cli import above_zero, positive, token_count
from sparsetile.environment import provenance
from sparsetile.errors import ArgumentError, explain
from sparsetile.patterns.budget import check_density
from sparsetile.recall import report
from sparsetile.recall.arms import ARMS, check_arm
from sparsetile.recall.loop import Settings, run, start_of
from sparsetile.recall.model import ModelConfig
from sparsetile.recall.task import Task

# All arms with these seeds take two CPU cores under five minutes, and a GPU under ten.
_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "length": 2048,
        "block": 16,
        "keys": 256,
        "batch": 4,
        "steps": 128,
        "short_batch": 16,
        "held_out": 64,
        "seeds": 3,
    },
    "gpu": {
        "length": 8192,
        "block": 32,
        "keys": 1024,
        "batch": 8,
        "steps": 250,
        "short_batch": 32,
        "held_out": 128,
        "seeds": 5,
    },
}
_SHORT_LENGTH, _SHORT_STEPS, _SHORT_LR = 256, 150, 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sparsetile recall``."""
    arms = "\n".join(f"  {name:<13} {about}" for name, about in ARMS.items())
    parser.epilog = (
        f"arms:\n{arms}\n\n"
        "examples:\n"
        "  sparsetile recall\n"
        "  sparsetile recall --arms learned,moba --seeds 5 --out runs/two\n"
        "  sparsetile recall --arms learned --seeds 1 --form mlp --pooling max_min\n"
        "  sparsetile recall --size gpu --device cuda --seeds 3 --out a\n"
        "  sparsetile recall --size gpu --device cuda --seeds 2 --first-seed 3 --out b\n"
        "  sparsetile recall --merge a/recall.json b/recall.json --out all\n"
    )
    add = parser.add_argument
    add("--size", choices=tuple(_SIZES), help="default: that of the device")
    add("--arms", metavar="A,…", help="default: all")
    add("--seeds", type=positive, metavar="N", help="how many (default 3; gpu: 5)")
    add("--first-seed", type=_seed, default=0, metavar="S", help="seeds are S … S + N − 1 (default 0)")
    add("--minutes", type=above_zero, metavar="M", help="begin no other run after M minutes")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="default: bf16 on a GPU, else fp32")
    add("--out", type=Path, default=Path("runs/recall"), metavar="DIR", help="default runs/recall")
    add(
        "--merge", type=Path, nargs="+", metavar="FILE", help="train nothing; report these recall.json as one"
    )
    task = parser.add_argument_group("the task and the model")
    task.add_argument("--length", type=token_count, metavar="N", help="default 2048; gpu: 8192")
    task.add_argument("--block", type=positive, metavar="T", help="tile edge (default 16; gpu: 32)")
    task.add_argument("--density", type=float, default=0.06, metavar="D", help="of the tiles (default 0.06)")
    task.add_argument("--pairs", type=positive, metavar="P", help="of a sequence (default: length / 32)")
    task.add_argument("--keys", type=positive, metavar="K", help="key symbols (default 256; gpu: 1024)")
    task.add_argument("--values", type=positive, default=16, metavar="V", help="value symbols (default 16)")
    task.add_argument("--layers", type=positive, default=1, metavar="L", help="default 1")
    task.add_argument("--width", type=positive, default=64, metavar="W", help="default 64")
    task.add_argument("--heads", type=positive, default=1, metavar="H", help="default 1")
    training = parser.add_argument_group("training, the same for all arms")
    training.add_argument("--steps", type=positive, metavar="N", help="default 128; gpu: 250")
    training.add_argument("--batch", type=positive, metavar="B", help="sequences a step (default 4; gpu: 8)")
    training.add_argument("--lr", type=above_zero, default=0.001, metavar="R", help="highest (default 0.001)")
    training.add_argument(
        "--short-steps",
        type=positive,
        default=_SHORT_STEPS,
        metavar="N",
        help=f"dense steps before, over {_SHORT_LENGTH} tokens (default {_SHORT_STEPS})",
    )
    training.add_argument(
        "--held-out", type=positive, metavar="N", help="fresh sequences to measure on (default 64; gpu: 128)"
    )
    learned = parser.add_argument_group("the learned arm")
    learned.add_argument("--form", choices=FORMS, default="bilinear", help="of the scorer (default bilinear)")
    learned.add_argument(
        "--hidden", type=positive, default=64, metavar="H", help="of the scorer (default 64)"
    )
    learned.add_argument("--pooling", choices=POOLINGS, default="mean", help="of tiles (default mean)")
    learned.add_argument("--distillation", choices=DISTILLATIONS, default="kept", help="default kept")
    learned.add_argument("--distillation-weight", type=above_zero, default=1.0, metavar="W", help="default 1")
    learned.add_argument("--scorer-lr", type=above_zero, default=0.003, metavar="R", help="default 0.003")
    learned.add_argument(
        "--explored",
        type=_share,
        default=0.3,
        metavar="S",
        help="share of the steps that explore (default 0.3)",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return value


def main(args: argparse.Namespace) -> int:
    """Trains and measures what ``args`` ask for; 0 if every run has a result.

    Raises:
        SparsetileError: what is wrong with the arguments or the files, in one line.
    """
    console = Console(highlight=False)
    missing: list[str] = []
    if args.merge:
        result = report.merged(args.merge)
        args.out.mkdir(parents=True, exist_ok=True)
    else:
        settings, arms, seeds = resolve(args)
        args.out.mkdir(parents=True, exist_ok=True)
        result, missing = _train(console, settings, arms, seeds, args)
    console.print()
    if result["runs"]:
        console.print(report.table(result["runs"]))
        for text in report.claims(result["runs"]):
            console.print(text)
        no_picture = report.write(args.out, result)
        console.print(no_picture or f"Picture: {args.out / 'recall.png'}", soft_wrap=True)
        console.print(f"Results: {args.out / 'recall.json'}, {args.out / 'recall.md'}", soft_wrap=True)
    if missing:
        console.print(f"Not begun, for want of time: {', '.join(missing)}")
    return 1 if missing else 0


def resolve(args: argparse.Namespace) -> tuple[Settings, list[str], list[int]]:
    """Settings, arms and seeds; raises SparsetileError where they cannot be."""
    device = _device(args.device)
    sizes = _SIZES[args.size or ("cpu" if device == "cpu" else "gpu")]

    def size(name: str) -> int:
        given: int | None = getattr(args, name)
        return int(sizes[name]) if given is None else given

    arms = list(ARMS) if args.arms is None else [name.strip() for name in args.arms.split(",")]
    for arm in arms:
        check_arm(arm)
    length, block = size("length"), size("block")
    settings = Settings(
        task=Task(length, block, args.pairs or max(1, length // 32), size("keys"), args.values),
        model=ModelConfig(args.layers, args.width, args.heads),
        density=check_density("--density", args.density),
        batch=size("batch"),
        steps=size("steps"),
        lr=args.lr,
        short_length=min(length, max(_SHORT_LENGTH, 2 * block)),
        short_batch=sizes["short_batch"],
        short_steps=args.short_steps,
        short_lr=_SHORT_LR,
        adaptive=AdaptiveConfig(
            form=args.form, hidden_dim=args.hidden, pooling=args.pooling, distillation=args.distillation
        ),
        scorer_lr=args.scorer_lr,
        distillation_weight=args.distillation_weight,
        explored=args.explored,
        held_out=size("held_out"),
        device=device,
        dtype=("bf16" if device == "cuda" else "fp32") if args.dtype == "auto" else args.dtype,
    )
    first = args.first_seed
    return settings, list(dict.fromkeys(arms)), list(range(first, first + size("seeds")))


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            explain(
                "--device",
                expected="a device of this machine",
                got="cuda, and torch sees no GPU",
                fix="Leave --device out, or ask `sparsetile doctor`.",
            )
        )
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _train(
    console: Console, settings: Settings, arms: list[str], seeds: list[int], args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """All runs, those of a seed together; after each the numbers so far are on the disk."""
    result: dict[str, Any] = {
        "experiment": "recall",
        "settings": settings.identity(),
        "provenance": [provenance()],
        "runs": [],
    }
    missing: list[str] = []
    ends = time.monotonic() + 60.0 * args.minutes if args.minutes else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("all runs", total=len(arms) * len(seeds), now="")
        bar = progress.add_task("", total=settings.steps, now="")

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                progress.update(bar, completed=event["step"])
            else:
                progress.update(bar, now=f"step {event['step']}: {event['accuracy']:.3f} right")

        for seed in seeds:
            if ends is not None and time.monotonic() > ends:
                missing += [f"{arm} (seed {seed})" for arm in arms]
                continue
            progress.reset(bar, description=f"seed {seed}: the common start", now="")
            start = start_of(settings, seed)
            for arm in arms:
                if ends is not None and time.monotonic() > ends:
                    missing.append(f"{arm} (seed {seed})")
                    continue
                progress.reset(bar, description=f"seed {seed}: {arm}", now="")
                found = run(arm, seed, settings, start, show)
                result["runs"].append(found)
                report.write_json(args.out / "recall.json", result)
                progress.advance(whole)
                console.print(
                    f"seed {seed} · {arm}: {found['accuracy']:.3f} right, recall {found['recall']:.3f}, "
                    f"{found['tiles']:,} tiles ({found['density']:.2%}), {found['seconds']:.1f} s"
                )
    return result, missing
