"""AdaptiveConfig: settings of the variant that learns its pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsetile.adaptive.scorer import FORMS
from sparsetile.adaptive.search import AUTO_ABOVE, SPAN
from sparsetile.adaptive.summaries import POOLINGS
from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.check import BLOCK_SIZES

SELECTIONS = ("top_k", "top_p")
QUERY_SUMMARIES = ("auto", "tile", "first")
DISTILLATIONS = ("none", "kept", "sampled")
SEARCHES = ("auto", "full", "two_level")
PLACES_PER_BUDGET = 4


@dataclass(frozen=True)
class AdaptiveConfig:
    """Settings of the adaptive variant.

    Attributes:
        base_sparsity: share of tiles left out, in [0, 1): 0.9 keeps 10 %. A row that may choose from T tiles
            (all, or when causal those up to its own) keeps ``max(1, ⌊(1 − base_sparsity)·T + ½⌋)``, its own
            among them. With ``selection="top_p"`` it is what :meth:`sparsity_loss` steers to.
        temperature: τ of the selection, > 0, at the start.
        learnable_temperature: whether training moves it (as its logarithm).
        hidden_dim: width of the scorer, > 0.
        form: ``"mlp"``, ``"bilinear"`` or ``"indexer"`` (then ``sub_heads`` must divide ``hidden_dim``); see
            :class:`ImportanceScorer`.
        sub_heads: of the form ``"indexer"``.
        pooling: of the tokens of a tile: ``"mean"``, ``"max_min"`` or ``"lse"``; see :func:`tile_summaries`.
        scorer_dropout: inside the scorer, in [0, 1), in training.
        share_heads: one scorer and one θ for all selection groups; False: each group has its own.
        per_query_head: one selection for each query head instead of each key-value group.
        block_size: edge of a tile in tokens: 16, 32, 64 or 128.
        selection: ``"top_k"``: a fixed number of tiles a row; ``"top_p"``: tiles until their predicted mass
            reaches ``p``, at least ``k_min`` and at most ``k_max``.
        p: in (0, 1].
        k_min, k_max: bounds of ``"top_p"``, in tiles; ``k_max=None``: four times what base_sparsity keeps of
            the row.
        sink: the first tile is always kept, too.
        exploration: Gumbel noise in the selection while training, so that tiles just below the cut are seen.
        min_temperature: where :meth:`anneal` ends; None: a tenth of ``temperature``.
        anneal_steps: steps until then; None: τ is not annealed.
        query_summary: what a query tile is judged by. ``"tile"``: all its queries. ``"first"``: its first
            query alone, so that no row is chosen for by a later one. ``"auto"``: ``"first"`` in causal calls,
            else ``"tile"``.
        self_attention: query i belongs to the position of key ``i + Nk − Nq``, so that where that key is
            padding the query takes no part in its tile's summary. False where queries are other tokens.
        distillation: what :meth:`distillation_loss` compares with: ``"none"``, ``"kept"``: the true mass of
            the tiles that were kept, ``"sampled"``: the dense mass of one query tile, drawn at each forward.
        coarse: add σ(g)·softmax_j(scale·q·k̄_j)·v̄_j over the pooled keys and values of all tiles that a query
            sees, with a learned gate g that starts where σ(g) = 0.05; see :func:`add_coarse`.
        search: ``"full"``: a row scores all its key tiles; ``"two_level"``: rows with more than 512 of them
            score runs of 16 first, then the tiles of the best max(32, 2·k) runs alone, see
            ``adaptive/search.py``. ``"auto"``: ``"two_level"`` where a row keeps few enough tiles for that to
            pay: ``"top_k"`` with more than 8192 key tiles (1M tokens in tiles of 128) and a density below
            1/32; else ``"full"``. :meth:`search_for` tells which.

    Raises:
        ArgumentError: a value is not as above.
    """

    base_sparsity: float = 0.9
    temperature: float = 1.0
    learnable_temperature: bool = False
    hidden_dim: int = 32
    form: Literal["mlp", "bilinear", "indexer"] = "mlp"
    sub_heads: int = 4
    pooling: Literal["mean", "max_min", "lse"] = "mean"
    scorer_dropout: float = 0.0
    share_heads: bool = True
    per_query_head: bool = False
    block_size: int = 128
    selection: Literal["top_k", "top_p"] = "top_k"
    p: float = 0.9
    k_min: int = 1
    k_max: int | None = None
    sink: bool = False
    exploration: bool = True
    min_temperature: float | None = None
    anneal_steps: int | None = None
    query_summary: Literal["auto", "tile", "first"] = "auto"
    self_attention: bool = True
    distillation: Literal["none", "kept", "sampled"] = "none"
    coarse: bool = False
    search: Literal["auto", "full", "two_level"] = "auto"

    def __post_init__(self) -> None:
        self._demand(
            "base_sparsity",
            _number(self.base_sparsity) and 0.0 <= self.base_sparsity < 1.0,
            "a share of tiles in [0, 1)",
            "0.9 keeps one tile in ten.",
        )
        self._demand(
            "temperature",
            _number(self.temperature) and self.temperature > 0.0,
            "a number > 0",
            "1.0 is the usual start.",
        )
        self._demand(
            "scorer_dropout",
            _number(self.scorer_dropout) and 0.0 <= self.scorer_dropout < 1.0,
            "0 ≤ p < 1",
            "Pass the share of hidden units to drop.",
        )
        self._demand(
            "p", _number(self.p) and 0.0 < self.p <= 1.0, "a share of mass in (0, 1]", "0.9 is usual."
        )
        for name in (
            "learnable_temperature",
            "share_heads",
            "per_query_head",
            "sink",
            "exploration",
            "self_attention",
            "coarse",
        ):
            self._demand(name, isinstance(getattr(self, name), bool), "True or False", "Pass a bool.")
        self._demand("hidden_dim", _count(self.hidden_dim), "an integer ≥ 1", "32 is usual.")
        self._demand(
            "sub_heads",
            _count(self.sub_heads) and (self.form != "indexer" or self.hidden_dim % self.sub_heads == 0),
            f"a divisor of hidden_dim = {self.hidden_dim}",
            "Change one of the two.",
        )
        self._demand(
            "block_size",
            _count(self.block_size) and self.block_size in BLOCK_SIZES,
            f"one of {', '.join(map(str, BLOCK_SIZES))}",
            "128 is the fastest on a GPU.",
        )
        for name, known in (
            ("form", FORMS),
            ("pooling", POOLINGS),
            ("selection", SELECTIONS),
            ("query_summary", QUERY_SUMMARIES),
            ("distillation", DISTILLATIONS),
            ("search", SEARCHES),
        ):
            value = getattr(self, name)
            fits = isinstance(value, str) and value in known
            self._demand(name, fits, f"one of {', '.join(map(repr, known))}", "See AdaptiveConfig.")
        self._demand(
            "search",
            self.search != "two_level" or self.selection == "top_k",
            "'auto' or 'full' with selection='top_p'",
            "Its predicted mass is that of all tiles, which two levels do not look at.",
        )
        self._demand("k_min", _count(self.k_min), "an integer ≥ 1", "A row always keeps its own tile.")
        if self.k_max is not None:
            self._demand(
                "k_max",
                _count(self.k_max) and self.k_max >= self.k_min,
                f"None or an integer ≥ k_min = {self.k_min}",
                "Raise k_max or lower k_min.",
            )
        if self.anneal_steps is not None:
            self._demand("anneal_steps", _count(self.anneal_steps), "None or an integer ≥ 1", "Count steps.")
        if self.min_temperature is not None:
            self._demand(
                "min_temperature",
                _number(self.min_temperature) and 0.0 < self.min_temperature <= self.temperature,
                f"None or a number in (0, temperature = {self.temperature}]",
                "Annealing lowers the temperature.",
            )

    def _demand(self, name: str, fits: bool, expected: str, fix: str) -> None:
        if not fits:
            raise ArgumentError(explain(name, expected=expected, got=repr(getattr(self, name)), fix=fix))

    @property
    def density(self) -> float:
        """Share of tiles kept; ``1 − base_sparsity`` without the last bits that the subtraction adds."""
        return round(1.0 - self.base_sparsity, 12)

    @property
    def end_temperature(self) -> float:
        return 0.1 * self.temperature if self.min_temperature is None else self.min_temperature

    def tiles_for(self, count: int) -> int:
        """Tiles that a row with ``count`` to choose from keeps under ``"top_k"``."""
        return max(1, math.floor(self.density * count + 0.5))

    def places_for(self, count: int) -> int:
        """Most tiles that a row with ``count`` to choose from may keep."""
        if self.selection == "top_k":
            return self.tiles_for(count)
        if self.k_max is not None:
            return min(self.k_max, count)
        return min(max(PLACES_PER_BUDGET * self.tiles_for(count), self.k_min), count)

    def search_for(self, count: int) -> Literal["full", "two_level"]:
        """How a call with ``count`` key tiles looks for those that it keeps."""
        if self.search != "auto":
            return self.search
        # At 1/32 the 2·k runs of 16 are all there are.
        saves = self.selection == "top_k" and 2 * SPAN * self.density < 1.0
        return "two_level" if saves and count > AUTO_ABOVE else "full"

    def temperature_at(self, step: int) -> float:
        """τ of the annealing schedule, ``τ₀·(τ_min/τ₀)^min(step/anneal_steps, 1)``: a geometric descent.

        Raises:
            ArgumentError: a step below 0.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ArgumentError(
                explain("step", expected="an integer ≥ 0", got=repr(step), fix="Count training steps.")
            )
        if self.anneal_steps is None:
            return self.temperature
        done = min(step / self.anneal_steps, 1.0)
        return float(self.temperature * (self.end_temperature / self.temperature) ** done)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
