"""The arms of a comparison: the pattern asked for, dense attention, the pattern's window, learned tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.functional import sparse_attention
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.adaptive import AdaptiveConfig
from sparsetile.patterns import Causal, Local, Pattern, parse_pattern
from sparsetile.train.model import Attention, Model, ModelConfig

DENSE = "dense"
ARMS = ("pattern", "dense", "window", "adaptive")
_SHARES = 4


@dataclass(frozen=True)
class Arm:
    """One way of attending: ``attention`` is a pattern's text, "dense", or says what ``adaptive`` does."""

    name: str
    attention: str
    adaptive: AdaptiveConfig | None = None


def default_pattern(context: int, heads: int, block: int) -> str:
    """A window, and a stride by which the heads share out everything before it.

    Head ``h`` attends every fourth tile, starting ``h`` tiles back: any four heads in a row reach every
    earlier tile, at a quarter of the cost. With 8 heads each tile is seen by two, which can look for
    different things there. Fewer than four heads share out all tiles.
    """
    window = min(max(context // 128, block, 128), 1024)
    return f"Local({window}) | Strided({min(heads, _SHARES) * block}, head_shift={block})"


def compared(attention: str, context: int, heads: int, block: int) -> list[Arm]:
    """The arms of ``--compare``; where dense attention is asked for, the default pattern joins it."""
    text = default_pattern(context, heads, block) if attention == DENSE else attention
    window = window_of(parse_pattern(text))
    if window is None:
        raise PatternError(
            explain(
                "--compare",
                expected="a pattern with a Local(...) part, to train next to that window alone",
                got=text,
                fix=f"Add one, as in 'Local(128) | {text}'.",
            )
        )
    return [Arm("pattern", text), Arm("dense", DENSE), Arm("window alone", f"Local({window})")]


def named(
    names: Sequence[str], attention: str, context: int, heads: int, block: int, adaptive: AdaptiveConfig
) -> list[Arm]:
    """The arms of these names (of :data:`ARMS`), in their order; ``attention`` as in :func:`compared`."""
    text = default_pattern(context, heads, block) if attention == DENSE else attention
    learned = f"adaptive(base_sparsity={adaptive.base_sparsity}, distillation={adaptive.distillation!r})"
    arms = {"dense": Arm(DENSE, DENSE), "adaptive": Arm("adaptive", learned, adaptive)}
    if "window" in names:
        arms["pattern"], _, arms["window"] = compared(text, context, heads, block)
    elif "pattern" in names:
        parse_pattern(text)
        arms["pattern"] = Arm("pattern", text)
    return [arms[name] for name in names]


def window_of(pattern: Pattern) -> int | None:
    """Tokens back that the widest Local within ``pattern`` reaches; None without one."""
    windows = [pattern.left] if isinstance(pattern, Local) else []
    windows += [found for child in pattern.children if (found := window_of(child)) is not None]
    return max(windows, default=None)


def attention_of_learned(model: Model) -> list[Attention]:
    """The attention of each layer of a model that learns its tiles."""

    def of_layer(learned: torch.nn.Module) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            tokens_first = (x.transpose(1, 2) for x in (q, k, v))
            out: Tensor = learned(*tokens_first, is_causal=True)
            return out.transpose(1, 2)

        return attend

    return [of_layer(learned) for learned in model.learned]


def attention_of(
    arm: Arm, model: ModelConfig, context: int, block: int, device: torch.device
) -> tuple[Attention, float]:
    """The arm's attention over ``context`` tokens, and its density: its share of the causal triangle's tiles.

    Raises:
        PatternError: the pattern cannot be read, or does not fit the context.
    """
    if arm.attention == DENSE:
        return _dense, 1.0
    layout = layout_of(arm, model, context, block, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, layout, enable_gqa=True)

    return attend, layout.causal_density


def layout_of(arm: Arm, model: ModelConfig, context: int, block: int, device: torch.device) -> BlockLayout:
    """The tiles of an arm with a pattern, made causal, over ``context`` tokens.

    Raises:
        PatternError: the pattern cannot be read, or does not fit the context.
    """
    pattern = parse_pattern(arm.attention) & Causal()
    return BlockLayout.from_pattern(
        pattern,
        q_len=context,
        k_len=context,
        block_size=block,
        device=device,
        heads=model.heads if pattern.needs_heads else None,
    )


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
