"""Block-sparse attention for PyTorch, exact over the keys it keeps, forward and backward."""

from sparsetile._version import __version__
from sparsetile.functional import merge_attention, sparse_attention
from sparsetile.layout.blocks import BlockLayout
from sparsetile.patterns import (
    Causal,
    Dilated,
    Documents,
    Full,
    Global,
    Local,
    LogStrided,
    Pattern,
    Random,
    Strided,
    parse_pattern,
)

__all__ = [
    "BlockLayout",
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
    "__version__",
    "merge_attention",
    "parse_pattern",
    "sparse_attention",
]
