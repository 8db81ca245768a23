"""Training over ranks: who has which rows and tokens of a batch, and what they add up.

Ranks stand in a grid, dp × cp. Its rows share out the sequences of a batch (data parallel); the ranks of a
row hold the tokens of the same sequences (context parallel). The model knows nothing of this: it gets the
positions of its tokens, and an attention and a token shift that reach the tokens of other ranks. Every rank
has all parameters. The sum of the gradients over all ranks, taken in one piece after backward, is that of the
mean over all tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsetile.distributed import distributed_attention, shard_sequence, unshard_sequence
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding, choose_sharding
from sparsetile.errors import ArgumentError, RankLostError, SparsetileError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.train.arms import DENSE, Arm
from sparsetile.train.model import KEY_TAPS, QUERY_TAPS, token_shift

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=10)
_REACH = max(*QUERY_TAPS, *KEY_TAPS)
_ALONE = Ranks(None)


@dataclass(frozen=True, eq=False)
class Parallel:
    """The place of this process in the grid; of a process that trains alone by default.

    Attributes:
        world: all ranks.
        dp: those with the same tokens of other sequences.
        cp: those with other tokens of the same sequences.
        node: how many of ``cp`` stand on one node, if these are several.
    """

    world: Ranks = _ALONE
    dp: Ranks = _ALONE
    cp: Ranks = _ALONE
    node: int | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.world.rank == 0

    def rows(self, batch: int) -> range:
        """This rank's rows of a batch."""
        each = batch // self.dp.size
        return range(self.dp.rank * each, (self.dp.rank + 1) * each)

    def check(self, arm: Arm, context: int, block: int, batch: int) -> None:
        """Raises ArgumentError unless this arm, and sequences like these, can be spread over the grid."""
        dp, cp = self.dp.size, self.cp.size
        if self.world.size > 1 and arm.adaptive is not None:
            _refuse(
                "the adaptive arm",
                "one process",
                f"{self.world.size}",
                "Over ranks train --attention PATTERN: what chooses tiles is not spread.",
            )
        if cp > 1 and arm.attention == DENSE:
            _refuse(
                f"--context-parallel {cp}",
                "an arm with a pattern",
                "dense attention",
                "Use --attention 'Full()', the same attention by tiles, or --context-parallel 1.",
            )
        tiles = -(-context // block)
        if tiles < cp:
            _refuse(
                f"--context-parallel {cp}",
                "a tile at least for each rank",
                f"{tiles} in {context:,} bytes with tiles of {block}",
                "Use a longer --context, a smaller --block or fewer ranks.",
            )
        if batch % dp:
            _refuse(
                f"--batch {batch}",
                f"a multiple of {dp}, since {self.world.size} processes are {dp} × {cp}",
                batch,
                f"Use --batch {-(-batch // dp) * dp}.",
            )

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Adds up the gradients of all ranks in place, and returns the sum of their losses (a scalar)."""
        if self.world.size == 1:
            return loss
        grads = [p.grad for p in parameters if p.grad is not None]
        total = torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in grads)])
        with self.world.watched("the sum of gradients"):
            dist.all_reduce(total, group=self.world.group)
        summed, *parts = torch.split(total, [1, *(grad.numel() for grad in grads)])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return summed.squeeze(0)

    def sum_of_rows(self, x: Tensor) -> Tensor:
        """The sum of a CPU tensor over the rows of the grid."""
        if self.dp.size > 1:
            with self.dp.watched("the sum over held-out sequences"):
                dist.all_reduce(x, group=self.dp.side())
        return x

    def most(self, value: float) -> float:
        """The largest value of any rank: what all of them go by, where each has its own clock."""
        if self.world.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        with self.world.watched("the slowest rank's time"):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.world.side())
        return found.item()

    def of_first(self, read: Callable[[], T]) -> T:
        """What ``read`` returns, or raises, on the first rank: the same on every rank."""
        if self.world.size == 1:
            return read()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = read()
            except Exception as error:  # whatever it is, the others must not wait for this rank
                told[1] = error
        with self.world.watched("what the first rank read"):
            dist.broadcast_object_list(told, 0, group=self.world.side())
        if told[1] is not None:
            raise told[1]
        value: T = told[0]
        return value

    def agreed(self, make: Callable[[], T], facts: Callable[[T], dict[str, object]]) -> T:
        """What ``make`` returns on this rank, once its ``facts`` are the same on every rank.

        Raises:
            MismatchError: they differ, or some ranks failed; the same on every rank.
            Exception: what ``make`` raised, where it was the same everywhere.
        """
        problem: Exception | None = None
        told: dict[str, object] = {}
        try:
            made = make()
            told = facts(made)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            problem = error
        self.world.agree(told, 0, problem)
        if problem is not None:  # without a group nobody else waits
            raise problem
        return made

    @contextmanager
    def said_once(self) -> Iterator[None]:
        """Around what all ranks do alike: an error that each of them has is printed by the first one.

        Raises:
            SystemExit: on every rank of several, instead of a SparsetileError.
        """
        try:
            yield
        except RankLostError:
            raise
        except SparsetileError as error:
            if self.world.size == 1:
                raise
            if self.first:
                print(f"sparsetile: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            # torchrun ends all ranks when one has left: not before the first one has spoken.
            with self.world.watched("the end"):
                dist.barrier(group=self.world.side())
            raise SystemExit(2 if isinstance(error, ValueError) else 1) from error


def joined(context_parallel: int, device: str, work: Callable[[Parallel], T]) -> T:
    """What ``work`` returns, given the grid of all processes that torchrun started, ``context_parallel`` to a
    row; they part afterwards.

    A process group that is there already is used, and stays. ``device`` is "cpu" or "cuda".

    Raises:
        ArgumentError: the number of processes is no multiple of ``context_parallel`` (of several processes:
            SystemExit, said once).
    """
    ours = not dist.is_initialized()
    if ours and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if context_parallel > 1:
            _refuse_processes(context_parallel, 1)
        return work(Parallel())
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ours:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    result = work(grid(context_parallel))
    # Not where a rank fails: with NCCL this waits for the others, who may not come. And not while anything
    # holds a group: gloo's threads then live on, and abort a Python that shuts down under them.
    if ours:
        dist.destroy_process_group()
    return result


def grid(context_parallel: int) -> Parallel:
    """All ranks of the default group, ``context_parallel`` to a row; raises as ``joined`` does."""
    world = Ranks.of(None)
    with Parallel(world).said_once():
        if world.size % context_parallel:
            _refuse_processes(context_parallel, world.size)
    rows = torch.arange(world.size, device="cpu").view(-1, context_parallel)
    made = Parallel(world, Ranks.of(_groups(rows.T)), Ranks.of(_groups(rows)))
    # torchrun numbers ranks node by node, so a row covers whole nodes or lies within one.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    alike = made.most(here) == -made.most(-here)
    several = here < context_parallel and context_parallel % here == 0
    return replace(made, node=here if alike and several else None)


def _groups(rows: Tensor) -> dist.ProcessGroup:
    """The one of these rows that this rank is in."""
    # Not a DeviceMesh: its groups have their backend's timeout, half an hour with gloo, whatever we ask for.
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=_TIMEOUT)  # type: ignore[no-untyped-call]
    return group


def _refuse_processes(context_parallel: int, world: int) -> NoReturn:
    _refuse(
        f"--context-parallel {context_parallel}",
        f"a number of processes that {context_parallel} divides",
        world,
        f"Start torchrun --nproc-per-node {context_parallel} -m sparsetile train "
        f"--context-parallel {context_parallel} …",
    )


def _refuse(what: str, expected: str, got: object, fix: str) -> NoReturn:
    raise ArgumentError(explain(what, expected=expected, got=got, fix=fix))


class Tokens:
    """This rank's tokens of every sequence, and how they reach those of the other ranks of the row.

    Args:
        layout: the causal pattern's tiles of the whole sequence, on the CPU.
        cp: the ranks that share it; each gets one tile at least.
        device: of the tokens.
        node: how many of the ranks stand on one node, if these are several: what they need of another's then
            crosses to it once.

    Attributes:
        positions: int64 ``[n]``, where this rank's tokens stand.
    """

    def __init__(self, layout: BlockLayout, cp: Ranks, device: torch.device, node: int | None = None) -> None:
        self.layout, self.cp, self.node = layout, cp, node
        self.where = choose_sharding(layout, cp.size)
        self.positions = self.where.positions_of(cp.rank).to(device)
        self._earlier = _Earlier.of(self.where, cp, device)

    def own(self, x: Tensor) -> Tensor:
        """This rank's of all tokens; they are dimension 1."""
        return shard_sequence(x, 1, self.where, self.cp.group)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, from each rank's; they are dimension 1."""
        return unshard_sequence(x, 1, self.where, self.cp.group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over all tokens, for those of this rank."""
        return distributed_attention(
            q,
            k,
            v,
            self.layout,
            group=self.cp.group,
            order="contiguous" if self.where.order is None else "balanced",
            block_size=self.where.block,
            enable_gqa=True,
            ranks_per_node=self.node,
        )

    def shifted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`token_shift` of all tokens, for those of this rank."""
        pieces = [token_shift(piece) for piece in self._earlier.before_runs(x)]
        of_q, of_k = (
            torch.cat([piece[:, _REACH:] for piece in side], 1) for side in zip(*pieces, strict=True)
        )
        return of_q, of_k


@dataclass(frozen=True, eq=False)
class _Earlier:
    """Moves the last tokens before each unbroken run from the rank that holds them.

    Attributes:
        runs: tokens of each of this rank's runs, in order.
        send: int64 ``[Σ send_splits]``, the places of the tokens to send, by receiving rank.
        place: int64 ``[_REACH · runs]``, what precedes each run, among what arrives and one zero after that.
    """

    runs: list[int]
    send: Tensor
    send_splits: list[int]
    recv_splits: list[int]
    place: Tensor
    ranks: Ranks

    @classmethod
    def of(cls, where: Sharding, ranks: Ranks, device: torch.device) -> _Earlier:
        owner, local = where.tile_owner().tolist(), where.local_index().tolist()
        back = torch.arange(-_REACH, 0, device="cpu")
        send: list[Tensor] = []
        sent = [0] * ranks.size
        arriving: list[tuple[int, int]] = []  # (the rank it comes from, the number of the run)
        for rank in range(ranks.size):
            for number, (at, _) in enumerate(where.runs_of(rank)):
                before = at // where.block - 1  # a whole tile, since another follows it
                if before >= 0 and owner[before] == ranks.rank:
                    send.append((local[before] + 1) * where.block + back)
                    sent[rank] += _REACH
                if before >= 0 and rank == ranks.rank:
                    arriving.append((owner[before], number))
        arriving.sort()
        counts = [count for _, count in where.runs_of(ranks.rank)]
        place = torch.full((len(counts), _REACH), _REACH * len(arriving), device="cpu")
        for index, (_, number) in enumerate(arriving):
            place[number] = index * _REACH + torch.arange(_REACH, device="cpu")
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        return cls(
            counts,
            torch.cat([nothing, *send]).to(device),
            sent,
            [_REACH * sum(source == rank for source, _ in arriving) for rank in range(ranks.size)],
            place.flatten().to(device),
            ranks,
        )

    def before_runs(self, x: Tensor) -> list[Tensor]:
        """The runs of ``x`` [B, n, C], each ``[B, _REACH + tokens, C]`` with the tokens before it."""
        rows = x.transpose(0, 1).index_select(0, self.send)
        moved: Tensor = _Moved.apply(rows, self.send_splits, self.recv_splits, self.ranks)  # type: ignore[no-untyped-call]
        # Made of what arrives even where nothing does: backward is a collective.
        padded = torch.cat([moved, moved.new_zeros((1, *moved.shape[1:]))])
        before = torch.split(padded.index_select(0, self.place).transpose(0, 1), _REACH, 1)
        runs = torch.split(x, self.runs, 1)
        return [torch.cat([earlier, run], 1) for earlier, run in zip(before, runs, strict=True)]


class _Moved(torch.autograd.Function):
    """Rows to the ranks that ``send`` counts them for; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], recv: list[int], ranks: Ranks) -> Tensor:
        ctx.how = send, recv, ranks
        return _move(rows, send, recv, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, recv, ranks = ctx.how
        return _move(grad, recv, send, ranks), None, None, None


def _move(rows: Tensor, send: list[int], recv: list[int], ranks: Ranks) -> Tensor:
    out = rows.new_empty((sum(recv), *rows.shape[1:]))
    with ranks.watched("the tokens before a run"):
        dist.all_to_all_single(out, rows.contiguous(), recv, send, group=ranks.group)
    return out
