"""One arm with one seed: the same start, data, steps and optimiser as every other arm of that seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import SparsetileError
from sparsetile.recall.arms import Attend, Oracle, Shape, attends_of, check_tiles, mass_in, true_mass
from sparsetile.recall.model import Model, ModelConfig
from sparsetile.recall.task import Batch, Task

Emit = Callable[[dict[str, Any]], None]
Start = dict[str, Tensor]
CHECKS = 8
_RISE = 10
# Streams of data of one seed, apart from each other.
_SHORT, _LONG, _FRESH = 0, 1, 2


@dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
        task, model: sizes.
        density: share of the tiles a row may choose from that sparse arms keep.
        batch, steps, lr: sequences of a step, steps, highest learning rate of an arm.
        short_length, short_batch, short_steps, short_lr: of the steps under dense attention before.
        adaptive: of the learned arm; its block and density are those of the others.
        scorer_lr, distillation_weight: of the learned arm: learning rate of the scorer and θ, and how much
            ``distillation_loss()`` counts.
        explored: share of the steps in which the learned arm explores.
        held_out: fresh sequences that accuracy is taken over, at the end.
        device, dtype: of the model; weights, scores and masses are float32.
    """

    task: Task
    model: ModelConfig
    density: float
    batch: int
    steps: int
    lr: float
    short_length: int
    short_batch: int
    short_steps: int
    short_lr: float
    adaptive: AdaptiveConfig
    scorer_lr: float
    distillation_weight: float
    explored: float
    held_out: int
    device: str
    dtype: str

    def __post_init__(self) -> None:
        self.short_task()
        adaptive = replace(self.adaptive, block_size=self.task.block, base_sparsity=1.0 - self.density)
        object.__setattr__(self, "adaptive", adaptive)

    def short_task(self) -> Task:
        """The same task on short sequences, with pairs as dense."""
        task = self.task
        return replace(task, length=self.short_length, pairs=task.pairs * self.short_length // task.length)

    def shape(self, length: int) -> Shape:
        return Shape(
            length,
            self.task.block,
            self.density,
            self.model.heads,
            self.model.head_dim,
            torch.device(self.device),
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def identity(self) -> dict[str, Any]:
        """All of it, as values that ``json`` can write: what must be equal for runs to be compared."""
        return asdict(self)


def start_of(settings: Settings, seed: int) -> Start:
    """The weights that every arm of a seed starts from: those of a fresh model after ``short_steps`` steps
    with dense attention over short sequences. There all arms would be the same, so it is done once."""
    torch.manual_seed(seed)
    # Made on the CPU and moved: the same start on every device.
    model = Model(settings.model, settings.task.symbols).to(settings.device)
    attends = attends_of(
        "dense", settings.shape(settings.short_length), settings.model.layers, settings.adaptive
    )
    task = settings.short_task()
    data = _data(settings, task, settings.short_batch, seed, _SHORT)
    optimiser = _adam([{"params": list(model.parameters()), "lr": settings.short_lr}], settings)
    for step in range(settings.short_steps):
        pace(optimiser, step, settings.short_steps)
        _update(model, attends, optimiser, next(data), settings, task)
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(arm: str, seed: int, settings: Settings, start: Start, emit: Emit) -> dict[str, Any]:
    """Trains ``arm`` from ``start`` and measures it on fresh sequences.

    ``emit`` gets ``{"event": "step", "step"}`` now and then and ``{"event": "check", …}`` with each
    measurement.

    Returns:
        ``arm``, ``seed``, ``accuracy``, ``within``, ``recall``, ``tiles``, ``density``, ``seconds`` (of
        training), ``parameters``, and ``checks``: step and accuracy along the way, from before the first step
        on. See :func:`measured`.

    Raises:
        ArgumentError: the arm is unknown, or kept another number of tiles than its budget.
        Diverged: the loss is no longer finite.
    """
    task, device = settings.task, torch.device(settings.device)
    torch.manual_seed(seed)
    model = Model(settings.model, task.symbols).to(device)
    model.load_state_dict(start)
    attends = attends_of(arm, settings.shape(task.length), settings.model.layers, settings.adaptive)
    groups = [{"params": list(model.parameters()), "lr": settings.lr}]
    of_attends = [p for attend in attends for p in attend.parameters()]
    scorer = [p for p in of_attends if p.requires_grad]
    if scorer:
        groups.append({"params": scorer, "lr": settings.scorer_lr})
    optimiser = _adam(groups, settings)
    data = _data(settings, task, settings.batch, seed, _LONG)
    checks: list[dict[str, Any]] = []

    def check(step: int) -> None:
        found = accuracy(model, attends, settings, seed, settings.held_out // 8)
        checks.append({"step": step, "accuracy": found})
        emit({"event": "check", "step": step, "accuracy": found})

    check(0)
    seconds, since = 0.0, time.perf_counter()
    due = [settings.steps * n // CHECKS for n in range(1, CHECKS)]
    for step in range(1, settings.steps + 1):
        if step - 1 == int(settings.explored * settings.steps):
            for attend in attends:
                attend.explore(False)
        pace(optimiser, step - 1, settings.steps)
        loss = _update(model, attends, optimiser, next(data), settings, task)
        if step % 10 == 0 or step == settings.steps:
            emit({"event": "step", "step": step})
        if step in due or step == settings.steps:
            if not bool(loss.isfinite()):
                raise Diverged(f"the loss of {arm} is no longer finite at step {step}. Lower --lr.")
            seconds += time.perf_counter() - since
            check(step)
            since = time.perf_counter()
    found = measured(model, attends, settings, seed, settings.held_out)
    for attend in attends:
        check_tiles(arm, attend)
    return {
        "arm": arm,
        "seed": seed,
        **found,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in (*model.parameters(), *of_attends)),
        "checks": checks,
    }


@torch.no_grad()
def accuracy(model: Model, attends: Sequence[Attend], settings: Settings, seed: int, sequences: int) -> float:
    """Share of queries answered right on ``sequences`` fresh sequences of a seed, the same for all arms."""
    right = [batch.right for batch in _looked_at(model, attends, settings, seed, sequences)]
    return float(torch.stack(right).mean())


@torch.no_grad()
def measured(
    model: Model, attends: Sequence[Attend], settings: Settings, seed: int, sequences: int
) -> dict[str, Any]:
    """On ``sequences`` fresh sequences of a seed, the same for all arms:

    - ``accuracy``: share of queries answered right.
    - ``within``: share of queries whose answer's tile is kept by a head of the last layer.
    - ``recall``: the dense attention mass of the query inside the kept tiles, over that inside as many tiles
      chosen by an oracle (mean over queries and heads of the last layer).
    - ``tiles``: tiles kept in all rows of a head; ``density``: their share of the causal triangle's.
    """
    task, last = settings.task, attends[-1]
    rows = slice(task.tiles - task.queries, task.tiles)
    oracle = Oracle(last.shape)
    found = []
    for look in _looked_at(model, attends, settings, seed, sequences):
        within = recall = torch.ones_like(look.right)
        if last.kept is not None:
            assert last.seen is not None
            q, k = last.seen
            kept, tile = last.kept[:, :, rows].long(), (look.places // task.block)[:, None, :, None]
            within = (kept == tile).any(-1).any(1).double().mean()
            mass = true_mass(q, k, task.block, rows.start, rows.stop)
            best = oracle.best(q, k)[:, :, rows].long()
            recall = (mass_in(mass, kept) / mass_in(mass, best)).double().mean()
        found.append(torch.stack((look.right, within, recall)))
    right, within_share, recalled = torch.stack(found).mean(0).tolist()
    triangle = task.tiles * (task.tiles + 1) // 2
    tiles = triangle if last.kept is None else int((last.kept[0, 0] >= 0).sum())
    return {
        "accuracy": right,
        "within": within_share,
        "recall": recalled,
        "tiles": tiles,
        "density": tiles / triangle,
    }


class Diverged(SparsetileError, FloatingPointError):
    """The loss of an arm is no longer finite."""


class _Look(NamedTuple):
    """Share of a batch's queries that were answered right, a float64 scalar, and where their answers are."""

    right: Tensor
    places: Tensor


def _looked_at(
    model: Model, attends: Sequence[Attend], settings: Settings, seed: int, sequences: int
) -> Iterator[_Look]:
    data = _data(settings, settings.task, settings.batch, seed, _FRESH)
    for attend in attends:
        attend.eval()
    for _ in range(max(1, sequences // settings.batch)):
        batch = next(data)
        logits = model(batch.tokens, settings.task, attends, settings.compute_dtype)
        yield _Look((logits.argmax(-1) == batch.answers).double().mean(), batch.places)
    for attend in attends:
        attend.train()


def _update(
    model: Model,
    attends: Sequence[Attend],
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    task: Task,
) -> Tensor:
    """One step; the loss stays on the device, so that nothing waits for it."""
    logits = model(batch.tokens, task, attends, settings.compute_dtype)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    extra = [x for attend in attends if (x := attend.extra_loss()) is not None]
    total = loss + settings.distillation_weight * torch.stack(extra).sum() if extra else loss
    descend(optimiser, total)
    return loss.detach()


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down, with gradients clipped."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimiser.param_groups:
        # Apart from each other, so that what the scorer learns does not slow down the model.
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()


def _adam(groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.AdamW:
    for group in groups:
        group["highest"] = group["lr"]
    fused = settings.device != "cpu"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def pace(optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Sets the learning rates of a step, shares of each group's ``"highest"``: linear rise, level for the
    first half, then linearly down to a twentieth."""
    share = min(1.0, (step + 1) / _RISE) * max(0.05, min(1.0, 2.0 * (1.0 - step / steps)))
    for group in optimiser.param_groups:
        group["lr"] = group["highest"] * share


def _data(settings: Settings, task: Task, batch: int, seed: int, stream: int) -> Iterator[Batch]:
    # Far from the seeds of weights, whose numbers would be the same.
    generator = torch.Generator(settings.device).manual_seed((1 << 40) + 3 * seed + stream)
    while True:
        yield task.sample(batch, generator)
