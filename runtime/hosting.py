"""Where supervised actors live: starts and stops them through the agents of their nodes, and tells everybody.

    Children.start -> $node@X.spawn (class, fields, epoch, kept state) -> up
    Children.stop  -> $node@X.stop_actor -> ended | it does not end, or does not answer -> its node is killed

Decides nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

from .agent import CANCEL_S, interface_of
from .cell import STOP_S
from .children import Member
from .classes import class_path
from .codec import dumps
from .deadline import timeout
from .directory import Status
from .errors import ActorDied, RuntimeFault
from .events import EventLog
from .exits import Exit
from .memory import Snapshots
from .node import Node
from .nodes import ROOT, Nodes


class Hosting:
    """The Hosts of children.py, on real nodes."""

    def __init__(self, node: Node, nodes: Nodes, snapshots: Snapshots, events: EventLog) -> None:
        self._node = node
        self._nodes = nodes
        self._snapshots = snapshots
        self._events = events

    async def open(self, node: str) -> None:
        await self._nodes.open(node)

    async def start(self, member: Member) -> None:
        node = self._nodes[member.node]
        if not node.ready:
            raise ActorDied(f"{member.name}: its node {node.key} is down")
        member.incarnation += 1
        self.tell(member, "starting", None)
        actor: Any = member.actor
        fields = {f.name: getattr(actor, f.name) for f in dataclasses.fields(actor) if f.init}
        path = class_path(type(member.actor), here=member.node == ROOT)
        state = self._snapshots.get(member.name)
        async with timeout(member.policy.start_s):
            await self._node.ref(f"$node@{member.node}").spawn(
                member.name, member.incarnation, path, dumps(fields), member.epoch, state
            )
        self.tell(member, "up", None)
        pid = os.getpid() if node.process is None else node.process.pid
        self._events.write("actor_up", actor=member.name, node=member.node, incarnation=member.incarnation, pid=pid)

    async def stop(self, member: Member, why: Exit) -> None:
        node = self._nodes[member.node]
        if not node.ready:
            return
        try:
            async with timeout(STOP_S + CANCEL_S + 1.0):
                ended = await self._node.ref(f"$node@{member.node}").stop_actor(member.name)
            reason = "it did not end when it was asked to"
        except (RuntimeFault, TimeoutError) as error:
            ended, reason = False, str(error)
        if not ended:
            self._events.write("actor_stop_late", actor=member.name, node=member.node, reason=reason)
            if node.process is not None:
                node.process.kill()
                await asyncio.wait([node.process.exited])

    def tell(self, member: Member, state: Any, why: Exit | None) -> None:
        self._nodes.publish(self.status(member, state, why))
        if state == "stopped":
            self._snapshots.forget(member.name)

    def status(self, member: Member, state: Any, why: Exit | None) -> Status:
        """The directory entry of a member."""
        return Status(
            name=member.name, node=self._nodes[member.node].key, state=state, incarnation=member.incarnation,
            exit=why, **interface_of(type(member.actor)),
        )  # fmt: skip
