"""The sample pool of a training run: the generic pool of the runtime in the order of the stream policy."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.pool import Policy, SamplePool
from ...runtime.rundir import RunSpec
from ..trainer.settings import RlSettings
from .policy import stream_policy


@dataclass(kw_only=True)
class StreamPool(SamplePool):
    """Entries are groups, `id` their ordinal, `started` the version of their oldest token, `key` by
    `policy.priority`."""

    run: RunSpec
    rl: RlSettings
    """Says what is trained next: batch, staleness bound, completion ratio."""

    live = ("rl.max_staleness", "rl.alpha")

    def __post_init__(self) -> None:
        if self.capacity < self.rl.groups_per_step:
            raise ValueError(
                f"capacity must hold a batch: at least {self.rl.groups_per_step} groups, got {self.capacity}; "
                "raise it, or make the batch smaller"
            )

    def fits(self) -> None:
        """All groups that the staleness bound lets in must have a place."""
        places = stream_policy(self.rl).places
        if self.capacity < places:
            raise ValueError(
                f"with max_staleness = {self.rl.max_staleness} there are up to {places} groups in the system, and the "
                f"pool has {self.capacity} places; start the run with [actors.pool] capacity = {places} or more"
            )

    async def changed(self) -> None:
        """From the next lease on."""
        self.follow(self.policy())

    def journal_path(self) -> str:
        """In the run's directory, unless `journal` says otherwise."""
        return self.journal or str(self.run.path / "journal" / "pool")

    def policy(self) -> Policy:
        """See StreamPolicy."""
        return stream_policy(self.rl)
