"""BlockSparseRingDistributedDilatedAttention: the base module over a sequence that several ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetile.distributed.call import Order, check_order, sharding_by
from sparsetile.distributed.config import DistributedSparseConfig
from sparsetile.distributed.ranks import Ranks
from sparsetile.distributed.sharding import Sharding
from sparsetile.errors import ArgumentError, PatternError, explain
from sparsetile.nn.attention import BlockSparseRingDilatedAttention
from sparsetile.nn.plan import SparsePlan
from sparsetile.patterns import Causal, Hierarchical, Pattern
from sparsetile.patterns.config import SparsePatternConfig


class Seen(NamedTuple):
    """What a rank can tell of a call before the ranks agree on it."""

    tokens: int
    heads: int
    kv_heads: int
    is_causal: bool


@dataclass(frozen=True)
class _ByDistance(SparsePatternConfig):
    """Of a Hierarchical, which counts the past alone where attention is causal."""

    def pattern(
        self,
        is_causal: bool = False,
        segment_lengths: Sequence[int] = (2048,),
        dilation_rates: Sequence[int] = (1,),
    ) -> Pattern:
        assert isinstance(self.pattern_type, Hierarchical)
        made = replace(self.pattern_type, causal=is_causal)
        return made & Causal() if is_causal else made


class BlockSparseRingDistributedDilatedAttention(BlockSparseRingDilatedAttention):
    """Block-sparse attention over one sequence that is spread over ranks; no parameters, no buffers.

    Each rank passes its own tokens and gets their output: what one process would compute for them. A rank
    receives exactly the key-value tiles that its queries attend and that it does not hold: see
    :func:`sparsetile.distributed.distributed_attention`. Outside of a process group it is a world of one.

    Args:
        segment_lengths, dilation_rates, sparse_config, sparsity_ratio, scale, dropout, backend: as for
            :class:`BlockSparseRingDilatedAttention`.
        distributed_config: memory, stages, nodes, and densities by distance, which take the place of the
            pattern's arguments; and how gradients travel between data-parallel ranks, once
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
        pattern = {
            "sparse_config": sparse_config,
            "sparsity_ratio": sparsity_ratio,
            "segment_lengths": segment_lengths,
            "dilation_rates": dilation_rates,
        }
        for name, value in pattern.items():
            if config.densities is not None and value is not None:
                raise ArgumentError(
                    explain(
                        name,
                        expected="None beside densities by distance, which are the pattern",
                        got=repr(value),
                        fix="Leave it out, or local_sparsity and the other two of the distributed_config.",
                    )
                )
        self.config, self.order = config, order
        self._by_distance: dict[object, SparsePlan] = {}
        with suppress(PatternError):  # which a call raises, on all ranks alike
            self.plan_over(Ranks.of(group).size)
        self.seen: Seen | None = None
        """The last call over several ranks outside of compiled graphs, whether it came to an end or not."""

    @property
    def plan(self) -> SparsePlan:
        """The pattern's; with densities by distance that of the group as it is now.

        Raises:
            PatternError: ``ranks_per_node`` does not divide the ranks.
        """
        return self._plan if self.config.densities is None else self.plan_over(Ranks.of(self.ring).size)

    @plan.setter
    def plan(self, plan: SparsePlan) -> None:
        self._plan = plan

    def plan_over(self, ranks: int) -> SparsePlan:
        """The plan of a group of as many ranks; raises as :attr:`plan`."""
        densities = self.config.densities
        if densities is None:
            return self._plan
        node = None if ranks == 1 else self.config.ranks_per_node
        key = (ranks, node, densities)
        if key not in self._by_distance:
            pattern = Hierarchical(ranks, node, *densities, order=self._sharding(1, ranks).order)
            self._by_distance[key] = SparsePlan(_ByDistance(pattern))
        return self._by_distance[key]

    @property
    def spread(self) -> bool:
        return Ranks.of(self.ring).size > 1

    @property
    def deterministic(self) -> bool:
        return True

    def sharding_for(self, length: int) -> Sharding:
        """Which rank must hold which of ``length`` tokens: what :func:`shard_sequence` cuts by.

        ``"contiguous"``: rank 0 has the first tokens, and so on. ``"balanced"``: two chunks a rank, an early
        and a late one, so that causal attention gives all ranks as much to do.
        """
        return self._sharding(length, Ranks.of(self.ring).size)

    def _sharding(self, length: int, ranks: int) -> Sharding:
        # Densities by distance come in tiles of the same size.
        return sharding_by(self.order, length, ranks, self._plan.block_size)

    def _exchange_settings(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "keep": not self.config.enable_memory_optimization,
            "max_remote_tokens": self.config.max_remote_tokens,
            "ranks_per_node": self.config.ranks_per_node,
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
        ranks = Ranks.of(self.ring)
        try:
            self.plan_over(ranks.size)
        except PatternError as problem:
            ranks.agree({}, 0, problem)  # raises on all: none must wait for this rank
        return super()._over_ranks(q, k, v, is_causal, key_padding_mask, form, average)

    def extra_repr(self) -> str:
        rest = f"order={self.order!r}, {self.config!r}"
        if self.config.densities is None:
            return f"{super().extra_repr()}\n{rest}"
        return f"{rest}\nchosen: {self.chosen}" if self.chosen else rest
