"""Block-sparse attention for PyTorch, exact over the keys it keeps, forward and backward."""

from sparsetile._version import __version__
from sparsetile.decode import decode_attention
from sparsetile.dilated import dilated_attention
from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.module import BlockSparseRingDistributedDilatedAttention
from sparsetile.functional import merge_attention, sparse_attention
from sparsetile.layout.blocks import BlockLayout
from sparsetile.nn.adaptive import AdaptiveConfig, BlockSparseAdaptive
from sparsetile.nn.attention import BlockSparseRingDilatedAttention
from sparsetile.nn.convert import from_dense
from sparsetile.nn.dilated import DilatedAttention
from sparsetile.nn.factory import (
    create_adaptive_block_sparse,
    create_block_sparse_attention,
    create_multihead_block_sparse,
)
from sparsetile.nn.multihead import BlockSparseRingMultiheadDilatedAttention
from sparsetile.nn.presets import get_block_sparse_preset
from sparsetile.patterns import (
    Anchored,
    Budget,
    ByHead,
    Causal,
    Dilated,
    Documents,
    Full,
    Global,
    Hierarchical,
    Local,
    LogStrided,
    Pattern,
    Random,
    SparsePatternConfig,
    Strided,
    parse_pattern,
)

__all__ = [
    "AdaptiveConfig",
    "Anchored",
    "BlockLayout",
    "BlockSparseAdaptive",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDistributedDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "Budget",
    "ByHead",
    "Causal",
    "Dilated",
    "DilatedAttention",
    "DistributedSparseConfig",
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
    "__version__",
    "create_adaptive_block_sparse",
    "create_block_sparse_attention",
    "create_multihead_block_sparse",
    "decode_attention",
    "dilated_attention",
    "from_dense",
    "get_block_sparse_preset",
    "merge_attention",
    "parse_pattern",
    "sparse_attention",
]
