"""Hugging Face models with ``attn_implementation="sparsetile"``.

.. code-block:: python

    from transformers import AutoModelForCausalLM
    from sparsetile.integrations.transformers import register, use

    register()
    model = AutoModelForCausalLM.from_pretrained("…", attn_implementation="sparsetile")
    use(model, pattern="Local(1024, 0) | Global(64, rows=False)")

``use`` writes ``config.sparsetile``, a mapping in plain JSON that travels with ``save_pretrained``. Its form
is that of :func:`sparsetile.integrations.settings.layer_settings`; ``sparsetile profile`` writes such a file.

The model's own mask stays as it is (causal, sliding windows, chunks, padding, packed sequences); the pattern
leaves out more. Positions count from a sequence's first token, so a batch with padding, a packed batch and
each sequence alone give the same. Needs transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from sparsetile.decode import decode_attention, decode_layout
from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import sparse_attention
from sparsetile.integrations import masks
from sparsetile.integrations.masks import Sequence, TileMask
from sparsetile.integrations.settings import LayerSettings, layer_settings
from sparsetile.layout.blocks import BlockLayout
from sparsetile.layout.cache import cached_layout
from sparsetile.layout.join import join
from sparsetile.patterns import Causal, Full, Pattern
from sparsetile.patterns.inner import Shifted

NAME = "sparsetile"
_MOST_DECODED = 16


def register() -> None:
    """Makes ``attn_implementation="sparsetile"`` known to transformers, with its mask counterpart.

    Calling it again changes nothing.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, masks.tile_mask)


def use(
    model: PreTrainedModel, settings: Mapping[str, Any] | str | Path | None = None, **given: Any
) -> PreTrainedModel:
    """Lets a model attend sparsely, in place.

    Args:
        model: any model of transformers whose attention can be chosen by ``attn_implementation``.
        settings: what to keep, as :func:`~sparsetile.integrations.settings.layer_settings` reads it: a
            mapping, or the path of a JSON file (that of ``sparsetile profile``).
        given: the same by name, over what settings say: ``pattern``, ``density``, ``heads``, ``layers``,
            ``block_size``, ``backend``.

    Returns:
        the model.

    Raises:
        ArgumentError, PatternError: settings that cannot be.
    """
    register()
    read = json.loads(Path(settings).read_text()) if isinstance(settings, (str, Path)) else settings
    whole = {**(read or {}), **given}
    layer_settings(whole, 0)  # says now what is wrong with them
    for number in whole.get("layers") or ():
        layer_settings(whole, int(number))
    for config in (getattr(module, "config", None) for module in model.modules()):
        if isinstance(config, PreTrainedConfig):
            config.sparsetile = whole
    model.set_attn_implementation(NAME)
    return model


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TileMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        query: ``[B, H, Nq, D]``.
        key, value: ``[B, Hkv, Nk, D]``, those of a cache included.
        attention_mask: a :class:`TileMask`; None where a model makes no mask; or the caller's own dense one,
            ``[B or 1, H or 1, Nq, Nk]``, boolean or added to the logits.
        s_aux: ``[H]``, one logit a head that takes part in the softmax and has no value (an attention sink).
        position_bias: ``[B or 1, H or 1, Nq, Nk]``, added to the logits.

    Returns:
        ``[B, Nq, H, D]``, and None in the place of the weights, which nobody writes out.
    """
    if softcap is not None:
        raise _refused("softcap", softcap, "logits that are not capped")
    if others.get("output_attentions"):
        raise _refused("output_attentions", True, "weights that nobody asks to see")
    mine = _settings_of(module)
    dense = _dense_bias(attention_mask, position_bias, query)
    if not isinstance(attention_mask, TileMask):
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        own = Causal() if causal and attention_mask is None else Full()
        # Without a mask, queries are the last of the keys: a cache that is as long as what was seen.
        offset = key.shape[2] - query.shape[2]
        sizes = (query.shape[0], query.shape[2], key.shape[2])
        attention_mask = TileMask(own, None, *sizes, offset, 0, device=query.device)
        pattern = mine.causal if causal else mine.both
        if dense is not None:
            attention_mask.k_len = attention_mask.q_len + offset
    else:
        pattern = mine.causal if attention_mask.causal else mine.both
        if attention_mask.batch != query.shape[0]:
            raise _refused("batch", query.shape[0], f"{attention_mask.batch} batch elements, as the mask has")
    pattern = pattern & attention_mask.allowed
    call = Call(pattern, mine, scaling, float(dropout), bool(deterministic), s_aux is not None)
    if dense is None and _decodes(attention_mask, query):
        out, lse = _decode(query, key, value, attention_mask, call)
    else:
        out, lse = _attend(query, key, value, attention_mask, call, dense)
    if s_aux is not None:
        assert lse is not None
        share = torch.sigmoid(lse - s_aux.to(lse.dtype)[None, :, None])
        out = out * share[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Call:
    """What all ways to compute a call share."""

    pattern: Pattern
    settings: LayerSettings
    scale: float | None
    dropout_p: float
    deterministic: bool
    with_lse: bool

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **features: Any
    ) -> tuple[Tensor, Tensor | None]:
        out = sparse_attention(
            q,
            k,
            v,
            layout,
            scale=self.scale,
            dropout_p=self.dropout_p,
            enable_gqa=True,
            deterministic=self.deterministic,
            backend=self.settings.backend,
            return_lse=True,
            **features,
        )
        return out

    def layout(self, pattern: Pattern, q_len: int, k_len: int, device: Any, heads: int) -> BlockLayout:
        return cached_layout(pattern, q_len, k_len, self.settings.block_size, device, heads)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask, call: Call, dense: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A call of many queries."""
    found = masks.sequences(mask)
    length, heads = masks.seen(mask), q.shape[1]
    k, v = k[:, :, :length], v[:, :, :length]
    if found is None:
        pattern = Shifted(call.pattern, mask.k_offset) if mask.k_offset else call.pattern
        asked = masks.asked_of(mask, Sequence(0, 0, mask.q_len, 0, length, mask.k_offset))
        if asked is not None:
            pattern = pattern & asked
            layout = mask.remember(
                ("layout", pattern, call.settings.block_size),
                lambda: BlockLayout.from_pattern(
                    pattern, mask.q_len, length, call.settings.block_size, q.device, heads
                ),
            )
        else:
            layout = call.layout(pattern, mask.q_len, length, q.device, heads)
        bias = None if dense is None else dense[..., :length]
        return call.run(q, k, v, layout, attn_bias=bias)
    if dense is not None:
        raise _refused("position_bias", "padding or packed sequences beside it", "one or the other")
    return _apart(q, k, v, mask, call, found)


def _apart(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask, call: Call, found: tuple[Sequence, ...]
) -> tuple[Tensor, Tensor | None]:
    """Sequences of different lengths, each moved to where a tile begins, one after another: nothing is
    computed for padding, and each has the very layout that it has alone."""
    batch, heads, q_len, _ = q.shape
    if not found:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    layout = mask.remember(
        ("joined", call.pattern, call.settings.block_size),
        lambda: join([_own_layout(mask, call, s, heads) for s in found]).to(q.device),
    )
    rows = mask.remember(
        ("rows", call.settings.block_size), lambda: _places(found, layout, q.shape, k.shape[2])
    )
    padding = None
    if masks.holes(mask):
        assert mask.valid is not None
        padding = ~mask.valid[:, : k.shape[2]].reshape(-1)[rows.keys][None]
    out, lse = call.run(
        _taken(q, rows.queries),
        _taken(k, rows.keys),
        _taken(v, rows.keys),
        layout,
        key_padding_mask=padding,
    )
    # Each query goes back to its place; those of padding read a row that is zero.
    zero = out.new_zeros(1, heads, 1, out.shape[-1])
    back = torch.cat((out, zero), 2)[0].index_select(1, rows.back)
    back = back.view(heads, batch, q_len, -1).transpose(0, 1)
    if not call.with_lse:
        return back, None
    assert lse is not None
    empty = lse.new_full((1, heads, 1), -torch.inf)
    lse = torch.cat((lse, empty), 2)[0].index_select(1, rows.back)
    return back, lse.view(heads, batch, q_len).transpose(0, 1)


@dataclass(frozen=True)
class _Rows:
    """Where tokens come from and go to, int64: ``queries`` and ``keys`` ``[tokens of the layout]`` among
    those of the flattened batch; ``back`` ``[B · Nq]`` among the layout's queries, one past them for none."""

    queries: Tensor
    keys: Tensor
    back: Tensor


def _places(found: tuple[Sequence, ...], layout: BlockLayout, shape: torch.Size, k_len: int) -> _Rows:
    batch, _, q_len, _ = shape
    device = layout.device
    queries, keys, back_at, back_to = [], [], [], []
    at = 0
    for s in found:
        q_room = -(-s.q_len // layout.block_q) * layout.block_q
        k_room = -(-s.k_len // layout.block_k) * layout.block_k
        # What fills up a tile repeats the last token; the layout's masks hide it.
        own = s.batch * q_len + s.q_start + torch.arange(q_room).clamp(max=s.q_len - 1)
        queries.append(own)
        keys.append(s.batch * k_len + s.k_start + torch.arange(k_room).clamp(max=s.k_len - 1))
        back_at.append(own[: s.q_len])
        back_to.append(at + torch.arange(s.q_len))
        at += q_room
    back = torch.full((batch * q_len,), layout.q_len)
    back[torch.cat(back_at)] = torch.cat(back_to)
    return _Rows(torch.cat(queries).to(device), torch.cat(keys).to(device), back.to(device))


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """``[1, H, rows, D]`` of ``[B, H, N, D]``: the tokens of the flattened batch at ``rows``."""
    return x.transpose(0, 1).flatten(1, 2).index_select(1, rows)[None]


def _own_layout(mask: TileMask, call: Call, s: Sequence, heads: int) -> BlockLayout:
    pattern = Shifted(call.pattern, s.k_first) if s.k_first else call.pattern
    asked = masks.asked_of(mask, s)
    if asked is None:
        layout = call.layout(pattern, s.q_len, s.k_len, "cpu", heads)
    else:
        layout = BlockLayout.from_pattern(
            pattern & asked, s.q_len, s.k_len, call.settings.block_size, "cpu", heads
        )
    return layout


# -- decoding -----------------------------------------------------------------------------------------


def _decodes(mask: TileMask, query: Tensor) -> bool:
    """Whether the call is a few new tokens after a cache."""
    return (
        query.shape[2] <= _MOST_DECODED
        and mask.causal
        and mask.asked is None
        and mask.documents is None
        and (isinstance(mask.q_offset, Tensor) or mask.q_offset > 0)
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: TileMask, call: Call) -> tuple[Tensor, Tensor | None]:
    lengths, valid = None, mask.valid
    if isinstance(mask.q_offset, Tensor) or mask.q_offset + mask.q_len - mask.k_offset != k.shape[2]:
        lengths = mask.remember(
            "lengths",
            lambda: torch.as_tensor(mask.q_offset + mask.q_len - mask.k_offset, device=q.device).expand(
                mask.batch
            ),
        )
    layout = decode_layout(
        call.pattern, k.shape[2] + mask.k_offset, call.settings.block_size, q.device, q.shape[1]
    )
    return decode_attention(
        q,
        k,
        v,
        layout,
        lengths=lengths,
        starts=mask.starts,
        key_padding_mask=None if valid is None else mask.remember("ignored", lambda: ~valid),
        scale=call.scale,
        enable_gqa=True,
        backend=call.settings.backend,
        return_lse=True,
    )


# -- settings and masks of one call -------------------------------------------------------------------


def _settings_of(module: nn.Module) -> LayerSettings:
    """The settings of a module's layer, read again where they have changed."""
    settings = getattr(getattr(module, "config", None), "sparsetile", None)
    layer = getattr(module, "layer_idx", None)
    seen: object = settings
    if isinstance(settings, Mapping):
        own = (settings.get("layers") or {}).get(str(layer))
        seen = (own, *(settings.get(key) for key in ("pattern", "density", "heads", "block_size", "backend")))
    known = module.__dict__.get("_sparsetile_settings")
    if known is None or known[0] != seen or known[1] is not settings:
        known = (seen, settings, layer_settings(settings, layer))
        module.__dict__["_sparsetile_settings"] = known
    made: LayerSettings = known[2]
    return made


def _dense_bias(mask: object, position_bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The dense part of a call: what the caller wrote out."""
    bias = position_bias
    if isinstance(mask, Tensor):
        written = mask
        if mask.dtype == torch.bool:
            written = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
            written.masked_fill_(~mask, -torch.inf)
        bias = written if bias is None else bias + written
    return None if bias is None else bias.to(query.dtype)


def _refused(what: str, got: object, expected: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{what} with attn_implementation='sparsetile'",
            expected=expected,
            got=repr(got),
            fix="Leave it out, or use 'sdpa' or 'eager' for this model.",
        )
    )
