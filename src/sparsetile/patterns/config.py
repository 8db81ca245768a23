"""SparsePatternConfig: a pattern by name, at a density or at its natural size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.branches import segments_of
from sparsetile.patterns.budget import GLOBAL_TOKENS, Budget, check_density, check_kind
from sparsetile.patterns.fixed import Causal, Global, Local
from sparsetile.patterns.lattice import Dilated, LogStrided
from sparsetile.patterns.parameters import integer

_BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class SparsePatternConfig:
    """Which keys a module keeps, in the words of the system's description.

    Attributes:
        pattern_type: ``"local_window"``, ``"dilated_sparse"``, ``"global_local"``, ``"ultra_sparse"`` (see
            :class:`Budget` for their orders of preference, and for whom each is), or a :class:`Pattern`.
        sparsity_ratio: the density asked for, ``0 < ρ ≤ 1`` (0.01 is "99 % sparse"): each row of ``T`` tiles
            keeps ``max(1, ⌊ρ·T + ½⌋)`` of them, ``T`` counted in the causal triangle when causal. None: the
            type's natural pattern, below.
        block_size: tokens of a tile's side: 16, 32, 64 or 128.
        local_window_size: tokens of the window (the query's own included) without a ratio. A ratio sets
            the window itself.
        global_tokens: tokens at the beginning that every query sees, for ``global_local`` and
            ``ultra_sparse``; may be 0 (``ultra_sparse`` keeps one then).

    Without a ratio:
        * local_window: ``Local``, half of the window to each side; all of it to the past when causal.
        * global_local: the same, and ``Global(global_tokens, rows=False)``.
        * dilated_sparse: the union of ``Dilated(segment_lengths[i], dilation_rates[i])``.
        * ultra_sparse: ``LogStrided(2)`` in tiles (the own one, both neighbours, distances 2, 4, 8, …) and
          ``Global(global_tokens, rows=False)``.

    Raises:
        PatternError: a value that is impossible, or one that would have no effect.
    """

    pattern_type: str | Pattern = "dilated_sparse"
    sparsity_ratio: float | None = None
    block_size: int = 128
    local_window_size: int = 512
    global_tokens: int = GLOBAL_TOKENS

    def __post_init__(self) -> None:
        own = isinstance(self.pattern_type, Pattern)
        if not own:
            check_kind("SparsePatternConfig(pattern_type)", self.pattern_type)
        if type(self.block_size) is not int or self.block_size not in _BLOCK_SIZES:
            raise PatternError(
                explain(
                    "SparsePatternConfig(block_size)",
                    expected=f"one of {_BLOCK_SIZES}",
                    got=repr(self.block_size),
                    fix="128 suits GPUs; smaller blocks follow fine patterns with fewer wasted pairs.",
                )
            )
        integer("SparsePatternConfig", "local_window_size", self.local_window_size, 1)
        integer("SparsePatternConfig", "global_tokens", self.global_tokens, 0)
        if self.sparsity_ratio is not None:
            ratio = check_density("SparsePatternConfig(sparsity_ratio)", self.sparsity_ratio)
            object.__setattr__(self, "sparsity_ratio", ratio)
            if own:
                raise PatternError(
                    explain(
                        "SparsePatternConfig(sparsity_ratio)",
                        expected=f"None beside {self.pattern_type!r}, which has its own density",
                        got=self.sparsity_ratio,
                        fix="Leave it out, or name one of the types in pattern_type.",
                    )
                )
        self._refuse_idle(own)

    def _refuse_idle(self, own: bool) -> None:
        """Raises PatternError for a value other than the default that changes nothing."""
        defaults = {f.name: f.default for f in fields(self)}
        kind = "a Pattern" if own else repr(self.pattern_type)
        windowed = not own and self.pattern_type in ("local_window", "global_local")
        sunk = not own and self.pattern_type in ("global_local", "ultra_sparse")
        idle = []
        if not windowed:
            idle.append(("local_window_size", f"{kind} has no window"))
        elif self.sparsity_ratio is not None:
            idle.append(("local_window_size", "sparsity_ratio sets the size of the window"))
        if not sunk:
            idle.append(("global_tokens", f"{kind} has no global tokens"))
        for name, why in idle:
            if getattr(self, name) != defaults[name]:
                raise PatternError(
                    explain(
                        f"SparsePatternConfig({name})",
                        expected=f"it to be left out, because {why}",
                        got=getattr(self, name),
                        fix="It would have no effect.",
                    )
                )

    def pattern(
        self,
        is_causal: bool = False,
        segment_lengths: Sequence[int] = (2048,),
        dilation_rates: Sequence[int] = (1,),
    ) -> Pattern:
        """The pattern that this asks for; it holds ``& Causal()`` already if ``is_causal``.

        Args:
            segment_lengths, dilation_rates: the branches of ``dilated_sparse``, in tokens and in tiles.
                Checked for every type, used by this one alone.

        Raises:
            PatternError: branches that do not pair up.
        """
        branches = segments_of(segment_lengths, dilation_rates)
        if isinstance(self.pattern_type, Pattern):
            made = self.pattern_type
        elif self.sparsity_ratio is None:
            made = self._natural(is_causal, *branches)
        else:
            lengths, rates = branches if self.pattern_type == "dilated_sparse" else (None, None)
            tokens = self.global_tokens if self.pattern_type in ("global_local", "ultra_sparse") else None
            made = Budget(self.pattern_type, self.sparsity_ratio, is_causal, tokens, lengths, rates)
        return made & Causal() if is_causal else made

    def _natural(self, is_causal: bool, lengths: tuple[int, ...], rates: tuple[int, ...]) -> Pattern:
        if self.pattern_type == "dilated_sparse":
            return reduce(or_, (Dilated(w, r) for w, r in zip(lengths, rates, strict=True)))
        if self.pattern_type == "ultra_sparse":
            return LogStrided(2) | Global(max(1, self.global_tokens), rows=False)
        size = self.local_window_size
        window = Local(size - 1, 0) if is_causal else Local(size // 2, (size - 1) // 2)
        if self.pattern_type == "local_window" or self.global_tokens == 0:
            return window
        return window | Global(self.global_tokens, rows=False)
