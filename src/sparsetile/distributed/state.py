"""State: what a training step starts from, kept in CPU memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Stateful(Protocol):
    """What a checkpoint can hold: a data loader, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class State:
    """Attributes:
    step: the number of the step.
    tensors: parameters and buffers by name, also the buffers that a state_dict leaves out.
    others: the state_dict of the optimizer, and of what else changes.
    random, device_random: of the generators of the CPU and of the model's device, if that is another.
    """

    step: int
    tensors: dict[str, Tensor]
    others: list[Any]
    random: Tensor
    device_random: Tensor | None

    @classmethod
    def of(cls, step: int, model: nn.Module, others: Sequence[Stateful]) -> State:
        device = _device(model)
        return cls(
            step,
            {name: _copied(x) for name, x in _tensors(model).items()},
            [_copied(each.state_dict()) for each in others],
            torch.get_rng_state(),
            None if device is None else torch.get_device_module(device).get_rng_state(device),
        )

    @torch.no_grad()
    def restore(self, model: nn.Module, others: Sequence[Stateful]) -> None:
        """Puts all of it back where it came from."""
        tensors = _tensors(model)
        for name, kept in self.tensors.items():
            tensors[name].copy_(kept)
        for each, kept in zip(others, self.others, strict=True):
            each.load_state_dict(_copied(kept))  # it may go on with the very tensors that it is given
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            device = _device(model)
            torch.get_device_module(device).set_rng_state(self.device_random, device)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _device(model: nn.Module) -> torch.device | None:
    """Where the parameters are, if not on the CPU."""
    first = next(model.parameters(), None)
    return None if first is None or first.device.type == "cpu" else first.device


def _copied(x: Any) -> Any:
    """A copy in CPU memory."""
    if isinstance(x, Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map(_copied, x))
    return copy.deepcopy(x)
