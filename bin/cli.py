"""`bin/launch`: reads a cluster file, starts its system, shows it, ends it in order.

Exit codes: 0 the run reached its end; 1 it failed; 2 wrong input, nothing was started; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from .runtime.errors import ActorDied, LaunchError, RemoteError, RuntimeFault
from .runtime.toml import ConfigError

if TYPE_CHECKING:
    from .actors.job import Job
    from .runtime.cluster import ActorSpec
    from .runtime.group import ActorGroup
    from .runtime.rundir import RunDirectory
    from .runtime.system import System

DRAIN_S = 120.0
"""After Ctrl-C: time to finish the step and write the checkpoint."""

MAX_FAILURES = 3
"""Failures of the controller, with no step in between, after which the run is given up: it would fail for ever."""

STOP_NOW_S = 1.0
"""After a second Ctrl-C: time to end in good order."""

SAMPLE_S = 1.0
"""Time between two looks at memory and the actor tree."""

_EXAMPLE = """examples:
  bin/launch cluster.toml
  bin/launch cluster.toml --set rl.steps=20 --set run.name=short
  bin/launch cluster.toml --resume        after Ctrl-C, a crash or a reboot
"""


def launch_main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="bin/launch", description="Runs a cluster file.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("cluster", help="the cluster file, for example cluster.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a key of the file"
    )
    parser.add_argument("--check", action="store_true", help="validate everything, start nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the run from its last checkpoint")
    parser.add_argument("--plain", action="store_true", help="one line per step, also on a terminal")
    options = parser.parse_args(arguments)
    # Until the run has handlers of its own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _launch(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"the run can't go on: {where}{error.strerror or error}; make room, or set TMPDIR", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was started", file=sys.stderr)
        return 130


def _launch(options: argparse.Namespace) -> int:
    with _uninterrupted():
        from .actors.job import load_job

    job = load_job(options.cluster, options.set)
    if options.check:
        print(job.describe())
        return 0
    with job.open_run(resume=options.resume) as run:
        with _uninterrupted():
            import uvloop

            from .runtime.process import GC_THRESHOLD

        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        return uvloop.run(_Launch(job, run, plain=options.plain or not sys.stdout.isatty()).run())


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds back Ctrl-C while compiled modules are loaded, some of which crash if it strikes inside."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Launch:
    """One run of `bin/launch`."""

    def __init__(self, job: Job, run: RunDirectory, *, plain: bool) -> None:
        self.job, self.dir, self.plain = job, run, plain
        self.started = time.time()
        self.peak_rss_bytes = 0
        self.interrupts = 0
        self.state: dict[str, Any] = {"run": job.run.name, "started": self.started, "rows": [], "evaluations": []}
        self.summary: dict[str, Any] = {
            "steps": 0, "stages": {}, "evaluation": [], "samples": [], "staleness": {"mean": 0.0, "max": 0},
            "tokens": {"sampled": 0, "trained": 0}, "ok": False, "reason": "",
        }  # fmt: skip
        self.stop_now = asyncio.Event()

    async def run(self) -> int:
        """Starts, shows and stops the system; writes summary.json."""
        from .actors.report import write_summary
        from .runtime.gang import with_ranks
        from .runtime.system import System
        from .screen import open_screen

        nodes = {name: settings.spec(name) for name, settings in with_ranks(self.job.cluster).nodes.items()}
        system = System(self.dir, nodes=nodes, seed=self.job.run.seed)
        self._on_signals(system)
        with open_screen(plain=self.plain) as screen:
            try:
                async with system:
                    await self._follow(system, screen)
            except RuntimeFault as error:
                self.summary["reason"] = _first_line(error)
            except BrokenPipeError:
                self.summary["reason"] = "nobody reads the output any more"
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        known = {"wall_s": time.time() - self.started, **self.summary}
        restarts = _restarts(self.dir.events)
        known |= {"run": self.job.run.name, "restarts": restarts, "peak_rss_bytes": self.peak_rss_bytes}
        if self.interrupts and not known["ok"] and not known["reason"]:
            known["reason"] = "interrupted"
        write_summary(self.dir.summary, known)
        return self._say_how_it_ended(known)

    async def _follow(self, system: System, screen: Any) -> None:
        """Works until the run is over, the system has failed, or there was a second Ctrl-C."""
        watching = asyncio.create_task(self._watch(system, screen))
        work = asyncio.create_task(self._work(system, screen))
        stopping = asyncio.create_task(self.stop_now.wait())
        try:
            await asyncio.wait([work, watching, system.failed, stopping], return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                work.cancel()
                await system.stop("interrupted", patience_s=STOP_NOW_S)
                return
            for ended in (system.failed, work, watching):
                if ended.done():
                    ended.result()
        except RuntimeFault as error:
            trace = error.remote_traceback if isinstance(error, RemoteError) else ""
            system.events.write("run_failed", reason=_first_line(error), traceback=trace)
            raise
        finally:
            self._show(system, screen)
            for task in (work, watching, stopping):
                task.cancel()

    async def _work(self, system: System, screen: Any) -> None:
        """Starts all actors at once, then follows the controller to its end."""
        from .runtime.gang import with_ranks

        cluster = with_ranks(self.job.cluster)
        for actor in cluster.actors.values():
            system.declare(actor.name, type(actor.instance))
        groups: dict[str, ActorGroup] = {}
        for name, spec in cluster.groups.items():
            above = groups.get(spec.parent)
            groups[name] = system.group(name, strategy=spec.strategy, policy=spec.policy, parent=above)
        await asyncio.gather(*(_spawn(groups.get(actor.group, system), actor) for actor in cluster.actors.values()))
        furthest, failures = (-1, 0), 0
        while True:
            await system.node.directory.when_up("controller")
            if failures == MAX_FAILURES:
                reason = next(e["reason"] for e in reversed(system.events.recent) if e["event"] == "actor_exit")
                raise LaunchError(f"the controller failed {failures} times with no step in between: {reason}")
            self.state["rows"] = []
            try:
                async for update in system.find("controller").progress.stream():
                    self.state["rows"] += update.pop("rows")
                    self.summary |= update.pop("summary")
                    # A controller that comes back takes rows of this very process for history.
                    update["resumed_s"] = self.state.get("resumed_s", update["resumed_s"])
                    self.state |= {**update, "started": time.time() - update["elapsed_s"]}
                    self._show(system, screen)
                    if update["done"]:
                        return
                    if self.state["rows"] and (reached := _position(self.state["rows"][-1])) > furthest:
                        furthest, failures = reached, 0
            except ActorDied:
                failures += 1

    async def _watch(self, system: System, screen: Any) -> None:
        """Looks at memory and the tree now and then, also while nothing else happens."""
        while True:
            rss = sum(_rss_bytes(pid) for pid in system.pids().values())
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
            self.state["rss_bytes"] = rss
            self._show(system, screen)
            await asyncio.sleep(SAMPLE_S)

    def _show(self, system: System, screen: Any) -> None:
        self.state["actors"] = system.tree()
        self.state["events"] = list(system.events.recent)
        screen.update(self.state)

    def _on_signals(self, system: System) -> None:
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            self.interrupts += 1
            if self.interrupts > 1 or not self.state["rows"]:
                self.stop_now.set()  # Asked twice, or there is nothing yet that would be worth a checkpoint.
                return
            loop.call_later(DRAIN_S, self.stop_now.set)
            try:
                system.find("controller").drain.cast()
            except RuntimeFault:
                self.stop_now.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)

    def _say_how_it_ended(self, summary: dict[str, Any]) -> int:
        if summary["ok"]:
            from .summary import final_report

            final_report(summary, self.dir.path)
            return 0
        resume = f"bin/launch {self.dir.config} --resume"
        if summary["reason"] == "interrupted":
            print(f"stopped; go on with: {resume}", file=sys.stderr)
            return 130
        print(f"the run failed: {summary['reason']}", file=sys.stderr)
        print(f"more is in {self.dir.events} and {self.dir.logs}/", file=sys.stderr)
        print(f"when the cause is gone, go on with: {resume}", file=sys.stderr)
        return 1


async def _spawn(group: System | ActorGroup, spec: ActorSpec) -> None:
    """Starts an actor. Raises LaunchError or, with the traceback of its `start`, RemoteError."""
    try:
        await group.spawn(spec.instance, name=spec.name, node=spec.node, policy=spec.policy)
    except RemoteError as error:
        why = str(error.args[0]).partition(" raised ")[2]
        raise RemoteError(f"{spec.name} did not start: {why}", error.remote_type, error.remote_traceback) from None


def _position(row: dict[str, Any]) -> tuple[int, int]:
    """Rows of a run in order."""
    from .actors.report import STAGES

    return STAGES.index(row["stage"]), row["step"]


def _restarts(events: Path) -> dict[str, int]:
    """Restarts by actor, those in earlier processes of a resumed run too."""
    lines = events.read_bytes().splitlines() if events.exists() else []
    restarts = [event for line in lines if (event := orjson.loads(line))["event"] == "actor_restart"]
    return dict(Counter(event["actor"] for event in restarts))


def _first_line(error: BaseException) -> str:
    """What went wrong, without the traceback or log that may follow."""
    return str(error.args[0] if error.args else error).partition("\n")[0]


def _rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
