"""The `$root` actor: what the nodes of a system report to its root. Decides nothing: it passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .actor import Actor, message
from .children import Children
from .copies import CopyKeeper
from .errors import SnapshotRefused, StaleIncarnation
from .events import EventLog
from .exits import Exit
from .mailbox import Lane
from .memory import Snapshots
from .nodes import Nodes

RESIZE_S = 600.0
"""How long new actors may take to start."""


@dataclass(kw_only=True)
class Root(Actor):
    """Made by the system, in the root only."""

    nodes: Nodes
    children: Children
    snapshots: Snapshots
    events: EventLog
    keeper: CopyKeeper

    @message(lane=Lane.SYSTEM)
    async def hello(self, key: str, pid: int, address: str) -> None:
        """A node process is up and can be reached at `address`."""
        self.nodes.on_hello(key, address)

    @message(lane=Lane.SYSTEM)
    async def actor_ended(self, name: str, incarnation: int, why: Exit) -> None:
        """An actor has stopped by itself, or failed."""
        self.children.ended(name, incarnation, why)

    @message(lane=Lane.SYSTEM)
    async def keep(self, name: str, incarnation: int, state: np.ndarray) -> None:
        """The state of an actor, for its next incarnation. Raises StaleIncarnation, SnapshotRefused."""
        member = self.children.table.get(name)
        if member is None or member.incarnation != incarnation:
            raise StaleIncarnation(f"the state of {name} #{incarnation} is not kept: a newer incarnation runs")
        if not self.snapshots.fits(name, state):
            error = SnapshotRefused(
                f"the state of {name} ({state.nbytes} bytes) is not kept: all states together may have "
                f"{self.snapshots.limit_bytes} bytes and have {self.snapshots.nbytes}; make it smaller, or raise "
                "max_state_bytes of the System"
            )
            self.events.write("snapshot_refused", actor=name, bytes=state.nbytes, reason=str(error))
            raise error
        self.snapshots.keep(name, state)

    @message(lane=Lane.SYSTEM)
    async def emit(self, event: str, fields: dict[str, Any]) -> None:
        """A line for events.jsonl."""
        self.events.write(event, **fields)

    @message(concurrent=True)
    async def copies_of(self, of: str) -> list[str]:
        """The names of the actors that are configured as `of` is, it first. Raises UnknownActor."""
        return self.keeper.names(of)

    @message(concurrent=True, deadline_s=RESIZE_S)
    async def resize(self, of: str, count: int) -> list[str]:
        """See Copies.resize."""
        return await self.keeper.resize(of, count)
