"""Cases: whole-tile patterns have the tiles they say, the baselines the densities of the published table."""

from __future__ import annotations

import pytest
import torch

from sparsetile.bench import cases
from sparsetile.bench.cases import Case, tile_rows
from sparsetile.errors import ArgumentError


def fresh() -> torch.Generator:
    generator = torch.Generator()
    print(f"generator seed {generator.seed()}")
    return generator


def dense(indptr: torch.Tensor, indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """bool [blocks, blocks]; checks that rows are ascending and in range."""
    grid = torch.zeros(blocks, blocks, dtype=torch.bool)
    assert len(indptr) == blocks + 1 and int(indptr[-1]) == len(indices)
    for row in range(blocks):
        columns = indices[indptr[row] : indptr[row + 1]]
        assert (columns.diff() > 0).all()
        grid[row, columns] = True
    return grid


@pytest.mark.parametrize(("blocks", "tiles"), [(1, 1), (9, 1), (9, 4), (9, 5), (9, 9), (40, 7)])
def test_local_has_the_same_window_in_every_row(blocks, tiles):
    grid = dense(*tile_rows("local", blocks, tiles, fresh()), blocks)
    assert (grid.sum(1) == tiles).all()
    assert grid.diagonal().all()
    first = grid.int().argmax(1)
    assert torch.equal(first, (torch.arange(blocks) - tiles // 2).clamp(0, blocks - tiles))


@pytest.mark.parametrize(("blocks", "tiles"), [(1, 1), (12, 1), (12, 5), (12, 9), (12, 12), (60, 20)])
def test_random_has_different_tiles_in_every_row(blocks, tiles):
    generator = fresh()
    indptr, indices = tile_rows("random", blocks, tiles, generator)
    rows = indices.view(blocks, tiles).sort(1).values
    assert (rows.diff(dim=1) > 0).all() and rows.min() >= 0 and rows.max() < blocks
    again = tile_rows("random", blocks, tiles, generator)[1]
    assert tiles == blocks or blocks < 2 or not torch.equal(indices, again)
    assert torch.equal(indptr, torch.arange(blocks + 1) * tiles)


def test_random_draws_every_set_alike():
    counts = torch.zeros(5, 5)
    generator = fresh()
    for _ in range(40):
        indices = tile_rows("random", 5, 2, generator)[1].view(5, 2)
        for row in indices.sort(1).values:
            counts[row[0], row[1]] += 1
    drawn = counts[torch.triu_indices(5, 5, 1).unbind()]
    assert drawn.sum() == 200 and drawn.min() >= 4 and drawn.max() <= 45  # 20 expected, deviation 4.2


@pytest.mark.parametrize(("blocks", "tiles"), [(1, 1), (8, 1), (8, 2), (16, 8), (33, 11)])
def test_global_and_local_share_the_budget(blocks, tiles):
    grid = dense(*tile_rows("global+local", blocks, tiles, fresh()), blocks)
    reach = max(1, tiles // 4)
    window = dense(*tile_rows("local", blocks, max(1, tiles - reach), fresh()), blocks)
    window[:reach], window[:, :reach] = True, True
    assert torch.equal(grid, window)


@pytest.mark.parametrize("tiles", [0, 9])
def test_budget_must_fit(tiles):
    with pytest.raises(ArgumentError, match="tiles a row: expected 1 to 8"):
        tile_rows("local", 8, tiles, fresh())


def test_unknown_tile_pattern():
    with pytest.raises(ArgumentError, match="whole-tile pattern"):
        tile_rows("spiral", 8, 2, fresh())


def test_baselines_have_the_published_densities():
    published = {
        (8192, "local"): 0.0156,
        (8192, "random"): 0.0938,
        (8192, "global+local"): 0.0464,
        (32768, "local"): 0.0195,
        (32768, "random"): 0.1016,
        (32768, "global+local"): 0.0503,
        (131072, "local"): 0.0098,
        (131072, "global+local"): 0.0195,
    }
    table = cases.baselines()
    assert len(table) == 16
    assert {(case.length, case.pattern) for case in table} == set(published)
    assert {case.head_dim for case in table} == {64, 128}
    assert {(case.length, case.batch, case.heads) for case in table} == {
        (8192, 4, 16),
        (32768, 1, 16),
        (131072, 1, 8),
    }
    for case in table:
        if case.head_dim == 64:
            layout = case.layout(torch.device("cpu"), fresh())
            assert round(layout.density, 4) == published[case.length, case.pattern]
            assert (layout.mask_ids == -1).all()
            layout.validate()


def test_grid_is_every_combination_and_expressions_come_once():
    shape = {"batch": 1, "heads": 2, "dtype": "float32", "block": 64}
    made = cases.grid(["local", "Local(9)"], [1024, 2048], [0.001, 0.25], head_dims=[16, 32], **shape)
    assert len(made) == 2 * 2 * (2 + 1)
    budgets = [(case.length, case.tiles) for case in made if case.asked == 0.25 and case.head_dim == 16]
    assert budgets == [(1024, 4), (2048, 8)]
    assert {case.tiles for case in made if case.asked == 0.001} == {1}
    assert made[0].label == "1K B1 H2 D16 local"


def test_expression_and_ragged_length():
    case = Case("Local(9) | Global(2)", 130, 1, 2, 16, "float32", 64)
    layout = case.layout(torch.device("cpu"), fresh())
    assert (layout.q_len, layout.block_q) == (130, 64)
    ragged = Case("local", 130, 1, 2, 16, "float32", 64, tiles=2).layout(torch.device("cpu"), fresh())
    assert torch.equal(ragged.to_dense()[129], torch.arange(130) >= 64)
