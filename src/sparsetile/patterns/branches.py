"""Branches of dilated attention (Ding et al. 2023, arXiv:2307.02486): which tokens each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.parameters import LONGEST, floor
from sparsetile.patterns.tiles import Key, State, Tiles, combine


class Branch(NamedTuple):
    """Segments of ``length`` tokens, of which each head takes every ``rate``-th from its own offset on."""

    length: int
    rate: int
    offsets: tuple[int, ...]


def segments_of(lengths: Sequence[int], rates: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(segment_lengths, dilation_rates) as tuples: as many of each, positive, no rate above its length.

    Raises:
        PatternError: they are not.
    """

    def wrong(expected: str) -> PatternError:
        return PatternError(
            explain(
                "segment_lengths, dilation_rates",
                expected=expected,
                got=f"{lengths!r} and {rates!r}",
                fix="Each pair is a branch, e.g. segment_lengths=[2048, 8192], dilation_rates=[1, 4].",
            )
        )

    both = (lengths, rates)
    if any(isinstance(x, str) or not isinstance(x, Sequence) or len(x) == 0 for x in both):
        raise wrong("two lists that are not empty")
    if len(lengths) != len(rates):
        raise wrong("as many rates as lengths")
    if any(type(value) is not int or not 1 <= value <= LONGEST for x in both for value in x):
        raise wrong(f"integers from 1 to {LONGEST}")
    if any(rate > length for length, rate in zip(lengths, rates, strict=True)):
        raise wrong("no rate above the length of its segments")
    return tuple(lengths), tuple(rates)


@dataclass(frozen=True, eq=False)
class NotInBranches(Pattern):
    """Pairs of a branch's tokens that no earlier branch holds.

    Not public: arises in ``dilated_attention(overlap="once")`` alone. Positions are those of the branch's
    own sequence, where its tokens stand side by side: position ``x`` of head ``h`` is token
    ``(x // m)·segment_length + offsets[h] + (x mod m)·dilation_rate``, with ``m`` tokens a segment.

    ``offsets`` has one entry for each head, or one for all; ``earlier`` holds (segment length, dilation rate,
    offsets) of the other branches, with as many offsets.
    """

    segment_length: int
    dilation_rate: int
    offsets: tuple[int, ...]
    earlier: tuple[tuple[int, int, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        segments_of(
            (self.segment_length, *(length for length, _, _ in self.earlier)),
            (self.dilation_rate, *(rate for _, rate, _ in self.earlier)),
        )
        branches = (Branch(self.segment_length, self.dilation_rate, self.offsets), *self.earlier)
        for _, rate, offsets in branches:
            if len(offsets) != len(self.offsets) or not all(0 <= s < rate for s in offsets):
                raise PatternError(
                    explain(
                        "NotInBranches(offsets)",
                        expected=f"{len(self.offsets)} offsets below the dilation rate {rate}",
                        got=repr(offsets),
                        fix="Every branch has one offset for each head.",
                    )
                )

    @property
    def needs_heads(self) -> bool:
        return len(self.offsets) > 1

    def _of_head(self, offsets: tuple[int, ...], head: Tensor | int) -> Tensor | int:
        if len(offsets) == 1:
            return offsets[0]
        if isinstance(head, int):
            return offsets[head]
        return torch.tensor(offsets, device=head.device)[head]

    def _kept(self, head: Tensor | int) -> Tensor | int:
        """Tokens that a segment has."""
        start = self._of_head(self.offsets, head)
        return (self.segment_length - start + (self.dilation_rate - 1)) // self.dilation_rate

    def _token(self, position: Tensor, head: Tensor | int) -> Tensor:
        kept = self._kept(head)
        segment = position // kept
        within = position - segment * kept
        start = self._of_head(self.offsets, head)
        return segment * self.segment_length + start + within * self.dilation_rate

    def allows(self, q: Tensor, k: Tensor, head: Tensor | int = 0) -> Tensor:
        q, k = self._token(q, head), self._token(k, head)
        held = torch.zeros((), dtype=torch.bool, device=q.device)
        for length, rate, offsets in self.earlier:
            start = self._of_head(offsets, head)
            q_on, k_on = (x.remainder(length).remainder(rate) == start for x in (q, k))
            held = held | ((floor(q, length) == floor(k, length)) & q_on & k_on)
        return ~held

    def state(self, tiles: Tiles) -> State:
        some = torch.ones(len(tiles), dtype=torch.bool)
        full = some.clone()
        for branch in self.earlier:
            nothing, everything = self._held(Branch(*branch), tiles)
            full &= nothing
            some &= ~everything
        return State(some, full)

    def _held(self, branch: Branch, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Whether an earlier branch holds no pair of each tile, and whether it holds every pair."""
        head = tiles.head
        start, kept = self._of_head(branch.offsets, head), self._kept(head)
        ends, on, off = [], [], []
        for first, last in ((tiles.q0, tiles.q1), (tiles.k0, tiles.k1)):
            low, high = self._token(first, head), self._token(last, head)
            a, b = floor(low, branch.length), floor(high, branch.length)
            # Steps that are multiples of the branch's rate keep all tokens on its offset, or all off it.
            steady = torch.full_like(a, self.dilation_rate % branch.rate == 0, dtype=torch.bool)
            if self.segment_length % branch.rate:
                steady &= first // kept == last // kept
            if branch.length % branch.rate:
                steady &= a == b
            hit = low.remainder(branch.length).remainder(branch.rate) == start
            ends.append((a, b))
            on.append(steady & hit)
            off.append(steady & ~hit)
        (q_a, q_b), (k_a, k_b) = ends
        nothing = (q_b < k_a) | (k_b < q_a) | off[0] | off[1]
        everything = (q_a == q_b) & (k_a == k_b) & (q_a == k_a) & on[0] & on[1]
        return nothing, everything

    def signature(self, tiles: Tiles) -> Key:
        grid, head = tiles.grid, tiles.head
        q, k = self._token(tiles.q0, head), self._token(tiles.k0, head)
        keys = [Key(head, grid.heads)]
        if self.segment_length % self.dilation_rate:
            # Steps between segments are of another size; where such a step falls in the tile matters.
            kept, most = self._kept(head), self.segment_length
            for first, last in ((tiles.q0, tiles.q1), (tiles.k0, tiles.k1)):
                wraps = first // kept != last // kept
                keys.append(Key(torch.where(wraps, first % kept + 1, 0), most + 1))
        for branch in self.earlier:
            length = branch[0]
            apart = floor(q, length) - floor(k, length)
            least = int(apart.min()) if len(tiles) else 0
            most = int(apart.max()) if len(tiles) else 0
            part = combine(
                [
                    Key(q.remainder(length), length),
                    Key(k.remainder(length), length),
                    Key(apart - least, most - least + 1),
                ]
            )
            nothing, _ = self._held(Branch(*branch), tiles)
            keys.append(Key(torch.where(nothing, 0, part.values + 1), part.radix + 1))
        return combine(keys)
