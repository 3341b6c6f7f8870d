"""The process of a node, started by launcher.py only.

    read spec from stdin -> die with the launcher -> bind -> beat -> hello to the root -> serve until told to shut down

Imports no actor's module by itself, so that a node without torch actors is up in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import traceback
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from .agent import NodeAgent
from .codec import decode, encode
from .detector import HeartbeatPolicy, State
from .errors import NodeLost
from .heartbeat import Heartbeats
from .inspector import Inspector
from .liveness import Pulse
from .node import Node
from .prctl import PR_SET_NAME, PR_SET_PDEATHSIG, prctl
from .stacks import enable_dump
from .zmq_transport import ZmqTransport

GC_THRESHOLD = 50_000, 20, 100


async def serve(spec: dict[str, Any], beats: int) -> None:
    """Runs a node until the root tells it to shut down. `beats`: file of the liveness words."""
    pulse = Pulse(beats, spec["word"])
    transport = partial(ZmqTransport, keys=spec["keys"])
    node = Node(spec["key"], spec["address"], transport=transport, arena_bytes=spec["arena_bytes"])
    agent = NodeAgent()
    await agent.host(node, agent, f"$node@{spec['name']}", spec["incarnation"]).up
    node.transport.connect(spec["root_key"], spec["root_address"])
    for status in spec["statuses"]:
        node.directory.update(status)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.end, None)
    inspector = Inspector(node, spec["inspector"])
    node.cast("$root", "hello", (spec["key"], os.getpid(), node.transport.address), {})
    node.transport.on_fenced = lambda peer: agent.end(NodeLost(f"{peer} counts this node as dead; it ends itself"))
    heartbeats = None if spec["heartbeats"] is None else watch_root(node, agent, spec["root_key"], spec["heartbeats"])
    await agent.done
    if heartbeats is not None:
        heartbeats.close()
    inspector.close()
    pulse.stop()
    await node.close()


def watch_root(node: Node, agent: NodeAgent, root: str, policy: HeartbeatPolicy) -> Heartbeats:
    """Ends the node when nothing is heard of its root: no process of a system is left behind on another host."""

    def judge(peer: str, state: State, silence_s: float) -> None:
        if state == "lost":
            agent.end(NodeLost(f"nothing was heard of {peer} for {silence_s:.1f} s; this node ends itself"))

    heartbeats = Heartbeats(node.transport, replace(policy, grace_s=policy.orphan_s), judge)
    heartbeats.watch(root)
    return heartbeats


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its launcher ends, however that happens."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run(beats: int, loop: asyncio.AbstractEventLoop | None = None) -> NoReturn:
    """The whole life of the process. `beats`: inherited file of the liveness words; `loop`: a fresh one, if any."""
    with open(0, "rb", closefd=False) as stdin:
        spec = decode(stdin.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    die_with(spec["parent"])
    prctl(PR_SET_NAME, spec["name"].encode())
    faulthandler.enable()
    enable_dump()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # What was printed before a kill is kept.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if spec["env"] is not None:
        _set_environment(spec["env"])
    sys.path[:0] = [p for p in spec["path"] if p not in sys.path]
    if loop is None:
        import uvloop

        loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    # An actor is some fifty objects that live long: with Python's own thresholds the collector walks all of them again
    # and again, and takes most of the time of starting thousands of actors.
    gc.set_threshold(*GC_THRESHOLD)
    code = 1
    try:
        loop.run_until_complete(serve(spec, beats))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # Threads that still compute, and tasks that don't let themselves be cancelled, must not hold up the exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _set_environment(env: dict[str, str]) -> None:
    """Changes no more than it must: in a forked process everything that is touched is copied."""
    for key in os.environ.keys() - env.keys():
        del os.environ[key]
    for key, value in env.items():
        if os.environ.get(key) != value:
            os.environ[key] = value


def pack_spec(**spec: Any) -> bytes:
    """The spec that `run` reads."""
    data, buffers = encode(spec)
    assert not buffers
    return data
