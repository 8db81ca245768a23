"""One way to make every variant: ``create_block_sparse_attention`` and its two short forms."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch.distributed

from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.module import BlockSparseRingDistributedDilatedAttention
from sparsetile.errors import ArgumentError, explain
from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive
from sparsetile.nn.attention import BlockSparseRingDilatedAttention
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention
from sparsetile.nn.plan import Planned
from sparsetile.patterns.config import SparsePatternConfig

VARIANTS = ("auto", "base", "multihead", "distributed", "adaptive")


def create_block_sparse_attention(
    variant: str = "auto",
    *,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    sparsity_ratio: float | None = None,
    sparse_config: SparsePatternConfig | AdaptiveConfig | None = None,
    distributed_config: DistributedSparseConfig | None = None,
    adaptive_config: AdaptiveConfig | None = None,
    **options: Any,
) -> Planned:
    """An attention module of any variant.

    Args:
        variant: ``"base"`` (q, k, v ``[B, N, H, D]`` in), ``"multihead"`` (a drop-in for
            ``nn.MultiheadAttention``), ``"distributed"`` (q, k, v of this rank's tokens), ``"adaptive"`` (q,
            k, v as base; tiles are chosen for each input, by a scorer that learns), or ``"auto"``: multihead
            if there is an ``embed_dim``, else distributed if there is a ``distributed_config`` or an
            initialised process group, else adaptive if there is an ``adaptive_config``, else base. The
            module's repr says which and why.
        embed_dim, num_heads: width and heads of the multihead variant; ``num_heads`` also of the adaptive
            one, with ``head_dim`` among the options, if its parameters shall not wait for the first forward.
        segment_lengths, dilation_rates: branches (tokens, tiles) of a dilated pattern.
        sparsity_ratio: the density asked for, in (0, 1]: 0.01 keeps one tile in a hundred.
        sparse_config: kind and sizes of the pattern, instead of ``sparsity_ratio``.
        distributed_config, adaptive_config: settings of these variants; the multihead variant learns its
            tiles if it is given an ``adaptive_config``, or one as its ``sparse_config``.
        options: further keyword arguments of the variant's class.

    Raises:
        ArgumentError: an unknown variant or option, or an argument that the variant has no use for.
        PatternError: impossible segments, rates, density or sizes.

    Example:
        >>> import torch, sparsetile as st
        >>> attention = st.create_block_sparse_attention(variant="base", sparsity_ratio=0.1)
        >>> q = k = v = torch.randn(1, 4096, 8, 64)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 4096, 8, 64])
    """
    if variant not in VARIANTS:
        raise ArgumentError(
            explain(
                "variant",
                expected=f"one of {', '.join(map(repr, VARIANTS))}",
                got=repr(variant),
                fix=nearest(str(variant), VARIANTS),
            )
        )
    chosen = ""
    if variant == "auto":
        variant, why = _choose(embed_dim, distributed_config, adaptive_config)
        chosen = f"variant={variant!r} by 'auto': {why}"
    patterned = ("base", "multihead", "distributed")
    own: dict[str, tuple[object, tuple[str, ...]]] = {
        "embed_dim": (embed_dim, ("multihead",)),
        "num_heads": (num_heads, ("multihead", "adaptive")),
        "distributed_config": (distributed_config, ("distributed",)),
        "adaptive_config": (adaptive_config, ("multihead", "adaptive")),
        "segment_lengths": (segment_lengths, patterned),
        "dilation_rates": (dilation_rates, patterned),
        "sparsity_ratio": (sparsity_ratio, patterned),
        "sparse_config": (sparse_config, patterned),
    }
    kinds = {"distributed_config": DistributedSparseConfig, "adaptive_config": AdaptiveConfig}
    for name, kind in kinds.items():
        value = own[name][0]
        if value is not None and not isinstance(value, kind):
            raise ArgumentError(
                explain(
                    name,
                    expected=f"{kind.__name__} or None",
                    got=repr(value),
                    fix=f"Make it with {kind.__name__}(…).",
                )
            )
    for name, (value, owners) in own.items():
        if value is not None and variant not in owners:
            raise ArgumentError(
                explain(
                    name,
                    expected=f"None for variant {variant!r}",
                    got=repr(value),
                    fix=f"It belongs to variant {' or '.join(map(repr, owners))}.",
                )
            )
    given: dict[str, Any] = {"sparse_config": sparse_config, "sparsity_ratio": sparsity_ratio}
    given |= {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    if adaptive_config is not None and sparse_config is not None:
        raise ArgumentError(
            explain(
                "adaptive_config",
                expected="None beside a sparse_config",
                got="both",
                fix="A pattern is fixed or learned: drop one.",
            )
        )
    given = {name: value for name, value in given.items() if value is not None}
    made: Planned
    if variant == "multihead":
        if embed_dim is None or num_heads is None:
            raise ArgumentError(
                explain(
                    "variant 'multihead'",
                    expected="embed_dim and num_heads",
                    got=f"embed_dim={embed_dim}, num_heads={num_heads}",
                    fix="E.g. embed_dim=768, num_heads=12.",
                )
            )
        _check_options(BlockSparseRingMultiheadDilatedAttention, options)
        given |= {} if adaptive_config is None else {"sparse_config": adaptive_config}
        made = BlockSparseRingMultiheadDilatedAttention(embed_dim, num_heads, **given, **options)
    elif variant == "adaptive":
        _check_options(BlockSparseAdaptive, options)
        made = BlockSparseAdaptive(adaptive_config, num_heads=num_heads, **options)
    elif variant == "distributed":
        _check_options(BlockSparseRingDistributedDilatedAttention, options)
        given |= {} if distributed_config is None else {"distributed_config": distributed_config}
        made = BlockSparseRingDistributedDilatedAttention(**given, **options)
    else:
        _check_options(BlockSparseRingDilatedAttention, options)
        made = BlockSparseRingDilatedAttention(**given, **options)
    made.chosen = chosen
    return made


def create_multihead_block_sparse(
    embed_dim: int,
    num_heads: int,
    sparsity_ratio: float | None = None,
    **options: Any,
) -> BlockSparseRingMultiheadDilatedAttention:
    """``create_block_sparse_attention(variant="multihead", …)``: arguments and errors are those.

    Example:
        >>> import torch, sparsetile as st
        >>> config = st.AdaptiveConfig(base_sparsity=0.9)  # tiles that are learned
        >>> attention = st.create_multihead_block_sparse(64, 4, sparse_config=config, batch_first=True)
        >>> x = torch.randn(1, 2048, 64)
        >>> out, _ = attention(x, x, x, need_weights=False)
        >>> attention.learned.last_density
        tensor(0.1250)
    """
    made = create_block_sparse_attention(
        "multihead", embed_dim=embed_dim, num_heads=num_heads, sparsity_ratio=sparsity_ratio, **options
    )
    assert isinstance(made, BlockSparseRingMultiheadDilatedAttention)
    return made


def create_adaptive_block_sparse(
    base_sparsity: float = 0.9,
    temperature: float = 1.0,
    learnable_temperature: bool = False,
    **options: Any,
) -> BlockSparseAdaptive:
    """``create_block_sparse_attention(variant="adaptive", …)`` with these values in an
    :class:`AdaptiveConfig`.

    Args:
        base_sparsity: share of tiles left out, in [0, 1): 0.9 keeps 10 %.
        temperature: of the selection, > 0.
        learnable_temperature: whether training moves it.
        options: further fields of :class:`AdaptiveConfig`, and arguments of :class:`BlockSparseAdaptive`.

    Raises:
        ArgumentError: a value is out of its range, or an option is unknown.

    Example:
        >>> import torch, sparsetile as st
        >>> attention = st.create_adaptive_block_sparse(
        ...     base_sparsity=0.9, temperature=1.0, learnable_temperature=True
        ... )
        >>> q = k = v = torch.randn(1, 2048, 4, 64)
        >>> attention(q, k, v).shape
        torch.Size([1, 2048, 4, 64])
    """
    named = {field.name for field in fields(AdaptiveConfig)}
    settings = {name: options.pop(name) for name in tuple(options) if name in named}
    config = AdaptiveConfig(base_sparsity, temperature, learnable_temperature, **settings)
    made = create_block_sparse_attention("adaptive", adaptive_config=config, **options)
    assert isinstance(made, BlockSparseAdaptive)
    return made


def _choose(
    embed_dim: int | None,
    distributed_config: DistributedSparseConfig | None,
    adaptive_config: AdaptiveConfig | None,
) -> tuple[str, str]:
    if embed_dim is not None:
        return "multihead", "embed_dim is given"
    if distributed_config is not None:
        return "distributed", "distributed_config is given"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "distributed", "a process group is initialised"
    if adaptive_config is not None:
        return "adaptive", "adaptive_config is given"
    return "base", "no embed_dim, no process group, no adaptive_config"


def _check_options(made: Callable[..., Any], options: dict[str, Any]) -> None:
    named = ("embed_dim", "num_heads", "config")
    known = [name for name in inspect.signature(made).parameters if name not in named]
    for name in options:
        if name not in known:
            raise ArgumentError(
                explain(
                    f"{made.__name__}",
                    expected=f"options among {', '.join(known)}",
                    got=name,
                    fix=nearest(name, known),
                )
            )


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else "See the docstring of create_block_sparse_attention."
