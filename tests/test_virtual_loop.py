"""The loop that tests use: its clock jumps, its seed decides, and it says when nothing can happen any more."""

import asyncio

import pytest
import virtual_loop


async def racers():
    order = []

    async def racer(number):
        for _ in range(3):
            await asyncio.sleep(0)
            order.append(number)

    await asyncio.gather(*(racer(i) for i in range(4)))
    return tuple(order)


def test_an_hour_passes_at_once_and_timers_come_in_order():
    async def main():
        loop, seen = asyncio.get_running_loop(), []
        for delay in (3600.0, 1.0, 60.0):
            loop.call_later(delay, lambda delay=delay: seen.append((delay, loop.time())))
        await asyncio.sleep(4000)
        return seen

    assert virtual_loop.run(main, 1) == [(1.0, 1.0), (60.0, 60.0), (3600.0, 3600.0)]


def test_the_same_seed_gives_the_same_order_and_others_give_others():
    orders = [virtual_loop.run(racers, seed) for seed in range(20)]
    assert orders == [virtual_loop.run(racers, seed) for seed in range(20)]
    assert len(set(orders)) > 15
    assert virtual_loop.run(racers) == tuple([*range(4)] * 3), "without a seed: asyncio's own order"


def test_both_orders_of_two_independent_steps_are_tried():
    async def main():
        seen = []
        await asyncio.gather(note(seen, 0), note(seen, 1))
        return tuple(seen)

    async def note(seen, i):
        seen.append(i)

    assert {virtual_loop.run(main, seed) for seed in range(20)} == {(0, 1), (1, 0)}


def test_a_wait_that_nobody_will_end_is_named():
    async def waits_for_ever():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(virtual_loop.Stuck, match=r"nothing can happen any more at 5 s\n(?s:.*)waits_for_ever"):

        async def main():
            await asyncio.sleep(5)
            await waits_for_ever()

        virtual_loop.run(main, 3)


def test_time_and_turns_are_bounded():
    async def sleeps():
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1)

    async def spins():
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(virtual_loop.Stuck, match="not done within 100 virtual seconds"):
        virtual_loop.run(sleeps, 1, limit_s=100)
    with pytest.raises(virtual_loop.Stuck, match="turns for ever"):
        virtual_loop.run(spins, 1, max_turns=1000)


def test_what_is_left_behind_is_an_error():
    async def main():
        main.task = asyncio.create_task(asyncio.sleep(9))

    with pytest.raises(AssertionError, match="tasks are left"):
        virtual_loop.run(main, 1)
