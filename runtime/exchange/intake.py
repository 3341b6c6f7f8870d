"""A member's end of an exchange: receives versions on a thread of its own, while the others of its process go on.

    load(manifest, route) -> [weights' thread] sink.receive -> prepare -> what is to be swapped in, on the caller's loop
                                  one after the other            |
    cancelled, or a higher epoch: aborted  <--------------------'

What is received is the second buffer: nothing that is in use is written to, so whatever goes wrong leaves the version
before. The thread has a low priority: it takes the time that generation leaves. Knows nothing of what `prepare` makes.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from ..curve import Keys
from ..errors import BadWeights, TransferFailed
from ..thread import WorkThread
from ..transport import MAX_IPC_PATH_BYTES
from ..zmq_transport import ZmqTransport
from .carrier import Sink
from .fp8 import restore
from .header import Manifest, Route, Seat, host_id
from .shm import Receiver
from .tree import TreeSink

if TYPE_CHECKING:
    from ..actor import Actor

T = TypeVar("T")
Prepare = Callable[[int, Mapping[str, np.ndarray]], T]

CLOSE_S = 30.0
"""For a sink to close; its own limits are shorter."""

NICENESS = 10
"""Of the weights' thread."""


class Intake(Generic[T]):
    """One per member. `prepare(version, tensors)`, on the weights' thread, makes of the tensors what the member uses;
    it copies what it keeps."""

    def __init__(self, prepare: Prepare[T], sinks: Mapping[str, Sink] | None = None) -> None:
        """`sinks`: of carriers beside shared memory, by name."""
        self._prepare = prepare
        self._receiver = Receiver()
        self._sinks: dict[str, Sink] = {"shm": self._receiver, **(sinks or {})}
        self._thread: WorkThread | None = None
        self._turn = asyncio.Lock()
        self._epoch = self._seen = -1
        self._last: tuple[int, int] | None = None
        """Incarnation and version of what was taken last."""
        self._carried: tuple[Manifest, Mapping[str, np.ndarray]] | None = None

    def seat(self, schema: tuple[tuple[str, str, tuple[int, ...]], ...] = ()) -> Seat:
        """For the exchange; see Seat."""
        address, gpu = (
            next((getattr(sink, name) for sink in self._sinks.values() if hasattr(sink, name)), "")
            for name in ("address", "gpu")
        )
        return Seat(
            host=host_id(), gpu=gpu, carriers=tuple(self._sinks), address=address, schema=schema, epoch=self._seen
        )

    async def load(self, manifest: Manifest, route: Route | None = None) -> T:
        """Receives a version and prepares it; cancelled, it stops soon.

        Raises BadWeights (an older version than the last, or what `prepare` refuses), TransferFailed (aborted, or the
        epoch is over) and what the sink's `receive` raises.
        """
        route = route or Route(carrier="shm")
        self._refuse(manifest, route)
        self._seen = max(self._seen, route.epoch)
        if route.epoch > self._epoch:
            self._end(route.epoch - 1)
        async with self._turn:
            self._refuse(manifest, route)
            self._thread = self._thread or WorkThread("weights")
            work = asyncio.ensure_future(self._thread.run(self._receive, manifest, route))
            try:
                prepared = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.to_thread(self._sinks[route.carrier].abort, route.epoch)
                work.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await work
                raise
            self._last = manifest.incarnation, manifest.version
            return prepared

    async def prepare(self, version: int, tensors: Mapping[str, np.ndarray]) -> T:
        """`prepare` on the weights' thread, of tensors that came another way."""
        async with self._turn:
            self._thread = self._thread or WorkThread("weights")
            return await self._thread.run(self._prepare, version, tensors)

    async def transfer(self, manifest: Manifest, route: Route) -> None:
        """Takes part in a collective transfer; what it brings is taken by a `load` of the same manifest. Raises as
        `receive` of the sink, which knows by itself which epochs are over."""
        self._seen = max(self._seen, route.epoch)
        async with self._turn:
            self._thread = self._thread or WorkThread("weights")
            self._carried = None
            tensors = await self._thread.run(self._sinks[route.carrier].receive, manifest, route)
            self._carried = manifest, tensors

    async def retire(self, epoch: int) -> None:
        """Returns when nothing of this epoch or an earlier one goes on, by collective carriers neither."""
        self._end(epoch)
        for sink in self._sinks.values():
            if _collective(sink):
                await asyncio.to_thread(sink.abort, epoch)  # It waits until it is alone.

    def _end(self, epoch: int) -> None:
        """Ends what is of this epoch or an earlier one; members of a collective carrier stay connected."""
        self._epoch = max(self._epoch, epoch)
        self._seen = max(self._seen, epoch)
        for sink in self._sinks.values():
            if not _collective(sink):
                sink.abort(epoch)

    async def close(self) -> None:
        """Gives back what all sinks and the thread have, then raises what one of them raised: TransferFailed,
        CommunicatorHung, TimeoutError for what does not end."""
        failed: list[Exception] = []
        for name, sink in self._sinks.items():
            try:
                if _collective(sink):  # It waits until it is alone.
                    await _within(CLOSE_S, asyncio.to_thread(sink.close), f"the sink of {name} does not close")
                else:
                    sink.close()
            except Exception as error:  # noqa: BLE001 (the others are closed first)
                failed.append(error)
        if self._thread is not None:
            self._thread.close()
        if failed:
            raise failed[0]

    def _refuse(self, manifest: Manifest, route: Route) -> None:
        if route.members and route.epoch <= self._epoch:
            raise TransferFailed(f"epoch {route.epoch} of {manifest.name} is over, epoch {self._epoch + 1} has begun")
        if route.carrier not in self._sinks:
            raise TransferFailed(f"no carrier {route.carrier!r} here; there are {', '.join(self._sinks)}")
        if self._last is not None and self._last[0] == manifest.incarnation and manifest.version < self._last[1]:
            raise BadWeights(
                f"version {manifest.version} of {manifest.name} can't follow {self._last[1]}: versions never go back"
            )

    def _receive(self, manifest: Manifest, route: Route) -> T:
        """On the weights' thread."""
        _give_way()
        if route.carrier == "shm":
            with self._receiver.hold(manifest) as tensors:
                return self._prepare(manifest.version, restore(tensors))
        carried, self._carried = self._carried, None
        if carried is not None and carried[0] == manifest:
            tensors = carried[1]
        else:
            tensors = self._sinks[route.carrier].receive(manifest, route)
        return self._prepare(manifest.version, restore(tensors))


async def _within(seconds: float, work: Coroutine[Any, Any, None], why: str) -> None:
    """As wait_for, of what can't be cancelled."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        raise TimeoutError(f"{why} within {seconds:g} s")
    task.result()


def _collective(sink: Sink) -> bool:
    return bool(getattr(sink, "collective", False))


def place_of(actor: Actor) -> tuple[str, Keys | None]:
    """Where the tree may serve from an actor's process, beside its node's own address, and the keys to that. "" outside
    a system, or where there is no such place."""
    transport = actor._node.transport if actor._node is not None else None
    if not isinstance(transport, ZmqTransport):
        return "", None
    if transport.address.startswith("tcp://"):
        return transport.address.rpartition(":")[0] + ":0", transport.keys
    address = f"{transport.address}.{actor.name.replace('/', '-')}"
    return (address, None) if len(address) < MAX_IPC_PATH_BYTES else ("", None)


def tree_sinks(actor: Actor) -> dict[str, Sink]:
    """A sink of the tree for an actor that others can fetch from."""
    address, keys = place_of(actor)
    return {"tree": TreeSink(address, keys=keys)} if address else {}


def _give_way() -> None:
    """Lowers the priority of this thread, where the system lets it."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
