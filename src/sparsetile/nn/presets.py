"""Presets: settings of the factory that have a name, each with a sentence on when to use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsetile.errors import ArgumentError, explain
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.nn.factory import create_block_sparse_attention, nearest
from sparsetile.nn.plan import Planned, SparsePlan
from sparsetile.patterns import Global, Local, Pattern
from sparsetile.patterns.config import SparsePatternConfig


@dataclass(frozen=True)
class Preset:
    """Settings of :func:`create_block_sparse_attention` under a name.

    Attributes:
        name: what :func:`get_block_sparse_preset` knows it by.
        when: when to use it.
        reach: how far a query sees, in one layer and in several.
        variant: that of the factory.
        sparse_config: kind, density and sizes of the pattern, for a fixed pattern.
        segment_lengths, dilation_rates: branches, for a dilated pattern.
        adaptive_config: settings, for a learned pattern.
    """

    name: str
    when: str
    reach: str
    variant: str = "base"
    sparse_config: SparsePatternConfig | None = None
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    adaptive_config: AdaptiveConfig | None = None

    def create(self, **options: Any) -> Planned:
        """The module: the factory's with these settings; ``options`` add to them or replace them.

        With ``embed_dim`` and ``num_heads`` a preset becomes the multihead variant.

        Raises:
            ArgumentError, PatternError: as the factory.
        """
        names = ("variant", "sparse_config", "segment_lengths", "dilation_rates", "adaptive_config")
        own = {name: getattr(self, name) for name in names}
        if options.get("embed_dim") is not None:
            own["variant"] = "multihead"
        return create_block_sparse_attention(**(own | options))

    def pattern_for(self, is_causal: bool = False) -> Pattern:
        """The pattern of a fixed preset, e.g. for ``sparse_attention`` or ``sparsetile show``.

        Raises:
            ArgumentError: the preset's pattern is learned.
        """
        if self.sparse_config is None:
            raise ArgumentError(
                explain(
                    f"preset {self.name!r}",
                    expected="a preset with a fixed pattern",
                    got=f"variant {self.variant!r}, which learns it",
                    fix="Make the module, call it, and ask for its last_layout.",
                )
            )
        plan = SparsePlan.of(self.segment_lengths, self.dilation_rates, self.sparse_config, None)
        return plan.pattern_for(is_causal)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "local",
            when="What matters is near: audio, time series, genomics, the lower layers of a language model.",
            reach="1,024 tokens to each side (2,047 back when causal); L layers reach L times as far.",
            sparse_config=SparsePatternConfig("local_window", local_window_size=2048),
        ),
        Preset(
            "dilated",
            when="Near and far at once, at a fixed cost a token: documents, code, long time series.",
            reach="Inside its own segments of 2,048, 8,192 and 32,768 tokens, in steps of 1, 4 and 16 tiles.",
            sparse_config=SparsePatternConfig("dilated_sparse"),
            segment_lengths=(2048, 8192, 32768),
            dilation_rates=(1, 4, 16),
        ),
        Preset(
            "global_local",
            when="A part that everything depends on stands first: a question, a prompt, a class token.",
            reach="512 tokens to each side and the first 128, through which any two positions meet in two "
            "layers (when causal, they are read by all and cannot read ahead).",
            sparse_config=SparsePatternConfig(Local(512) | Global(128)),
        ),
        Preset(
            "ultra_sparse",
            when="The longest sequences, from about 64K tokens, at 99 % sparsity.",
            reach="Its own tile and a neighbour, the first one, and tiles at distances 2, 4, 8, …; any two "
            "positions meet within O(log N) layers.",
            sparse_config=SparsePatternConfig("ultra_sparse", sparsity_ratio=0.01),
        ),
        Preset(
            "adaptive_standard",
            when="Which tiles matter depends on the input: retrieval, recall from far back.",
            reach="Wherever the scorer looks: a tenth of the tiles, chosen for each input and head.",
            variant="adaptive",
            adaptive_config=AdaptiveConfig(base_sparsity=0.9, temperature=1.0, learnable_temperature=True),
        ),
    )
}


def get_block_sparse_preset(name: str) -> Preset:
    """The preset of a name: ``"local"``, ``"dilated"``, ``"global_local"``, ``"ultra_sparse"``,
    ``"adaptive_standard"``.

    Raises:
        ArgumentError: no preset has this name; the message lists them.

    Example:
        >>> import sparsetile as st
        >>> preset = st.get_block_sparse_preset("local")
        >>> preset.pattern_for(is_causal=True)
        Local(left=2047, right=0) & Causal()
        >>> attention = preset.create(embed_dim=256, num_heads=4)
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ArgumentError(
            explain(
                "preset",
                expected=f"one of {', '.join(map(repr, PRESETS))}",
                got=repr(name),
                fix=nearest(str(name), PRESETS),
            )
        )
    return PRESETS[name]
