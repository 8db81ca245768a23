"""What `sparsetile mixed` says of its runs: numbers and claims against sums done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsetile.environment import provenance
from sparsetile.recall import mixed_report as report
from sparsetile.recall.report import Run

from .test_mixed import SETTINGS


def result_of(arm: str | int, seed: int, accuracy: float, easy: float, hard: float) -> Run:
    return {
        "arm": arm,
        "seed": seed,
        "seconds": 1.0,
        "accuracy": {"easy": 1.0, "hard": 2 * accuracy - 1, "both": accuracy},
        "tiles": {"easy": easy, "hard": hard, "both": (easy + hard) / 2},
        "found": {"easy": 1.0, "hard": accuracy, "both": accuracy},
    }


RUNS = [
    result_of("dense", 0, 0.99, 64, 64),
    *(result_of(k, s, right, k, k) for k, right in ((12, 0.98), (4, 0.7), (10, 0.955)) for s in (1, 0)),
    result_of("top_p", 1, 0.96, 2.5, 9.5),
    result_of("top_p", 0, 0.96, 2.0, 10.0),
]


def test_arms_stand_in_order() -> None:
    arms = report.by_arm(RUNS)
    assert list(arms) == ["top_p", 4, 10, 12, "dense"]
    assert [run["seed"] for run in arms[4]] == [0, 1]


def test_the_cheapest_number_that_is_as_accurate() -> None:
    assert report.cheapest(RUNS) == 12
    assert report.cheapest(RUNS, 0.01) == 10
    assert report.cheapest([run for run in RUNS if run["arm"] != 12]) is None


def test_claims_are_counted() -> None:
    assert report.ratio(RUNS).mean == pytest.approx((9.5 / 2.5 + 10 / 2) / 2)
    assert report.saved(RUNS, 12).mean == pytest.approx(0.5)
    said = report.claims(RUNS)
    assert [text.split(":")[0] for text in said] == ["yes"] * 3
    assert "than 12" in said[1] and "0.500" in said[1] and "than 10" in said[2] and "0.400" in said[2]
    worse = [run for run in RUNS if run["arm"] != "top_p"] + [result_of("top_p", 0, 0.99, 4, 11)]
    said = report.claims(worse)
    assert [text.split(":")[0] for text in said] == ["NO", "NO", "yes"]
    assert "no fixed number of those tried" in said[1]
    assert report.claims([run for run in RUNS if run["arm"] != "top_p"]) == []


def test_all_is_written(tmp_path: Path) -> None:
    result = {
        "experiment": "mixed",
        "settings": SETTINGS.identity(),
        "provenance": [provenance()],
        "runs": RUNS,
    }
    no_picture = report.write(tmp_path, result)
    text = (tmp_path / "mixed.md").read_text()
    assert "| top_p | 2 | 0.960 ± 0.000 |" in text and "| 10 | 2 | 0.955 ± 0.000 |" in text
    assert all(f"- {claim}" in text for claim in report.claims(RUNS))
    assert (tmp_path / "mixed.json").stat().st_size > 1000
    if no_picture is None:
        assert (tmp_path / "mixed.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "sparsetile[plot]" in no_picture
