"""Which entries of a gradient are sent, and what stays behind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ZERO, LIVE, BROKEN = 0, 1, 2  # a tensor's gradient on one rank: nothing in it, finite, holds NaN or Inf

_SAMPLE = 16384  # entries looked at to guess where the largest of a shard begin


def code_of(gradient: Tensor) -> Tensor:
    """0-dim int64: ``ZERO``, ``LIVE`` or ``BROKEN``. NaN is the least and the greatest of any tensor."""
    low, high = gradient.aminmax()
    finite = low.isfinite() & high.isfinite()
    return torch.where(finite, ((low != 0) | (high != 0)).long() * LIVE, BROKEN)


def release(rows: Tensor, kept: int, divisor: int, idle: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes the ``kept`` largest entries out of each row of residuals, in place.

    Args:
        rows: fp32 [S, length]; what is not sent stays in it, the rounding of what is sent included.
        divisor: entries are divided by it before they are rounded to bf16.
        idle: bool [S, length], entries that stay as they are.

    Returns:
        bf16 values [S, kept] and their places, int64.
    """
    source = rows if idle is None else rows.masked_fill(idle, 0.0)
    places = largest(source, kept)
    taken = source.gather(1, places)
    sent, stays = split(taken, divisor)
    if idle is not None:
        stays += rows.gather(1, places) - taken  # an idle entry, picked for want of others, sends a zero
    rows.scatter_(1, places, stays)
    return sent, places


def release_others(
    residual: Tensor, rank: int, kept: int, idle: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``release`` of all rows of ``residual`` [ranks, length] but this rank's: [ranks − 1, kept] of each."""
    picked = [
        release(residual[part], kept, 1, None if idle is None else idle[part])
        for part in (slice(rank), slice(rank + 1, None))
        if residual[part].numel()
    ]
    values, places = zip(*picked, strict=True)
    return torch.cat(values), torch.cat(places)


def split(values: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """What is sent of each value, and what stays: ``values = divisor · sent + stays``, to one fp32 rounding.

    Args:
        values: fp32.
        divisor: 1 for what a rank sends to an owner, the number of ranks for a mean.

    Returns:
        bf16 sent and fp32 stays. Where ``sent`` overflows to infinity, which every rank then sees, nothing
        stays.
    """
    sent = (values / divisor).bfloat16()
    stays = values - sent.float() * divisor
    return sent, torch.where(sent.isfinite(), stays, 0.0)


def largest(rows: Tensor, kept: int) -> Tensor:
    """Places of the ``kept`` entries of each row that are largest in magnitude.

    Args:
        rows: fp32 [S, length], finite.
        kept: 1 … length.

    Returns:
        int64 [S, kept], ascending. On the CPU the first of equal entries win. On other devices nothing is
        read back by the host, and equal entries are resolved as ``torch.topk`` does there.
    """
    if rows.device.type == "cpu":
        return torch.stack([_largest_on_host(row, kept) for row in rows])
    return rows.abs().topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def _largest_on_host(row: Tensor, kept: int) -> Tensor:
    """``largest`` of one row: exact selection among candidates above a bound that a sample suggests.

    ``torch.topk`` over everything costs several times as much on a CPU. The bound decides only the time:
    if too few entries exceed it, all entries are candidates.
    """
    length = row.numel()
    candidates: Tensor | None = None
    if length > 4 * _SAMPLE and 3 * kept < length:
        sample = row[:: length // _SAMPLE].abs()
        share = kept / length * sample.numel()
        rank = min(sample.numel(), math.ceil(share + 4 * math.sqrt(share) + 1))
        bound = sample.kthvalue(sample.numel() - rank + 1).values
        found = _above(row, bound, rare=32 * kept < length)
        if found.numel() >= kept:
            candidates = found
    magnitude = row.abs() if candidates is None else row[candidates].abs()
    edge = magnitude.kthvalue(magnitude.numel() - kept + 1).values
    above = magnitude > edge
    # Fewer than `kept` entries exceed the kept-th largest; those equal to it fill up, first ones first.
    equal = (magnitude == edge).nonzero().squeeze(1)[: kept - int(above.sum())]
    above[equal] = True
    chosen = above.nonzero().squeeze(1)
    return chosen if candidates is None else candidates[chosen]


def _above(row: Tensor, bound: Tensor, rare: bool) -> Tensor:
    """Places of entries larger in magnitude than ``bound``, ascending. If they are ``rare``, the extremes of
    sixteen entries at a time, which cost a pass at memory speed, tell first where there are none."""
    if not rare:
        return (row.abs() > bound).nonzero().squeeze(1)
    width = row.numel() // 16
    folded, rest = row[: 16 * width].view(16, width), row[16 * width :]
    columns = (torch.maximum(folded.amax(0), -folded.amin(0)) > bound).nonzero().squeeze(1)
    line, column = (folded.index_select(1, columns).abs() > bound).nonzero().unbind(1)
    tail = (rest.abs() > bound).nonzero().squeeze(1) + 16 * width
    return torch.cat([line * width + columns[column], tail])
