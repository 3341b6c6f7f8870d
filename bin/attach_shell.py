"""Runs what a user types: here, or inside of the actor that he has entered. Knows nothing of terminals.

source --> statements --> [entered, and no helper] --> evaluate in the actor --> what it printed, and its value
                      --> else: here, on the console's loop, with top-level await
"""

from __future__ import annotations

import ast
import asyncio
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import FrameType
from typing import Any, cast

from .attach_link import AttachError, Link
from .attach_names import NAMES, Call, Helpers, bind, namespace
from .attach_tables import Rows, Text, harmless
from .runtime.errors import RuntimeFault
from .runtime.repl.show import show
from .runtime.repl.snippets import Snippet, trace_of


class Shell:
    """One session. `link` None: of a run that has ended, with the `names` that are given."""

    def __init__(self, link: Link | None, names: dict[str, Any] | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self.link = link
        self.helpers = None if link is None else Helpers(link)
        self.names: dict[str, Any] = dict(names or {})
        if link is not None and self.helpers is not None:
            self.names |= namespace(link, self.helpers)

    @property
    def entered(self) -> str:
        """The actor in which code is evaluated; "" for none."""
        return "" if self.helpers is None else self.helpers.entered

    def run(self, source: str) -> bool:
        """Runs all statements and prints the values of expressions; False if one raised, which is printed, too.

        Ctrl-C ends the statement, here or there, and raises KeyboardInterrupt. Raises AttachError if the run has ended.
        """
        if self.link is not None:
            bind(self.names, self.link)
        try:
            statements = list(split(source))
        except (SyntaxError, ValueError) as error:
            print("".join(traceback.format_exception_only(error)), end="", file=sys.stderr)
            return False
        return all(self._run_one(text, tree) for text, tree in statements)

    def close(self) -> None:
        """Ends the session, and what the user has left running here."""
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            self.loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        if self.link is not None:
            self.link.close()

    def _run_one(self, text: str, tree: ast.stmt) -> bool:
        try:
            if self.entered and not _calls_helper(tree):
                return self._run_there(text)
            snippet = Snippet(text)
            self._complete(self._run_here(snippet))
            if snippet.value is not None:
                self.names["_"] = snippet.value
                made_to_be_shown = isinstance(snippet.value, Text | Rows)
                print(repr(snippet.value) if made_to_be_shown else show(snippet.value))
            return True
        except (AttachError, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 (anything that a user types)
            print(harmless(_own_trace(error)), end="", file=sys.stderr)
            return False

    async def _run_here(self, snippet: Snippet) -> None:
        await snippet.run_async(self.names)
        if isinstance(snippet.value, Call) or asyncio.iscoroutine(snippet.value):
            snippet.value = await snippet.value

    def _run_there(self, text: str) -> bool:
        assert self.link is not None
        kind, shown = self.link.ask("evaluate", _print, actor=self.entered, source=text)
        if shown:
            print(harmless(shown.rstrip("\n")), file=sys.stderr if kind == "error" else sys.stdout)
        return bool(kind == "value")

    def _complete(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine to its end. Ctrl-C ends it and raises KeyboardInterrupt here: in the user's own lines at
        once, while they wait by cancelling them, and never inside of the loop, which would be left in disorder."""
        steps = _Steps(work)
        task = self.loop.create_task(steps.all())

        def interrupt(number: int, frame: FrameType | None) -> None:
            if steps.at_work:
                raise KeyboardInterrupt
            self.loop.call_soon_threadsafe(task.cancel)

        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, interrupt) if in_main else None
        try:
            self.loop.run_until_complete(task)
        except (asyncio.CancelledError, _Interrupted):
            raise KeyboardInterrupt from None
        finally:
            if in_main:
                signal.signal(signal.SIGINT, before)


class _Interrupted(BaseException):
    """A KeyboardInterrupt on its way through the loop, which would stop for the other."""


class _Steps:
    """A coroutine that says whether it is at work, or waits."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self.cr_await = work
        self.at_work = False

    async def all(self) -> None:
        await self

    def __await__(self) -> Generator[Any, Any, None]:
        return cast("Generator[Any, Any, None]", self)

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        return self._step(self.cr_await.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self.cr_await.throw, *error)

    def close(self) -> None:
        self.cr_await.close()

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            self.at_work = True
            try:
                return step(*args)
            finally:
                self.at_work = False
        except KeyboardInterrupt:
            raise _Interrupted from None


def split(source: str) -> Iterator[tuple[str, ast.stmt]]:
    """The top-level statements with their text. Raises SyntaxError, ValueError."""
    lines = source.splitlines(keepends=True)
    for tree in ast.parse(source, "<attach>").body:
        decorators = [d.lineno for d in getattr(tree, "decorator_list", [])]
        if decorators:
            yield "".join(lines[min(decorators) - 1 : tree.end_lineno]), tree
        else:
            yield ast.get_source_segment(source, tree) or "", tree


def _calls_helper(tree: ast.stmt) -> bool:
    """Whether a statement is a call of a helper, which runs here wherever the user is."""
    match tree:
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return name in NAMES
    return False


def _print(kind: str, text: Any) -> None:
    print(harmless(text), end="", flush=True)


def _own_trace(error: BaseException) -> str:
    """Of what the system answered with, only the user's own lines; of other errors, all from there on."""
    if not isinstance(error, RuntimeFault | LookupError | TypeError | ValueError):
        return trace_of(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<attach ")]
    head = ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
    return "".join([*head, *traceback.format_exception_only(error)])
