"""What the root needs to have nodes at tcp addresses: its own tcp address, the keys, and who has fallen silent.

    NodeSpec(transport="tcp") -> the root listens on tcp too -> the node says hello with its address -> heartbeats
                                                                  silent for too long -> lost -> Exit(kind="lost")

Starts nothing and decides nothing; see nodes.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from .curve import Keys
from .detector import HeartbeatPolicy, State
from .events import EventLog
from .exits import Exit
from .heartbeat import Heartbeats
from .launcher import NodeSpec
from .node import Node
from .transport import check_address


class RemoteNodes:
    """Addresses, keys and heartbeats of the nodes of one root."""

    def __init__(
        self,
        root: Node,
        events: EventLog,
        *,
        keys: Keys | None = None,
        policy: HeartbeatPolicy | None = None,
        listen: str = "127.0.0.1:0",
    ) -> None:
        """`keys`: None for new ones of this system alone. `listen`: host and port where the root can be reached by
        nodes on tcp; it is bound when the first of them starts."""
        self.keys = keys or Keys.generate()
        self.policy = policy or HeartbeatPolicy()
        self._root = root
        self._events = events
        self._listen = f"tcp://{listen}"
        self._address = ""
        self._lost: dict[str, asyncio.Future[Exit]] = {}
        self._heartbeats = Heartbeats(root.transport, self.policy, self._on_change)

    def fields(self, spec: NodeSpec, sockets: Path, incarnation: int) -> dict[str, Any]:
        """What a node's process is told of addresses and keys. Raises LaunchError."""
        if spec.transport == "ipc":
            address, root_address = f"ipc://{sockets}/{spec.name}-{incarnation}", self._root.transport.address
        else:
            address, root_address = f"tcp://{spec.address}", self._address or self._open()
        check_address(address, self.keys)
        heartbeats = None if spec.transport == "ipc" else self.policy
        return {"address": address, "root_address": root_address, "keys": self.keys, "heartbeats": heartbeats}

    def watch(self, spec: NodeSpec, key: str) -> asyncio.Future[Exit]:
        """From its hello on. Done when the node is lost; never for one that is seen by pidfd alone."""
        lost = self._lost[key] = asyncio.get_running_loop().create_future()
        if spec.transport == "tcp":
            self._heartbeats.watch(key)
        return lost

    def forget(self, key: str) -> None:
        """The node has ended."""
        self._heartbeats.forget(key)
        lost = self._lost.pop(key, None)
        if lost is not None:
            lost.cancel()

    def close(self) -> None:
        self._heartbeats.close()

    def _open(self) -> str:
        self._address = self._root.transport.listen(self._listen, self.keys)
        return self._address

    def _on_change(self, key: str, state: State, silence_s: float) -> None:
        name = key.partition("#")[0]
        if state == "alive":
            self._events.write("node_recovered", node=name, key=key)
        else:
            self._events.write(f"node_{state}", node=name, key=key, silence_s=round(silence_s, 3))
        lost = self._lost.get(key)
        if state == "lost" and lost is not None and not lost.done():
            lost.set_result(Exit(kind="lost", detail=f"lost: nothing was heard of it for {silence_s:.1f} s"))
