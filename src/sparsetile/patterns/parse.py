"""Patterns from text: the inverse of ``repr``, and what the command line takes."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable

from sparsetile.errors import PatternError, explain
from sparsetile.patterns.anchored import Anchored
from sparsetile.patterns.base import Pattern
from sparsetile.patterns.branches import NotInBranches
from sparsetile.patterns.budget import Budget
from sparsetile.patterns.by_head import ByHead
from sparsetile.patterns.ended import Ended
from sparsetile.patterns.fixed import Causal, Documents, Full, Global, Local, Random
from sparsetile.patterns.hierarchical import Hierarchical
from sparsetile.patterns.lattice import Dilated, LogStrided, Strided

_KNOWN: dict[str, Callable[..., Pattern]] = {
    kind.__name__: kind
    for kind in (
        Anchored,
        Budget,
        ByHead,
        Causal,
        Dilated,
        Documents,
        Full,
        Global,
        Hierarchical,
        Local,
        LogStrided,
        Random,
        Strided,
    )
}
# Made inside the package alone; compiled graphs carry them as text too.
_INNER: dict[str, Callable[..., Pattern]] = {kind.__name__: kind for kind in (Ended, NotInBranches)}
_METHOD = "block_aligned"
_LONGEST = 1 << 20


def parse_pattern(text: str) -> Pattern:
    """The pattern that ``text`` spells, as ``(Local(4096) | Global(128)) & Causal()``.

    Understood are the public pattern names with literal arguments (and lists of patterns), ``|``, ``&``,
    parentheses and ``.block_aligned()``; nothing is evaluated. ``parse_pattern(repr(p)) == p`` for every
    pattern.

    Raises:
        PatternError: not such a text, or impossible parameters.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise _error(text, got, f"Pass a text of up to {_LONGEST} characters.")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "a text that cannot be parsed"
        raise _error(text, reason, "Check the parentheses.") from None
    try:
        return _pattern(tree.body, text)
    except RecursionError:
        raise _error(text, "a text that is nested too deeply", "Use fewer parentheses.") from None


def _pattern(node: ast.expr, text: str) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _pattern(node.left, text), _pattern(node.right, text)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    if isinstance(node, ast.Call):
        make = _callee(node.func, text)
        positional = [_argument(a, text) for a in node.args]
        named: dict[str, object] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise _error(text, "**", "Write each argument out.")
            named[keyword.arg] = _argument(keyword.value, text)
        try:
            return make(*positional, **named)
        except TypeError as error:
            raise _error(text, str(error), "Check the arguments.") from None
    if isinstance(node, ast.Name) and node.id in _KNOWN:
        raise _error(text, node.id, f"Write {node.id}(…) with parentheses.")
    raise _error(text, repr(ast.unparse(node)), _NAMES)


def _callee(node: ast.expr, text: str) -> Callable[..., Pattern]:
    if isinstance(node, ast.Name):
        if node.id in _KNOWN:
            return _KNOWN[node.id]
        if node.id in _INNER:
            return _INNER[node.id]
        raise _error(text, repr(node.id), _suggest(node.id, list(_KNOWN)) + _NAMES)
    if isinstance(node, ast.Attribute):
        if node.attr == _METHOD:
            return _pattern(node.value, text).block_aligned
        raise _error(text, f".{node.attr}", _suggest(node.attr, [_METHOD]) + f"The method is .{_METHOD}().")
    raise _error(text, repr(ast.unparse(node)), _NAMES)


def _argument(node: ast.expr, text: str) -> object:
    """A literal, or patterns where the arguments hold patterns (those of ``ByHead``)."""
    if isinstance(node, (ast.List, ast.Tuple)) and any(
        isinstance(e, (ast.Call, ast.BinOp)) for e in node.elts
    ):
        return tuple(_pattern(item, text) for item in node.elts)
    return _literal(node, text)


def _literal(node: ast.expr, text: str) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        return node.value
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
    ):
        value = node.operand.value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(_literal(item, text) for item in node.elts)
    raise _error(text, repr(ast.unparse(node)), "Arguments are numbers, strings, True, False, None or lists.")


def _suggest(name: str, known: list[str]) -> str:
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"Did you mean {lower[close[0]]}? " if close else ""


_NAMES = f"Known patterns: {', '.join(_KNOWN)}."


def _error(text: object, got: str, fix: str) -> PatternError:
    shown = text if isinstance(text, str) and len(text) <= 120 else f"{str(text)[:117]}..."
    return PatternError(
        explain(
            f"pattern {shown!r}",
            expected="patterns joined by | and &, e.g. (Local(1024) | Global(64)) & Causal()",
            got=got,
            fix=fix,
        )
    )
