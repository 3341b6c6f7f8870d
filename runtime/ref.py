"""Refs: how actors are addressed. Knows nothing of where the actor is; its node does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .node import Node


class Ref:
    """The address of an actor by name. It outlives restarts: the next call reaches the new incarnation.

        verdict = await verifier.judge(x)               call: waits, raises the remote error
        verifier.judge.cast(x)                          cast: waits for nothing; raises MailboxFull
        async for chunk in rollout.generate.stream(x)   stream: leaving the loop cancels the callee

    What is sent is given away: arrays among the arguments, of a cast too, must not be changed afterwards. A loop over a
    stream that may be left by an error is best put into `contextlib.aclosing`: the error keeps the stream alive.

    Raises UnknownActor, UnknownMessage, ActorDied, ActorRestarted, MailboxFull, DeadlineExceeded, RemoteError.
    """

    def __init__(self, node: Node, name: str) -> None:
        self._node = node
        self._name = name

    def __getattr__(self, method: str) -> BoundMessage:
        if method.startswith("_"):
            raise AttributeError(method)
        bound = self.__dict__[method] = BoundMessage(self._node, self._name, method)
        return bound  # Once: from now on it is an attribute.

    def __repr__(self) -> str:
        return f"Ref({self._name!r})"


class BoundMessage:
    """One kind of message of one actor."""

    __slots__ = ("_method", "_name", "_node")

    def __init__(self, node: Node, name: str, method: str) -> None:
        self._node = node
        self._name = name
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Call: asks and waits for the answer."""
        return self._node.call(self._name, self._method, args, kwargs)

    def cast(self, *args: Any, **kwargs: Any) -> None:
        """Sends and waits for nothing, not even for delivery. Raises MailboxFull, UnknownActor, ActorDied at once."""
        self._node.cast(self._name, self._method, args, kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """Asks and iterates over the answers as they come; the callee is held back while they are not consumed."""
        return self._node.stream(self._name, self._method, args, kwargs)

    def __repr__(self) -> str:
        return f"{self._name}.{self._method}"
