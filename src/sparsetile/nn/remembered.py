"""Remembering: what a learned choice left behind: its tiles, how many they were, and its losses."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from sparsetile.adaptive.places import Places
from sparsetile.errors import ArgumentError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.scored import Scored


class Last(NamedTuple):
    """What a forward left.

    Attributes:
        chosen: int64 ``[B, G, q_blocks, k]``, key tiles of each row, −1: unused.
        geometry: the rest of what ``Places.of`` takes.
        density: see :attr:`Remembering.last_density`.
        distillation, sparsity: losses of a forward in training.
    """

    chosen: Tensor
    geometry: tuple[int, int, int, int, bool]
    density: Tensor
    distillation: Tensor | None
    sparsity: Tensor | None


class Remembering(Scored):
    """Views of the last forward. Copies and pickles start without: it may hold a graph."""

    _last: Last | None = None

    def distillation_loss(self) -> Tensor:
        """How far the scorer is from the attention's true mass, of the last forward in training::

            mean over rows of KL(m / Σm ‖ softmax(s/τ)),   m_e = Σ of the weights of tile e

        over the scored tiles of a row: those that were kept (``distillation="kept"``: m_e = ∂ Σ lse / ∂β_e,
        a backward pass of the kernels from the saved log-sum-exp), or all, under dense attention, in one row
        of tiles that each forward draws (``"sampled"``, for warm-up). Its gradient reaches the scorer alone:
        not q, k, v, θ or τ.

        Raises:
            ArgumentError: no such forward, or ``distillation="none"``.
        """
        if self.config.distillation == "none":
            _refuse_loss("distillation_loss()", "AdaptiveConfig(distillation='kept' or 'sampled')", "'none'")
        if self._last is None or self._last.distillation is None:
            _refuse_loss("distillation_loss()", "a forward in training before, with gradients", "none")
        return self._last.distillation

    def sparsity_loss(self) -> Tensor:
        """How far the last forward in training was from the density asked for, for ``selection="top_p"``::

            (d + u − stop_gradient(u) − (1 − base_sparsity))²,    u = −mean_i log std_j(s_ij / τ)

        d is the density that was used (:attr:`last_density`): the value is how far that is from what was
        asked for. A count has no gradient, so it takes that of u, the flatness of the scores that a row may
        choose from: flatter scores spread the predicted mass over more tiles. On log τ it is
        2·(d − (1 − base_sparsity)), however peaked or flat the scores have become. u is taken over a few rows
        of tiles that each forward draws. The gradient reaches the scorer, τ, q and k.

        Raises:
            ArgumentError: no such forward, or ``selection="top_k"``, whose density is fixed.
        """
        if self.config.selection != "top_p":
            _refuse_loss(
                "sparsity_loss()", "selection='top_p'", "'top_k', which keeps a fixed number of tiles"
            )
        if self._last is None or self._last.sparsity is None:
            _refuse_loss("sparsity_loss()", "a forward in training before, with gradients", "none")
        return self._last.sparsity

    @property
    def last_density(self) -> Tensor:
        """Tiles kept ÷ tiles to choose from (those of the causal triangle when causal, and none of ignored
        keys alone) in the last forward: a scalar on the device, so that nobody waits for it.

        Raises:
            ArgumentError: there was no forward.
        """
        return self._known().density

    @property
    def last_tiles(self) -> Tensor:
        """int64 ``[B, G, q_blocks]``: tiles that each row kept in the last forward."""
        return (self._known().chosen >= 0).sum(-1)

    @property
    def last_layout(self) -> BlockLayout:
        """The layout of the last forward."""
        last = self._known()
        return Places.of(last.chosen, *last.geometry).layout

    def _known(self) -> Last:
        if self._last is None:
            raise ArgumentError(
                explain("the last forward", expected="one", got="none", fix="Call the module first.")
            )
        return self._last

    def layout_for(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ArgumentError: no layout belongs to lengths alone; see :attr:`last_layout`."""
        self._refuse_view("layout_for", "last_layout")

    def density_for(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ArgumentError: tiles are chosen by the input; see :attr:`last_density`."""
        self._refuse_view("density_for", "last_density")

    def _refuse_view(self, name: str, instead: str) -> NoReturn:
        raise ArgumentError(
            explain(
                name,
                expected="a module with a fixed pattern",
                got=f"{type(self).__name__}, which learns it and chooses tiles for each input",
                fix=f"Call the module, and ask for its {instead}.",
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        # What the last forward left may hold its graph: copies and pickles start without.
        return self.__dict__ | {"_last": None}


def _refuse_loss(name: str, expected: str, got: str) -> NoReturn:
    raise ArgumentError(explain(name, expected=expected, got=got, fix="See its docstring."))
