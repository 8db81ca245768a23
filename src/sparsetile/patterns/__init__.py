"""Patterns: which keys each query may attend, as values in tokens."""

from sparsetile.patterns.anchored import Anchored
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.budget import Budget
from sparsetile.patterns.by_head import ByHead
from sparsetile.patterns.config import SparsePatternConfig
from sparsetile.patterns.fixed import (
    Causal,
    Documents,
    Full,
    Global,
    Local,
    Random,
)
from sparsetile.patterns.hierarchical import Hierarchical
from sparsetile.patterns.lattice import Dilated, LogStrided, Strided
from sparsetile.patterns.parse import parse_pattern

__all__ = [
    "Anchored",
    "Budget",
    "ByHead",
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "Global",
    "Hierarchical",
    "Local",
    "LogStrided",
    "Pattern",
    "Random",
    "SparsePatternConfig",
    "Strided",
    "parse_pattern",
]
