"""SparsePlan: which keys a module keeps; Planned: what every module can say of its plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsetile import op
from sparsetile.errors import PatternError, explain
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.cache import cached_layout
from sparsetile.patterns import Pattern
from sparsetile.patterns.branches import segments_of
from sparsetile.patterns.budget import DensityReport, density_report
from sparsetile.patterns.config import SparsePatternConfig

_MOST_LENGTHS = 1024
DEFAULT_RATIO = 0.1
"""Density of a module that was told nothing about it."""


@dataclass(frozen=True)
class SparsePlan:
    """What a module needs to know of its pattern: a value that pickles, copies and compares.

    Attributes:
        config: kind, density, block and sizes of the pattern.
        segment_lengths: tokens of each branch's segments.
        dilation_rates: stride of each branch, in tiles, at most its segment's tokens.
    """

    config: SparsePatternConfig
    segment_lengths: tuple[int, ...] = (2048,)
    dilation_rates: tuple[int, ...] = (1,)
    # Made once: a compiled function must find its patterns ready.
    _patterns: tuple[Pattern, Pattern] = field(init=False, repr=False, compare=False)
    _texts: tuple[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lengths, rates = segments_of(self.segment_lengths, self.dilation_rates)
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)
        if not isinstance(self.config, SparsePatternConfig):
            raise PatternError(
                explain(
                    "sparse_config",
                    expected="a SparsePatternConfig or None",
                    got=type(self.config).__name__,
                    fix="For a pattern of your own: SparsePatternConfig(Local(1024) | Global(64)). Learned "
                    "tiles are the adaptive and the multi-head variant's.",
                )
            )
        made = tuple(self.config.pattern(is_causal, lengths, rates) for is_causal in (False, True))
        object.__setattr__(self, "_patterns", made)
        object.__setattr__(self, "_texts", tuple(map(repr, made)))

    @classmethod
    def of(
        cls,
        segment_lengths: Sequence[int] | None,
        dilation_rates: Sequence[int] | None,
        sparse_config: SparsePatternConfig | None,
        sparsity_ratio: float | None,
    ) -> SparsePlan:
        """The plan of a module's arguments: a config, or a density with or without branches.

        Raises:
            PatternError: arguments that contradict each other, or have no use beside each other.
        """
        branches = segment_lengths is not None or dilation_rates is not None
        if sparse_config is None:
            ratio = DEFAULT_RATIO if sparsity_ratio is None else sparsity_ratio
            kind = "dilated_sparse" if branches else "global_local"
            sparse_config = SparsePatternConfig(kind, sparsity_ratio=ratio)
        elif sparsity_ratio is not None:
            raise PatternError(
                explain(
                    "sparsity_ratio",
                    expected="None beside a sparse_config, which has its own",
                    got=sparsity_ratio,
                    fix="Give the config SparsePatternConfig(…, sparsity_ratio=…).",
                )
            )
        if not branches:
            return cls(sparse_config)
        if isinstance(sparse_config, SparsePatternConfig) and sparse_config.pattern_type != "dilated_sparse":
            raise PatternError(
                explain(
                    "segment_lengths, dilation_rates",
                    expected=f"None for pattern_type {sparse_config.pattern_type!r}, which has no branches",
                    got=f"{segment_lengths!r} and {dilation_rates!r}",
                    fix="Leave them out, or use pattern_type='dilated_sparse'.",
                )
            )
        lengths = (2048,) if segment_lengths is None else segment_lengths
        if dilation_rates is None:
            dilation_rates = (1,) * (len(lengths) if isinstance(lengths, Sequence) else 1)
        return cls(sparse_config, lengths, dilation_rates)  # type: ignore[arg-type]

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def pattern_for(self, is_causal: bool = False) -> Pattern:
        """The pattern of a call; the causal one holds ``& Causal()`` already."""
        return self._patterns[1 if is_causal else 0]

    def attended(self, is_causal: bool = False) -> Pattern | str:
        """The same for ``sparse_attention``: in a graph that is being compiled, as text."""
        if torch.compiler.is_compiling():
            return self._texts[1 if is_causal else 0]
        return self.pattern_for(is_causal)

    def layout_for(
        self,
        q_len: int,
        k_len: int | None = None,
        is_causal: bool = False,
        device: torch.device | str = "cpu",
        heads: int | None = None,
    ) -> BlockLayout:
        """The layout that a call of these lengths uses, from the shared cache."""
        return cached_layout(self.pattern_for(is_causal), q_len, k_len, self.block_size, device, heads)


class Planned(nn.Module):
    """What all variants share: their plan, and the views of it. Subclasses set ``plan`` when constructed."""

    plan: SparsePlan
    chosen: str = ""
    """Why the factory made this variant; empty if nobody asked it to choose."""

    def layout_for(
        self,
        q_len: int,
        k_len: int | None = None,
        is_causal: bool = False,
        *,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """The layout that a forward of these lengths uses.

        Args:
            q_len, k_len: tokens; ``k_len`` defaults to ``q_len``.
            is_causal: as in forward.
            heads: query heads, needed only by a pattern that differs by head.
            device: default: where the module's parameters are, or the CPU.

        Raises:
            PatternError, LayoutError: as ``BlockLayout.from_pattern``.
        """
        if device is None:
            device = next((x.device for x in self.parameters()), torch.device("cpu"))
        return self.plan.layout_for(q_len, k_len, is_causal, device, heads)

    def density_for(
        self, q_len: int, k_len: int | None = None, is_causal: bool = False, *, heads: int | None = None
    ) -> DensityReport:
        """The density asked for and the one that a forward of these lengths has, of the causal triangle if
        causal."""
        layout = self.layout_for(q_len, k_len, is_causal, heads=heads)
        return density_report(self.plan.config, layout, is_causal)

    def warn_of_density(self, query: Tensor, key: Tensor, is_causal: bool) -> None:
        """Warn, once a module, if a call computes more or fewer tiles than were asked for.

        The layout is looked at on the CPU, so no device has to be waited for, and only when the lengths of
        query and key ``[B, H, N, D]`` are new.
        """
        if self.plan.config.sparsity_ratio is None or torch.compiler.is_compiling():
            return
        seen = self.__dict__.setdefault("_seen_lengths", set())
        q_len, k_len = query.shape[2], key.shape[2]
        if (q_len, k_len, is_causal) in seen or None in seen or not op.plain(query, key, key):
            return
        if len(seen) >= _MOST_LENGTHS:
            seen.clear()
        seen.add((q_len, k_len, is_causal))
        layout = self.plan.layout_for(q_len, k_len, is_causal)
        report = density_report(self.plan.config, layout, is_causal)
        if report.reason is not None:
            seen.add(None)
            warnings.warn(
                f"{type(self).__name__}: asked for density {report.requested:.4g}, computes "
                f"{report.realised:.4g} at {q_len} × {k_len} tokens: {report.reason}",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        plan = self.plan
        text = repr(plan.config)
        if plan.config.pattern_type == "dilated_sparse":
            text += f", segment_lengths={plan.segment_lengths}, dilation_rates={plan.dilation_rates}"
        return f"{text}\nchosen: {self.chosen}" if self.chosen else text
