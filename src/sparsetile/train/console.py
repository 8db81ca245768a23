"""What a run says: its data and model, its steps as they happen, and what it leaves."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sparsetile.environment import provenance
from sparsetile.train import report
from sparsetile.train.arms import Arm
from sparsetile.train.data import Corpus
from sparsetile.train.loop import Emit, Settings
from sparsetile.train.parallel import Parallel
from sparsetile.train.process import ArmFailed


def introduce(console: Console, settings: Settings, corpus: Corpus) -> None:
    model = settings.model
    console.print(f"Data: {corpus.description}")
    console.print(
        f"Model: {model.layers} layers, width {model.width}, {model.heads} heads, {model.kv_heads} of keys; "
        f"{settings.batch} × {settings.context:,} bytes a step, {settings.dtype} on {settings.device}"
    )
    if settings.planting is None:
        console.print("Far repeats: none planted")
        return
    planting = settings.planting
    console.print(
        f"Far repeats: {planting.fraction:.0%} of the bytes are random spans of {planting.span} bytes and "
        f"their copies, more than {planting.far:,} bytes later"
    )


def shown(console: Console, arm: Arm, train: Callable[[Emit], dict[str, Any]]) -> dict[str, Any]:
    """What ``train`` returns; its events are drawn."""
    console.print(f"\n[bold]{arm.name}[/bold]: {arm.attention}", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(arm.name, total=1.0, now="starting")

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                now = (
                    f"step {event['step']} · loss {event['bits'] * math.log(2):.3f} · "
                    f"{event['bits']:.3f} bits/byte · "
                    f"{event['tokens_per_second']:,.0f} tokens/s · {report.megabytes(event['memory'])}"
                )
                progress.update(bar, completed=event["progress"], now=now)
            elif event["event"] == "check":
                copy = f", far repeats {event['copy']:.3f}" if "copy" in event else ""
                line = f"  step {event['step']:>6,}: held out {event['text']:.3f} bits/byte{copy}"
                progress.console.print(line, highlight=False)

        try:
            return train(show)
        except (ArmFailed, FloatingPointError) as error:
            console.print(f"  no result: {error}")
            return {"name": arm.name, "attention": arm.attention, "failed": str(error)}


def leave(
    console: Console,
    args: argparse.Namespace,
    settings: Settings,
    corpus: Corpus,
    parallel: Parallel,
    results: list[dict[str, Any]],
) -> None:
    """The table, the picture and the file."""
    out = Path(args.out)
    console.print()
    console.print(report.table(results))
    for sentence in report.sentences(results) if len(results) > 1 else []:
        console.print(sentence)
    missing = report.draw(out / "train.png", results)
    report.write(
        out / "train.json",
        {
            "command": "train",
            **provenance(),
            "settings": asdict(settings),
            "ranks": {"dp": parallel.dp.size, "cp": parallel.cp.size},
            "equal": "time" if args.equal_time else "steps",
            "data": {"description": corpus.description, "sha256": corpus.digest},
            "arms": results,
        },
    )
    console.print(missing or f"Curves: {out / 'train.png'}")
    console.print(f"Results: {out / 'train.json'}")
