"""Handlers whose first step is made where their message arrives: nobody can tell but by the clock."""

import asyncio
import contextvars
import shutil
import tempfile
from dataclasses import dataclass

import pytest
from sample_actors import until

from headrace.runtime import Actor, Status, message, timeout
from headrace.runtime.agent import interface_of
from headrace.runtime.cell import Cell
from headrace.runtime.errors import CodecError, RemoteError
from headrace.runtime.node import Node
from headrace.runtime.protocol import Kind, pack_head
from headrace.runtime.turns import Begun

word = contextvars.ContextVar("word", default="")


@dataclass(kw_only=True)
class Careful(Actor):
    """Looks at where it runs."""

    async def start(self):
        self.seen = []
        self.gate = asyncio.get_running_loop().create_future()
        self.busy = 0

    @message
    async def at_once(self, x):
        assert not self.busy
        self.seen.append(x)
        return asyncio.current_task().get_name()

    @message
    async def later(self, x, waits=1):
        self.busy += 1
        assert self.busy == 1
        task, token = asyncio.current_task(), word.set(x)
        try:
            for _ in range(waits):
                await asyncio.sleep(0)
            assert asyncio.current_task() is task and word.get() == x
        finally:
            word.reset(token)
            self.busy -= 1
        self.seen.append(x)

    @message
    async def hold(self, x):
        try:
            await self.gate
        except asyncio.CancelledError:
            self.seen.append(f"{x} cancelled, gate {self.gate.cancelled()}")
            raise

    @message
    async def impatient(self):
        async with asyncio.timeout(0.01):
            await self.gate

    @message
    async def refuse(self, x):
        raise KeyError(x)

    @message
    async def what_is_seen(self):
        return self.seen


class World:
    async def open(self, folder):
        self.a, self.b = (Node(f"{name}#1", f"ipc://{folder}/{name}") for name in "ab")
        self.a.transport.connect("b#1", self.b.transport.address)
        self.b.transport.connect("a#1", self.a.transport.address)
        self.actor = Careful()
        self.cell = self.b.cells["careful"] = Cell(self.actor, "careful", 1, self.b)
        self.task = asyncio.create_task(self.cell.run())
        await self.cell.up
        status = Status(name="careful", node="b#1", state="up", incarnation=1, **interface_of(Careful))
        self.a.directory.update(status)
        self.ref = self.a.ref("careful")
        return self

    def feed(self, *envelopes):
        """These arrive in one message, while no task runs."""
        sizes = [100] * len(envelopes)
        asyncio.get_running_loop().call_soon(self.b._receive_plain, "a#1", [*envelopes], sizes)

    async def close(self):
        self.cell.close()
        await asyncio.wait([self.task])
        await self.a.close()
        await self.b.close()


def request(method, *args, id=1, kind=Kind.CALL):
    return [kind, 2, 60.0, id, pack_head("careful", method, 2, 1), [*args], {}]


@pytest.fixture
async def world():
    folder = tempfile.mkdtemp(prefix="hr-turns-")
    world = await World().open(folder)
    yield world
    await world.close()
    shutil.rmtree(folder)


async def test_those_that_wait_and_those_that_do_not_take_turns_in_the_order_of_arrival(world):
    for number in range(200):
        (world.ref.later if number % 3 == 0 else world.ref.at_once).cast(str(number))
    await world.ref.later("last", waits=3)
    assert await world.ref.what_is_seen() == [*map(str, range(200)), "last"]
    assert world.b.counters["handled"] == world.a.counters["sent"]


async def test_what_ends_at_once_is_answered_where_it_arrives(world):
    await until(lambda: world.cell.turns.awaited)
    world.feed(*(request("at_once", number, id=number) for number in range(5)))
    await until(lambda: len(world.actor.seen) == 5)
    assert world.actor.seen == [*range(5)] and world.cell.turns.peak == 0


async def test_every_turn_is_in_the_same_task(world):
    names = {await world.ref.at_once(number) for number in range(5)}
    await world.ref.later(0)
    assert len(names) == 1 and names == {world.cell._turns.get_name()}


async def test_a_cancellation_that_comes_with_its_message_reaches_what_the_handler_waits_for(world):
    await until(lambda: world.cell.turns.awaited)
    world.feed(request("hold", "x", id=7), [Kind.CANCEL, "careful", 7], request("at_once", "next", id=8))
    await until(lambda: len(world.actor.seen) == 2)
    assert world.actor.seen == ["x cancelled, gate True", "next"]
    assert not world.cell.at_work() and world.b.counters["interrupted"] == 0


async def test_a_message_that_failed_at_once_and_is_cancelled_leaves_the_actor_alive(world):
    await until(lambda: world.cell.turns.awaited)
    world.feed(request("refuse", "x", id=7), [Kind.CANCEL, "careful", 7])
    assert await world.ref.at_once("alive")
    assert not world.task.done()


async def test_an_actor_that_is_stopped_with_its_message_under_way_tells_so(world):
    await until(lambda: world.cell.turns.awaited)
    world.feed(request("hold", "x", id=7))
    asyncio.get_running_loop().call_soon(world.cell.close)
    await asyncio.wait([world.task], timeout=10)
    assert world.task.done() and world.actor.seen == ["x cancelled, gate True"]
    assert world.b.counters["interrupted"] == 1


async def test_errors_timeouts_and_deadlines_are_those_of_any_turn(world):
    with pytest.raises(RemoteError, match="KeyError"):
        await world.ref.refuse("x")
    with pytest.raises(RemoteError, match="TypeError"):
        await world.ref.at_once()
    world.actor.seen.append(object())
    with pytest.raises(CodecError, match="can't travel"):
        await world.ref.what_is_seen()
    world.actor.seen.clear()
    with pytest.raises(RemoteError, match="TimeoutError"):
        await world.ref.impatient()
    world.actor.gate = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        async with timeout(0.05):
            await world.ref.hold("late")
    await until(lambda: world.actor.seen == ["late cancelled, gate True"])
    assert await world.ref.at_once(1)


async def test_a_cast_that_fails_at_once_is_the_failure_of_its_actor(world):
    world.ref.refuse.cast("x")
    await asyncio.wait([world.task], timeout=10)
    assert isinstance(world.task.exception(), KeyError)


async def test_a_task_that_receives_queues_what_it_receives(world):
    await until(lambda: world.cell.turns.awaited)
    world.b._receive_plain("a#1", [request("at_once", "x")], [100])
    assert world.actor.seen == [] and len(world.cell.turns) == 1
    await until(lambda: world.actor.seen == ["x"])


# Begun, by itself


async def first(work):
    """Begins it outside of any task."""
    loop, begun = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    loop.call_soon(lambda: begun.set_result(Begun(work, work.send(None))))
    return await begun


async def test_the_rest_has_the_value_and_the_errors_of_the_whole():
    async def work(fails):
        for _ in range(3):
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        return 1 / (not fails)

    assert await (await first(work(False))) == 1.0
    with pytest.raises(ZeroDivisionError):
        await (await first(work(True)))
    with pytest.raises(KeyError):
        await Begun(None, None, KeyError("x"))


@pytest.mark.parametrize("waits_for", ["future", "turn"])
async def test_what_is_cancelled_before_it_goes_on_may_go_on_all_the_same(waits_for):
    future = asyncio.get_running_loop().create_future()

    async def stubborn():
        try:
            await (future if waits_for == "future" else asyncio.sleep(0))
        except asyncio.CancelledError:
            await asyncio.sleep(0.001)
            return "went on"

    begun = await first(stubborn())
    begun.cancel(asyncio.CancelledError())
    assert await begun == "went on" and future.cancelled() == (waits_for == "future")
