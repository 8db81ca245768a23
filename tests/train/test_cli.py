"""`sparsetile train` from its arguments to its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsetile.cli import main
from sparsetile.train.arms import Arm
from sparsetile.train.data import load_corpus
from sparsetile.train.look import load_model
from sparsetile.train.loop import Settings, train

SIZES = {"context": 704, "layers": 1, "width": 32, "heads": 2, "kv-heads": 1, "block": 16, "batch": 1}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))] + ["--device", "cpu"]


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 300)
    return str(path)


def inline(arm: Arm, settings: Settings, data: str | None) -> Iterator[dict[str, Any]]:
    """What an arm's process sends, without the process."""
    events: list[dict[str, Any]] = []
    result = train(arm, settings, load_corpus(data), events.append)
    yield from [*events, {"event": "result", "result": result}]


def test_a_comparison_leaves_a_table_a_picture_and_the_numbers(
    book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The steps are timed in a real process; one for each arm would only take longer.
    monkeypatch.setattr("sparsetile.train.cli.trained", inline)
    out = tmp_path / "out"
    pattern = "Local(16) | Strided(32, head_shift=16)"
    arguments = ["--attention", pattern, "--data", book, "--out", str(out), *TINY]
    assert main(["train", "--compare", "--minutes", "0.001", *arguments]) == 0
    said = capsys.readouterr().out
    assert (
        "A step takes: pattern" in said
        and "window alone: Local(16)" in said
        and "peak memory" in said
        and "held out" in said
    )
    run = json.loads((out / "train.json").read_text())
    assert [arm["attention"] for arm in run["arms"]] == [pattern, "dense", "Local(16)"]
    assert all(arm["steps"] == 10 and arm["peak_memory"] is not None for arm in run["arms"])
    assert run["arms"][1]["density"] == 1.0 > run["arms"][0]["density"] > run["arms"][2]["density"]
    assert {"commit", "machine", "versions", "date", "settings", "data"} <= run.keys()
    assert all(
        {"text", "source", "copy", "copy_start", "copy_after_start"} == arm["held_out"].keys()
        for arm in run["arms"]
    )


def test_a_checkpoint_goes_on_where_it_ended(
    book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetile.train.cli.trained", inline)
    arguments = [
        "--compare",
        "--data",
        book,
        "--checkpoint",
        str(tmp_path / "run.pt"),
        "--out",
        str(tmp_path),
        *TINY,
    ]

    def arms(*more: str) -> list[dict[str, Any]]:
        assert main(["train", *arguments, *more]) == 0
        return list(json.loads((tmp_path / "train.json").read_text())["arms"])

    first = arms("--steps", "3")
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "run-pattern.pt",
        "run-dense.pt",
        "run-window-alone.pt",
    }
    # An arm that had not begun when the run was cut off begins.
    (tmp_path / "run-window-alone.pt").unlink()
    again = arms("--resume")
    assert [arm["steps"] for arm in again] == [3, 3, 3]
    assert [arm["losses"] for arm in again[:2]] == [arm["losses"] for arm in first[:2]]
    assert [loss[2] for loss in again[2]["losses"]] == [loss[2] for loss in first[2]["losses"]]
    longer = arms("--resume", "--steps", "5")
    assert [arm["losses"][:3] for arm in longer] == [arm["losses"] for arm in again]
    assert [arm["steps"] for arm in longer] == [5, 5, 5]


def test_arms_by_name(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetile.train.cli.trained", inline)
    arguments = ["--data", book, "--out", str(tmp_path), "--steps", "2", *TINY]
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt")]
    more = ["--sparsity", "0.5", "--distillation", "sampled", *checkpoint]
    assert main(["train", "--arms", "adaptive,dense", *arguments, *more]) == 0
    run = json.loads((tmp_path / "train.json").read_text())
    assert [arm["attention"] for arm in run["arms"]] == [
        "adaptive(base_sparsity=0.5, distillation='sampled')",
        "dense",
    ]
    assert run["arms"][0]["density"] == pytest.approx(0.51, abs=0.02)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"run-adaptive.pt", "run-dense.pt"}
    # What was saved is what `show --adaptive` reads.
    load_model(tmp_path / "run-adaptive.pt")
    assert main(["train", "--arms", "adaptive", *arguments]) == 0
    (arm,) = json.loads((tmp_path / "train.json").read_text())["arms"]
    assert arm["attention"] == "adaptive(base_sparsity=0.75, distillation='kept')"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--attention", "Local("], "Local("),
        (["--attention", "Global(4)", "--compare"], "--compare"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--context", "64K"], "--context"),
        (["--heads", "3"], "heads 3"),
        (["--resume"], "--checkpoint"),
        (["--resume", "--checkpoint", "/nowhere/run.pt"], "/nowhere/run.pt"),
        (["--plant", "0.25", "--attention", "Local(500)"], "--plant 0"),
        (["--plant", "2"], "--plant"),
        (["--lr", "nan"], "--lr"),
        (["--minutes", "0"], "--minutes"),
        (["--steps", "10", "--equal-time"], "--equal-time"),
        (["--block", "24"], "--block"),
        (["--arms", "dense,learned"], "pattern, dense, window, adaptive"),
        (["--arms", "dense,dense"], "once each"),
        (["--arms", "dense", "--compare"], "--compare"),
        (["--arms", "adaptive", "--attention", "Local(16)"], "--attention"),
        (["--arms", "adaptive", "--sparsity", "1"], "base_sparsity"),
        (["--arms", "dense", "--sparsity", "0.5"], "--arms adaptive"),
        (["--distillation", "kept"], "--arms adaptive"),
    ],
)
def test_bad_input_is_one_line_and_no_success(
    book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    code = main(["train", "--data", book, "--out", str(tmp_path / "out"), *TINY, *arguments])
    error = capsys.readouterr().err.strip()
    assert code != 0 and named in error and "Traceback" not in error
    assert len(error.splitlines()) == 1, error


def test_a_checkpoint_of_another_size_is_one_line(
    book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.pt").write_bytes(b"nothing of ours")
    arguments = [
        "--data",
        book,
        "--out",
        str(tmp_path),
        "--checkpoint",
        str(tmp_path / "run.pt"),
        "--resume",
        *TINY,
    ]
    assert main(["train", *arguments]) != 0
    error = capsys.readouterr().err.strip()
    assert "damaged" in error and len(error.splitlines()) == 1
