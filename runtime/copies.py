"""Actors that are configured alike, each in a node of its own. Their number may change while the system runs.

    [actors.rollout]  node = "rollout", count = 3      rollout      on node rollout
                                                       rollout_2    on node rollout_2
                                                       rollout_3    on node rollout_3

    actor.copies("rollout").resize(2) --> $root: rollout_3 is stopped, and its node ends

A copy of a worker group has all of its ranks: rollout_2, rollout_2/1, ... Names say who is a copy of whom; nothing else
is kept. Knows nothing of what the actors do.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import UnknownActor
from .exits import Exit

if TYPE_CHECKING:
    from .actor import Actor
    from .children import Children, Member
    from .launcher import NodeSpec
    from .nodes import Nodes
    from .ref import Ref

MAX_COPIES = 4096


def copy_name(of: str, number: int) -> str:
    """The name of the first, second, ... of the actors that are like `of`."""
    return of if number == 1 else f"{of}_{number}"


def home_of(copy: str) -> str:
    """The node of a copy that is not the first."""
    return copy.replace("/", "-")


class Copies:
    """From an actor's side: those that are like `of`, it among them."""

    def __init__(self, owner: Actor, of: str) -> None:
        self._root = owner.find("$root")
        self.of = of

    async def names(self) -> list[str]:
        """The names of all, the first first. Raises UnknownActor."""
        names: list[str] = await self._root.copies_of(self.of)
        return names

    async def resize(self, count: int) -> list[str]:
        """Has `count` of them, and returns their names when the new ones are up and the last ones have stopped.

        Raises ValueError for less than one or more than MAX_COPIES, UnknownActor, and what a new one's `start` raised:
        then those that are up stay.
        """
        names: list[str] = await self._root.resize(self.of, count)
        return names


class CopyKeeper:
    """From the root's side: `spawn` is System's, with a group; `specs` are those of its nodes."""

    def __init__(
        self, children: Children, nodes: Nodes, specs: dict[str, NodeSpec], spawn: Callable[..., Awaitable[Ref]]
    ) -> None:
        self._children = children
        self._supervisor = children.supervisor
        self._nodes = nodes
        self._specs = specs
        self._spawn = spawn
        self._turns: dict[str, asyncio.Lock] = {}

    def names(self, of: str) -> list[str]:
        """See Copies.names."""
        return list(self._numbered(of).values())

    async def resize(self, of: str, count: int) -> list[str]:
        """See Copies.resize."""
        if not 1 <= count <= MAX_COPIES:
            raise ValueError(f"there may be 1 to {MAX_COPIES} of {of}, got {count}; to have none, stop the run")
        async with self._turns.setdefault(of, asyncio.Lock()):
            numbered = self._numbered(of)
            leaving = list(numbered)[count:]
            free = (number for number in range(2, MAX_COPIES + 1) if number not in numbered)
            coming = [next(free) for _ in range(count - len(numbered))]
            await asyncio.gather(*(self._remove(numbered[number]) for number in leaving))
            ends = await asyncio.gather(*(self._add(of, copy_name(of, n)) for n in coming), return_exceptions=True)
            for end in ends:
                if end is not None:
                    raise end
            return self.names(of)

    def _numbered(self, of: str) -> dict[int, str]:
        """Number -> name, ascending. Raises UnknownActor."""
        table = self._children.table
        if of not in table:
            raise UnknownActor(f"no actor named {of!r} is supervised here; there are {', '.join(table) or 'none'}")
        kind, pattern = type(table[of].actor), re.compile(rf"{re.escape(of)}_([1-9]\d*)")
        found = {
            int(m[1]): n for n, other in table.items() if (m := pattern.fullmatch(n)) and type(other.actor) is kind
        }
        return {1: of, **dict(sorted(found.items()))}

    def _family(self, name: str) -> list[Member]:
        """An actor, or all ranks of a worker group."""
        table = self._children.table
        return [member for other, member in table.items() if other == name or other.startswith(f"{name}/")]

    async def _add(self, of: str, name: str) -> None:
        family = self._family(of)
        group = self._supervisor.groups[family[0].group]
        if len(family) > 1:
            assert group.parent is not None
            group = self._supervisor.add_group(name, group.strategy, group.policy, group.parent.name)
        starts, copies = [], [name + member.name.removeprefix(of) for member in family]
        for member, copy in zip(family, copies, strict=True):
            node = home_of(copy)
            self._specs[node] = replace(self._specs.get(member.node) or self._nodes[node].spec, name=node)
            actor: Any = member.actor
            starts.append(self._spawn(replace(actor), copy, node, member.policy, group))
        try:
            await asyncio.gather(*starts)
        except BaseException:
            await self._end(name, copies)
            raise

    async def _remove(self, name: str) -> None:
        await self._end(name, [member.name for member in self._family(name)])

    async def _end(self, name: str, copies: list[str]) -> None:
        """Stops a copy, its ranks if it has several, and the nodes that were made for it."""
        await self._children.dismiss(copies, Exit(kind="stopped", detail="fewer are wanted"))
        if name in self._supervisor.groups:
            self._supervisor.remove_group(name)
        await asyncio.gather(*(self._nodes.close(home_of(copy)) for copy in copies))
