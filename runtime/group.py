"""Actors that are supervised together; made by `System.group`. Knows nothing of how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .actor import Actor
from .nodes import ROOT
from .ref import Ref
from .strategy import Group, Strategy
from .supervisor import RestartPolicy

if TYPE_CHECKING:
    from .system import System


class ActorGroup:
    """A group of a system's supervision tree.

        ranks = system.group("ranks", strategy="one_for_all", policy=RestartPolicy(max_restarts=3))
        for rank in range(4):
            await ranks.spawn(Rank(rank=rank), name=f"rank{rank}", node=f"gpu{rank}")

    A one_for_all group is a gang: if one member fails, all are stopped, in parallel, and all are started again, in the
    order in which they were spawned, with `epoch` one higher; a member reads it as `self.epoch`.
    """

    def __init__(self, system: System, group: Group) -> None:
        self._system = system
        self._group = group

    @property
    def name(self) -> str:
        return self._group.name

    @property
    def strategy(self) -> Strategy:
        return self._group.strategy

    @property
    def epoch(self) -> int:
        """1 at first; one higher whenever all members are restarted."""
        return self._group.epoch

    async def spawn(self, actor: Actor, *, name: str, node: str = ROOT, policy: RestartPolicy | None = None) -> Ref:
        """As `System.spawn`, into this group; without a policy the actor has the group's. Its failures count in its own
        budget and in the group's. In a group with an order it waits until those before it are up."""
        return await self._system._spawn(actor, name, node, policy, self._group)

    def __repr__(self) -> str:
        return f"ActorGroup({self.name!r}, {self.strategy}, epoch {self.epoch})"
