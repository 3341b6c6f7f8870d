"""Actors that are configured alike: their number changes while real processes come and go."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from pool_actors import Chief, Clerk, Rank

from headrace.runtime import RestartPolicy, System
from headrace.runtime.cluster import load_cluster
from headrace.runtime.errors import ActorDied, RemoteError, UnknownActor
from headrace.runtime.gang import with_ranks
from headrace.runtime.layout import Layout
from headrace.runtime.toml import read

QUICK = RestartPolicy(max_restarts=20, backoff_s=0.0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_more_and_fewer_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    async with System(tmp_path / "run") as system:
        chief = await system.spawn(Chief(), name="chief")
        first = await system.spawn(Clerk(office="north"), name="clerk", node="desk", policy=QUICK)
        assert await chief.resize("clerk", 3) == ["clerk", "clerk_2", "clerk_3"]
        said = [await system.find(name).who() for name in ("clerk", "clerk_2", "clerk_3")]
        assert [(name, office) for name, office, _ in said] == [(n, "north") for n in ("clerk", "clerk_2", "clerk_3")]
        pids = [pid for _, _, pid in said]
        assert len({*pids, os.getpid()}) == 4, "each has a process"

        os.kill(pids[1], signal.SIGKILL)  # A copy is supervised as the first one is.
        name, _, again = await asyncio.wait_for(_back(system, "clerk_2"), 10)
        assert (name, again) != ("clerk_2", pids[1])

        assert await chief.resize("clerk", 2) == ["clerk", "clerk_2"]
        with pytest.raises(ActorDied, match="clerk_3 has stopped for good"):
            await system.find("clerk_3").who()
        assert not alive(pids[2]), "its node has ended"
        assert [row["name"] for row in system.tree()] == ["chief", "clerk", "clerk_2"]

        assert await chief.resize("clerk", 3) == ["clerk", "clerk_2", "clerk_3"]
        assert (await system.find("clerk_3").who())[0] == "clerk_3", "one of that name may come again"
        assert await chief.resize("clerk", 1) == ["clerk"]
        assert (await first.who())[2] == pids[0], "the first has not noticed"


async def _back(system: System, name: str) -> tuple[str, str, int]:
    while True:
        try:
            return await system.find(name).who()
        except ActorDied:
            await asyncio.sleep(0.01)


async def test_what_can_not_be_is_refused_and_leaves_the_others(tmp_path: Path) -> None:
    async with System(tmp_path / "run") as system:
        chief = await system.spawn(Chief(), name="chief")
        clerk = await system.spawn(Clerk(office="closed"), name="clerk", node="desk", policy=QUICK)
        for count, said in ((0, "1 to 4096 of clerk, got 0"), (5000, "got 5000")):
            with pytest.raises(RemoteError, match=said):
                await chief.resize("clerk", count)
        with pytest.raises(UnknownActor, match="no actor named 'porter' is supervised here"):
            await chief.resize("porter", 2)
        with pytest.raises(RemoteError, match="no room for a second one"):
            await chief.resize("clerk", 2)
        assert await chief.resize("clerk", 1) == ["clerk"]
        assert (await clerk.who())[0] == "clerk"
        assert list(system.pids()) == ["root", "desk"] or not alive(system.pids()["clerk_2"])


async def test_a_copy_of_a_worker_group_has_all_its_ranks_and_fails_as_one(tmp_path: Path) -> None:
    async with System(tmp_path / "run") as system:
        chief = await system.spawn(Chief(), name="chief")
        gang = system.group("rank", strategy="one_for_all", policy=QUICK)
        layout = Layout(dp=2)
        await gang.spawn(Rank(rank=0, layout=layout), name="rank", node="one", policy=QUICK)
        await gang.spawn(Rank(rank=1, layout=layout), name="rank/1", node="one-1", policy=QUICK)
        assert await chief.resize("rank", 2) == ["rank", "rank_2"]
        assert await system.find("rank_2/1").who() == ("rank_2/1", 1, 1)
        os.kill(system.pids()["rank_2-1"], signal.SIGKILL)
        async with asyncio.timeout(10):
            while [g["epoch"] for g in system.groups() if g["name"] == "rank_2"] != [2]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (await _back(system, "rank_2"))[2] == 2, "both were started again"
        assert (await system.find("rank").who())[2] == 1, "another gang is another gang"
        assert await chief.resize("rank", 1) == ["rank"]
        assert {group["name"] for group in system.groups()} == {"root", "rank"}


def test_a_cluster_file_may_ask_for_several(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        "[run]\nname = 'x'\n[nodes.desk]\nthreads = 2\n"
        "[actors.clerk]\nclass = 'pool_actors:Clerk'\nnode = 'desk'\ncount = 3\n"
        "[actors.rank]\nclass = 'pool_actors:Rank'\ncount = 2\nranks = 2\n"
    )
    cluster, _ = load_cluster(read(file, []), {})
    whole = with_ranks(cluster)
    homes = {spec.name: spec.node for spec in whole.actors.values()}
    assert homes == {
        "clerk": "desk", "clerk_2": "clerk_2", "clerk_3": "clerk_3",
        "rank": "root", "rank/1": "rank-1", "rank_2": "rank_2", "rank_2/1": "rank_2-1",
    }  # fmt: skip
    assert whole.nodes["clerk_3"].threads == 2
    assert whole.actors["rank_2/1"].group == "rank_2"
    assert with_ranks(whole).actors.keys() == whole.actors.keys()
