"""What a sample pool is made of, and the shape of the policy that chooses from it. Knows nothing of how it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .codec import wire


@wire
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """One thing in the pool."""

    id: int
    """Unique for ever, >= 0, and roughly increasing."""
    key: tuple[float, ...]
    """Priority: the smallest goes first."""
    started: int
    """Version of its oldest part."""
    payload: Any
    """Anything that can travel in a message."""
    num_tokens: int = 0
    """Its size, for statistics."""


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Entries lent to one holder until they are acked or released."""

    id: int
    version: int
    entries: list[Entry]
    expires_in_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What a policy decides on."""

    waiting: Sequence[Entry]
    leased: Sequence[Entry]
    """Entries leased under the same version."""
    pending: Mapping[int, int]
    """Announced entries that are still to come: id -> started."""
    version: int
    count: int
    """Entries asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a policy decided."""

    picks: Sequence[Entry]
    """At most `view.count` of `view.waiting`, in the order in which the holder gets them."""
    drops: Sequence[tuple[Entry, str]] = ()
    """Entries that can never be used, each with the reason; they are settled at once."""
    reason: str = ""
    """Why there are not more picks."""


Policy = Callable[[View], Selection]


def in_key_order(view: View) -> Selection:
    """The policy that looks at nothing but the key."""
    return Selection(
        picks=sorted(view.waiting, key=lambda e: (e.key, e.id))[: view.count], reason="too few entries wait"
    )
