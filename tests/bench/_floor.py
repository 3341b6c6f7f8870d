"""The raw floors of actors.py: what pyzmq on uvloop's descriptor can do, with nothing of the runtime.

    python -P _floor.py ADDRESS          the answering side, in a process of its own
    Floor(ADDRESS)                       the asking side, in the loop of the benchmark

Two ways to send, both drained at each wake-up until EAGAIN:

    single       a ZeroMQ message per call: "FD", the floor of latency
    coalesced    the calls of one loop turn, at most BATCH, in one ZeroMQ message of msgpack: "Z", the ceiling of rates

A message says for whom it is and what is asked, about 100 bytes in all, and ends in a plain function there. A call is
awaited by a task, as every call of an asyncio program is. There is no deadline, no mailbox, no credit, no supervision.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

BATCH = 256
"""Envelopes per frame: past the knee of the curve."""

SINGLE, COALESCED, CASTS, COUNT = b"S", b"Z", b"C", b"Q"
READY = b"ready\n"
TO, ECHO, NOTE = "callee", "echo", "note"

Envelope = tuple[int, str, str, bytes]
"""Number, actor, message, payload."""

pack = msgpack.Packer().pack


class _Socket:
    """A plain socket that calls `on_message` for each message there is, at each wake-up of the loop."""

    def __init__(self, kind: int, context: zmq.Context[Any]) -> None:
        self.zmq: zmq.Socket[bytes] = context.socket(kind)
        self.zmq.setsockopt(zmq.LINGER, 0)
        self.zmq.setsockopt(zmq.SNDHWM, 4096)
        self.zmq.setsockopt(zmq.RCVHWM, 4096)

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self.zmq.fileno(), self.drain)
        self.drain()

    def on_message(self, parts: list[zmq.Frame]) -> None:
        raise NotImplementedError

    def drain(self) -> None:
        receive = self.zmq.recv_multipart
        try:
            while True:
                self.on_message(receive(zmq.NOBLOCK, copy=False))
        except zmq.Again:
            return

    def rearm(self) -> None:
        """After a send, which may have swallowed the edge of the descriptor."""
        if int(self.zmq.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self.drain()


class Floor(_Socket):
    """The asking side. `close` ends the answering side too."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="headrace-floor-")
        address = f"ipc://{self._folder}/floor"
        command = [sys.executable, "-P", str(Path(__file__).resolve()), address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != READY:
            raise RuntimeError(f"{' '.join(command)} did not start")
        self._context: zmq.Context[Any] = zmq.Context()
        super().__init__(zmq.DEALER, self._context)
        self.zmq.connect(address)
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._queue: deque[Envelope] = deque()
        self._casts: deque[Envelope] = deque()
        self._flushing = False
        self._id = 0
        self.start()

    def call(self, payload: bytes) -> asyncio.Future[Any]:
        """One message there, one back."""
        answer = self._begin()
        self.zmq.send(SINGLE + pack((self._id, TO, ECHO, payload)), zmq.NOBLOCK)
        self.rearm()
        return answer

    def call_array(self, array: np.ndarray) -> asyncio.Future[Any]:
        """An array there, without a copy on this side; its first and last byte back."""
        answer = self._begin()
        self.zmq.send_multipart([SINGLE + pack((self._id, TO, ECHO, b"")), array.data], zmq.NOBLOCK, copy=False)
        self.rearm()
        return answer

    def call_coalesced(self, payload: bytes) -> asyncio.Future[Any]:
        """Shares a message with what else is asked in this turn of the loop."""
        answer = self._begin()
        self._queue.append((self._id, TO, ECHO, payload))
        if len(self._queue) >= BATCH:
            self._flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return answer

    async def casts(self, payload: bytes, count: int) -> int:
        """Sends `count` coalesced messages; returns how many have arrived."""
        queue = self._casts
        for _ in range(count):
            if self.cast(payload):
                await self._room()
        while queue:
            self._flush_casts()
            await self._room()
        answer = self._begin()
        self.zmq.send(COUNT + pack((self._id, b"")))
        self.rearm()
        return int(await answer)

    def cast(self, payload: bytes) -> bool:
        """Queues a message; whether it is time to wait, for the socket takes no more."""
        self._id += 1
        self._casts.append((self._id, TO, NOTE, payload))
        return len(self._casts) >= BATCH and not self._flush_casts()

    def _flush_casts(self) -> bool:
        try:
            self.zmq.send(CASTS + pack(list(self._casts)), zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._casts.clear()
        return True

    async def _room(self) -> None:
        while not int(self.zmq.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:  # noqa: ASYNC110 (the edge may be gone)
            await asyncio.sleep(0.001)

    def on_message(self, parts: list[zmq.Frame]) -> None:
        answers = msgpack.unpackb(parts[0].buffer)
        for id, value in answers:
            answer = self._pending.pop(id)
            if not answer.done():
                answer.set_result(value)

    def close(self) -> None:
        self._loop.remove_reader(self.zmq.fileno())
        self.zmq.close(linger=0)
        self._context.term()
        self.process.kill()
        self.process.communicate()
        for file in Path(self._folder).iterdir():
            file.unlink()
        os.rmdir(self._folder)

    def _begin(self) -> asyncio.Future[Any]:
        self._id += 1
        answer = self._pending[self._id] = self._loop.create_future()
        return answer

    def _flush(self) -> None:
        self._flushing = False
        queue = self._queue
        if queue:
            self.zmq.send(COALESCED + pack(list(queue)), zmq.NOBLOCK)
            queue.clear()
            self.rearm()


class _Answering(_Socket):
    """The answering side: says everything back."""

    def __init__(self, address: str) -> None:
        super().__init__(zmq.ROUTER, zmq.Context())
        self.zmq.bind(address)
        self._received = 0
        self._handlers = {ECHO: self._echo, NOTE: self._note}

    def on_message(self, parts: list[zmq.Frame]) -> None:
        sender, frame = bytes(parts[0].buffer), parts[1].buffer
        kind, body = bytes(frame[:1]), msgpack.unpackb(frame[1:])
        if kind == SINGLE:
            id, _, method, payload = body
            if len(parts) == 3:
                array = np.frombuffer(parts[2].buffer, np.uint8)
                self._answer(sender, [(id, int(array[0]) + int(array[-1]))])
            else:
                self._answer(sender, [(id, self._handlers[method](payload))])
        elif kind == COALESCED:
            handlers = self._handlers
            self._answer(sender, [(id, handlers[method](payload)) for id, _, method, payload in body])
        elif kind == CASTS:
            handlers = self._handlers
            for _, _, method, payload in body:
                handlers[method](payload)
        else:
            self._answer(sender, [(body[0], self._received)])
            self._received = 0

    def _echo(self, payload: bytes) -> bytes:
        return payload

    def _note(self, payload: bytes) -> bytes:
        self._received += 1
        return b""

    def _answer(self, sender: bytes, answers: list[Any]) -> None:
        self.zmq.send_multipart([sender, pack(answers)], zmq.NOBLOCK)


def memcpy_s(target: np.ndarray, source: np.ndarray) -> float:
    """Seconds that one copy between warm pages takes on one core."""
    from time import perf_counter

    np.copyto(target, source)
    began = perf_counter()
    np.copyto(target, source)
    return perf_counter() - began


async def _answer_until_eof(address: str) -> None:
    _Answering(address).start()
    os.write(1, READY)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    await ended.wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_answer_until_eof(sys.argv[1]))
