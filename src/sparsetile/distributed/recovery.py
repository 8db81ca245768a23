"""Steps that count on all ranks or on none, and what comes after a rank was lost.

A step ends with a vote: a small all_gather on the CPU that a rank joins once its gradients are there. Only
after it the optimizer acts. Whoever fails, wherever in the step, does not vote: it leaves the process group,
which closes its connections, so that the others fail as well, and all meet again over a store. There each
tells what happened to it. Who came by the deadline makes up the next group; what was told, the same for
everyone, says what all of them do: go back to the last state that was kept and compute again, with smaller
stages if a rank ran out of memory, or raise.

Every rank keeps the state that a step starts from until the vote of that step shows that all have it: so
there is always one that all of them hold, and none has to be sent. (The vocabulary is that of torchft and of
PyTorch's elastic agents; they restart or heal replicas, here the ranks of one sequence share it anew.)
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

# Default arguments in there hold the process group of the time of import, and so its connections open, which
# is why these come now; torch.optim imports them when the first optimizer is made.
import torch.distributed.fsdp.sharded_grad_scaler
import torch.distributed.nn.functional
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparsetile.distributed.call import sharding_by
from sparsetile.distributed.meeting import POLL, Meeting, Report
from sparsetile.distributed.module import BlockSparseRingDistributedDilatedAttention
from sparsetile.distributed.plan import make_plan
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.state import State, Stateful
from sparsetile.errors import ArgumentError, RankLostError, StepError, explain
from sparsetile.layout.cache import cached_layout
from sparsetile.nn.attention import BlockSparseRingDilatedAttention

Result = TypeVar("Result")
_TRIES = 3
"""How often in a row the same ranks lose each other before they give up."""


class Supervisor:
    """Runs training steps that all ranks of the default process group end alike.

    The model's parameters are whole on every rank, and the same; the sequence is spread over all ranks, as by
    ``BlockSparseRingDistributedDilatedAttention(group=None)``. Collective: make it on every rank.

    Args:
        model: its parameters and buffers are kept and restored.
        optimizer: stepped after each vote.
        store: a TCPStore or FileStore that outlives any rank, the same for all.
        timeout: seconds without an answer after which a rank counts as lost; give it to
            ``init_process_group`` as well. A meeting after a loss takes a little over twice as long.
        every: steps between two states that are kept. A copy waits for the device; a recovery computes up to
            so many steps again.
        also: objects with ``state_dict`` and ``load_state_dict`` that a step changes: a data loader.
        step: the number of the first step.

    Attributes:
        step: steps that counted, and so the number of the next one.

    Raises:
        ArgumentError: an argument is not as above, or the model keeps a process group of its own: a module
            with ``group`` or ``ring``, DistributedDataParallel, DTensor parameters. The same on every rank.
        MismatchError: ranks differ; RankLostError: one did not take part.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        store: Store,
        *,
        timeout: float,
        every: int = 1,
        also: Sequence[Stateful] = (),
        step: int = 0,
    ) -> None:
        ranks = Ranks.of(None)
        problem = _problem(model, optimizer, store, timeout, every, step, ranks)
        shapes = [] if problem else [(name, tuple(x.shape)) for name, x in model.named_parameters()]
        call = {
            "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest()[:8],
            "timeout": repr(timeout),
            "every": repr(every),
            "first step": repr(step),
        }
        ranks.agree(call, 0, problem)
        if problem is not None:  # without a group nobody else is told
            raise problem
        self.model, self.optimizer, self.step = model, optimizer, step
        self._others, self._timeout, self._every = (optimizer, *also), float(timeout), every
        self._attention = [
            x for x in model.modules() if isinstance(x, BlockSparseRingDistributedDilatedAttention)
        ]
        self._rank, self._size = ranks.rank, ranks.size
        self._backend = dist.get_backend()
        store.set_timeout(timedelta(seconds=self._timeout))
        # A store may have served other runs: this one has a name of its own.
        name = [uuid4().hex]
        with ranks.watched("the first meeting"):
            dist.broadcast_object_list(name, src=0, group=ranks.side())
        self._store = PrefixStore(f"sparsetile/{name[0]}", store)
        self._meetings = self._tries = 0
        self._kept = [State.of(step, model, self._others)]

    def run(self, step: Callable[[int], Result], until: int) -> Result | None:
        """Computes the steps ``self.step, …, until − 1``; collective.

        Args:
            step: ``step(number)`` leaves in the parameters the gradients that the optimizer is to use, summed
                over ranks: see :meth:`watched`. It takes its data by the number. It may be called again with
                a number that it was called with before, after the state of then was restored and with
                another number of ranks. Gradients are cleared before.
            until: the number to stop at, the same on every rank.

        Returns:
            What ``step`` returned last; None if there was nothing to do. Return numbers or detached tensors:
            a graph keeps the connections of a lost group open, and the others waiting.

        Raises:
            StepError: a step cannot be computed: an error on a rank, memory that one tile a stage does not
                fit into, connections lost again and again. The same on every rank; all are back in the state
                that the message names, in a process group that works.
            RankLostError: the others went on without this rank, or the store is gone. No process group is
                left, and the model's distributed modules refuse to work: end the process.
        """
        if not dist.is_initialized():
            raise RankLostError(
                explain(
                    "Supervisor.run",
                    expected="a process group",
                    got="none any more",
                    fix="End this process.",
                )
            )
        while True:
            cause, result = None, None
            try:
                while self.step < until:
                    result = self._one(step)
                self._end(until)
                return result
            except Exception as error:
                report = Report.of(error)
                _let_go(error)
                cause = error if report.kind == "error" else None
            # Outside of the handler, which would hold all that the step has allocated.
            result = None
            self._recover(report, cause)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Around a step's own collectives: what they raise becomes a RankLostError.

        Example:
            >>> with supervisor.watched("the sum of gradients"):
            ...     torch.distributed.all_reduce(parameter.grad)
        """
        with Ranks.of(None).watched(what):
            yield

    # One step

    def _one(self, step: Callable[[int], Result]) -> Result:
        if self.step % self._every == 0 and self._kept[-1].step != self.step:
            self._kept.append(State.of(self.step, self.model, self._others))
        self._clear_gradients()
        result = step(self.step)
        Ranks.of(None).agree({"vote on step": self.step}, 0)
        # All have begun this step, so they hold what it began from.
        del self._kept[:-1]
        self._tries = 0
        self.optimizer.step()
        self.step += 1
        return result

    def _end(self, until: int) -> None:
        """Returns once all ranks are known to have come as far as this one."""
        try:
            Ranks.of(None).agree({"the end": until}, 0)
        except RankLostError:
            # A rank that passed may be gone for good, rightly: it has left word.
            deadline = time.monotonic() + self._timeout
            while not self._store.check([f"end {until}"]):
                if time.monotonic() > deadline or self._meeting(1).begun:
                    raise
                time.sleep(POLL)
        else:
            self._store.set(f"end {until}", "")

    def _clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    # After a failure

    def _recover(self, report: Report, cause: Exception | None) -> None:
        """Meets the others again and does with them what the reports say."""
        failure: str | None = None
        while True:
            self._leave()
            report.step, report.tries = self.step, self._tries
            report.kept = [state.step for state in self._kept]
            report.seen = [module.seen for module in self._attention]
            meeting = self._meeting(1)
            self._meetings += 1
            try:
                told = meeting.hold(report)
            except RankLostError:
                # Without a group a module would take this rank's tokens for a whole sequence.
                for module in self._attention:
                    module.ring = "the process group was lost"
                raise
            failure = failure or self._failure(told)
            back = max(set.intersection(*(set(each.kept) for each in told.values())))
            try:
                self._form(sorted(told), meeting)
                break
            except RuntimeError as error:  # one more was lost meanwhile
                report = Report("lost", str(error))
        self._kept = [state for state in self._kept if state.step == back]
        self._kept[0].restore(self.model, self._others)
        self.step = back
        if failure is not None:
            raise StepError(f"{failure} Every rank is back at the start of step {back}.") from cause

    def _leave(self) -> None:
        self._clear_gradients()
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()
        # gloo closes its connections when nothing refers to the group any more.
        gc.collect()
        torch.cuda.empty_cache()

    def _meeting(self, further: int) -> Meeting:
        number = self._meetings + further
        store = PrefixStore(f"meeting {number}", self._store)
        return Meeting(store, number, self._rank, self._size, self._timeout)

    def _form(self, members: list[int], meeting: Meeting) -> None:
        """The group of the ranks that are left, in the order that they had."""
        self._rank, self._size = members.index(self._rank), len(members)
        dist.init_process_group(
            self._backend,
            store=meeting.group_store(),
            rank=self._rank,
            world_size=self._size,
            timeout=timedelta(seconds=self._timeout),
        )

    def _failure(self, told: dict[int, Report]) -> str | None:
        """Why no rank can go on; None if they compute again. Changes the stages if that helps."""
        kinds = {each.kind for each in told.values()}
        if "error" in kinds:
            return self._explained(told, "error", "See what the rank says.")
        if "memory" in kinds:
            # With fewer ranks everything is different: first try that.
            if len(told) < self._size or self._take_smaller_stages(list(told.values())):
                return None
            return self._explained(told, "memory", "No stage can be smaller: take a shorter sequence.")
        if "mismatch" in kinds:
            return self._explained(told, "mismatch", "Give every rank the same.")
        if len(told) == self._size:
            self._tries = 1 + max(each.tries for each in told.values())
            if self._tries > _TRIES:
                return self._explained(told, "lost", "Look after the network, or give a longer timeout.")
        return None

    def _explained(self, told: dict[int, Report], kind: str, fix: str) -> str:
        texts: dict[str, list[int]] = {}
        for rank, each in told.items():
            if each.kind == kind:
                texts.setdefault(each.text.rstrip("."), []).append(rank)
        step = min(each.step for each in told.values() if each.kind == kind)
        got = (f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {t}" for t, who in texts.items())
        return explain(
            f"step {step}", expected=f"all {self._size} ranks to compute it", got="; ".join(got), fix=fix
        )

    def _take_smaller_stages(self, told: list[Report]) -> bool:
        """Halves what arrives at a time in every distributed module, down to a tile; whether any changed."""
        changed = False
        for module, *seen in zip(self._attention, *(each.seen for each in told), strict=True):
            calls = [each for each in seen if each is not None]
            if len(calls) < len(seen) or len({tuple(call[1:]) for call in calls}) > 1:
                continue  # not every rank came so far: this module is not what was too large
            most = _remote_tokens(module, sum(call[0] for call in calls), self._size, calls[0])
            bound, block = module.config.max_remote_tokens, module.plan_over(self._size).block_size
            now = most if bound is None else min(bound, most)
            if now > block:
                half = max(block, now // 2 // block * block)
                module.config = replace(module.config, max_remote_tokens=half)
                changed = True
        return changed


def _let_go(error: BaseException | None) -> None:
    """Empties the frames that an error came through: they hold tensors, and the process group."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _remote_tokens(
    module: BlockSparseRingDistributedDilatedAttention, length: int, ranks: int, call: Sequence[int]
) -> int:
    """The most tokens (of each kv head) that a call brings a rank if nothing bounds them."""
    _, heads, kv_heads, is_causal = call
    planned = module.plan_over(ranks)  # there is no group now
    block = planned.block_size
    layout = cached_layout(planned.pattern_for(bool(is_causal)), length, None, block, "cpu", heads)
    where = sharding_by(module.order, length, ranks, block)
    plan = make_plan(layout, where, kv_heads=kv_heads, group_size=heads // kv_heads)
    if not plan.units:
        return 0
    return int(torch.bincount(plan.destination * plan.groups + plan.head).max()) * block


def _problem(
    model: object,
    optimizer: object,
    store: object,
    timeout: object,
    every: object,
    step: object,
    ranks: Ranks,
) -> ArgumentError | None:
    """What is wrong with the arguments of a Supervisor."""

    def bad(name: str, expected: str, got: object, fix: str) -> ArgumentError:
        return ArgumentError(explain(f"Supervisor({name})", expected=expected, got=got, fix=fix))

    if ranks.group is None:
        return bad("…", "a process group", "none", "Call torch.distributed.init_process_group first.")
    for name, value, kind in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("store", store, Store),
    ):
        if not isinstance(value, kind):
            return bad(name, f"a {kind.__name__}", type(value).__name__, "See the docstring.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        return bad("timeout", "seconds above 0", repr(timeout), "Take that of init_process_group.")
    for name, number, least in (("every", every, 1), ("step", step, 0)):
        if type(number) is not int or number < least:
            return bad(name, f"an int of at least {least}", repr(number), "Count steps.")
    assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        held = isinstance(module, BlockSparseRingDilatedAttention) and module.ring is not None
        if held or isinstance(module, DistributedDataParallel):
            return bad(
                "model",
                "modules that use the default process group",
                f"{name or 'the model'}, a {type(module).__name__} with a group of its own",
                "That group does not survive the loss of a rank: leave group=None, sum gradients in step.",
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            return bad(
                "model", "parameters that are whole on every rank", f"{name}, a DTensor", "Replicate them."
            )
    return None
