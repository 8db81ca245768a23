"""The loop: rows are saved one by one, and no rival can stop the others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsetile.bench.cases import Case
from sparsetile.bench.rivals import Sdpa, Tiles, UnavailableError
from sparsetile.bench.run import Plan, Row, measure, save

CPU = torch.device("cpu")
LOCAL = Case("local", 128, 1, 2, 8, "float32", 32, tiles=2, asked=0.5)
RANDOM = Case("random", 128, 1, 2, 8, "float32", 32, tiles=2, asked=0.5)


@dataclass
class Odd:
    """A rival that goes wrong in one way."""

    way: str
    name: str = "odd"
    dense: bool = False

    def prepare(self, layout, q, k, v, *, causal):
        if self.way == "unavailable":
            raise UnavailableError("needs a machine of its own")
        if self.way == "forward":
            raise MemoryError("too much")
        if self.way == "wrong":
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * float("nan")

        def attend(q, k, v):
            out = F.scaled_dot_product_attention(q, k, v)
            out.register_hook(self.fail)
            return out

        return attend

    def fail(self, grad):
        raise RuntimeError("no\nbackward today")

    def no_backward(self, device):
        return None


def plan(*rivals, cases=(LOCAL,)) -> Plan:
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return Plan(list(cases), list(rivals), CPU, 0.5, 16, seed, ["bench"])


def strict(path: Path) -> dict:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_row_is_on_disk_when_it_is_announced(tmp_path):
    path = tmp_path / "bench.json"
    seen: list[int] = []

    def done(row: Row) -> None:
        saved = strict(path)
        assert saved["rows"][-1]["rival"] == row["rival"]
        seen.append(len(saved["rows"]))

    result = measure(plan(Sdpa("dense"), Tiles("cpu"), cases=(LOCAL, RANDOM)), path, done)
    assert seen == [1, 2, 3, 4]
    assert strict(path) == json.loads(json.dumps(result))
    assert set(result["provenance"]) >= {"commit", "versions", "machine", "date"}
    assert [row["case"]["pattern"] for row in result["rows"]] == ["local"] * 2 + ["random"] * 2
    assert all(row["density"] == 0.5 for row in result["rows"])
    assert list(tmp_path.iterdir()) == [path]


def test_dense_is_measured_once_a_shape(tmp_path):
    other = Case("local", 64, 1, 2, 8, "float32", 32, tiles=1)
    result = measure(plan(Sdpa("dense"), cases=(LOCAL, RANDOM, other)), tmp_path / "bench.json")
    first, second, third = result["rows"]
    assert second["shared"] and second["forward"] == first["forward"]
    assert "shared" not in third


def test_dense_is_causal_where_the_pattern_is(tmp_path):
    causal = Case("Local(30, 0)", 128, 1, 2, 8, "float32", 32)
    both = Case("Local(30)", 128, 1, 2, 8, "float32", 32)
    rows = measure(plan(Sdpa("dense"), Tiles("cpu"), cases=(both, causal, both)), tmp_path / "bench.json")[
        "rows"
    ]
    assert [row.get("shared", False) for row in rows if row["dense"]] == [False, False, True]
    assert [row["causal_density"] is not None for row in rows if row["dense"]] == [False, True, False]
    assert all(max(row["errors"].values()) < 2e-6 for row in rows)


@pytest.mark.parametrize(
    ("way", "status", "reason"),
    [
        ("unavailable", "unavailable", "needs a machine of its own"),
        ("forward", "failed", "MemoryError: too much"),
    ],
)
def test_a_rival_that_cannot_is_a_row_and_the_run_goes_on(way, status, reason, tmp_path):
    result = measure(plan(Odd(way), Tiles("cpu")), tmp_path / "bench.json")
    odd, ours = result["rows"]
    assert (odd["status"], odd["reason"]) == (status, reason)
    assert ours["status"] == "ok"


def test_a_failing_backward_keeps_the_forward(tmp_path):
    odd, ours = measure(plan(Odd("backward"), Tiles("cpu")), tmp_path / "bench.json")["rows"]
    assert odd["status"] == "ok" and odd["forward"]["median_ms"] > 0
    assert odd["backward"] is None
    assert odd["backward_reason"] == "RuntimeError: no backward today"
    assert ours["backward"]["repeats"] >= 1


def test_nan_is_an_error_that_shows_and_valid_json(tmp_path):
    path = tmp_path / "bench.json"
    measure(plan(Odd("wrong")), path)
    assert strict(path)["rows"][0]["errors"]["out"] == "nan"


def test_a_case_that_cannot_be_made_is_a_row_for_every_rival(tmp_path, monkeypatch):
    def fail(*_arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Case, "layout", fail)
    rows = measure(plan(Sdpa("dense"), Tiles("cpu")), tmp_path / "bench.json")["rows"]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[0]["reason"] == "RuntimeError: out of memory"


def test_save_replaces_the_whole_file(tmp_path):
    path = tmp_path / "bench.json"
    save({"rows": [1] * 1000}, path)
    save({"rows": [float("inf")]}, path)
    assert strict(path) == {"rows": ["inf"]}
    with pytest.raises(OSError):
        save({}, tmp_path / "missing" / "bench.json")
