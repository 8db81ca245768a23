"""Coverage and description of a layout, against the dense matrix written out."""

from __future__ import annotations

import pytest
import torch

from sparsetile.errors import ArgumentError
from sparsetile.facts import coverage, describe
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Causal, Global, Local


def random_mask(q_len: int, k_len: int, block: tuple[int, int]) -> torch.Tensor:
    """Whole tiles, empty tiles, ragged tiles and an empty row of tiles, all at random."""
    seed = torch.seed()
    print(f"torch.manual_seed({seed})")
    tiles = torch.randint(0, 3, (-(-q_len // block[0]), -(-k_len // block[1])))
    if len(tiles) > 2:
        tiles[torch.randint(len(tiles), ())] = 0
    spread = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:q_len, :k_len]
    return (spread == 2) | ((spread == 1) & (torch.rand(q_len, k_len) < 0.3))


def whole_tiles(mask: torch.Tensor, block_q: int, block_k: int) -> torch.Tensor:
    """bool like ``mask``: pairs in tiles that lie inside the sequence and keep every pair."""
    whole = torch.zeros_like(mask)
    for top in range(0, mask.shape[0], block_q):
        for left in range(0, mask.shape[1], block_k):
            tile = mask[top : top + block_q, left : left + block_k]
            whole[top : top + block_q, left : left + block_k] = tile.all() & (
                tile.shape == (block_q, block_k)
            )
    return whole


SIZES = [
    # q_len, k_len, block, grid
    (100, 100, (16, 16), (64, 64)),  # cells smaller than tiles
    (300, 200, (32, 32), (5, 3)),  # several tiles a cell
    (70, 700, (16, 64), (9, 6)),  # smaller down, larger across
    (257, 129, (128, 32), (2, 200)),
    (1, 1, (16, 16), (8, 8)),
]


@pytest.mark.parametrize(("q_len", "k_len", "block", "grid"), SIZES)
def test_coverage_is_the_share_of_pairs(q_len, k_len, block, grid):
    mask = random_mask(q_len, k_len, block)
    seen = coverage(BlockLayout.from_dense_mask(mask, block), *grid)
    whole = whole_tiles(mask, *block)
    assert seen.full.shape[0] <= grid[0] and seen.full.shape[1] <= grid[1]
    for y in range(seen.full.shape[0]):
        for x in range(seen.full.shape[1]):
            cell = (
                slice(y * seen.cell_q, (y + 1) * seen.cell_q),
                slice(x * seen.cell_k, (x + 1) * seen.cell_k),
            )
            kept, full = mask[cell].double().mean(), whole[cell].double().mean()
            torch.testing.assert_close(seen.full[y, x], full)
            torch.testing.assert_close(seen.full[y, x] + seen.partial[y, x], kept)


@pytest.mark.parametrize(("q_len", "k_len", "block", "grid"), SIZES)
def test_description_counts_the_dense_matrix(q_len, k_len, block, grid):
    mask = random_mask(q_len, k_len, block)
    layout = BlockLayout.from_dense_mask(mask, block)
    about = describe(layout)
    assert about.pairs == int(mask.sum())
    assert about.tiles == layout.nnz
    assert about.density == pytest.approx(layout.density)
    assert about.tiles - about.partial == int(whole_tiles(mask, *block).sum()) // (block[0] * block[1])
    counts = layout.row_counts()
    assert (about.row_min, about.row_max) == (int(counts.min()), int(counts.max()))
    assert about.empty_queries == bool((~mask.any(1)).any())
    distance = torch.arange(q_len)[:, None] + k_len - q_len - torch.arange(k_len)
    if mask.any():
        assert about.back == int(distance[mask].max())
        assert about.ahead == int((-distance)[mask].max())
    else:
        assert about.back is None and about.ahead is None
    assert about.nbytes == layout.nbytes
    assert about.flops(8) == 4 * 8 * about.tiles * block[0] * block[1]


def test_nothing_kept():
    layout = BlockLayout.from_dense_mask(torch.zeros(40, 40, dtype=torch.bool), 16)
    about = describe(layout)
    assert (about.tiles, about.pairs, about.masks, about.back, about.ahead) == (0, 0, 0, None, None)
    assert about.empty_queries
    assert float(coverage(layout, 4, 4).full.sum()) == 0


def test_causal_density_only_where_no_key_lies_ahead():
    causal = BlockLayout.from_pattern((Local(20) | Global(3)) & Causal(), q_len=100, block_size=16)
    assert describe(causal).causal_density == causal.causal_density
    assert describe(BlockLayout.from_pattern(Local(20), q_len=100, block_size=16)).causal_density is None


def test_heads_and_batch_elements_are_told_apart():
    torch.manual_seed(seed := torch.seed())
    print(f"seed {seed}")
    mask = torch.rand(2, 3, 50, 50) < 0.1
    layout = BlockLayout.from_dense_mask(mask, 16)
    for b in range(2):
        for h in range(3):
            assert describe(layout, batch=b, head=h).pairs == int(mask[b, h].sum())
    with pytest.raises(ArgumentError, match="head: expected a number from 0 to 2"):
        describe(layout, head=3)
    with pytest.raises(ArgumentError, match="batch"):
        coverage(layout, 4, 4, batch=-1)
    with pytest.raises(ArgumentError, match="at least 1 × 1"):
        coverage(layout, 0, 4)
