"""`torchrun … -m sparsetile train`: real processes, from their arguments to the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from processes import NO_THREAD_LEFT, run_ranks, torchrun
from sparsetile.cli import main

SIZES = {"context": 704, "layers": 1, "width": 32, "heads": 2, "kv-heads": 1, "block": 16, "batch": 2}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))] + ["--device", "cpu"]
PATTERN = "Local(16) | Strided(32, head_shift=16)"


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 300)
    return str(path)


def test_torchrun_trains_what_one_process_trains(book: str, tmp_path: Path) -> None:
    arguments = ["--data", book, "--attention", PATTERN, "--steps", "6", *TINY]
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt")]
    two_ranks = ["--context-parallel", "2", *arguments, *checkpoint, "--out", str(tmp_path / "two")]
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nfrom sparsetile.cli import main\ncode = main(){NO_THREAD_LEFT}sys.exit(code)\n"
    )
    done = torchrun(2, [str(script), "train", *two_ranks])
    assert done.returncode == 0, done.stderr
    # One rank speaks.
    assert done.stdout.count("held-out bits per byte") == 1 == done.stdout.count("Ranks: 1 × 2")
    assert main(["train", *arguments, "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == ({"dp": 1, "cp": 1}, {"dp": 1, "cp": 2})
    bits = [[loss[2] for loss in run["arms"][0]["losses"]] for run in (one, two)]
    assert bits[1] == pytest.approx(bits[0], rel=1e-5) and len(bits[0]) == 6
    # One process goes on with what two of them saved.
    more = ["--steps", "8", *checkpoint, "--resume", "--out", str(tmp_path / "on")]
    assert main(["train", *arguments, *more]) == 0
    (arm,) = json.loads((tmp_path / "on" / "train.json").read_text())["arms"]
    assert arm["steps"] == 8 and [loss[2] for loss in arm["losses"][:6]] == bits[1]


def test_what_all_ranks_refuse_is_said_once(book: str, tmp_path: Path) -> None:
    arguments = ["--data", book, "--out", str(tmp_path), "--attention", "dense", *TINY]
    done = torchrun(2, ["-m", "sparsetile", "train", "--context-parallel", "2", "--steps", "1", *arguments])
    assert done.returncode != 0
    said = re.findall(r"^sparsetile: .*got dense attention.*--attention 'Full\(\)'", done.stderr, re.M)
    assert len(said) == 1


def test_without_torchrun_it_says_how(book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", book, "--out", str(tmp_path), *TINY]
    assert main(["train", "--context-parallel", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert "torchrun --nproc-per-node 2 -m sparsetile train --context-parallel 2" in error
    assert len(error.strip().splitlines()) == 1


def over_ranks(rank: int, world: int, arguments: list[list[str]]) -> list[int]:
    return [main(["train", *each]) for each in arguments]


def test_length_of_a_run_over_ranks(book: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ["--data", book, "--attention", PATTERN, "--out", str(out), *TINY]
    base += ["--checkpoint", str(tmp_path / "run.pt")]
    # Ten steps at least, as timed; then none, as the checkpoint says; dense attention over rows of ranks.
    timed = ["--minutes", "0.001", "--context-parallel", "2", *base]
    plain = ["--data", book, "--attention", "dense", "--out", str(out / "dense"), "--steps", "1", *TINY]
    assert run_ranks(over_ranks, 2, [timed, [*timed[2:], "--resume"], plain]) == [[0, 0, 0]] * 2
    run = json.loads((out / "train.json").read_text())
    assert run["arms"][0]["steps"] == 10
    dense = json.loads((out / "dense" / "train.json").read_text())
    assert dense["ranks"] == {"dp": 2, "cp": 1} and dense["arms"][0]["density"] == 1.0


def test_wrong_arguments_over_ranks(book: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["--data", book, "--out", str(tmp_path), "--steps", "1", *TINY]
    cases = {
        "2 processes: expected one arm, got pattern, dense, window alone": ["--compare"],
        "--batch 3: expected a multiple of 2": ["--batch", "3"],
        "--context-parallel 2: expected a tile at least for each rank": [
            "--context-parallel",
            "2",
            "--context",
            "16",
            "--plant",
            "0",
        ],
        "the adaptive arm: expected one process": ["--arms", "adaptive"],
        "got /nowhere/run.pt": ["--checkpoint", "/nowhere/run.pt", "--resume"],
        "Nothing": ["--attention", "Nothing()"],
    }
    codes = run_ranks(over_ranks, 2, [[*base, *more] for more in cases.values()])
    assert codes[0] == codes[1] and 0 not in codes[0]
    said = capfd.readouterr().err.splitlines()
    for text in cases:
        assert sum(text in line for line in said) == 1, (text, said)


def test_the_batch_is_a_sequence_for_each_row_at_least(book: str, tmp_path: Path) -> None:
    sizes = TINY[: TINY.index("--batch")] + TINY[TINY.index("--batch") + 2 :]
    base = ["--data", book, "--out", str(tmp_path), "--attention", PATTERN, "--steps", "1"]
    assert run_ranks(over_ranks, 3, [[*base, *sizes]]) == [[0]] * 3
    assert json.loads((tmp_path / "train.json").read_text())["settings"]["batch"] == 6
