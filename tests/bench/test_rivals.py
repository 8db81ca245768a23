"""Rivals compute the attention that their rows are compared by, or say why they cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sparsetile.bench import rivals
from sparsetile.bench.cases import Case
from sparsetile.bench.run import Plan, measure
from sparsetile.errors import ArgumentError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Local

CPU = torch.device("cpu")


def random_tiles(blocks: int, block: int) -> BlockLayout:
    seed = torch.seed()
    print(f"torch.manual_seed({seed})")
    tiles = torch.rand(2, blocks, blocks) < 0.3
    return BlockLayout.from_dense_mask(tiles.repeat_interleave(block, 1).repeat_interleave(block, 2), block)


def test_flex_gets_exactly_the_tiles_of_the_layout():
    layout = random_tiles(7, 32)
    mask = rivals._flex_blocks(layout)
    want = torch.stack([layout.to_dense(head=h)[::32, ::32] for h in range(2)])
    assert torch.equal(mask.to_dense()[0].bool(), want)
    backward = torch.zeros(2, 7, 7, dtype=torch.bool)
    for h in range(2):
        for column in range(7):
            count = int(mask.full_q_num_blocks[0, h, column])
            backward[h, mask.full_q_indices[0, h, column, :count].long(), column] = True
    assert torch.equal(backward, want)


def test_lists_are_as_wide_as_the_longest_row_unless_told():
    layout = random_tiles(6, 16)
    counts, indices = rivals._lists(layout, transposed=False)
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape == (1, 2, 6, max(1, int(counts.max())))
    assert rivals._lists(layout, transposed=True, width=6)[1].shape == (1, 2, 6, 6)


def test_rows_of_flex_dense_and_our_own_agree_with_float64(tmp_path: Path):
    case = Case("random", 256, 1, 2, 16, "float32", 64, tiles=2)
    chosen = rivals.chosen_rivals(["cpu", "reference", "dense", "flex"], CPU)
    result = measure(Plan([case], chosen, CPU, 1.0, 32, torch.seed() % 2**31, []), tmp_path / "bench.json")
    rows = {row["rival"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "cpu", "reference", "flex"]
    for name in ("dense", "cpu", "reference"):
        assert rows[name]["status"] == "ok" and rows[name]["backward_reason"] is None
        assert set(rows[name]["errors"]) == {"out", "dq", "dk", "dv"}
        assert max(rows[name]["errors"].values()) < 2e-6
        assert rows[name]["training_bytes"] >= rows[name]["forward_bytes"] > 0
    flex = rows["flex"]
    if any(shutil.which(name) for name in ("g++", "clang++")):
        assert flex["status"] == "ok", flex["reason"]
        assert flex["errors"]["out"] < 2e-6
        assert "no backward on CPU" in flex["backward_reason"]
    else:
        assert flex["status"] == "failed" and flex["reason"]


@pytest.mark.parametrize("name", ["fa4", "dense-fa4", "dense-cudnn"])
def test_what_needs_a_gpu_says_so(name):
    q = torch.randn(1, 1, 64, 16)
    layout = BlockLayout.from_pattern(Local(8), 64, block_size=16)
    with pytest.raises(rivals.UnavailableError, match="runs on CUDA only"):
        rivals.all_rivals()[name].prepare(layout, q, q, q, causal=False)


def test_choice_of_rivals():
    assert [rival.name for rival in rivals.chosen_rivals(None, CPU)] == ["dense", "cpu", "flex"]
    on_gpu = [rival.name for rival in rivals.chosen_rivals(None, torch.device("cuda"))]
    assert set(on_gpu) == {"hopper", "triton", "flex", "fa4", "dense", "dense-cudnn", "dense-fa4"}
    assert all(name.startswith("dense") for name in on_gpu[:3])
    assert [rival.name for rival in rivals.chosen_rivals(["flex", "cpu", "flex"], CPU)] == ["flex", "cpu"]
    with pytest.raises(ArgumentError, match="'fa3'"):
        rivals.chosen_rivals(["fa3"], CPU)


def test_one_line():
    assert rivals.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert len(rivals.one_line(ValueError("x" * 1000))) == 300
