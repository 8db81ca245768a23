"""LongNet's dilated attention (Ding et al. 2023, arXiv:2307.02486), exact for all lengths and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import index
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from sparsetile import op
from sparsetile.arguments import check_flag, check_mask, check_tensors, check_types
from sparsetile.errors import ArgumentError, explain
from sparsetile.functional import sparse_attention
from sparsetile.patterns import Causal, Dilated, Full, Pattern
from sparsetile.patterns.branches import Branch, NotInBranches, segments_of
from sparsetile.strips import Line, Strip, mix, read, take

OVERLAPS = ("multiset", "once")
HEAD_OFFSETS = ("block", "cyclic")
# Tile edges and about what the same work costs in them.
_BLOCKS = {128: 1.0, 64: 1.1, 32: 1.4, 16: 2.0}

Overlap = Literal["multiset", "once"]
HeadOffset = Literal["block", "cyclic"]


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    overlap: Overlap = ...,
    head_offset: HeadOffset = ...,
    enable_gqa: bool = ...,
    key_padding_mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    overlap: Overlap = ...,
    head_offset: HeadOffset = ...,
    enable_gqa: bool = ...,
    key_padding_mask: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    overlap: Overlap = "multiset",
    head_offset: HeadOffset = "block",
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention (Ding et al. 2023, arXiv:2307.02486, section 2.2 and 2.3).

    Branch i cuts the sequence into segments of wᵢ tokens, of which head h keeps every rᵢ-th from its offset
    sᵢ(h) on: query p attends key t iff ⌊p/wᵢ⌋ = ⌊t/wᵢ⌋ and (p mod wᵢ) mod rᵢ = (t mod wᵢ) mod rᵢ = sᵢ(h).
    Branches are mixed by their softmax denominators (eq. 10), which is one softmax over the keys of all
    branches, and gradients flow through the mixing weights. A query that no branch keeps gets output 0 and
    log-sum-exp −inf.

    Each branch reads strided views of query, key and value, whatever N is; only a branch of several segments
    whose rate does not divide their length gathers its N / rᵢ tokens. No key is ever padded: the last
    segment ends where the sequence does. Memory is O(N) beside the layouts' tiles, time O(N·Σ wᵢ/rᵢ²).

    Args:
        query: ``[B, H, N, D]``; float16, bfloat16, float32, or (CPU and reference) float64.
        key, value: ``[B, Hkv, N, D]``; with ``enable_gqa`` H may be a multiple of Hkv, and offsets are those
            of the query heads.
        segment_lengths: wᵢ, tokens; one longer than N is one segment.
        dilation_rates: rᵢ ≤ wᵢ, tokens; as many.
        is_causal: also forbid keys after the query.
        scale: factor on query·key; default ``1/√D``.
        dropout_p: share of the softmax weights to drop, in [0, 1), in each branch on its own.
        overlap: ``"multiset"``, as published: a key that two branches keep for a query counts twice.
            ``"once"``: each key counts once, attention over the union of the branches.
        head_offset: ``"block"``, as the authors' code (torchscale): contiguous groups of ⌈H/r⌉ heads,
            s(h) = ⌊h / ⌈H/r⌉⌋ (which is ⌊h·r/H⌋ where r divides H; else the last offsets may have no head).
            ``"cyclic"``, as the paper: s(h) = h mod r.
        enable_gqa: allow fewer key-value heads than query heads (query head h reads ``h // (H // Hkv)``).
        key_padding_mask: bool ``[B, N]``, True = ignore this key.
        return_lse: also return the natural log-sum-exp of all keys, ``[B, H, N]``, differentiable.
        backend: as in :func:`sparse_attention`.

    Returns:
        ``[B, H, N, D]`` in query's dtype; with ``return_lse`` a tuple with the fp32 (or float64) log-sum-exp.

    Raises:
        ArgumentError: a shape, dtype, device or value is not as above.
        PatternError: lengths and rates are not as above.
        BackendError: no backend serves the call; the message has every reason.

    Example:
        >>> import torch
        >>> import sparsetile as st
        >>> q = k = v = torch.randn(1, 4, 1000, 64)
        >>> st.dilated_attention(q, k, v, [128, 512], [1, 4], is_causal=True).shape
        torch.Size([1, 4, 1000, 64])
    """
    check_types(query=query, key=key, value=value)
    check_tensors(query, key, value, enable_gqa)
    op.refuse_transforms(query, key, value)
    lengths, rates = segments_of(segment_lengths, dilation_rates)
    check_rules(overlap, head_offset)
    check_flag("is_causal", is_causal)
    length = query.shape[2]
    if key.shape[2] != length:
        raise ArgumentError(
            explain(
                "key, value",
                expected=f"the {length} tokens that query has",
                got=key.shape[2],
                fix="Segments are counted from the first token: dilated attention is self-attention.",
            )
        )
    if key_padding_mask is not None:
        check_types(key_padding_mask=key_padding_mask)
        check_mask(key_padding_mask, query, length)
    # Plain numbers and truth values also where the compiler takes shapes for symbols.
    heads, key_heads = index(query.shape[1]), index(key.shape[1])
    whole = tuple(True if w >= length else False for w in lengths)  # noqa: SIM210
    # A mask is one for all heads, so heads of several offsets cannot share a call that has one.
    even = tuple(True if key_padding_mask is None and length % r == 0 else False for r in rates)  # noqa: SIM210
    calls = _calls(lengths, rates, heads, key_heads, overlap, head_offset, is_causal, whole, even)
    # A sequence shorter than a rate has no token for the last offsets.
    calls = tuple(call for call in calls if call.query.offset < length)
    strips = tuple(call.query for call in calls)
    key_strips = tuple(call.key for call in calls)
    everything = len(calls) == 1 and calls[0].query.rate == 1
    queries = (query,) if everything else take(query, strips)
    keys = (key,) if everything else take(key, key_strips)
    values = (value,) if everything else take(value, key_strips)
    outs, lses = [], []
    for call, q, k, v in zip(calls, queries, keys, values, strict=True):
        strip = call.query
        mask = None
        if key_padding_mask is not None:
            one_head = strip._replace(heads=Line(0, 1, 1))
            mask = read(key_padding_mask[:, None, :, None], one_head)[:, 0, :, 0]
        out, lse = sparse_attention(
            q,
            k,
            v,
            call.pattern,
            scale=scale,
            dropout_p=dropout_p,
            key_padding_mask=mask,
            # A new int: the compiler cannot look at the type of one that was made while it traces.
            block_size=int(call.block) or _block(length // strip.rate),
            enable_gqa=True,
            backend=backend,
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    out, lse = (outs[0], lses[0]) if everything else mix(query, strips, outs, lses)
    return (out, lse) if return_lse else out


def check_rules(overlap: object, head_offset: object) -> None:
    """Raises ArgumentError unless both are names of rules."""
    for name, value, known in (
        ("overlap", overlap, OVERLAPS),
        ("head_offset", head_offset, HEAD_OFFSETS),
    ):
        if value not in known:
            raise ArgumentError(
                explain(
                    name, expected=" or ".join(map(repr, known)), got=repr(value), fix="Pass one of them."
                )
            )


def _block(length: int) -> int:
    """Tile edge for a sequence that is one segment: only its last tiles are part empty."""
    return next((block for block in _BLOCKS if length >= 2 * block), min(_BLOCKS))


def _segment_block(kept: int) -> int:
    """Tile edge for segments of ``kept`` tokens side by side.

    Larger tiles run faster; those that do not end with the segments reach into a tile more each way.
    """

    def cost(block: int) -> float:
        reach = 1.0 if kept % block == 0 else 1.0 + block / kept
        return _BLOCKS[block] * reach**2

    return min(_BLOCKS, key=cost)


class Call(NamedTuple):
    """One call of ``sparse_attention``: strips of the query and of key and value, and who attends whom.

    The pattern is its text, since a compiler cannot pass on an object that was made while it traces. The
    block is 0 where it depends on the length of the sequence.
    """

    query: Strip
    key: Strip
    pattern: str
    block: int


def _calls(*arguments: Any) -> tuple[Call, ...]:
    return _make_calls(*arguments)


# As torch.compiler.assume_constant_result, without its import of the compiler: patterns are made while
# tracing, not by what is traced.
_calls._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _make_calls(
    lengths: tuple[int, ...],
    rates: tuple[int, ...],
    heads: int,
    key_heads: int,
    overlap: str,
    rule: str,
    is_causal: bool,
    whole: tuple[bool, ...],
    even: tuple[bool, ...],
) -> tuple[Call, ...]:
    """The calls of all branches; ``whole`` says which are one segment, ``even`` whose rate divides N."""
    branches = [
        Branch(w, r, tuple(head_offsets(heads, r, rule))) for w, r in zip(lengths, rates, strict=True)
    ]
    calls = []
    for i, (branch, one_segment, divides) in enumerate(zip(branches, whole, even, strict=True)):
        earlier = branches[:i] if overlap == "once" else []
        steady = one_segment or branch.length % branch.rate == 0
        for queries, keys, diagonal in _groups(branch, key_heads, divides and steady):
            strip = Strip(queries, branch.offsets[queries.start], branch.length, branch.rate, diagonal)
            pattern = _pattern(branch, earlier, queries, one_segment, is_causal)
            block = 0 if one_segment else _segment_block(_kept(branch, strip.offset))
            calls.append(Call(strip, strip._replace(heads=keys), repr(pattern), block))
    return tuple(calls)


def head_offsets(heads: int, rate: int, rule: str) -> list[int]:
    """The offset s(h) of each head; see :func:`dilated_attention`."""
    if rule == "cyclic":
        return [head % rate for head in range(heads)]
    together = -(-heads // rate)
    return [head // together for head in range(heads)]


def _kept(branch: Branch, offset: int) -> int:
    """Tokens that a whole segment has from an offset on."""
    return -(-(branch.length - offset) // branch.rate)


def _pattern(
    branch: Branch, earlier: list[Branch], queries: Line, one_segment: bool, is_causal: bool
) -> Pattern:
    """Who attends whom among a branch's own tokens, side by side."""
    members = [queries.start + i * queries.step for i in range(queries.size)]
    offsets = [tuple(b.offsets[head] for head in members) for b in (branch, *earlier)]
    parts: list[Pattern] = [] if one_segment else [Dilated(_kept(branch, offsets[0][0]), 1, 1)]
    if earlier:
        if all(len(set(each)) == 1 for each in offsets):
            offsets = [each[:1] for each in offsets]
        others = tuple((b.length, b.rate, s) for b, s in zip(earlier, offsets[1:], strict=True))
        parts.append(NotInBranches(branch.length, branch.rate, offsets[0], others))
    if is_causal:
        parts.append(Causal())
    pattern: Pattern = parts[0] if parts else Full()
    for part in parts[1:]:
        pattern = pattern & part
    return pattern


def _groups(branch: Branch, key_heads: int, may_be_diagonal: bool) -> list[tuple[Line, Line, bool]]:
    """Query heads, their key heads and whether they are a diagonal, in as few strips as they take.

    Heads of one offset make a strip, and so do heads whose offsets ascend by one; there are r strips of the
    first kind or ⌈H/r⌉ of the second, and a few more where key heads do not follow in equal steps.
    """
    by_offset: dict[int, list[int]] = {}
    for head, offset in enumerate(branch.offsets):
        by_offset.setdefault(offset, []).append(head)
    straight = list(by_offset.values())
    share = len(branch.offsets) // key_heads
    groups = [(*lines, False) for run in straight for lines in _runs(run, share, False)]
    if may_be_diagonal:
        deepest = max(map(len, straight))
        diagonals = [[run[i] for run in straight if i < len(run)] for i in range(deepest)]
        across = [(*lines, True) for run in diagonals for lines in _runs(run, share, True)]
        if len(across) < len(groups):
            return across
    return groups


def _runs(heads: list[int], share: int, diagonal: bool) -> Iterator[tuple[Line, Line]]:
    """Cuts heads into the longest runs that are lines of query heads and of key heads."""
    start = 0
    while start < len(heads):
        for stop in range(len(heads), start, -1):
            lines = _lines(heads[start:stop], share, diagonal)
            if lines is not None:
                yield lines
                start = stop
                break


def _lines(heads: list[int], share: int, diagonal: bool) -> tuple[Line, Line] | None:
    """Query heads and key heads as lines, or None; ``share`` query heads have one key head."""
    keys = [head // share for head in heads]
    if not diagonal:
        # The heads of a strip share its key heads in equal, contiguous parts.
        distinct = sorted(set(keys))
        each, rest = divmod(len(keys), len(distinct))
        if rest or keys != [key for key in distinct for _ in range(each)]:
            return None
        keys = distinct
    query_line, key_line = _line(heads), _line(keys)
    return None if query_line is None or key_line is None else (query_line, key_line)


def _line(values: list[int]) -> Line | None:
    step = values[1] - values[0] if len(values) > 1 else 1
    if any(b - a != step for a, b in pairwise(values)):
        return None
    return Line(values[0], step, len(values))
