"""Mailboxes serve lanes in order and lose nothing; credits come back, one by one, in the order of asking."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.errors import MailboxFull
from headrace.runtime.mailbox import CreditWindow, Lane, Mailbox


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
