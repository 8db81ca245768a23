"""BlockSparseRingDistributedDilatedAttention: the base module over a sequence that several ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetile.distributed.call import Order, check_order, sharding_by
from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, explain
from sparsetile.nn.attention import BlockSparseRingDilatedAttention
from sparsetile.patterns.config import SparsePatternConfig


class Seen(NamedTuple):
    """What a rank can tell of a call before the ranks agree on it."""

    tokens: int
    heads: int
    kv_heads: int
    is_causal: bool


class BlockSparseRingDistributedDilatedAttention(BlockSparseRingDilatedAttention):
    """Block-sparse attention over one sequence that is spread over ranks; no parameters, no buffers.

    Each rank passes its own tokens and gets their output: what one process would compute for them. A rank
    receives exactly the key-value tiles that its queries attend and that it does not hold: see
    :func:`sparsetile.distributed.distributed_attention`. Outside of a process group it is a world of one.

    Args:
        segment_lengths, dilation_rates, sparse_config, sparsity_ratio, scale, dropout, backend: as for
            :class:`BlockSparseRingDilatedAttention`.
        distributed_config: memory and stages; and how gradients travel between data-parallel ranks, once
            :func:`sparsetile.distributed.compress_gradients` gives it to a DistributedDataParallel model.
        group: process group, one-dimensional DeviceMesh, or None: the default group at the time of a call.
        order: ``"contiguous"`` or ``"balanced"``, see :meth:`sharding_for`.

    Raises:
        PatternError, ArgumentError: an argument is not as above.

    Example:
        >>> import torch, sparsetile as st
        >>> attention = st.create_block_sparse_attention("distributed", sparsity_ratio=0.2)
        >>> q = k = v = torch.randn(1, 4096, 4, 64)  # this rank's tokens; here there is one rank
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 4096, 4, 64])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | None = None,
        *,
        sparsity_ratio: float | None = None,
        distributed_config: DistributedSparseConfig | None = None,
        group: object = None,
        order: Order = "contiguous",
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            segment_lengths,
            dilation_rates,
            sparse_config,
            sparsity_ratio=sparsity_ratio,
            scale=scale,
            dropout=dropout,
            backend=backend,
            ring=group,
        )
        config = DistributedSparseConfig() if distributed_config is None else distributed_config
        if not isinstance(config, DistributedSparseConfig):
            raise ArgumentError(
                explain(
                    "distributed_config",
                    expected="a DistributedSparseConfig or None",
                    got=type(config).__name__,
                    fix="DistributedSparseConfig(enable_memory_optimization=True) is one.",
                )
            )
        check_order(order)
        self.config, self.order = config, order
        self.seen: Seen | None = None
        """The last call over several ranks outside of compiled graphs, whether it came to an end or not."""

    @property
    def spread(self) -> bool:
        return Ranks.of(self.ring).size > 1

    def sharding_for(self, length: int) -> Sharding:
        """Which rank must hold which of ``length`` tokens: what :func:`shard_sequence` cuts by.

        ``"contiguous"``: rank 0 has the first tokens, and so on. ``"balanced"``: two chunks a rank, an early
        and a late one, so that causal attention gives all ranks as much to do.
        """
        return sharding_by(self.order, length, Ranks.of(self.ring).size, self.plan.block_size)

    def _exchange_settings(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "keep": not self.config.enable_memory_optimization,
            "max_remote_tokens": self.config.max_remote_tokens,
        }

    def _over_ranks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        form: dict[str, Any],
        average: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():  # graphs of checkpoints may write to no object
            # What is no such call is refused further on, on every rank alike.
            one = all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k)) and isinstance(is_causal, bool)
            self.seen = Seen(q.shape[1], q.shape[2], k.shape[2], is_causal) if one else None
        return super()._over_ranks(q, k, v, is_causal, key_padding_mask, form, average)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}\norder={self.order!r}, {self.config!r}"
