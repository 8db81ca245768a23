"""``sparsetile bench --tune``: times tiles of the Triton kernels on this GPU and writes a table of them.

A cell is one place of the table (``kernels/triton_table.py``). Its candidates run on a few layouts; what does
not fit, spills or computes something else than the table's present choice is discarded. A candidate takes the
present one's place only if it is faster in two timings, by the geometric mean over the layouts. Compiling
takes longer than timing, so other processes fill Triton's cache meanwhile.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsetile.bench.measure import time_call
from sparsetile.bench.rivals import one_line
from sparsetile.bench.run import save
from sparsetile.bench.tune_candidates import Cell, Choice, candidates
from sparsetile.bench.tune_problems import Call, call_of, problems
from sparsetile.environment import devices, provenance
from sparsetile.errors import BackendError, explain
from sparsetile.kernels import triton_backend
from sparsetile.kernels.triton_config import Target, target_of
from sparsetile.kernels.triton_table import (
    SHARED_BYTES,
    Entry,
    Kernel,
    Measured,
    Pair,
    Place,
    Table,
    Tiles,
    table,
    write_table,
)

Trial = Callable[[Choice], list[float]]

MARGIN = 0.01
"""By how much a candidate must be faster, twice: less is noise."""

BOUND = {2: 2e-2, 4: 1e-4}
"""Largest relative Frobenius error against the present choice's results, by bytes of an element. Two right
choices differ by rounding alone, a tenth of this."""

PLAIN: dict[Kernel, Choice] = {"forward": Tiles(16, 16, 4, 1), "backward": Pair((16, 16), (16, 16), 4, 1)}
"""What fits every GPU."""

_CPU = torch.device("cpu")


class DiscardedError(Exception):
    """A candidate that must not be chosen, and why."""


@dataclass(frozen=True)
class Plan:
    """What to tune and for how long.

    Attributes:
        tokens, heads: the size of the layouts.
        budget_ms: about how long one timing repeats its call.
        seed: draws inputs and random tiles.
    """

    cells: list[Cell]
    device: torch.device
    minutes: float
    seed: int
    tokens: int = 16384
    heads: int = 16
    budget_ms: float = 25.0


@dataclass(frozen=True)
class Outcome:
    """What came of a cell. ``gain`` is how much faster the choice was than ``present`` in the second timing;
    None if it is the present one, or if that could not run. ``choice`` is None if nothing could."""

    cell: Cell
    present: Choice
    choice: Choice | None
    ms: float | None
    gain: float | None
    times: dict[str, list[float]]
    discarded: dict[str, str]


def line_of(outcome: Outcome) -> str:
    """A cell's result, and below it a line for each candidate that was discarded."""
    if outcome.choice is None:
        text = "nothing runs"
    elif outcome.choice == outcome.present:
        text = f"stays {outcome.choice}, {outcome.ms:.3f} ms, fastest of {len(outcome.times)}"
    else:
        gain = "the table's cannot run" if outcome.gain is None else f"{outcome.gain:.1%} faster"
        text = f"{outcome.present} → {outcome.choice}, {outcome.ms:.3f} ms, {gain}"
    discarded = "".join(f"\n  discarded {name}: {why}" for name, why in outcome.discarded.items())
    return f"{outcome.cell.label}: {text}{discarded}"


def choose(cell: Cell, choices: Sequence[Choice], trial: Trial) -> Outcome:
    """Time the choices, of which the first is the present one, and decide.

    ``trial`` gives milliseconds on each layout, or raises DiscardedError.
    """
    present, times, discarded = choices[0], dict[Choice, list[float]](), dict[Choice, str]()

    def timed(choice: Choice) -> float:
        """Its mean; infinite if it must be discarded."""
        try:
            times[choice] = trial(choice)
            return _mean(times[choice])
        except DiscardedError as reason:
            discarded[choice] = str(reason)
            times.pop(choice, None)
            return math.inf

    means = {choice: timed(choice) for choice in choices}
    best = min(means, key=lambda choice: means[choice])
    gain = None
    if present in times and best != present:
        faster = means[best] < (1 - MARGIN) * means[present]
        again = (timed(best), timed(present)) if faster else (math.inf, math.inf)
        if again[0] < (1 - MARGIN) * again[1]:
            gain = again[1] / again[0] - 1
        else:
            best = present
    chosen = best if best in times else None
    return Outcome(
        cell,
        present,
        chosen,
        None if chosen is None else _mean(times[chosen]),
        gain,
        {str(choice): found for choice, found in times.items()},
        {str(choice): reason for choice, reason in discarded.items()},
    )


def _mean(times: list[float]) -> float:
    return math.exp(sum(map(math.log, times)) / len(times))


def merged(entries: Table, outcomes: Sequence[Outcome], device: str, date: str, commit: str | None) -> Table:
    """``entries`` with one of its own for every cell that was measured."""
    found: dict[Place, Entry] = dict(entries)
    for outcome in outcomes:
        if outcome.choice is not None and outcome.ms is not None:
            measured = Measured(device, date, commit, round(outcome.ms, 4))
            found[outcome.cell.place] = Entry(outcome.choice, measured)
    return found


def tune(plan: Plan, folder: Path, done: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Measure the cells until all are done or the time is up; ``done`` is called with each.

    After every cell ``tuned.json`` (the package's table with what was measured) and ``tune.json`` (all times)
    are in ``folder``. Raises BackendError if a candidate takes the GPU down; OSError if it cannot write.
    """
    deadline = time.monotonic() + 60 * plan.minutes
    target = target_of(plan.device)
    record = provenance()
    name = devices()[plan.device.index or 0]["name"] if plan.device.type == "cuda" else "cpu"
    commit = record["commit"] and record["commit"][:12] + ("+" if record["modified"] else "")
    outcomes: list[Outcome] = []
    choices = {cell: candidates(cell, table()) for cell in plan.cells}
    with triton_backend.on_device(plan.device), _Compiling(plan, choices, target) as compiling:
        for cell in plan.cells:
            failed = compiling.wait(cell, deadline)
            if failed is None:
                break
            outcome = choose(cell, choices[cell], _trial(cell, plan, target, choices[cell][0], failed))
            outcomes.append(outcome)
            write_table(merged(table(), outcomes, name, record["date"][:10], commit), folder / "tuned.json")
            rows = [
                asdict(row) | {"choice": str(row.choice), "present": str(row.present)} for row in outcomes
            ]
            save({"provenance": record, "device": name, "bound": BOUND, "cells": rows}, folder / "tune.json")
            done(outcome)
    return outcomes


class _Compiling:
    """Other processes that compile every candidate, cell by cell, into Triton's cache."""

    def __init__(self, plan: Plan, choices: dict[Cell, list[Choice]], target: Target) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.tasks: dict[Cell, list[tuple[Choice, Future[str]]]] = {cell: [] for cell in plan.cells}
        if plan.device.type != "cuda":  # the interpreter compiles nothing
            return
        context = multiprocessing.get_context("spawn")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(cores - 1, 32))
        self.pool = ProcessPoolExecutor(workers, context, _begin, (plan.device.index or 0,))
        for cell, several in choices.items():
            for choice in several:
                task = self.pool.submit(compile_choice, cell, choice, plan, target)
                self.tasks[cell].append((choice, task))

    def __enter__(self) -> _Compiling:
        return self

    def __exit__(self, *_raised: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def wait(self, cell: Cell, deadline: float) -> dict[Choice, str] | None:
        """What cannot be compiled of a cell, and why; None when the time is up."""
        failed = {}
        try:
            for choice, task in self.tasks[cell]:
                reason = task.result(max(0.0, deadline - time.monotonic()))
                if reason:
                    failed[choice] = reason
        except TimeoutError:
            return None
        except BrokenProcessPool as problem:
            raise BackendError(
                explain(
                    "--tune",
                    expected="processes that compile",
                    got=f"one that died at {cell.label} ({problem})",
                    fix="See what Triton printed. If memory ran out, give it fewer cores (taskset).",
                )
            ) from None
        return failed if time.monotonic() < deadline else None


def _begin(index: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked for this one
    torch.set_num_threads(1)
    torch.cuda.set_device(index)


def compile_choice(cell: Cell, choice: Choice, plan: Plan, target: Target) -> str:
    """Compile what a choice launches, for the current GPU; nothing runs on it. "" or why that failed."""
    try:
        for problem in problems(cell, plan.tokens, plan.heads):
            for step in call_of(problem, cell, _CPU, plan.seed, filled=False).launches(cell, choice, target):
                if step.programs:
                    step.kernel.warmup(grid=(step.programs,), **step.arguments, **step.options)
    except Exception as error:  # whatever a compiler throws is this candidate's result
        return one_line(error)
    return ""


def _trial(cell: Cell, plan: Plan, target: Target, present: Choice, failed: dict[Choice, str]) -> Trial:
    """What times a choice on the cell's problems and checks its results."""
    calls = [call_of(p, cell, plan.device, plan.seed) for p in problems(cell, plan.tokens, plan.heads)]

    def run(choice: Choice, call: Call) -> list[Any]:
        """The launches of a choice, run once. Raises DiscardedError."""
        try:
            steps = call.launches(cell, choice, target)
            _fits(call.run(steps), cell.place, may_spill=choice == present)
        except Exception as error:
            if not isinstance(error, DiscardedError):
                _still_there(plan.device, cell, choice, error)
                error = DiscardedError(one_line(error))
            raise error from None
        return steps

    # Results to compare with: the present choice's, or where it cannot run those of the smallest tiles.
    for choice in (present, PLAIN[cell.place.kernel]):
        try:
            for call in calls:
                run(choice, call)
                call.keep()
            break
        except DiscardedError:
            continue

    def trial(choice: Choice) -> list[float]:
        if choice in failed:
            raise DiscardedError(failed[choice])
        times = []
        for call in calls:
            steps = run(choice, call)
            error = call.error()
            if not error <= BOUND[cell.place.bytes]:
                raise DiscardedError(f"wrong: {error:.1e} off, more than {BOUND[cell.place.bytes]:.0e}")
            times.append(time_call(partial(_run, steps), plan.device, plan.budget_ms).median_ms)
        return times

    return trial


def _run(steps: list[Any]) -> None:
    for step in steps:
        step.run()


def _fits(binaries: list[Any], place: Place, *, may_spill: bool) -> None:
    """Raises DiscardedError for compiled kernels (None in the interpreter) that do not fit every GPU of the
    family, or spill where the table's own do not."""
    for binary in binaries:
        if binary is None:
            continue
        shared, most = binary.metadata.shared, SHARED_BYTES[place.family]
        if shared > most:
            raise DiscardedError(
                f"takes {shared / 1024:.0f} KB of shared memory; {place.family} has {most // 1024}"
            )
        if binary.n_spills and not may_spill and place.dim <= 128 and place.work != "featured":
            raise DiscardedError(f"spills {4 * binary.n_spills} bytes a thread")


def _still_there(device: torch.device, cell: Cell, choice: Choice, error: Exception) -> None:
    """Raises BackendError if a kernel has left the GPU unusable: then every later call fails as well."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise BackendError(
            explain(
                "--tune",
                expected="kernels that leave the GPU usable",
                got=f"{choice} in {cell.label}: {one_line(error)}",
                fix="What was measured before is saved; name other --head-dim or --block to go on.",
            )
        ) from None
