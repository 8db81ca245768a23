"""DilatedAttention: LongNet's attention as a module, over q, k, v in ``[B, N, H, D]``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sparsetile.arguments import check_settings, check_tokens_first
from sparsetile.dilated import HeadOffset, Overlap, check_rules, dilated_attention
from sparsetile.kernels.select import check_name
from sparsetile.patterns.branches import segments_of


class DilatedAttention(nn.Module):
    """LongNet's dilated attention (Ding et al. 2023, arXiv:2307.02486); no parameters, no buffers.

    See :func:`sparsetile.dilated_attention` for what is computed. Unlike the pattern of
    ``BlockSparseRingDilatedAttention``, which keeps whole tiles under one softmax, this is the published form
    to the token: each head keeps one offset of each branch, and branches are mixed by their softmax
    denominators.

    Args:
        segment_lengths: tokens of each branch's segments.
        dilation_rates: stride of each branch, in tokens, at most its segment's length.
        overlap: ``"multiset"``: a key that two branches keep for a query counts twice, as published;
            ``"once"``: once.
        head_offset: ``"block"``: contiguous groups of heads share an offset, as in torchscale; ``"cyclic"``:
            head h has h mod r, as in the paper.
        scale: factor on query·key; default 1/√D.
        dropout: share of the softmax weights that training drops, in [0, 1).
        backend: as in :func:`sparsetile.sparse_attention`.

    Raises:
        PatternError: impossible lengths or rates.
        ArgumentError: an impossible scale, dropout, rule or backend.

    Example:
        >>> import torch
        >>> import sparsetile as st
        >>> attention = st.DilatedAttention([256, 1024], [1, 4])
        >>> q = k = v = torch.randn(2, 2000, 4, 64)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 2000, 4, 64])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        overlap: Overlap = "multiset",
        head_offset: HeadOffset = "block",
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.segment_lengths, self.dilation_rates = segments_of(segment_lengths, dilation_rates)
        check_rules(overlap, head_offset)
        check_settings(scale, dropout)
        check_name(backend)
        self.overlap: Overlap = overlap
        self.head_offset: HeadOffset = head_offset
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
    ) -> Tensor:
        """Attention over the tokens that the branches keep.

        Args:
            q: ``[B, N, H, D]``.
            k, v: ``[B, N, Hkv, D]``, H a multiple of Hkv.
            is_causal: also forbid keys after the query.
            key_padding_mask: bool ``[B, N]``, True = ignore this key.

        Returns:
            ``[B, N, H, D]`` in q's dtype; 0 where no branch keeps the query.

        Raises:
            ArgumentError, BackendError: as :func:`sparsetile.dilated_attention`.
        """
        check_tokens_first(q, k, v, "dilated_attention")
        out = dilated_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.segment_lengths,
            self.dilation_rates,
            is_causal=is_causal,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            overlap=self.overlap,
            head_offset=self.head_offset,
            enable_gqa=True,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )
        return out.transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"segment_lengths={self.segment_lengths}, dilation_rates={self.dilation_rates}, "
            f"overlap={self.overlap!r}, head_offset={self.head_offset!r}, dropout={self.dropout}"
        )
