"""The process of a node: `python -m headrace.runtime.process`, started by launcher.py only.

    read spec from stdin -> die with the launcher -> bind -> hello to the root -> serve until told to shut down

Imports no actor's module by itself, so that a node without torch actors is up in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from typing import Any

from .agent import NodeAgent
from .codec import decode, encode
from .node import Node

_PR_SET_PDEATHSIG = 1


async def serve(spec: dict[str, Any]) -> None:
    """Runs a node until the root tells it to shut down."""
    node = Node(spec["key"], spec["address"], arena_bytes=spec["arena_bytes"])
    agent = NodeAgent()
    await agent.host(node, agent, f"$node@{spec['name']}", spec["incarnation"]).up
    node.transport.connect(spec["root_key"], spec["root_address"])
    for status in spec["statuses"]:
        node.directory.update(status)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.end, None)
    node.cast("$root", "hello", (spec["key"], os.getpid()), {})
    await agent.done
    await node.close()


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its launcher ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    spec = decode(sys.stdin.buffer.read())
    die_with(spec["parent"])
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # What was printed before a kill is kept.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:0] = [p for p in spec["path"] if p not in sys.path]
    import uvloop

    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    code = 1
    try:
        loop.run_until_complete(serve(spec))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        # Threads that still compute, and tasks that don't let themselves be cancelled, must not hold up the exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pack_spec(**spec: Any) -> bytes:
    """The spec that `main` reads."""
    data, buffers = encode(spec)
    assert not buffers
    return data
