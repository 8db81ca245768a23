"""Budgets against their orders of preference; requested against realised density; reach through layers."""

from __future__ import annotations

import copy
import math
import pickle
import random

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from pattern_draws import HEADS, Case, budget, pattern, runs
from sparsetile.errors import PatternError
from sparsetile.layout import BlockLayout
from sparsetile.patterns import Budget, Causal, Dilated, Global, Local, parse_pattern, preference
from sparsetile.patterns.budget import KINDS, density_report
from sparsetile.patterns.config import SparsePatternConfig

RATIOS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)


def nearest(own: int, end: int) -> list[int]:
    return sorted(range(end), key=lambda tile: (abs(tile - own), tile > own))


def around(tiles: list[int], own: int) -> list[int]:
    begin = len(tiles) * (own * 0x9E3779B1 % 2**32) >> 32
    return tiles[begin:] + tiles[:begin]


def log_spaced(own: int, end: int) -> list[int]:
    ahead = around([own + 2**j for j in range(1, 40) if own + 2**j < end], own)
    back = around([own - 2**j for j in range(1, 40) if own - 2**j > 0], own)
    out = []
    for turn in range(40):
        out += ahead[turn : turn + 1] + back[turn : turn + 1]
    return out[:1] + ([own - 1] if own > 1 and own + 1 < end else []) + out[1:]


def branch_tiles(own: int, end: int, block: int, segment: int, rate: int) -> list[int]:
    def segments(tile: int) -> set[int]:
        return set(range(tile * block // segment, (tile * block + block - 1) // segment + 1))

    mine = segments(own)
    return [c for c in nearest(own, end) if c != own and (c - own) % rate == 0 and mine & segments(c)]


def kept(made: Budget, block: int, k_len: int, position: int) -> set[int]:
    """The tiles of one query, by the words of the documentation."""
    k_blocks = math.ceil(k_len / block)
    own = min(max(position // block, 0), k_blocks - 1)
    end = own + 1 if made.causal else k_blocks
    count = max(1, math.floor(made.density * end + 0.5))
    order = [own]
    if made.kind == "dilated_sparse":
        lists = [
            branch_tiles(own, end, block, w, r)
            for w, r in zip(made.segment_lengths, made.dilation_rates, strict=True)
        ]
        for turn in range(end):
            for tiles in lists:
                order += tiles[turn : turn + 1]
        return set(list(dict.fromkeys(order))[:count])
    sinks = min(math.ceil((made.global_tokens or 0) / block), end)
    if made.kind == "ultra_sparse":
        beside = own + 1 if own + 1 < end else own - 1
        far = log_spaced(own, end)
        order += [0, *([beside] if beside >= 0 else []), *far[:1], *range(sinks), *far[1:]]
        count = max(count, min(4, end))
    elif made.kind == "global_local":
        order += range(sinks)
    return set(list(dict.fromkeys(order + nearest(own, end)))[:count])


def random_budget(gen: random.Random, kind: str, causal: bool, block: int) -> Budget:
    density = gen.choice((1.0, 0.5, 0.25, 0.1, 0.01, gen.random()))
    if kind == "dilated_sparse":
        lengths = [gen.randint(1, gen.choice((4, 20, 60)) * block) for _ in range(gen.randint(1, 3))]
        rates = tuple(gen.randint(1, min(6, length)) for length in lengths)
        return Budget(kind, density, causal, None, tuple(lengths), rates)
    sinks = (
        gen.choice((0, 1, block, block + 1, 5 * block)) if kind in ("global_local", "ultra_sparse") else None
    )
    return Budget(kind, density, causal, sinks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_preference(kind, causal):
    seed = random.SystemRandom().getrandbits(32)
    gen = random.Random(seed)
    for _ in range(40):
        block = gen.choice((16, 32, 64, 128))
        made = random_budget(gen, kind, causal, block)
        k_len = gen.randint(1, 40) * block - gen.randint(0, block - 1)
        resolved = made.resolve(block, block, gen.randint(-99, 99), k_len)
        tiles = range(-2, k_len // block + 4)
        # A query and a key somewhere in each tile, those outside of the keys included.
        q = torch.tensor([tile * block + gen.randrange(block) for tile in tiles])
        k = torch.tensor([tile * block + gen.randrange(block) for tile in tiles])
        got = resolved.allows(q[:, None], k)
        for row, position in enumerate(q.tolist()):
            mine = kept(made, block, k_len, position)
            assert got[row].tolist() == [tile in mine for tile in tiles], (seed, resolved, position)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_any_lengths(kind, causal):
    """Queries that start in the middle of a tile, before the keys, or both."""
    seed = random.SystemRandom().getrandbits(32)
    gen = random.Random(seed)
    for _ in range(12):
        block = gen.choice((16, 16, 32))
        made = random_budget(gen, kind, causal, block)
        made = made & Causal() if causal and gen.random() < 0.5 else made
        k_len = gen.randint(1, 30 * block)
        q_len = gen.choice((k_len, 1, gen.randint(1, k_len), gen.randint(k_len, 2 * k_len)))
        layout = BlockLayout.from_pattern(made, q_len, k_len, block)
        layout.validate()
        drawn = Case(made, q_len, k_len, block, block)
        assert torch.equal(layout.to_dense(), drawn.dense()), (seed, drawn)


@pytest.mark.parametrize("blocks", [(64, 16), (128, 16), (16, 64), (32, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_resolved_for_other_tiles_than_the_layout_has(kind, blocks):
    seed = random.SystemRandom().getrandbits(32)
    gen = random.Random(seed)
    for _ in range(6):
        k_len, q_len = gen.randint(1, 600), gen.randint(1, 600)
        made = random_budget(gen, kind, gen.random() < 0.5, 16).resolve(16, 16, 0, k_len)
        layout = BlockLayout.from_pattern(made, q_len, k_len, blocks)
        drawn = Case(made, q_len, k_len, *blocks)
        assert torch.equal(layout.to_dense(), drawn.dense()), (seed, drawn)


@runs(120)
@given(st.data(), st.sampled_from([16, 16, 32, 64, 128]), st.sampled_from("ab&|r="))
def test_layouts_are_their_budgets(data, block, how):
    """Alone, united, intersected, rounded, and resolved for other tiles than the layout's."""
    length = st.integers(1, 40 * block if block < 64 else 900)
    k_len = data.draw(length)
    q_len = data.draw(st.just(k_len) | length)
    made = data.draw(budget())
    blocks = (block, block)
    if how in "&|":
        other = data.draw(pattern(k_len, block))
        made = made & other if how == "&" else made | other
    elif how == "r":
        made = (made & Local(data.draw(st.integers(0, 200)))).block_aligned()
    elif how == "=":
        made = made.resolve(block, block, k_len - q_len, k_len)
        blocks = data.draw(st.tuples(*[st.sampled_from([16, 32, 64])] * 2))
    elif how == "b":
        made = made & Causal()
    drawn = Case(made, q_len, k_len, *blocks)
    note(repr(drawn))
    layout = BlockLayout.from_pattern(made, q_len, k_len, blocks, heads=HEADS)
    layout.validate()
    for head in range(layout.heads):
        assert torch.equal(layout.to_dense(head), drawn.dense(head))


# -- requested density is realised density --------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 100, 2048, 20_000])
def test_requested_is_realised(kind, is_causal, length):
    block, tiles = 16, math.ceil(length / 16)
    own = torch.arange(tiles)
    every = own + 1 if is_causal else torch.full_like(own, tiles)
    seen = {}
    for ratio in RATIOS:
        config = SparsePatternConfig(kind, ratio, block)
        # Two branches that between them hold every tile.
        made = config.pattern(is_causal, (1 << 20, 1 << 20), (1, 3))
        layout = BlockLayout.from_pattern(made, length, block_size=block)
        wanted = torch.tensor([max(1, math.floor(ratio * n + 0.5)) for n in every.tolist()])
        counts = layout.row_counts().long()
        report = density_report(config, layout, is_causal)
        row, col = layout.rows_and_columns()
        assert torch.equal(row[row == col], own), "the own tile of each row, once"
        assert report.requested == ratio
        assert report.realised == pytest.approx(layout.nnz / int(every.sum()))
        difference = (counts - wanted).abs()
        if kind == "ultra_sparse":
            assert torch.equal(counts, torch.maximum(wanted, every.clamp(max=4)))
        else:
            assert torch.equal(counts, wanted)
        assert (report.reason is not None) == (int(difference.max()) > 1)
        if report.reason:
            assert "at least 4 tiles" in report.reason
        seen[ratio] = (tuple(counts.tolist()), layout.indices.tolist())
        if ratio == 1.0:
            assert layout.nnz == int(every.sum())
    if length == 20_000:
        assert len({str(value) for value in seen.values()}) == len(RATIOS)


def test_why_a_row_ends_early():
    config = SparsePatternConfig("dilated_sparse", 0.5, 16)
    layout = BlockLayout.from_pattern(config.pattern(False, (256,), (2,)), 1024, block_size=16)
    # Eight of the 16 tiles of a segment, although 32 were asked for.
    assert layout.row_counts().unique().tolist() == [8]
    report = density_report(config, layout)
    assert report.realised == 8 / 64 and "segments hold no more tiles" in report.reason
    assert density_report(config, BlockLayout.from_pattern(config.pattern(), 1024, block_size=16)) == (
        0.5,
        0.5,
        None,
    )


def test_why_rows_span_two_rows():
    config = SparsePatternConfig("local_window", 0.2, 16)
    layout = BlockLayout.from_pattern(config.pattern(True), 300, 1000, 16)
    # One tile more is what a window needs; log-spaced tiles are others in each row.
    assert density_report(config, layout, True).reason is None
    config = SparsePatternConfig("ultra_sparse", 0.2, 16)
    layout = BlockLayout.from_pattern(config.pattern(True), 300, 1000, 16)
    assert "700 is no multiple of 16" in density_report(config, layout, True).reason


def test_a_layout_of_another_pattern_and_no_request():
    layout = BlockLayout.from_pattern(Local(100) & Causal(), 1000, block_size=16)
    assert "another pattern" in density_report(SparsePatternConfig("local_window", 0.5, 16), layout).reason
    dense = density_report(SparsePatternConfig("local_window", 0.001, 16), layout)
    assert "7 tiles more" in dense.reason and "no multiple" not in dense.reason
    report = density_report(SparsePatternConfig(Local(100)), layout, True)
    assert report == (None, layout.causal_density, None)
    # Rows before the first key ask for nothing.
    config = SparsePatternConfig("global_local", 0.1, 16)
    empty = BlockLayout.from_pattern(config.pattern(True), 640, 320, 16)
    assert density_report(config, empty, True).reason is None
    assert int(empty.row_counts()[:20].sum()) == 0


def test_shares_of_branches():
    """Each branch reaches as far as its rate takes it, and passes on what its segment does not hold."""
    made = Budget("dilated_sparse", 13 / 128, False, None, (2048, 2048), (1, 4))
    layout = BlockLayout.from_pattern(made, 2048, block_size=16)
    mine = layout.indices[layout.indptr[64] : layout.indptr[65]].tolist()
    # Turns: −1 −4 +1 +4 −2 −8 +2 +8 −3 −12 +3 +12: twelve beside the own tile.
    assert [c - 64 for c in mine] == [-12, -8, -4, -3, -2, -1, 0, 1, 2, 3, 4, 8, 12]
    made = Budget("dilated_sparse", 13 / 128, False, None, (64, 2048), (1, 4))
    layout = BlockLayout.from_pattern(made, 2048, block_size=16)
    mine = layout.indices[layout.indptr[64] : layout.indptr[65]].tolist()
    assert [c - 64 for c in mine] == [-20, -16, -12, -8, -4, 0, 1, 2, 3, 4, 8, 12, 16]
    assert all(
        not torch.equal(layout.indptr, other.indptr) or not torch.equal(layout.indices, other.indices)
        for other in (
            BlockLayout.from_pattern(Budget("dilated_sparse", 13 / 128, False, None, w, r), 2048, None, 16)
            for w, r in (((128, 2048), (1, 4)), ((64, 2048), (2, 4)), ((64, 2048), (1, 5)), ((64,), (1,)))
        )
    )


def test_causal_rows_do_not_depend_on_the_length():
    for kind in KINDS:
        branches = ((512, 1024), (1, 2)) if kind == "dilated_sparse" else (None, None)
        made = Budget(kind, 0.1, True, None, *branches) & Causal()
        longer = BlockLayout.from_pattern(made, 1600, block_size=16).to_dense()
        shorter = BlockLayout.from_pattern(made, 1000, block_size=16).to_dense()
        last = BlockLayout.from_pattern(made, 1, 1000, 16).to_dense()
        assert torch.equal(shorter, longer[:1000, :1000]) and torch.equal(last, shorter[-1:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["dilated_sparse", "ultra_sparse"])
def test_rows_in_parts_are_the_rows_at_once(monkeypatch, kind, causal):
    """Long sequences are worked through a part of the rows at a time, with lists of different lengths."""
    seed = random.SystemRandom().getrandbits(32)
    gen = random.Random(seed)
    for _ in range(10):
        k_len = gen.randint(300, 1500)
        made = random_budget(gen, kind, causal, 16).resolve(16, 16, 0, k_len)
        own = torch.arange(math.ceil(k_len / 16))
        whole = made._kept(own)
        with monkeypatch.context() as patch:
            patch.setattr(preference, "_ENTRIES_AT_A_TIME", gen.choice([1, 50, 300]))
            parts = made._kept(own)
        tile = torch.arange(-1, len(own) + 1)
        place = own[:, None].expand(-1, len(tile))
        held = whole.pick(place).holds(tile)
        assert torch.equal(parts.pick(place).holds(tile), held), (seed, made)
        # The ranges hold those tiles and no others.
        lo, hi = (x[:, :, None] for x in parts.spans())
        assert torch.equal(((lo <= tile) & (tile < hi)).any(1), held), (seed, made)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_tokens(kind, causal):
    branches = ((1 << 15, 1 << 17, 1 << 20), (1, 4, 16)) if kind == "dilated_sparse" else (None, None)
    layout = BlockLayout.from_pattern(Budget(kind, 0.01, causal, None, *branches), 1 << 20)
    own = torch.arange(8192)
    every = own + 1 if causal else torch.full_like(own, 8192)
    wanted = (every * 0.01 + 0.5).floor().long().clamp(min=4 if kind == "ultra_sparse" else 1)
    assert torch.equal(layout.row_counts().long(), torch.minimum(wanted, every))
    assert layout.masks.shape[0] == 0


# -- reach ----------------------------------------------------------------------------------------------


def bound(tiles: int) -> float:
    """Layers within which the smallest budget of ultra_sparse connects any two of so many tiles."""
    return 2 * math.log2(tiles) + 2


def smallest(tiles: int, causal: bool, block: int) -> BlockLayout:
    made = Budget("ultra_sparse", 1e-9, causal)
    layout = BlockLayout.from_pattern(made, tiles * block, block_size=block)
    assert int(layout.row_counts().max()) == min(4, tiles)
    return layout


def neighbours(indptr: torch.Tensor, indices: torch.Tensor) -> list[torch.Tensor]:
    """The n-th entry of every row (its last one, where it has fewer)."""
    count, starts = indptr.diff().long(), indptr[:-1].long()
    most = int(count.max())
    return [indices[starts + torch.minimum(count - 1, torch.tensor(n))].long() for n in range(most)]


def layers_for_all_pairs(layout: BlockLayout, causal: bool, most: float) -> int:
    """Layers after which every tile has seen all that it may, at most ``most``; the seen ones are bits."""
    tiles = layout.q_blocks
    read = neighbours(layout.indptr, layout.indices)
    own, first = torch.arange(tiles), torch.arange(0, tiles, 62)
    seen = torch.zeros((tiles, len(first)), dtype=torch.int64)
    seen[own, own // 62] = 1 << own % 62
    end = own + 1 if causal else torch.full_like(own, tiles)
    wanted = (1 << (end[:, None] - first).clamp(0, 62)) - 1
    layers = 0
    while not torch.equal(seen, wanted):
        layers += 1
        assert layers <= most, "some pair is not connected"
        before = seen.clone()
        for each in read:
            seen |= before[each]
    return layers


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 7, 16, 33, 100, 512, 777, 2048, 8192])
def test_all_pairs_are_connected(tiles, causal):
    """8192 tiles of 128 are 1,048,576 tokens."""
    layout = smallest(tiles, causal, 128 if tiles == 8192 else 16)
    layers_for_all_pairs(layout, causal, bound(tiles))


@runs(15)
@given(st.integers(1, 600), st.booleans(), st.floats(1e-9, 0.1), st.integers(0, 100))
def test_any_number_of_tiles_is_connected(tiles, causal, density, global_tokens):
    made = Budget("ultra_sparse", density, causal, global_tokens)
    layers_for_all_pairs(BlockLayout.from_pattern(made, tiles * 16, block_size=16), causal, bound(tiles))


@pytest.mark.parametrize("causal", [False, True])
def test_a_million_tokens_in_small_tiles_are_connected(causal):
    """65,536 tiles: from a few rows to all that they may see, and from all that may see it to a few tiles."""
    tiles = 1 << 16
    layout = smallest(tiles, causal, 16)
    row, col = layout.rows_and_columns()
    seed = int(torch.randint(2**40, ()))
    some = torch.randint(tiles, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    place = torch.arange(tiles)
    for start in {0, 1, tiles // 2, tiles - 1, *some}:
        for source, target, all_of_them in (
            (row, col, place <= start if causal else place >= 0),
            (col, row, place >= start if causal else place >= 0),
        ):
            reached = place == start
            for _ in range(math.floor(bound(tiles))):
                reached[target[reached[source]]] = True
            assert torch.equal(reached, all_of_them), (seed, start)


@pytest.mark.parametrize("causal", [False, True])
def test_a_larger_budget_reaches_sooner(causal):
    """At 2 % of 2048 tiles, where causal rows near the beginning have four tiles still."""
    layout = BlockLayout.from_pattern(Budget("ultra_sparse", 0.02, causal), 2048 * 16, block_size=16)
    layers = layers_for_all_pairs(layout, causal, bound(2048))
    assert layers < layers_for_all_pairs(smallest(2048, causal, 16), causal, bound(2048))
    assert causal or layers <= 6


# -- values ---------------------------------------------------------------------------------------------


@runs(60)
@given(budget(), st.booleans())
def test_text_and_copies(made, resolved):
    if resolved:
        made = made.resolve(32, 32, 0, 1000)
    for again in (parse_pattern(repr(made)), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert again == made and hash(again) == hash(made) and repr(again) == repr(made)
    both = (made | Local(3)) & Causal()
    assert parse_pattern(repr(both)) == both


def test_text_reads_well():
    assert repr(Budget("local_window", 0.1)) == "Budget(kind='local_window', density=0.1)"
    made = parse_pattern("Budget('dilated_sparse', 0.1, segment_lengths=[2048, 8192], dilation_rates=[1, 4])")
    assert made == Budget("dilated_sparse", 0.1, False, None, (2048, 8192), (1, 4))
    assert made.resolve(64, 64, 0, 1000) == made.resolve(64, 64, 0, 1000).resolve(16, 16, 3, 5)
    assert Budget("ultra_sparse", 1) == Budget("ultra_sparse", 1.0, global_tokens=64)
    assert not made.needs_heads and Budget("local_window", 0.1) != Budget("local_window", 0.2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Budget("window", 0.1), "expected one of 'local_window', .*got 'window'"),
        (lambda: Budget(3, 0.1), "got 3"),
        (lambda: Budget("local_window", 0), "0 < density ≤ 1, got 0"),
        (lambda: Budget("local_window", 1.01), "got 1.01"),
        (lambda: Budget("local_window", math.nan), "got nan"),
        (lambda: Budget("local_window", True), "got True"),
        (lambda: Budget("local_window", "0.1"), "got '0.1'"),
        (lambda: Budget("local_window", 0.1, 1), "True or False, got 1"),
        (lambda: Budget("global_local", 0.1, global_tokens=-1), "≥ 0, got -1"),
        (lambda: Budget("ultra_sparse", 0.1, global_tokens=1.5), "got 1.5"),
        (lambda: Budget("local_window", 0.1, global_tokens=64), "does not use it, got 64. .*'global_local'"),
        (lambda: Budget("local_window", 0.1, segment_lengths=(8,)), "does not use it.*'dilated_sparse'"),
        (lambda: Budget("ultra_sparse", 0.1, dilation_rates=(1,)), "does not use it.*'dilated_sparse'"),
        (lambda: Budget("dilated_sparse", 0.1), "not empty, got None"),
        (lambda: Budget("dilated_sparse", 0.1, False, None, (8, 8), (1,)), "as many rates as lengths"),
        (lambda: Budget("dilated_sparse", 0.1, False, None, (8,), (9,)), "no rate above"),
        (lambda: Budget("dilated_sparse", 0.1, False, None, (0,), (1,)), "integers from 1"),
        (lambda: Budget("local_window", 0.1, block=16), "both, or neither, got block=16"),
        (lambda: Budget("local_window", 0.1, block=0, k_blocks=1), "≥ 1, got 0"),
        (lambda: Budget("local_window", 0.1, block=16, k_blocks=0), "≥ 1, got 0"),
        (lambda: Budget("local_window", 0.1).resolve(16, 16), "expected k_len"),
        (lambda: Budget("local_window", 0.1).resolve(16, 32, 0, 100), "square tiles"),
        (lambda: (Budget("local_window", 0.1) | Dilated(64, 2)).resolve(16, 16), "expected k_len"),
        (
            lambda: (Global(3) | Budget("local_window", 0.1)).allows(torch.tensor(1), torch.tensor(1)),
            "not resolved: its budget is a share of the tiles of a layout",
        ),
    ],
)
def test_errors(make, says):
    with pytest.raises(PatternError, match=says):
        make()


def test_one_position_and_none():
    for kind in KINDS:
        branches = ((512,), (1,)) if kind == "dilated_sparse" else (None, None)
        made = Budget(kind, 0.1, False, None, *branches).resolve(16, 16, 0, 100)
        assert made.allows(torch.tensor(40), torch.tensor(35)).item() is True
        assert made.allows(torch.tensor(40), torch.tensor(99)).item() is False
    made = Budget("ultra_sparse", 0.1).resolve(16, 16, 0, 100)
    none = torch.empty(0, dtype=torch.int64)
    assert made.allows(none[:, None], torch.arange(5)).shape == (0, 5)
    assert made.allows(torch.arange(5)[:, None], none).shape == (5, 0)
