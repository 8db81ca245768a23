"""``sparsetile bench --tune``: what is tried, chosen and discarded, and the table that it writes."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sparsetile.bench import cli, tune
from sparsetile.bench.cli import add_arguments, tune_plan_of
from sparsetile.bench.measure import Times
from sparsetile.bench.tune import Cell, DiscardedError, Outcome, Plan, choose, line_of, merged
from sparsetile.bench.tune_candidates import BLOCKS, HEAD_DIMS, candidates, cells, launched
from sparsetile.bench.tune_problems import Call, call_of, problems
from sparsetile.cli import main
from sparsetile.errors import BackendError
from sparsetile.kernels import triton_launch
from sparsetile.kernels.triton_config import Target
from sparsetile.kernels.triton_table import (
    FAMILIES,
    SHARED_BYTES,
    WORK,
    Entry,
    Measured,
    Place,
    Tiles,
    read_table,
    table,
    write_table,
)

CPU = torch.device("cpu")
CELL = Cell(Place("forward", "hopper", 2, 64, 32, "whole"), "bfloat16")
OLD, NEW, ODD = (Tiles(32, 32, 4, stages) for stages in (1, 2, 3))

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter runs where there is no GPU"
)


def timer(*rounds: dict[Tiles, float | str]):
    """A trial that answers from ``rounds``, one after the other for each choice; a text discards."""
    calls: dict[Tiles, int] = {}

    def trial(choice: Tiles) -> list[float]:
        at = calls[choice] = calls.get(choice, -1) + 1
        answer = rounds[min(at, len(rounds) - 1)][choice]
        if isinstance(answer, str):
            raise DiscardedError(answer)
        return [answer / 2, 2 * answer]  # whose geometric mean it is

    return trial


def test_a_choice_must_be_faster_twice() -> None:
    outcome = choose(CELL, [OLD, NEW, ODD], timer({OLD: 1.0, NEW: 0.8, ODD: 0.9}, {OLD: 1.1, NEW: 1.0}))
    assert outcome.choice == NEW and outcome.ms == pytest.approx(1.0)
    assert outcome.gain == pytest.approx(0.1)  # of the second round: the first chose it for being lucky
    assert "→ 32×32 w4 s2, 1.000 ms, 10.0% faster" in line_of(outcome)


@pytest.mark.parametrize(
    "second", [{OLD: 1.0, NEW: 0.995}, {OLD: 1.0, NEW: 1.2}, {OLD: 1.0, NEW: "wrong this time"}]
)
def test_luck_changes_nothing(second) -> None:
    outcome = choose(CELL, [OLD, NEW], timer({OLD: 1.0, NEW: 0.8}, second))
    assert outcome.choice == OLD and outcome.gain is None and outcome.ms == pytest.approx(1.0)
    assert "stays 32×32 w4 s1" in line_of(outcome)


def test_noise_changes_nothing() -> None:
    outcome = choose(CELL, [OLD, NEW], timer({OLD: 1.0, NEW: 0.995}))
    assert outcome.choice == OLD


def test_discarded_candidates_are_reported_and_never_chosen() -> None:
    outcome = choose(CELL, [OLD, NEW, ODD], timer({OLD: 1.0, NEW: "wrong: 3e-1 off", ODD: 2.0}))
    assert outcome.choice == OLD and outcome.discarded == {str(NEW): "wrong: 3e-1 off"}
    assert line_of(outcome).endswith("\n  discarded 32×32 w4 s2: wrong: 3e-1 off")


def test_where_the_present_choice_cannot_run_the_fastest_takes_its_place() -> None:
    outcome = choose(CELL, [OLD, NEW, ODD], timer({OLD: "too big", NEW: 2.0, ODD: 1.5}))
    assert outcome.choice == ODD and outcome.gain is None and outcome.ms == pytest.approx(1.5)
    assert "the table's cannot run" in line_of(outcome)
    nothing = choose(CELL, [OLD, NEW], timer({OLD: "too big", NEW: "too big"}))
    assert nothing.choice is None and "nothing runs" in line_of(nothing)


def test_merging_keeps_every_other_entry() -> None:
    measured = choose(CELL, [OLD, NEW], timer({OLD: 1.0, NEW: 0.5}))
    nothing = replace(measured, cell=replace(CELL, place=replace(CELL.place, dim=128)), choice=None, ms=None)
    found = merged(table(), [measured, nothing], "a GPU", "2026-11-24", "abc")
    assert found == {**table(), CELL.place: Entry(NEW, Measured("a GPU", "2026-11-24", "abc", 0.5))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_begin_with_what_launches_now_and_are_what_launches(family, dtype, tmp_path) -> None:
    every = cells(family, dtype, HEAD_DIMS, BLOCKS)
    assert len(set(every)) == len(every) == 9 * sum(map(len, WORK.values()))
    tried = {cell: candidates(cell, table()) for cell in every}
    for cell, choices in tried.items():
        assert choices[0] == launched(cell, None) and len(set(choices)) == len(choices) >= 2
        # The table would launch exactly what was timed.
        assert [launched(cell, choice) for choice in choices] == choices
    for at in range(max(map(len, tried.values()))):
        entries = dict(table()) | {c.place: Entry(x[min(at, len(x) - 1)]) for c, x in tried.items()}
        write_table(entries, tmp_path / "tuned.json")
        assert read_table(tmp_path / "tuned.json") == entries


@pytest.mark.parametrize(("block", "work"), list(itertools.product(BLOCKS, WORK["backward"])))
def test_problems_are_the_work_that_they_stand_for(block, work) -> None:
    cell = Cell(Place("backward", "hopper", 2, 64, block, work), "bfloat16")
    target = Target("hopper", 132)
    chosen = launched(cell, None)
    for problem in problems(cell, 16384, 2):
        call = call_of(problem, cell, CPU, 0, filled=False)
        seen = []

        def look(_target, _bytes, _dim, block_q, block_k, kind, seen=seen):
            seen.append((block_q, block_k, kind))
            return chosen

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_launch, "backward_tiles", look)
            call.launches(cell, chosen, target)
        assert seen == [(block, block, work)]
        assert int(call.request.layout.row_counts().min()) >= 1  # −∞ would hide what is wrong


def tiny_plan(**places) -> Plan:
    at = {"kernel": "forward", "family": "hopper", "bytes": 2, "dim": 64, "block": 32, "work": "whole"}
    names = [key for key in places if isinstance(places[key], tuple)]
    several = [dict(zip(names, values, strict=True)) for values in zip(*places.values(), strict=True)]
    every = [Cell(Place(**(at | one)), "bfloat16") for one in several or [{}]]
    return Plan(every, CPU, 5.0, int(torch.seed() % 2**31), tokens=128, heads=2)


@pytest.fixture
def quick(monkeypatch):
    """Times that need no call: warps × stages of the launches last made."""
    made: list[float] = []
    launches = Call.launches

    def remember(self, cell, choice, target):
        made.append(choice.warps / choice.stages)
        return launches(self, cell, choice, target)

    monkeypatch.setattr(Call, "launches", remember)
    monkeypatch.setattr(tune, "time_call", lambda call, device, budget: Times(made[-1], made[-1], 1))


@interpreted
def test_a_run_under_the_interpreter(tmp_path, quick) -> None:
    plan = tiny_plan(kernel=("forward", "backward"), work=("partial", "featured"))
    seen: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        seen.append(outcome)
        assert outcome.cell.place in read_table(tmp_path / "tuned.json")
        assert len(json.loads((tmp_path / "tune.json").read_text())["cells"]) == len(seen)

    outcomes = tune.tune(plan, tmp_path, done)
    assert outcomes == seen and [outcome.cell for outcome in outcomes] == plan.cells
    found = read_table(tmp_path / "tuned.json")
    for outcome in outcomes:
        assert not outcome.discarded, line_of(outcome)
        # The fewest warps and the most stages, by the clock above.
        choice = found[outcome.cell.place].choice
        assert (choice.warps, choice.stages) == (2, 3) and choice == outcome.choice
        assert found[outcome.cell.place].measured.device == "cpu"
    assert set(found) == set(table()) | {cell.place for cell in plan.cells}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tune.json", "tuned.json"]


@interpreted
def test_wrong_results_and_failures_are_discarded(tmp_path, monkeypatch, quick) -> None:
    plan = tiny_plan()
    tried = candidates(plan.cells[0], table())
    assert len(tried) == 4
    launches = Call.launches

    def spoil(row: torch.Tensor) -> None:
        row += 1.0

    def spoiled(self, cell, choice, target):
        steps = launches(self, cell, choice, target)
        if choice == tried[1]:  # a little off in one row of 128
            return [*steps, SimpleNamespace(run=lambda: spoil(self.results[0][0, 0, 5]))]
        if choice == tried[2]:  # nothing written
            return []
        if choice == tried[3]:
            raise RuntimeError("too\nmuch")
        return steps

    monkeypatch.setattr(Call, "launches", spoiled)
    (outcome,) = tune.tune(plan, tmp_path)
    assert outcome.choice == tried[0] and list(outcome.times) == [str(tried[0])]
    assert outcome.discarded[str(tried[2])] == "wrong: nan off, more than 2e-02"
    assert outcome.discarded[str(tried[3])] == "RuntimeError: too much"
    assert outcome.discarded[str(tried[1])].startswith("wrong: ")


@interpreted
def test_where_the_table_s_choice_cannot_run_small_tiles_tell_right_from_wrong(
    tmp_path, monkeypatch, quick
) -> None:
    plan = tiny_plan()
    tried = candidates(plan.cells[0], table())
    launches = Call.launches

    def spoiled(self, cell, choice, target):
        if choice == tried[0]:
            raise RuntimeError("out of shared memory")
        return [] if choice == tried[1] else launches(self, cell, choice, target)

    monkeypatch.setattr(Call, "launches", spoiled)
    (outcome,) = tune.tune(plan, tmp_path)
    assert set(outcome.discarded) == {str(tried[0]), str(tried[1])} and outcome.choice in tried[2:]


@interpreted
def test_no_time_left_measures_nothing(tmp_path) -> None:
    assert tune.tune(replace(tiny_plan(), minutes=0.0), tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_candidate_must_fit_the_smallest_gpu_of_its_family() -> None:
    def binary(shared: int, spills: int) -> SimpleNamespace:
        return SimpleNamespace(metadata=SimpleNamespace(shared=shared), n_spills=spills)

    place = Place("forward", "ampere", 2, 128, 64, "whole")
    most = SHARED_BYTES["ampere"]
    tune._fits([None, binary(most, 0)], place, may_spill=False)
    tune._fits([binary(most, 3)], place, may_spill=True)
    tune._fits([binary(most, 3)], replace(place, work="featured"), may_spill=False)
    tune._fits([binary(most, 3)], replace(place, dim=256), may_spill=False)
    with pytest.raises(DiscardedError, match="takes 100 KB of shared memory; ampere has 99"):
        tune._fits([binary(0, 0), binary(100 * 1024, 0)], place, may_spill=True)
    with pytest.raises(DiscardedError, match="spills 12 bytes"):
        tune._fits([binary(0, 3)], place, may_spill=False)


def test_waiting_for_the_compilers() -> None:
    def task(answer: str | BaseException | None) -> Future[str]:
        future: Future[str] = Future()
        if isinstance(answer, str):
            future.set_result(answer)
        elif answer is not None:
            future.set_exception(answer)
        return future

    compiling = tune._Compiling(Plan([CELL], CPU, 1.0, 0), {}, Target("hopper", 132))
    soon = time.monotonic() + 60
    compiling.tasks[CELL] = [(OLD, task("")), (NEW, task("ValueError: no"))]
    assert compiling.wait(CELL, soon) == {NEW: "ValueError: no"}
    assert compiling.wait(CELL, time.monotonic()) is None
    compiling.tasks[CELL].append((ODD, task(None)))
    assert compiling.wait(CELL, time.monotonic() + 0.01) is None
    compiling.tasks[CELL][-1] = (ODD, task(BrokenProcessPool("died")))
    with pytest.raises(BackendError, match=f"one that died at {CELL.label}"):
        compiling.wait(CELL, soon)


def test_what_cannot_be_compiled_is_a_line() -> None:
    no_such = Cell(replace(CELL.place, dim=-1), "bfloat16")
    assert (
        "\n" not in tune.compile_choice(no_such, OLD, Plan([no_such], CPU, 1.0, 0), Target("hopper", 1)) != ""
    )


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--tune", *arguments])


@pytest.fixture
def some_gpu(monkeypatch):
    monkeypatch.setattr(cli, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(cli, "target_of", lambda device: Target("ampere", 100))
    monkeypatch.setattr(cli.triton_backend, "device_problem", lambda device, what: None)


def test_options_say_what_is_tuned(some_gpu) -> None:
    plan = tune_plan_of(parsed())
    assert plan.cells == cells("ampere", "bfloat16", HEAD_DIMS, BLOCKS) and plan.minutes == 10.0
    given = (
        "--head-dim",
        "128,64,128",
        "--block",
        "64",
        "--dtype",
        "float32",
        "--minutes",
        "0.5",
        "--seed",
        "7",
    )
    plan = tune_plan_of(parsed(*given))
    assert plan.cells == cells("ampere", "float32", (128, 64), (64,)) and plan.minutes == 0.5
    assert plan.seed == 7 and {cell.place.bytes for cell in plan.cells} == {4}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quick"], "got --quick"),
        (["--table", "baselines"], "got --table"),
        (["--peers"], "got --peers"),
        (["--lengths", "4K"], "got --lengths"),
        (["--patterns", "local"], "got --patterns"),
        (["--densities", "0.1"], "got --densities"),
        (["--heads", "4"], "got --heads"),
        (["--batch", "2"], "got --batch"),
        (["--backends", "cpu"], "got --backends"),
        (["--replot", "bench.json"], "got --replot"),
        (["--block", "16"], "--tune --block: expected among"),
        (["--head-dim", "64,96"], "--tune --head-dim: expected among (64, 128, 256), got 96"),
        (["--minutes", "0"], "minutes above 0"),
        (["--minutes", "nan"], "minutes above 0"),
        (["--device", "cpu"], "expected a GPU, got --device cpu"),
    ],
)
def test_what_does_not_apply_is_refused_in_one_line(arguments, says, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_without_a_gpu_one_line_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--tune"]) == 2
    error = capsys.readouterr().err
    assert "--tune: expected a GPU, got none that torch can use" in error and error.count("\n") == 1
    assert main(["bench", "--minutes", "3"]) == 2
    assert "--minutes: expected --tune" in capsys.readouterr().err


def test_an_old_gpu_is_refused(some_gpu, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.triton_backend, "device_problem", lambda device, what: "needs 8.0, not 7.5")
    assert main(["bench", "--tune"]) == 1
    assert "needs 8.0, not 7.5" in capsys.readouterr().err


@interpreted
def test_the_command_reports_and_writes(tmp_path, capsys, monkeypatch, quick) -> None:
    plan = tiny_plan()
    monkeypatch.setattr(cli, "tune_plan_of", lambda options: plan)
    out = tmp_path / "new"
    assert main(["bench", "--tune", "--out", str(out)]) == 0
    output = capsys.readouterr()
    assert plan.cells[0].label in output.err
    assert (
        "measured 1 of 1 places" in output.out and f"{out / 'tuned.json'}; to use it, copy it" in output.out
    )
    assert plan.cells[0].place in read_table(out / "tuned.json")
    monkeypatch.setattr(cli, "tune_plan_of", lambda options: replace(plan, minutes=0.0))
    assert main(["bench", "--tune", "--out", str(out)]) == 1
    assert "wrote" not in capsys.readouterr().out
