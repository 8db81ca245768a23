"""Tensors kept between calls: the same ones again, and never one of another kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetile.adaptive.lasting import MOST, lasting

CPU = torch.device("cpu")


class Counted:
    """A function made lasting, and how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

        @lasting
        def line(start: int, *, device: torch.device | str | None = None) -> Tensor:
            self.runs += 1
            return torch.arange(start, start + 3, device=device)

        self.line = line


def test_the_same_again() -> None:
    counted = Counted()
    first = counted.line(4, device=CPU)
    assert first.tolist() == [4, 5, 6] and counted.line(4, device=CPU) is first and counted.runs == 1
    assert counted.line(5, device=CPU).tolist() == [5, 6, 7] and counted.runs == 2
    # Which device these are on may be another one the next time.
    for device in (None, "cpu"):
        assert counted.line(4, device=device) is not first


def test_the_oldest_go() -> None:
    counted = Counted()
    first = counted.line(0, device=CPU)
    for start in range(1, MOST):
        counted.line(start, device=CPU)
    assert counted.line(0, device=CPU) is first and counted.runs == MOST
    counted.line(MOST, device=CPU)  # for it goes 1, not 0
    assert counted.line(0, device=CPU) is first
    counted.line(1, device=CPU)
    assert counted.runs == MOST + 2


def test_kept_tensors_serve_autograd() -> None:
    counted = Counted()
    with torch.inference_mode():
        made = counted.line(0, device=CPU)
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad((x * counted.line(0, device=CPU)).sum(), x)
    assert counted.line(0, device=CPU) is made and grad.tolist() == [0.0, 1.0, 2.0]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FakeTensorMode, Watching, lambda: torch.device("meta")])
def test_modes_keep_and_find_nothing(mode) -> None:  # type: ignore[no-untyped-def]
    counted = Counted()
    kept = counted.line(0, device=CPU)
    with mode():
        found, other = counted.line(0, device=CPU), counted.line(1, device=CPU)
    assert found is not kept and isinstance(found, FakeTensor) == (mode is FakeTensorMode)
    after = counted.line(1, device=CPU)
    assert after is not other and not isinstance(after, FakeTensor) and after.tolist() == [1, 2, 3]


def test_transforms_keep_and_find_nothing() -> None:
    counted = Counted()
    kept = counted.line(0, device=CPU)
    inside = []

    def call(x: Tensor) -> Tensor:
        inside.append(counted.line(0, device=CPU))
        return x * inside[0]

    torch.func.vmap(call)(torch.ones(2, 3))
    assert inside[0] is not kept and counted.line(0, device=CPU) is kept


def test_compiled_graphs_make_their_own() -> None:
    counted = Counted()
    counted.line(2, device=CPU)

    def call(x: Tensor) -> Tensor:
        return x + counted.line(2, device=x.device)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert compiled(torch.zeros(3, dtype=torch.long)).tolist() == [2, 3, 4]
    after = counted.line(2, device=CPU)
    assert type(after) is Tensor and after.tolist() == [2, 3, 4]
