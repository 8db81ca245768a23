"""Drawings: every kept cell shows, sizes and labels fit, PNGs are written."""

from __future__ import annotations

import sys

import pytest
import torch

from sparsetile import viz
from sparsetile.errors import ArgumentError
from sparsetile.facts import coverage, describe
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Causal, Global, Local


@pytest.fixture
def layout() -> BlockLayout:
    return BlockLayout.from_pattern((Local(70) | Global(10)) & Causal(), q_len=500, block_size=32)


def picture_rows(text: str) -> list[str]:
    return [line.split("┤" if "┤" in line else "│", 1)[1][:-1] for line in text.splitlines()[2:-1]]


def test_shades_show_exactly_the_kept_cells(layout):
    rows = picture_rows(viz.draw(layout, width=40, colour=False).plain)
    seen = coverage(layout, 20, 40)
    kept = (seen.full + seen.partial) > 0
    assert [[letter != " " for letter in row] for row in rows] == kept.tolist()
    assert "█" in "".join(rows)


def test_colours_show_exactly_the_kept_cells(layout):
    seen = coverage(layout, 40, 40)
    drawn = viz.draw(layout, width=40)
    empty = "rgb({},{},{})".format(*viz.EMPTY_COLOUR)
    pixels = [span.style.split(" on ") for span in drawn.spans if " on " in str(span.style)]
    kept = (seen.full + seen.partial) > 0
    lines, columns = -(-kept.shape[0] // 2), kept.shape[1]
    assert len(pixels) == lines * columns
    for y in range(kept.shape[0]):
        for x in range(columns):
            assert (pixels[y // 2 * columns + x][y % 2] != empty) == bool(kept[y, x])


def test_axes_are_labelled_in_tokens():
    long = BlockLayout.from_pattern(Local(4096), q_len=1 << 20)
    text = viz.draw(long, width=64, colour=False).plain
    assert text.splitlines()[0].split() == ["0", "192K", "384K", "576K", "768K", "960K"]
    assert "512K ┤" in text
    assert all(len(line) < 80 for line in text.splitlines())


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_tiny_lengths_draw(length):
    tiny = BlockLayout.from_pattern(Local(3), q_len=length, block_size=16)
    for colour in (False, True):
        assert len(viz.draw(tiny, colour=colour).plain.splitlines()) >= 4


def test_facts_name_what_a_layout_costs(layout):
    facts = dict(viz.fact_rows(describe(layout), head_dim=64))
    assert facts["tokens"] == "500 queries × 500 keys"
    assert facts["tiles"].startswith(f"{layout.nnz:,} of 256")
    assert facts["farthest key"] == "499 tokens back"
    assert "causal triangle" in facts["density"]
    assert "D 64" in "".join(facts)
    nothing = describe(BlockLayout.from_dense_mask(torch.zeros(20, 20, dtype=torch.bool), 16))
    facts = dict(viz.fact_rows(nothing))
    assert facts["farthest key"] == "none"
    assert facts["queries without a key"].startswith("yes")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (1000, "1000"),
        (4096, "4K"),
        (1536, "1.5K"),
        (1 << 20, "1M"),
        (3 << 19, "1.5M"),
        (300000, "293K"),
    ],
)
def test_tokens(count, text):
    assert viz.tokens(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2 GiB")]
)
def test_byte_size(count, text):
    assert viz.byte_size(count) == text


@pytest.mark.parametrize("size", [(500, 500), (64, 3000), (3000, 64)])
def test_png_is_written(size, tmp_path):
    pytest.importorskip("matplotlib")
    layout = BlockLayout.from_pattern(Local(70) | Global(10), *size, block_size=32)
    viz.save_png(layout, tmp_path / "layout.png", title="Local(70) | Global(10)")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib_says_what_to_install(layout, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"pip install 'sparsetile\[plot\]'"):
        viz.save_png(layout, tmp_path / "layout.png")
