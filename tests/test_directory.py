"""The table of actors: who waits is woken, who watches misses nothing, and what is old changes nothing."""

import asyncio
import random

import pytest
import virtual_loop

from headrace.runtime import Status
from headrace.runtime.directory import WATCH_BEHIND, Directory
from headrace.runtime.errors import ActorDied, UnknownActor
from headrace.runtime.exits import Exit

KILLED = Exit(kind="signal", detail="killed by SIGKILL", code=9)


def status(state, incarnation, name="a"):
    return Status(name=name, node="n#1", state=state, incarnation=incarnation, exit=KILLED if state == "down" else None)


def test_every_watcher_sees_every_change_in_order_at_its_own_pace():
    for seed in range(100):

        async def main(seed=seed):
            draws, directory, seen, told = random.Random(seed), Directory(), {}, []

            async def watcher(number):
                await asyncio.sleep(draws.random())
                begun = len(told)
                async for change in directory.watch("a"):
                    seen.setdefault(number, (begun, []))[1].append(change)
                    await asyncio.sleep(draws.choice([0, 0, 0.5]))

            watchers = [asyncio.create_task(watcher(number)) for number in range(5)]
            for incarnation in range(1, 11):
                for state in ("starting", "up", "down"):
                    told.append(status(state, incarnation))
                    directory.update(told[-1])
                    directory.update(status("up", incarnation, name="other"))
                    await asyncio.sleep(draws.choice([0, 0.1]))
            await asyncio.sleep(100)
            for task in watchers:
                task.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            for begun, changes in seen.values():
                assert changes == told[max(0, begun - 1) :]
            assert len(seen) == 5

        virtual_loop.run(main, seed)


async def test_a_watcher_that_is_far_behind_misses_the_oldest_and_one_that_is_gone_costs_nothing():
    directory = Directory()
    watcher = directory.watch("a")
    for incarnation in range(1, 3 * WATCH_BEHIND):
        directory.update(status("up", incarnation))
    assert (await anext(watcher)).incarnation == 2 * WATCH_BEHIND
    del watcher
    assert not directory._watchers["a"]


def test_who_waits_is_woken_in_order_and_who_gives_up_leaves_nothing():
    async def main():
        directory, woken = Directory(), []
        directory.update(status("starting", 1))

        async def waiter(number):
            found = await directory.when_up("a")
            woken.append((number, found.incarnation))

        waiters = []
        for number in range(6):
            waiters.append(asyncio.create_task(waiter(number)))
            await asyncio.sleep(1)
        waiters[2].cancel()
        directory.update(status("down", 1))
        await asyncio.sleep(1)
        assert not woken
        directory.update(status("up", 2))
        await asyncio.gather(*waiters, return_exceptions=True)
        assert woken == [(number, 2) for number in (0, 1, 3, 4, 5)] and not directory._waiting
        directory.update(status("up", 1))
        assert directory.get("a").incarnation == 2, "a dead incarnation never comes back"

    virtual_loop.run(main)


async def test_waiting_for_one_that_stays_down_or_is_unknown_fails():
    directory = Directory()
    with pytest.raises(UnknownActor, match="no actor named 'a'; known: none"):
        await directory.when_up("a")
    directory.update(status("down", 1))
    waiting = asyncio.create_task(directory.when_up("a"))
    await asyncio.sleep(0)
    directory.update(Status(name="a", node="n#1", state="stopped", incarnation=1, exit=KILLED))
    with pytest.raises(ActorDied, match="a has stopped for good: killed by SIGKILL"):
        await waiting
