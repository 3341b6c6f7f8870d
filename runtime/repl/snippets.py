"""A piece of code that a user typed: compiled with top-level `await`, run in a namespace, the value of its last
expression kept. Knows nothing of where it runs."""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import traceback
from collections.abc import Awaitable
from types import CodeType
from typing import Any

_numbers = itertools.count(1)
_KEPT = 200
"""Snippets whose lines tracebacks still show."""


class Snippet:
    """Compiled code. `value` is that of its last expression once it has run."""

    def __init__(self, source: str) -> None:
        """Raises SyntaxError (ValueError for null characters)."""
        self.name = f"<attach {next(_numbers)}>"
        self.value: Any = None
        tree = ast.parse(source, self.name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        self._parts: list[tuple[CodeType, bool]] = []
        if tree.body:
            self._parts.append((self._compile(tree, "exec"), False))
        if isinstance(last, ast.Expr):
            self._parts.append((self._compile(ast.Expression(last.value), "eval"), True))
        _remember(self.name, source)

    @property
    def awaits(self) -> bool:
        """Whether it has an `await` at its top level, and so must run on a loop."""
        return any(code.co_flags & inspect.CO_COROUTINE for code, _ in self._parts)

    def run(self, names: dict[str, Any]) -> None:
        """Runs code that awaits nothing."""
        for code, is_value in self._parts:
            result = eval(code, names)  # What the user typed, where he asked for it.
            if is_value:
                self.value = result

    async def run_async(self, names: dict[str, Any]) -> None:
        """Runs any code."""
        for code, is_value in self._parts:
            result = eval(code, names)
            if code.co_flags & inspect.CO_COROUTINE:
                assert isinstance(result, Awaitable)
                result = await result
            if is_value:
                self.value = result

    def _compile(self, tree: ast.Module | ast.Expression, mode: str) -> CodeType:
        code: CodeType = compile(tree, self.name, mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        return code


def trace_of(error: BaseException) -> str:
    """The traceback from the user's code on, without what runs it."""
    frames = error.__traceback__
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith("<attach "):
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
    if isinstance(error, SyntaxError) and frames is None:
        lines = traceback.format_exception_only(type(error), error)
    return "".join(lines)


def _remember(name: str, source: str) -> None:
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    old = [key for key in linecache.cache if key.startswith("<attach ")]
    for key in old[:-_KEPT]:
        del linecache.cache[key]
