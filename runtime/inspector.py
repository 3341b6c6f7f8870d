"""Answers what a process is doing, from a thread of its own, even while the loop is blocked.

    inspect_node(path, "stacks") --{"ask": "stacks"}\\n--> unix socket in the system's private folder --> thread
                                 <-------- {"answer": ...} ------------------------------------------------'

It only reads, and copies what belongs to the loop as carefully as it can. The thread sleeps until it is asked; requests
are served one after the other, each within ANSWER_S. What it can't see through is a thread that never lets go of the
interpreter, or a stopped process: stacks.py has a way for that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, TypeVar

import orjson

from .errors import InspectError, LaunchError
from .mailbox import Lane
from .node import Node
from .repl.look import exposed, look, names
from .stacks import own_stacks

Question = Literal[
    "ping", "stacks", "tasks", "waits", "actors", "counters", "dead_letters", "peek", "names", "exposed", "interrupt"
]  # fmt: skip

ANSWER_S = 1.0
"""Time that a client may hold up the thread."""

MAX_REQUEST_BYTES = 8192
MAX_ANSWER_BYTES = 8 << 20
MAX_TRIES = 100

T = TypeVar("T")


def inspect_node(path: str, ask: Question, timeout_s: float = 2.0, **details: str) -> Any:
    """Asks the inspector at the socket `path`; blocks for up to `timeout_s`. Plain values:

    ping: key, pid and unix time; stacks: text, all threads; tasks: where each task of the loop waits; waits: who waits
    for whom (node.py); actors: their queues and what they work on; counters and dead_letters of the node; what a REPL
    asks: peek and names (`actor`, `at` a path), exposed, interrupt (`session`).
    Raises InspectError: nobody answers, or the question is not known.
    """
    end = time.monotonic() + timeout_s
    data = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.settimeout(timeout_s)
            with _short(path) as name:
                client.connect(name)
            client.sendall(orjson.dumps({"ask": ask, **details}) + b"\n")
            while len(data) <= MAX_ANSWER_BYTES:
                client.settimeout(max(0.001, end - time.monotonic()))
                if not (part := client.recv(1 << 16)):
                    break
                data += part
        except TimeoutError:
            raise InspectError(
                f"{path}: no answer to {ask!r} within {timeout_s:g} s; the process is stopped, or a thread in it never "
                "lets go of the interpreter: see System.stacks"
            ) from None
        except OSError as error:
            raise InspectError(f"{path}: {error.strerror or error}; has the process ended?") from None
    try:
        reply = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise InspectError(f"{path}: the answer to {ask!r} was cut off; did the process end?") from None
    if "error" in reply:
        raise InspectError(f"{path}: {reply['error']}")
    return reply["answer"]


class Inspector:
    """The thread of one node."""

    def __init__(self, node: Node, path: str) -> None:
        """Listens at `path`. Raises LaunchError."""
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._questions: dict[str, Callable[..., Any]] = {
            "ping": lambda: {"key": node.key, "pid": os.getpid(), "time": time.time()},
            "stacks": own_stacks,
            "tasks": lambda: tasks_of(self._loop),
            "waits": node.waits.rows,
            "actors": lambda: actors_of(node),
            "counters": lambda: dict(node.counters),
            "dead_letters": lambda: list(node.dead_letters),
            "peek": partial(look, node),
            "names": partial(names, node),
            "exposed": partial(exposed, node),
            "interrupt": partial(interrupt, node),
        }
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short(path) as name:
                self._socket.bind(name)
        except OSError as error:
            self._socket.close()
            raise LaunchError(f"can't listen at {path}: {error.strerror}") from None
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._run, name="inspector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when the thread has ended; a request at work is finished before."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(2 * ANSWER_S)
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # No descriptor is free: it must not spin until one is.
                continue
            with client, suppress(OSError):
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            return
        client.settimeout(ANSWER_S)
        data = b""
        while not data.endswith(b"\n") and len(data) < MAX_REQUEST_BYTES:
            if not (part := client.recv(MAX_REQUEST_BYTES - len(data))):
                return
            data += part
        client.sendall(self._reply(data))

    def _reply(self, data: bytes) -> bytes:
        try:
            details = orjson.loads(data)
            ask = details.pop("ask")
            question = partial(self._questions[ask], **details)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return orjson.dumps({"error": f"no such question; there are {', '.join(self._questions)}"})
        try:
            reply = _dump({"answer": steady(question)})
        except Exception as error:  # noqa: BLE001 (the edge of a thread: whoever asked gets it)
            reply = _dump({"error": f"{ask}: {type(error).__name__}: {error}"})
        if len(reply) > MAX_ANSWER_BYTES:
            return _dump({"error": f"{ask}: the answer has {len(reply)} bytes, at most {MAX_ANSWER_BYTES} are sent"})
        return reply


@contextmanager
def _short(path: str) -> Iterator[str]:
    """Another name of a path, however long that is: addresses of sockets have at most 107 bytes."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def steady(read: Callable[[], T]) -> T:
    """The result of `read`, which iterates over containers that the loop may change meanwhile. Raises RuntimeError."""
    for _ in range(MAX_TRIES):
        try:
            return read()
        except RuntimeError:
            time.sleep(0)
    return read()


def interrupt(node: Node, session: str) -> bool:
    """Ends what the REPL evaluates here, be it an endless loop; False if it is not computing."""
    region = node.regions.get(session)
    return region is not None and region.interrupt("interrupted by its user")


def actors_of(node: Node) -> list[dict[str, Any]]:
    """One row per actor here: name, class, incarnation, messages that wait, methods that run."""
    return [
        {
            "name": name, "class": type(cell.actor).__name__, "incarnation": cell.incarnation,
            "waiting": len(cell.turns) + len(cell.overlapping),
            "running": [delivery.door.method for delivery in cell.at_work()],
            "capacity": cell.actor.mailbox_capacity, "paused": cell.turns.last < Lane.BULK,
        }
        for name, cell in list(node.cells.items())
    ]  # fmt: skip


def tasks_of(loop: asyncio.AbstractEventLoop) -> list[dict[str, Any]]:
    """One row per task: its name, and where it waits, the outermost line first."""
    return [{"name": task.get_name(), "at": _lines(task)} for task in asyncio.all_tasks(loop)]


def _lines(task: asyncio.Task[Any]) -> list[str]:
    """Through the coroutines that a task awaits; Task.get_stack sees the first only."""
    lines: list[str] = []
    waiting: Any = task.get_coro()
    while waiting is not None and len(lines) < 64:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "ag_frame", None)
        if frame is not None:
            lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "ag_await", None)
    return lines


def _dump(reply: dict[str, Any]) -> bytes:
    return orjson.dumps(reply, default=str, option=orjson.OPT_NON_STR_KEYS)
