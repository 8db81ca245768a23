"""One arm with one seed on the stream of :mod:`mixed_task`: a share of the mass, a fixed number, or dense."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import ArgumentError, explain
from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.recall.loop import descend, pace
from sparsetile.recall.mixed_task import MixedBatch, MixedTask
from sparsetile.recall.model import Layer, ModelConfig
from sparsetile.train.model import Linear, norm

Emit = Callable[[dict[str, Any]], None]
Start = dict[str, Tensor]
Arm = str | int
"""``"dense"``, ``"top_p"``, or a fixed number of tiles a row."""
DENSE, TOP_P = "dense", "top_p"
KINDS = ("easy", "hard")
# τ at the start: a mean over the tokens of a tile is flatter than the mass that it shall predict.
_TEMPERATURE = 0.25
# Streams of data of one seed, apart from each other.
_START, _OWN, _FRESH = 0, 1, 2


class Asked(nn.Module):
    """Attention of the questions to the memory, over tiles that a learned scorer chooses, or dense.

    Attributes:
        module: None: dense.
    """

    def __init__(self, task: MixedTask, model: ModelConfig, config: AdaptiveConfig | None) -> None:
        super().__init__()
        self.task, self.heads = task, model.heads
        self.module: BlockSparseAdaptive | None = None
        if config is not None:
            self.module = BlockSparseAdaptive(config, num_heads=model.heads, head_dim=model.head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v ``[B, H, length, D]`` → ``[B, H, length, D]``, 0 in the memory, where nobody asks."""
        memory = self.task.memory
        q, k, v = q[:, :, memory:], k[:, :, :memory], v[:, :, :memory]
        if self.module is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            found = self.module(*(x.transpose(1, 2) for x in (q, k, v)))
            assert isinstance(found, Tensor)
            out = found.transpose(1, 2)
        return F.pad(out, (0, 0, memory, 0))

    def explore(self, on: bool) -> None:
        """Whether training may try tiles below the cut."""
        if self.module is not None:
            self.module.config = replace(self.module.config, exploration=on)

    def kept(self, batch: int, device: torch.device) -> Tensor:
        """bool ``[batch, heads, questions, tiles]``: what the last call kept. Waits for the device."""
        task = self.task
        shape = (batch, self.heads, task.questions, task.tiles)
        if self.module is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        layout = self.module.last_layout
        counts = layout.indptr.diff().long()
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
        flat = torch.zeros((counts.numel(), task.tiles), dtype=torch.bool, device=device)
        flat[row, layout.indices[: row.numel()].long()] = True
        return flat.view(shape)


class Reader(nn.Module):
    """One layer of attention, read at the first token of each question.

    Queries and keys start from the same weights: a symbol is likest to itself.
    """

    def __init__(self, config: ModelConfig, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, config.width)
        self.layer = Layer(config)
        self.head = Linear(config.width, symbols)
        with torch.no_grad():
            self.layer.k.weight.copy_(self.layer.q.weight)

    def forward(self, tokens: Tensor, attend: Asked) -> Tensor:
        """``tokens`` int64 [B, length] → logits [B, questions, symbols]."""
        task = attend.task
        x = self.layer(self.embed(tokens), attend)
        logits: Tensor = self.head(norm(x[:, task.memory :: task.block]))
        return logits


@dataclass(frozen=True)
class MixedSettings:
    """What all arms share.

    Attributes:
        task, model: sizes; ``model.layers`` is 1.
        p: of the arm ``"top_p"``; it may keep up to ``2 · (votes + 1)`` tiles a row.
        batch, steps, lr: sequences of a step, an even number; steps; highest learning rate of the model.
        scorer_lr: of the scorer and θ.
        distillation, distillation_weight: as in :class:`AdaptiveConfig`, and how much its loss counts.
        sparsity_weight, mean_tiles: how much ``sparsity_loss()`` counts for ``"top_p"``, and the tiles a row
            that it steers to.
        explored: share of the steps, from the first on, in which training tries tiles below the cut.
        start_batch, start_steps, start_lr: of the dense steps before, over a memory of ``2 · votes`` tiles.
        held_out: fresh sequences to measure on, an even number.
        device: of everything.

    Raises:
        ArgumentError: a value is not as above.
    """

    task: MixedTask
    model: ModelConfig
    p: float
    batch: int
    steps: int
    lr: float
    scorer_lr: float
    distillation: Literal["none", "kept", "sampled"]
    distillation_weight: float
    sparsity_weight: float
    mean_tiles: int
    explored: float
    start_batch: int
    start_steps: int
    start_lr: float
    held_out: int
    device: str

    def __post_init__(self) -> None:
        for name in ("batch", "start_batch", "held_out"):
            count = getattr(self, name)
            if count < 2 or count % 2:
                fix = "Every other sequence is hard."
                raise ArgumentError(explain(name, expected="an even number ≥ 2", got=count, fix=fix))
        if not 0.0 <= self.sparsity_weight < math.inf:
            fix = "0 leaves sparsity_loss() out."
            got = self.sparsity_weight
            raise ArgumentError(explain("sparsity_weight", expected="a number ≥ 0", got=got, fix=fix))
        if not 1 <= self.mean_tiles <= self.task.tiles:
            expected = f"a number of tiles from 1 to {self.task.tiles}"
            fix = "It is the mean of easy and hard rows."
            raise ArgumentError(explain("mean_tiles", expected=expected, got=self.mean_tiles, fix=fix))
        self.config_of(TOP_P)

    def config_of(self, arm: Arm) -> AdaptiveConfig | None:
        """Settings of an arm's module; None: dense.

        Raises:
            ArgumentError: no such arm, or p is outside (0, 1].
        """
        if arm == DENSE:
            return None
        task = self.task
        common = AdaptiveConfig(
            form="bilinear",
            hidden_dim=self.model.head_dim,
            block_size=task.block,
            temperature=_TEMPERATURE,
            distillation=self.distillation,
        )
        if arm == TOP_P:
            base = 1.0 - self.mean_tiles / task.tiles
            most = 2 * (task.votes + 1)
            return replace(common, selection="top_p", p=self.p, k_max=most, base_sparsity=base)
        if not isinstance(arm, int) or not 1 <= arm <= task.tiles:
            expected = f"dense, top_p, or a number of tiles from 1 to {task.tiles}"
            raise ArgumentError(explain("arm", expected=expected, got=repr(arm), fix="See --help."))
        return replace(common, base_sparsity=1.0 - arm / task.tiles)

    def short_task(self) -> MixedTask:
        """The same task over as few tiles as can be, with as many questions."""
        task = self.task
        return replace(task, tiles=2 * task.votes, questions=min(task.block, 2 * task.votes, task.keys - 1))

    def identity(self) -> dict[str, Any]:
        """All of it, as values that ``json`` can write."""
        return asdict(self)


def start_of(settings: MixedSettings, seed: int) -> Start:
    """The weights that every arm of a seed starts from: a fresh model after ``start_steps`` dense steps over
    a short memory."""
    torch.manual_seed(seed)
    # Made on the CPU and moved: the same start on every device.
    model = Reader(settings.model, settings.task.symbols).to(settings.device)
    attend = Asked(settings.short_task(), settings.model, None)
    optimiser = _adam([(model, settings.start_lr)])
    data = _data(attend.task, settings, settings.start_batch, seed, _START)
    for step in range(settings.start_steps):
        pace(optimiser, step, settings.start_steps)
        _update(model, attend, optimiser, next(data), settings)
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(arm: Arm, seed: int, settings: MixedSettings, start: Start, emit: Emit) -> dict[str, Any]:
    """Trains ``arm`` from ``start`` and measures it on fresh sequences.

    ``emit`` gets ``{"step"}`` now and then.

    Returns:
        ``arm``, ``seed``, ``seconds`` (of training), and what :func:`measured` returns.

    Raises:
        ArgumentError: there is no such arm.
        FloatingPointError: the loss is no longer finite.
    """
    torch.manual_seed(seed)
    model = Reader(settings.model, settings.task.symbols).to(settings.device)
    model.load_state_dict(start)
    attend = Asked(settings.task, settings.model, settings.config_of(arm)).to(settings.device)
    optimiser = _adam([(model, settings.lr), (attend, settings.scorer_lr)])
    data = _data(settings.task, settings, settings.batch, seed, _OWN)
    began = time.perf_counter()
    for step in range(settings.steps):
        attend.explore(step < settings.explored * settings.steps)
        pace(optimiser, step, settings.steps)
        loss = _update(model, attend, optimiser, next(data), settings)
        if step % 10 == 9 or step + 1 == settings.steps:
            emit({"step": step + 1})
    if not math.isfinite(float(loss)):
        raise FloatingPointError(f"the loss of {arm} is no longer finite. Lower the learning rates.")
    seconds = time.perf_counter() - began
    return {"arm": arm, "seed": seed, "seconds": seconds, **measured(model, attend, settings, seed)}


@torch.no_grad()
def measured(model: Reader, attend: Asked, settings: MixedSettings, seed: int) -> dict[str, Any]:
    """On fresh sequences of a seed, the same for all arms, of each kind and of ``"both"``, half and half:

    - ``accuracy``: share of questions answered right.
    - ``tiles``: tiles kept a row, the own one included, over all rows and heads.
    - ``found``: share of the tiles with the key asked for that are kept.
    """
    task = settings.task
    data = _data(task, settings, settings.batch, seed, _FRESH)
    attend.eval()
    found = []
    for _ in range(max(1, settings.held_out // settings.batch)):
        batch = next(data)
        right = (model(batch.tokens, attend).argmax(-1) == batch.answers).double()
        kept = attend.kept(len(right), right.device).double()
        held = (batch.tiles[..., None] == torch.arange(task.tiles, device=right.device)).any(2)[:, None]
        share = (kept * held).sum(-1) / held.sum(-1)
        each = torch.stack((right.mean(1), kept.sum(-1).mean((1, 2)), share.mean((1, 2))))
        found.append(torch.stack([each[:, batch.hard == hard].mean(1) for hard in (False, True)]))
    attend.train()
    easy, hard = torch.stack(found).mean(0).tolist()
    return {
        name: {"easy": e, "hard": h, "both": (e + h) / 2}
        for name, e, h in zip(("accuracy", "tiles", "found"), easy, hard, strict=True)
    }


def _update(
    model: Reader,
    attend: Asked,
    optimiser: torch.optim.Optimizer,
    batch: MixedBatch,
    settings: MixedSettings,
) -> Tensor:
    """One step; the loss stays on the device, so that nothing waits for it."""
    loss = F.cross_entropy(model(batch.tokens, attend).flatten(0, 1), batch.answers.flatten())
    total = loss
    if attend.module is not None:
        config = attend.module.config
        if config.distillation != "none":
            total = total + settings.distillation_weight * attend.module.distillation_loss()
        if config.selection == "top_p" and settings.sparsity_weight > 0.0:
            total = total + settings.sparsity_weight * attend.module.sparsity_loss()
    descend(optimiser, total)
    return loss.detach()


def _adam(parts: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    groups = [{"params": list(part.parameters()), "highest": lr} for part, lr in parts]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def _data(
    task: MixedTask, settings: MixedSettings, batch: int, seed: int, stream: int
) -> Iterator[MixedBatch]:
    generator = torch.Generator(settings.device).manual_seed(3 * seed + stream)
    while True:
        yield task.sample(batch, generator)
