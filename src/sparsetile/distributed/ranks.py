"""Ranks: who takes part in a call, and the agreement that comes before any payload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparsetile.errors import ArgumentError, MismatchError, RankLostError, SparsetileError, explain

_WORDS = 4
"""int64 words of a digest."""

_side_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share a sequence.

    Attributes:
        group: their process group; None in a world of one.
        rank, size: this process among them, and how many they are.
    """

    group: dist.ProcessGroup | None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: object) -> Ranks:
        """From a process group, a one-dimensional DeviceMesh, or None: the default group, or, where no
        process group was initialised, this process alone.

        Raises:
            ArgumentError: something else, or a group that this process is no member of.
        """
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ArgumentError(
                    explain(
                        "group",
                        expected="a DeviceMesh of one dimension",
                        got=f"one of shape {tuple(group.shape)}",
                        fix="Take the dimension that the sequence is spread over: mesh['cp'].",
                    )
                )
            group = group.get_group()
        if group is None and dist.is_available():
            # Read where it is kept: is_initialized is a constant of compiled graphs, which would then not
            # notice that there is another group.
            group = dist.distributed_c10d._world.default_pg
        if group is None:
            return cls(None)
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentError(
                explain(
                    "group",
                    expected="a process group of which this process is a member, a DeviceMesh, or None",
                    got=type(group).__name__,
                    fix="Pass mesh['cp'], or what torch.distributed.new_group returned.",
                )
            )
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def agree(
        self, call: Mapping[str, object], tokens: int, problem: Exception | str | None = None, draw: int = 0
    ) -> tuple[tuple[int, ...], int]:
        """Raises on every rank unless all of them make the same call; returns the tokens of each rank, and
        rank 0's draw.

        One all_gather of six numbers, on the CPU, so that no device is waited for.

        Args:
            call: what must be equal, by name: settings, shapes, dtypes, versions.
            tokens: what this rank holds of the sequence.
            problem: what is wrong with this rank's arguments, if anything is.
            draw: a random int64.

        Raises:
            MismatchError: ranks differ, or some have a problem; the same text on each of them. If all have
                the same exception for a problem, each raises that.
            RankLostError: a rank did not take part.
        """
        if self.group is None:
            return (tokens,), draw
        facts = {name: str(value) for name, value in call.items()}
        foreign = isinstance(problem, Exception) and not isinstance(problem, SparsetileError)
        text = None if problem is None else repr(problem) if foreign else str(problem)
        digest = hashlib.sha256(repr((facts, text)).encode()).digest()
        words = [int.from_bytes(digest[8 * i : 8 * i + 8], "little", signed=True) for i in range(_WORDS)]
        mine = torch.tensor([*words, -1 if problem is not None else tokens, draw], device="cpu")
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self.watched("the agreement before the exchange"):
            dist.all_gather(everyone, mine, group=self.side())
        rows = torch.stack(everyone).tolist()
        if all(row[:_WORDS] == rows[0][:_WORDS] for row in rows):
            if isinstance(problem, Exception):
                raise problem
            if problem is None:
                return tuple(row[_WORDS] for row in rows), rows[0][-1]
        told: list[tuple[dict[str, str], str | None] | None] = [None] * self.size
        with self.watched("the agreement before the exchange"):
            dist.all_gather_object(told, (facts, text), group=self.side())
        cause = problem if isinstance(problem, Exception) else None
        raise MismatchError(_disagreement([each for each in told if each is not None])) from cause

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Turns what the backend raises in a collective into a RankLostError."""
        try:
            yield
        except RuntimeError as problem:
            raise RankLostError(
                explain(
                    f"{what} (rank {self.rank} of {self.size})",
                    expected="all ranks to take part in time",
                    got=(str(problem) or type(problem).__name__).splitlines()[0],
                    fix="Use nothing of this call. See which rank stopped first; start again from the last "
                    "checkpoint.",
                )
            ) from problem

    def side(self) -> dist.ProcessGroup:
        """A group of the same ranks that moves CPU tensors."""
        group = self.group
        assert group is not None
        if group._get_backend_name() != "nccl":
            return group
        known = _side_groups.get(group)
        if known is None:
            members = dist.get_process_group_ranks(group)
            # A group has its backend's timeout unless told otherwise, and gloo's is half an hour.
            timeout = group._get_backend(torch.device("cuda")).options._timeout
            known = dist.new_group(members, timeout, "gloo", use_local_synchronization=True)
            _side_groups[group] = known
        return known


def _disagreement(told: Sequence[tuple[dict[str, str], str | None]]) -> str:
    """What is wrong, from all that the ranks say: the same text everywhere."""
    problems: dict[str, list[int]] = {}
    for rank, (_, problem) in enumerate(told):
        if problem is not None:
            problems.setdefault(problem, []).append(rank)
    if problems:
        return explain(
            "distributed call",
            expected=f"arguments that all {len(told)} ranks can serve",
            got="; ".join(f"{_ranks(who)}: {problem.rstrip('.')}" for problem, who in problems.items()),
            fix="Nothing was sent.",
        )
    differing = []
    for name in told[0][0]:
        of: dict[str | None, list[int]] = {}
        for rank, (facts, _) in enumerate(told):
            of.setdefault(facts.get(name), []).append(rank)
        if len(of) > 1:
            differing.append(
                name + ": " + ", ".join(f"{value} on {_ranks(who)}" for value, who in of.items())
            )
    return explain(
        "distributed call",
        expected=f"the same on all {len(told)} ranks",
        got="; ".join(differing),
        fix="Nothing was sent. Give every rank the same pattern, settings, shapes and dtypes.",
    )


def _ranks(who: Sequence[int]) -> str:
    return f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
