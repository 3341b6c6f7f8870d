"""The sample pool of a training run: the generic pool of the runtime in the order of the stream policy."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.pool import SamplePool
from ...runtime.pool_state import Policy
from .policy import StreamPolicy


@dataclass(kw_only=True)
class StreamPool(SamplePool):
    """Entries are groups, `id` their ordinal, `started` the version of their oldest token, `key` by `policy.priority`."""

    stream: StreamPolicy
    """What is trained next."""

    def __post_init__(self) -> None:
        if self.capacity < self.stream.batch:
            raise ValueError(
                f"capacity must hold a batch: at least {self.stream.batch} groups, got {self.capacity}; "
                "raise it, or make the batch smaller"
            )

    def policy(self) -> Policy:
        """See StreamPolicy."""
        return self.stream
