"""``sparsetile plan``."""

from __future__ import annotations

import pytest

from sparsetile.cli import main
from sparsetile.distributed.plan import Plan
from sparsetile.distributed.sharding import Sharding
from sparsetile.patterns import Local

PATTERN = "Local(512) | Global(64)"


def _lines(capsys, *arguments: str) -> list[str]:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_number_of_ranks(capsys):
    lines = _lines(capsys, "Local(512)", "--length", "64K", "--ranks", "4", "--kv-heads", "2")
    plan = Plan.from_pattern(Local(512), Sharding.contiguous(1 << 16, 4, 128), kv_heads=2, group_size=1)
    assert "64K tokens" in lines[0]
    assert plan.hash in lines[-1] and f"{plan.units} units" in lines[-1]
    ranks = [line.split() for line in lines[-7:-2]]
    assert [row[0] for row in ranks if row[0].isdigit()] == ["0", "1", "2", "3"]
    # 512 keys of each neighbour, 2 kv heads × 128, bf16, keys and values.
    assert [row[2:4] for row in ranks[-4:]] == [["512", "KiB"], ["1", "MiB"], ["1", "MiB"], ["512", "KiB"]]


def test_many_numbers_of_ranks(capsys):
    options = ["--length", "64K", "--ranks", "1,2,8,64", "--ranks-per-node", "4", "--heads", "16"]
    lines = _lines(capsys, PATTERN, *options, "--max-remote-tokens", "1K", "--causal")
    rows = [line.split() for line in lines[3:]]
    assert [row[0] for row in rows] == ["1", "2", "8", "64"]
    assert "between nodes" in lines[2]
    assert all("contiguous" in row for row in rows)


@pytest.mark.parametrize("kind", ["contiguous", "balanced"])
def test_sharding(kind, capsys):
    lines = _lines(capsys, "Causal()", "--length", "16K", "--ranks", "8", "--sharding", kind, "--block", "64")
    assert lines[3].split()[1] == kind
    assert _lines(capsys, "Causal()", "--length", "16K", "--ranks", "8")[3].split()[1] == "balanced"


def test_large_worlds_show_the_busiest(capsys):
    lines = _lines(capsys, "Local(512)", "--length", "64K", "--ranks", "64")
    assert any("16 of 64 ranks" in line for line in lines)


def test_hierarchical_lies_where_it_says(capsys):
    options = ["--length", "32K", "--ranks", "4", "--ranks-per-node", "2", "--causal"]
    order = "order=(0, 7, 1, 6, 2, 5, 3, 4)"
    for extra, kind in (("", "contiguous"), (order, "balanced"), ("order=(3, 2, 1, 0)", "dealt")):
        assert _lines(capsys, f"Hierarchical(4, 2, {extra}) | Local(10)", *options)[3].split()[1] == kind


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["Local(1) | Hierarchical(4)"], "--ranks 4"),
        (["Hierarchical(8, 4)"], "--ranks-per-node 4"),
        (["Hierarchical(8)", "--sharding", "balanced"], "--sharding balanced"),
        (["Lokal(3)"], "Local"),
        (["Local(3)", "--heads", "3", "--kv-heads", "2"], "--heads"),
        (["Local(3)", "--ranks-per-node", "3"], "--ranks-per-node"),
        (["Local(3)", "--max-remote-tokens", "64"], "--max-remote-tokens: expected at least one tile"),
        (["Local(3)", "--ranks", "0"], "above 0"),
        (["Local(3)", "--ranks", "2,x"], "above 0"),
    ],
)
def test_mistakes_end_with_one_line(arguments, said, capsys):
    assert main(["plan", "--length", "4K", "--ranks", "8", *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and len(shown.err.splitlines()) == 1
    assert not shown.out


def test_needs_ranks(capsys):
    assert main(["plan", "Local(3)", "--length", "4K"]) == 2
    assert "--ranks" in capsys.readouterr().err
