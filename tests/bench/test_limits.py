"""The benchmark of the limits, at sizes that a CPU takes in a moment: what is counted, not how fast it is."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "limits.py"
CPU = torch.device("cpu")


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("limits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not SCRIPT.exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
limits = loaded()


def rows_of(section: str) -> list[dict[str, Any]]:
    rows = list(limits.SECTIONS[section](CPU, **limits.SMALL[section]))
    assert not [row["error"] for row in rows if "error" in row]
    return rows


def test_linearity_counts_tiles_of_all_heads_and_compares_the_lengths() -> None:
    rows = list(
        limits.linearity(
            CPU, lengths=(64, 128), head_dims=(16,), patterns=("random",), heads=2, block=16, tiles=2
        )
    )
    *lengths, spread = rows
    assert [(row["length"], row["tiles"]) for row in lengths] == [(64, 4 * 2), (128, 8 * 2)]
    for row in lengths:
        for x in ("forward", "backward"):
            assert row[f"{x}_ns_a_tile"] == pytest.approx(row[f"{x}_ms"] * 1e6 / (2 * row["tiles"]))
    costs = [row["backward_ns_a_tile"] for row in lengths]
    assert spread["over"] == [64, 128]
    assert spread["backward_spread"] == pytest.approx(max(costs) / min(costs) - 1)


def test_linearity_goes_on_after_a_length_that_fails() -> None:
    lengths = (16, 128, 256)  # the first has one block, where two tiles a row are asked for
    rows = list(
        limits.linearity(CPU, lengths=lengths, head_dims=(16,), patterns=("local",), block=16, tiles=2)
    )
    assert "tiles a row" in rows[0]["error"]
    assert rows[-1]["over"] == [128, 256]


def test_blocks_keep_the_density_and_are_compared_with_the_largest() -> None:
    rows = rows_of("blocks")
    assert len(rows) == 2 * 2 * 3  # patterns, backends, blocks
    for row in rows:
        largest = next(
            x
            for x in rows
            if x["block"] == 64 and all(x[key] == row[key] for key in ("pattern", "backend", "head_dim"))
        )
        assert row["tiles_a_row"] * row["block"] == largest["tiles_a_row"] * 64
        assert row["served_by"] == "cpu"
        products = 256 * row["tiles_a_row"] * row["block"] * 2 * 16  # queries · keys · heads · head_dim
        for x, flops in (("forward", 4), ("backward", 10)):
            assert row[f"{x}_tflops"] == pytest.approx(flops * products / row[f"{x}_ms"] / 1e9)
            assert row[f"{x}_ratio"] == pytest.approx(row[f"{x}_tflops"] / largest[f"{x}_tflops"])


def test_ratios_divide_the_times_they_name() -> None:
    rows = rows_of("ratios")
    for pattern in ("random", "global+local"):
        of = [row for row in rows if row["pattern"] == pattern]
        ms = {row["call"]: (row["forward_ms"], row["backward_ms"]) for row in of if "call" in row}
        ratio = of[-1]
        graded = ms["tile bias with gradient"][1]
        assert ratio["deterministic_ratio"] == pytest.approx(ms["deterministic"][1] / ms["normal"][1])
        assert ratio["tile_bias_gradient_ratio"] == pytest.approx(graded / ms["normal"][1])
        assert ratio["tile_bias_gradient_ratio_to_tile_bias"] == pytest.approx(graded / ms["tile bias"][1])
        for i, x in enumerate(("forward", "backward")):
            expected = ms["dropout"][i] / ms["without dropout"][i]
            assert ratio[f"dropout_{x}_ratio"] == pytest.approx(expected)
            padded = ms["padding"][i] / ms["normal"][i]
            assert ratio[f"padding_{x}_ratio"] == pytest.approx(padded)


def test_the_host_s_time_of_both_calls() -> None:
    rows = rows_of("host")
    assert [(row["head_dim"], row["call"]) for row in rows] == [(16, "backend"), (16, "sparse_attention")]
    assert all(row["served_by"] == "cpu" and row["host_us"] > 0 for row in rows)


def test_repeats_of_the_cpu_are_the_same_bits() -> None:
    rows = rows_of("repeats")
    assert [(row["direction"], row.get("deterministic")) for row in rows] == [
        ("forward", None),
        ("backward", True),
        ("backward", False),
    ]
    assert all(row["same_bits"] and row["calls"] == 3 for row in rows)


def test_a_mixed_layout_has_empty_rows_long_rows_and_partial_tiles() -> None:
    layout = limits.mixed(512, 32, 10)
    counts = layout.row_counts()
    assert (int(counts.min()), int(counts.max())) == (0, 10)
    assert 0 < int((layout.mask_ids >= 0).sum()) < layout.nnz
    layout.validate()


def test_a_call_that_strays_is_counted() -> None:
    exact = torch.full((4,), 3.0, dtype=torch.bfloat16)
    near, far, nan = exact.clone(), exact * 2, exact * math.nan
    near[0] = 3.015625
    empty = torch.tensor([-math.inf, 1.0])
    answers = iter([exact, exact, near, far, exact])
    found = limits.repeated(lambda: (next(answers), empty), ("out", "lse"), 4)
    assert found["out"] == {"calls_that_differ": 2, "most_deviation": 1.0, "calls_that_stray": 2}
    assert found["lse"] == {"calls_that_differ": 0, "most_deviation": 0.0, "calls_that_stray": 0}
    assert not found["same_bits"]
    answers = iter([exact, nan, exact])
    found = limits.repeated(lambda: (next(answers),), ("out",), 2)
    assert found["out"]["calls_that_stray"] == 1 and math.isnan(found["out"]["most_deviation"])


@pytest.mark.parametrize("most", [100, 777, 1000, 1100, 1599])
def test_the_longest_that_fits_is_found(most: int) -> None:
    asked: list[int] = []

    def call(tokens: int) -> dict[str, int] | None:
        asked.append(tokens)
        return {"tokens": tokens} if tokens <= most else None

    found = limits.longest(call, 1000, 1600, 16, 10)
    assert found is not None and most - 32 < found["tokens"] <= most
    assert all(tokens < 1600 for tokens in asked)


def test_nothing_that_fits_is_none_and_tries_are_bounded() -> None:
    assert limits.longest(lambda tokens: None, 1000, 1600, 16, 10) is None
    asked: list[int] = []
    limits.longest(lambda tokens: asked.append(tokens) or {"tokens": tokens}, 1000, 10**9, 16, 3)
    assert len(asked) == 4


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out_is_no_error_and_anything_else_is(error: type[Exception]) -> None:
    def raising(text: str) -> Callable[[int], dict[str, Any]]:
        def call(tokens: int) -> dict[str, Any]:
            raise error(text)

        return call

    assert limits.fits(raising("Triton Error [CUDA]: out of memory"), 128) is None
    with pytest.raises(error):
        limits.fits(raising("an illegal memory access was encountered"), 128)


def test_a_section_that_fails_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "limits_cpu.json"
    before = {"rows": [{"measured": "before"}]}
    file.write_text(json.dumps({"card": {"rows": []}, "blocks": before}))
    command = ["limits.py", "--device", "cpu", "--out", str(tmp_path), "--only", "card,repeats"]
    monkeypatch.setattr(sys, "argv", command)
    limits.main()
    found = json.loads(file.read_text())
    assert "needs a GPU" in found["card"]["rows"][0]["error"]
    assert len(found["repeats"]["rows"]) == 3
    assert found["repeats"]["provenance"]["source"]
    assert found["blocks"] == before


def test_a_section_whose_process_dies_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "__file__", "no such script")
    kept: list[dict[str, Any]] = []
    limits.measured("repeats", "cpu", kept.append)
    assert "ended with 2" in kept[-1]["error"] and kept[-1]["rows"] == []
