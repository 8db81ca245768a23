"""Patterns: which keys each query may attend, as values in tokens."""

from sparsetile.patterns.base import Pattern
from sparsetile.patterns.fixed import (
    Causal,
    Dilated,
    Documents,
    Full,
    Global,
    Local,
    LogStrided,
    Random,
    Strided,
)

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
]
