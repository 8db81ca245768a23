"""Random patterns and shapes for property tests, and the settings that those run under."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetile.patterns import (
    Budget,
    ByHead,
    Causal,
    Dilated,
    Documents,
    Full,
    Global,
    Local,
    LogStrided,
    Pattern,
    Random,
    Strided,
)
from sparsetile.patterns.budget import KINDS

HEADS = 3


def runs(examples: int) -> settings:
    """Fresh inputs in every run; a failure prints the line that replays it."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=False,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


class Case(NamedTuple):
    pattern: Pattern
    q_len: int
    k_len: int
    block_q: int
    block_k: int

    def dense(self, head: int = 0) -> Tensor:
        """The definition, asked about every pair: bool ``[q_len, k_len]``."""
        offset = self.k_len - self.q_len
        pattern = self.pattern.resolve(self.block_q, self.block_k, offset, self.k_len)
        q = torch.arange(self.q_len)[:, None] + offset
        return pattern.allows(q, torch.arange(self.k_len), head).expand(self.q_len, self.k_len)


def documents(k_len: int) -> st.SearchStrategy[Documents]:
    cuts = st.lists(st.integers(1, max(1, k_len - 1)), max_size=6, unique=True)

    def make(inner: list[int]) -> Documents:
        borders = [0, *sorted(c for c in inner if c < k_len), k_len]
        return Documents([b - a for a, b in pairwise(borders)])

    return cuts.map(make)


@st.composite
def budget(draw: st.DrawFn) -> Budget:
    """A budget of any kind; its tiles are square."""
    kind = draw(st.sampled_from(KINDS))
    density = draw(st.sampled_from([0.001, 0.05, 0.2, 1 / 3, 0.5, 0.9, 1.0]) | st.floats(0.001, 1))
    causal = draw(st.booleans())
    if kind == "dilated_sparse":
        lengths = draw(st.lists(st.integers(1, 900), min_size=1, max_size=3))
        rates = [draw(st.integers(1, min(6, length))) for length in lengths]
        return Budget(kind, density, causal, None, tuple(lengths), tuple(rates))
    sinks = draw(st.none() | st.integers(0, 300)) if kind in ("global_local", "ultra_sparse") else None
    return Budget(kind, density, causal, sinks)


@st.composite
def simple(draw: st.DrawFn, k_len: int, block: int | None) -> Pattern:
    """One pattern without composition; ``block`` is the size of square tiles, None if they are not square."""
    kind = draw(st.integers(0, 9 if block else 8))
    unit = draw(st.sampled_from(["token", 1, 3, 16, 50, *(["block"] if block else [])]))
    tokens = {"token": 1, "block": block}.get(unit, unit)
    small = st.integers(0, 200)
    if kind == 0:
        if draw(st.booleans()):
            return Local(draw(small), draw(st.none() | small))
        few = st.integers(0, 5)
        return Local(draw(few), draw(st.none() | few), unit)
    if kind == 1:
        return Causal()
    if kind == 2:
        rows = draw(st.booleans())
        return Global(draw(st.integers(1, 150)), rows, not rows or draw(st.booleans()))
    if kind == 3:
        return draw(documents(k_len))
    if kind == 4:
        return Full()
    if kind == 5:
        return Strided(tokens * draw(st.integers(1, 9)), unit, tokens * draw(st.integers(-2, 3)))
    if kind == 6:
        return LogStrided(draw(st.integers(2, 4)), unit)
    if kind == 7:
        return Dilated(draw(st.integers(1, 400)), draw(st.integers(1, 6)), unit)
    if kind == 9:
        return draw(budget())
    density = draw(st.sampled_from([0.03, 0.11, 0.3, 1 / 3, 0.77, 1.0]))
    return Random(density, draw(st.integers(-(2**40), 2**40)), unit, draw(st.booleans()))


def pattern(k_len: int, block: int | None, heads: int = HEADS) -> st.SearchStrategy[Pattern]:
    """Patterns for so many query heads, and their unions, intersections and roundings."""

    def compose(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: p[0] | p[1]),
            pairs.map(lambda p: p[0] & p[1]),
            pairs.map(lambda p: p[0] & p[1]),
            inner.map(lambda p: p.block_aligned()),
            st.tuples(*[inner] * heads).map(ByHead),
        )

    return st.recursive(simple(k_len, block), compose, max_leaves=4)


@st.composite
def case(draw: st.DrawFn, longest: int = 700) -> Case:
    block_q = draw(st.sampled_from([16, 32, 64, 128]))
    block_k = draw(st.sampled_from([block_q, block_q, 16, 32, 64, 128]))
    length = st.integers(1, longest) | st.sampled_from([1, block_k - 1, block_k, block_k + 1, 3 * block_k])
    k_len = draw(length)
    q_len = draw(st.just(k_len) | length)
    square = block_q if block_q == block_k else None
    return Case(draw(pattern(k_len, square)), q_len, k_len, block_q, block_k)
