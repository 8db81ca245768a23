"""from_dense: a model's ``nn.MultiheadAttention`` made block-sparse where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import nn

from sparsetile.errors import ArgumentError, explain
from sparsetile.kernels.select import check_name
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.nn.learned import kept_by
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention
from sparsetile.nn.plan import SparsePlan
from sparsetile.patterns.config import SparsePatternConfig

_Model = TypeVar("_Model", bound=nn.Module)


class _Found(NamedTuple):
    name: str
    module: nn.Module
    why_not: str | None


def from_dense(
    model: _Model,
    *,
    sparsity_ratio: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    sparse_config: SparsePatternConfig | AdaptiveConfig | None = None,
    backend: str = "auto",
    summary: bool = True,
) -> _Model:
    """Turns every ``nn.MultiheadAttention`` in ``model`` into the block-sparse module, in place.

    The module objects stay and change their class, so parameters (the very same objects: an optimizer keeps
    its hold), hooks, buffers, the training flag, and modules used in two places all stay as they are. A
    subclass of ``nn.MultiheadAttention`` may compute something else, and is left alone.

    With an :class:`AdaptiveConfig` each converted module gets a submodule ``learned`` that chooses its tiles,
    with fresh parameters on its device and in its dtype; an optimizer made before does not hold these.

    An ``nn.TransformerEncoder`` around converted layers no longer packs padded batches into nested tensors,
    which serves its dense inference path alone.

    Args:
        model: any module, or an ``nn.MultiheadAttention`` itself.
        sparsity_ratio, segment_lengths, dilation_rates, sparse_config, backend: as in
            :class:`BlockSparseRingMultiheadDilatedAttention`, the same for all; learned tiles are each
            module's own.
        summary: print a table of what was converted and what was not, and why.

    Returns:
        ``model``.

    Raises:
        ArgumentError: not a module, or an unknown backend.
        PatternError: impossible branches, density or sizes. Nothing was converted then.

    Example:
        >>> import torch, sparsetile as st
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> model = st.from_dense(torch.nn.TransformerEncoder(layer, 2), sparsity_ratio=0.2, summary=False)
        >>> type(model.layers[1].self_attn).__name__
        'BlockSparseRingMultiheadDilatedAttention'
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            explain(
                "from_dense(model)", expected="an nn.Module", got=type(model).__name__, fix="Pass the model."
            )
        )
    kept = kept_by(segment_lengths, dilation_rates, sparse_config, sparsity_ratio)
    check_name(backend)
    found = [
        _Found(name, module, _why_not(module, kept))
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    for _, module, why_not in found:
        if why_not is None:
            module.__class__ = BlockSparseRingMultiheadDilatedAttention
            assert isinstance(module, BlockSparseRingMultiheadDilatedAttention)
            module._follow(kept, backend)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(x, BlockSparseRingMultiheadDilatedAttention) for x in module.modules()
        ):
            module.use_nested_tensor = False
    if summary:
        _print(model, found, kept)
    return model


def _why_not(module: nn.MultiheadAttention, kept: SparsePlan | AdaptiveConfig) -> str | None:
    """None if the module can be converted, else the reason."""
    if isinstance(module, BlockSparseRingMultiheadDilatedAttention):
        return "block-sparse already"
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is a subclass, which may compute otherwise"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if isinstance(kept, AdaptiveConfig) and (module.bias_k is not None or module.add_zero_attn):
        return "add_bias_kv or add_zero_attn append keys that lie in no tile to be chosen"
    return None


def _print(model: nn.Module, found: list[_Found], kept: SparsePlan | AdaptiveConfig) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table("module", "width × heads", "now", box=SIMPLE)
    table.columns[0].overflow = "fold"
    for name, module, why_not in found:
        assert isinstance(module, nn.MultiheadAttention)
        now = "block-sparse" if why_not is None else f"unchanged: {why_not}"
        table.add_row(name or "(the model)", f"{module.embed_dim} × {module.num_heads}", now)
    count = sum(why_not is None for _, _, why_not in found)
    console = Console()
    config = kept.config if isinstance(kept, SparsePlan) else kept
    if found:
        console.print(table)
    console.print(
        f"{type(model).__name__}: {count} of {len(found)} nn.MultiheadAttention converted, {config!r}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
