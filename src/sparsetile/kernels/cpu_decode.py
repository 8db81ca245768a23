"""Decoding on the CPU: gather the kept tiles of many rows at a time, one batched product, softmax, another.

The queries of a sequence that stand in one row of the layout, and all query heads that share a key head,
are rows of one product, so that a key is gathered once. Rows of about equal length are computed side by side,
long ones in steps, with the running softmax of ``cpu.py``: the workspace is bounded whatever the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetile.kernels.decode_request import DecodeRequest
from sparsetile.patterns.tiles import unpack

_ELEMENTS = 1 << 20  # gathered key elements at a time: 4 MiB in fp32


def why_not(q: Tensor, request: DecodeRequest) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if not q.is_cpu:
        return f"it computes on the CPU and the tensors are on {q.device.type!r}."
    return None


def decode(q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, D]`` in q's dtype and natural LSE ``[B, H, Nq]``."""
    with torch.autocast("cpu", enabled=False):  # it would round the operands of products
        return _decode(q, k, v, request)


def _decode(q: Tensor, k: Tensor, v: Tensor, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, width = q.shape
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(batch, heads, q_len, width)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=precise)
    rows = _Rows.of(k.shape[1] if request.layout.heads == 1 else heads, request, batch)
    units = rows.units
    queries = q.to(precise).reshape(batch, units, heads // units, q_len, width)
    # Views: what is stored there appears in the results.
    out_units, lse_units = (x.view(batch, units, heads // units, *x.shape[2:]) for x in (out, lse))
    caches = _Cache(k, request), _Cache(v, request)
    a_tile = caches[0].span * width
    done = 0
    while done < len(rows.batch):
        longest = int(rows.count[done])
        tiles = min(longest, max(1, _ELEMENTS // a_tile))
        part = rows.pick(slice(done, done + max(1, _ELEMENTS // (tiles * a_tile))))
        done += len(part.batch)
        result, result_lse = _attend(queries[part.batch, part.unit], *caches, part, tiles, request)
        # A query belongs to one of its sequence's rows alone.
        n, i = part.mine.nonzero(as_tuple=True)
        b, u = part.batch[n], part.unit[n]
        out_units[b, u, :, i] = result[n, :, i].to(q.dtype)
        lse_units[b, u, :, i] = result_lse[n, :, i]
    return out, lse


def _attend(
    queries: Tensor, keys: _Cache, values: _Cache, rows: _Rows, tiles: int, request: DecodeRequest
) -> tuple[Tensor, Tensor]:
    """Output ``[n, group, Nq, D]`` and LSE ``[n, group, Nq]`` of queries ``[n, group, Nq, D]``."""
    stacked = queries.flatten(1, 2) * request.scale
    out = top = total = None
    for start in range(0, int(rows.count.max()), tiles):
        place, allowed = _step(rows, start, start + tiles, keys.span, request)
        scores = (stacked @ keys.gather(rows, place).to(queries.dtype).transpose(1, 2)).view(
            *queries.shape[:3], -1
        )
        scores = scores.masked_fill_(~allowed[:, None], -math.inf).flatten(1, 2)
        step_top = scores.amax(-1, keepdim=True)
        new_top = step_top if top is None else torch.maximum(top, step_top)
        shift = new_top.masked_fill(new_top == -math.inf, 0)
        weights = scores.sub_(shift).exp_()
        # What no query of the row may attend is not there, NaN included.
        seen = values.gather(rows, place).to(queries.dtype).masked_fill_(~allowed.any(1)[..., None], 0)
        step_total = weights.sum(-1, keepdim=True)
        if out is None or top is None or total is None:
            out, total = weights @ seen, step_total
        else:
            fade = torch.exp(top - shift)
            out = out.mul_(fade).baddbmm_(weights, seen)
            total = total * fade + step_total
        top = new_top
    assert out is not None and top is not None and total is not None
    out.div_(total.masked_fill(total == 0, 1))
    shape = queries.shape[:3]
    return out.view(queries.shape), (top + total.log()).view(shape)


def _step(rows: _Rows, start: int, stop: int, span: int, request: DecodeRequest) -> tuple[Tensor, Tensor]:
    """Of tiles ``start … stop`` of each row, the slots from which they are read ``[n, tiles]``, and which of
    those keys each query may attend, bool ``[n, Nq, tiles·span]``."""
    layout, q_len = request.layout, request.q_len
    number = torch.arange(start, min(stop, int(rows.count.max())))
    inside = number < rows.count[:, None]
    edges = (rows.first[:, None] + number).clamp(max=layout.capacity - 1)
    begin = rows.start[:, None] + layout.indices[edges].long() * layout.block_k
    # A tile that hangs over an end of the cache is read from within.
    place = begin.clamp(0, request.capacity - span)
    slots = place[..., None] + torch.arange(span)
    cell = slots - begin[..., None]
    there = inside[..., None] & (cell >= 0) & (cell < layout.block_k) & (slots < rows.end[:, None, None])
    if request.key_padding_mask is not None:
        there &= ~request.key_padding_mask[rows.batch[:, None, None], slots]
    allowed = there[:, None] & rows.mine[:, :, None, None]
    ids = layout.mask_ids[edges].long()
    n, tile = (inside & (ids >= 0)).nonzero(as_tuple=True)
    if len(n):
        words = layout.masks[ids[n, tile][:, None], rows.in_row[n]]
        bits = unpack(words, layout.block_k)
        chosen = cell[n, tile].clamp(0, layout.block_k - 1)[:, None].expand(-1, q_len, -1)
        allowed[n, :, tile] &= bits.gather(2, chosen)
    return place, allowed.flatten(2)


@dataclass(frozen=True)
class _Rows:
    """Rows of the layout that queries stand in, with tiles, those with most tiles first; all ``[n]`` int64.

    Attributes:
        units: heads that have rows of their own.
        batch, unit: whose row it is.
        first, count: its tiles in ``layout.indices``.
        start, end: the slots of position 0 and after the last key.
        mine: bool ``[n, Nq]``: the queries that stand in it.
        in_row: ``[n, Nq]``: where in it.
    """

    units: int
    batch: Tensor
    unit: Tensor
    first: Tensor
    count: Tensor
    start: Tensor
    end: Tensor
    mine: Tensor
    in_row: Tensor

    @staticmethod
    def of(units: int, request: DecodeRequest, batch: int) -> _Rows:
        layout, position = request.layout, request.positions(batch)
        block = torch.div(position, layout.block_q, rounding_mode="floor")
        reached = block.clamp(min=0)
        # The few queries of a sequence stand in one row, or in two.
        second = (reached[:, 0] != reached[:, -1]).nonzero().flatten()
        b = torch.cat((torch.arange(batch), second))
        own = torch.cat((reached[:, 0], reached[second, -1]))
        unit = torch.arange(units).repeat(len(b))
        b, own = b.repeat_interleave(units), own.repeat_interleave(units)
        row = own + (unit * layout.q_blocks if layout.heads > 1 else 0)
        first = layout.indptr[row].long()
        count = (layout.indptr[row + 1].long() - first).masked_fill(position[b, -1] < 0, 0)
        mine = block[b] == own[:, None]
        rows = _Rows(
            units,
            b,
            unit,
            first,
            count,
            request.starts_of(b),
            request.ends(batch)[b],
            mine,
            position[b].remainder(layout.block_q),
        )
        order = torch.sort(count, descending=True, stable=True).indices
        return rows.pick(order[: int((count > 0).sum())])

    def pick(self, at: Tensor | slice) -> _Rows:
        each = (self.batch, self.unit, self.first, self.count, self.start, self.end, self.mine, self.in_row)
        return _Rows(self.units, *(x[at] for x in each))


class _Cache:
    """Runs of ``span`` slots of a cache of any strides, gathered without a copy of the whole.

    A view with the greatest common divisor of all offsets as its first stride reaches every run by one index,
    as in ``cpu_tiles.Tiles``.
    """

    def __init__(self, cache: Tensor, request: DecodeRequest) -> None:
        self.request = request
        self.heads = cache.shape[1]
        self.span = min(request.layout.block_k, cache.shape[2])
        sizes = (*cache.shape[:2], cache.shape[2] - self.span + 1)
        self.steps = cache.stride()[:3]
        unit = math.gcd(*(s for s, n in zip(self.steps, sizes, strict=True) if n > 1)) or 1
        last = sum(s * (n - 1) for s, n in zip(self.steps, sizes, strict=True))
        self.unit = unit
        strides = (unit, *cache.stride()[2:])
        self.runs = cache.as_strided((last // unit + 1, self.span, cache.shape[3]), strides)

    def gather(self, rows: _Rows, place: Tensor) -> Tensor:
        """``[n, tiles·span, D]``: the runs from slots ``place`` ``[n, tiles]`` on."""
        step_b, step_h, step_n = self.steps
        table, size = self.request.page_table, self.request.page_size
        outer = rows.batch[:, None]
        if table is not None:
            # Only of slots that are filled does the table say anything.
            page = table[outer, torch.div(place, size, rounding_mode="floor")].long()
            outer, place = torch.where(place < rows.end[:, None], page, 0), place.remainder(size)
        head = torch.div(rows.unit * self.heads, rows.units, rounding_mode="floor")[:, None]
        offset = outer * step_b + head * step_h + place * step_n
        index = torch.div(offset, self.unit, rounding_mode="floor")
        found = self.runs.index_select(0, index.flatten())
        return found.view(len(index), -1, found.shape[2])
