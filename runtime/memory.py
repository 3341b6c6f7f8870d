"""What an incarnation leaves to the next: its state, taken between two messages, packed, and kept by the root.

    turn ended -> due? -> snapshot() -> pack -> $root.keep -> kept     save(): the same, at once, and waited for
    next incarnation: start() -> restore(state) -> first message

Knows nothing of when actors are restarted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from .codec import dumps, loads
from .deadline import timeout
from .errors import RuntimeFault

if TYPE_CHECKING:
    from .cell import Cell
    from .node import Node

LAST_S = 2.0
"""Time that the last snapshot of an actor that is stopped may take to arrive."""


class Memory:
    """The memory of one incarnation. `state`: what the one before left, as it was packed here, or None."""

    def __init__(self, node: Node, cell: Cell, state: Any) -> None:
        self._node = node
        self._cell = cell
        self._actor = cell.actor
        self._state = state
        self._every_s = self._actor.snapshot_every_s
        self._timer: asyncio.TimerHandle | None = None
        self._due = False
        self._changed = False

    def started(self) -> None:
        if self._state is not None:
            self._actor.restore(loads(bytes(self._state)))
            self._state = None
        self._wait()

    def turn_ended(self) -> None:
        self._changed = True
        if self._due:
            self._take()

    async def save(self) -> None:
        """Returns when the root keeps the present state. Raises SnapshotRefused, CodecError."""
        packed = self._pack()
        if packed is not None:
            await self._send(packed)

    def dismiss(self) -> None:
        """Nobody will ask for the state any more."""
        self._every_s = None
        if self._timer is not None:
            self._timer.cancel()

    async def close(self, *, orderly: bool) -> None:
        periodic = self._every_s is not None
        self.dismiss()
        if orderly and periodic and self._changed:
            try:
                async with timeout(LAST_S):
                    await self.save()
            except (RuntimeFault, TimeoutError) as error:
                self._actor.log("snapshot_failed", reason=str(error))

    def _wait(self) -> None:
        if self._every_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self._is_due)

    def _is_due(self) -> None:
        self._due = True
        # In a task of the actor: what `snapshot` raises is its failure.
        self._actor.background(self._take_if_idle(), name="snapshot")

    async def _take_if_idle(self) -> None:
        if self._due and self._changed and self._cell.between_turns:
            self._take()

    def _take(self) -> None:
        self._due = False
        self._actor.background(self._keep(self._pack()), name="snapshot")

    async def _keep(self, packed: np.ndarray | None) -> None:
        try:
            if packed is not None:
                await self._send(packed)
        except (RuntimeFault, TimeoutError) as error:
            self._actor.log("snapshot_failed", reason=str(error))
        self._wait()

    def _pack(self) -> np.ndarray | None:
        state = self._actor.snapshot()
        self._changed = False
        # As an array it travels beside the message, not in it.
        return None if state is None else np.frombuffer(dumps(state), np.uint8)

    async def _send(self, packed: np.ndarray) -> None:
        await self._node.call("$root", "keep", (self._cell.name, self._cell.incarnation, packed), {})


class Snapshots:
    """What the root keeps: the last state of each actor, `limit_bytes` together."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._states: dict[str, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._states.values())

    def fits(self, name: str, state: np.ndarray) -> bool:
        """Whether `keep` would stay within the limit."""
        old = self._states.get(name)
        return self.nbytes - (0 if old is None else old.nbytes) + state.nbytes <= self.limit_bytes

    def keep(self, name: str, state: np.ndarray) -> None:
        self._states[name] = state.copy()  # It may be lent memory, or pin a whole message.

    def get(self, name: str) -> np.ndarray | None:
        return self._states.get(name)

    def forget(self, name: str) -> None:
        self._states.pop(name, None)
