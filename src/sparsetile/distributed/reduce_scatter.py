"""Gradients over slow links where parameters are sharded: a reduce-scatter of the largest, for FSDP2.

The first half of what ``gradients.py`` does for replicated parameters. A rank sends the largest entries of
each shard to the rank that owns it (one all-to-all), which adds them in fp32 to its own share, in the order
of ranks. What a rank did not send stays with it and is added to its next gradient. The owner keeps all it
got, so there is no second half and no residual of an owner::

    Σ over steps (ranks · average handed to the optimizer) + Σ over ranks (residuals) = Σ (gradients)

holds at each step. FSDP cuts the groups: the parameters of one ``fully_shard`` travel together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.selection import BROKEN, code_of, release_others
from sparsetile.distributed.travel import others_of, summed, to_owners
from sparsetile.distributed.wire import Message
from sparsetile.errors import ArgumentError, CheckpointError, explain


class SparseReduceScatter(ReduceScatter):
    """The reduce-scatter of one FSDP group, sending ``ratio`` of the bytes of one in bf16.

    A gradient that holds NaN or Inf on any rank makes the group's average NaN on every rank, and enters no
    residual.

    Args:
        name: of the module, for messages.
        ratio: in (0, 1], index bytes included. 1 sends everything in bf16, summed in fp32.
        warmup_steps: steps that send everything before.
    """

    def __init__(self, name: str, ratio: float, warmup_steps: int) -> None:
        self.name, self.ratio, self.warmup_steps = name, ratio, warmup_steps
        self.step = 0
        self.residual: Tensor | None = None
        self._agreed = False
        self.sent_bytes = 0
        """Bytes that this rank has sent to others in the last step."""
        self.ring_bytes = 0.0
        """Bytes that it would have sent in a bf16 ring reduce-scatter."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """``input_tensor`` ``[ranks · n]``, shard after shard; ``output_tensor`` ``[n]``, the owner's.

        Raises:
            MismatchError: ranks differ, at the first call.
            ArgumentError: a reduction other than sum and average; a group too small for the ratio; another
                number of entries than in the steps before. The same on every rank.
        """
        ranks, rank = group.size(), group.rank()
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM) or async_op:
            raise ArgumentError(
                explain(
                    "compressed reduce-scatter",
                    expected="a sum or an average",
                    got=str(op),
                    fix="Leave set_gradient_divide_factor alone, and scale the loss.",
                )
            )
        if not self._agreed:
            call = {
                "gradients of": self.name,
                "entries": input_tensor.numel(),
                "gradient_compression_ratio": self.ratio,
                "gradient_warmup_steps": self.warmup_steps,
                "steps before": self.step,
            }
            Ranks.of(group).agree(call, 0, None)
            self._agreed = True
        shards = input_tensor.view(ranks, -1).float()
        if self.ratio < 1 and self.step >= self.warmup_steps:
            total = self._send_largest(shards, group, rank)
        else:
            total = self._send_whole(shards, group, rank)
        self.step += 1
        self.ring_bytes = 2.0 * shards.shape[1] * (ranks - 1)
        output_tensor.copy_(total / ranks if op == dist.ReduceOp.AVG else total)

    def rescale(self, factor: float) -> None:
        """Multiplies the residual, when gradients change their unit."""
        if self.residual is not None:
            self.residual.mul_(factor)

    def _send_largest(self, shards: Tensor, group: dist.ProcessGroup, rank: int) -> Tensor:
        length = shards.shape[1]
        message = Message(length, self._kept(length), tensors=1)
        if self.residual is None:
            self.residual = torch.zeros_like(shards)
        elif self.residual.shape != shards.shape:
            raise ArgumentError(
                explain(
                    f"gradients of {self.name or 'the model'}",
                    expected=f"{self.residual.numel()} entries, as in the steps before",
                    got=str(shards.numel()),
                    fix="Give every parameter of an FSDP group a gradient in each step.",
                )
            )
        residual = self.residual
        code = code_of(shards)[None]
        # A number times zero is no way to leave it out: NaN stays NaN.
        kept_back = torch.where(code == BROKEN, 0.0, shards)
        own = kept_back[rank].clone()
        residual += kept_back
        residual[rank] = 0.0
        values, places = release_others(residual, rank, message.kept)
        messages = message.pack(values, places, code)
        numbers, places, others = message.unpack(self._exchanged(messages, group))
        for row, at in zip(numbers, places, strict=True):
            own.index_add_(0, at, row)
        return own.masked_fill((torch.cat([others.flatten(), code]) == BROKEN).any(), math.nan)

    def _send_whole(self, shards: Tensor, group: dist.ProcessGroup, rank: int) -> Tensor:
        rounded = shards.bfloat16()
        return summed(self._exchanged(others_of(rounded, rank), group), rounded[rank], rank)

    def _exchanged(self, messages: Tensor, group: dist.ProcessGroup) -> Tensor:
        self.sent_bytes = messages.nbytes
        return to_owners(messages, group).wait_for()

    def _kept(self, length: int) -> int:
        budget = int(self.ratio * 2 * length)
        kept = min(length, (budget - Message(length, 0, tensors=1).nbytes) // 3)
        if kept < 1:
            raise ArgumentError(
                explain(
                    f"gradient_compression_ratio for {self.name or 'the model'}",
                    expected=f"room for one entry a message: {length} entries a rank",
                    got=f"{self.ratio}, which is {budget} bytes",
                    fix="Shard it together with its parent, or compress less.",
                )
            )
        return kept


class ShardedGradients:
    """The compressed reduce-scatters of a model's FSDP groups; see :class:`SparseReduceScatter`."""

    def __init__(self, model: FSDPModule, ratio: float, warmup_steps: int) -> None:
        assert isinstance(model, torch.nn.Module)
        self.groups: dict[str, SparseReduceScatter] = {}
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                self.groups[name] = SparseReduceScatter(name, ratio, warmup_steps)
                module.set_custom_reduce_scatter(self.groups[name])

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to others in the last step."""
        return sum(group.sent_bytes for group in self.groups.values())

    @property
    def ring_bytes(self) -> float:
        """Bytes that it would have sent in bf16 ring reduce-scatters."""
        return sum(group.ring_bytes for group in self.groups.values())

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, by the module's name: every rank saves its own."""
        return {
            name: {
                "step": group.step,
                "residual": None if group.residual is None else group.residual.clone(),
            }
            for name, group in self.groups.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict`` of the same model over as many ranks.

        Raises:
            CheckpointError: the state has other modules; nothing has been loaded then. Residuals of other
                sizes are found out in the next step.
        """
        if state.keys() != self.groups.keys():
            raise CheckpointError(
                explain(
                    "residuals of gradients",
                    expected=f"those of the modules {sorted(self.groups)}",
                    got=sorted(state),
                    fix="Load the state of the same model, sharded then as now.",
                )
            )
        for name, group in self.groups.items():
            group.step, residual = state[name]["step"], state[name]["residual"]
            group.residual = None if residual is None else residual.clone()

    def rescale(self, factor: float) -> None:
        """Multiplies residuals, when gradients change their unit: after ``GradScaler`` has changed its
        scale."""
        for group in self.groups.values():
            group.rescale(factor)
