"""Attention over ranks in compiled graphs: the bits of eager calls, and one process's values in float64."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import Sharding, distributed_attention, shard_sequence, unshard_sequence
from sparsetile.distributed.call import sharding_by
from sparsetile.distributed.parts import Call
from sparsetile.distributed.ranks import Ranks
from sparsetile.errors import BackendError, MismatchError, RankLostError
from spread_calls import BLOCK, Case, alone, loss

LOCAL = st.Local(20)
CONFIG = st.SparsePatternConfig("global_local", 0.3, block_size=BLOCK, global_tokens=BLOCK)


def attend(case: Case, layout: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any) -> Any:
    return distributed_attention(
        q, k, v, layout, order=case.order, key_padding_mask=mask, tile_bias=bias,
        max_remote_tokens=case.most, **case.common(), **case.options,
    )  # fmt: skip


def on_rank(rank: int, world: int, cases: list[Case], backend: str) -> list[dict[str, Tensor]]:
    """Compiled, put together; the rank itself compares it with its eager call, bit for bit."""
    found = []
    for case in cases:
        made, mask, layout = case.tensors(), case.mask(), case.layout()
        where = sharding_by(case.order, case.length, world, BLOCK)
        here = where.positions_of(rank)
        pieces = {name: x.index_select(2, here) for name, x in made.items() if name != "bias"}
        leaves = {name: pieces[name].requires_grad_() for name in "qkv"}
        if case.biased:
            leaves["bias"] = made["bias"].requires_grad_()
        mine = None if mask is None else mask[:, here]
        both = []
        for way in (attend, torch.compile(attend, fullgraph=True, backend=backend)):
            torch._dynamo.reset()  # cases differ in more than one graph is made for
            torch.manual_seed(case.seed + 2 + rank)  # of the draws of all ranks that of rank 0 counts
            out, lse = way(case, layout, leaves["q"], leaves["k"], leaves["v"], leaves.get("bias"), mine)
            grads = torch.autograd.grad(loss(out, lse, pieces), list(leaves.values()))
            both.append({"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))})
        eager, compiled = both
        assert all(torch.equal(eager[name], x) for name, x in compiled.items()), case
        whole = {name: unshard_sequence(x, 2, where) for name, x in compiled.items() if name != "bias"}
        if case.biased:
            torch.distributed.all_reduce(compiled["bias"])
            whole["bias"] = compiled["bias"]
        found.append(whole)
    return found


def drawn(seed: int) -> list[Case]:
    by_head = st.Random(0.3, seed=seed, by_head=True)
    both = st.Local(30) | st.Global(5)
    case = partial(Case, seed, heads=4, kv_heads=2)
    return [
        case(both, 200, is_causal=True),
        case(repr(both), 130, kv_heads=4, order="balanced", padded=True, options={"keep": False}),
        case(both, 210, is_causal=True, most=BLOCK, dropout=0.3),
        case(by_head, 230, order="balanced", most=2 * BLOCK, padded=True, dropout=0.4),
        case(by_head, 170, kv_heads=4, biased=True, padded=True),
        case(
            both & st.Causal(), 190, kv_heads=1, biased=True, bias_shape=(2, 4), dropout=0.2, most=3 * BLOCK
        ),
        case(both, BLOCK + 3, is_causal=True, padded=True),  # a rank of three holds nothing
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_compiled_is_eager_is_one_process(world: int) -> None:
    cases = drawn(random.getrandbits(30))
    expected = [alone(case) for case in cases]
    for rank, found in enumerate(run_ranks(on_rank, world, cases, "aot_eager")):
        for case, want, got in zip(cases, expected, found, strict=True):
            assert want.keys() == got.keys()
            for name, value in want.items():
                close = torch.allclose(got[name], value, rtol=1e-10, atol=1e-10)
                assert close, f"rank {rank}, {name}, {case}"


# -- order ------------------------------------------------------------------------------------------------


def recorded(attribute: str) -> list[Any]:
    """A list to which every call that is made adds whether it is a forward, and one of its attributes."""
    made: list[Any] = []

    def record(name: str, plain: Callable[..., Any]) -> None:
        def recording(self: Call, *args: Any) -> Any:
            made.append((name, getattr(self, attribute)))
            return plain(self, *args)

        setattr(Call, name, recording)

    record("forward", Call.forward)
    record("backward", Call.backward)
    return made


def in_order(rank: int, world: int, backend: str) -> tuple[list[Any], list[Any]]:
    """Two calls that do not depend on each other, and between them one whose result nobody uses; the calls
    that were made, told apart by their scale."""
    made = recorded("scale")
    where = Sharding.contiguous(5 * BLOCK, world, BLOCK)  # ranks hold different numbers of tiles
    torch.manual_seed(rank)
    size = (1, 2, where.tokens_of(rank), 8)
    x, y = (torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in "xy")

    def run(x: Tensor, y: Tensor) -> Tensor:
        first = distributed_attention(x, x, x, st.Full(), block_size=BLOCK, scale=1.0)
        distributed_attention(y, y, y, st.Full(), block_size=BLOCK, scale=2.0)
        last = distributed_attention(y, y, y, st.Full(), block_size=BLOCK, scale=3.0)
        return last.exp().sum() + first.sin().sum()

    found = []
    for way in (run, torch.compile(run, fullgraph=True, backend=backend)):
        made.clear()
        found.append(torch.autograd.grad(way(x, y), [x, y]))
        orders = list(made)
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
    return orders[:3], orders[3:]


def test_calls_keep_their_order_and_none_is_left_out() -> None:
    first, *others = run_ranks(in_order, 2, "aot_eager")
    assert first[0] == [("forward", 1.0), ("forward", 2.0), ("forward", 3.0)]
    assert sorted(first[1]) == [("backward", 1.0), ("backward", 3.0)]
    assert all(other == first for other in others)


# -- modules ----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, again: str = "") -> None:
        super().__init__()
        self.qkv, self.attention, self.again = nn.Linear(16, 48), attention, again

    def forward(self, x: Tensor) -> Tensor:
        return x + (
            checkpoint(self.inner, x, use_reentrant=False) if self.again == "inside" else self.inner(x)
        )

    def inner(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (2, 8)) for y in self.qkv(x).chunk(3, -1))
        return self.attention(q, k, v, is_causal=True).flatten(2)


def modules(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    config = st.DistributedSparseConfig(max_remote_tokens=BLOCK)
    spread = st.BlockSparseRingDistributedDilatedAttention(
        sparse_config=CONFIG, group=mesh["cp"], distributed_config=config, order="balanced"
    )
    ring = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG, ring=mesh["cp"], dropout=0.3)
    for attention, again in ((ring, False), (ring, True), (spread, False)):
        torch.manual_seed(4)
        layer = Layer(attention).double()
        where = sharding_by(getattr(attention, "order", "contiguous"), 150, 2, BLOCK)
        whole = torch.randn(2, 150, 16, dtype=torch.float64) + mesh["dp"].get_local_rank()
        x = shard_sequence(whole, 1, where, mesh["cp"])
        found = []
        for way in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(5)
            out = checkpoint(way, x, use_reentrant=False) if again else way(x)
            found.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
        if attention is ring:
            continue
        single = Layer(st.BlockSparseRingDilatedAttention(sparse_config=CONFIG)).double()
        single.load_state_dict(layer.state_dict())
        wanted = torch.autograd.grad(single(whole).square().sum(), list(single.parameters()))
        for want, got in zip(wanted, found[1][1:], strict=True):
            torch.distributed.all_reduce(got, group=mesh["cp"].get_group())
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_modules_over_a_part_of_the_ranks() -> None:
    run_ranks(modules, 4)


def counted(rank: int, world: int) -> list[int]:
    torch._dynamo.reset()  # what tests before in the parent process have compiled
    torch.manual_seed(6)
    module = st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG, order="balanced")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    counts = []
    for length in (100, 100, 100, 200, 300, 410):
        x = torch.randn(1, length, 2, 8, dtype=torch.float64)
        where = module.sharding_for(length)
        piece = shard_sequence(x, 1, where).requires_grad_()
        weight = shard_sequence(x.cos(), 1, where)
        found = [
            torch.autograd.grad((way(piece, piece, piece) * weight).sum(), piece)[0]
            for way in (module, compiled)
        ]
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
        counts.append(counter.frame_count)
    return counts


def test_the_same_shapes_compile_once_and_lengths_twice() -> None:
    assert run_ranks(counted, 2) == [[1, 1, 1, 2, 2, 2]] * 2


def formed_again(rank: int, world: int, folder: str) -> None:
    """After a rank was lost the default group is another, and smaller."""
    torch.manual_seed(7)
    whole = torch.randn(1, 2, 6 * BLOCK, 8)

    def run(x: Tensor) -> Tensor:
        return distributed_attention(x, x, x, LOCAL, block_size=BLOCK)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = st.sparse_attention(whole, whole, whole, LOCAL, block_size=BLOCK)
    for size in (3, 2, 1):
        if size < 3:
            torch.distributed.destroy_process_group()
            if rank >= size:
                break
            store = torch.distributed.FileStore(f"{folder}/{size}", size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        where = Sharding.contiguous(6 * BLOCK, size, BLOCK)
        x = shard_sequence(whole, 2, where)
        torch.testing.assert_close(unshard_sequence(compiled(x), 2, where), expected)
    if not torch.distributed.is_initialized():  # for those who end it
        store = torch.distributed.FileStore(f"{folder}/{rank} alone", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def test_a_graph_follows_the_default_group(tmp_path: Path) -> None:
    run_ranks(formed_again, 3, str(tmp_path))


def formed_late(rank: int, world: int, folder: str) -> None:
    """The same shapes before there is a group, in one of this rank alone, and in one of all."""
    torch.distributed.destroy_process_group()
    torch.manual_seed(8)
    whole = torch.randn(1, 4 * BLOCK, 2, 8)
    module = st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    where = Sharding.contiguous(4 * BLOCK, world, BLOCK)
    x = whole[:, where.positions_of(rank)]
    torch.testing.assert_close(compiled(x, x, x), module(x, x, x))
    store = torch.distributed.FileStore(f"{folder}/{rank}", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.testing.assert_close(compiled(x, x, x), module(x, x, x))
    torch.distributed.destroy_process_group()
    store = torch.distributed.FileStore(f"{folder}/late", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    expected = st.BlockSparseRingDilatedAttention(sparse_config=CONFIG)(whole, whole, whole)
    torch.testing.assert_close(unshard_sequence(compiled(x, x, x), 1, where), expected)


def test_a_graph_made_before_the_group_is_made_again(tmp_path: Path) -> None:
    run_ranks(formed_late, 2, str(tmp_path))


def under_autocast(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    x = torch.randn(1, 2, 3 * BLOCK, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return distributed_attention(x, x, x, LOCAL, block_size=BLOCK)

    found = []
    for way in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = way(x)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), [x])))
    assert found[1][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), found[0][0])


def test_autocast_and_no_gradient() -> None:
    run_ranks(under_autocast, 2)


def test_a_world_of_one() -> None:
    x = torch.randn(1, 2, 50, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return distributed_attention(x, x, x, LOCAL, is_causal=True, block_size=BLOCK)

    found = [
        torch.autograd.grad(way(x).square().sum(), x)[0]
        for way in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(found[1], found[0])


# -- what goes wrong --------------------------------------------------------------------------------------


def disagreeing(rank: int, world: int, what: str) -> str:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4 * BLOCK, 8) for _ in "qkv")
    pattern: Any = st.Local(40)
    settings: dict[str, Any] = {"block_size": BLOCK}
    compiled = True
    if rank == 1:
        if what == "pattern":
            pattern = st.Local(41)
        elif what == "layout":
            pattern = st.BlockLayout.from_pattern(pattern, world * 4 * BLOCK, block_size=BLOCK)
        elif what == "unreadable":
            pattern = "Locale(40)"
        elif what == "no pattern":
            pattern = None
        elif what == "shape":
            k = k[:, :, :-1]
        elif what == "dimensions":
            q = q[0]
        elif what == "dtype":
            q, k, v = q.double(), k.double(), v.double()
        elif what == "gradient":
            q = q.requires_grad_()
        elif what == "scale":
            settings["scale"] = 0.3
        elif what == "infinite":
            settings["scale"] = float("inf")
        elif what == "spelling":
            settings["block_size"] = str(BLOCK)
        elif what == "dropout":
            settings["dropout_p"] = torch.ones(())
        elif what == "flag":
            settings["is_causal"] = torch.ones(2)
        elif what == "kept":
            compiled = False

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return distributed_attention(q, k, v, pattern, **settings)

    with pytest.raises(MismatchError) as raised:
        (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(q, k, v)
    return str(raised.value)


@pytest.mark.parametrize(
    "what",
    [
        "pattern",
        "layout",
        "unreadable",
        "no pattern",
        "shape",
        "dimensions",
        "dtype",
        "gradient",
        "scale",
        "infinite",
        "spelling",
        "dropout",
        "flag",
        "kept",
    ],
)
def test_ranks_that_differ_all_raise_the_same(what: str) -> None:
    texts = run_ranks(disagreeing, 3, what, seconds=60)
    assert len(set(texts)) == 1
    assert "rank 1" in texts[0] and "Nothing was sent" in texts[0], texts[0]


def changed(rank: int, world: int) -> None:
    """From inside a graph that served calls before, and serves them after."""
    x = torch.randn(1, 2, 2 * BLOCK, 8)

    def run(x: Tensor) -> Tensor:
        return distributed_attention(x, x, x, st.Full(), block_size=BLOCK)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(x)
    plain = Ranks.agree

    def other(self: Ranks, call: Any, *args: Any) -> Any:
        return plain(self, {**call, "version": rank}, *args)

    Ranks.agree = other
    with pytest.raises(MismatchError, match="version: 0 on rank 0, 1 on rank 1"):
        compiled(x)
    Ranks.agree = plain
    assert torch.equal(compiled(x), run(x))


def test_a_graph_that_exists_tells_ranks_that_differ() -> None:
    run_ranks(changed, 2)


def mixed(rank: int, world: int) -> None:
    """Where nobody keeps tiles, a rank's graph and another's eager call are the same call."""
    x = torch.randn(1, 2, 2 * BLOCK, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return distributed_attention(x, x, x, LOCAL, block_size=BLOCK, keep=False)

    expected = torch.autograd.grad(run(x).square().sum(), x)[0]
    way = torch.compile(run, fullgraph=True, backend="aot_eager") if rank else run
    assert torch.equal(torch.autograd.grad(way(x).square().sum(), x)[0], expected)


def test_graphs_and_eager_calls_that_keep_nothing_meet() -> None:
    run_ranks(mixed, 2)


def weights(rank: int, world: int, who: str) -> str:
    module = st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 2 * BLOCK, 2, 8)
    with pytest.raises(BackendError if who == "all" else MismatchError, match="need_weights") as raised:
        compiled(x, x, x, need_weights=who == "all" or rank == 1)
    return str(raised.value)


@pytest.mark.parametrize("who", ["all", "one"])
def test_softmax_weights_are_refused_on_every_rank(who: str) -> None:
    assert len(set(run_ranks(weights, 2, who, seconds=60))) == 1


def refused(rank: int, world: int) -> None:
    x = torch.randn(1, 2, 2 * BLOCK, 8)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return distributed_attention(x, x, x, "Full()", block_size=BLOCK)

    with pytest.raises(Exception, match=r"expected plain tensors under torch\.compile"):
        torch.export.export(Whole(), (x,))
    with pytest.raises(Exception, match="forward mode"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.compile(Whole(), fullgraph=True, backend="aot_eager")(dual)
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(Exception, match="expected plain tensors under"):
        torch.compile(Whole(), fullgraph=True, backend="aot_eager")(distribute_tensor(x, mesh, [Shard(2)]))
    attention = st.BlockSparseRingDistributedDilatedAttention(sparse_config=CONFIG)
    layer = torch.compile(Layer(attention, "inside"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="expected the checkpoint around the compiled function"):
        layer(torch.randn(1, 2 * BLOCK, 16))


def test_export_forward_mode_and_checkpoints_inside_are_refused() -> None:
    run_ranks(refused, 2)


def lost(rank: int, world: int, phase: str) -> None:
    x = torch.randn(1, 2, 2 * BLOCK, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return distributed_attention(x, x, x, st.Full(), block_size=BLOCK)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    if rank == 1 and phase == "forward":
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankLostError, match="start again"):
        out = compiled(x)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out.sum().backward()


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_survivors_of_a_killed_rank_raise(phase: str) -> None:
    run_ranks(lost, 3, phase, seconds=60, killed={1})
