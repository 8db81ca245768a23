"""Which key tiles each query tile keeps, scored and chosen in one Triton kernel: nothing is ``[nq, nk]``.

The choice that ``adaptive.select.select_tiles`` makes of an MLP's or a bilinear scorer's rows, up to the
rounding of the scores. Triton is imported on the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetile.errors import ArgumentError, BackendError, explain
from sparsetile.kernels.triton_backend import DTYPES, device_problem, on_device

if TYPE_CHECKING:
    from sparsetile.kernels.triton_launch import Launch

MOST_KEPT = 128
"""Places of a row besides the own tile's: they are sorted in registers."""

_LANES = 32


def why_not(a: Tensor, b: Tensor, k: int, *, own: bool = True) -> str | None:
    """None if :func:`topk_rows` serves the call, else one sentence that says why not."""
    if a.dtype not in DTYPES or b.dtype != a.dtype:
        return f"serves fp16, bf16 and fp32 features of one dtype, not {a.dtype} and {b.dtype}"
    others = min(k - own, b.shape[2])
    if others > MOST_KEPT:
        return f"keeps up to {MOST_KEPT} tiles a row besides its own, not {others}"
    return device_problem(a.device, "features")


@torch.no_grad()
def topk_rows(
    a: Tensor,
    b: Tensor,
    w: Tensor | None,
    k: int,
    *,
    w0: Tensor | None = None,
    is_causal: bool,
    offset_tokens: int,
    block: int,
    temperature: float | Tensor = 1.0,
    noise: Tensor | None = None,
    sink: bool = False,
    own: bool = True,
    valid_keys: Tensor | None = None,
    span: int = 1,
    within: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k key tiles that each query tile keeps, by s(i, j) = w0 + Σ_h w_h·ReLU(a_ih + b_jh), or without
    weights by s(i, j) = w0 + Σ_h a_ih·b_jh.

    Rows, reach, own tile, sink, noise and order are those of ``adaptive.select.select_tiles``: place 0 is the
    own tile's (−1 if it is not allowed), key tile 0 follows if ``sink``, then all others by falling s (with
    ``noise`` by s/τ + g), equal ones by rising index; NaN counts as +∞. Sums are fp32, with hidden in rising
    order, and two calls give the same bits. Memory besides the outputs: none; no host sync.

    Args:
        a: ``[B, G, nq, h]``, the query tiles' half (with the MLP's b₁); fp16, bf16 or fp32. Fastest if h is
            a multiple of 4.
        b: ``[B, G, nk, h]``, the key tiles' half, of a's dtype.
        w: ``[h]``, ``[1, h]`` or ``[G, h]``: the MLP's output weights, any floating dtype; None: bilinear.
        k: places of a row, ≥ 1; may exceed nk, but not ``MOST_KEPT`` besides the own tile.
        w0: one value or ``[G]``: the output bias. It changes no choice, only the scores returned.
        is_causal, offset_tokens (k_len − q_len), block: where the rows stand.
        temperature: τ > 0, a number, or a tensor ``[]`` or ``[G]``; without ``noise`` it changes nothing.
        noise: int64 seed ``[1]``; None: no noise.
        valid_keys: bool ``[B, nk]``, False: no row may keep the tile.
        span, within: the two levels of a search, as in ``select_tiles``: keys are runs of ``span`` tiles, or
            with int32 ``within`` ``[B, G, nq, S]`` tiles, of which a row may keep those of its S runs.

    Returns:
        (indices int32 ``[B, G, nq, k]``, −1 for an unused place; what they were ranked by, fp32 of the same
        shape, −∞ there).

    Raises:
        ArgumentError: an argument is not as above.
        BackendError: :func:`why_not` says why the kernel cannot serve the call.
    """
    _check(a, b, w, k, w0, block, temperature, noise, valid_keys)
    _check_runs(a, span, within)
    problem = why_not(a, b, k, own=own)
    if problem is not None:
        fix = "Call adaptive.select.select_tiles, which needs no kernel."
        raise BackendError(
            explain("topk_rows", expected="a call that the kernel serves", got=problem, fix=fix)
        )
    choices = b.shape[2] if within is None else within.shape[-1] * span
    places = min(k, choices + own)
    indices = torch.empty((*a.shape[:3], places), dtype=torch.int32, device=a.device)
    scores = torch.empty(indices.shape, dtype=torch.float32, device=a.device)
    if within is not None:
        # Of equal scores the lower column goes first, and the kernel takes them as they come.
        within = within.sort(-1).values
    given = (a, b, w, w0, temperature, noise, valid_keys, within, indices, scores)
    where = (offset_tokens, block, span)
    with on_device(a.device):
        launch(*given, *where, is_causal=is_causal, own=own, sink=sink).run()
    if places < k:
        indices = F.pad(indices, (0, k - places), value=-1)
        scores = F.pad(scores, (0, k - places), value=float("-inf"))
    return indices, scores


def chosen_rows(
    a: Tensor,
    b: Tensor,
    w: Tensor | None,
    k: int,
    *,
    is_causal: bool,
    offset_tokens: int,
    block: int,
    temperature: Tensor,
    noise: Tensor | None,
    sink: bool,
    valid_keys: Tensor | None,
    span: int = 1,
    within: Tensor | None = None,
) -> Tensor:
    """The indices of :func:`topk_rows`, with the own tile; an operator in a graph that is being compiled."""
    if torch.compiler.is_compiling():
        given = (k, is_causal, offset_tokens, block, temperature, noise, sink, valid_keys, span, within)
        found: Tensor = _operator(a, b, w, *given)
        return found
    return topk_rows(
        a,
        b,
        w,
        k,
        is_causal=is_causal,
        offset_tokens=offset_tokens,
        block=block,
        temperature=temperature,
        noise=noise,
        sink=sink,
        valid_keys=valid_keys,
        span=span,
        within=within,
    )[0]


@torch.library.custom_op("sparsetile::chosen_rows", mutates_args=())
def _operator(
    a: Tensor,
    b: Tensor,
    w: Tensor | None,
    k: int,
    is_causal: bool,
    offset_tokens: int,
    block: int,
    temperature: Tensor,
    noise: Tensor | None,
    sink: bool,
    valid_keys: Tensor | None,
    span: int,
    within: Tensor | None,
) -> Tensor:
    return chosen_rows(
        a,
        b,
        w,
        k,
        is_causal=is_causal,
        offset_tokens=offset_tokens,
        block=block,
        temperature=temperature,
        noise=noise,
        sink=sink,
        valid_keys=valid_keys,
        span=span,
        within=within,
    )


@_operator.register_fake
def _(a: Tensor, b: Tensor, w: Tensor | None, k: int, *settings: object) -> Tensor:
    return a.new_empty((*a.shape[:3], k), dtype=torch.int32)


def launch(
    a: Tensor,
    b: Tensor,
    w: Tensor | None,
    w0: Tensor | None,
    temperature: float | Tensor,
    noise: Tensor | None,
    valid_keys: Tensor | None,
    within: Tensor | None,
    indices: Tensor,
    scores: Tensor,
    offset: int,
    block: int,
    span: int,
    *,
    is_causal: bool,
    own: bool,
    sink: bool,
) -> Launch:
    """The launch that fills ``indices`` and ``scores``, contiguous ``[B, G, nq, places]``."""
    from sparsetile.kernels import triton_topk
    from sparsetile.kernels.triton_launch import Launch, strides_of

    batch, groups, nq, hidden = a.shape
    nk, places = b.shape[2], indices.shape[-1]
    a = a if a.stride(-1) == 1 else a.contiguous()
    if within is not None:
        # Rows that gather keys of their own read them a hidden unit at a time.
        b, within = b.mT.contiguous().mT, within.to(torch.int32).contiguous()
    elif b.stride(-1) != 1:
        b = b.contiguous()
    w = None if w is None else w.reshape(-1, hidden).contiguous()
    w0 = None if w0 is None else w0.reshape(-1)
    tau = temperature.reshape(-1) if isinstance(temperature, Tensor) and noise is not None else None
    runs = 0 if within is None else within.shape[-1]
    rows, slots, lanes, kept = shape_of(runs * span or nk, places - own, gathered=runs > 0)
    blocks = -(-nq // rows)
    arguments = {
        "a": a,
        "b": b,
        "w": w,
        "shift": w0,
        "tau": tau,
        "seed": noise,
        "valid": None if valid_keys is None else valid_keys.contiguous().view(torch.uint8),
        "within": within,
        "indices": indices,
        "scores": scores,
        "number_rate": 1.0 if isinstance(temperature, Tensor) else 1.0 / temperature,
        "groups": groups,
        "nq": nq,
        "nk": nk,
        "blocks": blocks,
        "offset": offset,
        "width": places,
        "runs": runs,
        **strides_of("a", a, "bgn"),
        **strides_of("b", b, "bgn"),
        "sb_h": b.stride(-1),
        **strides_of("w", w, "g"),
        **strides_of("shift", w0, "g"),
        **strides_of("tau", tau, "g"),
        "H": hidden,
        "BLOCK": block,
        "KEPT": kept,
        "ROWS": rows,
        "SLOTS": slots,
        "LANES": lanes,
        "CAUSAL": is_causal,
        "OWN": own,
        "SINK": sink,
        "SPAN": span,
    }
    programs = blocks * batch * groups
    return Launch(triton_topk.topk_rows, programs, arguments, {"num_warps": 4, "num_stages": 1})


def shape_of(nk: int, others: int, gathered: bool = False) -> tuple[int, int, int, int]:
    """(rows of a program, slots, lanes, kept) for ``others`` places besides the own tile's.

    A step scores slots·lanes key tiles. More slots make sorting rarer, more rows make loads rarer, and both
    take registers: docs/notes/select-tuning.md.
    """
    kept = max(2, 1 << (others - 1).bit_length()) if others else 0
    if kept > _LANES:
        return 8, 256 // kept, kept, kept
    slots = 4 if gathered else 8
    return 16, slots if nk > 2 * _LANES else 2, _LANES, kept


def _check_runs(a: Tensor, span: object, within: Tensor | None) -> None:
    if type(span) is not int or span < 1:
        fix = "It counts the tiles of a run."
        raise ArgumentError(explain("span", expected="an integer ≥ 1", got=repr(span), fix=fix))
    if within is None:
        return
    shape = (*a.shape[:3], within.shape[-1] if within.dim() else 0)
    integers = within.dtype in (torch.int32, torch.int64)
    if not integers or tuple(within.shape) != shape or not within.numel() or within.device != a.device:
        raise ArgumentError(
            explain(
                "within",
                expected=f"int32 {[*shape[:3], 'S']} on {a.device}",
                got=f"{within.dtype} {list(within.shape)} on {within.device}",
                fix="The runs of the first level, for each row.",
            )
        )


def _check(
    a: Tensor,
    b: Tensor,
    w: Tensor | None,
    k: object,
    w0: Tensor | None,
    block: object,
    temperature: object,
    noise: Tensor | None,
    valid_keys: Tensor | None,
) -> None:
    def refuse(what: str, expected: object, got: object, fix: str) -> None:
        raise ArgumentError(explain(what, expected=expected, got=got, fix=fix))

    if a.dim() != 4 or b.dim() != 4 or a.shape[:2] != b.shape[:2] or a.shape[3] != b.shape[3]:
        got = f"{list(a.shape)} and {list(b.shape)}"
        refuse("a and b", "[B, G, nq, h] and [B, G, nk, h]", got, "Pass both halves of a scorer's features.")
    if min(*a.shape, b.shape[2]) < 1:
        refuse("a and b", "no empty dimension", f"{list(a.shape)}, nk = {b.shape[2]}", "Skip empty calls.")
    groups, hidden = a.shape[1], a.shape[3]
    shapes = ((hidden,), (1, hidden), (groups, hidden))
    if w is not None and (tuple(w.shape) not in shapes or not w.dtype.is_floating_point):
        expected = f"None, or [{hidden}], [1, {hidden}] or [{groups}, {hidden}] of a floating dtype"
        refuse("w", expected, f"{list(w.shape)} of {w.dtype}", "Pass ImportanceScorer.output_weight.")
    if w0 is not None and (w0.numel() not in (1, groups) or not w0.dtype.is_floating_point):
        refuse(
            "w0", f"1 or {groups} floating values", f"{list(w0.shape)} of {w0.dtype}", "It is the bias b₂."
        )
    for name, value in (("k", k), ("block", block)):
        if type(value) is not int or value < 1:
            refuse(name, "an integer ≥ 1", repr(value), "It counts tiles of a row, or tokens of a tile.")
    if isinstance(temperature, Tensor):
        if temperature.numel() not in (1, groups) or not temperature.dtype.is_floating_point:
            got = f"{list(temperature.shape)} of {temperature.dtype}"
            refuse("temperature", f"1 or {groups} floating values", got, "One τ, or one a group.")
    elif not isinstance(temperature, int | float) or not 0.0 < temperature < float("inf"):
        refuse(
            "temperature", "a finite number > 0, or a tensor", repr(temperature), "1.0 is the usual start."
        )
    if noise is not None and (noise.dtype != torch.int64 or noise.numel() != 1):
        got = f"{list(noise.shape)} of {noise.dtype}"
        refuse("noise", "an int64 seed [1]", got, "kernels.dropout.draw_seed makes one.")
    expected_valid = (b.shape[0], b.shape[2])
    if valid_keys is not None and (
        valid_keys.dtype != torch.bool or tuple(valid_keys.shape) != expected_valid
    ):
        got = f"{list(valid_keys.shape)} of {valid_keys.dtype}"
        refuse("valid_keys", f"bool {list(expected_valid)}", got, "valid_tiles(padding, block) makes it.")
    for name, tensor in (("b", b), ("w", w), ("w0", w0), ("temperature", temperature), ("noise", noise)):
        if isinstance(tensor, Tensor) and tensor.device != a.device:
            refuse(name, f"on {a.device}, where a is", f"on {tensor.device}", "Move it there.")
    if valid_keys is not None and valid_keys.device != a.device:
        refuse("valid_keys", f"on {a.device}, where a is", f"on {valid_keys.device}", "Move it there.")
