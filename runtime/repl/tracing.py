"""Follows the messages of one actor for a while. Costs nothing when nobody does.

While it is followed, the handlers behind the actor's doors (doors.py) are wrapped; doors are opened anew at the
beginning and at the end, so that messages which are at work keep the handler they had.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from ..deadline import current_scope
from ..doors import Delivery, Door
from .show import show

if TYPE_CHECKING:
    from ..cell import Cell
    from ..node import Node

LOOK_S = 0.1
MAX_ROWS = 1000
"""Kept between two looks; beyond, the oldest are dropped, and counted."""

Row = dict[str, Any]


async def follow(node: Node, cell: Cell, seconds: float) -> AsyncIterator[list[Row]]:
    """Rows of the messages that ended: when they began (unix time), from which node, method, lane, how long they had
    waited and took, bytes, arguments, and the error if they raised one. `dropped`: rows that are missing before one."""
    rows: deque[Row] = deque(maxlen=MAX_ROWS)
    watch = _Watch(rows)
    end = time.monotonic() + seconds
    cell.tracers = (*cell.tracers, watch.wrap)
    node.shut(cell)
    try:
        while not cell.ended and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(LOOK_S, left))
            if rows:
                some = list(rows)
                rows.clear()
                some[0]["dropped"], watch.dropped = watch.dropped, 0
                yield some
    finally:
        cell.tracers = tuple(tracer for tracer in cell.tracers if tracer != watch.wrap)
        node.shut(cell)


class _Watch:
    def __init__(self, rows: deque[Row]) -> None:
        self.rows = rows
        self.dropped = 0

    def wrap(self, door: Door, handler: Callable[..., Any]) -> Callable[..., Any]:
        """The handler of a door, watched."""
        if door.kind == "async":

            async def handle(*args: Any, **kwargs: Any) -> Any:
                row = self._begin(door, args, kwargs)
                try:
                    return await handler(*args, **kwargs)
                except BaseException as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:200]
                    raise
                finally:
                    self._end(row)

            return handle
        if door.kind == "stream":

            async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                row = self._begin(door, args, kwargs)
                items = handler(*args, **kwargs)
                try:
                    async for item in items:
                        row["items"] = row.get("items", 0) + 1
                        yield item
                except BaseException as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:200]
                    raise
                finally:
                    await items.aclose()
                    self._end(row)

            return stream

        def compute(*args: Any, **kwargs: Any) -> Any:
            row = self._begin(door, args, kwargs)
            try:
                return handler(*args, **kwargs)
            except BaseException as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
                raise
            finally:
                self._end(row)

        return compute

    def _begin(self, door: Door, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Row:
        scope = current_scope()
        row: Row = {
            "time": time.time(), "from": door.origin, "method": door.method, "lane": door.lane.name.lower(),
            "arguments": show((*args, *kwargs.items()), 120), "began": time.perf_counter(),
        }  # fmt: skip
        if isinstance(scope, Delivery):
            row["waited_s"] = round(asyncio.get_running_loop().time() - scope.since, 6)
            row["bytes"] = scope.size
        return row

    def _end(self, row: Row) -> None:
        row["took_s"] = round(time.perf_counter() - row.pop("began"), 6)
        self.dropped += len(self.rows) == MAX_ROWS
        self.rows.append(row)
