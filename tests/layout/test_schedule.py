"""Schedules: every tile is done once, by an item of bounded length, whole tiles before partial ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from oracle import random_mask
from sparsetile.errors import LayoutError
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.schedule import HOST_KNOWN, Direction, Schedule, chunk_for, schedule

BLOCK = 16


def random_layout(batch: int = 1, heads: int = 1) -> tuple[BlockLayout, int]:
    seed = random.SystemRandom().getrandbits(32)
    gen = random.Random(seed)
    q_len, k_len = gen.randint(1, 200), gen.randint(1, 200)
    return BlockLayout.from_dense_mask(random_mask(gen, batch, heads, q_len, k_len, BLOCK), BLOCK), seed


def learned_layout() -> tuple[BlockLayout, int]:
    """Of learned indices: ragged ends, oblong blocks, empty rows and unused entries among them."""
    seed = random.SystemRandom().getrandbits(32)
    gen = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    q_len, k_len = gen.randint(1, 300), gen.randint(1, 300)
    blocks = gen.choice([16, 32]), gen.choice([16, 32])
    if gen.random() < 0.3:  # whole tiles alone
        q_len, k_len = -(-q_len // 32) * 32, -(-k_len // 32) * 32
    shape = (gen.randint(1, 2), gen.randint(1, 3), -(-q_len // blocks[0]), gen.randint(1, 7))
    chosen = torch.randint(-1, -(-k_len // blocks[1]), shape, generator=generator)
    return BlockLayout.from_topk(chosen, q_len, k_len, blocks, gen.random() < 0.5), seed


def without_counts(layout: BlockLayout, spare: int) -> BlockLayout:
    """The same tiles as a layout made on the device holds them: unused entries, no counts on the host."""
    tail = torch.full((spare,), -12345, dtype=torch.int32)
    indices, mask_ids = (torch.cat((x, tail)) for x in (layout.indices, layout.mask_ids))
    shape = (layout.q_len, layout.k_len, layout.block_q, layout.block_k, layout.batch, layout.heads)
    return BlockLayout(layout.indptr, indices, mask_ids, layout.masks, *shape)


def tiles_done(layout: BlockLayout, made: Schedule, direction: Direction) -> list[tuple[int, int]]:
    """(row, position in ``layout.indices``) of every entry of every item; checks each item on the way."""
    indptr = layout.indptr if direction == "rows" else layout.t_indptr
    done = []
    for row, start, full_end, end, _, first in made.items.T.tolist():
        if row < 0:
            continue
        assert indptr[row] <= start <= full_end <= end <= indptr[row + 1]
        assert first == (made.others[start] if start < end else 0)
        assert (made.mask_ids[start:full_end] < 0).all() if made.partial else full_end == end
        assert (made.mask_ids[full_end:end] >= 0).all()
        edges = made.edges[start:end].tolist() if made.edges.numel() else range(start, end)
        done += [(row, edge) for edge in edges]
    return done


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("on_device", [False, True])
def test_every_tile_is_done_once(
    direction: Direction, batch: int, heads: int, chunk: int, on_device: bool
) -> None:
    layout, seed = random_layout(batch, heads)
    tiles = layout.capacity
    if on_device:
        layout = without_counts(layout, spare=random.Random(seed).randint(0, 40))
    made = schedule(layout, direction, chunk)
    done = tiles_done(layout, made, direction)
    assert sorted(edge for _, edge in done) == list(range(tiles)), seed
    for row, edge in done:
        if direction == "rows":
            assert layout.indptr[row] <= edge < layout.indptr[row + 1], seed
        else:
            assert layout.indices[edge] == row % layout.k_blocks, seed
    lengths = made.items[3] - made.items[1]
    assert (lengths <= chunk).all(), seed
    rows = made.items[0][made.items[0] >= 0]
    indptr = layout.indptr if direction == "rows" else layout.t_indptr
    assert set(rows.tolist()) == set(range(indptr.numel() - 1))


@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_others_and_masks_follow_the_edges(direction: Direction) -> None:
    layout, seed = random_layout(2, 2)
    made = schedule(layout, direction, 2)
    edges = made.edges.long() if made.edges.numel() else torch.arange(layout.capacity)
    assert torch.equal(made.mask_ids, layout.mask_ids[edges]), seed
    if direction == "rows":
        assert torch.equal(made.others, layout.indices[edges]), seed
    else:
        row = torch.searchsorted(layout.indptr.long(), edges, right=True) - 1
        assert torch.equal(made.others.long(), row % layout.q_blocks), seed


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_learned_layouts(direction: Direction, chunk: int) -> None:
    """Every tile once, as the general way has it, which knows nothing of where the layout came from."""
    for _ in range(6):
        layout, seed = learned_layout()
        made, general = (
            schedule(x, direction, chunk) for x in (layout, replace(layout, row_bound=None, _memo={}))
        )
        done = tiles_done(layout, made, direction)
        assert sorted(edge for _, edge in done) == list(range(layout.nnz)), seed
        assert sorted(done) == sorted(tiles_done(layout, general, direction)), seed
        if direction == "columns":
            assert torch.equal(made.items, general.items), seed
            continue
        without_slots = [0, 1, 2, 3, 5]
        items = [sorted(x.items[without_slots].T.tolist()) for x in (made, general)]
        assert items[0] == items[1], seed
        for name in ("others", "mask_ids"):
            assert torch.equal(*(getattr(x, name)[: layout.nnz] for x in (made, general))), (name, seed)


def test_rows_that_fit_an_item_stay_as_they_lie() -> None:
    layout, seed = learned_layout()
    made = schedule(layout, "rows", 7)
    assert made.others is layout.indices and made.mask_ids is layout.mask_ids, seed
    assert made.edges.numel() == made.splits.shape[1] == made.slots == made.long_items == 0, seed
    assert torch.equal(made.items[0], torch.arange(layout.indptr.numel() - 1, dtype=torch.int32)), seed
    assert "transpose" not in layout._memo, seed
    # Where a graph passed the tensors on, all of it follows from them.
    again = schedule(replace(layout, _memo={}), "rows", 7)
    for name, tensor in made.tensors()._asdict().items():
        assert torch.equal(getattr(again, name), tensor), (name, seed)


@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_whole_tiles_come_first_in_ascending_order(direction: Direction) -> None:
    layout, seed = learned_layout()
    made = schedule(layout, direction, 3)
    for row, start, full_end, end, _, _ in made.items.T.tolist():
        for part in (made.others[start:full_end], made.others[full_end:end]):
            assert row < 0 or (part.diff() > 0).all(), seed


@pytest.mark.parametrize("on_device", [False, True])
def test_slots_and_splits_agree(on_device: bool) -> None:
    layout, seed = random_layout(1, 3)
    if on_device:
        layout = without_counts(layout, spare=5)
    made = schedule(layout, "rows", 2)
    of_row: dict[int, list[int]] = {}
    for row, _, _, _, slot, _ in made.items.T.tolist():
        if slot >= 0:
            of_row.setdefault(row, []).append(slot)
    listed = {row: list(range(first, first + count)) for row, first, count in made.splits.T.tolist() if count}
    assert {row: sorted(slots) for row, slots in of_row.items()} == listed, seed
    used = sorted(slot for slots in of_row.values() for slot in slots)
    assert used == list(range(len(used))) and len(used) <= made.slots, seed
    whole = [row for row, _, _, _, slot, _ in made.items.T.tolist() if row >= 0 and slot < 0]
    assert len(whole) == len(set(whole)) and not set(whole) & set(of_row), seed


def test_only_layouts_with_host_counts_are_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without host counts nothing is read back; the bound pads with empty items at the end."""
    layout = BlockLayout.from_dense_mask(torch.ones(160, 160, dtype=torch.bool), BLOCK)
    assert schedule(layout, "rows", 4).items.shape[1] == 30
    unknown = without_counts(layout, spare=0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a host sync"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a host sync"))
    fields = [torch.empty_like(tensor, device="meta") for tensor in unknown.operands()]
    shape = (layout.q_len, layout.k_len, layout.block_q, layout.block_k)
    bound = schedule(BlockLayout(*fields, *shape), "rows", 4)
    assert schedule(BlockLayout(*fields, *shape), "columns", 4).items.shape == bound.items.shape
    assert bound.items.shape == (6, 10 + 100 // 4) and bound.slots >= 30
    assert not BlockLayout(*fields, *shape)._memo.get(HOST_KNOWN)


def test_long_items_come_first_and_heads_stay_together() -> None:
    rows = torch.zeros(2, 12, 40, dtype=torch.bool)
    rows[..., :2] = True
    rows[0, 5] = True
    rows[1, 7, :9] = True
    layout = BlockLayout.from_block_mask(rows, 12 * BLOCK, 40 * BLOCK, BLOCK)
    order: Tensor = schedule(layout, "rows", 8).items
    heads = (order[0] // 12).tolist()
    assert heads == sorted(heads)
    assert order[0, :5].tolist() == [5] * 5
    assert set(order[0, heads.index(1) : heads.index(1) + 2].tolist()) == {12 + 7}
    rest = order[0, 5 : heads.index(1)].tolist()
    assert rest == sorted(rest)
    assert schedule(layout, "rows", 8).long_items == 0
    shared = BlockLayout.from_block_mask(rows[0], 12 * BLOCK, 40 * BLOCK, BLOCK)
    made = schedule(shared, "rows", 8)
    assert made.long_items == made.slots == 5


def test_memo_and_bad_chunk() -> None:
    layout, _ = random_layout()
    assert schedule(layout, "rows", 4) is schedule(layout, "rows", 4)
    assert schedule(layout, "rows", 4) is not schedule(layout, "columns", 4)
    assert [tensor.shape for tensor in schedule(layout, "rows", 4).tensors()]
    with pytest.raises(LayoutError, match="at least 1 tile"):
        schedule(layout, "rows", 0)


def test_layouts_of_whole_tiles_share_their_tensors() -> None:
    layout = BlockLayout.from_block_mask(torch.ones(4, 4, dtype=torch.bool), 4 * BLOCK, block_size=BLOCK)
    rows, columns = schedule(layout, "rows", 4), schedule(layout, "columns", 4)
    assert rows.others is layout.indices and rows.edges.numel() == 0
    assert columns.others is layout.t_indices and columns.edges is layout.t_edges


def test_no_tiles_at_all() -> None:
    layout = BlockLayout.from_dense_mask(torch.zeros(40, 50, dtype=torch.bool), BLOCK)
    made = schedule(layout, "columns", 8)
    assert (made.items[3] == made.items[1]).all() and made.items.shape[1] == 4


def test_chunk_bounds() -> None:
    layout = BlockLayout.from_block_mask(torch.ones(64, 64, dtype=torch.bool), 64 * BLOCK, block_size=BLOCK)
    assert chunk_for(layout, 1, 132, items_per_processor=8, at_least=16) == 16
    chunk = chunk_for(layout, 64, 132, items_per_processor=8, at_least=16)
    assert 4096 * 64 // (132 * 8) <= chunk <= 2 * 4096 * 64 // (132 * 8)
