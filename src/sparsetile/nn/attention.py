"""BlockSparseRingDilatedAttention: the base module, over q, k, v in ``[B, N, H, D]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from sparsetile.arguments import check_flag, check_settings, check_tokens_first
from sparsetile.errors import NotBuiltError
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
        ring: a process group or DeviceMesh over which the sequence is spread; not built yet.

    Raises:
        PatternError: impossible branches, density or sizes.
        ArgumentError: an impossible scale, dropout or backend.
        NotBuiltError: a ``ring``.

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
            raise NotBuiltError(
                "ring: one sequence over several processes is not built yet. Leave it None: then the module "
                "works on the tensors it is given."
            )
        check_settings(scale, dropout)
        check_name(backend)
        self.plan = SparsePlan.of(segment_lengths, dilation_rates, sparse_config, sparsity_ratio)
        self.scale = scale
        self.dropout = dropout
        self.backend = backend

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

        Returns:
            ``[B, Nq, H, D]`` in q's dtype, or a pair with the weights.

        Raises:
            ArgumentError, PatternError, BackendError: as :func:`sparsetile.sparse_attention`.
        """
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
