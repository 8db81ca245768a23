"""The Triton backend: NVIDIA GPUs from compute capability 8.0, and AMD GPUs.

Shapes are those of ``kernels/request.py``. Triton is imported on the first call, so the package works
without it. Gradients need no atomics: two runs give the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from sparsetile.kernels.request import Gradients, Request
from sparsetile.kernels.triton_config import Target, overridden, target_of
from sparsetile.kernels.triton_replay import kind_of, record, recordings_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256


@lru_cache(maxsize=1)
def import_problem() -> str | None:
    try:
        from sparsetile.kernels import triton_launch  # noqa: F401
    except ImportError as problem:
        return f"Triton cannot be imported ({problem}); torch's GPU builds for Linux bring it along"
    return None


@lru_cache(maxsize=1)
def _plan() -> ModuleType:
    """The module that prepares launches, imported when first needed: it imports Triton."""
    from sparsetile.kernels import triton_launch

    return triton_launch


def why_not(q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if q.dtype not in DTYPES:
        return f"serves fp16, bf16 and fp32, not {q.dtype}"
    dim = q.shape[-1]
    if dim > LARGEST_HEAD_DIM:
        return f"serves head_dim 1 to {LARGEST_HEAD_DIM}, not {dim}"
    if not (q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        return "needs q, k and v contiguous in their last dimension; call .contiguous() on them"
    return device_problem(q.device, "tensors")


@lru_cache(maxsize=64)  # every call asks, and PyTorch looks a device's properties up anew
def device_problem(device: torch.device, what: str) -> str | None:
    """None if Triton kernels run on ``device``, where the caller's ``what`` are, else why not."""
    problem = import_problem()
    if problem is not None:
        return problem
    if device.type == "cpu":
        from sparsetile.kernels.triton_tiles import INTERPRETED

        return None if INTERPRETED else f"runs on GPUs; the {what} are on the CPU"
    if device.type != "cuda":
        return f"runs on NVIDIA and AMD GPUs, not on {device.type!r} devices"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 (Ampere) or newer, not {capability[0]}.{capability[1]}"
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_FORWARD = ("q", "k", "v", "padding", "bias", "tile_bias", "seed", "q_tiles", "k_tiles", "out", "lse")
_BACKWARD = (
    *("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "padding", "bias", "tile_bias", "seed"),
    *("q_tiles", "k_tiles"),
    *("dq_out", "dk_out", "dv_out", "tile_grad", "bias_grad"),
)  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, Nq, D]`` in q's dtype, lse ``[B, H, Nq]`` fp32), both contiguous."""
    return forward_by(_plan(), q, k, v, request, target_of(q.device))


def forward_by(
    plan: ModuleType, q: Tensor, k: Tensor, v: Tensor, request: Request, target: Target
) -> tuple[Tensor, Tensor]:
    """``forward`` by the launches that the module ``plan`` prepares."""
    batch, heads, q_len, dim = q.shape
    # Sizes one by one: PyTorch takes two microseconds less to read them than to read a torch.Size.
    out = q.new_empty(batch, heads, q_len, dim)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    inputs = (q, k, v, *plan.features_of(request))
    named = (plan.__name__, "forward", q.get_device(), request.scale, request.dropout_p)
    kind, pointers = kind_of(inputs, *named)
    recordings = recordings_of(request.layout)
    known = None if overridden() else recordings.get(kind)
    with on_device(q.device):
        if known is not None:
            known.play([*pointers, out.data_ptr(), lse.data_ptr()], q.device)
            return out, lse
        made = record(plan.forward_launches(q, k, v, out, lse, request, target), _FORWARD)
    if made is not None and not overridden():
        recordings.keep(kind, made)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    request: Request,
    *,
    tile_bias_grad: bool,
    attn_bias_grad: bool,
) -> Gradients:
    """Gradients of ``sum(out·grad_out) + sum(lse·grad_lse)``; dq, dk, dv in the inputs' dtype, biases' in
    fp32."""
    asked = (tile_bias_grad, attn_bias_grad)
    given = (grad_out, grad_lse, q, k, v, out, lse)
    return backward_by(_plan(), *given, request, target_of(q.device), *asked)


def backward_by(
    plan: ModuleType,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    request: Request,
    target: Target,
    tile_bias_grad: bool,
    attn_bias_grad: bool,
) -> Gradients:
    """``backward`` by the launches that the module ``plan`` prepares."""
    layout, device = request.layout, q.device
    batch, heads, q_len, _ = q.shape
    grad_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, out))
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.float().contiguous()
    inputs = (q, k, v, out, lse, grad_out, grad_lse, *plan.features_of(request))
    named = (plan.__name__, "backward", q.get_device(), request.scale, request.dropout_p)
    kind, pointers = kind_of(inputs, *named, request.lean, tile_bias_grad, attn_bias_grad)
    recordings = recordings_of(layout)
    known = None if overridden() else recordings.get(kind)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    tile_grad = bias_grad = None
    tile_parts = plan.tile_grad_parts(layout)
    if tile_bias_grad:
        owners = (batch if layout.batch == 1 else 1, heads if layout.heads == 1 else 1)
        tile_grad = torch.zeros((tile_parts, *owners, layout.capacity), dtype=torch.float32, device=device)
    if attn_bias_grad:
        bias_grad = torch.zeros((batch, heads, q_len, k.shape[2]), dtype=torch.float32, device=device)
    with on_device(device):
        if known is not None:
            pointers += [0 if x is None else x.data_ptr() for x in (dq, dk, dv, tile_grad, bias_grad)]
            known.play(pointers, device)
        else:
            given = (q, k, v, out, lse, grad_out, grad_lse, dq, dk, dv, tile_grad, bias_grad)
            made = record(plan.backward_launches(*given, request, target), _BACKWARD)
            if made is not None and not overridden():
                recordings.keep(kind, made)
    tile_sum = None if tile_grad is None else tile_grad[0] if tile_parts == 1 else tile_grad.sum(0)
    return Gradients(dq, dk, dv, tile_sum, bias_grad)
