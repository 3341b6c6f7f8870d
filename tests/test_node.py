"""Messages between two nodes of this process, over real sockets: calls, casts, streams, credits, deadlines, fencing."""

import asyncio
import gc
import shutil
import tempfile
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from sample_actors import Echo, Point, Relay, Small, Streamer, Thinker, until

from headrace.runtime import Actor, Status, message, timeout
from headrace.runtime.agent import interface_of
from headrace.runtime.cell import Cell
from headrace.runtime.errors import (
    ActorDied,
    ActorRestarted,
    CodecError,
    DeadlineExceeded,
    MailboxFull,
    RemoteError,
    UnknownActor,
    UnknownMessage,
)
from headrace.runtime.events import EventLog
from headrace.runtime.exits import Exit
from headrace.runtime.node import Node
from headrace.runtime.protocol import CALL_WINDOW, STREAM_WINDOW, Kind, pack_error, unpack_error


class Net:
    """Some nodes that know each other, and the actors on them."""

    def __init__(self, folder, *names):
        self.nodes = {name: Node(f"{name}#1", f"ipc://{folder}/{name}") for name in names}
        for node in self.nodes.values():
            for other in self.nodes.values():
                if other is not node:
                    node.transport.connect(other.key, other.transport.address)
        self.cells = []

    def __getitem__(self, name):
        return self.nodes[name]

    async def host(self, node, actor, name, incarnation=1):
        actor._node, actor._name = self[node], name
        cell = self[node].cells[name] = Cell(actor, name, incarnation, self[node])
        task = asyncio.create_task(cell.run(), name=name)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        self.cells.append((cell, task))
        await cell.up
        self.tell(
            Status(name=name, node=self[node].key, state="up", incarnation=incarnation, **interface_of(type(actor)))
        )
        return cell, task

    def tell(self, status):
        for node in self.nodes.values():
            node.directory.update(status)

    async def close(self):
        for cell, _ in self.cells:
            cell.close()
        if self.cells:
            await asyncio.wait([task for _, task in self.cells], timeout=10)
        for node in self.nodes.values():
            await node.close()


@asynccontextmanager
async def network(*names):
    folder = tempfile.mkdtemp(prefix="hr-")
    net = Net(folder, *names)
    try:
        yield net
    finally:
        await net.close()
        shutil.rmtree(folder)


@pytest.fixture
async def net():
    async with network("a", "b") as net:
        yield net


@pytest.fixture(params=["here", "there"])
async def echo(request, net):
    """A ref of node `a` to an actor on the same node, or on another one."""
    await net.host("a" if request.param == "here" else "b", Echo(), "echo")
    return net["a"].ref("echo")


# Calls


async def test_a_call_answers_with_what_was_returned(echo):
    value = Point(x=1.5, tags=("a", "b"), data=np.arange(100_000.0))
    back = await echo.echo(value)
    assert (back.x, back.tags) == (1.5, ("a", "b")) and np.array_equal(back.data, value.data)
    assert await echo.echo(value={"k": [1, (2, None)]}) == {"k": [1, (2, None)]}


async def test_a_remote_error_tells_type_text_and_traceback(echo):
    with pytest.raises(RemoteError) as caught:
        await echo.raises("no such key")
    error = caught.value
    assert error.remote_type == "KeyError" and "echo.raises raised KeyError: 'no such key'" in str(error)
    assert "in raises" in error.remote_traceback and "sample_actors.py" in error.remote_traceback
    assert await echo.echo(1) == 1, "the actor lives on"


async def test_an_error_passes_through_a_relay_unchanged(net):
    await net.host("a", Echo(), "echo")
    await net.host("b", Relay(target="echo"), "relay")
    with pytest.raises(RemoteError) as caught:
        await net["a"].ref("relay").ask("raises", "deep")
    assert caught.value.remote_type == "KeyError" and "in raises" in caught.value.remote_traceback


def test_errors_of_the_runtime_come_back_as_themselves_others_do_not():
    class ActorDied(Exception):  # Of the same name, but somebody else's.
        pass

    assert type(unpack_error("a.b", pack_error(DeadlineExceeded("late")))) is DeadlineExceeded
    assert type(unpack_error("a.b", pack_error(ActorDied("mine")))) is RemoteError


def test_the_report_of_a_failure_does_not_fail():
    class Bad(Exception):
        def __str__(self):
            raise ZeroDivisionError

    class Huge(Exception):
        pass

    for error in (Bad(), Huge("x" * 10**7), ValueError("\udc80")):
        packed = pack_error(error)
        assert all(len(text.encode()) < 50_000 for text in packed)
        assert type(unpack_error("a.b", packed)) is RemoteError


async def test_wrong_arguments_are_the_callers_error(echo):
    with pytest.raises(RemoteError, match=r"TypeError.*unexpected keyword argument 'nonsense'"):
        await echo.echo(nonsense=1)
    with pytest.raises(RemoteError, match="TypeError"):
        await echo.echo()


async def test_names_that_are_wrong(net, echo):
    with pytest.raises(UnknownActor, match="no actor named 'ehco'; did you mean 'echo'"):
        await net["a"].ref("ehco").echo(1)
    with pytest.raises(UnknownActor, match="known: echo"):
        net["a"].ref("somebody").echo.cast(1)
    with pytest.raises(UnknownMessage, match=r"echo \(Echo\) has no @message 'ecko'; it has: .*echo, exits, hold"):
        await echo.ecko(1)
    with pytest.raises(UnknownMessage, match="no @message 'start'"):
        await echo.start()
    with pytest.raises(AttributeError):
        echo._node_of_somebody  # noqa: B018


async def test_the_wrong_way_to_ask(net, echo):
    with pytest.raises(UnknownMessage, match=r"echo is no stream; call it instead"):
        async for _ in echo.echo.stream(1):
            pass
    await net.host("b", Streamer(), "streamer")
    with pytest.raises(UnknownMessage, match=r"count is no call; .*ask it with .stream"):
        await net["a"].ref("streamer").count(1)
    net["a"].ref("streamer").count.cast(1)
    await until(lambda: net["b"].counters["dead_letters"] == 2)
    assert await net["a"].ref("streamer").state() == (0, 0), "a cast of the wrong kind does not fail the actor"


async def test_what_can_not_travel_is_refused_on_both_ways(net):
    await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    with pytest.raises(CodecError, match=r"builtins.object"):
        await echo.echo(object())
    with pytest.raises(CodecError, match=r"builtins.object") as caught:
        await echo.unsendable()
    assert "in _handle" in "".join(caught.value.__notes__), "with the traceback of the actor's side"
    with pytest.raises(CodecError):
        echo.note.cast(object())
    assert await echo.echo(1) == 1
    assert net["a"].routes.available("echo") >= CALL_WINDOW - 3, "what was not sent costs no credit"


async def test_a_type_that_only_the_sender_knows_is_refused_and_costs_no_credit(net, monkeypatch):
    from headrace.runtime import codec

    await net.host("b", Small(), "small")
    small = net["a"].ref("small")
    net["a"].transport.connect("b#1", "")
    point = Point(x=1)
    real = dict(codec._by_name)
    for _ in range(3 * Small.mailbox_capacity):
        monkeypatch.setattr(codec, "_by_name", {})
        with pytest.raises(CodecError, match="not marked @wire, or this process has not imported it"):
            await small.echo(point)
    monkeypatch.setattr(codec, "_by_name", real)
    assert await small.echo(point) == point
    assert net["b"].counters["malformed"] == 3 * Small.mailbox_capacity


async def test_answers_from_another_node_than_the_asked_one_are_refused():
    async with network("a", "b", "evil") as net:
        await net.host("b", Echo(), "echo")
        asking = asyncio.create_task(net["a"].ref("echo").hold())
        (row,) = await until(net["a"].waits.rows)
        for id in range(1, 20):
            net["evil"]._post("a#1", [Kind.REPLY, id, 0, "forged"])
        await until(lambda: net["a"].counters["late_answers"] + net["a"].counters["stale_answers"] == 19)
        assert net["a"].counters["stale_answers"] == 1 and not asking.done() and row["target"] == "echo"
        await net["a"].ref("echo").let_go()
        assert await asking is None


# Turns


async def test_one_message_at_a_time_unless_declared_concurrent(net):
    cell, _ = await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    first, second = asyncio.create_task(echo.hold()), asyncio.create_task(echo.note("second"))
    await until(lambda: cell.actor.seen == ["held"])
    await asyncio.sleep(0.02)
    assert not second.done() and await echo.noted() == ["held"], "control messages that are concurrent overtake"
    await echo.let_go()
    await asyncio.gather(first, second)
    assert cell.actor.seen == ["held", "second"]

    cell.actor.release.clear()
    many = [asyncio.create_task(echo.together()) for _ in range(5)]
    await until(lambda: cell.actor.seen.count("in") == 5)
    await echo.let_go()
    assert await asyncio.gather(*many) == ["out"] * 5


async def test_messages_of_one_sender_keep_their_order(net):
    cell, _ = await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    for i in range(100):
        echo.note.cast(i)
    await echo.note("call")
    assert cell.actor.seen == [*range(100), "call"]


async def test_a_control_message_overtakes_a_flood(net):
    cell, _ = await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    holding = asyncio.create_task(echo.hold())
    await until(lambda: cell.actor.seen == ["held"])
    for i in range(200):
        echo.note.cast(i)
    echo.note_control.cast("control")
    await until(lambda: len(cell.turns) == 201)
    await echo.let_go()
    await holding
    await echo.note("last")
    assert cell.actor.seen == ["held", "control", *range(200), "last"]


async def test_a_thread_message_keeps_its_turn_and_the_loop_answers_meanwhile(net):
    await net.host("b", Thinker(), "thinker")
    thinker = net["a"].ref("thinker")
    working = asyncio.create_task(thinker.think(0.3, "a"))
    after = asyncio.create_task(thinker.between("b"))
    looks = 0
    while not working.done():
        history = await thinker.history()
        looks += 1
        assert "b" not in history or "end a" in history
    await after
    assert looks > 3 and await thinker.history() == ["begin a", "end a", "b"]


async def test_cancelling_a_thread_message_leaves_the_actor_to_nobody_else_until_it_is_done(net):
    cell, _ = await net.host("b", Thinker(), "thinker")
    thinker = net["a"].ref("thinker")
    working = asyncio.create_task(thinker.think(0.2, "a"))
    await until(lambda: cell.actor.log_ == ["begin a"])
    working.cancel()
    await thinker.between("b")
    assert cell.actor.log_ == ["begin a", "end a", "b"]
    with pytest.raises(RemoteError, match="StopIteration"):
        await asyncio.wait_for(thinker.exhausts(), 10)
    assert await thinker.think(0.0, "c") == "c"


async def test_log_and_refs_from_the_actors_thread(net):
    events = EventLog(None)
    net["a"]._events = events
    await net.host("a", Thinker(), "thinker")
    await net.host("b", Echo(), "echo")
    await net["a"].ref("thinker").speaks()
    (event,) = await until(lambda: list(events.recent))
    assert (event["event"], event["actor"], event["value"]) == ("from_thread", "thinker", 1)
    with pytest.raises(RemoteError, match=r"RuntimeError: echo.note was cast from a thread"):
        await net["a"].ref("thinker").casts("echo")


# Cancellation and deadlines


async def test_cancelling_the_caller_cancels_the_handler_and_the_actor_serves_on(net, echo):
    cell = next(iter(net.cells))[0]
    asking = asyncio.create_task(echo.hold())
    await until(lambda: cell.actor.seen == ["held"])
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: cell.actor.seen == ["held", "cancelled"])
    assert await echo.echo(2) == 2
    await until(lambda: net["a"].waits.rows() == [])
    await until(lambda: not cell.at_work())


async def test_a_message_that_is_cancelled_twice_leaves_its_actor_at_work(net):
    cell, _ = await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    call = asyncio.create_task(echo.hold())
    await until(lambda: cell.actor.seen == ["held"])
    (delivery,) = cell.at_work()
    assert cell.cancel(delivery.key) and cell.cancel(delivery.key)
    await until(lambda: cell.idle)
    assert cell.actor.seen == ["held", "cancelled"] and await echo.echo(1) == 1
    call.cancel()


async def test_a_message_cancelled_in_the_mailbox_never_runs_and_gives_its_credit_back(net):
    cell, _ = await net.host("b", Small(), "small")
    small = net["a"].ref("small")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    for _ in range(5 * Small.mailbox_capacity):
        waiting = asyncio.create_task(small.note("never"))
        await until(lambda: len(cell.turns) == 1)
        waiting.cancel()
        await until(lambda: len(cell.turns) == 0)
    await small.let_go()
    await holding
    await small.note("last")
    assert cell.actor.seen == ["held", "last"]
    await until(lambda: net["a"].routes.available("small") == Small.mailbox_capacity)


async def test_a_late_call_is_given_up_by_both_and_says_who_waited_for_whom(net, echo):
    cell = next(iter(net.cells))[0]
    said = r"waits for echo.hold: no answer within .* s \(it has the message\); .*timeout"
    with pytest.raises(DeadlineExceeded, match=said):
        async with timeout(0.5):
            await echo.hold()
    await until(lambda: cell.actor.seen == ["held", "cancelled"])
    assert await echo.echo(1) == 1


async def test_a_busy_loop_does_not_lose_the_error_that_says_who_waited_for_whom(net, echo):
    cell = next(iter(net.cells))[0]

    async def hog():
        await until(lambda: cell.actor.seen)
        time.sleep(0.3)  # noqa: ASYNC251 (a loop that does not turn)

    hogging = asyncio.create_task(hog())
    with pytest.raises(DeadlineExceeded, match=r"waits for echo.hold"):
        async with timeout(0.1):
            await echo.hold()
    await hogging


async def test_asyncio_timeout_works_as_well(net, echo):
    cell = next(iter(net.cells))[0]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await echo.hold()
    await until(lambda: cell.actor.seen == ["held", "cancelled"])


async def test_the_deadline_travels_to_nested_calls(net):
    cell, _ = await net.host("a", Echo(), "echo")
    await net.host("b", Relay(target="echo"), "relay")
    with pytest.raises(DeadlineExceeded):
        async with timeout(0.5):
            await net["a"].ref("relay").ask("hold")
    await until(lambda: cell.actor.seen == ["held", "cancelled"])
    with pytest.raises(DeadlineExceeded, match=r"relay.ask_within waits for echo.hold: no answer"):
        await net["a"].ref("relay").ask_within(0.05, "hold")


async def test_a_message_past_its_deadline_is_dropped_unexecuted_counted_and_costs_no_credit(net):
    cell, _ = await net.host("b", Small(), "small")
    small = net["a"].ref("small")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    # As a sender that does not withdraw: only its message says how much time is left.
    route = net["a"].routes.find("small", "note")
    window = route.window
    for _ in range(3):
        assert window.take_nowait()
        net["a"]._transmit(Kind.CALL, 999, route, asyncio.get_running_loop().time() + 0.01, ("late",), {})
    await until(lambda: len(cell.turns) == 3)
    await asyncio.sleep(0.05)
    await small.let_go()
    await holding
    await small.note("last")
    assert cell.actor.seen == ["held", "last"] and net["b"].counters["dead_letters"] == 3
    letter = net["b"].dead_letters[-1]
    assert letter["actor"] == "small" and "did not run: its deadline passed before its turn" in letter["reason"]
    await until(lambda: window.available == Small.mailbox_capacity)


async def test_a_call_to_a_restarting_actor_waits_for_it(net):
    _, task = await net.host("b", Echo(), "echo")
    echo, status = net["a"].ref("echo"), net["a"].directory.get("echo")
    net.tell(replace(status, state="down", exit=Exit(kind="exception", detail="KeyError: 'x'")))
    with pytest.raises(ActorDied, match=r"echo is not up \(KeyError: 'x'\); a call would wait"):
        echo.note.cast(1)
    with pytest.raises(DeadlineExceeded, match="it is down"):
        async with timeout(0.05):
            await echo.echo(1)
    asking = asyncio.create_task(echo.echo(5))
    await asyncio.sleep(0.02)
    assert not asking.done() and net["a"].waits.rows()[0]["why"] == "it is down"
    net.cells[0][0].close()
    await asyncio.wait([task])
    await net.host("b", Echo(), "echo", incarnation=2)
    assert await asking == 5


async def test_a_call_to_a_stopped_actor_fails_at_once(net, echo):
    net.tell(
        replace(net["a"].directory.get("echo"), state="stopped", exit=Exit(kind="exception", detail="it was temporary"))
    )
    with pytest.raises(ActorDied, match="echo has stopped for good: it was temporary"):
        await echo.echo(1)


async def test_a_future_cancelled_inside_a_handler_is_an_error_of_the_handler(net, echo):
    with pytest.raises(RemoteError, match="cancelled"):
        await asyncio.wait_for(echo.cancels_itself(), 10)
    assert await echo.echo(1) == 1


# Streams


@pytest.fixture(params=["here", "there"])
async def streamer(request, net):
    cell, _ = await net.host("a" if request.param == "here" else "b", Streamer(), "streamer")
    return cell.actor, net["a"].ref("streamer")


async def test_a_stream_brings_every_item_in_order(streamer):
    actor, ref = streamer
    assert [i async for i in ref.count.stream(1000)] == list(range(1000))
    assert actor.closed == 1


async def test_a_slow_consumer_holds_the_producer_back(streamer):
    actor, ref = streamer
    async with aclosing(ref.count.stream(10_000)) as items:
        for expected in range(150):
            assert await anext(items) == expected
            await asyncio.sleep(0.001)
            assert actor.made <= expected + 2 * STREAM_WINDOW + 1
        await asyncio.sleep(0.05)
        assert actor.made < 400
    await until(lambda: actor.closed == 1)


async def test_leaving_the_loop_cancels_the_generator_and_runs_its_finally(net, streamer):
    actor, ref = streamer
    async for item in ref.count.stream(10**6):
        if item == 100:
            break
    await until(lambda: actor.closed == 1 and net["a"].waits.rows() == [])
    assert actor.made < 400
    assert await ref.state() == (actor.made, 1)


async def test_cancelling_the_consumer_cancels_the_generator(streamer):
    actor, ref = streamer

    async def consume():
        async for _ in ref.silent.stream():
            pass

    consuming = asyncio.create_task(consume())
    await asyncio.sleep(0.05)
    consuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consuming
    await until(lambda: actor.closed == 1)


async def test_an_error_in_a_stream_comes_after_its_items(streamer):
    actor, ref = streamer
    got = []
    with pytest.raises(RemoteError, match="ValueError: no 70"):
        async for item in ref.count.stream(100, fail_at=70):
            got.append(item)
    assert got == list(range(70)) and actor.closed == 1


async def test_a_stream_that_falls_silent_is_given_up(streamer):
    actor, ref = streamer
    got = []
    with pytest.raises(DeadlineExceeded, match=r"streamer.silent: no item within 0.5"):
        async for item in ref.silent.stream():
            got.append(item)
    assert got == [1]
    await until(lambda: actor.closed == 1)


async def test_an_item_that_can_not_travel_ends_the_stream_on_both_sides(net):
    cell, _ = await net.host("b", Streamer(), "streamer")
    got = []
    with pytest.raises(CodecError, match=r"builtins.object"):
        async for item in net["a"].ref("streamer").unsendable.stream():
            got.append(item)
    assert got == [1]
    await until(lambda: cell.actor.closed == 1 and not cell.at_work())


# Room


async def test_a_full_mailbox_here_makes_a_call_wait_and_a_cast_fail(net):
    cell, _ = await net.host("a", Small(), "small")
    small = net["a"].ref("small")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    for i in range(4):
        small.note.cast(i)
    with pytest.raises(MailboxFull, match=r"small: mailbox full: 4 of 4 messages wait; slow down, or call"):
        small.note.cast(4)
    calls = [asyncio.create_task(small.note(i)) for i in range(4, 20)]
    await asyncio.sleep(0.02)
    assert net["a"].waits.rows()[-1]["why"] == "it is up, but has no room"
    assert await small.noted() == ["held"], "control has room of its own"
    await small.let_go()
    await asyncio.gather(holding, *calls)
    assert cell.actor.seen == ["held", *range(20)] and cell.turns.peak <= 5


async def test_a_full_mailbox_there_makes_a_call_wait_and_a_cast_fail_and_nothing_is_lost(net):
    cell, _ = await net.host("b", Small(), "small")
    small = net["a"].ref("small")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    await until(lambda: net["a"].routes.available("small") == 4)
    for i in range(4):
        small.note.cast(i)
    with pytest.raises(MailboxFull, match=r"small: 4 messages from here wait there; slow down, or call, which waits"):
        small.note.cast(4)
    calls = [asyncio.create_task(small.note(i)) for i in range(4, 20)]
    await asyncio.sleep(0.02)
    assert len(cell.turns) == 4 and await small.noted() == ["held"]
    calls[3].cancel()
    await small.let_go()
    await asyncio.gather(holding, *calls, return_exceptions=True)
    assert cell.actor.seen == ["held", *(i for i in range(20) if i != 7)]
    await until(lambda: net["a"].routes.available("small") == 4)
    assert net["b"].counters["dead_letters"] == 0


async def test_many_nodes_may_fill_one_mailbox_and_nothing_is_lost():
    async with network("hub", *"abcdef") as net:
        cell, _ = await net.host("hub", Small(), "small")
        holding = asyncio.create_task(net["hub"].ref("small").hold())
        await until(lambda: cell.actor.seen == ["held"])
        calls = [asyncio.create_task(net[n].ref("small").note(n)) for n in "abcdef" for _ in range(20)]
        await until(lambda: len(cell.turns) == 6 * 4)
        await net["hub"].ref("small").let_go()
        await asyncio.gather(holding, *calls)
        assert sorted(cell.actor.seen[1:]) == sorted("abcdef" * 20)


async def test_credits_survive_a_restart_of_the_actor_with_a_full_mailbox(net):
    cell, task = await net.host("b", Small(), "small")
    small = net["a"].ref("small")
    for incarnation in range(2, 8):
        holding = asyncio.create_task(small.hold())
        await until(lambda cell=cell: "held" in cell.actor.seen)
        calls = [asyncio.create_task(small.note(i)) for i in range(4)]
        await until(lambda cell=cell: len(cell.turns) == 4)
        cell.close()
        await asyncio.wait([task])
        del net["b"].cells["small"]
        with pytest.raises(ActorDied, match="small stopped while it worked on hold; it may have run"):
            await holding
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, ActorDied) and "did not run" in str(error) and "ask again" in str(error)
        # The directory here is behind: these arrive at an empty place.
        for _ in range(6):
            with pytest.raises(ActorDied, match=r"did not run: it was sent to incarnation \d, it is not here now"):
                await small.note("early")
        cell, task = await net.host("b", Small(), "small", incarnation)
    await until(lambda: net["a"].routes.available("small") == 4)
    assert await small.echo(1) == 1


async def test_a_message_for_an_earlier_incarnation_is_refused(net):
    await net.host("b", Echo(), "echo", incarnation=3)
    net["a"].directory._table["echo"] = replace(net["a"].directory.get("echo"), incarnation=2)
    with pytest.raises(ActorRestarted, match="was sent to incarnation 2, that is number 3 now; ask again"):
        await net["a"].ref("echo").echo(1)


async def test_a_dead_node_ends_waits_here_and_is_fenced(net):
    cell, _ = await net.host("b", Small(), "small")
    small, status = net["a"].ref("small"), net["a"].directory.get("small")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    queued = [asyncio.create_task(small.note(i)) for i in range(6)]
    await until(lambda: len(cell.turns) == 4)
    net["a"].peer_down("b#1", "killed by SIGKILL")
    net["a"].directory.update(replace(status, state="down", exit=Exit(kind="exception", detail="its node died")))
    for task in [holding, *queued[:4]]:
        with pytest.raises(ActorDied, match=r"waits for small.*, but its node b#1 died: killed by SIGKILL"):
            await task
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in queued[4:]), "what was never sent waits for the next incarnation"
    # The dead speak on.
    net["b"]._post("a#1", [Kind.REPLY, 1, 0, None])
    net["b"].ref("small")
    net["a"].tell = None
    await net.host("a", Echo(), "target")
    net["b"].ref("target").note.cast("from the grave")
    await until(lambda: net["a"].counters["fenced"] >= 2)
    assert await net["a"].ref("target").noted() == []
    for task in queued[4:]:
        task.cancel()
    await asyncio.gather(*queued[4:], return_exceptions=True)


async def test_what_a_dead_node_waited_for_is_cancelled_but_its_casts_are_handled(net):
    cell, _ = await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    asking = asyncio.create_task(echo.hold())
    await until(lambda: cell.actor.seen == ["held"])
    called = asyncio.create_task(echo.note("called"))
    echo.note.cast("cast")
    await until(lambda: len(cell.turns) == 2)
    net["b"].peer_down("a#1", "killed")
    await until(lambda: cell.actor.seen == ["held", "cancelled", "cast"])
    for task in (asking, called):
        task.cancel()
    await asyncio.gather(asking, called, return_exceptions=True)


async def test_200_callers_of_50_calls_lose_nothing(net):
    await net.host("b", Echo(), "echo")
    await net.host("a", Relay(target="echo"), "relay")
    assert await net["b"].ref("relay").flood("echo", 200, 50) == 10_000
    assert net["a"].waits.rows() == net["b"].waits.rows() == []
    assert net["a"].counters + net["b"].counters == {"sent": 10_001, "handled": 10_001}


# How an actor ends


@dataclass(kw_only=True)
class Closing(Actor):
    """Notes how it was stopped."""

    async def start(self):
        self.reasons = []

    async def stop(self, reason):
        self.reasons.append(reason)

    @message
    async def fail(self):
        raise ValueError("broken")

    @message(concurrent=True)
    async def wait(self):
        await asyncio.sleep(60)

    @message
    async def in_background(self):
        self.background(self._fail(), name="doomed")

    async def _fail(self):
        raise KeyError("background")


async def test_a_failing_call_leaves_the_actor_alive_and_a_failing_cast_does_not(net):
    cell, task = await net.host("b", Closing(), "closing")
    ref = net["a"].ref("closing")
    with pytest.raises(RemoteError):
        await ref.fail()
    waiting = asyncio.create_task(ref.wait())
    await until(lambda: len(cell.at_work()) == 1)
    ref.fail.cast()
    with pytest.raises(ValueError, match="broken"):
        await asyncio.wait_for(task, 10)
    with pytest.raises(ActorDied, match="closing stopped while it worked on wait; it may have run"):
        await waiting
    (reason,) = cell.actor.reasons
    assert isinstance(reason, ValueError)


async def test_a_failing_background_task_fails_the_actor(net):
    cell, task = await net.host("b", Closing(), "closing")
    await net["a"].ref("closing").in_background()
    with pytest.raises(KeyError, match="background"):
        await asyncio.wait_for(task, 10)
    assert isinstance(cell.actor.reasons[0], KeyError)


async def test_a_handler_cancelled_before_its_first_step_still_answers(net):
    cell, task = await net.host("b", Closing(), "closing")
    ref = net["a"].ref("closing")
    waiting = [asyncio.create_task(ref.wait()) for _ in range(5)]
    await until(lambda: len(cell.at_work()) + len(cell.overlapping) == 5)
    cell.close()  # Some handlers may not have begun.
    for caller in waiting:
        with pytest.raises(ActorDied):
            await asyncio.wait_for(caller, 10)
    await asyncio.wait_for(task, 10)
    assert cell.actor.reasons == [None]


async def test_a_stop_that_hangs_is_given_up(net, monkeypatch):
    from headrace.runtime import cell as module

    class Hanging(Closing):
        async def stop(self, reason):
            await asyncio.sleep(3600)

    monkeypatch.setattr(module, "STOP_S", 0.05)
    cell, task = await net.host("b", Hanging(), "hanging")
    late = asyncio.create_task(net["a"].ref("hanging").fail())
    await asyncio.gather(late, return_exceptions=True)
    cell.close()
    with pytest.raises(DeadlineExceeded, match=r"hanging: stop\(\) took longer than 0.05 s"):
        await asyncio.wait_for(task, 10)


async def test_nothing_is_left_behind_unretrieved(net):
    """An error that arrives in the very turn in which its caller gives up."""
    cell, _ = await net.host("b", Echo(), "echo")
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for _ in range(10):
        asking = asyncio.create_task(net["a"].ref("echo").hold())
        await until(cell.at_work)
        (pending,) = net["a"].waits.table.values()
        pending.settle(ActorDied("now"))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: not cell.at_work())
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []
