"""Spreading a sequence over ranks and putting it together again, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, explain


def shard_sequence(x: Tensor, dim: int, sharding: Sharding, group: object = None) -> Tensor:
    """This rank's tokens of a sequence that every rank has whole.

    Args:
        x: any tensor with ``sharding.length`` entries along ``dim``, the same on every rank.
        dim: the dimension of tokens.
        sharding: who holds what.
        group: process group, one-dimensional DeviceMesh, or None: the default group, or this process alone.

    Returns:
        x with ``sharding.tokens_of(rank)`` entries along ``dim``. Backward is a collective: every rank gets
        the gradient of all of x, put together from the pieces of all ranks.

    Raises:
        ArgumentError: x has another length, or the group has another size than the sharding.
    """
    ranks = Ranks.of(group)
    _check_fit(sharding, ranks)
    dim = _dimension(x, dim, sharding.length, "shard_sequence(x)")
    piece: Tensor = _Shard.apply(x, dim, sharding, ranks)  # type: ignore[no-untyped-call]
    return piece


def unshard_sequence(x: Tensor, dim: int, sharding: Sharding, group: object = None) -> Tensor:
    """The whole sequence on every rank, from the tokens that each of them holds.

    Args:
        x: a tensor with ``sharding.tokens_of(rank)`` entries along ``dim``, all else the same on every rank.
        dim, sharding, group: as for :func:`shard_sequence`.

    Returns:
        x with ``sharding.length`` entries along ``dim``, the same on every rank. In backward a rank takes its
        own tokens of its own gradient: ranks that go on alike, as with a loss that each computes of the whole
        sequence, count once.

    Raises:
        ArgumentError: as :func:`shard_sequence`, where all ranks make the same mistake.
        MismatchError: ranks differ in what they pass; the same on every rank.
        RankLostError: a rank did not take part.
    """
    ranks = Ranks.of(group)
    problem: ArgumentError | None = None
    facts: dict[str, object] = {}
    try:
        _check_fit(sharding, ranks)
        count = sharding.tokens_of(ranks.rank)
        dim = _dimension(x, dim, count, "unshard_sequence(x)")
        others = [*x.shape[:dim], *x.shape[dim + 1 :]]
        facts = {"sharding": sharding, "dim": dim, "other sizes": others, "dtype": x.dtype}
    except ArgumentError as error:
        problem = error
    ranks.agree(facts, 0, problem)
    if problem is not None:  # without a group nobody else waits
        raise problem
    whole: Tensor = _Unshard.apply(x, dim, sharding, ranks)  # type: ignore[no-untyped-call]
    return whole


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sharding: Sharding, ranks: Ranks) -> Tensor:
        ctx.how = dim, sharding, ranks
        return own(x, dim, sharding, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Not its plain function: the gradient has a gradient, too.
        return _Unshard.apply(grad, *ctx.how), None, None, None  # type: ignore[no-untyped-call]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sharding: Sharding, ranks: Ranks) -> Tensor:
        ctx.how = dim, sharding, ranks
        return gathered(x, dim, sharding, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Shard.apply(grad, *ctx.how), None, None, None  # type: ignore[no-untyped-call]


def own(x: Tensor, dim: int, sharding: Sharding, ranks: Ranks) -> Tensor:
    """What :func:`shard_sequence` returns, without a gradient."""
    if ranks.size == 1:
        return x.clone()
    # Runs, not positions: those would be copied to the device at every call.
    runs = sharding.runs_of(ranks.rank)
    return torch.cat([x.narrow(dim, at, count) for at, count in runs] or [x.narrow(dim, 0, 0)], dim)


def gathered(x: Tensor, dim: int, sharding: Sharding, ranks: Ranks) -> Tensor:
    """What :func:`unshard_sequence` returns, without a gradient. Collective."""
    if ranks.size == 1:
        return x.clone()
    counts = [sharding.tokens_of(rank) for rank in range(ranks.size)]
    rows = x.movedim(dim, 0).contiguous()
    # Pieces differ by a tile at most; all_gather wants them equal.
    mine = rows.new_zeros((max(counts), *rows.shape[1:]))
    mine[: rows.shape[0]] = rows
    pieces = [torch.empty_like(mine) for _ in counts]
    with ranks.watched("the gathering of a sequence"):
        dist.all_gather(pieces, mine, group=ranks.group)
    whole = rows.new_empty((sharding.length, *rows.shape[1:]))
    for rank, piece in enumerate(pieces):
        for at, count in sharding.runs_of(rank):
            whole[at : at + count] = piece[:count]
            piece = piece[count:]
    return whole.movedim(0, dim).contiguous()


def _check_fit(sharding: Sharding, ranks: Ranks) -> None:
    if not isinstance(sharding, Sharding) or sharding.ranks != ranks.size:
        raise ArgumentError(
            explain(
                "sharding",
                expected=f"a Sharding over the {ranks.size} ranks of the group",
                got=sharding,
                fix="Sharding.contiguous(length, ranks, block) makes one.",
            )
        )


def _dimension(x: Tensor, dim: int, count: int, what: str) -> int:
    if (
        not isinstance(x, Tensor)
        or type(dim) is not int
        or not -x.dim() <= dim < x.dim()
        or x.shape[dim] != count
    ):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(
            explain(
                what,
                expected=f"a tensor with {count} entries along dim {dim}",
                got=got,
                fix="See Sharding.tokens_of(rank) for what each rank holds.",
            )
        )
    return dim % x.dim()
