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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .following import Following
from .interrupts import uninterrupted
from .runtime.errors import RemoteError, RuntimeFault
from .runtime.toml import ConfigError

if TYPE_CHECKING:
    from .actors.job import Job
    from .runtime.rundir import RunDirectory
    from .runtime.system import System

DRAIN_S = 120.0
"""After Ctrl-C: time to finish the step and write the checkpoint."""

STOP_NOW_S = 1.0
"""After a second Ctrl-C: time to end in good order."""

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
    parser.add_argument("--attach", action="store_true", help="a prompt into the run, which goes on without it")
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
    with uninterrupted():  # Classes of the file's actors are imported, too.
        from .actors.job import load_job

        job = load_job(options.cluster, options.set)
    if options.check:
        print(job.describe())
        return 0
    if options.attach:
        from .attached import launch_attached

        return launch_attached(job.run.path, _without_attach(options))
    with job.open_run(resume=options.resume) as run:
        with uninterrupted():
            import uvloop

            from .runtime.process import GC_THRESHOLD

        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        return uvloop.run(_Launch(job, run, plain=options.plain or not sys.stdout.isatty()).run())


def _without_attach(options: argparse.Namespace) -> list[str]:
    """The arguments again."""
    settings = [argument for setting in options.set for argument in ("--set", setting)]
    return [options.cluster, *settings, *(["--resume"] if options.resume else [])]


class _Launch:
    """One run of `bin/launch`."""

    def __init__(self, job: Job, run: RunDirectory, *, plain: bool) -> None:
        self.job, self.dir, self.plain = job, run, plain
        self.interrupts = 0
        self.stop_now = asyncio.Event()

    async def run(self) -> int:
        """Starts, shows and stops the system; writes summary.json."""
        from .runtime.gang import with_ranks
        from .runtime.system import System
        from .screen import open_screen

        nodes = {name: settings.spec(name) for name, settings in with_ranks(self.job.cluster).nodes.items()}
        system = System(self.dir, nodes=nodes, seed=self.job.run.seed)
        with open_screen(plain=self.plain) as screen:

            def show() -> None:
                seen.state["actors"] = system.tree()
                seen.state["events"] = list(system.events.recent)
                screen.update(seen.state)

            seen = Following(system, self.job, self.dir, show)
            self._on_signals(system, seen)
            try:
                async with system:
                    try:
                        await self._follow(system, seen)
                    finally:
                        show()
            except RuntimeFault as error:
                seen.summary["reason"] = _first_line(error)
            except BrokenPipeError:
                seen.summary["reason"] = "nobody reads the output any more"
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return self._say_how_it_ended(seen.conclude("interrupted" if self.interrupts else ""))

    async def _follow(self, system: System, seen: Following) -> None:
        """Works until the run is over, the system has failed, or there was a second Ctrl-C."""
        watching = asyncio.create_task(seen.watch())
        work = asyncio.create_task(seen.run())
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
            for task in (work, watching, stopping):
                task.cancel()

    def _on_signals(self, system: System, seen: Following) -> None:
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            self.interrupts += 1
            if self.interrupts > 1 or not seen.state["rows"]:
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


def _first_line(error: BaseException) -> str:
    """What went wrong, without the traceback or log that may follow."""
    return str(error.args[0] if error.args else error).partition("\n")[0]
