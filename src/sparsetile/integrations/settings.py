"""``config.sparsetile``: which keys the layers and heads of a model keep, as plain JSON."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsetile.arguments import checked_blocks
from sparsetile.errors import ArgumentError, explain
from sparsetile.op import parsed
from sparsetile.patterns import ByHead, Pattern, SparsePatternConfig
from sparsetile.patterns.budget import KINDS

_KEYS = ("pattern", "density", "heads", "layers", "block_size", "backend")
_IGNORED = ("about",)
"""What a file may say of itself, as ``sparsetile profile`` writes it."""


@dataclass(frozen=True)
class LayerSettings:
    """What one layer keeps.

    Attributes:
        causal, both: its pattern for causal and for bidirectional attention; neither holds ``Causal()``,
            which is the model's own to say.
        block_size: tokens of a tile's side.
        backend: as :func:`sparsetile.sparse_attention` takes it.
    """

    causal: Pattern
    both: Pattern
    block_size: int | tuple[int, int]
    backend: str


def layer_settings(settings: object, layer: int | None) -> LayerSettings:
    """What ``config.sparsetile`` says of a layer.

    Args:
        settings: a mapping with

            * ``"pattern"``: the text of a pattern, such as ``"Local(1024, 0) | Global(64)"``, or the name of
              a kind (``"local_window"``, ``"global_local"``, ``"dilated_sparse"``, ``"ultra_sparse"``);
            * ``"density"``: with a kind, the share of tiles to keep, in (0, 1];
            * ``"heads"``: in the place of a pattern, a list with one for each query head: texts, or mappings
              with pattern and density;
            * ``"layers"``: mappings such as this one by layer number (as text, for JSON), each with all that
              its layer keeps;
            * ``"block_size"``: 16, 32, 64 or 128 (default), for all layers;
            * ``"backend"``: ``"auto"`` (default) or a name, for all layers.
        layer: the number of the layer, from 0; None if the model does not number its layers.

    Raises:
        ArgumentError: a key or value is not as above.
        PatternError: a pattern is not.
    """
    if not isinstance(settings, Mapping):
        raise _error(
            "config.sparsetile",
            "a mapping with 'pattern', 'heads' or 'layers'",
            "None" if settings is None else type(settings).__name__,
            "Call sparsetile.integrations.transformers.use(model, pattern=…), or set "
            'config.sparsetile = {"pattern": "Local(1024) | Global(64)"}.',
        )
    _check_keys("config.sparsetile", settings, _KEYS)
    own = settings
    layers = settings.get("layers")
    if layers is not None:
        if not isinstance(layers, Mapping) or not all(str(key).isdecimal() for key in layers):
            raise _error("config.sparsetile['layers']", "a mapping by layer number", repr(layers)[:80], _FORM)
        if layer is None:
            raise _error(
                "config.sparsetile['layers']",
                "a model whose attention modules know their layer_idx",
                "one without",
                "Give one pattern for all layers.",
            )
        named = {int(key): value for key, value in layers.items()}
        if layer in named:
            own = named[layer]
            where = f"config.sparsetile['layers']['{layer}']"
            if not isinstance(own, Mapping):
                raise _error(where, "a mapping with 'pattern' or 'heads'", repr(own)[:80], _FORM)
            _check_keys(where, own, ("pattern", "density", "heads"))
        elif "pattern" not in settings and "heads" not in settings:
            raise _error(
                "config.sparsetile['layers']",
                f"an entry for layer {layer}, or a 'pattern' for layers without one",
                f"layers {sorted(named)}",
                _FORM,
            )
    causal, both = _forms(own)
    return LayerSettings(
        causal, both, checked_blocks(settings.get("block_size", 128)), settings.get("backend", "auto")
    )


def _forms(own: Mapping[str, Any]) -> tuple[Pattern, Pattern]:
    """The pattern of a layer or head for causal and for bidirectional attention."""
    heads, pattern, density = own.get("heads"), own.get("pattern"), own.get("density")
    if (heads is None) == (pattern is None):
        raise _error("config.sparsetile", "either 'pattern' or 'heads'", f"keys {sorted(own)}", _FORM)
    if heads is not None:
        if not isinstance(heads, (list, tuple)) or not heads or density is not None:
            raise _error(
                "config.sparsetile['heads']",
                "a list with one pattern for each query head, and no density beside it",
                repr(heads)[:80],
                _FORM,
            )
        each = []
        for head in heads:
            entry = head if isinstance(head, Mapping) else {"pattern": head}
            _check_keys("config.sparsetile['heads']", entry, ("pattern", "density"))
            each.append(_forms(entry))
        return ByHead(tuple(c for c, _ in each)), ByHead(tuple(b for _, b in each))
    if pattern in KINDS:
        if density is None:
            raise _error(
                f"config.sparsetile['pattern'] = {pattern!r}", "a 'density' beside it", "none", _FORM
            )
        return _kind(pattern, density, True), _kind(pattern, density, False)
    if density is not None:
        raise _error(
            "config.sparsetile['density']",
            f"none beside the pattern {pattern!r}, which has its own",
            repr(density),
            f"Name a kind to ask for a density: {', '.join(KINDS)}.",
        )
    if not isinstance(pattern, str):
        raise _error("config.sparsetile['pattern']", "a pattern's text", type(pattern).__name__, _FORM)
    made = parsed(pattern)
    return made, made


def _kind(name: str, density: float, causal: bool) -> Pattern:
    config = SparsePatternConfig(name, density)
    pattern = config.pattern(causal)
    # The model's mask has the causality; here it would hide what a mask allows of the future.
    return pattern.children[0] if causal else pattern


def _check_keys(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known and key not in _IGNORED:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean {close[0]!r}?" if close else _FORM
            raise _error(what, f"keys among {list(known)}", repr(key), fix)


_FORM = "See sparsetile.integrations.transformers for the form."


def _error(what: str, expected: str, got: str, fix: str) -> ArgumentError:
    return ArgumentError(explain(what, expected=expected, got=got, fix=fix))
