"""Easy and hard inputs in one stream: does a share of the mass need fewer tiles than a fixed number?

A sequence is a memory of tiles and then questions, each a key that fills a tile of queries::

    memory       blank … key value … blank | … key value … blank | …     pairs at random places
    questions    key key … | key key … | …                               each sees the memory alone

In an *easy* sequence one tile holds the key asked for, and the answer is the value behind it. In a *hard* one
``votes`` tiles do, each time before one of two values, and the answer is the value that most of them name, by
a majority of one: whoever misses a tile may be misled. Both have as many pairs in as many tiles; in easy ones
the others are pairs of keys that nobody asks for.

All queries of a tile ask the same, because a tile of queries is chosen for, and its mass summed,
as one. Rows of the layout are questions alone, so the tiles counted are all that are computed. One of them is
the row's own, at its position from the end of the memory, which the module always keeps and which is of no
more use here than any other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetile.adaptive.config import AdaptiveConfig
from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.check import BLOCK_SIZES
from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.recall.model import Layer, ModelConfig
from sparsetile.train.model import Linear, norm

Emit = Callable[[dict[str, Any]], None]
Start = dict[str, Tensor]
Arm = str | int
"""``"dense"``, ``"top_p"``, or a fixed number of tiles a row."""
DENSE, TOP_P = "dense", "top_p"
KINDS = ("easy", "hard")
_RISE = 10
# τ at the start: a mean over the tokens of a tile is flatter than the mass that it shall predict.
_TEMPERATURE = 0.25
# Streams of data of one seed, apart from each other.
_START, _OWN, _FRESH = 0, 1, 2


class MixedBatch(NamedTuple):
    """Sequences and what is asked in them.

    Attributes:
        tokens: int64 ``[B, length]``: keys are ``0 … keys − 1``, values the ``values`` symbols above, and the
            last symbol is the blank.
        answers: int64 ``[B, questions]``.
        hard: bool ``[B]``.
        tiles: int64 ``[B, questions, votes]``: tiles of the memory that hold the key asked for; of an easy
            question one, the others −1.
    """

    tokens: Tensor
    answers: Tensor
    hard: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class MixedTask:
    """Sizes of the stream.

    Attributes:
        tiles: of the memory.
        block: tokens of a tile.
        questions: of a sequence.
        votes: tiles that hold the key of a hard question, an odd number.
        keys: symbols of keys, more than ``questions``.
        values: symbols of values.

    Raises:
        ArgumentError: sizes that do not fit each other.
    """

    tiles: int
    block: int
    questions: int
    votes: int
    keys: int
    values: int

    def __post_init__(self) -> None:
        def demand(name: str, fits: bool, expected: str, fix: str) -> None:
            if not fits:
                raise ArgumentError(explain(name, expected=expected, got=getattr(self, name), fix=fix))

        known = ", ".join(map(str, BLOCK_SIZES))
        demand("block", self.block in BLOCK_SIZES, f"one of {known}", "16 makes many tiles.")
        demand("votes", self.votes >= 3 and self.votes % 2 == 1, "an odd number ≥ 3", "9 is usual.")
        demand("tiles", self.tiles >= 2 * self.votes, f"at least 2 · votes = {2 * self.votes}", "Add some.")
        most = min(self.tiles // self.votes * (self.block // 2), self.tiles)
        demand("questions", 1 <= self.questions <= most, f"1 to {most}", "Their pairs share the tiles.")
        demand(
            "keys", self.keys > self.questions, f"above questions = {self.questions}", "Not all are asked."
        )
        demand("values", self.values >= 2, "at least 2", "With one there is nothing to recall.")

    @property
    def symbols(self) -> int:
        return self.keys + self.values + 1

    @property
    def memory(self) -> int:
        """Tokens before the questions."""
        return self.tiles * self.block

    @property
    def length(self) -> int:
        return self.memory + self.questions * self.block

    def sample(self, batch: int, generator: torch.Generator) -> MixedBatch:
        """``batch`` fresh sequences on the generator's device, every other one hard, without a host sync."""
        device, pairs = generator.device, (batch, self.questions, self.votes)

        def shuffled(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device).argsort(-1)

        def drawn(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device=device)

        hard = torch.arange(batch, device=device) % 2 == 1
        # In each round the pairs of some questions get tiles of their own, and each tile a place for one.
        at_once = self.tiles // self.votes
        rounds = -(-self.questions // at_once)
        tiles = shuffled(batch, rounds, self.tiles)[..., : at_once * self.votes]
        tiles = tiles.reshape(batch, -1, self.votes)[:, : self.questions]
        slots = shuffled(batch, self.tiles, self.block // 2)[..., :rounds].flatten(1)
        turn = torch.arange(self.questions, device=device)[:, None] // at_once
        slot = slots.gather(1, (tiles * rounds + turn).flatten(1)).view(pairs)
        key_at = (tiles * self.block + 2 * slot).flatten(1)

        order = shuffled(batch, self.keys)
        key = order[:, : self.questions, None]
        others = order.gather(1, drawn(self.questions, self.keys, batch, pairs[1] * pairs[2])).view(pairs)
        first = drawn(0, self.values, batch, self.questions, 1)
        second = (first + drawn(1, self.values, batch, self.questions, 1)) % self.values
        vote = torch.arange(self.votes, device=device)
        keys = torch.where(hard[:, None, None] | (vote == 0), key, others)
        voted = torch.where(vote <= self.votes // 2, first, second)
        values = self.keys + torch.where(
            hard[:, None, None] | (vote == 0), voted, drawn(0, self.values, *pairs)
        )

        tokens = torch.full((batch, self.memory), self.symbols - 1, device=device)
        tokens.scatter_(1, key_at, keys.flatten(1))
        tokens.scatter_(1, key_at + 1, values.flatten(1))
        asked = keys[..., 0].repeat_interleave(self.block, 1)
        held = torch.where(hard[:, None, None] | (vote == 0), tiles, -1)
        return MixedBatch(torch.cat((tokens, asked), 1), values[..., 0], hard, held)


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
            return replace(common, selection="top_p", p=self.p, k_max=2 * (task.votes + 1))
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
        _pace(optimiser, step, settings.start_steps)
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
        _pace(optimiser, step, settings.steps)
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
    if attend.module is not None and settings.distillation != "none":
        total = loss + settings.distillation_weight * attend.module.distillation_loss()
    optimiser.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    for group in optimiser.param_groups:
        # Apart from each other, so that what the scorer learns does not slow down the model.
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()
    return loss.detach()


def _adam(parts: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    groups = [{"params": list(part.parameters()), "highest": lr} for part, lr in parts]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def _pace(optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Linear rise, level for the first half, then linearly down to a twentieth."""
    share = min(1.0, (step + 1) / _RISE) * max(0.05, min(1.0, 2.0 * (1.0 - step / steps)))
    for group in optimiser.param_groups:
        group["lr"] = group["highest"] * share


def _data(
    task: MixedTask, settings: MixedSettings, batch: int, seed: int, stream: int
) -> Iterator[MixedBatch]:
    generator = torch.Generator(settings.device).manual_seed(3 * seed + stream)
    while True:
        yield task.sample(batch, generator)
