"""One sequence over many GPUs. So far its configuration; the exchange itself is not built yet."""

from sparsetile.distributed.config import DistributedSparseConfig

__all__ = ["DistributedSparseConfig"]
