"""The state machine behind NCCL, with a library that hangs, fails or dies at every step: whole versions or a report."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

import pytest
import virtual_loop
from scripted_fabric import DEADLINE_S, PUBLISHERS, RESTART_S, STALL_S, Fault, Process, World, faults

from headrace.runtime.errors import TransferFailed
from headrace.runtime.exchange.convoy import Convoy, Patience
from headrace.runtime.exchange.header import Manifest

MEMBERS = ("p0", "p1", "a", "b")
PATIENCE = Patience(retire_s=2.0, transfer_s=DEADLINE_S, stall_s=STALL_S)
ATTEMPT_S = DEADLINE_S + 4 * PATIENCE.retire_s + RESTART_S
"""No attempt may take longer, whatever hangs."""


class Cluster:
    """The members, and who leads them."""

    def __init__(self, script: Sequence[Fault] = ()) -> None:
        self.world = World(script)
        self.processes = {name: Process(self.world, name) for name in MEMBERS}
        self.epochs = itertools.count(1)
        self.reports: list[str] = []
        self.convoy = Convoy(
            lambda: next(self.epochs), patience=PATIENCE, on_lost=lambda name, why: self.reports.append(why)
        )

    async def publish(self, version: int, receivers: Sequence[str]) -> set[str]:
        """Who holds the version whole at the end: all but those that are reported."""
        begun, told = asyncio.get_running_loop().time(), len(self.reports)
        publishers = {name: self.processes[name] for name in PUBLISHERS}
        try:
            lost = await self.convoy.publish(manifest(version), publishers, {n: self.processes[n] for n in receivers})
        except TransferFailed as failure:
            self.reports.append(str(failure))
        else:
            assert all(self.processes[n].version == version for n in receivers if n not in lost)
            assert len(self.reports) - told == len(lost), "each is reported once"
        assert asyncio.get_running_loop().time() - begun <= 4 * ATTEMPT_S
        assert all(process.version >= 0 for process in self.processes.values()), "somebody serves a mixture"
        return {name for name in receivers if self.processes[name].version == version}

    async def settle(self) -> None:
        """All that died are there again."""
        for process in self.processes.values():
            if process.reborn:
                await process.reborn


def manifest(version: int) -> Manifest:
    return Manifest(
        name="p0", version=version, pid=1, fd=0, incarnation=1, generation=version, nbytes=0, bucket_bytes=1, tensors=[]
    )


def live_through(script: Sequence[Fault]) -> Cluster:
    """Version 1 to a; b joins; version 2 to both; and when nothing fails any more, version 3 must come to both."""

    async def main() -> Cluster:
        cluster = Cluster(script)
        for version, receivers in ((1, ("a",)), (2, ("a", "b"))):
            holds = await cluster.publish(version, receivers)
            assert holds == set(receivers) or cluster.reports, "somebody lacks the version, and nothing is said"
            await cluster.settle()
        cluster.world.script.clear()
        deaths = [list(process.deaths) for process in cluster.processes.values()]
        assert await cluster.publish(3, ("a", "b")) == {"a", "b"}
        assert deaths == [process.deaths for process in cluster.processes.values()]
        for process in cluster.processes.values():
            await process.communicator.close()
            assert process.communicator.waits() == []
        return cluster

    return virtual_loop.run(main, limit_s=300.0)


def test_without_faults_all_get_every_version():
    cluster = live_through([])
    assert cluster.reports == []
    assert next(cluster.epochs) == 3, "a communicator is kept as long as its members are the same"


@pytest.mark.parametrize("member", MEMBERS)
def test_every_fault_at_every_step(member: str):
    struck = 0
    for fault in faults([member], nths=(1, 2)):
        cluster = live_through([fault])
        struck += bool(cluster.world.struck)
        killed = {name for name, process in cluster.processes.items() if process.deaths}
        if cluster.world.struck and fault.step != "init":
            assert killed <= {member}, (fault, killed, "a fault costs nobody else his process")
    assert struck > 50


def pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[Fault, Fault]]:
    """Two faults in a row: the second is armed when the first has struck."""
    return list(itertools.product(faults(first), faults(second)))


def test_two_faults_in_a_row():
    for script in random.Random(0).sample(pairs(MEMBERS, MEMBERS), 120):
        live_through(script)


@pytest.mark.slow
@pytest.mark.parametrize("first", ("p0", "a"))
@pytest.mark.parametrize("second", ("p0", "a", "b"))
def test_all_pairs_of_faults(first: str, second: str):
    """Members differ in nothing but their names, and the second publisher does a part of what the first does."""
    struck = sum(not live_through(script).world.script for script in pairs([first], [second]))
    assert struck > 500


def test_a_member_that_always_fails_costs_nobody_but_itself():
    async def main() -> None:
        cluster = Cluster()
        cluster.world.always = Fault("a", "receive", "error")
        assert await cluster.publish(1, ("a", "b")) == {"b"}
        assert len(cluster.reports) == 1
        assert "a: receive: remote process exited" in cluster.reports[0]
        cluster.world.always = None
        assert await cluster.publish(2, ("a", "b")) == {"a", "b"}

    virtual_loop.run(main)


def test_a_publisher_that_always_fails_is_reported():
    async def main() -> None:
        cluster = Cluster()
        assert await cluster.publish(1, ("a", "b")) == {"a", "b"}
        cluster.world.always = Fault("p0", "group_end", "error")
        assert await cluster.publish(2, ("a", "b")) == set()
        assert len(cluster.reports) == 1
        assert "version 2 reached nobody" in cluster.reports[0]
        assert {cluster.processes[name].version for name in "ab"} == {1}

    virtual_loop.run(main)
