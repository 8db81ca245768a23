"""The module over ranks: what the base module computes of the whole sequence."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import shard_sequence, unshard_sequence
from sparsetile.distributed.call import sharding_by
from sparsetile.distributed.exchange import Exchange
from sparsetile.distributed.rank_plan import Stage
from sparsetile.errors import ArgumentError, MismatchError, SparsetileError

CONFIG = st.SparsePatternConfig("global_local", 0.3, block_size=16, global_tokens=16)


def over_ranks(rank: int, world: int, order: str, lean: bool, most: int | None) -> None:
    torch.manual_seed(1)
    x = [torch.randn(2, 300, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    padding = torch.rand(2, 300) < 0.2
    whole = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG, dropout=0.2)
    torch.manual_seed(2)
    expected = whole(*x, is_causal=True, key_padding_mask=padding)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), x)
    module = st.create_block_sparse_attention(
        "distributed",
        sparse_config=CONFIG,
        order=order,
        dropout=0.2,
        distributed_config=st.DistributedSparseConfig(
            enable_memory_optimization=lean, max_remote_tokens=most
        ),
    )
    sizes, plain = [], Exchange.finish

    def finish(exchange: Exchange, arriving: Any, stage: Stage) -> Any:
        sizes.append(stage.width * CONFIG.block_size)
        return plain(exchange, arriving, stage)

    Exchange.finish = finish
    where = module.sharding_for(300)
    pieces = [shard_sequence(y, 1, where) for y in x]
    mask = shard_sequence(padding, 1, where)
    torch.manual_seed(2)
    out = unshard_sequence(module(*pieces, is_causal=True, key_padding_mask=mask), 1, where)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad((out * weight).sum(), x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    stages = len(sizes) // (2 if lean else 1)  # where tiles are not kept, backward has them sent again
    assert stages == 1 if most is None else stages > 1 and max(sizes) <= most


@pytest.mark.parametrize("order", ["contiguous", "balanced"])
@pytest.mark.parametrize(("lean", "most"), [(False, None), (True, None), (False, 16), (True, 40)])
def test_every_rank_gets_its_share_of_the_whole(order: str, lean: bool, most: int | None) -> None:
    run_ranks(over_ranks, 3, order, lean, most)


DISTANCES = {"local_sparsity": 0.5, "global_sparsity": 0.3, "inter_node_sparsity": 0.2}
NODES = st.DistributedSparseConfig(ranks_per_node=2, **DISTANCES)


def by_distance(rank: int, world: int, order: str, is_causal: bool, settings: dict[str, Any]) -> None:
    length = 23 * 128 + 40
    torch.manual_seed(5)
    x = [torch.randn(1, length, h, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    weight = torch.randn(1, length, 2, 8, dtype=torch.float64)
    where = sharding_by(order, length, world, 128)
    pattern = where.hierarchical(0.5, 0.3, 0.2, ranks_per_node=2, is_causal=is_causal)
    expected = st.sparse_attention(*(y.transpose(1, 2) for y in x), pattern, enable_gqa=True).transpose(1, 2)
    wanted = torch.autograd.grad((expected * weight).sum(), x)
    module = st.create_block_sparse_attention(
        "distributed", order=order, distributed_config=replace(NODES, **settings)
    )
    assert module.plan.pattern_for(is_causal) == pattern and module.sharding_for(length) == where
    seen = []
    plain = torch.distributed.all_to_all_single

    def counted(received: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[1])
        return plain(received, *args, **kwargs)

    torch.distributed.all_to_all_single = counted
    out = unshard_sequence(module(*(shard_sequence(y, 1, where) for y in x), is_causal), 1, where)
    # Two exchanges a stage, the second within the node.
    near = range(rank // 2 * 2, rank // 2 * 2 + 2)
    passed = [splits for n, splits in enumerate(seen) if n % 2]
    if not settings:
        assert len(seen) == 2
        assert all(not units or sender in near for splits in passed for sender, units in enumerate(splits))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad((out * weight).sum(), x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("order", "settings"),
    [
        ("contiguous", {}),
        ("balanced", {"enable_memory_optimization": True, "max_remote_tokens": 512}),
    ],
)
def test_density_by_distance_is_what_one_process_computes(
    order: str, is_causal: bool, settings: dict[str, Any]
) -> None:
    run_ranks(by_distance, 4, order, is_causal, settings)


def test_density_by_distance_in_a_world_of_one() -> None:
    """One rank of one node: all is local, and however many ranks a node holds."""
    x = torch.randn(1, 1500, 2, 8)
    module = st.BlockSparseRingDistributedDilatedAttention(distributed_config=NODES, order="balanced")
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for is_causal in (False, True):
            pattern = st.Hierarchical(1, None, 0.5, 0.0, 0.0, causal=is_causal)
            y = x.transpose(1, 2)
            expected = st.sparse_attention(y, y, y, pattern, is_causal=is_causal).transpose(1, 2)
            torch.testing.assert_close(one(x, x, x, is_causal), expected)
    kept = module.layout_for(1500).row_counts()
    assert torch.equal(kept, torch.full_like(kept, 6))  # of 12 tiles
    assert module.density_for(1500).requested is None
    assert "local_sparsity=0.5" in repr(module) and "global_local" not in repr(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, True), module(x, x, x, True))


def nodes_that_cannot_be(rank: int, world: int, each: tuple[int, ...]) -> list[str]:
    x, texts = torch.randn(1, 128, 2, 8), []
    for config in (
        st.DistributedSparseConfig(ranks_per_node=each[rank], **DISTANCES),
        st.DistributedSparseConfig(ranks_per_node=each[rank]),
    ):
        module = st.BlockSparseRingDistributedDilatedAttention(distributed_config=config)
        assert module.sharding_for(512).tokens_of(rank) == 128
        with pytest.raises(SparsetileError) as raised:
            module(x, x, x)
        texts.append(f"{type(raised.value).__name__}: {raised.value}")
        assert "ranks_per_node" in repr(module)
    return texts


@pytest.mark.parametrize("each", [(3, 3, 3, 3), (2, 3, 2, 2), (2, 4, 2, 2), (3, 5, 3, 3)])
def test_all_ranks_refuse_nodes_that_cannot_be(each: tuple[int, ...]) -> None:
    first, *others = run_ranks(nodes_that_cannot_be, 4, each, seconds=60)
    assert all(texts == first for texts in others) and all("ranks_per_node" in text for text in first), first


def with_weights(rank: int, world: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 150, 2, 8, dtype=torch.float64)
    settings = {"need_weights": True, "average_attn_weights": False}
    for module in (
        st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG, order="balanced"),
        st.BlockSparseRingDilatedAttention(sparse_config=CONFIG, ring=torch.distributed.group.WORLD),
    ):
        whole = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG)
        out, weights = whole(x, x, x, True, **settings)
        order = getattr(module, "order", "contiguous")
        where = sharding_by(order, 150, world, 16)
        piece = shard_sequence(x, 1, where)
        got, got_weights = module(piece, piece, piece, True, **settings)
        torch.testing.assert_close(unshard_sequence(got, 1, where), out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(unshard_sequence(got_weights, 2, where), weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", [1, 3])
def test_softmax_weights_over_ranks(world: int) -> None:
    run_ranks(with_weights, world)


def on_a_mesh(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    torch.manual_seed(mesh["dp"].get_local_rank())
    x = torch.randn(1, 100, 2, 8)
    expected = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG)(x, x, x)
    module = st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG, group=mesh["cp"])
    where = module.sharding_for(100)
    piece = shard_sequence(x, 1, where, mesh["cp"])
    out = unshard_sequence(module(piece, piece, piece), 1, where, mesh["cp"])
    torch.testing.assert_close(out, expected)
    ring = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG, ring=mesh["cp"])
    torch.testing.assert_close(unshard_sequence(ring(piece, piece, piece), 1, where, mesh["cp"]), expected)
    with pytest.raises(ArgumentError, match="one dimension"):
        st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG, group=mesh)


def test_one_dimension_of_a_mesh_shares_a_sequence() -> None:
    run_ranks(on_a_mesh, 4)


def wrong_on_one(rank: int, world: int) -> str:
    module = st.create_block_sparse_attention("distributed", sparse_config=CONFIG)
    x = torch.randn(1, 64, 2, 8)
    q: Any = x if rank else x[0, 0]
    with pytest.raises(MismatchError, match=r"rank 0: query, key, value: expected") as raised:
        module(q, x, x)
    with pytest.raises(MismatchError, match="need_weights: False on rank 0, True on rank 1"):
        module(x, x, x, need_weights=rank == 1)
    with pytest.raises(MismatchError, match="rank 1: weights"):
        module(x, x, x, weights="sparse" if rank else "dense")
    return str(raised.value)


def test_bad_input_on_one_rank_is_an_error_on_all() -> None:
    assert len(set(run_ranks(wrong_on_one, 2))) == 1


def test_a_world_of_one_is_the_base_module() -> None:
    x = torch.randn(1, 200, 2, 8)
    module = st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG, dropout=0.1).eval()
    base = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        out, weights = one(x, x, x, need_weights=True)
        assert torch.equal(out, base(x, x, x)) and weights.shape == (1, 200, 200)
    assert module.sharding_for(200).tokens_of(0) == 200
    assert "order='contiguous'" in repr(module)


def with_distances(**pattern: Any) -> Any:
    return st.create_block_sparse_attention("distributed", distributed_config=NODES, **pattern)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: st.BlockSparseRingDistributedDilatedAttention(order="ring"), "contiguous, balanced"),
        (
            lambda: st.BlockSparseRingDistributedDilatedAttention(distributed_config=0.1),
            "DistributedSparseConfig",
        ),
        (lambda: st.BlockSparseRingDistributedDilatedAttention(group="cp"), "process group"),
        (lambda: with_distances(sparsity_ratio=0.2), "sparsity_ratio: expected None beside densities"),
        (lambda: with_distances(sparse_config=CONFIG), "sparse_config: expected None beside densities"),
        (lambda: with_distances(segment_lengths=[512]), "segment_lengths: expected None beside densities"),
        (lambda: with_distances(dilation_rates=[2]), "dilation_rates: expected None beside densities"),
    ],
)
def test_bad_arguments(make: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()
