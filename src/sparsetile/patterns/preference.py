"""The orders of preference of a ``Budget``: which tiles a row keeps when it may keep so many.

Everything is counted in tiles and vectorised over rows: a row is its own tile, the ``end`` of the tiles that
it may choose from (``0 … end − 1``) and how many of them it keeps. Each order answers twice, as ranges of
tiles (from which layouts are made) and as a test of one tile (which is the definition), without either
asking about every tile of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.patterns.parameters import floor
from sparsetile.patterns.tiles import UNBOUNDED, Span

LEAST_REACH = 4
"""Tiles that a row of ``ultra_sparse`` keeps at the least: its own, tile 0, one beside it, a far one."""

_ENTRIES_AT_A_TIME = 1 << 20
_GOLDEN = 0x9E3779B1  # 2³² · 0.618…, rounded to odd


class Rows(NamedTuple):
    """``[rows]`` each: own tile, tiles to choose from, tiles to keep (1 … end)."""

    own: Tensor
    end: Tensor
    keep: Tensor

    def part(self, start: int, size: int) -> Rows:
        return Rows(*(x[start : start + size] for x in self))


@dataclass(frozen=True, eq=False)
class Kept:
    """What rows keep: their own tile, tiles ``0 … first − 1``, tiles ``lo … hi − 1``."""

    own: Tensor
    first: Tensor
    lo: Tensor
    hi: Tensor

    def holds(self, tile: Tensor) -> Tensor:
        """Whether each row keeps ``tile``, which broadcasts with the rows."""
        near = (self.lo <= tile) & (tile < self.hi)
        return near | (tile == self.own) | ((tile >= 0) & (tile < self.first))

    def spans(self) -> Span:
        """``[rows, s]`` ranges of tiles; they may overlap."""
        zero = torch.zeros_like(self.own)
        return Span(
            torch.stack((self.own, zero, self.lo), 1),
            torch.stack((self.own + 1, self.first, self.hi), 1),
        )

    def pick(self, which: Tensor) -> Kept:
        """One row for each entry of ``which``, of any shape; only for :meth:`holds`."""
        flat, names = which.flatten(), [f.name for f in fields(self)]
        chosen = {name: x for name in names if isinstance(x := getattr(self, name), Tensor)}
        picked = {n: x.index_select(0, flat).reshape(which.shape + x.shape[1:]) for n, x in chosen.items()}
        return replace(self, **picked)


def window(own: Tensor, base: Tensor, end: Tensor, count: Tensor) -> Span:
    """The ``count`` tiles of ``base … end − 1`` nearest to ``own``, of two equally near the past one."""
    lo = torch.maximum(torch.minimum(own - floor(count, 2), end - count), base)
    return Span(lo, lo + count)


def nearness(own: Tensor, base: Tensor, end: Tensor, tile: Tensor) -> Tensor:
    """How many tiles of ``base … end − 1`` are preferred to ``tile`` (one of them) in :func:`window`."""
    away = (tile - own).abs()
    before = away + torch.minimum(away - 1, end - 1 - own)
    after = away + torch.minimum(away, (own - base).clamp(min=0)) - (base - own).clamp(min=0)
    return torch.where(tile < own, before, after)


def _skip(sorted_ranks: Tensor, wanted: Tensor) -> Tensor:
    """How many ranks are passed until ``wanted`` others have been: ranks ascend and differ, UNBOUNDED: none.

    The i-th rank has i ranks and (rank − i) others before it.
    """
    place = torch.arange(sorted_ranks.shape[1], device=wanted.device)
    return (sorted_ranks - place < wanted[:, None]).sum(1)


def local_window(rows: Rows) -> Kept:
    own, end, count = rows
    near = window(own, torch.zeros_like(own), end, count)
    return Kept(own, torch.zeros_like(own), *near)


def global_local(rows: Rows, sinks: int) -> Kept:
    own, end, count = rows
    base = end.clamp(max=sinks)
    # All that is left of a small budget beside the own tile goes to the first tiles.
    few = torch.where(own >= count - 1, count - 1, count)
    enough = count >= base + (own >= base).long()
    near = window(own, base, end, torch.where(enough, count - base, 0))
    return Kept(own, torch.where(enough, base, few), *near)


# -- ultra_sparse -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reaching(Kept):
    """Also tile ``beside``, and the first ``far`` tiles of a list of log-spaced ones.

    The list: the tiles at +2, +4, +8, … (``future`` of them) and those at −2, −4, … (``past``; tile 0, which
    is always kept, is not listed) take turns. Each of the two begins at an entry that changes from row to
    row, and goes round. Second in the list is the previous tile, if ``previous`` is 1.
    """

    beside: Tensor
    past: Tensor
    future: Tensor
    previous: Tensor
    far: Tensor

    def _past_place(self, step: Tensor) -> Tensor:
        """Place in the list of the tile at distance −2^step."""
        turn = (step - 1 - begin(self.own, self.past)).remainder(self.past.clamp(min=1))
        return self._after_previous(turn + torch.minimum(turn + 1, self.future))

    def _future_place(self, step: Tensor) -> Tensor:
        """Place in the list of the tile at distance +2^step."""
        turn = (step - 1 - begin(self.own, self.future)).remainder(self.future.clamp(min=1))
        return self._after_previous(turn + torch.minimum(turn, self.past))

    def _after_previous(self, place: Tensor) -> Tensor:
        return place + self.previous * (place > 0).long()

    @property
    def _previous_place(self) -> Tensor:
        return (self.past + self.future).clamp(max=1)

    @property
    def length(self) -> Tensor:
        """Tiles in the list."""
        return self.past + self.future + self.previous

    def holds(self, tile: Tensor) -> Tensor:
        away = tile - self.own
        table = powers(tile.device)
        step = torch.searchsorted(table, away.abs()).clamp_(max=table.numel() - 1)
        before = (away < 0) & (step <= self.past) & (self._past_place(step) < self.far)
        after = (away > 0) & (step <= self.future) & (self._future_place(step) < self.far)
        reached = (table[step] == away.abs()) & (step >= 1) & (before | after)
        previous = (away == -1) & (self.previous > 0) & (self._previous_place < self.far)
        return super().holds(tile) | reached | previous | ((tile == self.beside) & (tile >= 0))

    def spans(self) -> Span:
        lo, hi = super().spans()
        listed = self.listed()
        kept = (torch.arange(listed.shape[1], device=listed.device) < self.far[:, None]).long()
        beside = self.beside.clamp(min=0)[:, None]
        lo = torch.cat((lo, beside, listed), 1)
        return Span(lo, torch.cat((hi, beside + (self.beside >= 0).long()[:, None], listed + kept), 1))

    def listed(self) -> Tensor:
        """``[rows, s]``: the list of each row, −1 behind its end."""
        longest = int(self.length.max())
        steps = int(torch.maximum(self.past, self.future).max())
        rows = Reaching(**{f.name: getattr(self, f.name)[:, None] for f in fields(self)})
        step = torch.arange(1, steps + 1, device=self.own.device)
        there = torch.cat((step <= rows.past, step <= rows.future, rows.previous > 0), 1)
        place = torch.cat((rows._past_place(step), rows._future_place(step), rows._previous_place), 1)
        tiles = torch.cat((rows.own - (1 << step), rows.own + (1 << step), rows.own - 1), 1)
        out = torch.full((self.own.numel(), longest + 1), -1, device=self.own.device)
        return out.scatter_(1, torch.where(there, place, longest), tiles)[:, :longest]


def powers(device: torch.device) -> Tensor:
    return 1 << torch.arange(61, device=device)


def begin(own: Tensor, length: Tensor) -> Tensor:
    """Where in a list of ``length`` the row ``own`` begins: ``⌊length · frac(own · 0.618…)⌋``.

    Steps of the golden section spread any few neighbouring rows evenly over the list, so that from every row
    each distance is a few tiles away.
    """
    return (own * _GOLDEN & 0xFFFFFFFF) * length >> 32


def ultra_sparse(rows: Rows, sinks: int) -> Reaching:
    own, end, count = rows
    count = torch.maximum(count, end.clamp(max=LEAST_REACH))
    zero = torch.zeros_like(own)
    table = powers(own.device)[1:]
    past = torch.searchsorted(table, own - 1, right=True)
    future = torch.searchsorted(table, end - 1 - own, right=True)
    # Whatever is behind a row it reaches from tile 0 on, if every tile is read by the one before it.
    ahead = own + 1 < end
    beside = torch.where(ahead, own + 1, own - 1)
    previous = (ahead & (own > 1)).long()
    kept = Reaching(own, zero, zero, zero, beside, past, future, previous, zero)
    listed, length = kept.listed(), kept.length
    # The own tile, tile 0, the one beside and the first of the list; then the other sinks.
    head = torch.stack((own, beside, listed[:, 0] if listed.shape[1] else zero), 1)
    head = torch.where(head > 0, head, UNBOUNDED).sort(1).values
    left = count - 1 - (head < UNBOUNDED).sum(1)
    base = end.clamp(max=max(1, sinks))
    first = torch.minimum(1 + left + _skip(head - 1, left), base)
    left = count - first - ((head >= first[:, None]) & (head < UNBOUNDED)).sum(1)
    # Then the rest of the list, as far as it is not among the sinks.
    fresh = listed >= base[:, None]
    fresh[:, :1] = False
    turns = fresh.long().cumsum(1)
    place = torch.arange(listed.shape[1], device=own.device)
    far = ((turns <= left[:, None]) & (place < length[:, None])).sum(1)
    far = torch.where(left > 0, far, length.clamp(max=1))
    # Then the nearest of what remains.
    left = (left - fresh.sum(1)).clamp(min=0)
    known = torch.cat((own[:, None], beside[:, None], listed), 1)
    ranks = nearness(own[:, None], base[:, None], end[:, None], known)
    ranks = torch.where(known >= base[:, None], ranks, UNBOUNDED).sort(1).values
    near = window(own, base, end, torch.where(left > 0, left + _skip(ranks, left), 0))
    return replace(kept, first=first, lo=near.lo, hi=near.hi, far=far)


# -- dilated_sparse -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Branching(Kept):
    """Also the tiles whose :func:`turn` comes before ``limit``; ``tiles`` lists them, −1 for none.

    ``past`` and ``future`` are ``[rows, branches]``: see :func:`extent`.
    """

    past: Tensor
    future: Tensor
    limit: Tensor
    tiles: Tensor
    branches: tuple[tuple[int, int], ...]

    def holds(self, tile: Tensor) -> Tensor:
        out = super().holds(tile)
        away, extents = tile - self.own, zip(self.past.unbind(-1), self.future.unbind(-1), strict=True)
        for number, (past, future) in enumerate(extents):
            named = turn(away, past, future, self.branches[number], number, len(self.branches))
            out = out | (named < self.limit)
        return out

    def spans(self) -> Span:
        lo, hi = super().spans()
        return Span(torch.cat((lo, self.tiles), 1), torch.cat((hi, self.tiles + (self.tiles >= 0).long()), 1))

    def pick(self, which: Tensor) -> Kept:
        return Kept.pick(replace(self, tiles=self.tiles[:, :0]), which)


def extent(own: Tensor, end: Tensor, block: int, branch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How many tiles of a branch lie before and after the own tile.

    A branch ``(segment, rate)`` has the tiles at multiples of ``rate`` tiles from the own one that overlap a
    segment which the own tile overlaps.
    """
    segment, rate = branch
    lo = floor(own * block, segment) * segment
    hi = (floor(own * block + (block - 1), segment) + 1) * segment
    hi = torch.minimum(floor(hi + (block - 1), block), end)
    return floor(own - floor(lo, block), rate), floor(hi - 1 - own, rate)


def turn(
    away: Tensor, past: Tensor, future: Tensor, branch: tuple[int, int], number: int, branches: int
) -> Tensor:
    """When a branch names the tile at distance ``away``, if all branches name tiles by turns, nearest first.

    UNBOUNDED where it never does.
    """
    rate = branch[1]
    step = floor(away.abs(), rate)
    rank = step - 1 + torch.where(away < 0, torch.minimum(step - 1, future), torch.minimum(step, past))
    named = (away.abs() == step * rate) & (step > 0) & (step <= torch.where(away < 0, past, future))
    return torch.where(named, rank * branches + number, UNBOUNDED)


def dilated_sparse(rows: Rows, block: int, branches: tuple[tuple[int, int], ...]) -> Branching:
    own, end, count = rows
    many = len(branches)
    extents = [extent(own, end, block, branch) for branch in branches]
    longest = max(int((past + future).max()) for past, future in extents)
    turns = min(longest, int(count.max()) - 1)
    zero = torch.zeros_like(own)
    past, future = (torch.stack(x, 1) for x in zip(*extents, strict=True))
    kept = Branching(own, zero, own, own + 1, past, future, zero, zero[:, None][:, :0], branches)
    if turns == 0:
        return kept
    rank = torch.arange(turns, device=own.device)
    away, first = [], []
    for number, (past, future) in enumerate(extents):
        past, future = past[:, None], future[:, None]
        both = torch.minimum(past, future)
        paired = rank < 2 * both
        step = torch.where(paired, floor(rank, 2) + 1, rank - both + 1)
        back = torch.where(paired, rank % 2 == 0, past > future)
        far = torch.where(back, -step, step) * branches[number][1]
        fresh = rank < past + future
        # A tile that another branch has named before is kept already; naming it again costs nothing.
        for other, (its_past, its_future) in enumerate(extents):
            if other != number:
                named = turn(far, its_past[:, None], its_future[:, None], branches[other], other, many)
                fresh = fresh & (named > rank * many + number)
        away.append(far)
        first.append(fresh)
    fresh = torch.stack(first, 2).flatten(1)
    place = fresh.long().cumsum(1)
    fresh = fresh & (place < count[:, None])
    limit = (fresh * torch.arange(1, turns * many + 1, device=own.device)).amax(1)
    widest = int(fresh.sum(1).max())
    tiles = torch.full((own.numel(), widest + 1), -1, device=own.device)
    tiles.scatter_(1, torch.where(fresh, place - 1, widest), torch.stack(away, 2).flatten(1) + own[:, None])
    return replace(kept, limit=limit, tiles=tiles[:, :widest])


def in_parts(order: Callable[[Rows], Kept], rows: Rows, entries: int) -> Kept:
    """``order(rows)``, a bounded number of rows at a time; ``entries`` is the work in numbers for a row."""
    size = max(1, _ENTRIES_AT_A_TIME // max(1, entries))
    total = rows.own.numel()
    parts = [order(rows.part(start, size)) for start in range(0, total, size)]
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor:
        pieces = [getattr(part, name) for part in parts]
        if pieces[0].dim() == 2:
            widest = max(x.shape[1] for x in pieces)
            # Lists of different lengths: −1 is no tile.
            pieces = [torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=-1) for x in pieces]
        return torch.cat(pieces)

    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), Tensor)]
    return replace(parts[0], **{name: joined(name) for name in names})
