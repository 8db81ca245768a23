"""``sparsetile bench`` end to end on tiny sizes."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from sparsetile.bench.cases import baselines
from sparsetile.bench.cli import add_arguments, plan_of
from sparsetile.cli import main

TINY = [
    "bench",
    "--quick",
    "--device",
    "cpu",
    "--lengths",
    "256",
    "--heads",
    "2",
    "--head-dim",
    "16",
    "--block",
    "32",
]


def test_measures_and_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    patterns = "local,(Local(40, 0) | Global(3)) & Causal()"
    out = tmp_path / "new" / "folder"
    assert (
        main(
            [
                *TINY,
                "--patterns",
                patterns,
                "--densities",
                "0.5,0.25",
                "--backends",
                "cpu,dense,fa4",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in out.iterdir()) == [
        *("bench.json", "bench.md", "efficiency.png", "memory.png", "time.png")
    ]
    rows = json.loads((out / "bench.json").read_text())["rows"]
    assert len(rows) == 3 * 3
    assert {row["status"] for row in rows if row["rival"] == "fa4"} == {"unavailable"}
    assert all(max(row["errors"].values()) < 2e-6 for row in rows if row["status"] == "ok")
    output = capsys.readouterr()
    assert "# sparsetile bench" in output.out
    assert "256 B1 H2 D16 local · cpu" in output.err and "FlashAttention 4 runs on CUDA only" in output.err


def test_replot_redraws_from_the_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert (
        main(
            [*TINY, "--patterns", "random", "--densities", "0.5", "--backends", "cpu", "--out", str(tmp_path)]
        )
        == 0
    )
    table = (tmp_path / "bench.md").read_text()
    for path in (tmp_path / "bench.md", tmp_path / "time.png"):
        path.unlink()
    assert main(["bench", "--replot", str(tmp_path / "bench.json")]) == 0
    assert (tmp_path / "bench.md").read_text() == table
    assert (tmp_path / "time.png").exists()


def test_without_matplotlib_the_table_is_still_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert (
        main(
            [*TINY, "--patterns", "local", "--densities", "0.5", "--backends", "cpu", "--out", str(tmp_path)]
        )
        == 0
    )
    assert (tmp_path / "bench.md").exists() and not (tmp_path / "time.png").exists()
    assert "pip install 'sparsetile[plot]'" in capsys.readouterr().err


def test_nothing_measured_is_a_failure(tmp_path):
    assert (
        main(
            [*TINY, "--patterns", "local", "--densities", "0.5", "--backends", "fa4", "--out", str(tmp_path)]
        )
        == 1
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": 3, "provenance": {}}', "\x00\x01"])
def test_replot_of_something_else_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(content)
    assert main(["bench", "--replot", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparsetile: --replot: expected a bench.json") and error.count("\n") == 1


def test_peers_is_the_table_with_every_rival(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plan = plan_of(parser.parse_args(["--peers", "--device", "cpu"]))
    assert plan.cases == baselines() and {rival.name for rival in plan.rivals} == {"cpu", "dense", "flex"}
    assert main(["bench", "--peers", "--backends", "cpu"]) == 2
    assert "--peers: expected every rival" in capsys.readouterr().err


def test_out_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main([*TINY, "--patterns", "local", "--out", str(tmp_path / "taken")]) == 1
    error = capsys.readouterr().err
    assert "taken: File exists" in error and error.count("\n") == 1
