"""Nodes on a network that loses, doubles, delays and cuts, in virtual time: every call ends as and when it should."""

import asyncio
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_actors import until
from virtual_loop import run

from headrace.runtime import Actor, Status, message, timeout
from headrace.runtime.agent import interface_of
from headrace.runtime.cell import Cell
from headrace.runtime.detector import HeartbeatPolicy
from headrace.runtime.errors import LaunchError, MailboxFull, RuntimeFault
from headrace.runtime.heartbeat import Heartbeats
from headrace.runtime.inbox import Form, stamp
from headrace.runtime.memory_transport import LinkQuality, MemoryNetwork
from headrace.runtime.node import Node


@dataclass(kw_only=True)
class Ledger(Actor):
    """Writes down what it does."""

    pause_s: float = 0.0

    async def start(self) -> None:
        self.done: list[int] = []

    @message(concurrent=True)
    async def do(self, number: int) -> int:
        self.done.append(number)
        await asyncio.sleep(self.pause_s)
        return -number

    @message(concurrent=True)
    async def fail(self, number: int) -> None:
        self.done.append(number)
        raise KeyError(number)

    @message(concurrent=True)
    async def give(self, size: int) -> bytes:
        return bytes(size)

    @message
    async def note(self, number: int) -> None:
        self.done.append(number)


class World:
    """Nodes that know each other, on one network."""

    def __init__(self, network, *names):
        self.network = network
        self.nodes = {name: Node(f"{name}#1", name, transport=network.transport) for name in names}
        for node in self.nodes.values():
            for other in self.nodes.values():
                if other is not node:
                    node.transport.connect(other.key, other.transport.address)
        self.cells = []

    async def host(self, where, actor, name):
        node = self.nodes[where]
        actor._node, actor._name = node, name
        cell = node.cells[name] = Cell(actor, name, 1, node)
        task = asyncio.create_task(cell.run(), name=name)
        self.cells.append((cell, task))
        await cell.up
        for other in self.nodes.values():
            other.directory.update(
                Status(name=name, node=node.key, state="up", incarnation=1, **interface_of(type(actor)))
            )
        return actor

    async def close(self):
        for cell, _ in self.cells:
            cell.close()
        await asyncio.gather(*(task for _, task in self.cells))
        for node in self.nodes.values():
            await node.close()


async def storm(seed, quality, *, calls=60, cuts=True):
    """Calls and casts from two nodes to a third while the network misbehaves. Returns what came of each."""
    chance = random.Random(seed)
    network = MemoryNetwork(seed, quality)
    world = World(network, "a", "b", "c")
    ledger = await world.host("c", Ledger(pause_s=0.01), "ledger")
    loop = asyncio.get_running_loop()
    ends = []

    async def ask(number):
        await asyncio.sleep(chance.uniform(0, 5))
        ref = world.nodes[chance.choice("ab")].ref("ledger")
        patience = chance.uniform(0.05, 3)
        method = chance.choice(["do", "do", "fail", "note"])
        until = loop.time() + patience
        try:
            if chance.random() < 0.2:
                ref.note.cast(number)
                end = "cast"
            else:
                async with timeout(patience):
                    end = await getattr(ref, method)(number)
                assert end == (-number if method == "do" else None)
        except RuntimeFault as fault:
            end = type(fault).__name__
        assert loop.time() <= until + 0.1, f"{method} {number} ended {loop.time() - until:.3f} s late"
        ends.append((number, end))

    async def cut():
        for _ in range(3):
            await asyncio.sleep(chance.uniform(0, 2))
            network.partition(*chance.choice([("a", "c"), ("ab", "c"), ("a", "bc")]))
            await asyncio.sleep(chance.uniform(0, 1))
            network.heal()

    async with asyncio.TaskGroup() as group:
        if cuts:
            group.create_task(cut())
        for number in range(1, calls + 1):
            group.create_task(ask(number))
    await asyncio.sleep(120)
    for node in world.nodes.values():
        assert node.waits.rows() == []
    assert len(ends) == calls
    assert len(ledger.done) == len(set(ledger.done)), "something ran twice"
    answered = {number for number, end in ends if end in (-number, None, "RemoteError")}
    assert answered <= set(ledger.done)
    await world.close()
    return sorted(ends, key=str), sorted(ledger.done), dict(network.counters)


SHARES = st.sampled_from([0.0, 0.05, 0.4])


@given(
    seed=st.integers(0, 2**32),
    drop=SHARES,
    duplicate=SHARES,
    reorder=SHARES,
    delay=st.sampled_from([0.0, 0.02, 0.5]),
    cuts=st.booleans(),
)
@settings(max_examples=60)
def test_every_call_ends_in_time_nothing_runs_twice_and_no_wait_is_left(seed, drop, duplicate, reorder, delay, cuts):
    quality = LinkQuality(drop=drop, duplicate=duplicate, reorder=reorder, delay_s=(0.0, delay))
    ends, done, counters = run(lambda: storm(seed, quality, cuts=cuts), seed, limit_s=1000)
    if drop == 0 and not cuts:
        numbers = {number for number, end in ends if end == "cast"}
        assert numbers <= set(done) and counters.get("dropped", 0) == 0


def test_the_same_seed_is_the_same_run():
    quality = LinkQuality(drop=0.1, duplicate=0.1, reorder=0.1, delay_s=(0.0, 0.1))
    runs = [run(lambda seed=seed: storm(seed, quality), seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert all(runs[0][2][name] > 0 for name in ("sent", "delivered", "dropped", "duplicated", "cut"))


async def two(quality=None):
    world = World(MemoryNetwork(7, quality), "a", "b")
    return world, await world.host("b", Ledger(), "ledger")


def test_a_good_network_keeps_order_and_loses_nothing():
    async def main():
        world, ledger = await two(LinkQuality(delay_s=(0.0, 0.1)))
        ref = world.nodes["a"].ref("ledger")
        for number in range(200):
            ref.note.cast(number)
        await asyncio.sleep(1)
        assert ledger.done == list(range(200))
        await world.close()

    run(main, 3)


def test_a_link_may_be_bad_in_one_direction():
    async def main():
        world, ledger = await two()
        world.network.set_quality(LinkQuality(drop=1.0), "b", "a")
        with pytest.raises(RuntimeFault, match="no answer within 1 s"):
            async with timeout(1):
                await world.nodes["a"].ref("ledger").do(1)
        assert ledger.done == [1]
        world.network.set_quality(LinkQuality())
        assert await world.nodes["a"].ref("ledger").do(2) == -2
        await world.close()

    run(main)


def test_what_is_under_way_is_bounded(monkeypatch):
    from headrace.runtime import transport

    monkeypatch.setattr(transport, "BACKLOG_MESSAGES", 50)

    async def main():
        world, _ = await two(LinkQuality(delay_s=(1.0, 1.0)))
        ref = world.nodes["a"].ref("ledger")
        with pytest.raises(MailboxFull):
            for number in range(100):
                ref.note.cast(number)
        await asyncio.sleep(3)
        ref.note.cast(100)
        await world.close()

    run(main)


def test_an_answer_that_finds_no_room_becomes_an_error_of_its_caller(monkeypatch):
    from headrace.runtime import transport

    monkeypatch.setattr(transport, "BACKLOG_BYTES", 1_000_000)
    monkeypatch.setattr(transport, "RESERVE_BYTES", 100_000)

    async def main():
        world, _ = await two()
        world.network.set_quality(LinkQuality(delay_s=(1.0, 1.0)), "b", "a")
        ref = world.nodes["a"].ref("ledger")
        ends = await asyncio.gather(*(ref.give(300_000) for _ in range(10)), return_exceptions=True)
        assert [type(end) for end in ends] == [bytes] * 3 + [MailboxFull] * 7
        assert "to be sent to a#1, which takes them too slowly" in str(ends[-1])
        assert len(await ref.give(10)) == 10
        await world.close()

    run(main)


def test_an_address_is_taken_once():
    async def main():
        network = MemoryNetwork()
        World(network, "a")
        with pytest.raises(LaunchError, match="can't bind a: a#1 listens there"):
            World(network, "a")

    run(main)


# Heartbeats


def watchers(world, policy, events):
    """Each of two nodes watches the other, as root and remote node do."""
    found = {}
    for name, other in (("a", "b"), ("b", "a")):
        node = world.nodes[name]

        def change(peer, state, silence_s, name=name):
            events.append((name, peer, state))

        found[name] = Heartbeats(node.transport, policy, change)
        found[name].watch(f"{other}#1")
    return found


def test_an_unsteady_network_makes_nobody_lost():
    async def main():
        world, _ = await two(LinkQuality(drop=0.05, duplicate=0.05, reorder=0.1, delay_s=(0.0, 0.9)))
        events = []
        beats = watchers(world, HeartbeatPolicy(), events)
        await asyncio.sleep(3000)
        assert "lost" not in {state for _, _, state in events} and len(events) < 300
        assert [row["state"] for row in beats["a"].rows()] in (["alive"], ["suspect"])
        for watcher in beats.values():
            watcher.close()
        await world.close()

    run(main, 5)


def test_a_partitioned_node_is_lost_and_told_so_when_it_returns():
    async def main():
        world, ledger = await two(LinkQuality(delay_s=(0.0, 0.05)))
        a, b = world.nodes["a"], world.nodes["b"]
        loop, events, told = asyncio.get_running_loop(), [], []
        beats = watchers(world, HeartbeatPolicy(), events)
        b.transport.on_fenced = lambda peer: told.append((peer, loop.time()))
        await asyncio.sleep(100)
        world.network.partition("a", "b")
        cut = loop.time()
        await until(lambda: ("a", "b#1", "lost") in events)
        assert loop.time() - cut < 8 and ("a", "b#1", "suspect") in events
        a.peer_down("b#1", "lost")
        beats["a"].forget("b#1")
        await asyncio.sleep(50)
        assert not told
        world.network.heal()
        healed = loop.time()
        b.cast("ledger", "note", (1,), {})  # It works on for itself,
        beats["b"].close()
        b.transport.beat("a#1")
        await asyncio.sleep(1)
        assert told and told[0][0] == "a#1" and told[0][1] - healed < 1
        assert ledger.done == [1]
        b.directory.update(Status(name="x", node="a#1", state="up", incarnation=1, messages={"m": (2, 1.0)}))
        b.cast("x", "m", (), {})  # but what it sends is refused.
        await asyncio.sleep(1)
        assert a.counters["fenced"] == 1 and a.counters["dead_letters"] == 0
        beats["a"].close()
        await world.close()

    run(main, 9)


def test_who_hears_nothing_of_its_root_finds_out_and_who_stood_still_blames_nobody():
    async def main():
        world, _ = await two()
        loop, events = asyncio.get_running_loop(), []
        beats = watchers(world, HeartbeatPolicy(grace_s=20.0), events)
        await asyncio.sleep(60)
        loop.now += 500  # Both at a standstill: one process, one loop.
        await asyncio.sleep(60)
        assert not events
        world.network.partition("a", "b")
        await asyncio.sleep(20)
        assert {state for _, _, state in events} == {"suspect"}
        await asyncio.sleep(20)
        assert {("a", "b#1", "lost"), ("b", "a#1", "lost")} <= set(events)
        for watcher in beats.values():
            watcher.close()
        await world.close()

    run(main, 2)


def test_a_message_is_a_sign_of_life():
    async def main():
        world, _ = await two()
        events = []
        beats = watchers(world, HeartbeatPolicy(), events)
        await asyncio.sleep(30)
        a, b = world.nodes["a"], world.nodes["b"]
        b.transport.beat = lambda peer: None  # Its beats don't get through, its answers do.
        for _ in range(200):
            await a.ref("ledger").do(1)
            await asyncio.sleep(0.4)
        assert not events
        for watcher in beats.values():
            watcher.close()
        await world.close()

    run(main)


def test_beats_of_strangers_and_injected_rubbish_are_nothing():
    async def main():
        world, _ = await two()
        events = []
        beats = watchers(world, HeartbeatPolicy(), events)
        world.network.inject("who#1", "a", [stamp(Form.BEAT, 1)])
        world.network.inject("who#1", "a", [stamp(Form.CHUNK, 1, b"?"), b""], bulk=True)
        world.network.inject("who#1", "a", [])
        assert world.nodes["a"].counters["malformed"] == 1 and [row["peer"] for row in beats["a"].rows()] == ["b#1"]
        for watcher in beats.values():
            watcher.close()
        await world.close()

    run(main)
