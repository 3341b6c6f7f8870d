"""Feeds a node with broken messages of a hostile peer, and asks now and then whether it still answers.

    python -P tests/fuzz_frames.py --messages 1000000 --seed 1

Genuine messages of every kind are recorded, then cut, spliced, flipped and restamped; others are random bytes. Knows
nothing of what a frame looks like inside, so it needs no care when the wire format changes.
"""

import argparse
import asyncio
import random
import sys
import time
from contextlib import aclosing

import numpy as np

from headrace.runtime import Actor, Status, message, timeout
from headrace.runtime.agent import interface_of
from headrace.runtime.cell import Cell
from headrace.runtime.errors import RuntimeFault
from headrace.runtime.events import EventLog
from headrace.runtime.inbox import Form, block_sizes, chunks, stamp
from headrace.runtime.memory_transport import MemoryNetwork
from headrace.runtime.node import Node

STAMP_BYTES = len(stamp(Form.BEAT, 0))
ASK_EVERY = 5000


class Target(Actor):
    """Takes anything, so that no broken argument makes it fail."""

    @message
    async def take(self, *args, **kwargs):
        return list(args)

    @message
    async def refuse(self, *args, **kwargs):
        if kwargs.get("really"):
            raise KeyError(args)

    @message(concurrent=True)
    async def wait(self, *args, **kwargs):
        await asyncio.sleep(0.01)

    @message
    async def count(self, *args, **kwargs):
        for number in range(40):
            yield number


class World:
    """A node `b` with the target, a good peer `a`, and what has gone over the wire between them."""

    async def open(self):
        self.network = MemoryNetwork()
        self.events = EventLog(None)
        self.good = Node("a#1", "a", transport=self.network.transport)
        self.node = Node("b#1", "b", self.events, transport=self.network.transport)
        self.good.transport.connect("b#1", "b")
        self.node.transport.connect("a#1", "a")
        target = Target()
        target._node, target._name = self.node, "target"
        self.cell = self.node.cells["target"] = Cell(target, "target", 1, self.node)
        self.task = asyncio.create_task(self.cell.run())
        await self.cell.up
        for node in (self.good, self.node):
            node.directory.update(Status(name="target", node="b#1", state="up", incarnation=1, **interface_of(Target)))
        self.recorded = []
        for transport in (self.good.transport, self.node.transport):
            self._record(transport.control)
        await self._talk()
        large = [b"h" * 10, b"x" * 100, b"y" * 5000]
        self.recorded.append([stamp(Form.BLOCK, 1, block_sizes(large))])
        self.recorded += [[stamp(Form.CHUNK, 1, offset), bytes(piece)] for offset, piece in chunks(large)]
        self.recorded += [[stamp(Form.BEAT, 1)], [stamp(Form.FENCED, 1)]]
        return self

    def _record(self, inbox):
        accept = inbox.accept

        def recording(identity, frames):
            self.recorded.append([bytes(frame) for frame in frames])
            return accept(identity, frames)

        inbox.accept = recording

    async def _talk(self):
        ref = self.good.ref("target")
        await ref.take(1, "two", [3.0, None], {"four": b"5"}, (6, True))
        await ref.take(np.arange(10), np.arange(1000.0), np.float32(1.5))
        ref.take.cast("cast", key="word")
        try:
            await ref.refuse("x", really=True)
        except RuntimeFault:
            pass
        try:
            async with timeout(0.001):
                await ref.wait()
        except RuntimeFault:
            pass
        async with aclosing(ref.count.stream()) as items:
            assert [item async for item in items] == list(range(40))
        for number in range(300):  # Credits flow back.
            await ref.take(number)
        for transport in (self.good.transport, self.node.transport):
            del transport.control.accept

    async def asks_well(self):
        async with timeout(60):
            return await self.good.ref("target").take("still there?") == ["still there?"]

    async def close(self):
        self.cell.close()
        await self.task
        await self.good.close()
        await self.node.close()


def mutate(chance, recorded, serial):
    """The frames of one broken message; most carry a fresh serial number, so that they are looked into."""
    frames = list(chance.choice(recorded))
    if chance.random() < 0.02:
        frames = [chance.randbytes(chance.randrange(60)) for _ in range(chance.randrange(4))]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        if not frames:
            break
        at = chance.randrange(len(frames))
        frames[at] = _damage(chance, frames[at], recorded)
        match chance.randrange(12):
            case 0:
                del frames[at]
            case 1:
                frames.insert(at, frames[chance.randrange(len(frames))])
            case 2:
                chance.shuffle(frames)
    if frames and chance.random() < 0.98:
        form = chance.choice(list(Form)) if chance.random() < 0.1 else frames[0][1] if len(frames[0]) > 1 else 1
        frames[0] = stamp(form, serial) + frames[0][STAMP_BYTES:]
    return frames


def _damage(chance, frame, recorded):
    size = len(frame)
    a, b = sorted((chance.randrange(size + 1), chance.randrange(size + 1)))
    match chance.randrange(7):
        case 0:
            return frame[:a]
        case 1:
            return frame[:a] + frame[b:]
        case 2:
            return frame[:a] + chance.randbytes(chance.randrange(1, 9)) + frame[a:]
        case 3 if size:
            a = min(a, size - 1)
            return frame[:a] + bytes([frame[a] ^ 1 << chance.randrange(8)]) + frame[a + 1 :]
        case 4 if size:
            a = min(a, size - 1)
            return frame[:a] + chance.choice((b"\x00", b"\x7f", b"\xff", b"\xc1", b"\xdf", b"\xcf")) + frame[a + 1 :]
        case 5:
            other = chance.choice(chance.choice(recorded) or [b""])
            return frame[:a] + other[chance.randrange(len(other) + 1) :]
        case _:
            return frame[:a] + b"\xdd\xff\xff\xff\xff" + frame[a:]


async def fuzz(messages, seed, report=lambda line: None):
    """Feeds so many messages; returns the counts. Raises whatever the node lets out, AssertionError if it is harmed."""
    world = await World().open()
    chance = random.Random(seed)
    modules = set(sys.modules)
    began = time.monotonic()
    for number in range(1, messages + 1):
        sender = chance.choice(("evil#1", "a#1")) if chance.random() < 0.1 else f"evil#{number // 50}"
        # The good peer's own serial numbers are low: what is sent in its name must not use them up.
        serial = number if sender.startswith("evil") else 1 << 40 | number
        frames = mutate(chance, world.recorded, serial)
        world.network.inject(sender, "b", frames, bulk=chance.random() < 0.3)
        if number % 100 == 0:
            await asyncio.sleep(0)
        if number % ASK_EVERY == 0 or number == messages:
            world.node.transport.control.forget("a#1")
            assert await world.asks_well()
        if number % 100_000 == 0:
            report(f"{number} messages, {number / (time.monotonic() - began):.0f} per s, {dict(world.node.counters)}")
    assert set(sys.modules) == modules, f"a message made the node import {set(sys.modules) - modules}"
    assert len(world.node.cells) == 1 and world.good.waits.rows() == []
    events = [event for event in world.events.recent if event["event"] == "malformed_message"]
    assert events and all(event["sender"] and event["reason"] for event in events)
    counts = {"messages": messages, "duplicates": world.node.transport.duplicates, **world.node.counters}
    await world.close()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(asyncio.run(fuzz(given.messages, given.seed, print)))  # noqa: T201


if __name__ == "__main__":
    main()
