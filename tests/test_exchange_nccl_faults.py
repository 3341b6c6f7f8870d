"""The state machine behind NCCL against a library that hangs, fails or dies at every step: whole versions, or a report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
import virtual_loop
from scripted_fabric import DEADLINE_S, LIMITS, NUM_BUCKETS, PUBLISHERS, RESTART_S, Fault, Process, World, faults

from headrace.runtime.errors import ActorDied, CommunicatorHung, TransferFailed

MEMBERS = ("p0", "p1", "a", "b")
ATTEMPT_S = DEADLINE_S + LIMITS.init_s + LIMITS.look_s + 4 * LIMITS.abort_s + RESTART_S
"""No attempt may take longer, whatever hangs."""


class Cluster:
    """The members, and who tells them what to do: as coordinator.Exchange does it, without the rest."""

    def __init__(self, script: Sequence[Fault] = ()) -> None:
        self.world = World(script)
        self.processes = {name: Process(self.world, name) for name in MEMBERS}
        self.epoch = 0
        self.formed: tuple[str, ...] = ()
        self.reports: list[str] = []

    async def publish(self, version: int, receivers: Sequence[str]) -> set[str]:
        """Who holds the version at the end; who does not is in the reports."""
        loop = asyncio.get_running_loop()
        left = list(receivers)
        for _ in range(4):
            members = (*PUBLISHERS, *left)
            begun = loop.time()
            lost, whole = await self._attempt(version, members)
            assert loop.time() - begun <= ATTEMPT_S
            self.reports += [f"{name} is lost" for name in lost]
            if not lost and whole == set(left):
                return set(receivers) & {n for n in receivers if self.processes[n].live == [version] * NUM_BUCKETS}
            self.formed = ()
            left = [name for name in left if name not in lost and name not in whole]
            if lost & set(PUBLISHERS):
                self.reports.append(f"version {version} failed: a publisher is lost")
                break
            if not left:
                break
        return {n for n in receivers if self.processes[n].live == [version] * NUM_BUCKETS}

    async def _attempt(self, version: int, members: tuple[str, ...]) -> tuple[set[str], set[str]]:
        """(who is lost, which receivers have it)"""
        over = self.epoch if self.formed != members else -1
        if over >= 0:
            self.epoch, self.formed = self.epoch + 1, members
        epoch, token = self.epoch, b"%d" % self.epoch
        lost: set[str] = set()
        for name in members:
            try:
                await self.processes[name].ask(self.processes[name].retire(over))
            except (ActorDied, CommunicatorHung):
                lost.add(name)
        if lost:
            return lost, set()
        work = {
            name: asyncio.ensure_future(p.ask(p.transfer(version, epoch, members, token)))
            for name in members
            for p in [self.processes[name]]
        }
        await asyncio.wait(work.values(), return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in work.values()):
            for name in members:
                process = self.processes[name]
                if not process.dead:
                    process.communicator.tell(epoch, "another member has failed")
        await asyncio.wait(work.values())
        whole = set()
        for name, task in work.items():
            error = task.exception()
            if error is None:
                whole |= {name} - set(PUBLISHERS)
            elif isinstance(error, (ActorDied, CommunicatorHung)):
                lost.add(name)
            else:
                assert isinstance(error, TransferFailed), error
        return lost, whole

    def check(self) -> None:
        """Nobody serves a mixture; whoever died was reported."""
        for name, process in self.processes.items():
            assert len(set(process.live)) == 1, (name, process.live)

    async def settle(self) -> None:
        """All that died are there again."""
        for process in self.processes.values():
            if process.reborn:
                await process.reborn


def live_through(script: Sequence[Fault]) -> Cluster:
    """Version 1 to a; b joins; version 2 to both; all faults having struck or not, version 3 must come to both."""

    async def main() -> Cluster:
        cluster = Cluster(script)
        for version, receivers in ((1, ("a",)), (2, ("a", "b"))):
            holds = await cluster.publish(version, receivers)
            cluster.check()
            assert holds == set(receivers) or cluster.reports, "somebody lacks the version, and nothing is said"
            await cluster.settle()
        cluster.world.script.clear()
        deaths = sum(len(process.deaths) for process in cluster.processes.values())
        assert await cluster.publish(3, ("a", "b")) == {"a", "b"}
        cluster.check()
        assert deaths == sum(len(process.deaths) for process in cluster.processes.values())
        for process in cluster.processes.values():
            await process.communicator.close()
            assert process.communicator.waits() == []
        return cluster

    return virtual_loop.run(main, limit_s=200.0)


def test_without_faults_all_get_every_version():
    cluster = live_through([])
    assert cluster.reports == []
    assert cluster.epoch == 2, "a communicator is kept as long as its members are the same"


@pytest.mark.parametrize("member", MEMBERS)
def test_every_fault_at_every_step(member: str):
    struck = 0
    for fault in faults([member], nths=(1, 2, 4)):
        cluster = live_through([fault])
        struck += bool(cluster.world.struck)
        killed = {name for name, process in cluster.processes.items() if process.deaths}
        if cluster.world.struck and fault.step != "init":
            assert killed <= {member}, (fault, killed, "a fault costs nobody else his process")
    assert struck > 60
