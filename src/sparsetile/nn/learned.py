"""What the multi-head module does where its tiles are learned: arguments, masks, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetile.errors import ArgumentError, PatternError, explain
from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive
from sparsetile.nn.masks import Masks
from sparsetile.nn.plan import SparsePlan
from sparsetile.patterns.config import SparsePatternConfig


def kept_by(
    segment_lengths: Sequence[int] | None,
    dilation_rates: Sequence[int] | None,
    sparse_config: SparsePatternConfig | AdaptiveConfig | None,
    sparsity_ratio: float | None,
) -> SparsePlan | AdaptiveConfig:
    """What a module's arguments say of the keys it keeps.

    Raises:
        PatternError: arguments that contradict each other, or have no use beside each other.
    """
    if not isinstance(sparse_config, AdaptiveConfig):
        return SparsePlan.of(segment_lengths, dilation_rates, sparse_config, sparsity_ratio)
    others = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    for name, value in (others | {"sparsity_ratio": sparsity_ratio}).items():
        if value is not None:
            raise PatternError(
                explain(
                    name,
                    expected="None beside an AdaptiveConfig, whose tiles are learned",
                    got=repr(value),
                    fix="AdaptiveConfig(base_sparsity=0.9) says how many are kept.",
                )
            )
    return sparse_config


def across(config: AdaptiveConfig) -> AdaptiveConfig:
    """The settings of cross-attention: queries are other tokens than keys, and may be a decoder's.

    No mask tells of the order in which a decoder makes its queries, so ``query_summary="auto"`` judges a tile
    of them by its first alone: else later ones would have a say in what earlier ones see.
    """
    judged_by = "first" if config.query_summary == "auto" else config.query_summary
    return replace(config, query_summary=judged_by, self_attention=False)


def attend_chosen(
    learned: BlockSparseAdaptive,
    config: AdaptiveConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    dropout: float,
    form: str | None,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the tiles that ``learned`` chooses by ``config``; ``masks.bias`` is the same for all
    queries."""
    if form != "sparse" and not (q.numel() and k.numel()):
        return q * 0.0, None if form is None else q.new_zeros((*q.shape[:3], k.shape[2]))
    padding, key_bias = masks.padding, None
    if masks.bias is not None:
        added = masks.bias[:, 0, 0]
        padding = torch.isneginf(added)
        key_bias = added.masked_fill(padding, 0.0)
    out, shares = learned.attend(
        q,
        k,
        v,
        is_causal=masks.is_causal,
        key_padding_mask=padding,
        key_bias=key_bias,
        # The kernels' dropout keeps some weights; F.dropout(p=1) keeps none.
        dropout=dropout if dropout < 1.0 else 0.0,
        form=form,
        average=average,
        config=config,
    )
    return out if dropout < 1.0 else F.dropout(out, dropout), shares


def refuse_mask(attn_mask: Tensor, q_len: int, k_len: int) -> NoReturn:
    """Raises ArgumentError: tiles cannot be chosen under this mask."""
    raise ArgumentError(
        explain(
            "attn_mask with learned tiles",
            expected="None, or the causal mask with is_causal=True and L = S",
            got=f"{list(attn_mask.shape)} that is not known to be causal, L {q_len}, S {k_len}",
            fix="What chooses tiles would look at keys and queries that another mask hides. Say "
            "is_causal=True if it is the causal mask, use key_padding_mask for keys to ignore, or a fixed "
            "pattern.",
        )
    )
