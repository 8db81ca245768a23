"""Choosing a backend: one visible order for "auto"; where none serves, an error with every reason."""

from __future__ import annotations

import difflib
from typing import cast

from torch import Tensor

import sparsetile.kernels.cpu as cpu
import sparsetile.kernels.hopper_backend as hopper_backend
import sparsetile.kernels.reference as reference
import sparsetile.kernels.triton_backend as triton_backend
from sparsetile.errors import ArgumentError, BackendError, explain
from sparsetile.kernels.request import Backend, Request

BACKENDS: dict[str, Backend] = {
    "cpu": cast(Backend, cpu),
    "hopper": cast(Backend, hopper_backend),
    "triton": cast(Backend, triton_backend),
    "reference": cast(Backend, reference),
}

AUTO = ("cpu", "hopper", "triton")
"""What ``backend="auto"`` tries, in this order; the dense reference only ever runs when named."""


def check_name(backend: str) -> None:
    """Raise ArgumentError unless ``backend`` is ``"auto"`` or a known backend."""
    if backend != "auto" and (not isinstance(backend, str) or backend not in BACKENDS):
        names = ["auto", *BACKENDS]
        close = difflib.get_close_matches(str(backend), names, n=1)
        fix = f"Did you mean {close[0]!r}?" if close else "Run `sparsetile doctor` to see what serves here."
        raise ArgumentError(explain("backend", expected=f"one of {names}", got=repr(backend), fix=fix))


def choose(backend: str, q: Tensor, k: Tensor, v: Tensor, request: Request) -> Backend:
    """The module that serves the call.

    Raises:
        BackendError: the named backend, or every one of ``AUTO``, cannot; with the reasons.
    """
    candidates = AUTO if backend == "auto" else (backend,)
    reasons = []
    for name in candidates:
        why_not = BACKENDS[name].why_not(q, k, v, request)
        if why_not is None:
            return BACKENDS[name]
        reasons.append(f"{name}: {why_not}")
    fix = (
        "Change what the reasons name; backend='reference' is dense but runs anywhere."
        if backend == "auto"
        else "Pass backend='auto' to let another backend serve, or change what the reason names."
    )
    raise BackendError(
        explain(
            f"backend={backend!r}",
            expected="a backend that serves this call",
            got="; ".join(reasons),
            fix=fix,
        )
    )
