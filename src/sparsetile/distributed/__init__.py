"""One sequence over many ranks: who holds what, what travels, and attention over all of it."""

from sparsetile.distributed.attention import distributed_attention
from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.hooks import compress_gradients
from sparsetile.distributed.plan import Plan, make_plan
from sparsetile.distributed.sequence import shard_sequence, unshard_sequence
from sparsetile.distributed.sharding import Sharding

__all__ = [
    "DistributedSparseConfig",
    "Plan",
    "Sharding",
    "compress_gradients",
    "distributed_attention",
    "make_plan",
    "shard_sequence",
    "unshard_sequence",
]
