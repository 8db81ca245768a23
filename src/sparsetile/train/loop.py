"""One arm: train, measure on held-out sequences along the way, save, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.nn.adaptive import BlockSparseAdaptive
from sparsetile.train.arms import Arm, attention_of, attention_of_learned, layout_of
from sparsetile.train.checkpoint import load_checkpoint, require_same, save_checkpoint
from sparsetile.train.data import COPY, COPY_START, SOURCE, START_BYTES, TEXT, Corpus, Planting, Sequences
from sparsetile.train.memory import PeakMemory
from sparsetile.train.model import Attention, Model, ModelConfig
from sparsetile.train.parallel import Parallel, Tokens

Emit = Callable[[dict[str, Any]], None]
_WARM_UP = 10
CHECKS = 8
_SAVE_SECONDS = 30.0
_DISTILLATION = 0.1


@dataclass(frozen=True)
class Settings:
    """What all arms of a run share. ``steps`` or ``seconds`` (of training alone) says when an arm ends."""

    model: ModelConfig
    context: int
    batch: int
    block: int
    lr: float
    seed: int
    device: str
    dtype: str
    planting: Planting | None
    held_out_sequences: int
    steps: int | None = None
    seconds: float | None = None
    checkpoint: str | None = None
    resume: bool = False

    def identity(self, arm: Arm, corpus: Corpus) -> dict[str, Any]:
        """Everything that must be equal for a run to be the continuation of another."""
        shared = asdict(
            replace(self, steps=None, seconds=None, checkpoint=None, resume=False, device="", dtype="")
        )
        for name in ("steps", "seconds", "checkpoint", "resume", "device"):
            del shared[name]
        own = {} if arm.adaptive is None else {"adaptive": asdict(arm.adaptive)}
        return {**shared, "dtype": self.dtype, "attention": arm.attention, **own, "data": corpus.digest}


class Trainer:
    """Model, optimiser and position of one arm; over ranks, each of them has one and does the same."""

    def __init__(
        self, arm: Arm, settings: Settings, corpus: Corpus, parallel: Parallel | None = None
    ) -> None:
        self.arm, self.settings = arm, settings
        self.parallel = Parallel() if parallel is None else parallel
        self.parallel.check(arm, settings.context, settings.block, settings.batch)
        self.device = torch.device(settings.device)
        self.dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        self.sequences = Sequences(corpus, settings.context, settings.seed, settings.planting)
        self.identity = settings.identity(arm, corpus)
        self.memory = PeakMemory(self.device)
        torch.manual_seed(settings.seed)
        # Made on the CPU and moved: the same start on every device.
        self.model = Model(settings.model, arm.adaptive).to(self.device)
        self.learned = [x for x in self.model.learned if isinstance(x, BlockSparseAdaptive)]
        self.attention: Attention | Sequence[Attention] = attention_of_learned(self.model)
        self._density: float | None = None
        self.tokens: Tokens | None = None
        if self.parallel.cp.size > 1:
            layout = layout_of(arm, settings.model, settings.context, settings.block, torch.device("cpu"))
            self.tokens = Tokens(layout, self.parallel.cp, self.device, self.parallel.node)
            self.attention, self._density = self.tokens.attend, layout.causal_density
        elif arm.adaptive is None:
            self.attention, self._density = attention_of(
                arm, settings.model, settings.context, settings.block, self.device
            )
        # Decay would pull the sharpness of every head, and what chooses tiles, back to where they began.
        parameters = list(self.model.named_parameters())
        free = [p for name, p in parameters if "sharpness" in name or name.startswith("learned.")]
        matrices = [p for _, p in parameters if not any(p is x for x in free)]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.seconds = 0.0
        self.losses: list[list[float]] = []
        self.checks: list[dict[str, Any]] = []

    def density(self) -> float:
        """Share of the causal triangle's tiles that attention computes; learned: in the last call."""
        if self._density is not None:
            return self._density
        return torch.stack([x.last_density for x in self.learned]).mean().item()

    # -- one step -------------------------------------------------------------------------------------

    def progress(self) -> float:
        """How much of the run is behind, 0 … 1."""
        if self.settings.seconds is not None:
            return min(1.0, self.seconds / self.settings.seconds)
        return self.step / (self.settings.steps or 1)

    def learning_rate(self) -> float:
        """Linear warm-up, level for the first half of the run, then linearly down to a twentieth."""
        fall = min(1.0, 2.0 * (1.0 - self.progress()))
        return self.settings.lr * min(1.0, (self.step + 1) / _WARM_UP) * max(0.05, fall)

    def train_step(self) -> Tensor:
        """One update; the loss in bits per byte stays on the device, so that nothing waits for it."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        loss = self._gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return loss

    def _gradients(self) -> Tensor:
        batch = self.settings.batch
        tokens = self.sequences.training(self.step, batch, self.parallel.rows(batch)).tokens
        self.optimiser.zero_grad(set_to_none=True)
        # This rank's share of the mean over all tokens.
        loss = self._losses(tokens).sum() / (batch * self.settings.context)
        whole = loss
        if self.arm.adaptive is not None and self.arm.adaptive.distillation != "none":
            # It teaches what chooses tiles alone, so its weight moves nothing else.
            of_layers = torch.stack([x.distillation_loss() for x in self.learned])
            whole = loss + _DISTILLATION * of_layers.sum()
        whole.backward()  # type: ignore[no-untyped-call]
        return self.parallel.sum_gradients(self.model.parameters(), loss.detach()) / math.log(2)

    def _losses(self, tokens: Tensor) -> Tensor:
        """The loss of each of this rank's tokens, in nats, ``[B, n]``; ``tokens`` are whole sequences."""
        tokens = self._to_device(tokens)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.tokens is None:
            logits = self.model(inputs, self.attention, self.dtype)
        else:
            here, targets = self.tokens, self.tokens.own(targets)
            logits = self.model(here.own(inputs), self.attention, self.dtype, here.positions, here.shifted)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens.long()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _try_step(self) -> None:
        """A step's work without its update, and without a draw."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self._gradients()
        self.optimiser.zero_grad(set_to_none=True)
        self._wait()

    def step_seconds(self) -> float:
        """Time of one step here, without taking one: the shortest of four after one for warming up."""
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self._try_step()
            times.append(time.perf_counter() - start)
        return self.parallel.most(min(times[1:]))

    # -- the run --------------------------------------------------------------------------------------

    def run(self, emit: Emit, stop_after: int | None = None) -> dict[str, Any]:
        """Trains to the end (or, as if cut off, to step ``stop_after``) and returns the arm's result."""
        tokens_in_step = self.settings.batch * self.settings.context
        every = 8 if self.device.type == "cuda" else 1
        if self.device.type == "cuda":
            self._try_step()  # Kernels are compiled before the clock starts.
        # All ranks have the same to save.
        saves = self.settings.checkpoint if self.parallel.first else None
        saved = time.monotonic()
        due = (math.floor(self.progress() * CHECKS) + 1) / CHECKS
        while self.progress() < 1.0 and self.step != stop_after:
            first, start = self.step, time.perf_counter()
            limit = min(self.settings.steps or 1 << 62, stop_after or 1 << 62)
            loss = self.train_step()
            while self.step < limit and self.step % every:
                loss = self.train_step()
            bits = loss.item()
            took = self.parallel.most(time.perf_counter() - start)
            self.seconds += took
            self.losses.append([self.step, self.seconds, bits])
            emit(
                {
                    "event": "step",
                    "step": self.step,
                    "progress": self.progress(),
                    "bits": bits,
                    "tokens_per_second": (self.step - first) * tokens_in_step / took,
                    "memory": self.memory.read(),
                }
            )
            if not math.isfinite(bits):
                raise FloatingPointError(
                    f"the loss of {self.arm.name} is no longer finite at step {self.step}. Lower --lr."
                )
            if self.progress() >= due and self.progress() < 1.0:
                due = (math.floor(self.progress() * CHECKS) + 1) / CHECKS
                self._check(emit)
            if saves and time.monotonic() - saved > _SAVE_SECONDS:
                self.save(Path(saves))
                saved = time.monotonic()
        if saves:
            self.save(Path(saves))
        held_out = self._check(emit)
        own = self.memory.read()
        peak = self.parallel.most(-1 if own is None else own)
        return {
            "name": self.arm.name,
            "attention": self.arm.attention,
            "density": self.density(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "seconds": self.seconds,
            "tokens_per_second": self.step * tokens_in_step / max(self.seconds, 1e-9),
            "peak_memory": None if peak < 0 else int(peak),
            "memory_kind": self.memory.kind + (", most of any rank" if self.parallel.world.size > 1 else ""),
            "held_out": held_out,
            "losses": self.losses,
            "checks": self.checks,
        }

    def _check(self, emit: Emit) -> dict[str, Any]:
        emit({"event": "checking", "step": self.step})
        found = self.held_out(self.settings.held_out_sequences)
        self.checks.append({"step": self.step, "seconds": self.seconds, **found})
        emit({"event": "check", "step": self.step, **found})
        return found

    @torch.no_grad()
    def held_out(self, sequences: int) -> dict[str, Any]:
        """Bits per byte on the first held-out sequences, by kind of byte.

        ``text``: ordinary bytes. ``source``: the random spans, 7 bits at best. ``copy``: their copies;
        ``copy_after_start`` leaves out the first 4 bytes of each, ``copy_start`` is these one by one: nobody
        can know the first, and few bytes match by chance in more than one place.
        """
        # In one tensor, since ranks add theirs up: bits and number of each kind of byte, bits of each of the
        # first bytes of a copy, number of copies.
        sums = torch.zeros(4 + 4 + START_BYTES + 1, dtype=torch.float64)
        bits, count, start_bits, starts = torch.split(sums, [4, 4, START_BYTES, 1])
        self.model.eval()
        for index in range(self.parallel.dp.rank, sequences, self.parallel.dp.size):
            batch = self.sequences.held_out(index)
            each = self._losses(batch.tokens)
            loss = (each if self.tokens is None else self.tokens.whole(each)).flatten().cpu().double()
            kinds = batch.kinds[:, 1:].flatten().long()
            bits.index_add_(0, kinds, loss / math.log(2))
            count.index_add_(0, kinds, torch.ones_like(loss))
            # Copies may follow each other, but the first bytes of one never follow the first of another.
            first = kinds == COPY_START
            start_bits += loss[first].view(-1, START_BYTES).sum(0) / math.log(2)
            starts += int(first.sum()) // START_BYTES
        self.parallel.sum_of_rows(sums)
        self.model.train()
        found: dict[str, Any] = {"text": _mean(bits, count, TEXT)}
        if count[COPY] > 0:
            found["source"] = _mean(bits, count, SOURCE)
            found["copy"] = _mean(bits, count, COPY_START, COPY)
            found["copy_after_start"] = _mean(bits, count, COPY)
            found["copy_start"] = (start_bits / starts).tolist()
        return found

    # -- checkpoints ----------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Everything that the rest of the run depends on; the data's position is the step."""
        save_checkpoint(
            path,
            {
                "identity": self.identity,
                "limit": {"steps": self.settings.steps, "seconds": self.settings.seconds},
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "random": torch.get_rng_state(),
                "device_random": torch.cuda.get_rng_state(self.device)
                if self.device.type == "cuda"
                else None,
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "checks": self.checks,
            },
        )

    def resume(self) -> None:
        """Loads the checkpoint of the settings, if they ask for that."""
        if self.settings.resume and self.settings.checkpoint:
            self.load(Path(self.settings.checkpoint))

    def load(self, path: Path) -> None:
        """Continues from a checkpoint, exactly. Raises CheckpointError if it belongs to another run."""
        state = self.parallel.of_first(lambda: load_checkpoint(path))
        require_same(path, state["identity"], self.identity)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state.get("device_random") is not None:
            torch.cuda.set_rng_state(state["device_random"], self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.checks = state["losses"], state["checks"]
        if self.settings.steps is None and self.settings.seconds is None:
            self.settings = replace(self.settings, **state["limit"])


def _mean(bits: Tensor, count: Tensor, *kinds: int) -> float:
    which = list(kinds)
    return (bits[which].sum() / count[which].sum().clamp(min=1)).item()


def train(
    arm: Arm, settings: Settings, corpus: Corpus, emit: Emit, stop_after: int | None = None
) -> dict[str, Any]:
    """Trains one arm, from its checkpoint if ``settings.resume``; see :meth:`Trainer.run`."""
    trainer = Trainer(arm, settings, corpus)
    trainer.resume()
    return trainer.run(emit, stop_after)
