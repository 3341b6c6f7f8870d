"""`bin/launch`: reads a cluster file, starts its system, shows it, ends it in order.

Exit codes: 0 the run reached its end; 1 it failed; 2 wrong input, nothing was started; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .runtime.errors import ActorDied, RuntimeFault
from .runtime.toml import ConfigError

if TYPE_CHECKING:
    from .actors.job import Job
    from .runtime.rundir import RunDirectory
    from .runtime.system import System

DRAIN_S = 120.0
"""After Ctrl-C: time to finish the step and write the checkpoint."""

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
    try:
        from .actors.job import load_job

        job = load_job(options.cluster, options.set)
        if options.check:
            print(job.describe())
            return 0
        with job.open_run(resume=options.resume) as run:
            import uvloop

            return uvloop.run(_Launch(job, run, plain=options.plain or not sys.stdout.isatty()).run())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


class _Launch:
    """One run of `bin/launch`."""

    def __init__(self, job: Job, run: RunDirectory, *, plain: bool) -> None:
        self.job, self.dir, self.plain = job, run, plain
        self.started = time.time()
        self.peak_rss_bytes = 0
        self.interrupts = 0
        self.state: dict[str, Any] = {"run": job.run.name, "started": self.started, "rows": [], "evaluations": []}
        self.stop_now = asyncio.Event()

    async def run(self) -> int:
        """Starts, shows and stops the system; writes summary.json."""
        from .runtime.system import System
        from .screen import open_screen

        summary: dict[str, Any] = {}
        reason = ""
        nodes = {name: settings.spec(name) for name, settings in self.job.cluster.nodes.items()}
        with open_screen(plain=self.plain) as screen:
            async with System(self.dir.path, nodes=nodes, seed=self.job.run.seed) as system:
                self._on_signals(system)
                watching = asyncio.create_task(self._watch(system, screen))
                work = asyncio.create_task(self._work(system, screen))
                stopping = asyncio.create_task(self.stop_now.wait())
                await asyncio.wait([work, system.failed, stopping], return_when=asyncio.FIRST_COMPLETED)
                try:
                    if work.done():
                        summary = work.result()
                    elif system.failed.done():
                        system.failed.result()
                except RuntimeFault as error:
                    reason = str(error)
                for task in (work, watching, stopping):
                    task.cancel()
                restarts = dict(system.restarts)
        finished = bool(summary) and summary.pop("finished")
        if self.interrupts and not finished:
            reason = "interrupted"
        self._write_summary(summary, finished, reason, restarts)
        return self._say_how_it_ended(finished, reason)

    async def _work(self, system: System, screen: Any) -> dict[str, Any]:
        """Starts all actors at once, then follows the controller to its end; returns its part of the summary."""
        cluster = self.job.cluster
        for spec in cluster.actors.values():
            system.declare(spec.name, type(spec.instance))
        await asyncio.gather(
            *(system.spawn(s.instance, name=s.name, node=s.node, policy=s.policy) for s in cluster.actors.values())
        )
        while True:
            try:
                async for update in system.find("controller").progress.stream():
                    self.state["rows"] += update.pop("rows")
                    self.state.update(update)
                    self._show(system, screen)
                    if update["done"]:
                        return dict(update["summary"])
            except ActorDied:
                self.state["rows"] = []

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
            if self.interrupts > 1:
                self.stop_now.set()
                return
            loop.call_later(DRAIN_S, self.stop_now.set)
            try:
                system.find("controller").drain.cast()
            except RuntimeFault:
                self.stop_now.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)

    def _write_summary(self, known: dict[str, Any], ok: bool, reason: str, restarts: dict[str, int]) -> None:
        from .actors.report import write_summary

        empty = {
            "steps": 0, "stages": {}, "evaluation": [], "samples": [], "staleness": {"mean": 0.0, "max": 0},
            "tokens": {"sampled": 0, "trained": 0}, "wall_s": time.time() - self.started,
        }  # fmt: skip
        self.summary = {
            **empty, **known, "ok": ok, "reason": reason, "run": self.job.run.name, "restarts": restarts,
            "peak_rss_bytes": self.peak_rss_bytes,
        }  # fmt: skip
        write_summary(self.dir.summary, self.summary)

    def _say_how_it_ended(self, finished: bool, reason: str) -> int:
        if finished:
            from .summary import final_report

            final_report(self.summary, self.dir.path)
            return 0
        where = f"{self.dir.path}/events.jsonl and {self.dir.path}/logs/ say more"
        if reason == "interrupted":
            print(f"stopped; go on with: bin/launch {self.dir.config} --resume", file=sys.stderr)
            return 130
        print(f"the run failed: {reason}\n{where}", file=sys.stderr)
        return 1


def _rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
