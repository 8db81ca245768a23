"""`sparsetile mixed` from the command line: one tiny run, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsetile.cli import main

TINY = (
    "mixed --tiles 8 --votes 3 --questions 2 --keys 4 --values 3 --width 16 --steps 2 --start-steps 2 "
    "--batch 2 --held-out 4 --fixed 4,2 --seeds 2 --first-seed 3 --device cpu --p 0.8"
)


def test_one_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "mixed.json").read_text())
    named = [(run["seed"], run["arm"]) for run in result["runs"]]
    assert named == [(seed, arm) for seed in (3, 4) for arm in ("top_p", 2, 4, "dense")]
    assert result["settings"]["p"] == 0.8 and result["settings"]["task"]["votes"] == 3
    assert result["provenance"][0]["versions"]["torch"]
    for run in result["runs"]:
        if isinstance(run["arm"], int):
            assert set(run["tiles"].values()) == {run["arm"]}
    printed = capsys.readouterr().out
    assert "seed 4 · 2 tiles: easy" in printed and "mixed.md" in printed
    assert (tmp_path / "mixed.md").read_text().startswith("# sparsetile mixed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--fixed 2,x", "--fixed: expected numbers of tiles like 4,8,12, got 2,x"),
        ("--fixed 65", "a number of tiles from 1 to 64, got 65"),
        ("--p 0", "p: expected a share of mass in (0, 1], got 0.0"),
        ("--votes 6", "votes: expected an odd number ≥ 3, got 6"),
        ("--first-seed -1", "--first-seed: expected a whole number from 0 on"),
        ("--steps 0", "expected a whole number above 0, got '0'"),
    ],
)
def test_mistakes_are_told_in_one_line(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixed", *options.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixed", "--help"]) == 0
    assert "sparsetile mixed --seeds 5" in capsys.readouterr().out
