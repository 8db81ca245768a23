"""Layouts of learned indices by kernels against PyTorch's; in the interpreter if there is no GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsetile.adaptive import places
from sparsetile.adaptive.places import Places
from sparsetile.layout import BlockLayout
from sparsetile.layout.schedule import schedule
from sparsetile.layout.topk import Sizes, in_order, topk_tensors

pytest.importorskip("triton")

from sparsetile.kernels import triton_layout
from sparsetile.kernels.triton_layout import chosen_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def selection(shape: tuple[int, int, int, int], k_blocks: int, used: float, generator: Any) -> Tensor:
    """Distinct key blocks in any order, with −1 between them; so many of the places are used."""
    batch, groups, nq, k = shape
    ranked = torch.rand(batch, groups, nq, max(k_blocks, k), generator=generator).argsort(-1)[..., :k]
    ranked = ranked.masked_fill(torch.rand(shape, generator=generator) >= used, -1)
    # Some rows have nothing at all, and more blocks than there are is a place not used.
    ranked = ranked.masked_fill(torch.rand((batch, groups, nq, 1), generator=generator) < 0.1, -1)
    return ranked.masked_fill(ranked >= k_blocks, -1)


def assert_same(given: Tensor, share: int, sizes: Sizes, note: str) -> BlockLayout:
    chosen, made = chosen_tensors(given.to(DEVICE), share, sizes)
    wanted = in_order(given, sizes)
    expected = topk_tensors(wanted, share, sizes)
    assert chosen.column.dtype == torch.int64
    assert torch.equal(chosen.column.cpu(), wanted.column.long()), note
    assert chosen.valid.dtype == torch.bool and torch.equal(chosen.valid.cpu(), wanted.valid), note
    for name in ("indptr", "indices", "mask_ids", "masks", "slot"):
        got, want = getattr(made, name), getattr(expected, name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape), (name, note)
        assert torch.equal(got.cpu(), want), (name, note)
    layout, same = BlockLayout.from_chosen(made, sizes), BlockLayout.from_chosen(expected, sizes)
    rows, want_rows = (schedule(x, "rows", given.shape[3]) for x in (layout, same))
    assert rows.items is made.items and expected.items is None
    assert rows.items.dtype == want_rows.items.dtype
    assert torch.equal(rows.items.cpu(), want_rows.items), note
    layout.validate()
    return layout


@pytest.mark.parametrize("trial", range(60))
def test_tensors_are_those_of_pytorch(trial: int) -> None:
    seed = random.SystemRandom().getrandbits(32)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block_q, block_k = (draw.choice((16, 32, 64, 128)) for _ in range(2))
    if draw.random() < 0.6:
        block_k = block_q
    is_causal = draw.random() < 0.6
    k_len = draw.randint(1, 12 * block_k)
    q_len = draw.choice((k_len, draw.randint(1, 8 * block_q), 8 * block_q, k_len + draw.randint(0, 40)))
    if draw.random() < 0.3:
        q_len, k_len = block_q * draw.randint(1, 8), block_k * draw.randint(1, 12)
    sizes = Sizes(q_len, k_len, block_q, block_k, is_causal)
    k = draw.choice((1, 2, draw.randint(1, 12), draw.randint(1, 40)))
    shape = (draw.randint(1, 3), draw.randint(1, 3), sizes.q_blocks, k)
    share = draw.randint(1, 4)
    note = f"seed {seed}: {sizes} {shape} share {share}"
    given = selection(shape, sizes.k_blocks, draw.choice((1.0, 0.7, 0.2)), generator)
    given = given.to(draw.choice((torch.int32, torch.int64)))
    assert_same(given, share, sizes, note)


@pytest.mark.parametrize("k", [1, 3, 127, 128, 129, 200, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_rows(k: int, is_causal: bool) -> None:
    seed = random.SystemRandom().getrandbits(32)
    generator = torch.Generator().manual_seed(seed)
    sizes = Sizes(300, 270 * 16 - 5, 64, 16, is_causal)
    given = selection((1, 2, sizes.q_blocks, k), sizes.k_blocks, 0.8, generator).int()
    layout = assert_same(given, 2, sizes, f"seed {seed}")
    counts = layout.row_counts().view(2, 2, -1)
    assert torch.equal(counts[:, 0], counts[:, 1]) and int(counts.max()) > 0.6 * k


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_chosen(is_causal: bool) -> None:
    sizes = Sizes(100, 130, 16, 16, is_causal)
    layout = assert_same(torch.full((2, 1, 7, 5), -1, dtype=torch.int32), 3, sizes, "")
    assert layout.nnz == 0 and not layout.to_dense().any()


def test_queries_before_all_keys() -> None:
    """More queries than keys: the first rows of a causal call see none, whatever was chosen for them."""
    sizes = Sizes(200, 40, 16, 16, True)
    given = torch.arange(3, dtype=torch.int32).expand(1, 1, 13, 3)
    layout = assert_same(given, 1, sizes, "")
    assert layout.row_counts().tolist() == [0] * 10 + [1, 2, 3]


def test_row_starts_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As past 2³¹ places, which no test can have."""
    seed = random.SystemRandom().getrandbits(32)
    generator = torch.Generator().manual_seed(seed)
    sizes = Sizes(200, 300, 32, 32, True)
    given = selection((2, 2, 7, 5), 10, 0.7, generator).int()
    _, narrow = chosen_tensors(given.to(DEVICE), 2, sizes)
    monkeypatch.setattr(triton_layout, "_INT32", 0)
    _, wide = chosen_tensors(given.to(DEVICE), 2, sizes)
    assert wide.indptr.dtype == wide.items.dtype == torch.int64
    for name in ("indptr", "indices", "mask_ids", "masks", "slot", "items"):
        assert torch.equal(getattr(wide, name), getattr(narrow, name).to(getattr(wide, name).dtype)), seed


def test_blocks_past_the_end_are_dropped() -> None:
    sizes = Sizes(32, 40, 16, 16, False)
    given = torch.tensor([[2, 3, 0], [7, -5, 1]], dtype=torch.int32).view(1, 1, 2, 3)
    assert_same(given, 1, sizes, "")


def test_places_are_made_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who chooses between the two, and values of places after either."""
    seed = random.SystemRandom().getrandbits(32)
    generator = torch.Generator().manual_seed(seed)
    given = selection((2, 2, 6, 5), 10, 0.7, generator).int().to(DEVICE)
    monkeypatch.setattr(places, "_in_kernels", lambda indices: False)
    expected = Places.of(given, 4, 90, 150, 16, True)
    monkeypatch.setattr(places, "_in_kernels", lambda indices: True)
    got = Places.of(given, 4, 90, 150, 16, True)
    assert got.column.dtype == expected.column.dtype == torch.int64
    for name in ("column", "valid", "slot"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), (name, seed)
    for name, tensor in got.layout.tensors()._asdict().items():
        assert torch.equal(tensor, getattr(expected.layout, name)), (name, seed)
    assert got.layout.geometry == expected.layout.geometry
    values = torch.randn(given.shape, device=DEVICE)
    assert torch.equal(got.to_edges(values), expected.to_edges(values))


def test_who_is_served() -> None:
    given = torch.zeros((1, 1, 2, 4), dtype=torch.int32)
    assert not places._in_kernels(given)
    assert places._in_kernels(given.to(DEVICE)) == (DEVICE == "cuda")
    assert not places._in_kernels(given.repeat(1, 1, 1, 65).to(DEVICE))
    with FakeTensorMode():
        fake = torch.zeros((1, 1, 2, 4), dtype=torch.int32, device="cuda")
        assert fake.is_cuda and not places._in_kernels(fake)
