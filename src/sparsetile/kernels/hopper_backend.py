"""The backend for Hopper (compute capability 9.0): bulk copies, asynchronous products, persistent programs.

Serves the common case, forward and backward; ``why_not`` says what is left to the Triton backend. Backward
has two forms, of which ``Request.lean`` asks for the one that gives the same bits every run
(``hopper_launch``).
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from sparsetile.kernels.request import Gradients, Request
from sparsetile.kernels.triton_backend import backward_by, forward_by
from sparsetile.kernels.triton_config import target_of

LARGEST_HEAD_DIM = 128
BLOCKS = (64, 128)
_MOST_TILES = 2**30  # entries are counted in steps of half a tile, in int32


@lru_cache(maxsize=1)
def _plan() -> ModuleType:
    """The module that prepares launches, imported when first needed: it imports Triton."""
    from sparsetile.kernels import hopper_launch

    return hopper_launch


@lru_cache(maxsize=1)
def import_problem() -> str | None:
    try:
        _plan()
    except ImportError as problem:
        return f"needs Triton 3.6 or newer with Gluon ({problem})"
    return None


@lru_cache(maxsize=64)
def device_problem(device: torch.device) -> str | None:
    """None if the kernels run on ``device``, where the tensors are, else why not."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs of compute capability 9.0; the tensors are on {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"runs on compute capability 9.0 (H100, H200), not {capability[0]}.{capability[1]}"
    return import_problem()


def why_not(q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    return device_problem(q.device) or unserved(q, k, v, request)


def unserved(q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
    """What of the call the kernels do not serve, on whatever device."""
    layout = request.layout
    if q.dtype != torch.bfloat16 and q.dtype != torch.float16:
        return f"serves fp16 and bf16, not {q.dtype}"
    if not 0 < q.shape[3] <= LARGEST_HEAD_DIM or q.shape[3] % 8:
        return f"serves head_dim 8 to {LARGEST_HEAD_DIM} in multiples of 8, not {q.shape[3]}"
    if layout.block_q != layout.block_k or layout.block_q not in BLOCKS:
        return f"serves tiles of 64×64 and 128×128 tokens, not {layout.block_q}×{layout.block_k}"
    if request.attn_bias is not None:
        return "has no dense bias; a bias by tile it has"
    if request.scale <= 0:
        return f"needs a scale above 0, not {request.scale}"
    if layout.indptr.dtype != torch.int32 or layout.capacity >= _MOST_TILES:
        return f"serves fewer than 2^30 tiles, not {layout.capacity:,}"
    if not (_copied_in_bulk(q) and _copied_in_bulk(k) and _copied_in_bulk(v)):
        return "needs q, k and v at multiples of 16 bytes, with strides that are; call .contiguous() on them"
    return None


def _copied_in_bulk(x: Tensor) -> bool:
    """Whether TMA can copy parts of ``[B, H, N, D]``: 16-byte steps, and none of 0."""
    steps = x.stride()
    if steps[3] != 1 or x.data_ptr() & 15:
        return False
    if steps[0] > 0 and steps[1] > 0 and steps[2] > 0 and not (steps[0] | steps[1] | steps[2]) & 7:
        return True
    return all(x.shape[i] == 1 or (steps[i] > 0 and steps[i] % 8 == 0) for i in range(3))


def forward(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, Nq, D]`` in q's dtype, lse ``[B, H, Nq]`` fp32), both contiguous."""
    return forward_by(_plan(), q, k, v, request, target_of(q.device))


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
    """Gradients of ``sum(out·grad_out) + sum(lse·grad_lse)``; dq, dk, dv in the inputs' dtype, the tile
    bias's in fp32."""
    if not _copied_in_bulk(grad_out):  # such as the expanded one of a sum
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    asked = (tile_bias_grad, attn_bias_grad)
    given = (grad_out, grad_lse, q, k, v, out, lse)
    return backward_by(_plan(), *given, request, target_of(q.device), *asked)
