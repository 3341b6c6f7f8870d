"""One run from its start to its end, seen from outside: what its controller tells, the memory it takes, its summary.

    Following(system, job, dir).run() --> state, as it changes        conclude() --> summary.json

Shared by `bin/launch`, which shows it, and by programs that embed headrace. Shows nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from .runtime.errors import ActorDied, LaunchError, RemoteError

if TYPE_CHECKING:
    from .actors.job import Job
    from .runtime.cluster import ActorSpec, ClusterSpec
    from .runtime.group import ActorGroup
    from .runtime.rundir import RunDirectory
    from .runtime.system import System

MAX_FAILURES = 3
"""Failures of the controller, with no step in between, after which the run is given up: it would fail for ever."""

SAMPLE_S = 1.0
"""Time between two looks at memory and the actor tree."""


class Following:
    """See the module. `on_change` is called whenever there is something new."""

    def __init__(
        self, system: System, job: Job, run: RunDirectory, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.started = time.time()
        self.state: dict[str, Any] = {"run": job.run.name, "started": self.started, "rows": [], "evaluations": []}
        """See Progress in actors/report.py."""
        self.summary: dict[str, Any] = {
            "steps": 0, "stages": {}, "evaluation": [], "samples": [], "staleness": {"mean": 0.0, "max": 0},
            "tokens": {"sampled": 0, "trained": 0}, "ok": False, "reason": "",
        }  # fmt: skip
        """See SUMMARY in actors/report.py; the rest of its keys come with `conclude`."""
        self.up = asyncio.Event()
        """Set when all actors are up."""
        self._system = system
        self._job = job
        self._dir = run
        self._on_change = on_change
        self._peak_rss_bytes = 0

    async def run(self) -> None:
        """Starts all actors at once, then follows the controller to its end.

        Raises LaunchError if it fails again and again, and what `start_actors` raises.
        """
        await start_actors(self._system, self._job.cluster)
        self.up.set()
        furthest, failures = (-1, 0), 0
        while True:
            await self._system.node.directory.when_up("controller")
            if failures == MAX_FAILURES:
                recent = reversed(self._system.events.recent)
                reason = next((e["reason"] for e in recent if e["event"] == "actor_exit"), "see events.jsonl")
                raise LaunchError(f"the controller failed {failures} times with no step in between: {reason}")
            self.state["rows"] = []
            try:
                async for update in self._system.find("controller").progress.stream():
                    self._take(update)
                    if update["done"]:
                        return
                    if self.state["rows"] and (reached := position(self.state["rows"][-1])) > furthest:
                        furthest, failures = reached, 0
            except ActorDied:
                failures += 1

    def _take(self, update: dict[str, Any]) -> None:
        self.state["rows"] += update.pop("rows")
        self.summary |= update.pop("summary")
        # A controller that comes back takes rows of this very process for history.
        update["resumed_s"] = self.state.get("resumed_s", update["resumed_s"])
        self.state |= {**update, "started": time.time() - update["elapsed_s"]}
        self._on_change()

    async def watch(self) -> None:
        """Looks at memory and the tree now and then, also while nothing else happens; never returns."""
        while True:
            rss = sum(_rss_bytes(pid) for pid in self._system.pids().values())
            self._peak_rss_bytes = max(self._peak_rss_bytes, rss)
            self.state["rss_bytes"] = rss
            self._on_change()
            await asyncio.sleep(SAMPLE_S)

    def conclude(self, reason: str = "") -> dict[str, Any]:
        """Writes summary.json and returns it. `reason`: why the run did not reach its end, if nothing else says so."""
        from .actors.report import write_summary

        summary = {"wall_s": time.time() - self.started, **self.summary}
        summary |= {"run": self._job.run.name, "restarts": _restarts(self._dir.events)}
        summary["peak_rss_bytes"] = self._peak_rss_bytes
        if not summary["ok"] and not summary["reason"]:
            summary["reason"] = reason
        write_summary(self._dir.summary, summary)
        return summary


async def start_actors(system: System, cluster: ClusterSpec) -> None:
    """Starts all groups and actors of a cluster at once. Raises LaunchError or, with the traceback of an actor's
    `start`, RemoteError."""
    from .runtime.gang import with_ranks

    cluster = with_ranks(cluster)
    for actor in cluster.actors.values():
        system.declare(actor.name, type(actor.instance))
    groups: dict[str, ActorGroup] = {}
    for name, spec in cluster.groups.items():
        above = groups.get(spec.parent)
        groups[name] = system.group(name, strategy=spec.strategy, policy=spec.policy, parent=above)
    await asyncio.gather(*(_spawn(groups.get(actor.group, system), actor) for actor in cluster.actors.values()))


async def _spawn(group: System | ActorGroup, spec: ActorSpec) -> None:
    try:
        await group.spawn(spec.instance, name=spec.name, node=spec.node, policy=spec.policy)
    except RemoteError as error:
        why = str(error.args[0]).partition(" raised ")[2]
        raise RemoteError(f"{spec.name} did not start: {why}", error.remote_type, error.remote_traceback) from None


def position(row: dict[str, Any]) -> tuple[int, int]:
    """Rows of a run in order."""
    from .actors.report import STAGES

    return STAGES.index(row["stage"]), row["step"]


def _restarts(events: Path) -> dict[str, int]:
    """Restarts by actor, those in earlier processes of a resumed run too."""
    lines = events.read_bytes().splitlines() if events.exists() else []
    restarts = [event for line in lines if (event := orjson.loads(line))["event"] == "actor_restart"]
    return dict(Counter(event["actor"] for event in restarts))


def _rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
