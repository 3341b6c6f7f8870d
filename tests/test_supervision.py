"""Groups, epochs, kept state, questions to all nodes, one system per directory: with real processes that are killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from sample_actors import Echo, Relay, until
from supervised_actors import Forwarder, Rare, Saver, Tally, Watcher

from headrace.runtime import RestartPolicy, System, hosting, timeout
from headrace.runtime.errors import ActorDied, DirectoryInUse, RestartBudgetExceeded

QUICK = RestartPolicy(max_restarts=50, backoff_s=0.0)


def events(system, kind):
    return [e for e in system.events.recent if e["event"] == kind]


async def is_up(ref, epoch):
    try:
        return (await ref.look())[2] == epoch
    except ActorDied:
        return False


@pytest.fixture
async def system(tmp_path):
    async with System(tmp_path / "run", max_state_bytes=100_000) as system:
        yield system


# Groups


async def test_a_gang_restarts_as_one_with_an_epoch_more(system):
    gang = system.group("ranks", strategy="one_for_all", policy=QUICK)
    ranks = [await gang.spawn(Tally(), name=f"rank{i}", node=f"n{i}") for i in range(3)]
    single = await system.spawn(Tally(), name="single", node="n1")
    before = [await rank.look() for rank in ranks]
    await asyncio.gather(*(actor.add(5) for actor in (*ranks, single)))
    os.kill(before[0][1], signal.SIGKILL)
    await until(lambda: is_up(ranks[2], 2))
    after = [await rank.look() for rank in ranks]
    assert [look[2] for look in after] == [2, 2, 2] and [look[0] for look in after] == [0, 0, 0]
    assert after[0][1] != before[0][1] and [look[1] for look in after[1:]] == [look[1] for look in before[1:]]
    assert (await single.look())[0] == 5, "it is not in the group"
    assert gang.epoch == 2 and system.restarts == {"rank0": 1, "rank1": 1, "rank2": 1}
    assert [row["group"] for row in system.tree()] == ["ranks"] * 3 + ["root"]
    (row,) = [row for row in system.groups() if row["name"] == "ranks"]
    assert row == {
        "name": "ranks", "parent": "root", "strategy": "one_for_all", "epoch": 2, "restarts": 1, "members": 3,
    }  # fmt: skip
    ranks[1].boom.cast()
    await until(lambda: is_up(ranks[2], 3))
    (first, second) = events(system, "group_restart")
    assert (first["epoch"], second["epoch"]) == (2, 3) and "killed by SIGKILL" in first["reason"]


async def test_a_group_that_fails_too_often_fails_its_parent_and_in_the_end_the_system(system):
    outer = system.group("outer", strategy="rest_for_one", policy=RestartPolicy(max_restarts=1))
    first = await outer.spawn(Tally(), name="first")
    inner = system.group("inner", policy=RestartPolicy(max_restarts=1), parent=outer)
    worker = await inner.spawn(Tally(), name="worker", node="n0")
    last = await outer.spawn(Tally(), name="last")
    for incarnation in (2, 3, 4):
        worker.boom.cast()
        await until(lambda n=incarnation: system.node.directory.last_incarnation("worker") == n)
        await worker.look()
    assert (await last.look())[2] == 1 and system.restarts == {"worker": 3, "last": 1}, "outer restarted once"
    assert (await first.look())[2] == 1 and inner.epoch == 2
    worker.boom.cast()
    with pytest.raises(RestartBudgetExceeded, match="group outer failed again after 1 restarts"):
        await asyncio.wait_for(asyncio.shield(system.failed), 20)


async def test_a_member_that_does_not_stop_is_killed_with_its_node_so_that_no_old_epoch_speaks(system, monkeypatch):
    monkeypatch.setattr(hosting, "STOP_S", 0.2)
    monkeypatch.setattr(hosting, "CANCEL_S", 0.1)
    gang = system.group("ranks", strategy="one_for_all", policy=QUICK)
    total = await system.spawn(Tally(), name="total")
    frozen = await gang.spawn(Forwarder(to="total"), name="frozen", node="n0")
    other = await gang.spawn(Tally(), name="other", node="n1")
    pid = system.pids()["n0"]
    frozen.forward.cast(1)
    os.kill(pid, signal.SIGSTOP)
    other.boom.cast()
    async with timeout(30):
        await until(lambda: is_up(other, 2))
    assert (await frozen.look())[1:3] == (system.pids()["n0"], 2) and system.pids()["n0"] != pid
    assert events(system, "actor_stop_late")[0]["actor"] == "frozen"
    assert (await total.look())[0] == 0, "the message that was under way in epoch 1 died with it"


async def test_names_of_groups_are_checked(system):
    system.group("g")
    with pytest.raises(ValueError, match="there is a group 'g' already"):
        system.group("g")
    with pytest.raises(ValueError, match="group name 'a b'"):
        system.group("a b")


# Exits


async def test_watchers_learn_how_it_ended(system):
    tally = await system.spawn(Tally(), name="tally", node="n0", policy=QUICK)
    watcher = await system.spawn(Watcher(of="tally"), name="watcher", node="n1")
    tally.boom.cast()
    await until(watcher.seen)
    os.kill(system.pids()["n0"], signal.SIGKILL)
    exits = await until(lambda: at_least(watcher, 2))
    assert (exits[0].kind, exits[0].detail) == ("exception", "ValueError: boom") and "in boom" in exits[0].traceback
    assert not any(exit.kind == "stopped" for exit in exits)
    assert (exits[-1].kind, exits[-1].code) == ("signal", 9) and "killed by SIGKILL" in exits[-1].detail
    assert events(system, "node_exit")[0]["kind"] == "signal" and events(system, "actor_exit")[0]["kind"] == "exception"


async def at_least(watcher, count):
    seen = await watcher.seen()
    return seen if len({str(exit) for exit in seen}) >= count else None


# State


async def test_kept_state_survives_kill_9(system):
    tally = await system.spawn(Saver(), name="saver", node="n0", policy=QUICK)
    for i in range(10):
        await tally.add(i)
    await until(lambda: system._snapshots.get("saver") is not None)
    await asyncio.sleep(0.1)
    os.kill(system.pids()["n0"], signal.SIGKILL)
    await until(lambda: system.restarts["saver"] == 1)
    assert await tally.look() == (45, system.pids()["n0"], 1, [45])
    tally.boom.cast()
    await until(lambda: system.restarts["saver"] == 2)
    assert (await tally.look())[0] == 45


async def test_save_makes_the_present_state_durable_and_what_follows_is_lost(system):
    tally = await system.spawn(Tally(), name="tally", node="n0", policy=QUICK)
    assert await tally.add_and_save(7) == 7 and await tally.add(1) == 8
    os.kill(system.pids()["n0"], signal.SIGKILL)
    await until(lambda: system.restarts["tally"] == 1)
    assert (await tally.look())[0] == 7
    assert (await tally.grow(90_000)) == ""
    refused = await tally.grow(200_000)
    assert refused.startswith("SnapshotRefused: the state of tally (200") and "max_state_bytes" in refused
    assert events(system, "snapshot_refused")[0]["actor"] == "tally"
    os.kill(system.pids()["n0"], signal.SIGKILL)
    await until(lambda: system.restarts["tally"] == 2)
    assert (await tally.look())[0] == 7


async def test_state_is_taken_between_two_messages(system):
    tally = await system.spawn(Saver(), name="saver", node="n0", policy=QUICK)
    await tally.add(1)
    await until(lambda: system._snapshots.get("saver") is not None)
    working = asyncio.create_task(tally.half_done())
    await until(lambda: has_sum(tally, 1001))
    await asyncio.sleep(0.1)
    os.kill(system.pids()["n0"], signal.SIGKILL)
    with pytest.raises(ActorDied):
        await working
    assert (await tally.look())[0] == 1


async def has_sum(tally, value):
    return (await tally.look())[0] == value


async def test_a_member_that_is_stopped_in_good_order_leaves_its_state_and_a_new_actor_of_that_name_gets_none(system):
    gang = system.group("gang", strategy="one_for_all", policy=QUICK)
    bad = await gang.spawn(Tally(), name="bad", node="n0", policy=QUICK)
    good = await gang.spawn(Rare(), name="good", node="n1", policy=RestartPolicy(restart="transient"))
    watcher = await system.spawn(Watcher(of="good"), name="watcher", node="n1")
    await good.add(3)
    bad.boom.cast()
    await until(lambda: is_up(good, 2))
    assert (await good.look())[0] == 3
    assert {exit.detail for exit in await watcher.seen()} == {"ValueError: boom"}, "why it was stopped"
    async with System() as other:
        first = await other.spawn(Tally(), name="a", policy=RestartPolicy(restart="temporary"))
        await first.add_and_save(9)
        first.boom.cast()
        await until(lambda: other.tree()[0]["state"] == "stopped")
        assert other._snapshots.nbytes == 0


# Questions to all nodes


async def test_waits_letters_and_counters_of_all_nodes_and_a_silent_node_is_named(system):
    echo = await system.spawn(Echo(), name="echo", node="one")
    relay = await system.spawn(Relay(target="echo"), name="relay", node="two")
    await system.spawn(Echo(), name="mute", node="three")
    asking = asyncio.create_task(relay.ask("together"))
    await until(lambda: noted(echo))
    os.kill(system.pids()["three"], signal.SIGSTOP)
    rows = await system.waits(within_s=0.5)
    (row,) = [row for row in rows if row.get("target") == "echo" and row["node"] == "two"]
    assert row["owner"] == "relay.ask" and row["method"] == "together" and row["waited_s"] >= 0 and row["left_s"] > 0
    assert [row["node"] for row in rows if "unanswered" in row] == ["three"]
    assert [row["target"] for row in rows if row["node"] == "root"] == ["relay"], "not its own questions"
    await echo.let_go()
    assert await asking == "out"
    counters = await system.counters(within_s=0.5)
    assert {row["node"] for row in counters} == {"root", "one", "two", "three"}
    late = await system.dead_letters(within_s=0.5)
    assert [row["node"] for row in late if "unanswered" in row] == ["three"]
    assert "no answer within" in late[-1]["unanswered"]
    os.kill(system.pids()["three"], signal.SIGCONT)


async def noted(echo):
    return await echo.noted()


# Directories

HOLDER = textwrap.dedent("""
    import asyncio, sys
    from pathlib import Path
    from headrace.runtime import System

    async def main():
        async with System(Path(sys.argv[1])):
            print("ready", flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
""")


async def test_a_second_system_in_a_run_directory_is_refused_until_the_first_is_dead(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as holder:  # noqa: ASYNC220
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(DirectoryInUse, match=f"run: in use by process {holder.pid}; wait for it or stop it"):
            async with System(tmp_path / "run"):
                pass
        holder.kill()
        holder.wait()
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["system_start"], "the second has written nothing"
    async with System(tmp_path / "run"):
        with pytest.raises(DirectoryInUse, match=f"in use by process {os.getpid()}"):
            async with System(tmp_path / "run"):
                pass
    async with System(tmp_path / "run"):
        pass


# Stopping


@pytest.mark.parametrize("drain", [True, False])
async def test_draining_lets_queued_messages_finish_and_what_they_send(tmp_path, drain):
    async with System(tmp_path / "run") as system:
        await system.spawn(Tally(), name="total", node="n1")
        forwarder = await system.spawn(Forwarder(to="total"), name="forwarder", node="n0")
        for _ in range(20):
            forwarder.forward.cast(1)
        await system.stop("enough", drain=drain)
    assert not events(system, "drain_late")
    (end,) = [e for e in events(system, "total") if e["actor"] == "total"]
    assert end["sum"] == 20 if drain else end["sum"] < 20


async def test_draining_ends_when_patience_does(tmp_path):
    async with System(tmp_path / "run") as system:
        echo = await system.spawn(Echo(), name="echo", node="n0")
        echo.hold.cast()
        await system.stop("enough", drain=True, patience_s=0.3)
    assert [e["reason"] for e in events(system, "drain_late")] == ["the actors had not finished their work after 0.3 s"]
