"""Where consoles come in: a socket of mode 0600, a token, and a thread of its own in the root process.

    runs/NAME/attach.json (0600): socket, token, pid  -->  console  --token-->  session: requests, each a task

The thread has a loop of its own, so that it answers while the root's loop is blocked. A session whose console ends, or
is killed, is over at once: what it had asked for is cancelled. There is no way in by network. Knows nothing of what is
asked: see desk.py.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import socket
import threading
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..protocol import pack_error
from . import frames
from .desk import Desk

FILE = "attach.json"

MAX_SESSIONS = 64
MAX_TASKS = 32
"""Requests of a session that are under way."""

TOKEN_S = 5.0
"""Time that a console has to show its token."""

SEND_S = 10.0
"""Time that a console may leave an answer unread; then its session is over."""

CLOSE_S = 2.0
_STREAMS = frozenset(("stream", "evaluate", "trace"))
_OF_A_SESSION = frozenset(("call", "stream", "invoke", "evaluate", "trace"))
_QUESTIONS = _OF_A_SESSION | frozenset(
    "hello tree ps pids groups waits dead_letters counters peek names stack explain settings cast pause restart kill "
    "change".split()
)


class Door:
    """Open from its making until `close`."""

    def __init__(self, desk: Desk, run_dir: Path, sockets: Path) -> None:
        """`sockets`: a private folder with a short path."""
        self._desk = desk
        self._file = run_dir / FILE
        self._token = secrets.token_hex(16)
        self._sessions: set[_Session] = set()
        self._count = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = sockets / "attach"
        self._socket.bind(str(path))
        os.chmod(path, 0o600)
        self._socket.listen(MAX_SESSIONS)
        self._socket.setblocking(False)
        self._loop: asyncio.AbstractEventLoop
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="attach", daemon=True)
        self._thread.start()
        ready.wait()
        _write_private(self._file, {"socket": str(path), "token": self._token, "pid": os.getpid()})

    async def close(self) -> None:
        """Ends all sessions, the thread and the socket."""
        self._file.unlink(missing_ok=True)
        with suppress(RuntimeError):  # It has ended by itself.
            self._loop.call_soon_threadsafe(self._end.set)
        await asyncio.to_thread(self._thread.join, CLOSE_S)
        self._socket.close()

    def _run(self, ready: threading.Event) -> None:
        asyncio.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_unix_server(self._enter, sock=self._socket)
        ready.set()
        await self._end.wait()
        server.close()
        for session in list(self._sessions):
            session.close()

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count += 1
        session = _Session(self._desk, f"attach-{self._count}", reader, writer)
        self._sessions.add(session)
        try:
            if len(self._sessions) > MAX_SESSIONS:
                await session.refuse(f"{MAX_SESSIONS} consoles are attached already; leave one of them")
            elif not await self._is_friend(reader, writer):
                await session.refuse(
                    "wrong token: this is not the run that the file attach.json was read of; try again"
                )
            else:
                try:
                    await session.serve()
                finally:
                    session.close()
                    async with asyncio.timeout(CLOSE_S):
                        await self._desk.leave(session.name)
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, asyncio.CancelledError):
            pass  # It has gone, or is no console, or the door is closed: there is nobody to be told.
        finally:
            self._sessions.discard(session)
            session.close()

    async def _is_friend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        async with asyncio.timeout(TOKEN_S):
            header, _ = await _read(reader, most=4096)
        return hmac.compare_digest(str(header.get("token")).encode(), self._token.encode())


class _Session:
    """One console."""

    def __init__(self, desk: Desk, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._desk = desk
        self.name = name
        self._reader = reader
        self._writer = writer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._writing = asyncio.Lock()

    async def refuse(self, why: str) -> None:
        """Tells why there is no session."""
        await self._send(frames.pack({"id": 0, "error": ["PermissionError", why, "", ""]}))

    async def serve(self) -> None:
        """Until the console goes. Raises OSError, EOFError; what wrong types lead to, if it is none."""
        await self._send(frames.put({"id": 0}, "value", await self._desk.hello()))
        while True:
            header, beside = await _read(self._reader)
            if "cancel" in header:
                if task := self._tasks.get(header["cancel"]):
                    task.cancel()
                continue
            id = int(header["id"])
            if len(self._tasks) >= MAX_TASKS:
                text = f"{MAX_TASKS} requests of this console are under way; wait for one"
                await self._send(frames.pack({"id": id, "error": ["MailboxFull", text, "", ""]}))
                continue
            task = self._tasks[id] = asyncio.create_task(self._answer(id, header, beside))
            task.add_done_callback(lambda _, id=id: self._tasks.pop(id, None))  # type: ignore[misc]

    def close(self) -> None:
        """Cancels what is under way. May be called twice."""
        for task in self._tasks.values():
            task.cancel()
        self._writer.close()

    async def _answer(self, id: int, header: frames.Header, beside: bytes) -> None:
        try:
            frame = frames.put({"id": id}, "value", await self._do(id, header, beside))
        except asyncio.CancelledError:
            frame = frames.pack({"id": id, "error": ["CancelledError", "cancelled", "", ""]})
        except Exception as error:  # noqa: BLE001 (the edge of a session: whoever asked gets it)
            frame = frames.pack({"id": id, "error": pack_error(error)})
        with suppress(OSError):
            await self._send(frame)

    def _do(self, id: int, header: frames.Header, beside: bytes) -> Awaitable[Any]:
        ask = header["ask"]
        if ask not in _QUESTIONS:
            raise ValueError(f"there is no question {ask!r}")
        details = frames.get(header, "with", beside)
        if ask in _OF_A_SESSION:
            details["session"] = self.name
        if ask in _STREAMS:

            async def send(kind: str, value: Any) -> None:
                await self._send(frames.put({"id": id}, kind, value))

            details["send"] = send
        answer: Awaitable[Any] = getattr(self._desk, ask)(**details)
        return answer

    async def _send(self, frame: bytes) -> None:
        async with self._writing:
            self._writer.write(frame)
            try:
                async with asyncio.timeout(SEND_S):
                    await self._writer.drain()
            except TimeoutError:
                self._writer.transport.abort()
                raise


async def _read(reader: asyncio.StreamReader, most: int = frames.MAX_BYTES) -> tuple[frames.Header, bytes]:
    """Raises EOFError (IncompleteReadError), ValueError."""
    header, beside = frames.sizes(await reader.readexactly(frames.SIZES.size))
    if header + beside > most:
        raise ValueError(f"a frame of {header + beside} bytes before there is a session")
    return frames.unpack(await reader.readexactly(header)), await reader.readexactly(beside)


def _write_private(path: Path, content: dict[str, Any]) -> None:
    """Never readable by others, and never half there."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
    fresh.replace(path)
