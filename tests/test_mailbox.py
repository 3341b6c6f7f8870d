"""Mailboxes serve lanes in order and lose nothing; credits come back, one by one, in the order of asking."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.errors import MailboxFull
from headrace.runtime.mailbox import CreditDebt, CreditWindow, Lane, Mailbox


async def take_all(mailbox):
    return [await mailbox.get() for _ in range(len(mailbox))]


async def test_lanes_go_by_priority_and_each_in_order_of_arrival():
    mailbox = Mailbox(10)
    for lane, item in [(Lane.BULK, 1), (Lane.NORMAL, 2), (Lane.NORMAL, 3), (Lane.SYSTEM, 4), (Lane.CONTROL, 5)]:
        mailbox.put(item, lane)
    assert await take_all(mailbox) == [4, 5, 2, 3, 1] and mailbox.peak == 5


async def test_a_full_lane_refuses_and_leaves_the_others_open():
    mailbox = Mailbox(2)
    for item in range(2):
        mailbox.put(item, Lane.NORMAL)
    with pytest.raises(MailboxFull, match="2 of 2"):
        mailbox.put(2, Lane.NORMAL)
    mailbox.put("control", Lane.CONTROL)
    mailbox.put("credited", Lane.NORMAL, credited=True)
    for item in range(10):
        mailbox.put(item, Lane.SYSTEM)
    assert len(mailbox) == 14


async def test_room_waits_until_something_is_taken():
    mailbox = Mailbox(1)
    mailbox.put(1, Lane.NORMAL)

    async def ask(lane):
        async with mailbox.room(lane):
            pass

    waiting = [asyncio.create_task(ask(Lane.NORMAL)) for _ in range(2)]
    await asyncio.wait_for(ask(Lane.CONTROL), 5)
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    assert await mailbox.get() == 1
    await asyncio.wait_for(asyncio.gather(*waiting), 5)


async def test_get_waits_and_a_cancelled_get_takes_nothing():
    mailbox = Mailbox(1)
    taker = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    taker.cancel()
    mailbox.put("kept", Lane.NORMAL)
    with pytest.raises(asyncio.CancelledError):
        await taker
    assert await mailbox.get() == "kept"


def test_a_mailbox_has_room_for_something():
    with pytest.raises(ValueError, match="at least 1"):
        Mailbox(0)


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "remove"]), st.sampled_from(Lane), st.integers(0, 3))))
def test_what_goes_in_comes_out_once_in_the_order_of_a_sorted_list(steps):
    """Oracle: a list sorted by (lane, arrival)."""

    async def play():
        mailbox, model, arrival = Mailbox(4), [], 0
        for step, lane, number in steps:
            if step == "put":
                arrival += 1
                full = lane is not Lane.SYSTEM and sum(k[0] == lane for k in model) >= 4
                try:
                    mailbox.put((lane, arrival, number), lane)
                    assert not full
                    model.append((lane, arrival, number))
                except MailboxFull:
                    assert full
            elif step == "get" and model:
                model.sort()
                assert await mailbox.get() == model.pop(0)
            elif step == "remove":
                removed = mailbox.remove(lambda item, number=number: item[2] == number)
                assert sorted(removed) == sorted(k for k in model if k[2] == number)
                model = [k for k in model if k[2] != number]
            assert len(mailbox) == len(model)
        assert await take_all(mailbox) == sorted(model)

    asyncio.run(play())


async def test_credits_are_granted_in_the_order_of_asking():
    window = CreditWindow(1)
    assert window.take_nowait() and not window.take_nowait()
    order = []

    async def ask(name):
        assert await window.take()
        order.append(name)

    tasks = [asyncio.create_task(ask(name)) for name in "abc"]
    await asyncio.sleep(0)
    for _ in range(3):
        assert window.give(1)
        assert not window.take_nowait(), "those who wait come first"
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c"]


async def test_a_cancelled_wait_costs_no_credit():
    window = CreditWindow(1)
    assert window.take_nowait()
    before, during = asyncio.create_task(window.take()), asyncio.create_task(window.take())
    await asyncio.sleep(0)
    before.cancel()
    await asyncio.sleep(0)
    window.give(1)
    during.cancel()  # In the same turn in which the credit is granted to it.
    await asyncio.gather(before, during, return_exceptions=True)
    assert window.available == 1 and window.take_nowait()


async def test_more_credits_than_were_taken_are_refused():
    window = CreditWindow(2)
    assert window.take_nowait()
    assert not window.give(2) and window.available == 1
    assert window.give(1) and window.available == 2


async def test_a_closed_window_ends_every_wait():
    window = CreditWindow(1)
    assert window.take_nowait()
    waiting = [asyncio.create_task(window.take()) for _ in range(3)]
    await asyncio.sleep(0)
    window.close()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [False] * 3
    assert not window.take_nowait() and not await window.take()


# Bytes


def test_a_lane_is_bounded_in_bytes_but_takes_one_message_of_any_size():
    mailbox = Mailbox(10, 100)
    mailbox.put("huge", Lane.NORMAL, 1000)
    with pytest.raises(MailboxFull, match="1000 of 100 bytes wait, and this message has 1"):
        mailbox.put("small", Lane.NORMAL, 1)
    mailbox.put("other lane", Lane.BULK, 60)
    assert mailbox.take() == "huge" and mailbox.has_room(Lane.NORMAL, 100) and not mailbox.has_room(Lane.BULK, 41)
    assert (mailbox.bytes, mailbox.peak_bytes) == (60, 1060)


@given(st.lists(st.tuples(st.sampled_from(["ask", "ask", "take", "cancel", "remove"]), st.integers(1, 9)), max_size=40))
def test_who_waits_for_room_gets_it_in_order_and_the_bounds_hold(steps):
    """Senders that wait for room put within the bounds, all of them, in the order of asking unless they give up."""

    async def play():
        mailbox, asking, got, put = Mailbox(3, 12), [], [], []

        async def ask(number, size):
            async with mailbox.room(Lane.NORMAL, size):
                mailbox.put((number, size), Lane.NORMAL, size)
                put.append(number)

        for number, (step, argument) in enumerate(steps):
            if step == "ask":
                asking.append((number, asyncio.create_task(ask(number, argument))))
            elif step == "take":
                got += [item for item in [mailbox.take()] if item is not None]
            elif step == "cancel" and asking:
                asking[argument % len(asking)][1].cancel()
            elif step == "remove":
                got += mailbox.remove(lambda item, argument=argument: item[1] == argument)
            if argument % 2:
                await asyncio.sleep(0)
            assert len(mailbox) <= 3 and (mailbox.bytes <= 12 or len(mailbox) == 1)
        for _ in range(4 * len(steps)):
            await asyncio.sleep(0)
            got += [item for item in [mailbox.take()] if item is not None]
        given_up = {number for number, task in asking if task.cancelled()}
        assert all(task.done() for _, task in asking), "nobody waits for ever"
        assert put == [number for number, _ in asking if number not in given_up] == sorted(n for n, _ in got)

    asyncio.run(play())


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from(["send", "send", "take", "cancel", "now"]), st.integers(0, 50)), max_size=60),
)
def test_credits_are_conserved_and_everybody_gets_some(capacity, capacity_bytes, steps):
    """A sender with a window and a receiver with a debt, under any interleaving: what is under way is within the
    window, no credit is lost or made, and in the end nobody waits."""

    async def play():
        window, debt = CreditWindow(capacity, capacity_bytes), CreditDebt(capacity, capacity_bytes)
        wire, sending, under_way = [], [], []

        def sent(size):
            wire.append(size)
            under_way.append(size)
            assert len(under_way) <= capacity
            assert sum(under_way) - max(under_way) < capacity_bytes, "at most one goes beyond the bytes"

        async def send(size):
            assert await window.take(size)
            sent(size)

        def take():
            """The receiver takes a message; its sender learns of it when a quarter of the window has come together."""
            nonlocal under_way
            if wire and debt.add(wire.pop(0)):
                messages, size = debt.pay()
                under_way = under_way[messages:]
                assert window.give(messages, size)

        for step, argument in steps:
            if step == "send":
                sending.append(asyncio.create_task(send(argument)))
            elif step == "now" and window.take_nowait(argument):
                sent(argument)
            elif step == "take":
                take()
            elif step == "cancel" and sending:
                sending[argument % len(sending)].cancel()
            if argument % 3:
                await asyncio.sleep(0)
        for _ in range(4 * len(steps) + 4):
            await asyncio.sleep(0)
            take()
        assert all(task.done() for task in sending) and not window.waited_for, "no deadlock"
        assert all(task.cancelled() or task.exception() is None for task in sending)
        messages, size = debt.pay()
        assert not (messages or size) or window.give(messages, size)
        assert (window.available, window.available_bytes) == (capacity, capacity_bytes)

    asyncio.run(play())


async def test_a_window_that_is_resized_keeps_count():
    window = CreditWindow(4, 100)
    assert all(window.take_nowait(10) for _ in range(4))
    window.resize(2, 50)
    assert not window.take_nowait() and window.give(3, 30) and window.take_nowait(1)
    assert not window.give(3, 11) and window.give(2, 11)
    assert (window.available, window.available_bytes) == (2, 50)
