"""DistributedSparseConfig: how the distributed variant spends memory and bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsetile.errors import ArgumentError, explain


@dataclass(frozen=True)
class DistributedSparseConfig:
    """Settings of the distributed variant.

    Attributes:
        enable_memory_optimization: reuse the buffers that key-value tiles arrive in.
        gradient_compression_ratio: bytes of gradients on the wire ÷ bytes of a bf16 all-reduce, in (0, 1];
            1 sends them whole.

    Raises:
        ArgumentError: a value is not as above.
    """

    enable_memory_optimization: bool = False
    gradient_compression_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.enable_memory_optimization, bool):
            raise ArgumentError(
                explain(
                    "enable_memory_optimization",
                    expected="True or False",
                    got=repr(self.enable_memory_optimization),
                    fix="Pass a bool.",
                )
            )
        ratio = self.gradient_compression_ratio
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not math.isfinite(ratio) or not 0.0 < ratio <= 1.0:
            raise ArgumentError(
                explain(
                    "gradient_compression_ratio",
                    expected="a share of bytes in (0, 1]",
                    got=repr(ratio),
                    fix="0.1 sends a tenth, 1 sends gradients whole.",
                )
            )
