"""``sparsetile bench``: its arguments, progress and files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparsetile.bench import cases, report, tune
from sparsetile.bench.rivals import all_rivals, chosen_rivals
from sparsetile.bench.run import Plan, Row, measure
from sparsetile.bench.tune_candidates import BLOCKS, HEAD_DIMS, cells
from sparsetile.cli import positive, token_count
from sparsetile.errors import ArgumentError, BackendError, DataError, explain
from sparsetile.kernels import triton_backend
from sparsetile.kernels.triton_config import target_of
from sparsetile.kernels.triton_table import TABLE_FILE
from sparsetile.layout.blocks import BLOCK_SIZES
from sparsetile.patterns import parse_pattern

_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--quick", action="store_true", help="a small grid that takes a minute on a laptop's CPU"
    )
    what.add_argument(
        "--table",
        choices=("baselines",),
        help="the fixed table: 8K, 32K, 128K tokens, bfloat16, head_dim 64, 128",
    )
    what.add_argument(
        "--peers",
        action="store_true",
        help="what a GPU user could pick instead: that table, every rival that runs here",
    )
    what.add_argument("--lengths", type=_list(token_count), metavar="N,…", help="tokens: 4K,16K")
    what.add_argument(
        "--patterns",
        type=_list(str),
        metavar="P,…",
        help=f"{', '.join(cases.TILE_PATTERNS)} (whole tiles), or expressions like 'Local(512) | Global(16)'",
    )
    what.add_argument(
        "--densities", type=_list(_density), metavar="S,…", help="share of tiles kept: 0.02,0.1"
    )
    what.add_argument("--head-dim", type=_list(positive), metavar="D,…", help="default 64")
    what.add_argument("--heads", type=positive, metavar="H", help="default 8")
    what.add_argument("--batch", type=positive, metavar="B", help="default 1")
    what.add_argument("--block", type=int, choices=BLOCK_SIZES, help="tile edge (default 128)")
    what.add_argument("--dtype", choices=_DTYPES, help="default: float32 on CPU, bfloat16 on CUDA")
    how = parser.add_argument_group("how")
    what.add_argument(
        "--tune",
        action="store_true",
        help="tiles of the Triton kernels on this GPU instead; writes a table of them, tuned.json (takes "
        "--head-dim, --dtype, --block, --minutes, --device, --seed, --out)",
    )
    how.add_argument(
        "--minutes", type=_minutes, metavar="M", help="with --tune: stop after about M minutes (default 10)"
    )
    how.add_argument("--backends", type=_list(str), metavar="R,…", help=f"among {', '.join(all_rivals())}")
    how.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    how.add_argument("--seed", type=int, help="of inputs and random tiles (default: fresh, recorded)")
    how.add_argument(
        "--out", type=Path, default=Path("bench-results"), metavar="DIR", help="default bench-results"
    )
    how.add_argument(
        "--replot", type=Path, metavar="FILE", help="only redraw table and plots from a bench.json"
    )


def main(options: argparse.Namespace) -> int:
    """Measure and write ``bench.json``, ``bench.md`` and plots, or tune. 1 if nothing could be measured."""
    if options.tune:
        return _tune(options)
    if options.minutes:
        raise ArgumentError(explain("--minutes", expected="--tune", got="none", fix="Drop --minutes."))
    if options.replot is not None:
        _write_reports(_read(options.replot), options.replot.parent)
        return 0
    plan = plan_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=len(plan.cases) * len(plan.rivals))

        def done(row: Row) -> None:
            console.print(escape(report.row_line(row)), soft_wrap=True)
            progress.update(task, advance=1, description=escape(row["case"]["label"]))

        result = measure(plan, options.out / "bench.json", done)
    _write_reports(result, options.out)
    return 0 if any(row["status"] == "ok" for row in result["rows"]) else 1


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for. Raises ArgumentError or PatternError for what cannot be."""
    device = _device(options.device)
    small = options.quick
    if options.peers:
        if options.backends:
            raise ArgumentError(
                explain(
                    "--peers", expected="every rival", got="--backends", fix="Pass --table baselines instead."
                )
            )
        options.table = "baselines"
    if options.table is not None:
        for name in (
            "quick",
            "lengths",
            "patterns",
            "densities",
            "head_dim",
            "heads",
            "batch",
            "block",
            "dtype",
        ):
            if getattr(options, name):
                flag = "--" + name.replace("_", "-")
                raise ArgumentError(
                    explain(
                        "--table", expected="no option that changes the cases", got=flag, fix=f"Drop {flag}."
                    )
                )
        chosen = cases.baselines()
    else:
        names = options.patterns or list(cases.TILE_PATTERNS)
        for name in names:
            if name not in cases.TILE_PATTERNS:
                parse_pattern(name)
        chosen = cases.grid(
            names,
            options.lengths or ([2048, 4096] if small else [4096, 8192, 16384]),
            options.densities or ([0.0625, 0.125] if small else [0.015625, 0.03125, 0.0625, 0.125]),
            batch=options.batch or 1,
            heads=options.heads or (2 if small else 8),
            head_dims=options.head_dim or [64],
            dtype=options.dtype or ("float32" if device.type == "cpu" else "bfloat16"),
            block=options.block or 128,
        )
    return Plan(
        cases=chosen,
        rivals=chosen_rivals(options.backends, device),
        device=device,
        budget_ms=40.0 if small else 150.0,
        samples=64 if small else 256,
        seed=int(torch.seed() % 2**31) if options.seed is None else options.seed,
        arguments=sys.argv[1:],
    )


def tune_plan_of(options: argparse.Namespace) -> tune.Plan:
    """What ``--tune`` is to measure. Raises ArgumentError for options that do not apply or act, BackendError
    for a GPU that the Triton kernels do not serve."""
    for name in ("quick", "table", "peers", "lengths", "patterns", "densities", "heads", "batch", "backends"):
        if getattr(options, name):
            flag = f"--{name}"
            expected = "no option that changes what is timed but --head-dim, --dtype, --block"
            raise ArgumentError(explain("--tune", expected=expected, got=flag, fix=f"Drop {flag}."))
    if options.replot is not None:
        raise ArgumentError(
            explain("--tune", expected="something to time", got="--replot", fix="Drop one of them.")
        )
    head_dims, blocks = options.head_dim or HEAD_DIMS, [options.block] if options.block else BLOCKS
    for flag, given, known in (("--head-dim", head_dims, HEAD_DIMS), ("--block", blocks, BLOCKS)):
        for value in given:
            if value not in known:
                fix = "The table has no other; those are served by these."
                raise ArgumentError(explain(f"--tune {flag}", expected=f"among {known}", got=value, fix=fix))
    device = _device(options.device)
    if device.type != "cuda":
        got = "--device cpu" if options.device else "none that torch can use"
        fix = "Run it on a machine with the GPU that the table is for; `sparsetile doctor` shows the devices."
        raise ArgumentError(explain("--tune", expected="a GPU", got=got, fix=fix))
    problem = triton_backend.device_problem(device, "kernels")
    if problem is not None:
        raise BackendError(
            explain("--tune", expected="a GPU for the Triton kernels", got=problem, fix="Use another.")
        )
    family = target_of(device).family
    return tune.Plan(
        cells=cells(family, options.dtype or "bfloat16", list(dict.fromkeys(head_dims)), blocks),
        device=device,
        minutes=options.minutes or 10.0,
        seed=int(torch.seed() % 2**31) if options.seed is None else options.seed,
    )


def _tune(options: argparse.Namespace) -> int:
    """Tune and write ``tuned.json`` and ``tune.json``. 1 if nothing could be measured."""
    plan = tune_plan_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=len(plan.cells))

        def done(outcome: tune.Outcome) -> None:
            progress.console.print(escape(tune.line_of(outcome)), soft_wrap=True)
            progress.update(task, advance=1, description="tuning")

        outcomes = tune.tune(plan, options.out, done)
    measured = sum(outcome.choice is not None for outcome in outcomes)
    changed = sum(outcome.choice not in (None, outcome.present) for outcome in outcomes)
    print(f"measured {measured} of {len(plan.cells)} places, {changed} with another choice than the table's")
    if outcomes:
        print(f"wrote {options.out / 'tuned.json'}; to use it, copy it to {TABLE_FILE}")
    return 0 if measured else 1


def _write_reports(result: dict[str, Any], folder: Path) -> None:
    table = report.markdown(result)
    (folder / "bench.md").write_text(table, encoding="utf-8")
    print(table)
    try:
        plots = report.plot(result, folder)
    except ImportError as error:
        print(f"no plots: {error}. Install them with pip install 'sparsetile[plot]'.", file=sys.stderr)
        plots = []
    print("wrote " + ", ".join(str(path) for path in (folder / "bench.md", *plots)), file=sys.stderr)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows_are_there = isinstance(result["rows"], list) and result["provenance"]["versions"]
    except (ValueError, KeyError, TypeError) as error:
        rows_are_there = False
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = "none of its keys"
    if not rows_are_there:
        raise DataError(
            explain(
                "--replot",
                expected="a bench.json",
                got=f"{path} ({reason})",
                fix="Name the file bench wrote.",
            )
        )
    loaded: dict[str, Any] = result
    return loaded


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = device is not None and device.type in ("cpu", "cuda")
    if (
        device is None
        or not known
        or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
    ):
        raise ArgumentError(
            explain(
                "--device",
                expected="cpu" + (" or cuda" if torch.cuda.is_available() else " (torch sees no GPU here)"),
                got=repr(name),
                fix="Run `sparsetile doctor` to see the devices.",
            )
        )
    return device


def _list(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A comma-separated option; commas inside brackets belong to an item (``Local(4, 2)``)."""

    def parse(text: str) -> list[Any]:
        parts, depth = [""], 0
        for letter in text:
            depth += (letter in "([") - (letter in ")]")
            if letter == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += letter
        if not all(part.strip() for part in parts):
            raise argparse.ArgumentTypeError(f"expected values with commas between them, got {text!r}")
        return [item(part.strip()) for part in parts]

    return parse


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return minutes


def _density(text: str) -> float:
    try:
        density = float(text)
    except ValueError:
        density = 0.0
    if not 0 < density <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return density
