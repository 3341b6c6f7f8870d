"""Asking actors that may die meanwhile. Knows nothing of what is asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..runtime.errors import ActorDied

T = TypeVar("T")

MAX_DEATHS = 8
"""Deaths of an actor that one question survives: more come only from one that never comes back."""


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer of an actor that may die meanwhile: its next incarnation is asked again, which must do no harm."""
    for _ in range(MAX_DEATHS):
        try:
            return await ask()
        except ActorDied:
            pass  # The next question waits for the actor to come back, and fails at once if it never will.
    return await ask()
