"""Meeting: ranks whose process group is lost tell each other over a store who is left, and what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from sparsetile.errors import MismatchError, RankLostError, explain

POLL = 0.02
"""Seconds between two looks at the store."""


@dataclass
class Report:
    """What a rank tells at a meeting.

    Attributes:
        kind: ``"lost"`` (of the others it knows nothing), ``"memory"``, ``"mismatch"`` or ``"error"``.
        text: what it would say of it.
        step: where it was.
        kept: the steps whose start it holds.
        seen: the last call of each distributed attention module.
        tries: failures in a row that no rank was to blame for.
    """

    kind: str
    text: str
    step: int = 0
    kept: list[int] = field(default_factory=list)
    seen: list[Sequence[int] | None] = field(default_factory=list)
    tries: int = 0

    @classmethod
    def of(cls, error: Exception) -> Report:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        # One that had no memory to check its arguments with is refused by all with a MismatchError.
        if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
            return cls("memory", text)
        if isinstance(error, RankLostError | dist.DistError):
            return cls("lost", text)
        return cls("mismatch" if isinstance(error, MismatchError) else "error", text)


@dataclass(frozen=True)
class Meeting:
    """One of the ranks of a group that is lost.

    Attributes:
        store: with keys of this meeting alone.
        number: counts meetings.
        rank, size: this process in the group that is lost, and how many ranks that had.
        timeout: seconds that a collective of the lost group may have taken.
    """

    store: Store
    number: int
    rank: int
    size: int
    timeout: float

    @property
    def patience(self) -> float:
        """Seconds for which the first waits: the others fail within the timeout of a collective that they
        begin within another."""
        return 2 * self.timeout + 1

    @property
    def begun(self) -> bool:
        """Whether somebody is there."""
        return self.store.add("arrived", 0) > 0

    def hold(self, report: Report) -> dict[int, Report]:
        """The reports of all who came in time, by rank; the same for each of them.

        Raises:
            RankLostError: this rank came late, or the store is gone.
        """
        answer: Future[dict[str, str]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._roster(json.dumps(asdict(report))))
            except RuntimeError as problem:
                answer.set_exception(problem)

        # A thread, because a TCPStore whose host is frozen is waited for without a deadline.
        Thread(target=ask, daemon=True).start()
        try:
            roster = answer.result(self.patience + self.timeout)
        except (RuntimeError, TimeoutError) as problem:
            raise self._lost(
                "a store that outlives any rank, and answers",
                (str(problem) or type(problem).__name__).splitlines()[0],
                "Start again from the last checkpoint.",
            ) from problem
        if self._name(self.rank) not in roster:
            raise self._lost(
                f"to be there within {self.patience:g} s of the first",
                f"the others gone on without it: {', '.join(roster)}",
                "End this process. If it was only slow, give Supervisor a longer timeout.",
            )
        found = {rank: roster.get(self._name(rank)) for rank in range(self.size)}
        return {rank: Report(**json.loads(text)) for rank, text in found.items() if text is not None}

    def _roster(self, text: str) -> dict[str, str]:
        deadline = time.monotonic() + self.patience
        self.store.set(self._name(self.rank), text)
        self.store.add("arrived", 1)
        while not self.store.check(["roster"]):
            if self.store.add("arrived", 0) >= self.size or time.monotonic() > deadline:
                break
            time.sleep(POLL)
        names = [self._name(rank) for rank in range(self.size)]
        came = {name: self.store.get(name).decode() for name in names if self.store.check([name])}
        # Who is first decides for all.
        roster: dict[str, str] = json.loads(self.store.compare_set("roster", "", json.dumps(came)))
        return roster

    def _name(self, rank: int) -> str:
        return f"rank {rank}"

    def _lost(self, expected: str, got: str, fix: str) -> RankLostError:
        what = f"meeting {self.number} (rank {self.rank} of {self.size})"
        return RankLostError(explain(what, expected=expected, got=got, fix=fix))

    def group_store(self) -> Store:
        """For the group of those who came."""
        return PrefixStore("group", self.store)
