"""The default job as a user starts it: what it learns, what it takes, and how near its actors come to plain loops.

For each seed one `headrace launch cluster.toml`, timed from the start of its process to its end. Figures without a seed
in their name are over all seeds: the worst of what was learned and of what it took, the median of the others.

sampler_ratio   tokens per second of the rollout worker while it has something to generate, prefill, sampling and
                bookkeeping included, over bare decode steps of the same weights with as many live sequences of the
                same lengths.
trainer_ratio   response tokens per second of the trainer's steps over forward, loss, backward and AdamW alone, on
                batches of the same composition.

Both are measured right after each job (see _plain.py), each with the other in a second process: on two cores, rollout
and trainer have a busy neighbour too, that slows memory and caches, and these are the ratios with a bar.
`sampler_to_idle_ratio` and `trainer_to_idle_ratio` compare with the plain loop that has the machine to itself.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from headrace.actors.job import Job, load_job
from headrace.actors.report import Row, read_metrics
from headrace.actors.run_state import latest_checkpoint
from headrace.actors.types import Group, Segment, Trajectory
from headrace.actors.verifier import RuleVerifier
from headrace.benchmark import ROOT, Bar, BenchmarkError, Figures, Say
from headrace.runtime.rundir import read_summary

EXAMPLE = "bin/bench job --seeds 1 --set rl.steps=20 --json job.json"

BARS = [
    Bar("finished_ratio", ">=", 1.0),
    Bar("pass_at_1_after_rl_ratio", ">=", 0.85),
    Bar("greedy_after_rl_ratio", ">=", 0.85),
    Bar("pass_at_1_gain_ratio", ">=", 0.35),
    Bar("greedy_gain_ratio", ">=", 0.35),
    Bar("job_wall_s", "<=", 300.0),
    Bar("first_rollout_s", "<=", 15.0),
    Bar("peak_rss_bytes", "<=", 3 * 2**30),
    Bar("sampler_ratio", ">=", 0.8),
    Bar("trainer_ratio", ">=", 0.85),
    Bar("sft_repeat_equal", ">=", 1),
    Bar("check_s", "<=", 1.5),
    Bar("actor_up_s", "<=", 0.5),
]

WORST: dict[str, Callable[[Sequence[float]], float]] = {
    "pass_at_1_after_rl_ratio": min,
    "greedy_after_rl_ratio": min,
    "pass_at_1_gain_ratio": min,
    "greedy_gain_ratio": min,
    "job_wall_s": max,
    "first_rollout_s": max,
    "peak_rss_bytes": max,
    "staleness_max": max,
    "restarts": max,
}
"""How the figures of several seeds become one; all others by their median."""

JOB_S = 1800.0
"""A job that takes longer is killed."""
REPEATS = 5
"""Of what takes a moment: `check_s`, `actor_up_s`."""
SKIPPED_ROWS = 3
"""First RL steps, in which the stream fills. Of the others the second half counts: the plain loops have its lengths."""
REPEATED_STEPS = 20
"""SFT steps of the two runs that are compared bit for bit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs seeds 0..N-1 (default 3)")
    parser.add_argument("--cluster", default=str(ROOT / "cluster.toml"), help="cluster file (default: cluster.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="as in bin/launch")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="measure each plain loop for S (default 5)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the runs there (default: only failed ones are kept)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures, the barred ones first. Raises ConfigError if the job is not valid."""
    job = load_job(options.cluster, options.set)
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="headrace-bench-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(options.cluster, options.set, options.seconds, folder, say)
    seeds = [bench.seed(seed) for seed in range(options.seeds)]
    say("two short warm-ups with the same seed")
    figures = _over_seeds(seeds)
    figures["sft_repeat_equal"] = bench.sft_repeat_equal()
    say(f"--check and a new actor, {REPEATS} times each")
    figures["check_s"] = bench.check_s()
    figures["actor_up_s"] = actor_up_s(job)
    if options.keep is None and not bench.failed:
        shutil.rmtree(folder)
    for seed, own in enumerate(seeds if len(seeds) > 1 else ()):
        figures |= {f"seed_{seed}_{name}": value for name, value in own.items()}
    return {name: figures.get(name) for name in dict.fromkeys([*(bar.name for bar in BARS), *figures])}


@dataclass
class _Run:
    """A job that has ended."""

    path: Path
    ok: bool
    began: float
    """Unix seconds"""
    wall_s: float


class _Bench:
    """Starts the jobs of one call of this benchmark, in `folder`."""

    def __init__(self, cluster: str, overrides: Sequence[str], plain_s: float, folder: Path, say: Say) -> None:
        self.cluster, self.overrides, self.plain_s = cluster, overrides, plain_s
        self.folder, self.say = folder, say
        self.failed = False

    def seed(self, seed: int) -> dict[str, float]:
        """Figures of one job, those that it came to."""
        run = self.launch(f"seed-{seed}", f"run.seed={seed}", tell=True)
        if not run.ok:
            return {"finished_ratio": 0.0}
        self.say(f"seed-{seed}: finished in {run.wall_s:.0f} s; now plain loops over its work")
        figures = {"finished_ratio": 1.0, **_outcome(run)}
        if rows := late_rows(run.path):
            figures |= _rates(rows, plain_rates(run.path, _median(rows, "decode_batch_mean"), self.plain_s))
        return figures

    def launch(self, name: str, *overrides: str, tell: bool = False) -> _Run:
        """Runs a job to its end. With `tell`, what it says of its stages is passed on."""
        sets = [*self.overrides, *overrides, f"run.name={name}", f"run.directory={self.folder}"]
        command = [sys.executable, "-P", "-m", "headrace", "launch", self.cluster, "--plain"]
        command += [part for override in sets for part in ("--set", override)]
        log = self.folder / f"{name}.log"
        if tell:
            self.say(f"{name}: started")
        began, started = time.time(), time.perf_counter()
        with (
            log.open("w") as output,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        ):
            watchdog = threading.Timer(JOB_S, process.kill)
            watchdog.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    output.write(line)
                    if tell and ("evaluation after" in line or ": exit" in line):
                        self.say(f"{name}: {' '.join(line.split())}")
                code = process.wait()
            finally:
                watchdog.cancel()
                process.kill()  # Does nothing once it has ended; its nodes die with it.
        run = _Run(self.folder / name, code == 0, began, time.perf_counter() - started)
        if not run.ok:
            self.failed = True
            self.say(f"{name}: failed with exit code {code}, see {log}: {_last_lines(log)}")
        return run

    def sft_repeat_equal(self) -> int | None:
        """Whether the same seed gives the same weights after a few SFT steps, bit for bit: 1 or 0."""
        short = (f"sft.steps={REPEATED_STEPS}", "rl.steps=0", "evaluation.num_problems=16")
        runs = [self.launch(f"repeat-{which}", *short) for which in "ab"]
        if not all(run.ok for run in runs):
            return None
        first, second = (_checkpoint(run.path) / "model.safetensors" for run in runs)
        return int(filecmp.cmp(first, second, shallow=False))

    def check_s(self) -> float:
        """`bin/launch --check` from start to end. Raises BenchmarkError if it fails."""
        command = [sys.executable, str(ROOT / "bin" / "launch"), self.cluster, "--check"]
        command += [part for override in self.overrides for part in ("--set", override)]
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            times.append(time.perf_counter() - started)
            if result.returncode:
                raise BenchmarkError(f"{' '.join(command)} failed: {result.stderr.strip()}")
        return statistics.median(times)


def late_rows(run: Path) -> list[Row]:
    """The RL rows that rates are taken from."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "rl"][SKIPPED_ROWS:]
    return rows[len(rows) // 2 :]


def plain_rates(run: Path, rows: float, seconds: float) -> dict[str, float]:
    """Tokens per second of the plain loops over the work of `run`: side by side, and each alone, for `seconds` each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    script = [sys.executable, "-P", str(Path(__file__).with_name("_plain.py"))]
    loops = {"decode": ["decode", str(run), str(max(1, round(rows)))], "train": ["train", str(run)]}
    with ExitStack() as stack:
        processes = {}
        for loop, arguments in loops.items():
            process = subprocess.Popen(
                [*script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            processes[loop] = stack.enter_context(process)
            stack.callback(process.kill)
        for process in processes.values():
            _read(process)
        rates = {}
        for together in (["decode", "train"], ["decode"], ["train"]):
            for loop in together:
                _write(processes[loop], f"{seconds}\n")
            for loop in together:
                where = "shared" if len(together) > 1 else "alone"
                rates[f"{loop}_{where}"] = float(json.loads(_read(processes[loop]))["tokens_per_s"])
    return rates


def actor_up_s(job: Job) -> float:
    """From asking for an actor that needs no torch, in a process of its own, to its first answer."""
    import uvloop

    from headrace.runtime.system import System

    (prompt,) = job.task.evaluation_set(0, 1)
    tokens = job.task.solve(prompt)
    segment = Segment(version=0, tokens=tokens, logprobs=0.0 * tokens.astype("float32"))
    group = Group(prompt=prompt, trajectories=[Trajectory(member=0, segments=[segment], finish="stop")])

    async def spawn_all() -> list[float]:
        times = []
        async with System() as system:
            for i in range(REPEATS):
                started = time.perf_counter()
                verifier = await system.spawn(RuleVerifier(), name=f"verifier/{i}", node=f"verifier{i}")
                (verdict,) = await verifier.judge(group)
                times.append(time.perf_counter() - started)
                assert verdict.correct
        return times

    return statistics.median(uvloop.run(spawn_all()))


def _outcome(run: _Run) -> dict[str, float]:
    """What a finished run says of itself."""
    summary, events = read_summary(run.path), map(json.loads, (run.path / "events.jsonl").open())
    first_rollout = next(event["time"] for event in events if event["event"] == "first_rollout")
    figures: dict[str, float] = {}
    score = {evaluation["stage"]: evaluation for evaluation in summary["evaluation"]}
    for measure in ("pass_at_1", "greedy"):
        for stage in score:
            figures[f"{measure}_after_{stage}_ratio"] = score[stage][measure]
        if len(score) == 2:
            figures[f"{measure}_gain_ratio"] = score["rl"][measure] - score["sft"][measure]
    return {
        **figures,
        "job_wall_s": run.wall_s,
        "first_rollout_s": first_rollout - run.began,
        "peak_rss_bytes": summary["peak_rss_bytes"],
        **{f"{stage}_s": seconds for stage, seconds in summary["stages"].items()},
        "staleness_mean": summary["staleness"]["mean"],
        "staleness_max": summary["staleness"]["max"],
        "restarts": sum(summary["restarts"].values()),
        "sampled_tokens": summary["tokens"]["sampled"],
        "trained_tokens": summary["tokens"]["trained"],
    }


def _rates(rows: Sequence[Row], plain: dict[str, float]) -> dict[str, float]:
    """Of the actors in the job, and how they compare."""
    busy = [row for row in rows if row["sampled_tokens"]]
    sampler = statistics.median(r["sampled_tokens"] / (r["step_s"] * (1 - r["rollout_idle_ratio"])) for r in busy)
    trainer = _median(rows, "trained_tokens_per_s")
    return {
        "sampler_ratio": sampler / plain["decode_shared"],
        "trainer_ratio": trainer / plain["train_shared"],
        "sampler_to_idle_ratio": sampler / plain["decode_alone"],
        "trainer_to_idle_ratio": trainer / plain["train_alone"],
        "sampler_tokens_per_s": sampler,
        "trainer_tokens_per_s": trainer,
        **{f"plain_{name}_tokens_per_s": value for name, value in plain.items()},
        "decode_batch_mean": _median(rows, "decode_batch_mean"),
        "step_s": _median(rows, "step_s"),
        "rollout_idle_ratio": _median(rows, "rollout_idle_ratio"),
        "trainer_idle_ratio": _median(rows, "trainer_idle_ratio"),
    }


def _over_seeds(seeds: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """One figure of each kind. None if a seed lacks it."""
    names = dict.fromkeys(name for seed in seeds for name in seed)
    return {
        name: WORST.get(name, statistics.median)([seed[name] for seed in seeds])
        if all(name in seed for seed in seeds)
        else None
        for name in names
    }


def _median(rows: Sequence[Row], name: str) -> float:
    return float(statistics.median(row[name] for row in rows))


def _checkpoint(run: Path) -> Path:
    folder = latest_checkpoint(run)
    assert folder is not None, f"{run} has finished without a checkpoint"
    return folder


def _last_lines(log: Path) -> str:
    return " / ".join(log.read_text().strip().splitlines()[-2:])


def _write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchmarkError(f"{' '.join(map(str, process.args))} ended early; run it by hand to see why")  # type: ignore[arg-type]
    return line
