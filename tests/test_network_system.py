"""Nodes at tcp addresses, as processes: encrypted, watched by heartbeats, lost when they fall silent, fenced."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from sample_actors import Echo, until

from headrace.runtime import NodeSpec, System
from headrace.runtime.curve import Keys
from headrace.runtime.detector import HeartbeatPolicy
from headrace.runtime.errors import LaunchError
from headrace.runtime.launcher import NodeProcess


def events_of(path):
    return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]


def seen_by_all(pid):
    """The command line and the environment of a process."""
    return "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("cmdline", "environ"))


def far(name, **more):
    return NodeSpec(name=name, transport="tcp", **more)


async def test_a_node_on_tcp_works_as_any_other(tmp_path):
    async with System(tmp_path, nodes={"one": far("one"), "two": far("two")}) as system:
        assert system.node.transport._gate is None  # Nobody has needed tcp yet.
        near = await system.spawn(Echo(), name="near", node="near")
        one = await system.spawn(Echo(), name="one", node="one")
        two = await system.spawn(Echo(), name="two", node="two")
        for ref in (near, one, two):
            assert await ref.echo("hello") == "hello"
        big = np.arange(500_000.0)
        assert np.array_equal(await two.echo(big), big)
        addresses = {name: system._nodes[name].address for name in ("near", "one", "two")}
        assert addresses["near"].startswith("ipc://") and addresses["one"].startswith("tcp://127.0.0.1:")
        assert system._remote.keys.secret not in seen_by_all(system.pids()["one"])


async def test_a_node_beyond_loopback_needs_keys_that_others_can_have(tmp_path):
    async with System(tmp_path, nodes={"far": far("far", address="0.0.0.0:0")}) as system:
        with pytest.raises(LaunchError, match=r"can't connect to 0\.0\.0\.0"):
            await system.spawn(Echo(), name="far", node="far")
    async with System(listen="192.0.2.1:0", nodes={"far": far("far")}, keys=Keys.generate()) as system:
        with pytest.raises(LaunchError, match=r"can't bind tcp://192.0.2.1:0"):
            await system.spawn(Echo(), name="far", node="far")


async def test_a_silent_node_is_lost_fenced_and_ends_itself_when_it_hears_of_it(tmp_path, monkeypatch):
    """It is stopped and not killed, as one that is cut off; nobody but itself can end it."""
    policy = HeartbeatPolicy(interval_s=0.2, grace_s=1.5, orphan_s=120.0)
    async with System(tmp_path, nodes={"far": far("far")}, heartbeats=policy) as system:
        ref = await system.spawn(Echo(), name="far", node="far")
        pid = system.pids()["far"]
        first = system._nodes["far"].process
        with monkeypatch.context() as patched:
            patched.setattr(NodeProcess, "kill", lambda *_, **__: None)
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: any(e["event"] == "node_lost" for e in events_of(tmp_path)))
            await until(lambda: system.pids().get("far", pid) != pid and system._nodes["far"].ready)
        async with asyncio.timeout(60):
            assert await ref.echo("again") == "again"
        assert not first.exited.done()
        os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(60):
            assert "exit code 1" in str(await asyncio.shield(first.exited))
        assert "counts this node as dead; it ends itself" in (tmp_path / "logs" / "far.log").read_text()
    said = [event for event in events_of(tmp_path) if event["event"] == "node_exit"]
    assert said[0]["reason"].startswith("lost: nothing was heard of it for")


ROOT_SCRIPT = """
import asyncio, sys
from pathlib import Path
from sample_actors import Echo
from headrace.runtime import NodeSpec, System
from headrace.runtime.detector import HeartbeatPolicy

async def main():
    policy = HeartbeatPolicy(interval_s=0.2, grace_s=60.0, orphan_s=1.5)
    nodes = {"far": NodeSpec(name="far", transport="tcp")}
    async with System(Path(sys.argv[1]), nodes=nodes, heartbeats=policy) as system:
        await system.spawn(Echo(), name="far", node="far")
        print(system.pids()["far"], flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def has_ended(pid):
    """Also if its parent, which is at a standstill, has not taken note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_node_that_hears_nothing_of_its_root_ends_itself(tmp_path):
    """The root is stopped: it is not dead, so the kernel ends nobody."""
    root = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", ROOT_SCRIPT, str(tmp_path), stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    try:
        pid = int(await asyncio.wait_for(root.stdout.readline(), 60))
        assert not has_ended(pid)
        root.send_signal(signal.SIGSTOP)
        await until(lambda: has_ended(pid))
    finally:
        root.kill()
        await root.communicate()
    assert "nothing was heard of root#1 for" in (tmp_path / "logs" / "far.log").read_text()
