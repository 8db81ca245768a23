"""Patterns: which keys each query may attend, as values in tokens."""

from sparsetile.patterns.base import Pattern
from sparsetile.patterns.fixed import (
    Causal,
    Documents,
    Full,
    Global,
    Local,
    Random,
)
from sparsetile.patterns.lattice import Dilated, LogStrided, Strided
from sparsetile.patterns.parse import parse_pattern

__all__ = [
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "Global",
    "Local",
    "LogStrided",
    "Pattern",
    "Random",
    "Strided",
    "parse_pattern",
]
