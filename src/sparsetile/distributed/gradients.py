"""Gradients over slow links: top-k with error feedback, as a communication hook of DistributedDataParallel.

Shard-wise: every rank owns one shard of every bucket. A rank sends the largest entries of each shard to the
shard's owner (all-to-all), the owner adds them up in fp32, in a fixed order, and sends the largest entries of
the sum to everyone (all-gather). What is not sent stays where it is and is added to the next step's gradient:
nothing is lost, only late (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847,
algorithm 2).

One residual serves both sides: of another's shard a rank holds what it has not yet sent, of its own shard
what the owner has not yet sent on. Both count in the sum over ranks, so that

    ranks · Σ (gradients handed to the optimizer) + Σ over ranks (residuals) = Σ over ranks (gradients)

holds for each parameter at each step, however the buckets are cut. Residuals are fp32: in bf16 a small
gradient added to a residual 256 times as large would vanish, which is the very loss that they are there to
prevent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from sparsetile.distributed.buckets import Bucket, cut, ring_bytes
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.selection import BROKEN, LIVE, code_of, release, release_others
from sparsetile.distributed.travel import others_of, summed, to_everyone, to_owners
from sparsetile.errors import ArgumentError, CheckpointError, explain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Delivery:
    """A bucket of DistributedDataParallel whose gradients are under way."""

    future: Future[Tensor]
    buffer: Tensor
    missing: int


class GradientExchange:
    """Averages gradients over ranks, sending ``ratio`` of the bytes of a bf16 ring all-reduce.

    Every rank ends a step with the same bits, and a run that is repeated, or resumed from ``state_dict``, has
    the same bits again. Steps below ``warmup_steps``, and all steps at ``ratio=1``, send everything in bf16:
    summed in fp32 by the owners, without residuals.

    A tensor whose gradient holds NaN or Inf on any rank becomes NaN on every rank; the offending gradient
    enters no residual. A tensor whose gradient is zero on every rank (an unused parameter) stays zero and
    keeps its residual.

    Args:
        parameters: names and parameters, in the same order on every rank.
        group: the ranks. In a group of one nothing is sent, and gradients stay as they are.
        ratio: in (0, 1], index bytes included.
        warmup_steps: at least 0.
        cap_bytes: bytes of gradients in a bucket.
        max_tensors: parameters in a bucket.

    Raises:
        MismatchError: ranks' arguments differ, or a dtype or device cannot be served; the same on every rank.
        ArgumentError: the model is too small for the ratio.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        group: dist.ProcessGroup,
        *,
        ratio: float,
        warmup_steps: int = 0,
        cap_bytes: int = 25 * 2**20,
        max_tensors: int = 32,
    ) -> None:
        self._group = group
        self._ranks, self._rank = group.size(), group.rank()
        self._ratio, self._warmup = ratio, warmup_steps
        self.step = 0
        listed = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters])
        call = {
            "parameters": f"{len(parameters)} of digest {hashlib.sha256(listed.encode()).hexdigest()[:8]}",
            "gradient_compression_ratio": ratio,
            "gradient_warmup_steps": warmup_steps,
            "bytes in a bucket": cap_bytes,
            "bucket_max_tensors": max_tensors,
        }
        Ranks.of(group).agree(call, 0, _problem(parameters))
        alone = self._ranks == 1
        self.buckets = [] if alone else cut(parameters, self._ranks, ratio, cap_bytes, max_tensors)
        tensors = dict(parameters)
        self._place = {
            tensors[name]: (index, slot)
            for index, bucket in enumerate(self.buckets)
            for slot, name in enumerate(bucket.names)
        }
        device = parameters[0][1].device
        self._on_host = device.type == "cpu"
        self._sizes = [torch.tensor(bucket.sizes, device=device) for bucket in self.buckets]
        self._residuals = [
            torch.zeros(bucket.ranks, bucket.length, device=device) if ratio < 1 else None
            for bucket in self.buckets
        ]
        self._stream = None if self._on_host else torch.Stream(device)
        self._forget()

    def _forget(self) -> None:
        """Drops what a step that did not finish has left."""
        self._arrived: list[dict[int, Tensor]] = [{} for _ in self.buckets]
        self._deliveries: list[list[_Delivery]] = [[] for _ in self.buckets]
        self._flights: list[Iterator[None]] = []

    # What a user asks of it

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends to others in the present step."""
        return sum(b.sent_bytes if self._compressing else b.whole_bytes for b in self.buckets)

    @property
    def ring_bytes(self) -> float:
        """Bytes that this rank would send in a bf16 ring all-reduce."""
        return sum(ring_bytes(bucket.entries, self._ranks) for bucket in self.buckets)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: every rank saves its own.

        Returns:
            ``step``, and ``residuals``: fp32 copies by parameter name, flat.
        """
        return {
            "step": self.step,
            "residuals": {name: view.clone() for name, view in self._named_residuals()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict``. Other buckets or another number of ranks lose nothing of what is
        loaded.

        Raises:
            CheckpointError: the state belongs to other parameters; nothing has been loaded then.
        """
        own = dict(self._named_residuals())
        saved = state["residuals"]
        if {n: v.numel() for n, v in own.items()} != {n: v.numel() for n, v in saved.items()}:
            raise CheckpointError(
                explain(
                    "residuals of gradients",
                    expected=f"{len(own)} known tensors, {sum(v.numel() for v in own.values())} entries",
                    got=f"{len(saved)} tensors, {sum(v.numel() for v in saved.values())} entries",
                    fix="Load the state of the same model, compressed then as now.",
                )
            )
        for name, view in own.items():
            view.copy_(saved[name])
        self.step = state["step"]
        self._forget()

    def rescale(self, factor: float) -> None:
        """Multiplies residuals, when gradients change their unit: after ``GradScaler`` has changed its
        scale.
        """
        for residual in self._residuals:
            if residual is not None:
                residual.mul_(factor)

    def _named_residuals(self) -> Iterator[tuple[str, Tensor]]:
        for bucket, residual in zip(self.buckets, self._residuals, strict=True):
            if residual is not None:
                yield from zip(bucket.names, _views(residual, bucket), strict=True)

    # One step

    @property
    def _compressing(self) -> bool:
        return self._ratio < 1 and self.step >= self._warmup

    def take(self, handed: Any) -> Future[Tensor]:
        """The communication hook. Completes when the averages stand in the bucket's buffer.

        DistributedDataParallel hands over its buckets in the same order on every rank. Ours are sent as soon
        as their last gradient is there, which is therefore the same order on every rank, too.
        """
        buffer = handed.buffer()
        if buffer.layout != torch.strided:
            raise ArgumentError(
                explain(
                    "gradients", expected="dense", got=str(buffer.layout), fix="Use Embedding(sparse=False)."
                )
            )
        if handed.index() == 0:
            self._forget()
        future: Future[Tensor] = Future(devices=None if self._on_host else [buffer.device])
        delivery = _Delivery(future, buffer, 0)
        touched = set()
        for parameter, gradient in zip(handed.parameters(), handed.gradients(), strict=True):
            if self._ranks > 1 and parameter.numel():
                index, slot = self._place[parameter]
                self._arrived[index][slot] = gradient
                touched.add(index)
        delivery.missing = len(touched)
        with self._beside():
            for index in sorted(touched):
                self._deliveries[index].append(delivery)
                if len(self._arrived[index]) == len(self.buckets[index].names):
                    self._advance(self._exchange(index))
            if not touched:
                future.set_result(buffer)
            if handed.is_last():
                while self._flights:
                    self._advance()
                self.step += 1
        return future

    def _beside(self) -> AbstractContextManager[Any]:
        """On a device: a stream of its own, so that waiting for a message does not hold up backward."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))
        return self._stream

    def _advance(self, new: Iterator[None] | None = None) -> None:
        """Starts a flight and lets those before it go one stage further: their messages travelled
        meanwhile.
        """
        if new is not None:
            next(new)
        self._flights = [flight for flight in self._flights if next(flight, self) is not self]
        if new is not None:
            self._flights.append(new)

    def _exchange(self, index: int) -> Iterator[None]:
        bucket, arrived = self.buckets[index], self._arrived[index]
        gradients = [arrived[slot] for slot in range(len(bucket.names))]
        residual = self._residuals[index]
        if residual is not None and self._compressing:
            yield from self._send_largest(bucket, residual, self._sizes[index], gradients)
        else:
            yield from self._send_whole(bucket, gradients)
        arrived.clear()
        for delivery in self._deliveries[index]:
            delivery.missing -= 1
            if not delivery.missing:
                delivery.future.set_result(delivery.buffer)
        self._deliveries[index].clear()

    def _send_largest(
        self, bucket: Bucket, residual: Tensor, sizes: Tensor, gradients: list[Tensor]
    ) -> Iterator[None]:
        """Each ``yield`` stands where a message travels."""
        codes = torch.stack([code_of(gradient) for gradient in gradients])
        for view, gradient, code in zip(_views(residual, bucket), gradients, codes, strict=True):
            flat = gradient.reshape(-1)
            if not self._on_host:
                flat = torch.where(code == BROKEN, 0.0, flat)
            elif code == BROKEN:
                continue
            view.add_(flat)
        idle = self._spread(codes != LIVE, sizes, bucket)
        values, places = release_others(residual, self._rank, bucket.kept, idle)
        travelling = to_owners(bucket.to_owner.pack(values, places, codes), self._group)
        yield
        messages = travelling.wait_for()
        numbers, places, others = bucket.to_owner.unpack(messages)
        own = residual[self._rank]
        for row, at in zip(numbers, places, strict=True):
            own.index_add_(0, at, row)
        everyone = torch.cat([others, codes[None]])
        broken = (everyone == BROKEN).any(0)
        idle = self._spread(broken | (everyone != LIVE).all(0), sizes, bucket)
        own_idle = None if idle is None else idle[self._rank :][:1]
        means, places = release(own[None], bucket.kept, self._ranks, own_idle)
        travelling = to_everyone(bucket.from_owner.pack(means, places)[0], self._group)
        yield
        numbers, places, _ = bucket.from_owner.unpack(travelling.wait_for())
        average = torch.zeros_like(residual).scatter_(1, places, numbers)
        any_broken = not self._on_host or bool(broken.any())
        for view, gradient, bad in zip(_views(average, bucket), gradients, broken, strict=True):
            if any_broken:
                view.masked_fill_(bad, math.nan)
            gradient.copy_(view.view(gradient.shape))

    def _send_whole(self, bucket: Bucket, gradients: list[Tensor]) -> Iterator[None]:
        shards = gradients[0].new_zeros((bucket.ranks, bucket.length), dtype=torch.bfloat16)
        for view, gradient in zip(_views(shards, bucket), gradients, strict=True):
            view.copy_(gradient.reshape(-1))
        travelling = to_owners(others_of(shards, self._rank), self._group)
        yield
        total = summed(travelling.wait_for(), shards[self._rank], self._rank)
        travelling = to_everyone((total / self._ranks).bfloat16(), self._group)
        yield
        for view, gradient in zip(_views(travelling.wait_for(), bucket), gradients, strict=True):
            gradient.copy_(view.view(gradient.shape))

    def _spread(self, chosen: Tensor, sizes: Tensor, bucket: Bucket) -> Tensor | None:
        """bool [ranks, length]: entries of the chosen tensors. None, on the host, if none is chosen."""
        if self._on_host and not chosen.any():
            return None
        entries = chosen.repeat_interleave(sizes, output_size=bucket.entries)
        padding = bucket.ranks * bucket.length - bucket.entries
        return torch.nn.functional.pad(entries, (0, padding)).view(bucket.ranks, bucket.length)


def _views(shards: Tensor, bucket: Bucket) -> tuple[Tensor, ...]:
    """The flat piece of each parameter in [ranks, length]."""
    return shards.view(-1)[: bucket.entries].split_with_sizes(bucket.sizes)


def _problem(parameters: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why gradients of these parameters cannot be compressed, if so."""
    devices = sorted({str(parameter.device) for _, parameter in parameters})
    if len(devices) != 1:
        return f"parameters on one device are needed, these are on {', '.join(devices) or 'none'}"
    for name, parameter in parameters:
        if parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}; residuals are fp32 and serve fp32, bf16 and fp16"
    return None
