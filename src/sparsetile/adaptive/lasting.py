"""Tensors that lengths alone decide, kept between calls: on a GPU each operation saved is a launch saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from sparsetile.kernels.triton_backend import on_device
from sparsetile.kernels.triton_replay import current_stream

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

MOST = 32
"""Results that are kept of each function."""


def lasting(make: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """``make`` with its last ``MOST`` results kept. Nobody may write to them.

    Kept is what ``make`` returns on the CPU, or on a stream of a GPU for that stream alone: another one could
    read a tensor before it is made, or after its memory has another owner. Nothing is kept or found while a
    graph is compiled or captured (a captured one reads its memory when nothing else knows of it), nor under a
    mode or transform, whose tensors are of another kind.

    Args:
        make: of hashable arguments; ``device`` is a keyword. Results on a device that is not given as a
            ``torch.device`` are not kept. Not of the values of any tensor.
    """

    @lru_cache(maxsize=MOST)
    def kept(stream: int, *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        # Made in inference mode, autograd could not keep them for backward.
        with torch.inference_mode(False):
            return make(*args, **kwargs)

    @wraps(make)
    def get(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        stream = _stream(kwargs.get("device"))
        return make(*args, **kwargs) if stream is None else kept(stream, *args, **kwargs)  # type: ignore[arg-type]

    return get


def _stream(device: object) -> int | None:
    """The stream that results are kept for now, 0 on the CPU; None if none may be."""
    if torch.compiler.is_compiling() or not isinstance(device, torch.device):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if device.type == "cpu":
        return 0
    if device.type != "cuda" or device.index is None:
        return None
    with on_device(device):
        return None if torch.cuda.is_current_stream_capturing() else current_stream(device)
