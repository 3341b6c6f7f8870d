"""The prompt of `bin/attach`: several lines, colours, history, completion. Needs prompt_toolkit and pygments.

Enter ends a statement that is whole, else it begins a new line. Ctrl-C ends what runs, there too, or clears the line;
Ctrl-D leaves the actor that was entered, and then the console.
"""

from __future__ import annotations

import ast
import codeop
import os
import sys
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, ThreadedCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import Lexer, PygmentsLexer, SimpleLexer

from .attach_complete import complete
from .attach_shell import Shell


def converse(shell: Shell, greeting: str) -> None:
    """Until the user goes. Raises AttachError when the run has ended."""
    print(greeting)
    session: PromptSession[str] = PromptSession(
        history=_history(), lexer=_Colours(), completer=ThreadedCompleter(_Completer(shell)),
        multiline=True, key_bindings=_keys(), prompt_continuation=lambda width, line, wrapped: "." * (width - 1) + " ",
        complete_while_typing=False,
    )  # fmt: skip
    while True:
        try:
            text = shell.loop.run_until_complete(session.prompt_async(f"{shell.entered}>>> "))
            if text.strip() in ("exit", "quit", "exit()", "quit()"):
                return
            shell.run(text)
        except KeyboardInterrupt:
            print("KeyboardInterrupt", file=sys.stderr)
        except EOFError:
            if not shell.entered or shell.helpers is None:
                return
            shell.helpers.leave()


class _Colours(Lexer):
    """Those of Python, loaded with the first character that is typed: the prompt is there the sooner."""

    def __init__(self) -> None:
        self._lexer: Lexer = SimpleLexer()
        self._loaded = False

    def lex_document(self, document: Document) -> Callable[[int], StyleAndTextTuples]:
        if document.text and not self._loaded:
            from pygments.lexers.python import PythonLexer

            self._lexer, self._loaded = PygmentsLexer(PythonLexer), True
        return self._lexer.lex_document(document)

    def invalidation_hash(self) -> Hashable:
        return self._loaded


class _Completer(Completer):
    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for name, typed in complete(self._shell, document.text_before_cursor):
            yield Completion(name, start_position=-typed)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and _is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            line = buffer.document.current_line_before_cursor
            indent = line[: len(line) - len(line.lstrip())]
            buffer.insert_text("\n" + indent + ("    " if line.rstrip().endswith(":") else ""))

    return keys


def _is_whole(text: str) -> bool:
    """Whether nothing is missing; what is wrong is whole, too, and will be said."""
    compiler = codeop.Compile()
    compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    command = codeop.CommandCompiler()
    command.compiler = compiler
    try:
        return command(text.rstrip(" \t")) is not None  # A blank line ends a block, though it is indented.
    except (SyntaxError, ValueError, OverflowError):
        return True


def _history() -> History:
    """Kept in the user's state folder, readable by him alone; in memory if that can't be."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "headrace"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "attach_history", os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(folder / "attach_history"))
