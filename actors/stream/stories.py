"""What became of the last groups: who generated which tokens with which version, what was judged, why they were
trained, kept or dropped. Beside the pool's own record (runtime/pool.py), which does not know what a group is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..types import Group, Trajectory

NUM_KEPT = 512
"""Groups of each end (trained, filtered, failed) that are remembered; some KB each."""

Event = dict[str, Any]


class Stories:
    """By end and ordinal."""

    def __init__(self) -> None:
        self._told: dict[str, dict[int, list[Event]]] = {}

    def tell(self, group: Group, event: str, **why: Any) -> None:
        """The group has come to an end of its way: trained, filtered, failed."""
        told = self._told.setdefault(event, {})
        told[group.prompt.ordinal] = [{"time": round(time.time(), 3), "event": event, **why}, *described(group)]
        if len(told) > NUM_KEPT:
            del told[next(iter(told))]

    def of(self, ordinal: int, next_ordinal: int) -> list[Event]:
        """Oldest first. Raises LookupError, with the groups that are remembered; `next_ordinal` was not given yet."""
        found = [event for told in self._told.values() for event in told.get(ordinal, ())]
        if not found and not 0 <= ordinal < next_ordinal:
            raise LookupError(f"there is no group {ordinal} yet: there are 0 to {next_ordinal - 1}")
        if not found:
            known = "; ".join(f"{min(told)} to {max(told)} {end}" for end, told in self._told.items())
            raise LookupError(f"group {ordinal} is forgotten, or waits in the pool; remembered are some of {known}")
        return found


def described(group: Group) -> list[Event]:
    """One event per response."""
    return [_response(trajectory) for trajectory in group.trajectories]


def _response(trajectory: Trajectory) -> Event:
    origins = [s.origin for s in trajectory.segments if s.origin is not None]
    event: Event = {
        "event": f"response {trajectory.member}",
        "tokens": ", ".join(f"{len(s.tokens)} by version {s.version}" for s in trajectory.segments) or 0,
        "finish": trajectory.finish or "unfinished",
    }
    if origins:
        event["workers"] = _in_order([o.worker for o in origins])
        event["engine"] = _in_order([f"{o.engine} seed={o.seed} {o.precision}" for o in origins])
        event["temperature"] = origins[-1].sampling.temperature
    if trajectory.refusal:
        event["refusal"] = trajectory.refusal
    if trajectory.verdict is not None:
        verdict = trajectory.verdict
        event["verdict"] = verdict.error or ("correct" if verdict.correct else "incorrect")
        event["reward"] = round(trajectory.reward, 4)
    return event


def _in_order(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
