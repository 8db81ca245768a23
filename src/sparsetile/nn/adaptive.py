"""AdaptiveConfig: settings of the variant that learns its pattern. The module itself is not built yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsetile.errors import ArgumentError, explain


@dataclass(frozen=True)
class AdaptiveConfig:
    """Settings of the adaptive variant.

    Attributes:
        base_sparsity: share of tiles left out, in [0, 1): 0.9 keeps 10 %.
        temperature: of the selection, > 0.
        learnable_temperature: whether training moves it.

    Raises:
        ArgumentError: a value is not as above.
    """

    base_sparsity: float = 0.9
    temperature: float = 1.0
    learnable_temperature: bool = False

    def __post_init__(self) -> None:
        if not _number(self.base_sparsity) or not 0.0 <= self.base_sparsity < 1.0:
            raise ArgumentError(
                explain(
                    "base_sparsity",
                    expected="a share of tiles in [0, 1)",
                    got=repr(self.base_sparsity),
                    fix="0.9 keeps one tile in ten.",
                )
            )
        if not _number(self.temperature) or not self.temperature > 0.0:
            raise ArgumentError(
                explain(
                    "temperature",
                    expected="a number > 0",
                    got=repr(self.temperature),
                    fix="1.0 is the usual start.",
                )
            )
        if not isinstance(self.learnable_temperature, bool):
            raise ArgumentError(
                explain(
                    "learnable_temperature",
                    expected="True or False",
                    got=repr(self.learnable_temperature),
                    fix="Pass a bool.",
                )
            )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
