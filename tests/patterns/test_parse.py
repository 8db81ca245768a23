"""Text to pattern and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pattern_draws import case, runs
from sparsetile.errors import PatternError
from sparsetile.patterns import Causal, Documents, Global, Local, Random, Strided, parse_pattern


@runs(100)
@given(case(), st.booleans())
def test_repr_round_trips(drawn, resolved):
    pattern = (
        drawn.pattern.resolve(drawn.block_q, drawn.block_k, 5, drawn.k_len) if resolved else drawn.pattern
    )
    again = parse_pattern(repr(pattern))
    assert again == pattern and hash(again) == hash(pattern) and repr(again) == repr(pattern)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (" Local(4096) ", Local(4096)),
        ("Local(left=3, right=0)|Global(64)", Local(3, 0) | Global(64)),
        ("(Local(4096) | Global(128)) & Causal()", (Local(4096) | Global(128)) & Causal()),
        ("Local(4) | Global(1) & Causal()", Local(4) | (Global(1) & Causal())),
        ("Documents([3, 4])", Documents((3, 4))),
        ("Random(0.5, seed=-3, unit='token')", Random(0.5, -3, "token")),
        ("Strided(8, 4, -4).block_aligned() & Causal()", Strided(8, 4, -4).block_aligned() & Causal()),
        ("(Local(1) | Local(2, 0)).block_aligned()", (Local(1) | Local(2, 0)).block_aligned()),
    ],
)
def test_reads(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got "),
        ("Locl(3)", "Did you mean Local"),
        ("local(3)", "Did you mean Local"),
        ("Window(3)", "Known patterns: Anchored, Budget, ByHead, Causal"),
        ("Local", r"Write Local\(…\)"),
        ("Local(3", "never closed"),
        ("Local(3) + Causal()", "Known patterns"),
        ("Local(3).block_alined()", "Did you mean block_aligned"),
        ("Local(3).__class__()", "block_aligned"),
        ("Local(window=3)", "window"),
        ("Local(**{})", "Write each argument out"),
        ("Local(1 + 2)", "Arguments are"),
        ("Local(open('x'))", "Arguments are"),
        ("Local(-1)", "≥ 0"),
        ("Local(3)(4)", "Known patterns"),
        ("__import__('os')", "Known patterns"),
        ("3", "Known patterns"),
        ("(" * 500 + "Full()" + ")" * 500, "expected"),
        ("Full()" + " | Full()" * 5000, "nested too deeply|expected"),
        ("\0", "expected"),
    ],
)
def test_refuses(text, says):
    with pytest.raises(PatternError, match=says):
        parse_pattern(text)


def test_refuses_what_is_not_text():
    with pytest.raises(PatternError, match="int"):
        parse_pattern(3)
