"""The actor contract: what @message accepts, what an instance is without a runtime, what its thread and tasks do."""

import asyncio
import threading
import time
from dataclasses import dataclass

import pytest
from sample_actors import Echo, Streamer, Thinker

from headrace.runtime import Actor, Lane, message, timeout
from headrace.runtime.deadline import current_scope, deadline_of_call, enter


def test_messages_are_declared_and_inherited():
    class Child(Echo):
        @message(concurrent=True, lane=Lane.BULK, deadline_s=1.5)
        async def more(self) -> None: ...

    spec = Child.messages["more"]
    assert (spec.kind, spec.concurrent, spec.lane, spec.deadline_s) == ("async", True, Lane.BULK, 1.5)
    assert Child.messages["echo"] is Echo.messages["echo"] and "more" not in Echo.messages
    assert Thinker.messages["think"].kind == "thread" and Streamer.messages["count"].kind == "stream"
    assert "start" not in Echo.messages


def test_methods_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="must be `async def`, or declare thread=True"):

        @message
        def plain(self) -> None: ...

    with pytest.raises(TypeError, match="must be `def` with thread=True"):

        @message(thread=True)
        async def both(self) -> None: ...

    with pytest.raises(TypeError, match="public name"):

        @message
        async def _hidden(self) -> None: ...

    with pytest.raises(ValueError, match="deadline_s must be > 0, got 0"):

        @message(deadline_s=0)
        async def late(self) -> None: ...


def test_an_override_says_again_that_it_is_a_message():
    with pytest.raises(TypeError, match=r"Forgetful.echo overrides a @message: it must be marked @message too"):

        class Forgetful(Echo):
            async def echo(self, value): ...


async def test_an_instance_is_plain_python():
    actor = Echo(prefix="> ")
    await actor.start()
    assert await actor.prefixed("hi") == "> hi"
    streamer = Streamer()
    await streamer.start()
    assert [i async for i in streamer.count(3)] == [0, 1, 2] and streamer.closed == 1
    assert actor.name == ""
    actor.log("nobody listens")
    with pytest.raises(RuntimeError, match=r"Echo.find\('x'\): this actor is not in a running system"):
        actor.find("x")
    with pytest.raises(RuntimeError, match="not in a running system"):
        actor.watch("x")


async def test_in_thread_always_uses_the_same_thread_and_keeps_the_loop_free():
    actor = Actor()
    first = await actor.in_thread(threading.get_ident)
    assert first == await actor.in_thread(threading.get_ident) != threading.get_ident()
    working = asyncio.create_task(actor.in_thread(time.sleep, 0.2))
    turns = 0
    while not working.done():
        turns += 1
        await asyncio.sleep(0.005)
    assert turns > 3
    assert all(t.daemon for t in threading.enumerate() if t.ident == first), "must not hold up the end of the process"


async def test_in_thread_passes_errors_on_even_those_a_future_refuses():
    actor = Actor()
    with pytest.raises(ZeroDivisionError):
        await actor.in_thread(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        await asyncio.wait_for(actor.in_thread(next, iter(())), 10)
    assert isinstance(caught.value.__cause__, StopIteration)
    with pytest.raises(SystemExit):
        await actor.in_thread(exit_now)
    assert await actor.in_thread(int, 7) == 7


def exit_now():
    raise SystemExit(2)


async def test_cancelled_work_is_waited_for_if_it_runs_and_skipped_if_not():
    actor, log = Actor(), []
    begun = threading.Event()

    def work(tag):
        begun.set()
        time.sleep(0.15)
        log.append(tag)

    running, queued = (asyncio.create_task(actor.in_thread(work, tag)) for tag in "ab")
    await asyncio.to_thread(begun.wait)
    queued.cancel()
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0.01)
    assert not running.done(), "nothing else may touch the actor while its thread computes"
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == ["a"]
    with pytest.raises(asyncio.CancelledError):
        await queued
    await actor.in_thread(log.append, "c")
    assert log == ["a", "c"]


async def test_a_background_task_has_no_deadline_of_who_started_it():
    actor, seen = Actor(), []

    async def work():
        seen.append(deadline_of_call(current_scope(), 0.0, 60.0))

    async with timeout(5):
        await actor.background(work(), name="work")
    assert seen == [60.0]


@dataclass
class _Worker:
    """What works on a message that must be done by then."""

    limit: float
    chosen = False
    owner = "a.b"


async def test_which_deadline_a_call_gets():
    now = asyncio.get_running_loop().time()

    def due():
        return deadline_of_call(current_scope(), now, 60.0)

    assert due() == now + 60
    async with timeout(600):
        assert now + 599 < due() < now + 601, "a block may give more than the default"
        async with timeout(5):
            assert due() < now + 6
            async with timeout(50):
                assert due() < now + 6, "but never more than the block around it"
        enter(_Worker(now + 1000))
        assert due() == now + 60, "the limit of a message does not lift a default"
        enter(_Worker(now + 10))
        assert due() == now + 10
    assert due() == now + 60


async def test_timeout_raises_timeout_error_also_on_a_busy_loop():
    with pytest.raises(TimeoutError):
        async with timeout(0.01):
            await asyncio.sleep(10)
    with pytest.raises(TimeoutError):
        async with timeout(0):
            await asyncio.sleep(10)
    task = asyncio.current_task()
    async with timeout(0.01):
        time.sleep(0.05)  # noqa: ASYNC251 (a loop that does not turn)
    await asyncio.sleep(0.02)
    assert task.cancelling() == 0


@dataclass(kw_only=True)
class _Configured(Actor):
    size: int = 3


def test_fields_are_configuration():
    assert _Configured(size=5).size == 5
    with pytest.raises(TypeError):
        _Configured(5)
