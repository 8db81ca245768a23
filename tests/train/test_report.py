"""The report says what the numbers say: checked on made-up results of every outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetile.train.report import draw, megabytes, sentences, table, write


def result(name: str, copy: float | None, tokens_per_second: float = 1000.0) -> dict[str, Any]:
    held_out: dict[str, Any] = (
        {"text": 2.5}
        if copy is None
        else {
            "text": 2.5,
            "source": 7.1,
            "copy": copy,
            "copy_after_start": 0.1,
            "copy_start": [14.2, 3.3, 0.52, 0.2],
        }
    )
    return {
        "name": name,
        "attention": {"dense": "dense", "pattern": "Local(8) | Strided(64)"}.get(name, "Local(8)"),
        "density": 0.25,
        "parameters": 12345,
        "steps": 10,
        "seconds": 3.21,
        "tokens_per_second": tokens_per_second,
        "peak_memory": 300 << 20,
        "memory_kind": "measured so",
        "held_out": held_out,
        "losses": [[1, 0.5, 8.0], [2, 1.0, 7.0]],
        "checks": [{"step": 2, "seconds": 1.0, **held_out}],
    }


FAILED = {"name": "dense", "attention": "dense", "failed": "out of memory"}


def three(pattern: float, dense: float, window: float) -> list[dict[str, Any]]:
    return [result("pattern", pattern, 1500.0), result("dense", dense), result("window alone", window)]


def test_the_table_has_a_column_for_each_arm_and_fits_a_narrow_terminal() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([*three(0.5, 0.4, 7.1)[:1], FAILED, result("window alone", 7.125)]))
    text = console.export_text()
    for word in (
        "pattern",
        "dense",
        "window alone",
        "7.125",
        "0.2500",
        "12,345",
        "300 MiB",
        "14.20, 3.30",
        "0.52, 0.20",
        "measured so",
        "—",
    ):
        assert word in text
    assert "…" not in text.replace("… far", "")


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (
            three(0.42, 0.40, 7.1),
            ["1.50× the speed", "25.0% of its tiles", "dense 0.400: 5.0% more", "beyond"],
        ),
        (
            [result("adaptive", 0.5, 800.0), *three(0.42, 0.40, 7.1)],
            ["The adaptive arm trains at 0.80×", "the adaptive arm pays 0.500", "the pattern pays 0.420"],
        ),
        (three(6.0, 0.40, 7.1), ["not yet learned, though within its reach"]),
        (three(6.9, 6.8, 7.1), ["says nothing about reach"]),
        (three(0.4, 0.4, 0.5), ["should not be able to"]),
        ([result("pattern", 0.4), FAILED, result("window alone", 7.0)], ["dense: no result (out of memory)"]),
        ([result("pattern", None), result("dense", None)], ["1.00× the speed"]),
    ],
)
def test_sentences_follow_from_the_numbers(arms: list[dict[str, Any]], said: list[str]) -> None:
    text = "\n".join(sentences(arms))
    assert all(part in text for part in said), text
    assert ("says nothing" in text) == (said == ["says nothing about reach"])


def test_memory_in_words() -> None:
    assert [megabytes(n) for n in (None, 5 << 20, 3 << 29)] == ["n/a", "5 MiB", "1.50 GiB"]


def test_the_picture_is_drawn_also_without_repeats_or_an_arm(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for number, arms in enumerate([three(1.0, 1.0, 7.0), [result("pattern", None), FAILED]]):
        path = tmp_path / f"{number}.png"
        assert draw(path, arms) is None
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sparsetile[plot]'" in str(draw(tmp_path / "no.png", three(1.0, 1.0, 7.0)))
    assert not (tmp_path / "no.png").exists()


def test_the_run_is_written_as_json(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"arms": three(1.0, 1.0, 7.0)})
    assert json.loads((tmp_path / "run.json").read_text())["arms"][2]["held_out"]["copy"] == 7.0
