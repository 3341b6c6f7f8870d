"""The root and its node processes: starting, killing, restarting, giving up, stopping. Real processes, no mercy."""

import asyncio
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from sample_actors import Echo, Fragile, Relay, Small, Streamer, Thinker, until

from headrace.runtime import Actor, NodeSpec, RestartPolicy, System, timeout
from headrace.runtime import nodes as nodes_module
from headrace.runtime.errors import (
    ActorDied,
    CodecError,
    DeadlineExceeded,
    LaunchError,
    MailboxFull,
    RemoteError,
    RestartBudgetExceeded,
    UnknownActor,
)

QUICK = RestartPolicy(max_restarts=50, backoff_s=0.0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def events(system, kind):
    return [e for e in system.events.recent if e["event"] == kind]


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


async def has(ask, value):
    """Whether an actor answers with that."""
    return await ask() == value


async def running(streamer):
    made, closed = await streamer.state()
    return made > 0 and closed == 0


async def answers(*calls):
    """Whether all these calls are answered now."""
    try:
        return await asyncio.gather(*(call() for call in calls))
    except ActorDied:
        return None


@pytest.fixture
async def system(tmp_path):
    """A system that must leave nothing behind: no process, no socket, no folder, no complaint of the loop."""
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with System(tmp_path / "run") as system:
        yield system
        pids = [pid for node, pid in system.pids().items() if node != "root"]
        scratch = system._scratch
    assert not any(map(alive, pids)), "processes are left"
    assert not scratch.exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "system_start" and lines[-1]["event"] == "system_stop"
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").iterdir())
    assert "Task was destroyed" not in logs and "never retrieved" not in logs, logs
    assert not complaints, complaints


# Running


async def test_actors_in_three_processes_call_cast_and_stream(system):
    echo = await system.spawn(Echo(prefix="> "), name="echo", node="one")
    relay = await system.spawn(Relay(target="echo"), name="relay", node="two")
    streamer = await system.spawn(Streamer(), name="streamer", node="two")
    here = await system.spawn(Relay(target="streamer"), name="here")
    assert await echo.prefixed("hi") == "> hi"
    pids = system.pids()
    assert await echo.pid() == pids["one"] and len(set(pids.values())) == 3
    assert await relay.ask("echo", [1, 2]) == [1, 2]
    assert [i async for i in streamer.count.stream(200)] == list(range(200))
    assert await here.ask("state") == (200, 1)
    echo.note.cast("x")
    assert await echo.echo(0) == 0 and await echo.noted() == ["x"]
    with pytest.raises(RemoteError, match="in raises"):
        await relay.ask("raises", "k")
    with pytest.raises(UnknownActor, match="did you mean 'echo'"):
        await system.find("ecko").echo(1)
    rows = {row["name"]: row for row in system.tree()}
    assert set(rows) == {"echo", "relay", "streamer", "here"}
    assert rows["echo"] == {
        "name": "echo", "group": "root", "node": "one", "pid": pids["one"],
        "state": "up", "incarnation": 1, "restarts": 0, "reason": "",
    }  # fmt: skip


async def test_a_big_fan_in_loses_nothing(system):
    await system.spawn(Echo(), name="echo", node="one")
    relay = await system.spawn(Relay(target="echo"), name="relay", node="two")
    async with timeout(60):
        assert await relay.flood("echo", 200, 50) == 10_000
    assert {k: v for k, v in (await relay.counters()).items() if v} == {"sent": 10_000, "handled": 2}


async def test_back_pressure_between_processes(system):
    small = await system.spawn(Small(), name="small", node="one")
    relay = await system.spawn(Relay(target="small"), name="relay", node="two")
    holding = asyncio.create_task(small.hold())
    await until(small.noted)
    assert await relay.cast("note", list(range(10))) == 4
    assert "slow down, or call" in (await relay.refused())[0]
    with pytest.raises(MailboxFull):
        for i in range(10):
            small.note.cast(100 + i)
    await small.let_go()
    await holding
    await small.echo(0)
    await until(lambda: has(relay.credits, 4))
    assert sorted(i for i in await small.noted() if i != "held") == [0, 1, 2, 3, 100, 101, 102, 103]


async def test_the_node_answers_while_an_actor_computes(system):
    thinker = await system.spawn(Thinker(), name="thinker", node="one")
    working = asyncio.create_task(thinker.think(0.5, "a"))
    looks = 0
    while not working.done():
        await thinker.history()
        looks += 1
    assert looks > 5 and await working == "a"
    await thinker.speaks()
    await until(lambda: events(system, "from_thread"))


async def test_spawning_refuses_what_can_not_work(system):
    echo = await system.spawn(Echo(), name="echo")
    with pytest.raises(ValueError, match="an actor named 'echo' is running; names are unique"):
        await system.spawn(Echo(), name="echo")
    for bad in ("", "a b", "a/../b", "$root", "ä", "a\n"):
        with pytest.raises(ValueError, match="actor name"):
            await system.spawn(Echo(), name=bad)
    for bad in ("", "a/b", "a#1", "..", "x y"):
        with pytest.raises(ValueError, match="node name"):
            await system.spawn(Echo(), name="a", node=bad)

    class Local(Actor):
        pass

    with pytest.raises(ValueError, match="define actor classes at the top level of a file or module"):
        await system.spawn(Local(), name="local", node="one")
    with pytest.raises(CodecError, match="object"):
        await system.spawn(Echo(prefix=object()), name="bad")  # type: ignore[arg-type]
    assert await echo.echo(1) == 1 and [row["name"] for row in system.tree()] == ["echo"]


async def test_a_start_that_fails_is_raised_and_leaves_nothing(system, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(RemoteError, match=r"OSError: .*missing is not there") as caught:
        await system.spawn(Fragile(fail_start=missing), name="fragile", node="one")
    assert "in start" in caught.value.remote_traceback
    assert system.tree() == [] and not system.failed.done()
    with pytest.raises(ActorDied, match="did not start"):
        await system.find("fragile").ping()
    assert await (await system.spawn(Fragile(), name="fragile", node="one")).ping() == system.pids()["one"]


async def test_a_declared_actor_is_waited_for(system):
    system.declare("echo", Echo)
    asking = asyncio.create_task(system.find("echo").echo(3))
    relay = await system.spawn(Relay(target="echo"), name="relay", node="one")
    elsewhere = asyncio.create_task(relay.ask("echo", 4))
    await asyncio.sleep(0.02)
    assert not asking.done()
    await system.spawn(Echo(), name="echo", node="one")
    assert await asking == 3 and await elsewhere == 4


async def test_several_actors_may_ask_for_one_node_at_once(system):
    refs = await asyncio.gather(*(system.spawn(Echo(), name=f"e{i}", node="one") for i in range(4)))
    assert len({await ref.pid() for ref in refs}) == 1


async def test_node_specs_set_the_environment(tmp_path):
    nodes = {"one": NodeSpec(name="one", env={"HEADRACE_TEST": "yes"})}
    async with System(tmp_path, nodes=nodes) as system:
        await system.spawn(Echo(), name="echo", node="one")
        assert "HEADRACE_TEST=yes" in environment_of(system.pids()["one"])


async def test_a_node_that_can_not_start_says_why_and_can_be_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with System(nodes={"one": NodeSpec(name="one", env={"PYTHONHOME": "/nonexistent"})}) as system:
        for _ in range(2):
            with pytest.raises(LaunchError, match=r"node one did not start: exit code 1\n(?s:.*)PYTHONHOME"):
                await asyncio.wait_for(system.spawn(Echo(), name="echo", node="one"), 30)
        await system.spawn(Echo(), name="other", node="two")


async def test_a_node_that_never_says_hello_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes_module, "HELLO_S", 1.0)
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import time; time.sleep(60)")
    async with System(nodes={"one": NodeSpec(name="one", env={"PYTHONPATH": str(folder)})}) as system:
        with pytest.raises(LaunchError, match="node one did not start: no hello within 1 s"):
            await asyncio.wait_for(system.spawn(Echo(), name="echo", node="one"), 30)
        await until(lambda: not alive(system.pids()["one"]))


async def test_a_start_that_takes_too_long_is_given_up_and_stopped(system):
    policy = RestartPolicy(start_s=0.1)
    with pytest.raises(DeadlineExceeded, match=r"\$node@one.spawn: no answer within 0.1"):
        await system.spawn(Fragile(slow_start_s=60), name="slow", node="one", policy=policy)
    assert system.tree() == []
    assert await (await system.spawn(Fragile(), name="slow", node="one", policy=policy)).ping()


# Failing


async def test_a_failing_cast_restarts_the_actor_in_its_process(system):
    fragile = await system.spawn(Fragile(), name="fragile", node="one", policy=QUICK)
    pid = await fragile.ping()
    fragile.boom.cast("first")
    await until(lambda: system.restarts["fragile"] == 1)
    assert await fragile.ping() == pid
    await fragile.boom_later()
    await until(lambda: system.restarts["fragile"] == 2)
    assert await fragile.ping() == pid
    with pytest.raises(RemoteError, match="only the caller"):
        await fragile.boom("only the caller")
    assert system.restarts == {"fragile": 2} and system.tree()[0]["incarnation"] == 3
    first, second = events(system, "actor_exit")
    assert first["reason"] == "ValueError: first" and "in boom" in first["traceback"]
    assert second["reason"] == "RuntimeError: in the background"


async def test_an_actor_that_fails_too_often_ends_the_system_with_a_reason(system):
    policy = RestartPolicy(max_restarts=2, backoff_s=0.0)
    fragile = await system.spawn(Fragile(), name="fragile", node="one", policy=policy)
    for i in range(3):
        await fragile.ping()
        fragile.boom.cast(f"number {i}")
        await until(lambda i=i: len(events(system, "actor_exit")) == i + 1)
    with pytest.raises(RestartBudgetExceeded, match=r"fragile failed again after 2 restarts .*ValueError: number 2"):
        await asyncio.wait_for(system.failed, 20)
    assert events(system, "system_failed")


async def test_a_temporary_actor_stays_down(system):
    policy = RestartPolicy(restart="temporary")
    fragile = await system.spawn(Fragile(), name="fragile", node="one", policy=policy)
    fragile.boom.cast("once")
    await until(lambda: system.tree()[0]["state"] == "stopped")
    with pytest.raises(ActorDied, match="fragile has stopped for good: ValueError: once"):
        await fragile.ping()
    await system.spawn(Echo(), name="echo", node="one", policy=policy)
    os.kill(system.pids()["one"], signal.SIGKILL)
    await until(lambda: {row["state"] for row in system.tree()} == {"stopped"})
    assert await (await system.spawn(Echo(), name="again", node="one")).echo(1) == 1, "the node is started when needed"


async def test_a_restart_whose_start_fails_is_tried_again(system, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    fragile = await system.spawn(Fragile(fail_start=str(gate)), name="fragile", node="one", policy=QUICK)
    gate.unlink()
    fragile.boom.cast("now")
    await until(lambda: system.restarts["fragile"] >= 3)
    gate.touch()
    async with timeout(20):
        assert await fragile.ping() == system.pids()["one"]
    assert any("did not start: " in e["reason"] and "is not there" in e["reason"] for e in events(system, "actor_exit"))


async def test_an_actor_that_exits_takes_its_node_down_and_both_come_back(system):
    echo = await system.spawn(Echo(), name="echo", node="one", policy=QUICK)
    thinker = await system.spawn(Thinker(), name="thinker", node="one", policy=QUICK)
    thinking = asyncio.create_task(thinker.think(60.0))
    await thinker.history()
    with pytest.raises(ActorDied, match="exit code"):
        await echo.exits()
    with pytest.raises(ActorDied):
        await thinking
    assert await echo.echo(1) == 1


# Killing


async def test_kill_9_ends_waits_at_once_and_the_actor_comes_back_one_incarnation_higher(system):
    echo = await system.spawn(Echo(), name="echo", node="one", policy=QUICK)
    other = await system.spawn(Relay(target="echo"), name="other", node="two")
    here = await system.spawn(Relay(target="echo"), name="here")
    fates = [asyncio.create_task(ref.wait_for_fate("together")) for ref in (other, here)]
    watches = [asyncio.create_task(ref.incarnations(2)) for ref in (other, here)]
    asking = asyncio.create_task(echo.together())
    await until(lambda: has(echo.noted, ["in"] * 3))
    old = system.pids()["one"]
    begun = time.monotonic()
    os.kill(old, signal.SIGKILL)
    with pytest.raises(ActorDied, match=r"waits for echo.together, but its node one#1 died: killed by SIGKILL"):
        await asking
    assert time.monotonic() - begun < 5
    for fate in await asyncio.gather(*fates):
        assert fate.startswith("ActorDied: ") and "killed by SIGKILL" in fate
    async with timeout(30):
        assert await echo.pid() == system.pids()["one"] != old
        assert await other.ask("echo", 1) == await here.ask("echo", 1) == 1
    for seen in await asyncio.wait_for(asyncio.gather(*watches), 20):
        assert seen[0] == ("up", 1) and seen[-1] == ("up", 2)
    assert system.restarts == {"echo": 1}
    (death,) = events(system, "node_exit")
    assert death["reason"] == "killed by SIGKILL" and death["pid"] == old


async def test_streams_end_when_either_side_is_killed(system):
    streamer = await system.spawn(Streamer(), name="streamer", node="one", policy=QUICK)
    with pytest.raises(ActorDied, match="killed by SIGKILL"):
        async for item in streamer.count.stream(10**9):
            if item == 500:
                os.kill(system.pids()["one"], signal.SIGKILL)
    relay = await system.spawn(Relay(target="streamer"), name="relay", node="two", policy=QUICK)
    consuming = asyncio.create_task(relay.consume("count", 10**9))
    await until(lambda: running(streamer))
    os.kill(system.pids()["two"], signal.SIGKILL)
    with pytest.raises(ActorDied):
        await consuming
    await until(lambda: has(lambda: running(streamer), False))


async def test_kill_9_again_and_again_also_while_it_restarts(system):
    echo = await system.spawn(Echo(), name="echo", node="one", policy=QUICK)
    relay = await system.spawn(Relay(target="echo"), name="relay", node="two")
    for round in range(4):
        starts = len(events(system, "node_start"))
        os.kill(system.pids()["one"], signal.SIGKILL)
        await until(lambda starts=starts: len(events(system, "node_start")) > starts)
        await asyncio.sleep(0.03 * round)
        os.kill(system.pids()["one"], signal.SIGKILL)
    assert await until(lambda: answers(lambda: echo.echo(1), lambda: relay.ask("echo", 1))) == [1, 1]
    assert not system.failed.done() and len(events(system, "node_exit")) + len(events(system, "node_start_failed")) >= 5
    assert system.tree()[0]["state"] == "up"


async def test_two_nodes_killed_at_once_come_back(system):
    one = await system.spawn(Relay(target="two"), name="one", node="a", policy=QUICK)
    await system.spawn(Relay(target="one"), name="two", node="b", policy=QUICK)
    idle = await system.spawn(Relay(target="one"), name="idle", node="c")
    for _ in range(2):
        pids = system.pids()
        for node in "ab":
            os.kill(pids[node], signal.SIGKILL)
        await until(lambda: answers(lambda: one.ask("counters"), lambda: idle.ask("counters")))
        await until(lambda pids=pids: {*pids.values()} & {*system.pids().values()} == {pids["root"], pids["c"]})
    assert system.restarts == {"one": 2, "two": 2}


async def test_a_node_killed_during_the_first_start_of_an_actor_is_started_again(system):
    spawning = asyncio.create_task(system.spawn(Fragile(slow_start_s=0.3), name="fragile", node="one", policy=QUICK))
    await until(lambda: system.tree() and system.tree()[0]["state"] == "starting" and system._nodes["one"].ready)
    await asyncio.sleep(0.05)
    os.kill(system.pids()["one"], signal.SIGKILL)
    ref = await asyncio.wait_for(spawning, 30)
    assert await ref.ping() == system.pids()["one"] and system.restarts["fragile"] == 1


async def test_a_spawn_that_is_given_up_while_its_node_restarts_leaves_no_actor(system):
    await system.spawn(Echo(), name="echo", node="one", policy=QUICK)
    spawning = asyncio.create_task(system.spawn(Fragile(slow_start_s=60), name="slow", node="one", policy=QUICK))
    await until(lambda: len(system.tree()) == 2 and system.tree()[1]["incarnation"] == 1)
    os.kill(system.pids()["one"], signal.SIGKILL)
    await until(lambda: system.restarts["slow"] == 1)
    spawning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await spawning
    assert [row["name"] for row in system.tree()] == ["echo"]
    slow = await asyncio.wait_for(system.spawn(Fragile(), name="slow", node="one", policy=QUICK), 30)
    assert await slow.ping() == system.pids()["one"] and system.tree()[1]["incarnation"] == 3


async def test_an_actor_that_kills_its_node_in_every_start_ends_the_system(system):
    policy = RestartPolicy(max_restarts=2, backoff_s=0.0)
    fragile = await system.spawn(Fragile(), name="fragile", node="one", policy=policy)
    for _ in range(3):
        try:
            async with timeout(20):
                await fragile.die()
        except ActorDied:
            pass
        except TimeoutError:
            break
        if system.failed.done():
            break
    with pytest.raises(RestartBudgetExceeded, match=r"fragile failed again after 2 restarts .*killed by SIGKILL"):
        await asyncio.wait_for(system.failed, 20)


# Stopping


async def test_stopping_lets_every_actor_close_and_happens_once(tmp_path):
    note = tmp_path / "note"
    async with System(tmp_path / "run") as system:
        for i in range(3):
            await system.spawn(Fragile(stopped=str(note)), name=f"f{i}", node="one" if i else "root")
        await asyncio.gather(system.stop("because"), system.stop("twice"))
        await system.stop("thrice")
    assert note.read_text().splitlines() == ["None"] * 3
    assert json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])["reason"] == "because"


@pytest.mark.parametrize("how", ["stop", "thread", "loop"])
async def test_stopping_is_bounded_whatever_hangs(tmp_path, monkeypatch, how):
    monkeypatch.setattr(nodes_module, "STOP_NODE_S", 0.5)
    monkeypatch.setattr(nodes_module, "TERMINATE_S", 0.3)
    begun = 0.0
    async with System(tmp_path) as system:
        fragile = await system.spawn(Fragile(hang_in_stop=how == "stop"), name="fragile", node="one")
        hanging = {"thread": fragile.hang_in_thread, "loop": fragile.hang_loop}.get(how)
        if hanging is not None:
            hanging.cast()
            await asyncio.sleep(0.2)
        pid, begun = system.pids()["one"], time.monotonic()
    assert time.monotonic() - begun < 20 and not alive(pid)
    assert [e for e in system.events.recent if e["event"] == "node_stop_late"]


async def test_an_error_in_the_program_stops_the_system_and_its_reason_is_kept(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        async with System(tmp_path) as system:
            await system.spawn(Echo(), name="echo", node="one")
            pid = system.pids()["one"]
            raise KeyError("mine")
    assert not alive(pid) and system.events.recent[-1]["reason"] == "KeyError: 'mine'"


async def test_stopping_in_the_middle_of_a_restart_leaves_nothing(tmp_path):
    async with System(tmp_path) as system:
        await system.spawn(Echo(), name="echo", node="one", policy=QUICK)
        os.kill(system.pids()["one"], signal.SIGKILL)
        await until(lambda: len(events(system, "node_start")) == 2)
        pid = system.pids()["one"]
    assert not alive(pid)


def test_a_system_that_was_never_entered_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    System()
    assert not list(tmp_path.iterdir())


async def test_a_system_that_can_not_open_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        async with System(tmp_path / "file"):
            pass
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(LaunchError, match="set TMPDIR to a shorter path"):
        async with System():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file", deep.name] and not list(deep.iterdir())


async def test_a_frame_from_a_dead_incarnation_is_refused(system):
    """A process that outlives its own death certificate: stopped, declared dead, woken up."""
    echo = await system.spawn(Echo(), name="echo", node="one", policy=QUICK)
    system.node.peer_down("one#1", "as a test says")
    before = system.node.counters["fenced"]
    with pytest.raises(ActorDied, match="is not connected; ask again"):
        await echo.echo(1)
    os.kill(system.pids()["one"], signal.SIGKILL)
    await until(lambda: events(system, "node_exit"))
    async with timeout(30):
        assert await echo.echo(1) == 1
    assert system.node.counters["fenced"] >= before


def test_the_events_of_a_run_are_json_lines_whatever_is_logged(tmp_path):
    from headrace.runtime.events import EventLog

    log = EventLog(tmp_path / "events.jsonl")
    log.write("odd", path=Path("/x"), number=2**70, text="\udc80", keys={1: 2}, nan=float("nan"))
    log.close()
    log.write("after the end")
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["event"] == "odd" and re.search("/x", line)
