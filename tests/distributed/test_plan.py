"""Plans, by brute force: all ranks together compute the layout, and exchange what it needs and no more."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import pattern, runs
from sparsetile.distributed import units
from sparsetile.distributed.plan import Plan, make_plan
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, LayoutError, PatternError
from sparsetile.functional import sparse_attention
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import Causal, Dilated, Full, Global, Local, Random, Strided


@st.composite
def draw_plan(draw: st.DrawFn) -> Plan:
    block = draw(st.sampled_from([16, 16, 32]))
    length = draw(st.integers(1, 22 * block))
    ranks = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    kv_heads, group_size = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (3, 1)]))
    heads = kv_heads * group_size
    made = draw(pattern(length, block, heads))
    layout = BlockLayout.from_pattern(made, length, block_size=block, heads=heads)
    kind = draw(st.integers(0, 2))
    if kind == 0:
        sharding = Sharding.contiguous(length, ranks, block)
    elif kind == 1:
        sharding = Sharding.balanced(length, ranks, block)
    else:
        order = draw(st.permutations(range(ranks * draw(st.integers(1, 3)))))
        sharding = Sharding(length, ranks, block, tuple(order))
    most = draw(st.none() | st.integers(block, 6 * block))
    node = draw(st.sampled_from([None, *(n for n in range(1, ranks + 1) if ranks % n == 0)]))
    heads = {"kv_heads": kv_heads, "group_size": group_size}
    return make_plan(layout, sharding, **heads, ranks_per_node=node, max_remote_tokens=most)


def _needed(plan: Plan, rank: int) -> set[tuple[int, int]]:
    """(tile, kv head) of what a rank's rows attend elsewhere, from the layout's rows one by one."""
    layout, tiles = plan.layout, set(plan.sharding.tiles_of(rank).tolist())
    needed = set()
    starts, columns = layout.indptr.tolist(), layout.indices.tolist()
    for row in range(len(starts) - 1):
        head, tile = divmod(row, layout.q_blocks)
        if tile in tiles:
            group = 0 if layout.heads == 1 else head // plan.group_size
            needed |= {(c, group) for c in columns[starts[row] : starts[row + 1]] if c not in tiles}
    return needed


def _key_positions(plan: Plan, tiles: torch.Tensor) -> torch.Tensor:
    """Positions in the sequence of a buffer's keys, −1 in unused tiles; past the end for the last tile."""
    block = plan.sharding.block
    each = tiles[:, None] * block + torch.arange(block)
    return torch.where(tiles[:, None] < 0, -1, each).flatten()


@runs(70)
@given(draw_plan())
def test_all_ranks_together_are_the_layout(plan):
    layout, sharding = plan.layout, plan.sharding
    ranks = [plan.for_rank(r) for r in range(sharding.ranks)]
    dense = torch.stack([layout.to_dense(h) for h in range(layout.heads)])
    seen = torch.zeros((*dense.shape[:2], sharding.tiles * sharding.block), dtype=torch.int64)
    edges = []
    for mine in ranks:
        rows = sharding.positions_of(mine.rank)
        parts = [(mine.own, mine.own_edges, mine.tiles[None])]
        parts += [(stage.layout, stage.edges, stage.tiles) for stage in mine.stages]
        taken = []
        for local, where, tiles in parts:
            taken.append(where)
            if local is None:
                assert not where.numel()
                continue
            local.validate()
            assert local.q_len == mine.tokens and local.heads == layout.heads and local.nnz == where.numel()
            assert torch.equal(local.mask_ids, layout.mask_ids[mine.edges[where]])
            for head in range(layout.heads):
                kv_head = 0 if layout.heads == 1 else head // plan.group_size
                keys = _key_positions(plan, tiles[min(kv_head, tiles.shape[0] - 1)])[: local.k_len]
                allowed = local.to_dense(head)
                assert not allowed[:, keys < 0].any()
                seen[head][rows[:, None], keys[keys >= 0]] += allowed[:, keys >= 0].long()
        # Each tile of the rank's rows is in one part.
        assert torch.equal(torch.cat(taken).sort().values, torch.arange(mine.edges.numel()))
        edges.append(mine.edges)
    assert torch.equal(seen[..., : sharding.length], dense.long())
    assert not seen[..., sharding.length :].any()
    assert torch.equal(torch.cat(edges).sort().values, torch.arange(layout.nnz))


@runs(60)
@given(draw_plan())
def test_what_travels(plan):
    _check_travel(plan)


@pytest.mark.parametrize("ranks, node", [(8, 4), (8, 2), (6, 3), (4, 2)])
def test_what_travels_between_nodes_in_stages(ranks, node):
    """Few draws above have nodes, stages and units that are passed on at once."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(3):
        length, by_head = draw.randint(32 * ranks, 16 * 40), draw.random() < 0.5
        made = Random(draw.choice([0.1, 0.3, 0.6]), draw.randrange(2**32), by_head=by_head) | Global(17)
        layout = BlockLayout.from_pattern(made, length, block_size=16, heads=4)
        make = draw.choice([Sharding.contiguous, Sharding.balanced])
        most = 16 * draw.randint(1, 3)
        plan = make_plan(
            layout,
            make(length, ranks, 16),
            kv_heads=2,
            group_size=2,
            ranks_per_node=node,
            max_remote_tokens=most,
        )
        assert plan.stages > 1 and any(plan.forwards), f"seed={seed}"
        try:
            _check_travel(plan)
        except AssertionError as error:
            raise AssertionError(f"seed={seed} {plan.sharding} {made} {most}") from error


def _check_travel(plan):
    sharding, count = plan.sharding, plan.sharding.ranks
    ranks = [plan.for_rank(r) for r in range(count)]
    owner, place = sharding.tile_owner(), sharding.local_index()
    node = torch.arange(count) // (plan.ranks_per_node or count)
    crossings = []
    for mine in ranks:
        assert len(mine.stages) == plan.stages
        received = []
        for number, stage in enumerate(mine.stages):
            recv, sent = plan.recv_counts(mine.rank)[number], plan.send_counts(mine.rank)[number]
            arriving, slots = [stage.recv_units], [stage.slots]
            assert torch.equal(owner[stage.recv_units[:, 0]], _ranks(stage.recv_splits))
            assert torch.equal(place[stage.send_units[:, 0]], stage.send_places)
            assert torch.equal(mine.tiles[stage.send_places], stage.send_units[:, 0])
            crossing = node[_ranks(stage.recv_splits)] != node[mine.rank]
            crossings += [(int(node[mine.rank]), *unit) for unit in stage.recv_units[crossing].tolist()]
            exchanges = [(stage, [other.stages[number] for other in ranks])]
            if stage.forward is not None:
                arriving.append(stage.forward.recv_units)
                slots.append(stage.forward.slots)
                exchanges.append((stage.forward, [other.stages[number].forward for other in ranks]))
                assert (node[_ranks(stage.forward.recv_splits)] == node[mine.rank]).all()
                # What is passed on has come first, with its kv head.
                passed = stage.recv_units[stage.forward.send_places]
                assert torch.equal(passed, stage.forward.send_units)
                recv = recv - torch.tensor(stage.forward.recv_splits)
                sent = sent - torch.tensor(stage.forward.send_splits)
            assert recv.tolist() == stage.recv_splits and sent.tolist() == stage.send_splits
            for exchange, others in exchanges:
                assert exchange.recv_splits[mine.rank] == exchange.send_splits[mine.rank] == 0
                sources = _ranks(exchange.recv_splits).tolist()
                order = [(r, h, t) for r, (t, h) in zip(sources, exchange.recv_units.tolist(), strict=True)]
                assert order == sorted(order)
                # What others send is what this rank expects, in its order.
                pieces = [other.send_units.split(other.send_splits)[mine.rank] for other in others]
                assert torch.equal(torch.cat(pieces), exchange.recv_units)
            (tile, head), slot = torch.cat(arriving).unbind(1), torch.cat(slots)
            received += zip(tile.tolist(), head.tolist(), strict=True)
            if plan.max_remote_tokens is not None:
                assert stage.width * sharding.block <= plan.max_remote_tokens
            assert stage.tiles.shape[0] == plan.groups
            assert torch.equal(stage.tiles.flatten()[slot], tile)
            assert torch.equal(slot // max(1, stage.width), head)
            assert int((stage.tiles >= 0).sum()) == tile.numel() == slot.unique().numel()
            if plan.heads_together:
                assert torch.equal(slot, torch.arange(tile.numel()))
        # Each needed unit once, and no other.
        assert len(received) == len(set(received))
        assert set(received) == _needed(plan, mine.rank)
    # One copy a node.
    assert len(crossings) == len(set(crossings))
    for number in range(plan.stages):
        assert any(mine.stages[number].recv_units.numel() for mine in ranks)
        assert len({mine.stages[number].forward is None for mine in ranks}) == 1


def _ranks(splits: list[int]) -> torch.Tensor:
    """The rank of each unit of an exchange."""
    return torch.arange(len(splits)).repeat_interleave(torch.tensor(splits))


@pytest.mark.parametrize("by_head", [False, True])
def test_attention_in_parts(by_head):
    """Ordinary calls over the parts, merged by their LSE, are the call over everything."""
    seed = random.randrange(2**32)
    draw = torch.Generator().manual_seed(seed)
    length, block, kv_heads, group_size, dim = 437, 32, 2, 2, 16
    heads = kv_heads * group_size
    made = (Local(70) | Random(0.3, seed, by_head=by_head) | Global(20)) & Causal()
    layout = BlockLayout.from_pattern(made, length, block_size=block, heads=heads)
    plan = make_plan(
        layout,
        Sharding.balanced(length, 3, block),
        kv_heads=kv_heads,
        group_size=group_size,
        max_remote_tokens=3 * block,
    )
    assert plan.stages > 1
    q, k, v = (torch.randn(1, h, length, dim, generator=draw).double() for h in (heads, kv_heads, kv_heads))
    expected = sparse_attention(q, k, v, layout, enable_gqa=True, backend="reference")
    tail = torch.zeros(1, kv_heads, plan.sharding.tiles * block - length, dim, dtype=torch.float64)
    k_tiles, v_tiles = (torch.cat((x, tail), 2).unflatten(2, (-1, block))[0] for x in (k, v))
    for rank in range(3):
        mine = plan.for_rank(rank)
        at = plan.sharding.positions_of(rank)
        parts = [(mine.own, k[:, :, at], v[:, :, at])]
        for stage in mine.stages:
            tiles = stage.tiles.expand(kv_heads, -1).clamp(min=0)
            head = torch.arange(kv_heads)[:, None]
            buffers = (x[head, tiles].flatten(1, 2)[None] for x in (k_tiles, v_tiles))
            parts.append((stage.layout, *buffers))
        outs, lses = zip(
            *(
                sparse_attention(q[:, :, at], *kv, local, enable_gqa=True, return_lse=True)
                for local, *kv in parts
                if local is not None
            ),
            strict=True,
        )
        weights = torch.stack(lses).double().softmax(0)
        merged = (weights[..., None] * torch.stack(outs)).sum(0)
        error = (merged - expected[:, :, at]).abs().max()
        assert error < 1e-6, f"seed={seed} rank={rank} error={error}"


@runs(25)
@given(draw_plan(), st.integers(1, 5))
def test_report(plan, head_dim):
    """Bytes, counted again one unit at a time."""
    sharding, count, block = plan.sharding, plan.sharding.ranks, plan.sharding.block
    report = plan.report(head_dim, itemsize=2, batch=3)
    token = 2 * 3 * 2 * head_dim * plan.kv_heads // plan.groups
    node = [r // (plan.ranks_per_node or count) for r in range(count)]
    owner, crossed, sent = sharding.tile_owner().tolist(), 0, [0] * count
    for rank in range(count):
        mine, needed = plan.for_rank(rank), _needed(plan, rank)
        assert report.received[rank] == len(needed) * block * token
        tail = {tile for tile, _ in needed}
        lengths = {tile: min(block, sharding.length - tile * block) for tile in tail}
        assert report.attended[rank] == sum(lengths[tile] for tile, _ in needed) * token
        elsewhere = sum(node[owner[tile]] != node[rank] for tile, _ in needed)
        assert report.crossing_directly[rank] == elsewhere * block * token
        first = [_ranks(stage.recv_splits).tolist() for stage in mine.stages]
        crossed += sum(node[source] != node[rank] for sources in first for source in sources)
        widths = [stage.tiles.numel() for stage in mine.stages]
        assert report.buffer[rank] == max(widths, default=0) * block * token
        assert report.circulated[rank] == (sharding.length - mine.tokens) * token * plan.groups
        for source, many in enumerate(plan.recv_counts(rank).sum(0).tolist()):
            sent[source] += many * block * token
        heads = plan.kv_heads * plan.group_size // plan.layout.heads
        assert report.tiles[rank] == mine.edges.numel() * heads
    assert report.sent.tolist() == sent
    assert report.crossing.sum() == crossed * block * token
    assert report.stages == plan.stages
    assert report.balance == max(report.tiles) * count / report.tiles.sum() or not report.tiles.any()
    most = max((a / b for a, b in zip(report.received, report.attended, strict=True) if b), default=1.0)
    assert report.excess == float(most)


def test_report_refuses():
    plan = Plan.from_pattern(Local(50), Sharding.contiguous(500, 4, 16))
    for arguments, name in (((0,), "head_dim"), ((4, 0), "itemsize"), ((4, 2, 1.5), "batch")):
        with pytest.raises(ArgumentError, match=name):
            plan.report(*arguments)


def test_hash_tells_plans_apart():
    def made(pattern=None, length=500, ranks=4, **options):
        return Plan.from_pattern(pattern or Local(50), Sharding.contiguous(length, ranks, 16), **options).hash

    first = made()
    assert first == made()
    others = [
        made(Local(50, 49)),
        made(Local(50) & Causal()),
        made(length=499),
        made(ranks=5),
        made(kv_heads=2),
        made(kv_heads=2, group_size=2),
        made(group_size=2),
        made(ranks_per_node=2),
        made(max_remote_tokens=64),
        Plan.from_pattern(Local(50), Sharding.balanced(500, 4, 16)).hash,
    ]
    assert len({first, *others}) == len(others) + 1


@pytest.mark.parametrize("dealt", [False, True])
def test_needs_are_found_for_some_ranks_at_a_time(dealt, monkeypatch):
    """A table of all ranks would outgrow the layout here; what is found is the same."""
    seed = random.randrange(2**32)
    make = Sharding.balanced if dealt else Sharding.contiguous
    sharding = make(16 * 150 - 3, 64, 16)
    pattern = Local(20) | Random(0.01, seed, by_head=True)
    plans = []
    for least in (1 << 26, 1):
        monkeypatch.setattr(units, "_LEAST_MARKS", least)
        plans.append(Plan.from_pattern(pattern, sharding, kv_heads=4))
    assert 64 * 4 * sharding.tiles > 8 * plans[0].layout.nnz
    for name in ("starts", "stage", "source", "sender", "head", "tile"):
        assert torch.equal(*(getattr(plan, name) for plan in plans)), f"seed={seed} {name}"


def test_window_needs_neighbours_alone():
    plan = Plan.from_pattern(Local(100) & Causal(), Sharding.contiguous(4096, 8, 16))
    for rank in range(8):
        counts = plan.recv_counts(rank).sum(0)
        expected = torch.zeros(8, dtype=torch.int64)
        if rank:
            expected[rank - 1] = 7
        assert torch.equal(counts, expected)


def test_stages_ask_different_ranks():
    plan = Plan.from_pattern(Full(), Sharding.contiguous(16 * 32, 8, 16), max_remote_tokens=4 * 16)
    assert plan.stages == 7
    for number in range(7):
        asked = [plan.for_rank(r).stages[number].recv_splits for r in range(8)]
        assert [split.index(4) for split in asked] == [(r - 1 - number) % 8 for r in range(8)]


def test_global_keys_cross_to_a_node_once():
    plan = Plan.from_pattern(
        Global(3 * 16, rows=False), Sharding.contiguous(16 * 64, 8, 16), ranks_per_node=4
    )
    stages = [plan.for_rank(r).stages[0] for r in range(8)]
    assert [sum(stage.recv_splits) for stage in stages] == [0, 3, 3, 3, 1, 1, 1, 0]
    assert [sum(stage.forward.recv_splits) for stage in stages] == [0, 0, 0, 0, 2, 2, 2, 3]
    assert [sum(stage.forward.send_splits) for stage in stages] == [0, 0, 0, 0, 3, 3, 3, 0]


def test_heads_of_their_own_get_their_own_units():
    """Dilation with a column residue for each head: a rank's union over heads is all, a kv head's a share."""
    sharding = Sharding.contiguous(16 * 64, 4, 16)
    apart = Plan.from_pattern(Strided(64, 16, head_shift=16), sharding, kv_heads=4)
    same = Plan.from_pattern(Dilated(1024, 4, 16), sharding, kv_heads=4)
    assert apart.groups == 4 and same.groups == 1
    assert apart.units == same.units * 4


@pytest.mark.parametrize(
    "change, name",
    [
        ({"kv_heads": 0}, "kv_heads"),
        ({"group_size": 1.0}, "group_size"),
        ({"ranks_per_node": 3}, "ranks_per_node"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"max_remote_tokens": 15}, "max_remote_tokens"),
    ],
)
def test_refused_numbers(change, name):
    layout = BlockLayout.from_pattern(Local(50), 100, block_size=16)
    with pytest.raises(ArgumentError, match=name):
        make_plan(layout, Sharding.contiguous(100, 4, 16), **{"kv_heads": 1, **change})


@pytest.mark.parametrize(
    "lengths, block, heads, name",
    [
        ((99, 100), 16, None, "q_len"),
        ((100, 99), 16, None, "k_len"),
        ((100, 100), (16, 32), None, "block_k"),
        ((100, 100), 16, 3, "heads"),
    ],
)
def test_refused_layouts(lengths, block, heads, name):
    made = Random(0.5, by_head=heads is not None)
    layout = BlockLayout.from_pattern(made.resolve(16, 16), *lengths, block_size=block, heads=heads)
    with pytest.raises(LayoutError, match=name):
        make_plan(layout, Sharding.contiguous(100, 4, 16), kv_heads=2)


def test_refused_pattern():
    with pytest.raises(PatternError):
        Plan.from_pattern("Local(3)", Sharding.contiguous(100, 4, 16))
