"""The console's end of the socket to a running system: asks questions, from any thread or coroutine.

    link.ask("peek", actor="trainer") -> value                  blocks; Ctrl-C cancels it there, too
    await link.ask_async("call", ...)                           cancelling the task cancels it there

A thread reads the answers. Imports nothing that is slow to import, until a value comes that needs it.
"""

from __future__ import annotations

import asyncio
import builtins
import importlib
import json
import os
import queue
import re
import socket
import struct
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .runtime import errors
from .runtime.repl import frames

FILE = "attach.json"

CONNECT_S = 3.0

Deliver = Callable[[str, Any], None]


class AttachError(Exception):
    """The run can't be attached to, or has gone. The text says why, and what to do."""


class Link:
    """An open session."""

    def __init__(self, run: Path) -> None:
        """Attaches to the system that works in the directory `run`. Raises AttachError."""
        self.run = run
        self.closed = ""
        """Why there is no session any more."""
        self._lock = threading.Lock()
        self._number = 0
        self._asked: dict[int, Deliver] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_S)
        try:
            given = json.loads((run / FILE).read_text())
            self._socket.connect(given["socket"])
            _require_own(run / FILE, self._socket)
            self._socket.sendall(frames.pack({"token": given["token"]}))
            header, beside = self._read()
        except AttachError:
            self._socket.close()
            raise
        except (OSError, ValueError, KeyError, EOFError) as error:
            self._socket.close()
            why = getattr(error, "strerror", None) or str(error)
            raise AttachError(f"{run}: its process does not answer ({why}); it has ended, or hangs") from None
        if "error" in header:
            self._socket.close()
            raise AttachError(f"{run}: {header['error'][1]}")
        self.hello: dict[str, Any] = frames.get(header, "value", beside)
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._listen, name="attach", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the session: what is under way is cancelled there."""
        self.closed = self.closed or "the session was closed"
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other side was faster.
        self._thread.join(CONNECT_S)
        self._socket.close()

    def start(self, question: str, deliver: Deliver, details: dict[str, Any]) -> int:
        """Asks; `deliver` gets ("out" | "item", value), at last ("value" | "error", value), in the reading thread."""
        if self.closed:
            raise AttachError(self.closed)
        with self._lock:
            self._number += 1
            number = self._number
            self._asked[number] = deliver
            try:
                self._socket.sendall(frames.put({"id": number, "ask": question}, "with", details))
            except BaseException:
                del self._asked[number]
                raise
        return number

    def cancel(self, number: int) -> None:
        """Gives a question up; its end still comes."""
        with self._lock:
            if number in self._asked and not self.closed:
                self._socket.sendall(frames.pack({"cancel": number}))

    def ask(self, question: str, on_out: Deliver | None = None, **details: Any) -> Any:
        """Asks and blocks until the end. Raises what was raised there."""
        answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        number = self.start(question, lambda kind, value: answers.put((kind, value)), details)
        try:
            while True:
                kind, value = answers.get()
                if kind == "value":
                    return value
                if kind == "error":
                    raise value
                if on_out is not None:
                    on_out(kind, value)
        except KeyboardInterrupt:
            self.cancel(number)
            raise

    async def ask_async(self, question: str, **details: Any) -> Any:
        """The same for a coroutine."""
        async for kind, value in self.follow(question, **details):
            if kind == "value":
                return value
        raise AssertionError("a question without an end")

    async def follow(self, question: str, **details: Any) -> AsyncGenerator[tuple[str, Any], None]:
        """What comes of a question, as it comes; the last is its value. Raises what was raised there."""
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def deliver(kind: str, value: Any) -> None:
            with suppress(RuntimeError):  # The loop was closed, and nobody waits any more.
                loop.call_soon_threadsafe(answers.put_nowait, (kind, value))

        number = self.start(question, deliver, details)
        try:
            while True:
                kind, value = await answers.get()
                if kind == "error":
                    raise value
                yield kind, value
                if kind == "value":
                    return
        finally:
            self.cancel(number)

    def _listen(self) -> None:
        try:
            while True:
                header, beside = self._read()
                kind = next(kind for kind in ("value", "error", "item", "out") if kind in header)
                last = kind in ("value", "error")
                deliver = self._asked.pop(header["id"], None) if last else self._asked.get(header["id"])
                if deliver is not None:
                    deliver(*self._content(kind, header, beside))
        except (OSError, EOFError, ValueError) as error:
            self.closed = self.closed or f"{self.run}: the run has ended ({error or 'its process is gone'})"
        finally:
            self.closed = self.closed or f"{self.run}: nothing is read any more"
            for number in list(self._asked):
                self._asked.pop(number)("error", AttachError(self.closed))

    def _content(self, kind: str, header: frames.Header, beside: bytes) -> tuple[str, Any]:
        if kind == "error":
            return kind, _error(*header["error"])
        try:
            return kind, _value(header, kind, beside)
        except errors.CodecError as error:
            return "error", errors.CodecError(f"the answer can't be read here: {error}; look at it with enter()")

    def _read(self) -> tuple[frames.Header, bytes]:
        header, beside = frames.sizes(self._receive(frames.SIZES.size))
        return frames.unpack(self._receive(header)), self._receive(beside)

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _require_own(file: Path, client: socket.socket) -> None:
    """Raises AttachError if a run is another user's: what it answers with has modules imported here."""
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    for owner in (file.stat().st_uid, uid):
        if owner != os.geteuid():
            raise AttachError(
                f"{file}: the run belongs to user {owner}, and you are {os.geteuid()}; attach as that user"
            )


def _value(header: frames.Header, kind: str, beside: bytes) -> Any:
    """Imports the modules of classes in it, which the run itself has imported. Raises CodecError."""
    tried: set[str] = set()
    while True:
        try:
            return frames.get(header, kind, beside)
        except errors.CodecError as error:
            module = re.search(r"([\w.]+):\w+", str(error))
            if module is None or module[1] in tried:
                raise
            tried.add(module[1])
            try:
                importlib.import_module(module[1])
            except ImportError:
                raise error from None


def _error(name: str, text: str, trace: str, remote_type: str) -> BaseException:
    kind = getattr(errors, name, None)
    if name == "RemoteError":
        return errors.RemoteError(text, remote_type, trace)
    if isinstance(kind, type) and issubclass(kind, errors.RuntimeFault):
        return kind(text)
    if name == "CancelledError":
        return KeyboardInterrupt("cancelled")
    plain = getattr(builtins, name, None)
    if isinstance(plain, type) and issubclass(plain, Exception):
        try:
            return plain(text)
        except TypeError:
            pass  # One that is made of more than a text.
    return errors.RemoteError(f"{name}: {text}", name, trace)
