"""The errors that sparsetile raises.

Every message says what was expected, what came, and what to do about it. Each class also derives from
the built-in error that Python users would expect in its place, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class SparsetileError(Exception):
    """Base of every error that sparsetile raises on purpose."""


class PatternError(SparsetileError, ValueError):
    """A pattern's parameters are impossible, or the pattern does not fit the lengths it is used with."""


class LayoutError(SparsetileError, ValueError):
    """A block layout is malformed, or was built for other lengths, heads or devices than it is used with."""


class ArgumentError(SparsetileError, ValueError):
    """An argument of an attention call has the wrong shape, dtype, device or value."""


class BackendError(SparsetileError, RuntimeError):
    """The requested backend (or every backend, for ``backend="auto"``) cannot serve the call."""


class DataError(SparsetileError, ValueError):
    """Training data cannot be read or does not suffice."""


class CheckpointError(SparsetileError, RuntimeError):
    """A checkpoint cannot be read, or belongs to another model."""


class MismatchError(SparsetileError, RuntimeError):
    """Ranks of a process group disagree about a collective call; raised on each, before any payload."""


class RankLostError(SparsetileError, RuntimeError):
    """A collective failed: a rank died, a link broke, or someone did not come within the group's timeout."""


class StepError(SparsetileError, RuntimeError):
    """A training step that counts on no rank; raised on each of them, with what happened where."""


def explain(what: str, *, expected: object, got: object, fix: str) -> str:
    """One message in the house form: ``what: expected …, got …. fix``."""
    return f"{what}: expected {expected}, got {got}. {fix}"
