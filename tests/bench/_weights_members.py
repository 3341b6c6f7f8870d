"""The processes that weights.py sends to. A module of its own, so that they import little."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from headrace.runtime import Actor, message
from headrace.runtime.exchange import Manifest, Receiver
from headrace.runtime.exchange.header import Route, stored
from headrace.runtime.exchange.mapped import Mapped
from headrace.runtime.exchange.tree import TreeSink

CHUNK_BYTES = 1 << 20
"""Of the raw ZeroMQ transfer: as large as a bucket."""


@dataclass(kw_only=True)
class Member(Actor):
    """Receives versions, each into the other one of two sets of arrays; beside that, plain copies of the same bytes."""

    async def start(self) -> None:
        self.receiver = Receiver()
        self.sink: TreeSink | None = None
        self.sets: list[dict[str, np.ndarray]] = []
        self.mapped: dict[int, Mapped] = {}
        """By the publisher's descriptor: it has two buffers and keeps them."""
        self.memory = _Peak()

    async def stop(self, reason: BaseException | None) -> None:
        self.receiver.close()
        for buffer in self.mapped.values():
            buffer.close()
        if self.sink is not None:
            self.sink.close()
        self.memory.close()

    @message(thread=True, deadline_s=120.0)
    def prepare(self, manifest: Manifest) -> None:
        """Makes both sets, with memory behind them, and counts memory from here on."""
        before = self.memory.now()
        self.sets = [{s.name: np.ones(s.shape, stored(s.dtype)) for s in manifest.tensors} for _ in range(2)]
        self.memory.reset(before)

    @message(thread=True, deadline_s=120.0)
    def receive(self, manifest: Manifest) -> float:
        """Through shared memory; returns the seconds it took here."""
        began = time.perf_counter()
        self.receiver.receive(manifest, into=self.sets[0])
        self.sets.reverse()
        return time.perf_counter() - began

    @message(thread=True, deadline_s=120.0)
    def copy(self, manifest: Manifest) -> float:
        """The memcpys of `receive` and nothing else."""
        began = time.perf_counter()
        if manifest.fd not in self.mapped:
            self.mapped[manifest.fd] = Mapped.open(manifest)
        views = manifest.views(self.mapped[manifest.fd].payload)
        for name, target in self.sets[0].items():
            np.copyto(target, views[name])
        self.sets.reverse()
        return time.perf_counter() - began

    @message(deadline_s=10.0)
    async def peak_bytes(self) -> int:
        """Most private memory since `prepare`, beyond what there was before it."""
        return self.memory.peak()

    @message(thread=True, deadline_s=10.0)
    def listen(self, address: str) -> str:
        """Opens the tree's sink; returns where it hands on."""
        self.sets = []
        self.sink = TreeSink(address)
        return self.sink.address

    @message(thread=True, deadline_s=120.0)
    def fetch(self, manifest: Manifest, route: Route) -> float:
        """Through the tree."""
        assert self.sink is not None
        began = time.perf_counter()
        self.sink.receive(manifest, route)
        return time.perf_counter() - began

    @message(thread=True, deadline_s=120.0)
    def pull(self, address: str, nbytes: int) -> float:
        """Chunks from a PUSH socket, each into its place: what ZeroMQ can do."""
        if not self.sets:
            self.sets = [{"raw": np.ones(nbytes, np.uint8)}]
        target, done = self.sets[0]["raw"], 0
        context: Any = zmq.Context.instance()
        with context.socket(zmq.PULL) as socket:
            socket.connect(address)
            began = time.perf_counter()
            while done < nbytes:
                frame = socket.recv(copy=False)
                chunk = np.frombuffer(frame.buffer, np.uint8)
                np.copyto(target[done : done + len(chunk)], chunk)
                done += len(chunk)
            return time.perf_counter() - began


class _Peak:
    """Watches the private memory of this process."""

    EVERY_S = 0.01

    def __init__(self) -> None:
        self._highest = self._before = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        """Bytes; pages that are mapped from elsewhere do not count."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0

    def reset(self, before: int) -> None:
        self._before, self._highest = before, self.now()

    def peak(self) -> int:
        return max(self._highest, self.now()) - self._before

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.EVERY_S):
            self._highest = max(self._highest, self.now())
