"""Questions to all nodes of a system at once. One that does not answer is named, and holds up no other."""

from __future__ import annotations

import asyncio
from typing import Any

from .deadline import timeout
from .errors import RuntimeFault
from .node import Node
from .nodes import ROOT

Row = dict[str, Any]

QUIET_S = 0.1
"""Between the two looks at drained nodes: longer than a message is under way."""


async def survey(root: Node, own: list[Row], names: list[str], what: str, within_s: float) -> list[Row]:
    """The root's own rows, and those that the agents of these nodes answer to `what`, each with its `node`; or a row
    with `unanswered`."""
    answers = await asyncio.gather(*(_ask(root, name, what, within_s) for name in names))
    return [{"node": ROOT, **row} for row in own] + [row for rows in answers for row in rows]


async def drain_nodes(root: Node, names: list[str], patience_s: float) -> bool:
    """Waits until no actor of these nodes has work, and none has had any for QUIET_S. False: out of patience."""
    loop = asyncio.get_running_loop()
    end, before = loop.time() + patience_s, None
    while (left := end - loop.time()) > 0:
        handled = await asyncio.gather(*(_drain(root, name, left) for name in names))
        if None in handled:
            return False
        if handled == before and -1 not in handled:
            return True
        before = handled
        await asyncio.sleep(min(QUIET_S, left))
    return False


async def _ask(root: Node, name: str, what: str, within_s: float) -> list[Row]:
    try:
        async with timeout(within_s):
            answer = await getattr(root.ref(f"$node@{name}"), what)()
    except (RuntimeFault, TimeoutError) as error:
        return [{"node": name, "unanswered": str(error)}]
    return [{"node": name, **row} for row in (answer if isinstance(answer, list) else [answer])]


async def _drain(root: Node, name: str, seconds: float) -> int | None:
    try:
        async with timeout(seconds + 0.5):
            handled: int | None = await root.ref(f"$node@{name}").drain(seconds)
            return handled
    except (RuntimeFault, TimeoutError):
        return 0  # It has died, or will be killed: nothing of it is waited for.
