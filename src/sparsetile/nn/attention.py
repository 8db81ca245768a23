"""BlockSparseRingDilatedAttention: the base module, over q, k, v in ``[B, N, H, D]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from sparsetile.arguments import check_flag, check_settings, check_tokens_first
from sparsetile.functional import sparse_attention
from sparsetile.kernels.select import check_name
from sparsetile.nn.plan import Planned, SparsePlan
from sparsetile.nn.weights import attention_weights, check_dense_size, check_form
from sparsetile.patterns.config import SparsePatternConfig


class BlockSparseRingDilatedAttention(Planned):
    """Block-sparse attention with a fixed pattern; no parameters, no buffers.

    Each query attends, exactly and under one softmax, the keys of the tiles that the pattern keeps. A density
    asked for is the density computed: see :class:`SparsePatternConfig` and :meth:`density_for`.

    Args:
        segment_lengths, dilation_rates: branches of a dilated pattern (Ding et al. 2023, arXiv:2307.02486, in
            tiles): tokens of a segment, and the stride in tiles inside it. Without them, and without a
            config, the pattern is ``"global_local"``.
        sparse_config: kind, density and sizes of the pattern.
        sparsity_ratio: the density, in (0, 1], instead of a config; default 0.1.
        scale: factor on query·key; default 1/√D.
        dropout: share of the softmax weights that training drops, in [0, 1).
        backend: as in :func:`sparsetile.sparse_attention`.
        ring: a process group or one-dimensional DeviceMesh over which the sequence is spread: forward then
            takes this rank's tokens, as :class:`BlockSparseRingDistributedDilatedAttention` does, which has
            more to say about it. None: the tensors are whole sequences.

    Raises:
        PatternError: impossible branches, density or sizes.
        ArgumentError: an impossible scale, dropout, backend or ring.

    Example:
        >>> import torch, sparsetile as st
        >>> attention = st.BlockSparseRingDilatedAttention([1024, 4096], [1, 4], sparsity_ratio=0.2)
        >>> q = k = v = torch.randn(2, 4096, 4, 64)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4096, 4, 64])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | None = None,
        *,
        sparsity_ratio: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        ring: object = None,
    ) -> None:
        super().__init__()
        if ring is not None:
            # The module stands left of what is distributed: only who asks for that imports it.
            from sparsetile.distributed.ranks import Ranks

            Ranks.of(ring)
        check_settings(scale, dropout)
        check_name(backend)
        self.plan = SparsePlan.of(segment_lengths, dilation_rates, sparse_config, sparsity_ratio)
        self.scale = scale
        self.dropout = dropout
        self.backend = backend
        self.ring = ring

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        *,
        average_attn_weights: bool = True,
        weights: Literal["dense", "sparse"] = "dense",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the kept keys.

        Args:
            q: ``[B, Nq, H, D]``.
            k, v: ``[B, Nk, Hkv, D]``, H a multiple of Hkv.
            is_causal: also forbid keys after the query; with Nq ≠ Nk the last query stands at the last key.
            key_padding_mask: bool ``[B, Nk]``, True = ignore this key.
            need_weights: also return the softmax weights (before dropout), see ``weights``.
            average_attn_weights: the mean over heads instead of each head's own.
            weights: ``"dense"``: ``[B, Nq, Nk]`` (or ``[B, H, Nq, Nk]``), up to a size; ``"sparse"``: a
                ``torch.sparse_bsr`` tensor that holds the kept tiles alone.

        With a ``ring``, q, k, v and the mask are this rank's tokens of one sequence, and the weights those of
        its queries with the keys of all.

        Returns:
            ``[B, Nq, H, D]`` in q's dtype, or a pair with the weights.

        Raises:
            ArgumentError, PatternError, BackendError: as :func:`sparsetile.sparse_attention`.
            MismatchError: ranks of the ring differ.
        """
        if self.spread:
            form = {"need_weights": need_weights, "weights": weights}
            return self._over_ranks(q, k, v, is_causal, key_padding_mask, form, average_attn_weights)
        check_tokens_first(q, k, v, "sparse_attention")
        check_flag("is_causal", is_causal)
        check_form(weights, need_weights)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if need_weights and weights == "dense":
            check_dense_size(q, k.shape[2])
        pattern = self.plan.attended(is_causal)
        self.warn_of_density(q, k, is_causal)
        out, lse = sparse_attention(
            q,
            k,
            v,
            pattern,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            block_size=self.plan.block_size,
            enable_gqa=True,
            deterministic=self.deterministic,
            backend=self.backend,
            return_lse=True,
        )
        out = out.transpose(1, 2)
        if not need_weights:
            return out
        return out, attention_weights(
            q,
            k,
            lse,
            pattern,
            weights=weights,
            average=average_attn_weights,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            block_size=self.plan.block_size,
        )

    @property
    def spread(self) -> bool:
        """Whether forward takes a rank's tokens of a sequence that several ranks share."""
        if self.ring is None:
            return False
        from sparsetile.distributed.ranks import Ranks

        return Ranks.of(self.ring).size > 1

    @property
    def deterministic(self) -> bool:
        """Whether gradients are the same bits every run, as those over ranks are, of which one is a world."""
        return self.ring is not None

    def _exchange_settings(self) -> dict[str, Any]:
        """How ranks share the sequence."""
        return {"order": "contiguous", "keep": True, "max_remote_tokens": None}

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
        from sparsetile.distributed.call import Settings
        from sparsetile.distributed.ranks import Ranks
        from sparsetile.distributed.weights import attention_and_weights

        # What is no such tensor is refused there, on every rank alike.
        q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x for x in (q, k, v))
        settings = Settings(
            is_causal=False,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=True,
            backend=self.backend,
            block_size=self.plan.block_size,
            **self._exchange_settings(),
            **form,
        )
        pattern, ranks = self.plan.pattern_for(is_causal), Ranks.of(self.ring)
        out, weights = attention_and_weights(q, k, v, pattern, ranks, settings, key_padding_mask, average)
        out = out.transpose(1, 2)
        return out if weights is None else (out, weights)
