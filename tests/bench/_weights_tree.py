"""The ZeroMQ tree over loopback tcp, beside raw ZeroMQ: the same bytes in chunks of a bucket, to the same receivers.

    raw     a PUSH socket for each receiver, which puts each chunk in its place; no questions, no checksums, no headers
    tree    the publisher serves both receivers (the first two of a tree ask it), each bucket verified

Turn by turn in one run; a rate is what reaches both receivers, a ratio is one of medians.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time

import zmq
from _weights_members import CHUNK_BYTES, Member
from _weights_shm import RECEIVERS, some_tensors

from headrace.benchmark import Bar, Say
from headrace.runtime import System
from headrace.runtime.exchange import Publisher, Route
from headrace.runtime.exchange.tree import TreeSource, sources_of
from headrace.runtime.ref import Ref

TREE_BARS = [Bar("tree_over_raw_zmq_ratio", ">=", 0.8)]

LOOPBACK = "tcp://127.0.0.1:0"
AHEAD = 8
"""Chunks that wait in a raw socket."""
WARM_UP = 2
"""A receiver has two payloads, in turn."""


async def measure_tree(nbytes: int, rounds: int, say: Say) -> dict[str, float]:
    """All figures of this file."""
    tensors = some_tensors(nbytes)
    async with System() as system:
        members = [await system.spawn(Member(), name=f"fetcher_{i}", node=f"fetcher_{i}") for i in range(RECEIVERS)]
        publisher = Publisher("weights")
        manifest = publisher.publish(1, tensors, bfloat16=tensors)
        source = TreeSource(publisher, LOOPBACK)
        try:
            addresses = [source.address, *[await member.listen(LOOPBACK) for member in members]]
            times: dict[str, list[float]] = {"raw": [], "tree": []}
            for turn in range(-WARM_UP, rounds):
                manifest = publisher.publish(2 + WARM_UP + turn, tensors, bfloat16=tensors)
                raw = await _raw(publisher, manifest.generation, manifest.incarnation, members)
                began = time.perf_counter()
                routes = [Route(carrier="tree", rank=r, sources=sources_of(r, addresses)) for r in (1, 2)]
                await asyncio.gather(*(m.fetch(manifest, r) for m, r in zip(members, routes, strict=True)))
                if turn >= 0:
                    times["raw"].append(raw)
                    times["tree"].append(time.perf_counter() - began)
        finally:
            source.close()
            publisher.close()
    raw, tree = (statistics.median(column) for column in times.values())
    say("tree: done")
    total = RECEIVERS * manifest.nbytes
    return {
        "tree_s": tree,
        "tree_bytes_per_s": total / tree,
        "raw_zmq_bytes_per_s": total / raw,
        "tree_over_raw_zmq_ratio": raw / tree,
    }


async def _raw(publisher: Publisher, generation: int, incarnation: int, members: list[Ref]) -> float:
    written = publisher.written(incarnation, generation)
    assert written is not None
    manifest, payload = written
    data = memoryview(payload)[: manifest.nbytes]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = [context.socket(zmq.PUSH) for _ in members]
    for socket in sockets:
        socket.setsockopt(zmq.SNDHWM, AHEAD)
        socket.bind(LOOPBACK)
    addresses = [socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for socket in sockets]  # type: ignore[union-attr]

    def push() -> None:
        for start in range(0, manifest.nbytes, CHUNK_BYTES):
            for socket in sockets:
                socket.send(data[start : start + CHUNK_BYTES], copy=False)

    thread = threading.Thread(target=push)
    began = time.perf_counter()
    thread.start()
    await asyncio.gather(*(m.pull(a, manifest.nbytes) for m, a in zip(members, addresses, strict=True)))
    spent = time.perf_counter() - began
    await asyncio.to_thread(thread.join)
    context.destroy(linger=0)
    return spent
