"""How messages get to actors: where an actor is, by which lane each of its messages goes, and with whose credits.

    (actor, method) -> Route(status, lane, window)      one window per remote actor and lane

A route holds as long as the directory says the same of the actor. Knows nothing of sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .codec import encode
from .directory import Directory, Status
from .errors import ActorDied, CodecError
from .mailbox import CreditWindow, Lane
from .protocol import pack_head, unpack_head


@dataclass(slots=True, eq=False)
class Route:
    """The way of one kind of message to one incarnation of an actor."""

    status: Status
    node: str
    head: bytes
    """Where its messages go, as they say it; see protocol.py."""
    lane: int
    own_s: float
    """The message's default deadline in seconds."""
    here: bool
    """In this node."""
    up: bool
    window: CreditWindow | None
    """None where no credit is needed: in this node, and for the system lane."""


class Routes:
    """The routes from one node, whose key is `here`."""

    def __init__(self, here: str, directory: Directory) -> None:
        self._here = here
        self._directory = directory
        self._look = directory.look
        self._routes: dict[tuple[str, str], Route] = {}
        self._windows: dict[tuple[str, str, int], CreditWindow] = {}

    def find(self, name: str, method: str) -> Route:
        """Raises UnknownActor, UnknownMessage."""
        route = self._routes.get((name, method))
        if route is None or route.status is not self._look(name):
            route = self._routes[name, method] = self._make(self._directory.get(name), method)
        return route

    def window(self, node: str, actor: str, lane: int) -> CreditWindow | None:
        """The credits for a lane of an actor, if any message ever went there."""
        return self._windows.get((node, actor, lane))

    def available(self, actor: str, lane: Lane = Lane.NORMAL) -> int:
        """Messages that may be sent to a remote actor now."""
        return sum(w.available for (_, name, of), w in self._windows.items() if (name, of) == (actor, lane))

    def close(self, node: str) -> tuple[int, int]:
        """A node has gone. Returns how many messages were sent there by credit, and how many of them nobody knows of
        whether they were taken from their mailbox."""
        gone = [slot for slot in self._windows if slot[0] == node]
        windows = [self._windows.pop(slot) for slot in gone]
        for window in windows:
            window.close()
        for key in [key for key, route in self._routes.items() if route.node == node]:
            del self._routes[key]
        return sum(window.taken for window in windows), sum(window.under_way for window in windows)

    def _make(self, status: Status, method: str) -> Route:
        lane, own_s = status.message(method)
        here = status.node == self._here
        window = None if here or lane is Lane.SYSTEM or not status.node else self._window(status, lane)
        head = pack_head(status.name, method, lane.value, status.incarnation)
        return Route(status, status.node, head, lane.value, own_s, here, status.state == "up", window)

    def _window(self, status: Status, lane: Lane) -> CreditWindow:
        slot = status.node, status.name, int(lane)
        window = self._windows.get(slot)
        if window is None:
            window = self._windows[slot] = CreditWindow(status.window, status.window_bytes)
        elif (window.capacity, window.capacity_bytes) != (status.window, status.window_bytes):
            window.resize(status.window, status.window_bytes)
        return window


def not_connected(route: Route) -> ActorDied:
    """What a sender gets whose node has no way there."""
    return ActorDied(f"{route.status.name}: its node {route.node} is not connected; ask again")


def blame(error: BaseException, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BaseException:
    """The error of a message that was not sent; if it can't travel, it says which argument is to blame."""
    if not isinstance(error, CodecError):
        return error
    actor, method, *_ = unpack_head(route.head)
    where = ""
    for name, value in [*((f"argument {n}", arg) for n, arg in enumerate(args, 1)), *kwargs.items()]:
        try:
            encode(value)
        except CodecError:
            where = f"{name}: "
            break
    return CodecError(f"{actor}.{method}: {where}{error}")
