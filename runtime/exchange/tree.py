"""Weights over ZeroMQ, to hosts without GPUs: each member fetches from another one, which may still be receiving.

    publisher --+--> a --+--> c        a question for some buckets at a time, a few questions under way:
                |        '--> d        who receives sets the pace
                '--> b --+--> e        a source that is silent for `stall_s` is passed over for the next: its own
                         '--> f        source, and at last the publisher

So one that dies, stops or is slow costs those behind it the time to notice it, and nobody else anything. Every bucket
says which version, epoch and incarnation it is of, and is compared with the manifest's checksum when it has come.
Knows nothing of what the tensors are for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import zmq

from ..curve import Keys
from ..errors import CorruptWeights, StaleIncarnation, TransferFailed
from . import payload as payloads
from .carrier import Copy
from .header import BucketHeader, Manifest, Route, checksum
from .shelf import ASK, CLOSE_S, Shelf, Socket, Work
from .shm import Publisher

BUCKETS_ASKED = 4
QUESTIONS = 4
"""Buckets in a question, and questions under way: what is in flight to one member."""

FANOUT = 2
"""Members that fetch from one."""

PATIENCE = 4
"""Stalls after which a source that goes on like this until the deadline would have brought too little is too slow."""

SILENCES = 8
"""Stalls in a row after which a publisher is taken for gone: it is asked for another manifest."""

NEVER = 1 << 63
"""An epoch after all others."""

POLL_MS = 20
"""How soon an abort is noticed."""


def sources_of(rank: int, addresses: Sequence[str]) -> tuple[str, ...]:
    """Whom the member with this rank asks, best first: its parent in the tree, that one's parent, at last the
    publisher, whose address is the first of `addresses`. Members without an address hand nothing on."""
    able = [0, *(r for r in range(1, len(addresses)) if addresses[r])]
    place = able.index(rank) if rank in able else len(able) + rank
    found = []
    while place > 0:
        place = min((place - 1) // FANOUT, len(able) - 1)
        found.append(addresses[able[place]])
    return tuple(found)


class TreeSource:
    """The publisher's end: serves what a Publisher has laid out, from where it lies."""

    collective: ClassVar[bool] = False

    def __init__(self, publisher: Publisher, address: str, *, keys: Keys | None = None) -> None:
        """See Shelf."""
        self._publisher = publisher
        self._shelf = Shelf(address, self._find, growing=False, keys=keys)
        self.address = self._shelf.address

    def open(self, epoch: int) -> tuple[str, bytes]:
        return self.address, b""

    def send(self, manifest: Manifest, route: Route) -> None:
        """Nothing: members come and fetch."""

    def abort(self, epoch: int) -> None:
        """Nothing: members stop asking."""

    def close(self) -> None:
        self._shelf.close()

    def _find(self, incarnation: int, generation: int) -> Work | None:
        found = self._publisher.written(incarnation, generation)
        return None if found is None else Work(*found, num_here=len(found[0].checksums))


class TreeSink:
    """A member's end. What it gives stays valid until the receive after the next one: it has two payloads, in turn."""

    def __init__(self, address: str = "", *, keys: Keys | None = None) -> None:
        """`address`: where to hand on what is received; empty not to."""
        self._keys = keys
        self._works: list[Work | None] = [None, None]
        self._context: zmq.Context[Socket] = zmq.Context(io_threads=1)
        self._aborted = -1
        self._receiving = threading.Lock()
        self._shelf = Shelf(address, self._find, growing=True, keys=keys) if address else None
        self.address = self._shelf.address if self._shelf is not None else ""
        self.passed_over: dict[str, None] = {}
        """Sources that were silent, or had nothing, since the last receive began."""

    def receive(
        self,
        manifest: Manifest,
        route: Route,
        into: Mapping[str, np.ndarray] | None = None,
        copies: Sequence[Copy] | None = None,
    ) -> Mapping[str, np.ndarray]:
        """See Sink. Without `into`, the tensors where they were received."""
        manifest.check()
        targets = into if into is None or copies is not None else payloads.targets_for(manifest, into)
        with self._receiving:
            work = self._begin(manifest)
            self.passed_over.clear()
            _Fetch(self, work, route).run()
        received = manifest.views(work.payload)
        if targets is None:
            return received
        if copies is not None:
            payloads.copy_boxes(work.payload, manifest, targets, copies)
            return targets
        for name, target in targets.items():
            np.copyto(target, received[name])
        return targets

    def abort(self, epoch: int) -> None:
        self._aborted = max(self._aborted, epoch)

    def aborted(self, epoch: int) -> bool:
        return epoch <= self._aborted

    def grown(self) -> None:
        if self._shelf is not None:
            self._shelf.grown()

    def dealer(self, address: str) -> Socket:
        """A socket that asks the one at `address`."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, 20)
        if self._keys is not None and address.startswith("tcp://"):
            self._keys.introduce(dealer)
        dealer.connect(address)
        return dealer

    def close(self) -> None:
        """Ends a receive that goes on, within some `POLL_MS`; there can't be another one. Raises TransferFailed."""
        self._aborted = NEVER
        if not self._receiving.acquire(timeout=CLOSE_S):
            raise TransferFailed(f"a receive by the tree has not ended within {CLOSE_S:g} s")
        try:
            self._context.destroy(linger=0)
            if self._shelf is not None:
                self._shelf.close()
            self._works = [None, None]
        finally:
            self._receiving.release()  # Whoever waits to receive is told that it is over.

    def _begin(self, manifest: Manifest) -> Work:
        """The payload to receive into: what is there of this very version goes on, else the older one gives way."""
        for work in self._works:
            if work is not None and work.manifest == manifest:
                return work
        oldest = self._works.pop(0)
        fits = oldest is not None and manifest.nbytes <= len(oldest.payload) <= 2 * manifest.nbytes
        payload = oldest.payload if oldest is not None and fits else np.empty(manifest.nbytes, np.uint8)
        work = Work(manifest, payload, num_here=0)
        self._works.append(work)
        return work

    def _find(self, incarnation: int, generation: int) -> Work | None:
        wanted = incarnation, generation
        return next((w for w in self._works if w and (w.manifest.incarnation, w.manifest.generation) == wanted), None)


class _Fetch:
    """One receive: asks source after source until all buckets are here, in order."""

    def __init__(self, sink: TreeSink, work: Work, route: Route) -> None:
        self._sink = sink
        self._work = work
        self._route = route
        self._until = time.monotonic() + route.deadline_s
        self._num_buckets = len(work.manifest.checksums)

    def run(self) -> None:
        """Raises TransferFailed if it was aborted, TimeoutError past the deadline, StaleIncarnation, CorruptWeights."""
        sources, silent = deque(self._route.sources), 0
        self._check(time.monotonic())
        while self._work.num_here < self._num_buckets:
            source = sources.popleft() if len(sources) > 1 else sources[0]
            dealer, last, here = self._sink.dealer(source), source == sources[-1], self._work.num_here
            try:
                if self._from(dealer, last=last):
                    return
            finally:
                dealer.close(linger=0)
            self._sink.passed_over[source] = None
            silent = silent + 1 if last and self._work.num_here == here else 0
            if silent == SILENCES:
                raise self._stale(f"its publisher has been asked {SILENCES} times and is silent")

    def _from(self, dealer: Socket, *, last: bool) -> bool:
        """Fetches what is missing from one source; False once it is silent, too slow, or has nothing."""
        manifest, epoch, asked = self._work.manifest, self._route.epoch, self._work.num_here
        began, began_at = asked, time.monotonic()
        heard_at = began_at
        while (here := self._work.num_here) < self._num_buckets:
            while asked < self._num_buckets and asked - here <= (QUESTIONS - 1) * BUCKETS_ASKED:
                count = min(BUCKETS_ASKED, self._num_buckets - asked)
                dealer.send(ASK.pack(manifest.incarnation, manifest.generation, epoch, asked, count))
                asked += count
            if dealer.poll(POLL_MS):
                heard_at = time.monotonic()
                try:
                    if not self._take(*dealer.recv_multipart(copy=False), last=last):
                        return False
                except CorruptWeights:
                    if last:
                        raise
                    return False  # It has begun to receive something newer in the place of this.
            now = time.monotonic()
            self._check(now)
            if now - heard_at > self._route.stall_s:
                return False
            spent = now - began_at
            left, got = self._num_buckets - self._work.num_here, self._work.num_here - began
            if not last and spent > PATIENCE * self._route.stall_s and spent * left > (self._until - now) * got:
                return False
        return True

    def _take(self, *frames: zmq.Frame, last: bool) -> bool:
        """Puts a bucket in its place; False if the source has it not."""
        work, manifest = self._work, self._work.manifest
        head, data = BucketHeader.unpack(frames[0].buffer), frames[-1].buffer
        if not head.nbytes:
            if last:
                raise self._stale("its publisher has it no more")
            return False
        place = manifest.bucket(work.num_here)
        said = head.version, head.epoch, head.incarnation, head.generation, head.index, head.nbytes, len(data)
        size = place.stop - place.start
        due = (
            manifest.version, self._route.epoch, manifest.incarnation, manifest.generation, work.num_here, size, size
        )  # fmt: skip
        if said != due:
            raise CorruptWeights(f"a bucket of {manifest.name} says it is {said}, and {due} was asked for")
        target = work.payload[place]
        np.copyto(target, np.frombuffer(data, np.uint8))
        if checksum(target) != manifest.checksums[work.num_here]:
            raise CorruptWeights(
                f"bucket {head.index} of version {manifest.version} of {manifest.name} does not match its checksum"
            )
        work.num_here += 1
        self._sink.grown()
        return True

    def _stale(self, why: str) -> StaleIncarnation:
        manifest = self._work.manifest
        return StaleIncarnation(
            f"version {manifest.version} of {manifest.name} can't be fetched: {why}; ask for the newest"
        )

    def _check(self, now: float) -> None:
        """Raises if the fetch is to end."""
        manifest = self._work.manifest
        what = f"version {manifest.version} of {manifest.name}: {self._work.num_here} of {self._num_buckets} buckets"
        if self._sink.aborted(self._route.epoch):
            raise TransferFailed(f"{what} had come when epoch {self._route.epoch} was aborted")
        if now > self._until:
            silent = ", ".join(self._sink.passed_over) or "none"
            raise TimeoutError(f"{what} within {self._route.deadline_s:g} s; sources that were silent: {silent}")
