"""Table and plots say what the rows say."""

from __future__ import annotations

import sys

import pytest

from sparsetile.bench import report


def row(rival: str, forward: float | None, backward: float | None, **changes):
    case = {
        "label": "4K B1 H2 D64 local",
        "pattern": changes.pop("pattern", "local"),
        "length": changes.pop("length", 4096),
        "batch": 1,
        "heads": 2,
        "head_dim": 64,
        "dtype": "float32",
        "block": 128,
        "tiles": 2,
        "asked": 0.0625,
    }
    base = {
        "case": case,
        "density": 0.0625,
        "tiles": 64,
        "rival": rival,
        "dense": rival.startswith("dense"),
        "status": "ok",
        "reason": None,
        "forward": forward and {"median_ms": forward, "min_ms": forward, "repeats": 3},
        "backward": backward and {"median_ms": backward, "min_ms": backward, "repeats": 3},
        "backward_reason": None if backward else "FlexAttention has no backward on CPU",
        "errors": {"out": 1e-7, "dq": 2e-7, "dk": 4e-7, "dv": 3e-7},
        "forward_bytes": 2**20,
        "training_bytes": 3 * 2**20 if backward else None,
    }
    return base | changes


def result(*rows):
    return {
        "provenance": {
            "date": "2026-01-02T03:04:05+00:00",
            "commit": "abc",
            "modified": True,
            "source": "0123456789abcdef",
            "versions": {"torch": "2.13.0", "cuda": None},
            "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "devices": []},
        },
        "device": "cpu",
        "memory": "peak of the allocator",
        "error": "relative",
        "rows": list(rows),
    }


FULL = result(
    row("dense", 40.0, 100.0),
    row("dense-cudnn", 20.0, 120.0),
    row("cpu", 2.0, 8.0),
    row("flex", 4.0, None),
    {
        **{key: row("fa4", 1.0, 1.0)[key] for key in ("case", "density", "tiles", "rival", "dense")},
        "status": "unavailable",
        "reason": "runs on CUDA | only",
    },
)


def cells(text: str, rival: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {rival} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_speedups_are_over_the_fastest_dense_and_flex():
    text = report.markdown(FULL)
    assert cells(text, "cpu") == [
        *("cpu", "2.000", "10.00", "2.00", "8.000", "12.50", "—"),
        *("3 MiB", "1.0e-07", "4.0e-07"),
    ]
    assert cells(text, "flex")[1:7] == ["4.000", "5.00", "1.00", "—", "—", "—"]
    assert cells(text, "flex")[7] == "1 MiB (fwd)"
    assert cells(text, "fa4")[1] == "unavailable"


def test_provenance_and_reasons_are_in_the_table():
    text = report.markdown(FULL)
    assert "commit abc with uncommitted changes · source 0123456789ab" in text
    assert "Some CPU (2 cores, 2 threads), no GPU" in text and "torch 2.13.0" in text and "cuda" not in text
    assert "## local · B1 H2 N 4,096 D64 float32, density 0.0625 (64 tiles of 128²)" in text
    assert "- fa4: unavailable: runs on CUDA | only" in text
    assert "- flex: no backward: FlexAttention has no backward on CPU" in text


def test_overview_has_a_line_a_case_and_a_column_a_rival():
    lines = report.markdown(FULL).splitlines()
    assert "| case | density | dense | dense-cudnn | cpu | flex | fa4 |" in lines
    times = "40.0 / 100.0 | 20.0 / 120.0 | 2.000 / 8.000 | 4.000 / — | —"
    assert f"| 4K B1 H2 D64 local | 0.0625 | {times} |" in lines


def test_overview_with_ceilings_has_floors_and_efficiencies():
    rows = [
        row("dense", 2.0, 6.0),
        row("triton", 0.25, 1.0),
        row("fa4", None, None, status="failed", reason="x"),
    ]
    # 4·B·H·N²·D·density = 0.537 GFLOP forward; q, k, v and out are 8.39 MB in fp32.
    measured = result(*rows) | {"ceilings": {"flops": 1e13, "bytes": 1e11}}
    lines = report.markdown(measured).splitlines()
    assert "| case | density | floor | dense | triton | fa4 |" in lines
    times = "0.084 / 0.168 | 2.000 / 6.000 | 0.250 / 1.000 (0.50 / 0.38) | — |"
    assert f"| 4K B1 H2 D64 local | 0.0625 | {times}" in lines
    assert report.floor_ms(
        rows[0]["case"], 0.0625, {"flops": 1e12, "bytes": 1e15}, "backward"
    ) == pytest.approx(1.342, abs=1e-3)


def test_causal_patterns_say_that_dense_is_causal_too():
    assert "causal" not in report.markdown(FULL)
    text = report.markdown(
        result(row("dense", 2.0, 3.0, causal_density=0.125), row("cpu", 1.0, 1.0, causal_density=0.125))
    )
    assert "0.1250 of the causal triangle; dense rivals are causal too" in text


def test_nan_errors_are_shown():
    bad = row("cpu", 1.0, 1.0, errors={"out": "nan", "dq": 1e-3})
    assert cells(report.markdown(result(bad)), "cpu")[8:] == ["nan", "1.0e-03"]
    assert "error nan" in report.row_line(bad)


def test_row_line():
    assert (
        report.row_line(row("cpu", 2.0, 80.0)) == "4K B1 H2 D64 local · cpu: 2.000 / 80.0 ms, error 4.0e-07"
    )
    failed = row("cpu", None, None, status="failed", reason="RuntimeError: x")
    assert report.row_line(failed) == "4K B1 H2 D64 local · cpu: failed: RuntimeError: x"


def test_plots_are_drawn_from_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    longer = [row(name, 100.0, 300.0, length=8192) for name in ("dense", "cpu")]
    other = [row(name, 100.0, 300.0, pattern="random") for name in ("dense", "cpu")]
    written = report.plot(result(*FULL["rows"], *longer, *other), tmp_path)
    assert [path.name for path in written] == ["time.png", "memory.png", "efficiency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    only_dense = report.plot(result(row("dense", 1.0, None)), tmp_path)
    assert [path.name for path in only_dense] == ["time.png", "memory.png"]
    failed = row("cpu", None, None, status="failed", reason="x")
    assert report.plot(result(failed), tmp_path) == []


def test_without_matplotlib_there_are_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        report.plot(FULL, tmp_path)
