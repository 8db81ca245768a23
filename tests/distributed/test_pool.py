"""Memory that is lent: never twice at a time, reused where it fits, given up under pressure."""

from __future__ import annotations

import gc
import random
from itertools import pairwise

import pytest
import torch

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import Sharding, distributed_attention
from sparsetile.distributed.pool import BufferPool, Lease, PoolStatistics, pool_of, size_class
from sparsetile.errors import ArgumentError, PoolError

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float64)


def test_live_leases_never_alias() -> None:
    seed = random.getrandbits(40)
    draw = random.Random(seed)
    pool = BufferPool("cpu", cap_bytes=draw.choice((None, 1, 40_000)))
    live: list[tuple[Lease, int]] = []
    for mark in range(600):
        if live and draw.random() < 0.5:
            lease, number = live.pop(draw.randrange(len(live)))
            assert bool((lease.tensor == number).all()), seed
            lease.release()
            continue
        shape = [draw.randrange(0, 20) for _ in range(draw.randrange(0, 4))]
        lease = pool.lease(shape, draw.choice(DTYPES))
        assert list(lease.tensor.shape) == shape and lease.tensor.is_contiguous()
        lease.tensor.fill_(mark % 200)
        live.append((lease, mark % 200))
        ranges = sorted((x.tensor.data_ptr(), x.tensor.nbytes) for x, _ in live if x.tensor.numel())
        for (start, size), (following, _) in pairwise(ranges):
            assert start + size <= following, seed
        now = pool.statistics()
        assert now.leases >= now.allocations and now.peak_bytes >= now.live_bytes + now.idle_bytes
    for lease, number in live:
        assert bool((lease.tensor == number).all()), seed
        lease.release()
    assert pool.statistics().live_bytes == 0


def test_varying_sizes_are_served_by_few_buffers() -> None:
    pool = BufferPool("cpu")
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randrange(50_000, 100_000)
        with pool.lease((size,)) as first, pool.lease((size // 2,)) as second:
            assert first.data_ptr() != second.data_ptr()
    now = pool.statistics()
    assert now.leases == 400 and now.allocations <= 10
    assert now.idle_bytes == now.peak_bytes <= 10 * size_class(400_000)


def test_size_classes() -> None:
    assert [size_class(x) for x in (0, 1, 512, 513, 640, 641, 1024, 1025)] == [
        *(512, 512, 512, 640, 640, 768, 1024, 1280),
    ]
    for _ in range(200):
        size = random.randrange(1, 1 << random.randrange(1, 50))
        assert size <= size_class(size) <= max(512, 1.25 * size)
        assert size_class(size_class(size)) == size_class(size)


def test_nothing_far_too_large_is_lent() -> None:
    pool = BufferPool("cpu")
    pool.lease((1_000_000,)).release()
    with pool.lease((1000,)):
        assert pool.statistics().allocations == 2
    with pool.lease((600_000,)):
        assert pool.statistics().allocations == 2


def test_pressure_gives_up_what_waits() -> None:
    pool = BufferPool("cpu", cap_bytes=10_000)
    for lease in [pool.lease((size,), torch.uint8) for size in (4000, 3000, 1000)]:
        lease.release()
    assert pool.statistics().idle_bytes == 4096 + 3072 + 1024
    with pool.lease((6000,), torch.uint8):
        now = pool.statistics()
        assert (now.live_bytes, now.idle_bytes, now.trimmed_bytes) == (6144, 1024, 4096 + 3072)
        with pool.lease((50_000,), torch.uint8):  # asked for, so lent
            assert pool.statistics().idle_bytes == 0
    pool.trim()
    now = pool.statistics()
    assert now.idle_bytes == now.live_bytes == 0 and now.peak_bytes == 6144 + 57344


def test_what_autograd_saved_is_found_out() -> None:
    pool = BufferPool("cpu")
    weight = torch.randn(8, requires_grad=True)
    lease = pool.lease((8,))
    loss = (weight * lease.tensor.fill_(2.0)).sum()
    lease.release()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_released_lease_is_of_no_use() -> None:
    pool = BufferPool("cpu")
    lease = pool.lease((4,))
    with lease:
        pass
    with pytest.raises(PoolError, match="after its release"):
        lease.release()
    with pytest.raises(PoolError, match="after its release"):
        _ = lease.tensor
    assert pool.statistics().live_bytes == 0
    with pool.lease((4,)), pytest.raises(RuntimeError, match="from inside"), pool.lease((4,)):
        raise RuntimeError("from inside")
    assert pool.statistics().live_bytes == 0 and pool.statistics().idle_bytes == 1024


def test_a_dropped_lease_takes_its_buffer_with_it() -> None:
    pool = BufferPool("cpu")
    tensor = pool.lease((4,)).tensor.fill_(1.0)
    gc.collect()
    now = pool.statistics()
    assert now.live_bytes == now.idle_bytes == 0
    with pool.lease((4,)) as other:
        assert other.data_ptr() != tensor.data_ptr()


def exchanged(rank: int, world: int, keep: bool, per_head: bool, seed: int) -> PoolStatistics:
    draw = random.Random(seed)
    pattern = st.Local(300) | (st.Anchored(4096, 4) if per_head else st.Global(40))
    for _ in range(20):
        where = Sharding.contiguous(draw.randrange(600, 1200), world, 32)
        x = torch.randn(1, 2, where.tokens_of(rank), 16, requires_grad=True)
        out = distributed_attention(x, x, x, pattern, block_size=32, keep=keep)
        out.square().sum().backward()
    return pool_of(x.device).statistics()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_exchanges_of_varying_length_return_all_they_lend(keep: bool, per_head: bool) -> None:
    seed = random.getrandbits(40)
    for now in run_ranks(exchanged, 2, keep, per_head, seed):
        assert now.live_bytes == 0 and now.leases >= 20 * 5, seed
        assert now.allocations < 0.25 * now.leases, seed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BufferPool("cpu", 0), "cap_bytes: expected bytes from 1 on, got 0"),
        (lambda: BufferPool("cpu", True), "cap_bytes: expected bytes from 1 on, got True"),
        (lambda: BufferPool("cpu").lease((2, -1)), r"shape: expected sizes from 0 on, got \[2, -1\]"),
        (lambda: BufferPool("cpu").lease((2.0,)), r"shape: expected sizes from 0 on, got \[2.0\]"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
