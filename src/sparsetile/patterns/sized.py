"""Patterns that depend on the tiles of a layout: their edge, and how many key tiles there are."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import ClassVar, Self

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.parameters import integer, resolved_unit, unresolved


class Sized(Pattern):
    """A pattern with the fields ``block`` and ``k_blocks``, which :meth:`resolve` fills in from a layout."""

    block: int | None
    k_blocks: int | None
    _needs_number: ClassVar[str]
    """Why ``resolve`` needs the number of keys: a sentence."""
    _needs_tiles: ClassVar[str]
    """Why an unresolved one can tell nothing: half a sentence."""

    def _check_sizes(self) -> None:
        name = type(self).__name__
        if (self.block is None) != (self.k_blocks is None):
            raise PatternError(
                explain(
                    f"{name}(block, k_blocks)",
                    expected="both, or neither",
                    got=f"block={self.block}, k_blocks={self.k_blocks}",
                    fix="Leave both out: the layout fills them in.",
                )
            )
        if self.block is not None:
            integer(name, "block", self.block, 1)
            integer(name, "k_blocks", self.k_blocks, 1)

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))  # type: ignore[arg-type]
        shown = [f"{name}={value!r}" for name, value, default in given if value != default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def resolve(self, block_q: int, block_k: int, offset: int = 0, k_len: int | None = None) -> Self:
        if self.block is not None:
            return self
        block = resolved_unit(self, "block", block_q, block_k)
        if k_len is None:
            raise PatternError(
                explain(
                    f"{self!r}.resolve(…)",
                    expected="k_len, the number of keys",
                    got=None,
                    fix=self._needs_number,
                )
            )
        return replace(self, block=block, k_blocks=-(-k_len // block))  # type: ignore[type-var]

    def _sizes(self) -> tuple[int, int]:
        """(block, k_blocks); raises PatternError if they are not known yet."""
        if self.block is None or self.k_blocks is None:
            raise unresolved(self, self._needs_tiles)
        return self.block, self.k_blocks
