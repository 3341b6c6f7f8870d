"""What a node does for a REPL: the messages of its agent (agent.py) that concern one of its actors.

    evaluate --> its turn in the actor's system lane --> the user's code, with `self` bound --> what it showed
                                                         on the actor's thread if it has one, else on the loop

So nothing of the actor that takes turns runs meanwhile; on the loop, nothing at all until the code awaits. Code that
holds up the loop is interrupted after HOLD_S, for the loop is also that of others; on a thread it may take its time.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncIterator, Coroutine, Generator
from typing import TYPE_CHECKING, Any, cast

from ..actor import Actor, message
from ..errors import ActorDied
from ..mailbox import Lane
from .interrupt import FILE as INTERRUPT_FILE
from .interrupt import Interrupted, Region
from .look import exposed_object
from .output import Output
from .show import show
from .snippets import Snippet, trace_of
from .tracing import follow

if TYPE_CHECKING:
    from ..cell import Cell
    from ..node import Node

HOLD_S = 2.0
"""Longest that evaluated code may hold up the loop of a node."""

EVALUATE_S = 3600.0
"""Longest wait for what evaluated code does next."""

MAX_PLACES = 256
"""Namespaces kept in a node; beyond, the oldest is forgotten."""


class Place:
    """One REPL inside of one incarnation of one actor."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.names: dict[str, Any] = {"__name__": f"<{cell.name}>", "self": cell.actor, "asyncio": asyncio}
        self.region = Region()


class Visits(Actor):
    """A base of the agent: REPLs that visit its actors."""

    def __post_init__(self) -> None:
        self._places: dict[tuple[str, str], Place] = {}

    @message(concurrent=True, lane=Lane.SYSTEM, deadline_s=EVALUATE_S)
    async def evaluate(self, actor: str, session: str, source: str) -> AsyncIterator[list[str]]:
        """Runs code inside an actor. Yields ["out", what it prints], then ["value", shown] or ["error", traceback];
        names that it binds are kept for the session, and for this incarnation. Raises ActorDied."""
        node = self._home()
        place = self._place(self._cell(actor), session)
        output = Output()
        run = _Run(place, output, source, node)
        turn = asyncio.ensure_future(node.visit(place.cell, run.turn, "repl", EVALUATE_S))
        arrived = asyncio.ensure_future(output.wait())
        try:
            while not turn.done():
                await asyncio.wait([turn, arrived], return_when=asyncio.FIRST_COMPLETED)
                if text := output.take():
                    yield ["out", text]
                if arrived.done():
                    arrived = asyncio.ensure_future(output.wait())
            if text := output.take():
                yield ["out", text]
            yield await turn
        finally:
            place.region.interrupt("its user is gone, or has given it up")
            turn.cancel()
            arrived.cancel()
            await asyncio.gather(turn, arrived, return_exceptions=True)

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def leave(self, session: str) -> None:
        """A REPL has ended: forgets its names."""
        for key in [key for key in self._places if key[0] == session]:
            del self._places[key]
        self._home().regions.pop(session, None)

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def pause(self, actor: str, paused: bool) -> int:
        """Pauses an actor, or lets it go on: paused, it takes messages of the system and control lanes only. Returns
        how many wait. Raises ActorDied."""
        cell = self._cell(actor)
        cell.pause(paused)
        return len(cell.turns) + len(cell.overlapping)

    @message(concurrent=True, lane=Lane.SYSTEM, deadline_s=EVALUATE_S)
    async def trace(self, actor: str, seconds: float) -> AsyncIterator[list[dict[str, Any]]]:
        """Follows the messages of an actor for a while: rows of those that have ended. Raises ActorDied."""
        async for rows in follow(self._home(), self._cell(actor), seconds):
            yield rows

    @message(concurrent=True, lane=Lane.SYSTEM, deadline_s=EVALUATE_S)
    async def invoke(self, name: str, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Calls a method of what an actor here has exposed; what it returns is shown if it can't travel."""
        value = getattr(exposed_object(self._home(), name), method)(*args, **kwargs)
        return await value if asyncio.iscoroutine(value) else value

    @message(concurrent=True, lane=Lane.SYSTEM, deadline_s=10.0)
    async def configure(self, actor: str, tables: dict[str, Any]) -> None:
        """Gives an actor new values of its live fields, between two messages. Raises what its `changed` raises."""
        cell = self._cell(actor)

        async def change() -> None:
            for name, value in tables.items():
                setattr(cell.actor, name, value)
            await cell.actor.changed()

        await self._home().visit(cell, change, "configure", 10.0)

    @message(concurrent=True, lane=Lane.SYSTEM)
    async def log_level(self, level: str) -> None:
        """Sets the level of Python's logging in this process, which goes to the node's log."""
        from .logs import set_level

        set_level(level)

    def _home(self) -> Node:
        assert self._node is not None
        return self._node

    def _cell(self, actor: str) -> Cell:
        cell = self._home().cells.get(actor)
        if cell is None or cell.ended:
            raise ActorDied(f"{actor} is not here now; ask again when it is up")
        return cell

    def _place(self, cell: Cell, session: str) -> Place:
        key = session, cell.name
        place = self._places.get(key)
        if place is None or place.cell is not cell:
            while len(self._places) >= MAX_PLACES:
                del self._places[next(iter(self._places))]
            place = self._places[key] = Place(cell)
        self._home().regions[session] = place.region
        return place


class _Run:
    """One evaluation."""

    def __init__(self, place: Place, output: Output, source: str, node: Node) -> None:
        self._place = place
        self._output = output
        self._source = source
        self._node = node

    async def turn(self) -> list[str]:
        """The end of it: ["value", shown], "" for None, or ["error", traceback]. It never raises, so the actor does not
        fail by it."""
        place = self._place
        try:
            snippet = Snippet(self._source)
            if snippet.awaits:
                with self._output.caught():
                    await _Stepped(snippet.run_async(place.names), self._hold())
            elif place.cell.actor._thread is not None:
                await place.cell.actor.in_thread(self._run, snippet)
            else:
                with self._hold():
                    self._run_here(snippet)
            return ["value", "" if snippet.value is None else self._show(snippet)]
        except asyncio.CancelledError:
            raise
        except Interrupted as error:
            place.region.clear()
            return ["error", f"{_until_interrupted(error)}KeyboardInterrupt: {place.region.why}\n"]
        except BaseException as error:  # noqa: BLE001 (anything that a user types, SystemExit too)
            return ["error", _readable(error)]

    def _run(self, snippet: Snippet) -> None:
        """On the actor's thread."""
        try:
            with self._place.region:
                self._run_here(snippet)
        except Interrupted:
            self._place.region.clear()
            raise

    def _run_here(self, snippet: Snippet) -> None:
        with self._output.caught():
            snippet.run(self._place.names)

    def _show(self, snippet: Snippet) -> str:
        self._place.names["_"] = snippet.value
        with self._hold():
            return show(snippet.value)

    def _hold(self) -> _Hold:
        return _Hold(self._place.region, self._node.key)


class _Hold:
    """The region on the loop, with a bound on its time."""

    def __init__(self, region: Region, node: str) -> None:
        self._region = region
        self._why = f"it held up the loop of node {node.partition('#')[0]}, and all actors there, for {HOLD_S:g} s"

    def __enter__(self) -> None:
        self._timer = threading.Timer(HOLD_S, self._region.interrupt, [self._why])
        self._timer.daemon = True
        self._timer.start()
        self._region.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._region.__exit__(*error)
        self._timer.cancel()


class _Stepped:
    """A coroutine each of whose steps is held to that bound; between them the loop does other work."""

    def __init__(self, work: Coroutine[Any, Any, None], hold: _Hold) -> None:
        self.cr_await = work
        self._hold = hold

    def __await__(self) -> Generator[Any, Any, None]:
        return cast("Generator[Any, Any, None]", self)

    def __iter__(self) -> _Stepped:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        with self._hold:
            return self.cr_await.send(value)

    def throw(self, *error: Any) -> Any:
        with self._hold:
            return self.cr_await.throw(*error)

    def close(self) -> None:
        self.cr_await.close()


def _until_interrupted(error: BaseException) -> str:
    """Where the code was, without what interrupted it."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if frame.filename.startswith("<attach ")), 0)
    own = [frame for frame in frames[first:] if frame.filename != INTERRUPT_FILE]
    return "Traceback (most recent call last):\n" + "".join(traceback.format_list(own))


def _readable(error: BaseException) -> str:
    try:
        return trace_of(error)
    except Exception:  # noqa: BLE001 (an error whose __str__ raises)
        return "".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__name__} that can't be printed\n"
