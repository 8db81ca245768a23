"""A small training run over ranks, and faults to strike it with; shared by the tests and the soak."""

from __future__ import annotations

import copy
import os
import random
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

# What the first optimizer imports: once here, not in every process.
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

import sparsetile as st
from processes import run_ranks
from sparsetile.distributed import parts, shard_sequence
from sparsetile.distributed.exchange import Exchange
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.recovery import Supervisor
from sparsetile.errors import RankLostError, StepError

LENGTH, HEADS, DIM, BLOCK = 170, 2, 8, 16
CONFIG = st.SparsePatternConfig(
    st.Local(40) | st.Global(20), block_size=BLOCK
)  # spreads over all ranks: every one of them receives several tiles
PHASES = ("state", "plan", "forward", "backward", "gradients", "vote", "after the vote", "optimizer", "end")
TIMEOUT = 4.0


class Tiny(nn.Module):
    """Two layers of attention with dropout before and after: its gradients depend on what was drawn."""

    def __init__(self, most: int | None = None, node: int | None = None) -> None:
        super().__init__()
        config = st.DistributedSparseConfig(max_remote_tokens=most, ranks_per_node=node)
        self.attention = nn.ModuleList(
            st.create_block_sparse_attention("distributed", sparse_config=CONFIG, distributed_config=config)
            for _ in range(2)
        )
        self.project = nn.ModuleList(nn.Linear(HEADS * DIM, 3 * HEADS * DIM) for _ in range(2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for project, attend in zip(self.project, self.attention, strict=True):
            x = nn.functional.dropout(x, 0.1)
            q, k, v = project(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
            x = x + attend(q, k, v, is_causal=True).flatten(2)
        return x


@dataclass(frozen=True)
class Fault:
    """What happens to a rank (of those that began) when it first comes to a phase of a step.

    ``kind``: "kill", "stop" (for ``seconds``), "link" (its connections to other ranks break), "memory",
    "error", "unheard" (it does not get what the others sent), or "shape", "dtype", "layout" (wrong arguments
    in this step).
    """

    rank: int
    step: int
    phase: str
    kind: str
    seconds: float = 0.0
    times: int = 1


@dataclass
class Strikes:
    """Strikes this rank with its faults."""

    rank: int
    faults: Sequence[Fault]
    spared: int = 0
    """A port whose connections a broken link leaves alone."""
    step: int = -1
    counts: dict[Fault, int] = field(default_factory=dict)

    def at(self, phase: str, step: int | None = None) -> None:
        step = self.step if step is None else step
        for fault in self.faults:
            here = fault.rank == self.rank and fault.step == step and fault.phase == phase
            if here and self.counts.get(fault, 0) < fault.times:
                self.counts[fault] = self.counts.get(fault, 0) + 1
                self._strike(fault)

    def wrong(self) -> str | None:
        """The kind of wrong argument to pass in this step."""
        kinds = [x.kind for x in self.faults if x.rank == self.rank and x.step == self.step]
        return next((kind for kind in kinds if kind in ("shape", "dtype", "layout")), None)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "link":
            self._break()
        elif fault.kind == "memory":
            raise torch.OutOfMemoryError("a test has taken all memory")
        elif fault.kind == "error":
            raise ValueError(f"a test's error in {fault.phase}")
        elif fault.kind == "unheard":
            raise RankLostError("a test's silence")

    def _break(self) -> None:
        for name in os.listdir("/proc/self/fd"):
            try:
                one = socket.socket(fileno=os.dup(int(name)))
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername()[1] != self.spared:
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            except OSError:
                continue

    def install(self) -> None:
        """In this process, which is a test's own."""
        for owner, name, phase in (
            (parts, "plan_of", "plan"),
            (Exchange, "finish", "forward"),
            (Exchange, "send_back", "backward"),
        ):
            setattr(owner, name, self._before(getattr(owner, name), phase))
        agree = Ranks.agree

        def voting(ranks: Ranks, call: Any, tokens: int, problem: Any = None, draw: int = 0) -> Any:
            if "vote on step" in call:
                self.at("vote")
            if "the end" in call:
                self.at("end")
            found = agree(ranks, call, tokens, problem, draw)
            if "vote on step" in call:
                self.at("after the vote")
            if "the end" in call:
                self.at("after the end")
            return found

        Ranks.agree = voting  # type: ignore[method-assign]

    def _before(self, plain: Any, phase: str) -> Any:
        def struck(*args: Any, **kwargs: Any) -> Any:
            self.at(phase)
            return plain(*args, **kwargs)

        return struck


class Position:
    """A data loader as a Stateful: where it is, and whether that can be kept."""

    def __init__(self, strikes: Strikes) -> None:
        self.strikes, self.taken = strikes, 0

    def state_dict(self) -> dict[str, Any]:
        self.strikes.at("state", self.strikes.step + 1)  # kept before the step begins
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@dataclass
class Run:
    """One training run; ``state`` is what it starts from, by rank."""

    until: int
    faults: Sequence[Fault] = ()
    every: int = 1
    most: int | None = None
    state: Sequence[dict[str, Any]] | None = None
    timeout: float = TIMEOUT
    again: bool = False
    """Whether to go on after a StepError, without faults."""
    node: int | None = None


def state_of(model: nn.Module, optimizer: Any, position: Position, step: int) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "calls": model.calls,
            "optimizer": optimizer.state_dict(),
            "taken": position.taken,
            "random": torch.get_rng_state(),
            "step": step,
        }
    )


def trained(rank: int, world: int, run: Run, port: int) -> dict[str, Any]:
    """Trains; returns the last state, or what was raised, and what happened on the way."""
    # The group of run_ranks has another timeout. Closed by one, it would fail those who still connect.
    dist.barrier()
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    beginning = dist.PrefixStore("the first group", store)
    dist.init_process_group(
        "gloo", store=beginning, rank=rank, world_size=world, timeout=timedelta(seconds=run.timeout)
    )
    torch.manual_seed(100)
    model = Tiny(run.most, run.node)
    # A bias of keys has no gradient but rounding, which Adam would blow up with a smaller eps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    torch.manual_seed(rank)
    strikes = Strikes(rank, (), port)
    position = Position(strikes)
    first = 0
    if run.state is not None:
        given = copy.deepcopy(run.state[rank])
        model.load_state_dict(given["model"])
        model.calls.copy_(given["calls"])
        optimizer.load_state_dict(given["optimizer"])
        position.load_state_dict(given)
        torch.set_rng_state(given["random"])
        first = given["step"]
    supervisor = Supervisor(
        model, optimizer, store, timeout=run.timeout, every=run.every, also=[position], step=first
    )
    strikes.step, strikes.faults = first - 1, run.faults
    strikes.install()
    plain = optimizer.step

    def update() -> None:
        strikes.at("optimizer")
        plain()

    optimizer.step = update  # type: ignore[method-assign]
    attempts: list[tuple[int, int]] = []
    starts: dict[tuple[int, int], dict[str, Any]] = {}

    def step(number: int) -> float:
        strikes.step = number
        attempts.append((number, dist.get_world_size()))
        starts.setdefault(attempts[-1], state_of(model, optimizer, position, number))
        assert position.taken == number and model.calls == number
        position.taken += 1
        draw = torch.Generator().manual_seed(number)
        whole = torch.randn(1, LENGTH, HEADS * DIM, dtype=torch.float64, generator=draw)
        where = model.attention[0].sharding_for(LENGTH)
        piece = shard_sequence(whole, 1, where)
        loss = (wrongly(model, piece, strikes.wrong()) ** 2).sum() / whole.numel()
        loss.backward()
        strikes.at("gradients")
        with supervisor.watched("the sum of gradients"):
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            loss = loss.detach()
            dist.all_reduce(loss)
        strikes.at("vote")
        return loss.item()

    found: dict[str, Any] = {"attempts": attempts, "starts": starts}
    try:
        found["loss"] = supervisor.run(step, run.until)
    except (RankLostError, StepError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
        found["cause"] = type(error.__cause__).__name__
        found["at"] = state_of(model, optimizer, position, supervisor.step)
        strikes.faults = ()
        if run.again:
            found["loss"] = supervisor.run(step, run.until)
    found["step"], found["size"] = supervisor.step, supervisor._size
    found["most"] = [module.config.max_remote_tokens for module in model.attention]
    found["ring"] = [module.ring for module in model.attention]
    found["last"] = state_of(model, optimizer, position, supervisor.step)
    if not dist.is_initialized():  # run_ranks closes it
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def wrongly(model: Tiny, piece: Tensor, wrong: str | None) -> Tensor:
    """The model, or one call with wrong arguments."""
    if wrong is None:
        return model(piece)
    module = model.attention[0]
    q = piece.unflatten(-1, (HEADS, DIM))
    if wrong == "shape":
        return module(q, q[:, :-1], q, is_causal=True)
    if wrong == "dtype":
        q = q.float()
    if wrong == "layout":
        other = st.SparsePatternConfig(st.Local(50), block_size=BLOCK)
        module = st.create_block_sparse_attention("distributed", sparse_config=other)
    return module(q, q, q, is_causal=True).flatten(2)


def alike(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether all in them is the same: bit for bit, or floating-point numbers to the tolerance."""
    if isinstance(one, Tensor):
        if tolerance and one.is_floating_point():
            return torch.allclose(one, other, rtol=0, atol=tolerance)
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(alike(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        return abs(one - other) <= tolerance
    return bool(one == other)


def hosted() -> dist.TCPStore:
    """A store in the test's process, which outlives all ranks."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def runs(world: int, run: Run, seconds: float = 120.0) -> list[Any]:
    """What each rank returns; None for those that were killed."""
    store = hosted()
    killed = {fault.rank for fault in run.faults if fault.kind == "kill"}
    return run_ranks(trained, world, run, store.port, killed=killed, seconds=seconds)


def survived(world: int, run: Run) -> list[Any]:
    """Runs, and asserts that the survivors' last state is, bit for bit, that of an undisturbed run of as many
    ranks from the state that they went back to (to 1e-12 where stages became smaller on the way)."""
    found = runs(world, run)
    lost = {fault.rank for fault in run.faults if fault.kind in ("kill", "stop")}
    now = [found[rank] for rank in range(world) if rank not in lost]
    assert now and all("error" not in each for each in now), [each.get("error") for each in now]
    assert all(each["step"] == run.until and each["size"] == len(now) for each in now)
    assert all(alike(each["last"]["model"], now[0]["last"]["model"]) for each in now)
    starts = None
    if lost:
        # The first step of the last world; every rank has the state in which it began that.
        back = [min(number for number, size in each["attempts"] if size == len(now)) for each in now]
        assert len(set(back)) == 1
        starts = [each["starts"][back[0], len(now)] for each in now]
    wanted = runs(len(now), Run(run.until, every=run.every, most=run.most, state=starts, node=run.node))
    tolerance = 1e-12 if any(fault.kind == "memory" for fault in run.faults) else 0.0
    for got, want in zip(now, wanted, strict=True):
        assert alike(got["last"], want["last"], tolerance) and alike(got["loss"], want["loss"], tolerance)
    return found


def schedule(seed: int) -> tuple[int, Run]:
    """Ranks, and faults to strike them with; at least one rank stays alive."""
    draw = random.Random(seed)
    world, until = draw.choice([2, 3, 3, 4]), 6
    every = draw.choice([1, 2, 3])
    faults: list[Fault] = []
    for rank in draw.sample(range(world), draw.randrange(1, world)):
        kind = draw.choice(["kill", "kill", "kill", "stop", "link", "memory", "unheard"])
        phase = draw.choice(["after the vote", "forward"] if kind == "unheard" else PHASES)
        step = until - 1 if phase == "end" else draw.randrange(until)
        if phase == "state":  # the first is kept before the run
            step = max(every, step - step % every)
        faults.append(Fault(rank, step, phase, kind, seconds=16.0))
    return world, Run(until, faults, every=every, timeout=3.0)
