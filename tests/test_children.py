"""What carries supervision out, on a virtual clock under hundreds of seeds: storms, races, stops in the middle."""

import asyncio
import random

import pytest
import virtual_loop

from headrace.runtime import Actor, RestartPolicy
from headrace.runtime.children import Children, Member
from headrace.runtime.errors import ActorDied, LaunchError, RemoteError, RestartBudgetExceeded
from headrace.runtime.events import EventLog
from headrace.runtime.exits import Exit
from headrace.runtime.strategy import Supervisor

CRASH = Exit(kind="exception", detail="ValueError: x")
KILLED = Exit(kind="signal", detail="killed by SIGKILL", code=9)
STURDY = RestartPolicy(max_restarts=10**6, backoff_s=0.01, max_backoff_s=0.1)
STRATEGIES = ["one_for_one", "one_for_all", "rest_for_one"]


class Cluster:
    """Nodes and actors that are nothing but names, slow and unreliable; checks that what it is told makes sense."""

    def __init__(self, seed=0, *, flaky=0.0, seconds=0.1):
        self.random = random.Random(seed)
        self.flaky, self.seconds = flaky, seconds
        self.nodes, self.running = set(), {}
        self.locks = {}
        self.history, self.tasks, self.failures = [], set(), []
        self.events = EventLog(None, keep=100_000)
        self.supervisor = Supervisor(seed)
        self.children = Children(self, self.supervisor, self.events, self.start_task, self.failures.append)

    def start_task(self, work):
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.on_done)
        return task

    def on_done(self, task):
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            raise task.exception()

    async def takes_time(self):
        await asyncio.sleep(self.random.uniform(0, self.seconds))

    async def open(self, node):
        async with self.locks.setdefault(node, asyncio.Lock()):
            if node not in self.nodes:
                await self.takes_time()
                if self.random.random() < self.flaky:
                    error = LaunchError(f"node {node} did not start")
                    error.exit = KILLED
                    raise error
                self.nodes.add(node)

    async def start(self, member):
        if member.node not in self.nodes:
            raise ActorDied("its node is down")
        assert member.name not in self.running, f"{member.name} runs already"
        member.incarnation += 1
        await self.takes_time()
        if member.node not in self.nodes:
            raise ActorDied("its node died")
        if self.random.random() < self.flaky:
            raise RemoteError("start raised", "OSError", "Traceback: ...")
        self.running[member.name] = member.incarnation
        self.tell(member, "up", None)

    async def stop(self, member, why):
        await self.takes_time()
        self.running.pop(member.name, None)

    def tell(self, member, state, why):
        now = asyncio.get_running_loop().time()
        self.history.append((round(now, 6), member.name, state, member.incarnation, member.epoch))

    async def spawn(self, name, node, group="root", policy=STURDY):
        await self.children.spawn(Member(name, Actor(), node, policy, group))

    def crash(self, name):
        """It ends now; the report takes its time."""
        incarnation = self.running.pop(name, None)
        if incarnation is not None:
            delay = self.random.uniform(0, self.seconds)
            asyncio.get_running_loop().call_later(delay, self.children.ended, name, incarnation, CRASH)

    def kill(self, node):
        if node in self.nodes:
            self.nodes.discard(node)
            for member in self.children.node_died(node, KILLED):
                self.running.pop(member.name, None)
                self.tell(member, "down", KILLED)

    async def close(self):
        self.children.close()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def household(cluster, policy=STURDY):
    """A gang over three nodes, a chain with a group in it, and singles; everything is up."""
    cluster.supervisor.add_group("gang", "one_for_all", policy)
    cluster.supervisor.add_group("chain", "rest_for_one", policy)
    cluster.supervisor.add_group("sinks", "one_for_one", policy, "chain")
    spawns = [cluster.spawn(f"rank{i}", f"n{i}", "gang", policy) for i in range(3)]
    spawns += [cluster.spawn(f"link{i}", f"n{i % 2}", "chain", policy) for i in range(3)]
    spawns += [cluster.spawn(f"sink{i}", "n2", "sinks", policy) for i in range(2)]
    spawns += [cluster.spawn(f"single{i}", f"n{i}", "root", policy) for i in range(2)]
    await asyncio.gather(*spawns)


async def storm(cluster, blows=30, within_s=3.0):
    for _ in range(blows):
        await asyncio.sleep(cluster.random.uniform(0, 2 * within_s / blows))
        if cluster.random.random() < 0.3:
            cluster.kill(cluster.random.choice(["n0", "n1", "n2"]))
        elif cluster.running:
            cluster.crash(cluster.random.choice(sorted(cluster.running)))


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_after_a_storm_all_are_up_again_and_gangs_are_of_one_epoch(first):
    for seed in range(first, first + 50):

        async def main(seed=seed):
            cluster = Cluster(seed)
            await household(cluster)
            cluster.flaky = 0.2
            await storm(cluster)
            cluster.flaky = 0.0
            await asyncio.sleep(100)
            assert sorted(cluster.running) == sorted(cluster.children.table) and not cluster.failures
            table = cluster.children.table
            assert all(cluster.running[name] == member.incarnation for name, member in table.items())
            for member in table.values():
                group = cluster.supervisor.groups[member.group]
                assert group.strategy != "one_for_all" or member.epoch == group.epoch
            assert cluster.supervisor.groups["gang"].epoch > 1
            assert not cluster.tasks
            await cluster.close()

        virtual_loop.run(main, seed)


def test_members_of_a_gang_never_run_in_two_epochs_at_once():
    for seed in range(100):

        async def main(seed=seed):
            cluster = Cluster(seed)
            await household(cluster)
            epochs = {}
            started = cluster.start

            async def watched(member):
                for name, epoch in epochs.items():
                    assert name not in cluster.running or member.group != "gang" or epoch == member.epoch
                await started(member)
                if member.group == "gang":
                    epochs[member.name] = member.epoch

            cluster.start = watched
            await storm(cluster)
            await asyncio.sleep(100)
            await cluster.close()

        virtual_loop.run(main, seed)


def test_the_same_seed_gives_the_same_history_and_other_seeds_others():
    async def main(seed):
        cluster = Cluster(seed)
        await household(cluster)
        cluster.flaky = 0.1
        await storm(cluster)
        cluster.flaky = 0.0
        await asyncio.sleep(50)
        await cluster.close()
        return cluster.history

    histories = [virtual_loop.run(lambda seed=seed: main(seed), seed) for seed in range(10)]
    assert histories == [virtual_loop.run(lambda seed=seed: main(seed), seed) for seed in range(10)]
    assert len({tuple(history) for history in histories}) == 10


def test_a_budget_that_is_exceeded_ends_it_once_and_nothing_follows():
    for seed in range(100):

        async def main(seed=seed):
            cluster = Cluster(seed)
            await household(cluster, RestartPolicy(max_restarts=3, window_s=1e6, backoff_s=0.0))
            for _ in range(200):
                await storm(cluster, blows=1, within_s=0.3)
                if cluster.failures:
                    break
            (error,) = cluster.failures
            assert isinstance(error, RestartBudgetExceeded)
            restarts = dict(cluster.children.restarts)
            await asyncio.sleep(1)
            known = len(cluster.history)
            await asyncio.sleep(100)
            assert len(cluster.history) == known and dict(cluster.children.restarts).keys() >= restarts.keys()
            await cluster.close()

        virtual_loop.run(main, seed)


def test_closing_at_any_moment_leaves_nothing_and_disappoints_whoever_waits():
    for seed in range(200):

        async def main(seed=seed):
            cluster = Cluster(seed, flaky=0.1)
            growing = asyncio.create_task(household(cluster))
            raging = asyncio.create_task(storm(cluster))
            await asyncio.sleep(cluster.random.uniform(0, 2))
            await cluster.close()
            for task in (growing, raging):
                task.cancel()
            await asyncio.gather(growing, raging, return_exceptions=True)
            known = len(cluster.history)
            for name in list(cluster.running):
                cluster.crash(name)
            for node in list(cluster.nodes):
                cluster.nodes.discard(node)
                cluster.children.node_died(node, KILLED)
            await asyncio.sleep(100)
            assert not cluster.tasks and len(cluster.history) == known

        virtual_loop.run(main, seed)


def test_a_first_start_that_fails_is_its_spawners_and_holds_up_nobody():
    for seed in range(50):

        async def main(seed=seed):
            cluster = Cluster(seed)
            cluster.supervisor.add_group("gang", "one_for_all", STURDY)
            starts = cluster.start

            async def start(member):
                if member.name == "bad":
                    await cluster.takes_time()
                    raise RemoteError("$node@n0.spawn raised OSError: no disk", "OSError", "")
                await starts(member)

            cluster.start = start
            results = await asyncio.gather(
                *(cluster.spawn(name, "n0", "gang") for name in ("a", "bad", "b")), return_exceptions=True
            )
            assert [type(result) for result in results] == [type(None), RemoteError, type(None)]
            assert sorted(cluster.running) == ["a", "b"] and cluster.children.restarts.total() == 0
            assert cluster.supervisor.groups["gang"].epoch == 1
            await cluster.close()

        virtual_loop.run(main, seed)


def test_a_node_that_is_killed_before_it_was_up_is_tried_again_within_the_budget():
    async def main():
        cluster = Cluster(0, flaky=1.0)
        spawning = [asyncio.create_task(cluster.spawn(f"a{i}", "n0", policy=STURDY)) for i in range(3)]
        await asyncio.sleep(5)
        assert not any(task.done() for task in spawning)
        failed = [event for event in cluster.events.recent if event["event"] == "node_start_failed"]
        assert 5 < len(failed) < 200, "all three share one attempt, and attempts keep a distance"
        cluster.flaky = 0.0
        await asyncio.gather(*spawning)
        assert sorted(cluster.running) == ["a0", "a1", "a2"]
        await cluster.close()

    virtual_loop.run(main, 1)


def test_a_spawn_that_is_given_up_leaves_no_member_whatever_happens_meanwhile():
    for seed in range(200):

        async def main(seed=seed):
            cluster = Cluster(seed, seconds=1.0)
            await cluster.spawn("a", "n0")
            spawning = asyncio.create_task(cluster.spawn("b", "n0"))
            for _ in range(2):
                await asyncio.sleep(cluster.random.uniform(0, 0.5))
                cluster.kill("n0")
            spawning.cancel()
            await asyncio.gather(spawning, return_exceptions=True)
            if not spawning.cancelled():
                await cluster.close()
                return
            await asyncio.sleep(20)
            assert sorted(cluster.running) == ["a"] == sorted(cluster.children.table)
            await cluster.close()

        virtual_loop.run(main, seed)


def test_the_first_restart_is_immediate_and_later_ones_wait():
    async def main():
        cluster = Cluster(0, seconds=0.0)
        await cluster.spawn("a", "n0", policy=RestartPolicy(backoff_s=1.0, max_restarts=5))
        times = []
        for _ in range(4):
            begun = asyncio.get_running_loop().time()
            cluster.crash("a")
            await asyncio.sleep(0.0001)
            held = cluster.children.waits()
            assert [row["why"] for row in held] == ["its back-off"] * bool(times) and len(held) == len(times[:1])
            while "a" not in cluster.running:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            times.append(asyncio.get_running_loop().time() - begun)
        assert times[0] < 0.01
        for waited, expected in zip(times[1:], [1.0, 2.0, 4.0], strict=True):
            assert 0.8 * expected <= waited <= 1.2 * expected + 0.01
        await cluster.close()

    virtual_loop.run(main, 1)
