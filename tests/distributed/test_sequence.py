"""Cutting a sequence and putting it together, forward and backward."""

from __future__ import annotations

import pytest
import torch

from processes import run_ranks
from sparsetile.distributed import Sharding, shard_sequence, unshard_sequence
from sparsetile.errors import ArgumentError, MismatchError


def both_ways(rank: int, world: int, length: int) -> None:
    for where in (Sharding.contiguous(length, world, 16), Sharding.balanced(length, world, 16)):
        torch.manual_seed(length)
        x = torch.randn(2, length, 3, requires_grad=True)
        piece = shard_sequence(x, 1, where)
        assert torch.equal(piece, x[:, where.positions_of(rank)])
        whole = unshard_sequence(piece * (rank + 1), -2, where)
        weight = torch.randn(2, length, 3)
        (grad,) = torch.autograd.grad((whole * weight).sum(), x)
        factor = torch.cat([torch.full((where.tokens_of(r),), r + 1.0) for r in range(world)])
        order = torch.cat([where.positions_of(r) for r in range(world)])
        by_position = torch.empty(length).index_copy_(0, order, factor)[:, None]
        torch.testing.assert_close(whole, x * by_position)
        torch.testing.assert_close(grad, weight * by_position)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("length", [16, 100, 161])
def test_pieces_make_the_whole_and_gradients_come_back(world: int, length: int) -> None:
    run_ranks(both_ways, world, length)


def twice(rank: int, world: int) -> None:
    where = Sharding.contiguous(40, world, 16)
    torch.manual_seed(2)
    x = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for inner in (lambda y: unshard_sequence(shard_sequence(y, 0, where) ** 3, 0, where), lambda y: y**3):
        (grad,) = torch.autograd.grad(inner(x).square().sum(), x, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), x)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives() -> None:
    run_ranks(twice, 2)


def unlike(rank: int, world: int) -> list[str]:
    where = Sharding.contiguous(40, world, 16)
    count = where.tokens_of(rank)
    found = []
    for shape in ((count - rank, 2), (count, 2 + rank)):
        with pytest.raises(MismatchError, match="rank 1") as raised:
            unshard_sequence(torch.zeros(shape), 0, where)
        found.append(str(raised.value))
    return found


def test_ranks_that_pass_something_else_all_raise_the_same() -> None:
    first, second = run_ranks(unlike, 2)
    assert first == second


def test_bad_arguments_say_what_fits() -> None:
    where = Sharding.contiguous(100, 1, 16)
    with pytest.raises(ArgumentError, match="100 entries along dim 1"):
        shard_sequence(torch.zeros(2, 99), 1, where)
    with pytest.raises(ArgumentError, match=r"along dim 1\.0"):
        shard_sequence(torch.zeros(2, 100), 1.0, where)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="over the 1 ranks"):
        shard_sequence(torch.zeros(2, 100), 1, Sharding.contiguous(100, 2, 16))
    with pytest.raises(ArgumentError, match="a process group"):
        shard_sequence(torch.zeros(2, 100), 1, where, group="cp")
