"""What transformers' masks allow, read as a pattern, without writing them out.

transformers hands a mask over as a function of positions, made of a few known parts. Those become patterns;
a part that is not known is asked about the pairs of the kept tiles (``Asked`` of ``patterns/inner.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparsetile.errors import ArgumentError, explain
from sparsetile.patterns import Causal, Dilated, Full, Local, Pattern
from sparsetile.patterns.base import Intersection
from sparsetile.patterns.inner import Asked

MaskFunction = Callable[..., Any]


class Sequence(NamedTuple):
    """Tokens of one batch element that see no others.

    Attributes:
        batch: its batch element.
        q_start, q_len: its queries among those of the call.
        k_start, k_len: its keys among those of the call; the last query meets the last key.
        k_first: position in the sequence of its first key here; above 0 where a cache has dropped keys.
    """

    batch: int
    q_start: int
    q_len: int
    k_start: int
    k_len: int
    k_first: int = 0


class TileMask(BlockMask):
    """Stands where transformers passes a mask. It is a ``BlockMask`` because models pass one on as it is.

    Attributes:
        allowed: what the model itself allows, in positions of a sequence; the sparse pattern comes on top.
        causal: whether that leaves out the future, as far as it is known.
        asked: a part of the model's mask that is no pattern, or None.
        batch, q_len, k_len: sizes of the call.
        q_offset, k_offset: positions of its first query and key; a static cache has q_offset on the device.
        documents: int ``[batch, q_len]``, equal numbers in one packed sequence; or None.
        valid: bool ``[batch, k_len]``, True = a token, not padding; or None.
        first: int64 ``[batch]``, position of each sequence's first token; None where ``valid`` is.
        device: where the tensors of the call are.
        memo: what was derived from these, shared by all layers of a forward pass.
    """

    def __init__(
        self,
        allowed: Pattern,
        asked: MaskFunction | None,
        batch: int,
        q_len: int,
        k_len: int,
        q_offset: int | Tensor,
        k_offset: int,
        documents: Tensor | None = None,
        valid: Tensor | None = None,
        first: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        # BlockMask's own fields describe tiles of 128, which this has none of.
        self.allowed, self.asked = allowed, asked
        self.causal = _has_causal(allowed)
        self.batch, self.q_len, self.k_len = batch, q_len, k_len
        self.q_offset, self.k_offset = q_offset, k_offset
        self.documents, self.valid, self.first, self.device = documents, valid, first, device
        self.memo: dict[Any, Any] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, 1, self.q_len, self.k_len)

    def __repr__(self) -> str:
        return f"TileMask({list(self.shape)}, {self.allowed!r})"

    __str__ = __repr__

    def to(self, device: torch.device | str) -> TileMask:
        """This mask with its tensors on ``device``."""
        given = (self.documents, self.valid, self.first)
        documents, valid, first = (None if x is None else x.to(device) for x in given)
        offset = self.q_offset.to(device) if isinstance(self.q_offset, Tensor) else self.q_offset
        return TileMask(
            self.allowed,
            self.asked,
            self.batch,
            self.q_len,
            self.k_len,
            offset,
            self.k_offset,
            documents,
            valid,
            first,
            device,
        )

    def remember(self, name: object, make: Callable[[], Any]) -> Any:
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    @property
    def starts(self) -> Tensor | None:
        """int64 ``[batch]``: slot of each sequence's position 0 among the keys, for decoding."""
        if self.valid is None and self.k_offset == 0:
            return None

        def make() -> Tensor:
            if self.first is None:
                return torch.full((self.batch,), -self.k_offset, device=self.device)
            return self.first - self.k_offset

        made: Tensor = self.remember("starts", make)
        return made


def tile_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: object,
) -> TileMask:
    """The mask counterpart of the attention function, as ``AttentionMaskInterface`` asks for it.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes and first positions of the call.
        mask_function: transformers' mask, of (batch, head, query position, key position).
        attention_mask: bool ``[batch_size, positions so far]``, True = a token, False = padding.
    """
    parts = Parts((Causal(),)) if mask_function is None else read(mask_function)
    allowed = reduce(and_, parts.patterns) if parts.patterns else Full()
    valid = first = None
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in place
    if attention_mask is not None:
        first = attention_mask.int().argmax(-1)
        missing = kv_offset + kv_length - attention_mask.shape[-1]
        padded = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        valid = padded[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return TileMask(
        allowed,
        parts.unknown,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        parts.documents,
        valid,
        first,
        device,
    )


# -- reading a mask function --------------------------------------------------------------------------


@dataclass
class Parts:
    """A mask function as patterns that all must allow, packed documents, and what could not be read."""

    patterns: tuple[Pattern, ...] = ()
    documents: Tensor | None = None
    unknown: MaskFunction | None = None


def read(function: MaskFunction) -> Parts:
    """What a mask function of ``transformers.masking_utils`` allows."""
    known = _KNOWN.get(getattr(function, "__qualname__", ""))
    if known is None or getattr(function, "__module__", "") != "transformers.masking_utils":
        return Parts(unknown=function)
    cells = getattr(function, "__closure__", None) or ()
    closed = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))
    return known(function, closed)


def _all_of(function: MaskFunction, closed: dict[str, Any]) -> Parts:
    every = [read(f) for f in closed["mask_functions"]]
    documents = [p.documents for p in every if p.documents is not None]
    unknown = [p.unknown for p in every if p.unknown is not None]
    if len(documents) > 1 or len(unknown) > 1:
        return Parts(unknown=function)
    patterns = tuple(x for p in every for x in p.patterns)
    return Parts(patterns, documents[0] if documents else None, unknown[0] if unknown else None)


def _any_of(function: MaskFunction, closed: dict[str, Any]) -> Parts:
    every = [read(f) for f in closed["mask_functions"]]
    if any(p.documents is not None or p.unknown is not None for p in every):
        return Parts(unknown=function)
    return Parts((reduce(or_, (Intersection.of(*p.patterns) for p in every)),))


def _remapped(function: MaskFunction, closed: dict[str, Any]) -> Parts:
    """Positions counted in each packed sequence, as those of a :class:`Sequence` are anyway."""
    inner = read(closed["mask_function"])
    return Parts(unknown=function) if inner.unknown is not None else inner


_KNOWN: dict[str, Callable[[MaskFunction, dict[str, Any]], Parts]] = {
    "causal_mask_function": lambda f, c: Parts((Causal(),)),
    "bidirectional_mask_function": lambda f, c: Parts((Full(),)),
    "sliding_window_overlay.<locals>.inner_mask": lambda f, c: Parts((Local(c["sliding_window"] - 1, _FAR),)),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda f, c: Parts(
        (Local(c["sliding_window"]),)
    ),
    "chunked_overlay.<locals>.inner_mask": lambda f, c: Parts((Dilated(c["chunk_size"], 1, "token"),)),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda f, c: Parts(
        documents=c["packed_sequence_mask"]
    ),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": _remapped,
    "and_masks.<locals>.and_mask": _all_of,
    "or_masks.<locals>.or_mask": _any_of,
}
_FAR = 1 << 40


def _has_causal(pattern: Pattern) -> bool:
    return isinstance(pattern, Causal) or (
        isinstance(pattern, Intersection) and any(_has_causal(p) for p in pattern.parts)
    )


# -- the sequences of a call --------------------------------------------------------------------------


def sequences(mask: TileMask) -> tuple[Sequence, ...] | None:
    """The sequences of a call that is not one decoding step; None where every batch element is one without
    padding. Looks at padding and packing on the host, once a forward pass."""
    result: tuple[Sequence, ...] | None = mask.remember("sequences", lambda: _sequences(mask))
    return result


def _sequences(mask: TileMask) -> tuple[Sequence, ...] | None:
    q_offset, k_len = int(mask.q_offset), seen(mask)
    if mask.documents is not None:
        return tuple(_packed(mask.documents))
    alone = mask.asked is None or mask.batch == 1
    k_end = mask.k_offset + k_len
    if mask.valid is None:
        if alone:
            return None
        ends = [(0, k_end)] * mask.batch
    else:
        assert mask.first is not None
        valid = mask.valid[:, :k_len]
        last = mask.k_offset + k_len - valid.flip(-1).int().argmax(-1)
        bounds = torch.stack((mask.first, last, valid.sum(-1)), -1).tolist()
        ends = [(first, end if count else first) for first, end, count in bounds]
        if alone and all(pair == (0, k_end) for pair in ends):
            return None
    found = []
    for batch, (first, end) in enumerate(ends):
        q_first, k_first = max(first, q_offset), max(first, mask.k_offset)
        if q_first < end:
            queries, keys = (q_first - q_offset, end - q_first), (k_first - mask.k_offset, end - k_first)
            found.append(Sequence(batch, *queries, *keys, k_first - first))
    return tuple(found)


def seen(mask: TileMask) -> int:
    """Keys of the call that are there: a static cache has room for more."""
    if not mask.causal and mask.asked is None and mask.q_len != mask.k_len:
        raise ArgumentError(
            explain(
                "attention_mask",
                expected="as many keys as queries, or causal attention",
                got=f"{mask.q_len} queries and {mask.k_len} keys",
                fix="A pattern of positions has no meaning between two sequences: leave cross-attention to "
                "'sdpa'.",
            )
        )
    return min(mask.k_len, int(mask.q_offset) + mask.q_len - mask.k_offset)


def _packed(documents: Tensor) -> Iterator[Sequence]:
    for batch, row in enumerate(documents):
        _, counts = torch.unique_consecutive(row, return_counts=True)
        start = 0
        for length in counts.tolist():
            yield Sequence(batch, start, length, start, length)
            start += length


def holes(mask: TileMask) -> bool:
    """Whether padding lies between the tokens of a sequence."""

    def look() -> bool:
        if mask.valid is None:
            return False
        found = sequences(mask)
        tokens = seen(mask) * mask.batch if found is None else sum(s.k_len for s in found)
        return int(mask.valid[:, : seen(mask)].sum()) != tokens

    return bool(mask.remember("holes", look))


def asked_of(mask: TileMask, sequence: Sequence) -> Pattern | None:
    """The unread part of the mask for one sequence, in that sequence's positions."""
    if mask.asked is None:
        return None
    shift = mask.k_offset + sequence.k_start - sequence.k_first
    return Asked(mask.asked, sequence.batch, shift, shift)
