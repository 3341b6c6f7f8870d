"""Serves buckets of payloads to whoever asks for them over ZeroMQ, on a thread of its own.

    DEALER --- first, count of (incarnation, generation) ---> ROUTER --- header, bucket --- header, bucket ---> DEALER

What is asked for and still on its way here is sent as soon as it has come: so a member hands on a version while it
receives it. What will never be here is answered by an empty bucket: ask another. Whoever asks sets the pace, and one
that has died or stopped costs nobody anything. Knows nothing of who asks, or of versions beyond their numbers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct

import numpy as np
import zmq

from ..curve import Gate, Keys
from ..errors import LaunchError, TransferFailed
from ..transport import check_address, resolve
from .header import BucketHeader, Manifest

ASK = Struct("<QQqII")
"""Incarnation, generation, epoch, first bucket, how many."""

MAX_ASK_BYTES = 1024
"""Of a frame of those who ask; the handshake has frames, too."""

MAX_ASKED = 64
"""Buckets in one question."""

MAX_WAITING = 256
"""Askers that wait for buckets to come; beyond them the first is forgotten, and will ask elsewhere."""

CLOSE_S = 5.0
"""For its thread to end."""

Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class Work:
    """A payload, whole or growing from its start."""

    manifest: Manifest
    payload: np.ndarray
    """uint8 [nbytes or more]"""
    num_here: int
    """Buckets that are here."""


class Shelf:
    """The server. `find` gives what is there of (incarnation, generation), from its thread; call `grown` when a payload
    has grown, from any. `growing`: what is not there may yet come."""

    def __init__(
        self, address: str, find: Callable[[int, int], Work | None], *, growing: bool, keys: Keys | None = None
    ) -> None:
        """Binds `address`, port 0 for any. With keys it lets in who has them, and needs the loop that runs here.

        Raises LaunchError if it can't, or if the address can be reached from elsewhere and there are no keys.
        """
        check_address(address, keys)
        self._find = find
        self._growing = growing
        self._waiting: dict[bytes, list[bytes]] = {}
        """Who asks -> questions, in order, of which the first can't be answered yet."""
        self._context: zmq.Context[Socket] = zmq.Context(io_threads=1)
        self._gate: Gate | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        router = self._context.socket(zmq.ROUTER)
        try:
            if keys is not None and address.startswith("tcp://"):
                self._gate = Gate(self._context, keys, lambda why: None)
                keys.guard(router)
            router.setsockopt(zmq.LINGER, 0)
            router.setsockopt(zmq.SNDHWM, 0)  # Questions are bounded, so answers are; a ROUTER drops what is beyond.
            router.setsockopt(zmq.MAXMSGSIZE, MAX_ASK_BYTES)
            router.bind(resolve(address) if address.startswith("tcp://") else address)
        except zmq.ZMQError as error:
            router.close()
            self._release()
            raise LaunchError(f"can't bind {address} for weights: {zmq.strerror(error.errno or 0)}") from None
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, args=(router,), name="weights/shelf", daemon=True)
        self._thread.start()

    def grown(self) -> None:
        """There is more of something."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Raises TransferFailed if its thread does not end: then it keeps its sockets."""
        self._closing = True
        self.grown()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise TransferFailed(f"what serves weights at {self.address} has not ended within {CLOSE_S:g} s")
        self._release()

    def _release(self) -> None:
        if self._gate is not None:
            self._gate.close()
        os.close(self._wake)
        self._context.destroy(linger=0)

    def _serve(self, router: Socket) -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
                waiting, self._waiting = self._waiting, {}
                for who, questions in waiting.items():
                    for question in questions:
                        self._answer(router, who, question)
            if router in ready:
                who, *rest = router.recv_multipart()
                if len(rest) == 1 and len(rest[0]) == ASK.size:
                    self._answer(router, who, rest[0])
        router.close(linger=0)

    def _answer(self, router: Socket, who: bytes, question: bytes) -> None:
        """Sends what was asked for, or keeps the part of the question that can't be answered yet."""
        incarnation, generation, epoch, first, count = ASK.unpack(question)
        work = self._find(incarnation, generation)
        if who in self._waiting or (work is None and self._growing):
            return self._wait(who, question)
        if work is None or count > MAX_ASKED or first + count > len(work.manifest.checksums):
            return self._send(router, who, BucketHeader(-1, epoch, incarnation, generation, first, 0, 0, 0), b"")
        manifest, num_buckets = work.manifest, len(work.manifest.checksums)
        for index in range(first, first + count):
            if index >= work.num_here:
                return self._wait(who, ASK.pack(incarnation, generation, epoch, index, first + count - index))
            data = work.payload[manifest.bucket(index)]
            version, expected = manifest.version, manifest.checksums[index]
            head = BucketHeader(version, epoch, incarnation, generation, index, num_buckets, len(data), expected)
            self._send(router, who, head, data.data)
        return None

    def _wait(self, who: bytes, question: bytes) -> None:
        """Keeps a question until there is more. Who asks too much, or has gone, is forgotten with time."""
        while len(self._waiting) >= MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
        questions = self._waiting.setdefault(who, [])
        if len(questions) < MAX_ASKED:
            questions.append(question)

    def _send(self, router: Socket, who: bytes, head: BucketHeader, data: memoryview | bytes) -> None:
        router.send(who, zmq.SNDMORE)
        router.send(head.pack(), zmq.SNDMORE)
        router.send(data, copy=False)
