"""The CPU backend with a note of what each request says of ``lean``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsetile.kernels import cpu
from sparsetile.kernels.request import Gradients, Request


class Witness:
    """Stands in for the backend in ``kernels.select.BACKENDS``."""

    def __init__(self) -> None:
        self.forwards: list[bool] = []
        self.backwards: list[bool] = []

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
        return cpu.why_not(q, k, v, request)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        self.forwards.append(request.lean)
        return cpu.forward(q, k, v, request)

    def backward(self, *given: Any, **asked: bool) -> Gradients:
        self.backwards.append(given[-1].lean)
        return cpu.backward(*given, **asked)

    def said(self, parts: int = 1) -> set[bool]:
        """What all requests since the last look said, at least so many forward and so many backward."""
        assert len(self.forwards) >= parts and len(self.backwards) >= parts
        both = {*self.forwards, *self.backwards}
        self.forwards, self.backwards = [], []
        return both
