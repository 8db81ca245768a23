"""Checks of pattern parameters, and units of tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Pattern

Unit = int | Literal["block", "token"]

LONGEST = 1 << 48
"""Most tokens that a parameter may count: sums and products with heads stay within int64."""


def floor(a: Tensor, b: int) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")


def integer(pattern: str, name: str, value: object, least: int | None = None) -> int:
    """``value`` as a plain int of at least ``least`` and at most :data:`LONGEST` in size."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or (least is not None and value < least) or abs(value) > LONGEST:  # type: ignore[operator, arg-type]
        raise PatternError(
            explain(
                f"{pattern}({name}=…)",
                expected="an integer" if least is None else f"an integer ≥ {least}",
                got=repr(value),
                fix=f"Pattern parameters count tokens, at most {LONGEST} of them.",
            )
        )
    return value  # type: ignore[return-value]


def truth(pattern: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise PatternError(
            explain(f"{pattern}({name}=…)", expected="True or False", got=repr(value), fix="Pass a bool.")
        )


def check_unit(pattern: str, value: object) -> None:
    if value in ("block", "token"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST:
        raise PatternError(
            explain(
                f"{pattern}(unit=…)",
                expected="'block', 'token' or an integer ≥ 1",
                got=repr(value),
                fix="A unit is a number of consecutive tokens that are kept or left out together.",
            )
        )


def resolved_unit(pattern: Pattern, unit: Unit, block_q: int, block_k: int) -> int:
    if unit == "token":
        return 1
    if unit != "block":
        return int(unit)
    if block_q != block_k:
        raise PatternError(
            explain(
                f"{pattern!r}",
                expected="square tiles for unit='block'",
                got=f"block_q={block_q}, block_k={block_k}",
                fix="Give the unit as a number of tokens.",
            )
        )
    return block_k


def in_tokens(pattern: Pattern, unit: Unit) -> int:
    if unit == "block":
        raise unresolved(pattern, "its unit is a block of the layout")
    return 1 if unit == "token" else int(unit)


def unresolved(pattern: Pattern, why: str) -> PatternError:
    return PatternError(
        explain(
            f"{pattern!r}",
            expected="a pattern in tokens",
            got=f"one that is not resolved: {why}",
            fix="Call pattern.resolve(block_q, block_k, offset, k_len) first; building a layout does so.",
        )
    )
