"""What is measured against what: sparsetile's backends, dense attention, FlexAttention, FlashAttention 4.

A rival turns a layout into a function of (q, k, v), each ``[B, H, N, D]``, once; that is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetile.errors import ArgumentError, SparsetileError, explain
from sparsetile.functional import sparse_attention
from sparsetile.kernels.request import Request
from sparsetile.kernels.select import AUTO, BACKENDS
from sparsetile.layout.blocks import BlockLayout

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnavailableError(SparsetileError):
    """A rival cannot take part in a case; the message is the reason that the row records."""


class Rival(Protocol):
    """One way to compute the attention of a case.

    ``dense``: it computes every pair whatever the layout says, so one measurement serves a whole shape.
    """

    @property
    def name(self) -> str: ...

    @property
    def dense(self) -> bool: ...

    def prepare(self, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attention:
        """The function to time. Raises UnavailableError with the reason if there is none.

        ``causal`` says that the layout keeps no key after its query: then a dense rival skips those too.
        """

    def no_backward(self, device: torch.device) -> str | None:
        """Why there is no backward pass on ``device``; None if there is."""


@dataclass(frozen=True)
class Tiles:
    """One backend of sparsetile."""

    name: str
    dense: bool = False

    def prepare(self, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attention:
        reason = BACKENDS[self.name].why_not(q, k, v, Request(layout=layout, scale=q.shape[-1] ** -0.5))
        if reason is not None:
            raise UnavailableError(reason)
        return lambda q, k, v: sparse_attention(q, k, v, layout, backend=self.name)

    def no_backward(self, device: torch.device) -> str | None:
        return None


@dataclass(frozen=True)
class Sdpa:
    """``F.scaled_dot_product_attention`` over every (causal) pair, by one kernel or by torch's choice."""

    name: str
    kernel: SDPBackend | None = None
    dense: bool = True

    def prepare(self, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attention:
        kernel = self.kernel
        if kernel is None:
            return partial(F.scaled_dot_product_attention, is_causal=causal)
        if q.device.type != "cuda":
            raise UnavailableError(f"{self.name} runs on CUDA only")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return attend

    def no_backward(self, device: torch.device) -> str | None:
        return None


@dataclass(frozen=True)
class Flex:
    """FlexAttention, compiled once a shape.

    Whole-tile layouts are handed over as full blocks with lists of one width a shape, so that patterns of one
    shape share a compilation; others through ``layout.to_flex()``.
    """

    name: str = "flex"
    dense: bool = False

    def prepare(self, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attention:
        compiled = _compiled_flex()
        mask = _flex_blocks(layout) if bool((layout.mask_ids[: layout.nnz] < 0).all()) else layout.to_flex()
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    def no_backward(self, device: torch.device) -> str | None:
        return "FlexAttention has no backward on CPU" if device.type == "cpu" else None


@dataclass(frozen=True)
class Flash4:
    """FlashAttention 4 (``flash_attn.cute``), block-sparse or over every pair."""

    name: str
    dense: bool

    def prepare(self, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attention:
        if q.device.type != "cuda":
            raise UnavailableError("FlashAttention 4 runs on CUDA only")
        try:
            attend = importlib.import_module("flash_attn.cute").flash_attn_func
            sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
        except Exception as error:  # its import compiles and probes the driver: anything can be thrown
            raise UnavailableError(f"flash_attn.cute does not import: {one_line(error)}") from error
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise UnavailableError(f"FlashAttention 4 takes float16 and bfloat16, not {q.dtype}")
        lists: dict[str, Any] = {"causal": causal} if self.dense else {}
        if not self.dense:
            if not bool((layout.mask_ids[: layout.nnz] < 0).all()):
                raise UnavailableError(
                    "measured with whole tiles only (a masked tile needs a CuTe mask function)"
                )
            none = torch.zeros(1, 1, layout.q_blocks, dtype=torch.int32, device=q.device)
            none_t = torch.zeros(1, 1, layout.k_blocks, dtype=torch.int32, device=q.device)
            for key, empty, (counts, indices) in (
                ("block_sparse_tensors", none, _lists(layout, transposed=False)),
                ("block_sparse_tensors_bwd", none_t, _lists(layout, transposed=True)),
            ):
                lists[key] = sparsity.BlockSparseTensorsTorch(
                    mask_block_cnt=empty,
                    mask_block_idx=empty[..., None].contiguous(),
                    full_block_cnt=counts,
                    full_block_idx=indices,
                    block_size=(layout.block_q, layout.block_k),
                )

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **lists)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first.transpose(1, 2)

        return run

    def no_backward(self, device: torch.device) -> str | None:
        return None


def all_rivals() -> dict[str, Rival]:
    """Every rival by the name that ``--backends`` takes."""
    rivals: list[Rival] = [
        *(Tiles(name) for name in BACKENDS),
        Sdpa("dense"),
        Sdpa("dense-cudnn", SDPBackend.CUDNN_ATTENTION),
        Flash4("dense-fa4", dense=True),
        Flex(),
        Flash4("fa4", dense=False),
    ]
    return {rival.name: rival for rival in rivals}


def chosen_rivals(names: list[str] | None, device: torch.device) -> list[Rival]:
    """The named rivals; by default those that suit ``device``. Raises ArgumentError for an unknown name."""
    known = all_rivals()
    if names is None:
        names = [name for name in AUTO if (name == "cpu") == (device.type == "cpu")] + ["dense", "flex"]
        if device.type == "cuda":
            names += ["dense-cudnn", "fa4", "dense-fa4"]
    for name in names:
        if name not in known:
            raise ArgumentError(
                explain(
                    "--backends",
                    expected=f"names among {', '.join(known)}",
                    got=repr(name),
                    fix="Correct it.",
                )
            )
    # Dense first: a run that is cut short then still has what the others are compared with.
    return sorted((known[name] for name in dict.fromkeys(names)), key=lambda rival: not rival.dense)


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters, its type first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # Past the limit, dynamo quietly runs the eager path, which is dense. Every new shape counts.
    torch._dynamo.config.recompile_limit = max(4096, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = 1 << 16
    # The backward is timed alone and repeatedly, so the compiled graph must not reuse its saved tensors.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex_blocks(layout: BlockLayout) -> Any:
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    # One width for every pattern of a shape, as long as that is cheap.
    width = layout.k_blocks if layout.k_blocks <= 2048 else None
    width_t = layout.q_blocks if layout.q_blocks <= 2048 else None
    counts, indices = _lists(layout, transposed=False, width=width)
    counts_t, indices_t = _lists(layout, transposed=True, width=width_t)
    return BlockMask(
        seq_lengths=(layout.q_len, layout.k_len),
        kv_num_blocks=torch.zeros_like(counts),
        kv_indices=torch.zeros_like(indices),
        full_kv_num_blocks=counts,
        full_kv_indices=indices,
        q_num_blocks=torch.zeros_like(counts_t),
        q_indices=torch.zeros_like(indices_t),
        full_q_num_blocks=counts_t,
        full_q_indices=indices_t,
        BLOCK_SIZE=(layout.block_q, layout.block_k),
        mask_mod=noop_mask,
    )


def _lists(layout: BlockLayout, *, transposed: bool, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Counts ``[B, H, rows]`` and indices ``[B, H, rows, width]`` (int32, zero past the count)."""
    starts, entries = (layout.t_indptr, layout.t_indices) if transposed else (layout.indptr, layout.indices)
    counts = starts.diff().long()
    longest = int(counts.max()) if width is None else width
    rows = torch.arange(len(counts), device=layout.device).repeat_interleave(counts)
    place = torch.arange(layout.nnz, device=layout.device) - starts[:-1].long()[rows]
    padded = torch.zeros(len(counts), max(1, longest), dtype=torch.int32, device=layout.device)
    padded[rows, place] = entries[: layout.nnz].int()
    shape = (layout.batch, layout.heads, -1)
    return counts.int().view(shape), padded.view(*shape, padded.shape[1])
