"""``sparsetile mixed``: arguments, progress and files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sparsetile.adaptive.config import DISTILLATIONS
from sparsetile.cli import positive
from sparsetile.environment import provenance
from sparsetile.errors import ArgumentError, explain
from sparsetile.recall import mixed_report as report
from sparsetile.recall.mixed import DENSE, TOP_P, Arm, MixedSettings, run, start_of
from sparsetile.recall.mixed_task import MixedTask
from sparsetile.recall.model import ModelConfig
from sparsetile.recall.report import write_json

_FIXED = "2,4,6,8,9,10,12"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sparsetile mixed``."""
    parser.epilog = (
        "examples:\n"
        "  sparsetile mixed\n"
        "  sparsetile mixed --seeds 5 --fixed 8,9,10,11,12 --out runs/five\n"
        "  sparsetile mixed --votes 15 --tiles 128 --fixed 4,8,12,16,20 --p 0.96 --device cuda\n"
    )
    add = parser.add_argument
    add("--fixed", metavar="K,…", default=_FIXED, help=f"numbers of tiles to compare with (default {_FIXED})")
    add("--p", type=float, default=0.95, metavar="P", help="share of the mass top_p keeps (default 0.95)")
    add("--seeds", type=positive, default=3, metavar="N", help="how many (default 3)")
    add("--first-seed", type=int, default=0, metavar="S", help="seeds are S … S + N − 1 (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add("--out", type=Path, default=Path("runs/mixed"), metavar="DIR", help="default runs/mixed")
    task = parser.add_argument_group("the stream and the model")
    task.add_argument("--tiles", type=positive, default=64, metavar="T", help="of the memory (default 64)")
    task.add_argument("--block", type=positive, default=16, metavar="N", help="tile edge (default 16)")
    task.add_argument("--questions", type=positive, default=7, metavar="Q", help="a sequence (default 7)")
    task.add_argument("--votes", type=positive, default=9, metavar="M", help="a hard question (default 9)")
    task.add_argument("--keys", type=positive, default=16, metavar="K", help="key symbols (default 16)")
    task.add_argument("--values", type=positive, default=16, metavar="V", help="value symbols (default 16)")
    task.add_argument("--width", type=positive, default=64, metavar="W", help="default 64")
    training = parser.add_argument_group("training, the same for all arms")
    training.add_argument("--steps", type=positive, default=100, metavar="N", help="default 100")
    training.add_argument(
        "--batch", type=positive, default=8, metavar="B", help="sequences a step (default 8)"
    )
    training.add_argument("--start-steps", type=positive, default=80, metavar="N", help="dense (default 80)")
    training.add_argument("--distillation", choices=DISTILLATIONS, default="kept", help="default kept")
    training.add_argument(
        "--sparsity-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of sparsity_loss(), top_p (default 0)",
    )
    training.add_argument(
        "--mean-tiles",
        type=positive,
        default=6,
        metavar="N",
        help="tiles a row that it steers to (default 6)",
    )
    training.add_argument("--held-out", type=positive, default=256, metavar="N", help="default 256")


def main(args: argparse.Namespace) -> int:
    """Trains and measures what ``args`` ask for.

    Raises:
        SparsetileError: what is wrong with the arguments, in one line.
    """
    # In a pipe the table shall not be cut to 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    settings, arms, seeds = resolve(args)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "experiment": "mixed",
        "settings": settings.identity(),
        "provenance": [provenance()],
        "runs": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("all runs", total=len(arms) * len(seeds))
        bar = progress.add_task("", total=settings.steps)
        for seed in seeds:
            progress.reset(bar, description=f"seed {seed}: the common start")
            start = start_of(settings, seed)
            for arm in arms:
                progress.reset(bar, description=f"seed {seed}: {_named(arm)}")
                found = run(arm, seed, settings, start, lambda e: progress.update(bar, completed=e["step"]))
                result["runs"].append(found)
                write_json(args.out / "mixed.json", result)
                progress.advance(whole)
                right, tiles, seconds = found["accuracy"], found["tiles"], found["seconds"]
                console.print(
                    f"seed {seed} · {_named(arm)}: easy {right['easy']:.3f} right with {tiles['easy']:.2f} "
                    f"tiles a row, hard {right['hard']:.3f} with {tiles['hard']:.2f}; {seconds:.1f} s"
                )
    console.print()
    console.print(report.table(result["runs"]))
    for text in report.claims(result["runs"]):
        console.print(text)
    no_picture = report.write(args.out, result)
    console.print(no_picture or f"Picture: {args.out / 'mixed.png'}", soft_wrap=True)
    console.print(f"Results: {args.out / 'mixed.json'}, {args.out / 'mixed.md'}", soft_wrap=True)
    return 0


def resolve(args: argparse.Namespace) -> tuple[MixedSettings, list[Arm], list[int]]:
    """Settings, arms and seeds; raises SparsetileError where they cannot be."""
    if args.device == "cuda" and not torch.cuda.is_available():
        _refuse("--device", "a device of this machine", "cuda, and torch sees no GPU", "Leave --device out.")
    if not 0 <= args.first_seed < 1 << 31:
        _refuse("--first-seed", "a whole number from 0 on", args.first_seed, "Leave it out.")
    settings = MixedSettings(
        task=MixedTask(args.tiles, args.block, args.questions, args.votes, args.keys, args.values),
        model=ModelConfig(1, args.width, 1),
        p=args.p,
        batch=args.batch,
        steps=args.steps,
        lr=0.001,
        scorer_lr=0.01,
        distillation=args.distillation,
        distillation_weight=1.0,
        sparsity_weight=args.sparsity_weight,
        mean_tiles=args.mean_tiles,
        explored=0.8,
        start_batch=16,
        start_steps=args.start_steps,
        start_lr=0.01,
        held_out=args.held_out,
        device="cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu",
    )
    try:
        fixed = sorted({int(text) for text in args.fixed.split(",")})
    except ValueError:
        _refuse("--fixed", "numbers of tiles like 4,8,12", args.fixed, "See sparsetile mixed --help.")
    arms: list[Arm] = [TOP_P, *fixed, DENSE]
    for arm in arms:
        settings.config_of(arm)
    return settings, arms, list(range(args.first_seed, args.first_seed + args.seeds))


def _named(arm: Arm) -> str:
    return f"{arm} tiles" if isinstance(arm, int) else arm


def _refuse(what: str, expected: str, got: object, fix: str) -> NoReturn:
    raise ArgumentError(explain(what, expected=expected, got=got, fix=fix))
