"""`sparsetile recall` from its arguments to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsetile.cli import main
from sparsetile.recall.arms import ARMS

TINY = ["--device", "cpu", "--length", "256", "--keys", "32", "--width", "16", "--hidden", "16"]
TINY += ["--batch", "2", "--steps", "8", "--short-steps", "2", "--seeds", "1", "--density", "0.15"]
TINY += ["--held-out", "8"]


def test_all_arms_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recall", *TINY, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(f"seed 0 · {arm}: " in said for arm in ARMS) and "the best fixed pattern" in said
    whole = json.loads((tmp_path / "recall.json").read_text())
    runs = {run["arm"]: run for run in whole["runs"]}
    assert list(runs) == list(ARMS) and whole["settings"]["adaptive"]["block_size"] == 16
    sparse = [run for arm, run in runs.items() if arm != "dense"]
    assert len({run["tiles"] for run in sparse}) == 1 and 0.1 < sparse[0]["density"] < 0.2
    assert runs["dense"]["tiles"] == 16 * 17 // 2 and runs["oracle"]["recall"] == pytest.approx(1.0)
    assert all([c["step"] for c in run["checks"]] == list(range(9)) for run in runs.values())
    assert runs["learned"]["parameters"] == runs["untrained"]["parameters"] > runs["moba"]["parameters"]
    assert {"commit", "machine", "versions", "date", "source"} <= whole["provenance"][0].keys()
    assert (tmp_path / "recall.md").exists() and (tmp_path / "recall.png").exists()


def test_runs_repeat_and_parts_merge(tmp_path: Path) -> None:
    parts = {"a": ["learned,local"], "b": ["learned"], "c": ["local", "--first-seed", "1"]}
    runs = {}
    for name, (arms, *more) in parts.items():
        assert main(["recall", *TINY, "--arms", arms, *more, "--out", str(tmp_path / name)]) == 0
        whole = json.loads((tmp_path / name / "recall.json").read_text())
        runs[name] = {run["arm"]: run for run in whole["runs"]}
    first, again = (dict(runs[name]["learned"], seconds=0) for name in "ab")
    assert first == again
    assert runs["a"]["local"]["checks"] != runs["c"]["local"]["checks"]
    files = [str(tmp_path / name / "recall.json") for name in ("a", "c")]
    assert main(["recall", "--merge", *files, "--out", str(tmp_path / "all")]) == 0
    whole = json.loads((tmp_path / "all" / "recall.json").read_text())
    assert [(run["arm"], run["seed"]) for run in whole["runs"]] == [
        ("learned", 0),
        ("local", 0),
        ("local", 1),
    ]


def test_what_there_was_no_time_for_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arms", "local,moba", "--minutes", "1e-9", "--out", str(tmp_path)]
    assert main(["recall", *TINY, *arguments]) == 1
    assert "Not begun, for want of time: local (seed 0), moba (seed 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "learned,mobba"], "expected one of dense, oracle, learned"),
        (["--length", "1000"], "a multiple of 2 · block = 32"),
        (["--density", "0"], "density"),
        (["--width", "20"], "width a multiple of 8·heads"),
        (["--seeds", "0"], "expected a whole number above 0"),
        (["--explored", "2"], "expected a share from 0 to 1"),
        (["--first-seed", "-1"], "expected a whole number from 0 on"),
        (["--merge", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", *TINY, *arguments, "--out", str(tmp_path)]) in (1, 2)
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
