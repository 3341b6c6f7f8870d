"""What becomes of every message: cancels are acknowledged, streams come in order, nothing is unaccounted for."""

import asyncio
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_actors import Echo, Relay, Small, Streamer, Thinker, until
from test_node import network

from headrace.runtime import cell as cell_module
from headrace.runtime import message, timeout
from headrace.runtime import waits as waits_module
from headrace.runtime.codec import decode, encode
from headrace.runtime.errors import ActorDied, CodecError, DeadlineExceeded, MailboxFull
from headrace.runtime.events import EventLog
from headrace.runtime.frame import is_system
from headrace.runtime.protocol import BULK_BYTES, CALL_WINDOW, Kind, check, pack_head, restamp, unpack_head
from headrace.runtime.waits import PendingStream


@pytest.fixture
async def net():
    async with network("a", "b") as net:
        yield net


def total(net, *names):
    """Both sides of the books over the nodes that live."""
    counters = [net[name].counters for name in names or net.nodes]
    out = sum(c["sent"] for c in counters)
    done = sum(c[k] for c in counters for k in ("handled", "dead_letters", "withdrawn", "gone", "lost"))
    return out, done


async def given_up(net, call):
    """Cancels a call and returns the rows that are left of it."""
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    return net["a"].waits.rows()


# Cancellation


async def test_a_cancelled_call_is_listed_until_its_handler_has_ended(net):
    cell, _ = await net.host("b", Thinker(), "thinker")
    working = asyncio.create_task(net["a"].ref("thinker").think(0.3, "a"))
    await until(lambda: cell.actor.log_ == ["begin a"])
    (row,) = await given_up(net, working)
    assert row["why"] == "cancelled, not yet acknowledged" and (row["target"], row["method"]) == ("thinker", "think")
    await until(lambda: not net["a"].waits.rows())
    assert cell.actor.log_ == ["begin a", "end a"], "a thread can't be interrupted"
    assert not net["a"].counters["unacknowledged_cancels"]


async def test_a_message_that_has_not_begun_is_acknowledged_at_once(net):
    cell, _ = await net.host("b", Small(), "small")
    small = net["a"].ref("small")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    waiting = asyncio.create_task(small.note("never"))
    await until(lambda: len(cell.turns) == 1)
    assert len(await given_up(net, waiting)) == 2
    await until(lambda: len(net["a"].waits.rows()) == 1)
    assert net["b"].counters["withdrawn"] == 1
    await small.let_go()
    await holding
    assert cell.actor.seen == ["held"]


async def test_a_late_answer_is_as_good_as_an_acknowledgement(net):
    await net.host("b", Echo(), "echo")
    asking = asyncio.create_task(net["a"].ref("echo").echo(1))
    await asyncio.sleep(0)
    await given_up(net, asking)
    await until(lambda: not net["a"].waits.rows())


async def test_a_cancel_that_nobody_acknowledges_is_written_off(net, monkeypatch):
    monkeypatch.setattr(waits_module, "ACKNOWLEDGE_S", 0.05)
    events = net["a"]._events = EventLog(None)
    cell, _ = await net.host("b", Echo(), "echo")
    asking = asyncio.create_task(net["a"].ref("echo").hold())
    await until(lambda: cell.actor.seen == ["held"])
    monkeypatch.setattr(net["b"], "acknowledge", lambda *_: None)
    assert len(await given_up(net, asking)) == 1
    await until(lambda: not net["a"].waits.table)
    assert net["a"].counters["unacknowledged_cancels"] == 1
    (event,) = events.recent
    assert (event["event"], event["target"], event["node"]) == ("cancel_unacknowledged", "echo", "b#1")


async def test_the_death_of_the_node_ends_a_wait_for_an_acknowledgement(net):
    cell, _ = await net.host("b", Thinker(), "thinker")
    working = asyncio.create_task(net["a"].ref("thinker").think(0.2))
    await until(lambda: cell.actor.log_)
    assert len(await given_up(net, working)) == 1
    net["a"].peer_down("b#1", "killed")
    assert net["a"].waits.table == {}


async def test_one_timer_finds_every_call_that_is_late(net):
    cell, _ = await net.host("b", Echo(), "echo")
    holding = asyncio.create_task(net["a"].ref("echo").hold())
    await until(lambda: cell.actor.seen == ["held"])
    loop, began, late = asyncio.get_running_loop(), asyncio.get_running_loop().time(), {}

    async def ask(seconds):
        with pytest.raises(DeadlineExceeded):
            async with timeout(seconds):
                await net["a"].ref("echo").echo(1)
        late[seconds] = loop.time() - began

    seconds = [0.05 * n for n in (8, 1, 5, 2, 9, 3, 1, 7)]
    await asyncio.gather(*map(ask, seconds))
    assert all(taken >= asked - 0.01 for asked, taken in late.items())
    assert set(late) == set(seconds)
    holding.cancel()


# Streams


@given(st.permutations(range(12)), st.sampled_from([Kind.END, Kind.ERROR]))
def test_items_come_in_the_order_in_which_they_were_sent(order, last):
    async def play():
        future = asyncio.get_running_loop().create_future()
        pending = PendingStream(1, "target", "method", None, 0.0, inf, future)
        for number in order:
            value = ["ValueError", "text", "", ""] if number == 11 and last == Kind.ERROR else number
            done = pending.resolve(last if number == 11 else Kind.ITEM, number, value, 1)
            assert done == (pending.end is not None)
            numbers = [item for item, _ in pending.items]
            assert numbers == list(range(len(numbers))), "in order, without a gap"
            if numbers:
                pending.resolve(Kind.ITEM, 0, "again", 1)
        assert len(pending.items) == 11 and (pending.end is True) == (last == Kind.END)

    asyncio.run(play())


async def test_a_producer_that_is_held_back_is_listed(net):
    cell, _ = await net.host("b", Streamer(), "streamer")
    items = net["a"].ref("streamer").count.stream(10**6)
    assert await anext(items) == 0
    (row,) = await until(net["b"].wait_rows)
    assert row["owner"] == "streamer.count" and row["target"] == "a#1" and "consumer" in row["why"]
    assert net["a"].waits.rows() == [], "its consumer is at work, and waits for nothing"
    await items.aclose()
    await until(lambda: cell.actor.closed == 1 and not net["b"].wait_rows())


async def test_a_stream_of_large_items_is_bounded_in_bytes(net, monkeypatch):
    monkeypatch.setattr(cell_module, "STREAM_WINDOW_BYTES", 3000)

    class Large(Streamer):
        @message(concurrent=True)
        async def large(self, number: int):
            for i in range(number):
                self.made += 1
                yield np.full(1000, i, np.uint8)

    cell, _ = await net.host("b", Large(), "large")
    items = net["a"].ref("large").large.stream(50)
    first = await anext(items)
    await until(net["b"].wait_rows)
    assert first[0] == 0 and cell.actor.made <= 5
    await items.aclose()


# Which way


async def test_large_messages_and_what_belongs_to_them_go_the_bulk_way(net, monkeypatch):
    cell, _ = await net.host("b", Echo(), "echo")
    ways = []
    for name in "ab":
        net[name].lending.arena.limit_bytes = 0
        send = net[name].transport.send

        def spy(peer, envelope, buffers, bulk=False, send=send, name=name):
            ways.append((name, decode(envelope, buffers)[0], bulk))
            return send(peer, envelope, buffers, bulk=bulk)

        monkeypatch.setattr(net[name].transport, "send", spy)
    echo, large = net["a"].ref("echo"), np.zeros(BULK_BYTES + 1, np.uint8)
    assert await echo.echo(1) == 1 and np.array_equal(await echo.echo(large), large)
    answers = [way for way in ways if way[1] in (Kind.CALL, Kind.REPLY)]
    calls = [("a", Kind.CALL), ("b", Kind.REPLY)]
    assert answers == [(*call, False) for call in calls] + [(*call, True) for call in calls]
    holding = asyncio.create_task(echo.hold())
    await until(lambda: cell.actor.seen == ["held"])
    waiting = asyncio.create_task(echo.echo(large))
    await until(lambda: len(cell.turns) == 1)
    for call in (waiting, holding):
        await given_up(net, call)
    assert [way for way in ways if way[1] == Kind.CANCEL] == [("a", Kind.CANCEL, True), ("a", Kind.CANCEL, False)]


# Envelopes


@given(st.floats(-1e6, 1e6) | st.just(inf), st.floats(0, 1e9))
def test_a_message_that_waited_is_stamped_anew(left, later):
    head = pack_head("actor", "method", 2, 7)
    fields = [Kind.CALL, 2, left, 5, head, [1], {"k": 2}]
    again = decode(restamp(encode(fields)[0], later))
    assert again == [*fields[:2], later, *fields[3:]] and check(again) == Kind.CALL
    assert unpack_head(head) == ("actor", "method", 2, 7)


def test_answers_and_the_runtimes_own_messages_are_system():
    head = pack_head("actor", "method", 0, 1)
    for lane in range(4):
        assert is_system(encode([Kind.CAST, lane, inf, 1, head, [], {}])[0]) == (lane == 0)
    for fields in (
        [Kind.REPLY, 1, 0, None],
        [Kind.CREDIT, "a", 2, 1, 1],
        [Kind.CANCEL, "a", 1],
        [Kind.MORE, "a", 1, 1, 1],
    ):
        assert check(fields) == fields[0] and is_system(encode(fields)[0])


good = st.sampled_from(
    [
        [Kind.CALL, 2, 1.0, 5, pack_head("a", "b", 2, 1), [], {}],
        [Kind.ERROR, 1, 0, ["a", "b", "c", "d"]],
        [Kind.REPLY, 1, 0, None],
        [Kind.CREDIT, "a", 2, 1, 1],
        [Kind.MORE, "a", 1, 1, 0],
        [Kind.CANCEL, "a", 1],
        [Kind.CANCELLED, 1, "x"],
    ]
)
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.integers())


@given(good, st.data())
def test_fields_of_a_wrong_type_or_number_are_refused(fields, data):
    """Only the value of an answer may be anything."""
    at = data.draw(st.integers(0, len(fields) - 1))
    wrong = data.draw(anything.filter(lambda value: type(value) is not type(fields[at])))
    changed = [*fields[:at], wrong, *fields[at + 1 :]]
    if not (fields[0] == Kind.REPLY and at == 3):
        with pytest.raises(CodecError):
            check(changed)
    for bad in (fields[:-1], [*fields, 1], None, wrong):
        with pytest.raises(CodecError):
            check(bad)


# Accounts


async def test_every_request_is_accounted_for(net):
    cell, task = await net.host("b", Small(), "small")
    await net.host("a", Echo(), "echo")
    a = net["a"]
    small, echo = a.ref("small"), a.ref("echo")
    holding = asyncio.create_task(small.hold())
    await until(lambda: cell.actor.seen == ["held"])
    for i in range(3):
        small.note.cast(i)
        echo.note.cast(i)
    cancelled = asyncio.create_task(small.note("cancelled"))
    await until(lambda: len(cell.turns) == 4)
    await given_up(net, cancelled)
    await until(lambda: total(net) == (8, 5))
    with pytest.raises(MailboxFull):
        for i in range(10):
            small.note.cast(i)
    cell.close()
    await asyncio.wait([task])
    with pytest.raises(ActorDied):
        await holding
    await until(lambda: total(net)[0] == total(net)[1])
    assert net["b"].counters["dead_letters"] >= 3 and net["b"].counters["interrupted"] == 1
    letter = net["b"].dead_letters[0]
    assert letter["bytes"] > 0 and letter["waited_s"] >= 0 and letter["time"] > 1e9


async def test_what_was_under_way_to_a_node_that_died_is_reported(net):
    cell, _ = await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    for i in range(300):
        echo.note.cast(i)
    await echo.note("last")
    holding = asyncio.create_task(echo.hold())
    await until(lambda: "held" in cell.actor.seen)
    for i in range(5):
        echo.note.cast(i)
    net["a"].peer_down("b#1", "killed by SIGKILL")
    with pytest.raises(ActorDied):
        await holding
    counters = net["a"].counters
    assert counters["sent"] == 307 == counters["gone"] + counters["lost"]
    assert counters["lost"] >= 5 and counters["gone"] >= 256, "all but what was not paid for yet"


async def test_a_message_that_can_not_be_packed_names_the_argument(net):
    await net.host("b", Echo(), "echo")
    echo = net["a"].ref("echo")
    with pytest.raises(CodecError, match=r"echo.echo: argument 1: builtins.set can't travel"):
        await echo.echo({1})
    with pytest.raises(CodecError, match=r"echo.note: value: .*complex"):
        echo.note.cast(value=1j)
    assert net["a"].waits.table == {} and net["a"].routes.available("echo") == CALL_WINDOW


async def test_a_thousand_callers_on_one_actor_lose_nothing_and_stay_within_the_credits():
    async with network("hub", *"wxyz") as net:
        cell, _ = await net.host("hub", Small(), "small")
        cell.turns.peak = 0
        for name in "wxyz":
            await net.host(name, Relay(target="small"), f"relay_{name}")
        ask = [net["hub"].ref(f"relay_{name}").flood("echo", 250, 4) for name in "wxyz"]
        assert await asyncio.gather(*ask) == [1000] * 4
        assert cell.turns.peak <= 4 * Small.mailbox_capacity
        assert total(net) == (4004, 4004)
