"""What a rank can tell of a call alone: whether its arguments are right, and what others must have, too."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from sparsetile import op
from sparsetile.arguments import (
    check_final,
    check_flag,
    check_mask,
    check_settings,
    check_tensors,
    check_types,
    checked_tile_bias,
)
from sparsetile.distributed.plan import digest_of
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, BackendError, PatternError, explain
from sparsetile.functional import as_autocast, pattern_text
from sparsetile.kernels.request import Request
from sparsetile.kernels.select import check_name, choose
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.cache import cached_layout
from sparsetile.nn.weights import check_form
from sparsetile.patterns import Full, Pattern

Order = Literal["contiguous", "balanced"]
ORDERS = ("contiguous", "balanced")
_VERSION = 3
"""Of what goes over the wire: ranks of different versions must not exchange."""


class Settings(NamedTuple):
    """What a call asks for besides its tensors and its pattern, unchecked."""

    order: str
    is_causal: bool
    scale: float | None
    dropout_p: float
    enable_gqa: bool
    backend: str
    block_size: int
    max_remote_tokens: int | None
    keep: bool
    need_weights: bool = False
    weights: str = "dense"
    ranks_per_node: int | None = None


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tile_bias: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as autocast has them.

    Raises:
        SparsetileError: what is wrong with this rank's arguments, as far as that can be told alone.
    """
    check_types(query=query, key=key, value=value)
    check_flag("enable_gqa", settings.enable_gqa)
    optional = {"key_padding_mask": mask, "tile_bias": tile_bias}
    check_types(**{name: x for name, x in optional.items() if x is not None})
    query, key, value = as_autocast(query, key, value)
    # Where there are fewer tiles than ranks one may hold nothing; its other sizes are checked all the same.
    one = [
        x[:, :, :0].new_empty((*x.shape[:2], 1, *x.shape[3:])) if _holds_none(x) else x
        for x in (query, key, value)
    ]
    check_tensors(one[0], one[1], one[2], settings.enable_gqa)
    if query.shape[2] != key.shape[2]:
        raise ArgumentError(
            explain(
                "tokens",
                expected="as many queries as keys on a rank",
                got=f"{query.shape[2]} and {key.shape[2]}",
                fix="Spread queries and keys of one sequence alike.",
            )
        )
    check_name(settings.backend)
    check_flag("is_causal", settings.is_causal)
    check_settings(settings.scale, settings.dropout_p, "dropout_p")
    check_mask(mask, query, key.shape[2])
    check_choices(settings.order, settings.keep, settings.ranks_per_node)
    check_flag("need_weights", settings.need_weights)
    check_form(settings.weights, settings.need_weights)
    if not op.plain(query, key, value):
        raise BackendError(
            explain(
                "distributed attention",
                expected="plain tensors, outside of modes and transforms",
                got="others",
                fix="Leave the call out of torch.func, torch.export and torch.set_default_device.",
            )
        )
    # What serves a call of one tile serves any: a rank that finds no backend says so before others wait.
    tile = query.new_empty((1, 1, 1, query.shape[3]))
    layout = cached_layout(Full(), 1, None, settings.block_size, query.device)
    choose(settings.backend, tile, tile, tile, Request(layout, 1.0, lean=True))
    return query, key, value


def check_choices(order: object, keep: object, ranks_per_node: object) -> None:
    check_flag("keep", keep)
    check_order(order)
    check_node(ranks_per_node)


def check_node(ranks_per_node: object) -> None:
    """Raises ArgumentError unless it is None or an int ≥ 1. Whether it divides the ranks says the plan, which
    all ranks make."""
    if ranks_per_node is not None and (type(ranks_per_node) is not int or ranks_per_node < 1):
        raise ArgumentError(
            explain(
                "ranks_per_node",
                expected="None or an integer ≥ 1 that divides the number of ranks",
                got=repr(ranks_per_node),
                fix="Count the ranks of one node; None takes all as one.",
            )
        )


def check_order(order: object) -> None:
    """Raises ArgumentError unless it is one of :data:`ORDERS`."""
    if order not in ORDERS:
        raise ArgumentError(
            explain(
                "order", expected=f"one of {', '.join(ORDERS)}", got=repr(order), fix="See the docstring."
            )
        )


def sharding_by(order: str, length: int, ranks: int, block: int) -> Sharding:
    """Who holds what in that order."""
    return (Sharding.balanced if order == "balanced" else Sharding.contiguous)(length, ranks, block)


def _holds_none(x: Tensor) -> bool:
    return not x.is_nested and x.dim() == 4 and x.shape[2] == 0


def described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: object,
    mask: Tensor | None,
    tile_bias: Tensor | None,
    settings: Settings,
    gradients: bool,
) -> dict[str, object]:
    """All that must be the same on every rank, by name.

    Args:
        gradients: whether a backward will come.

    Raises:
        PatternError, ArgumentError: what is asked for is no pattern or layout.
    """
    if isinstance(pattern, BlockLayout):
        shown = f"a layout with the digest {digest_of(pattern)}"
        check_final(settings.is_causal)
    elif isinstance(pattern, (Pattern, str)):
        shown = pattern_text(pattern, False)[0]
    else:
        raise PatternError(
            explain(
                "pattern",
                expected="a sparsetile Pattern, its text, or a BlockLayout",
                got=type(pattern).__name__,
                fix="For example Local(1024) | Global(64).",
            )
        )
    if tile_bias is not None:
        if not isinstance(pattern, BlockLayout):
            raise ArgumentError(
                explain(
                    "tile_bias",
                    expected="a BlockLayout, whose tiles it counts",
                    got="a Pattern",
                    fix="Build the layout, and pass it.",
                )
            )
        checked_tile_bias(tile_bias, query, pattern)
    batch, heads, _, dim = query.shape
    return {
        "version": _VERSION,
        "pattern": shown,
        "batch": batch,
        "heads": heads,
        "key-value heads": key.shape[1],
        "head_dim": dim,
        "dtype": query.dtype,
        "device": query.device.type,
        # As Python spells them: 16 and "16" are not the same.
        **{name: repr(value) for name, value in settings._asdict().items()},
        "key_padding_mask": mask is not None,
        "tile_bias": None if tile_bias is None else list(tile_bias.shape),
        "gradients": gradients,
    }
