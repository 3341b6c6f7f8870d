"""What a rollout worker generates with: the contract of its backends. Knows nothing of any of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ...runtime.exchange import Manifest, Route, Seat
from .requests import Chunk, Request


class Backend(Protocol):
    """Its methods are called on the loop of the actor, and only those of requests that passed `check` generate."""

    async def open(self) -> None:
        """Makes ready for the first weights."""

    async def close(self) -> None:
        """Gives back what it holds; what still generates has been left before."""

    def seat(self) -> Seat:
        """Where weights are to be brought to."""

    async def load(self, manifest: Manifest, route: Route | None = None) -> None:
        """Takes the weights of a version as `route` says; tokens that are requested later carry it.

        Raises StaleIncarnation, CorruptWeights as `Receiver.receive`, and keeps what it has.
        """

    def check(self, request: Request) -> None:
        """Raises ValueError, with rule, value and remedy, if `request` can't be generated. There are weights."""

    def generate(self, requests: list[Request]) -> AsyncGenerator[list[Chunk], None]:
        """Chunks of all responses, until the last has finished; closing it cancels the requests.

        The `key` of a request is its caller's: others may use the same at the same time.
        """

    def stats(self) -> dict[str, Any]:
        """See Rollout.stats."""
