"""Two doors: how long a console takes to its prompt, to a completion, to a stack; what consoles cost; embedding.

attach_s            from the start of `bin/attach` to its prompt, on a running default job; the environment is there
completion_s        from the Tab key to the name of an actor in the line, the first one of a console
stack_s             stack() of an actor that computes in Python and holds up its loop; stack_kept_interpreter_s: of one
                    in C code that never lets go of the interpreter
slowdown_ratio      tokens sampled per second of the default job: 1 - with 24 consoles attached / without; medians over
                    windows in the order without, with, with, without
console_cpu_ratio   processor time of these 24 consoles, as a share of one core
embed_*             see _embedding.py
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

from _attach_actors import Stuck
from _embedding import EMBEDDING_BARS, measure_embedding

from headrace.attach import is_living
from headrace.attach_link import Link
from headrace.benchmark import ROOT, Bar, BenchmarkError, Figures, Say
from headrace.runtime import NodeSpec, System

EXAMPLE = "bin/bench attach --pairs 2 --json attach.json"

BARS = [
    Bar("attach_s", "<=", 0.3),
    Bar("completion_s", "<=", 0.1),
    Bar("stack_s", "<=", 1.0),
    Bar("stack_kept_interpreter_s", "<=", 1.0),
    Bar("slowdown_ratio", "<=", 0.02),
    *EMBEDDING_BARS,
]

CONSOLES = 24
REPEATS = 7
JOB_S = 400.0
"""Time that a job may take until its rollout samples for RL."""
WINDOW_S = 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", type=int, default=8, metavar="N", help="pairs of windows for slowdown_ratio (default 8)"
    )


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures."""
    figures: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder, _job(Path(folder), say) as run:
        state = Path(folder) / "state"
        say(f"{REPEATS} consoles, one after the other")
        figures |= _prompts(run, state)
        say(f"{options.pairs} pairs of windows of {WINDOW_S:g} s, without and with {CONSOLES} consoles")
        figures |= _slowdown(run, state, options.pairs)
    say("stacks of actors that hang")
    figures |= asyncio.run(_stacks())
    say("a cluster inside a program, up and down")
    return figures | measure_embedding()


@contextmanager
def _job(folder: Path, say: Say) -> Iterator[Path]:
    """The default job, in RL, with more steps than are waited for."""
    say("the default job, until it samples for RL")
    command = [
        sys.executable, "-P", "-m", "headrace", "launch", str(ROOT / "cluster.toml"), "--plain",
        "--set", f"run.directory={folder}/runs", "--set", "rl.steps=100000", "--set", "sft.steps=60",
    ]  # fmt: skip
    run = folder / "runs" / "default"
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + JOB_S
        while not (run / "metrics.jsonl").exists() or '"stage":"rl"' not in (run / "metrics.jsonl").read_text():
            if time.monotonic() > end or job.poll() is not None:
                raise BenchmarkError(f"the job did not come to RL: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.2)
        assert is_living(run)
        yield run
    finally:
        job.terminate()
        try:
            job.wait(5.0)  # The first signal has it finish its step; the second one ends it at once.
        except subprocess.TimeoutExpired:
            job.terminate()
            job.wait(30.0)


def _prompts(run: Path, state: Path) -> dict[str, float]:
    console = _console_module()
    prompts, completions = [], []
    for _ in range(REPEATS):
        with console.Console([str(run)], state) as one:
            prompts.append(one.read_until(">>>") - one.began)
            one.write('find("train')
            time.sleep(0.3)
            begun = time.perf_counter()
            one.write("\t")
            completions.append(one.read_until("er") - begun)
    return {
        "attach_s": statistics.median(prompts), "completion_s": statistics.median(completions),
        "attach_worst_s": max(prompts), "completion_worst_s": max(completions),
    }  # fmt: skip


def _slowdown(run: Path, state: Path, pairs: int) -> dict[str, float]:
    console = _console_module()
    link = Link(run)
    rates: dict[bool, list[float]] = {False: [], True: []}
    spent: list[float] = []
    try:
        for number in range(pairs):
            for attached in (False, True) if number % 2 == 0 else (True, False):
                with ExitStack() as stack:
                    count = CONSOLES if attached else 0
                    some = [stack.enter_context(console.Console([str(run)], state)) for _ in range(count)]
                    for one in some:
                        one.read_until(">>>", seconds=60)
                    time.sleep(1.0)
                    before = sum(_cpu_s(one.process.pid) for one in some)
                    rates[attached].append(_rate(link))
                    if attached:
                        spent.append((sum(_cpu_s(one.process.pid) for one in some) - before) / WINDOW_S)
    finally:
        link.close()
    with_them, without = statistics.median(rates[True]), statistics.median(rates[False])
    return {
        "slowdown_ratio": 1 - with_them / without, "console_cpu_ratio": statistics.median(spent),
        "tokens_alone_per_s": without, "tokens_attached_per_s": with_them,
    }  # fmt: skip


def _rate(link: Link) -> float:
    """Tokens that rollout samples per second."""

    def sampled() -> tuple[float, float]:
        stats = link.ask("call", actor="rollout", method="stats", args=[], kwargs={})
        return float(stats["tokens"]), time.perf_counter()

    before, begun = sampled()
    time.sleep(WINDOW_S)
    after, ended = sampled()
    return (after - before) / (ended - begun)


async def _stacks() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        nodes = {"stuck": NodeSpec(name="stuck", hang_s=None)}
        run = Path(folder)
        async with System(run, nodes=nodes) as system:
            await system.spawn(Stuck(), name="stuck", node="stuck")
            link = await asyncio.to_thread(Link, run)
            figures = {}
            for name, method in (("stack_s", "compute"), ("stack_kept_interpreter_s", "keep_the_interpreter")):
                taken = []
                for _ in range(3):
                    working = asyncio.create_task(getattr(system.find("stuck"), method)(2.5))
                    await asyncio.sleep(0.5)
                    begun = time.perf_counter()
                    text = await asyncio.to_thread(link.ask, "stack", name="stuck")
                    taken.append(time.perf_counter() - begun)
                    if method not in text or working.done():
                        raise BenchmarkError(f"the stack of an actor that hangs does not show where: {text[-500:]}")
                    await working
                figures[name] = statistics.median(taken)
            await asyncio.to_thread(link.close)
    return figures


def _cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _console_module() -> ModuleType:
    """tests/console.py, which is no module of this folder."""
    spec = importlib.util.spec_from_file_location("console", Path(__file__).parents[1] / "console.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
