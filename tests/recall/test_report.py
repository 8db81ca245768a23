"""Intervals, verdicts and files of the recall experiment, from runs whose numbers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsetile.environment import provenance
from sparsetile.errors import DataError
from sparsetile.recall import report


def one(arm: str, seed: int, accuracy: float, recall: float = 0.5) -> dict[str, Any]:
    checks = [{"step": 0, "accuracy": 0.6}, {"step": 10, "accuracy": accuracy}]
    measured = {"accuracy": accuracy, "within": recall, "recall": recall}
    rest = {"tiles": 10, "density": 0.06, "seconds": 1.0, "parameters": 5, "checks": checks}
    return {"arm": arm, "seed": seed, **measured, **rest}


def result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    task = {"length": 512, "block": 16, "pairs": 16, "keys": 20, "values": 4}
    names = ("short_steps", "short_batch", "short_length", "steps", "batch", "density")
    settings = {
        "task": task,
        "model": {"layers": 1, "width": 8, "heads": 1},
        "dtype": "fp32",
        "device": "cpu",
    }
    settings |= dict.fromkeys(names, 1)
    return {"experiment": "recall", "settings": settings, "provenance": [provenance()], "runs": runs}


def test_an_interval_is_students() -> None:
    # Mean 2, deviation 1, three seeds: 4.303 / √3.
    assert report.estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert report.estimate([0.4]) == (0.4, None) and str(report.estimate([0.4])) == "0.400"
    assert report.estimate([0.5] * 40).half == 0.0


def test_claims_follow_from_the_numbers() -> None:
    good = [one("learned", s, 0.98 + s / 100, 0.97) for s in range(3)]
    rivals = [one("dense", s, 1.0) for s in range(3)] + [one("moba", s, 0.6 + s / 50) for s in range(3)]
    fixed = [one("local", 0, 0.1), one("random", 0, 0.2)]
    said = report.claims(good + rivals + fixed)
    assert len(said) == 5 and all(text.startswith("yes") for text in said)
    assert any("(random) at most 0.35: 0.200" in text for text in said)
    # Intervals that touch, a fixed pattern that answers, recall that is too low.
    said = report.claims(
        [one("learned", s, 0.9 + s / 20, 0.9) for s in range(3)]
        + [one("moba", s, 0.8 + s / 20) for s in range(3)]
        + [one("dilated", 0, 0.5)]
    )
    assert [text.split(":")[0] for text in said] == ["yes", "NO", "NO", "NO"]
    assert report.claims([one("moba", 0, 0.5)]) == []
    said = report.claims([one("learned", 0, 1.0), one("moba", 0, 0.5)])
    assert said[1].startswith("open: ") and said[1].endswith("(one seed has no interval)")


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    runs = [one("moba", 1, 0.5), one("learned", 1, 1.0, 0.9), one("moba", 0, 0.7)]
    whole = result(runs)
    assert report.write(tmp_path, whole) is None
    assert json.loads((tmp_path / "recall.json").read_text()) == whole
    text = (tmp_path / "recall.md").read_text()
    # In the order of the arms: learned first.
    assert text.index("| learned | 1 | 10 | 6.00% | 1.000 |") < text.index(
        "| moba | 2 | 10 | 6.00% | 0.600 ± 1.271 |"
    )
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_parts_become_one(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    other = result([one("moba", 1, 0.1)])
    other["settings"]["steps"] = 9
    parts = (result([one("moba", 0, 0.5), one("moba", 1, 0.6)]), result([one("moba", 1, 0.7)]), other)
    for path, part in zip(paths, parts, strict=True):
        report.write_json(path, part)
    whole = report.merged(paths[:2])
    assert [(run["seed"], run["accuracy"]) for run in whole["runs"]] == [(0, 0.5), (1, 0.7)]
    assert len(whole["provenance"]) == 2
    with pytest.raises(DataError, match="others: steps"):
        report.merged(paths)
    paths[1].write_text("[]")
    with pytest.raises(DataError, match=r"expected a recall\.json"):
        report.merged(paths[:2])
