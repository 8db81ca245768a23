"""What a backend is asked to do: the one type that operators hand to kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from sparsetile.layout.blocks import BlockLayout


@dataclass(eq=False, slots=True)  # made at every call: a frozen one takes three times as long
class Request:
    """Everything of an attention call besides q, k, v. All shapes were validated by the caller. A value:
    nobody changes it; ``dataclasses.replace`` makes another.

    Attributes:
        layout: the tiles to compute, on the device of q.
        scale: factor on q·k.
        dropout_p: in [0, 1). Dropout falls on the softmax weights after normalisation.
        seed: int64 ``[1]`` on the device of q; None iff ``dropout_p == 0``. See ``kernels/dropout.py``.
        q_tiles, k_tiles: int64 ``[query tiles]`` and ``[1 or Hkv, key tiles]``, both or neither: which tiles
            of a longer sequence the layout's are. Dropout goes by positions in that one. What stands at
            tiles that no query keeps means nothing.
        key_padding_mask: bool ``[B, Nk]``, or ``[B, Hkv, Nk]`` where key heads hold keys of different places;
            True = ignore the key, whatever its k and v hold, NaN included.
        attn_bias: ``[B or 1, H or 1, Nq, Nk]`` in q's dtype or fp32, added to the scaled logits.
        tile_bias: fp32 (float64 for float64 inputs) ``[B or 1, H or 1, capacity]``: entry ``[b, h, e]`` is
            added to every scaled logit of tile ``e`` (position in ``layout.indices``) for batch element b,
            query head h.
        lean: True asks for gradients that are the same bits every run and need no workspace that grows with q
            beyond what is split; False allows either.
    """

    layout: BlockLayout
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    key_padding_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    tile_bias: Tensor | None = None
    q_tiles: Tensor | None = None
    k_tiles: Tensor | None = None
    lean: bool = False


class Gradients(NamedTuple):
    """Gradients of one call; biases come in full ``[B, H, …]`` form, which the operator sums to shape."""

    q: Tensor
    k: Tensor
    v: Tensor
    tile_bias: Tensor | None
    attn_bias: Tensor | None


class Backend(Protocol):
    """What every module of ``kernels/`` that computes attention offers.

    Shapes: q, grad_out, out ``[B, H, Nq, D]``; k, v ``[B, Hkv, Nk, D]`` with H a multiple of Hkv (query head
    h reads key head ``h // (H // Hkv)``); last dimension contiguous, other strides arbitrary.
    lse ``[B, H, Nq]``: natural log-sum-exp of the scaled and biased logits, fp32 (float64 for float64
    inputs). Rows without any key: out 0, lse −inf, zero gradient.
    """

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> str | None:
        """None if the backend serves this call, else one sentence that says why not."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
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
        """Gradients of ``sum(out·grad_out) + sum(lse·grad_lse)``. ``out`` and ``lse`` may be those of an
        attention of which the keys are a part: then this part's share of that attention's gradients.

        ``tile_bias_grad`` asks for fp32 ``[b, h, capacity]``, b being B if ``layout.batch`` is 1, else 1, h
        likewise; ``attn_bias_grad`` for ``[B, H, Nq, Nk]``, zero at pairs that the layout does not keep.
        """
