"""The FP8 policy of the rollout engine: a job that is sampled by it, how far it is from full precision, what it costs.

job     bin/clusters/fp8.toml as it stands (FP8 weights and activations, emulated; correction tis): pass@1 on the fixed
        problems, the largest token KL that its own watch saw, and the share of tokens whose weight met the bound
model   that job's trained model, its own answers to problems that it has not seen: token KL(fp8 || full) as the mean
        over response tokens, by the runner that rollout uses, in one pass for each form; weights alone, and with
        activations
cost    a forward pass of decode over 64 sequences in full precision and in FP8, in turns, and the time to make the FP8
        form of a version
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _plain import sample

from headrace.actors.job import Job, load_job
from headrace.actors.model import checkpoint
from headrace.actors.report import read_metrics
from headrace.actors.rollout.precision import Precision, Schedule
from headrace.actors.rollout.runner import Batch
from headrace.actors.rollout.scheduled import ScheduledRunner
from headrace.actors.run_state import latest_checkpoint
from headrace.benchmark import ROOT, Bar, BenchmarkError, Say
from headrace.runtime.rundir import read_summary

FP8_BARS = [
    Bar("fp8_kl_millinats", "<=", 2.0),
    Bar("fp8_weights_kl_millinats", "<=", 2.0),
    Bar("fp8_job_pass_at_1_ratio", ">=", 0.85),
    Bar("fp8_job_greedy_ratio", ">=", 0.85),
]

CLUSTER = ROOT / "bin" / "clusters" / "fp8.toml"
JOB_S = 1800.0
"""A job that takes longer is killed."""
UNSEEN = 10**9
"""Ordinal of the first problem that is asked: no run comes to it."""
NUM_GROUPS = 64
ROWS, CONTEXT, PAGE_TOKENS = 64, 64, 16
"""Of the pass that is timed."""
REPEATS = 15

Weights = dict[str, np.ndarray]


def measure_fp8(say: Say, run: Path | None = None) -> dict[str, float]:
    """All figures. `run`: a finished run of fp8.toml, in the place of a new one. Raises BenchmarkError if it fails."""
    torch.set_num_threads(1)
    if run is not None:
        return _figures(run, say)
    with tempfile.TemporaryDirectory(prefix="headrace-fp8-") as folder:
        say("the default job with an FP8 policy")
        return _figures(_launch(Path(folder)), say)


def _launch(folder: Path) -> Path:
    command = [sys.executable, "-P", "-m", "headrace", "launch", str(CLUSTER), "--plain"]
    command += ["--set", "run.name=fp8", "--set", f"run.directory={folder}"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_S, check=False, env=environment)
    if done.returncode:
        raise BenchmarkError(f"the job failed: {done.stdout[-300:]} {done.stderr[-300:]}")
    return folder / "fp8"


def _figures(run: Path, say: Say) -> dict[str, float]:
    folder = latest_checkpoint(run)
    if folder is None:
        raise BenchmarkError(f"{run} has no checkpoint; name the folder of a finished run")
    job = load_job(run / "config.toml")
    _, weights = checkpoint.load(folder)
    say("token KL of its model")
    figures = _of_job(run) | _of_model(job, weights)
    say("cost of the emulation")
    return figures | _cost(job, weights)


def _of_job(run: Path) -> dict[str, float]:
    scores = read_summary(run)["evaluation"]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "rl"]
    seen = [row["fp8_token_kl_nats"] for row in rows if "fp8_token_kl_nats" in row]
    return {
        "fp8_job_pass_at_1_ratio": scores[-1]["pass_at_1"],
        "fp8_job_greedy_ratio": scores[-1]["greedy"],
        "fp8_job_pass_at_1_after_sft_ratio": scores[0]["pass_at_1"],
        "fp8_job_largest_watched_kl_millinats": 1e3 * max(seen, default=float("nan")),
        "fp8_job_steps_in_fp8_ratio": statistics.mean(row.get("precision_bits/decode") == 8 for row in rows),
        "fp8_job_truncated_weight_ratio": statistics.mean(row.get("truncated_weight_ratio", 0.0) for row in rows),
    }


def _of_model(job: Job, weights: Weights) -> dict[str, float]:
    questions = job.task.questions(job.run.seed)
    groups = sample(job, weights, [questions.prompt(UNSEEN + i) for i in range(NUM_GROUPS)])
    answers = [(g.prompt.tokens, t.tokens()) for g in groups for t in g.trajectories if t.num_tokens]
    sequences = [np.concatenate(pair) for pair in answers]
    drawn = np.concatenate([np.arange(1, len(p) + len(a) + 1) >= len(p) for p, a in answers])
    drawn[np.cumsum([len(s) for s in sequences]) - 1] = False
    tokens = torch.from_numpy(np.concatenate([answer for _, answer in answers]).astype(np.int64)).unsqueeze(1)

    figures = {"fp8_tokens": float(len(tokens))}
    settings = {"fp8_weights": Precision(decode="fp8"), "fp8": Precision(decode="fp8", activations="fp8")}
    for name, precision in settings.items():
        runner = _runner(job, weights, precision)
        fp8, full = (runner.read(sequences, kind)[drawn].double().log_softmax(-1) for kind in ("fp8", "full"))
        moved = (fp8 - full).gather(1, tokens).abs()
        figures |= {
            f"{name}_kl_millinats": 1e3 * float((fp8.exp() * (fp8 - full)).sum(-1).mean()),
            f"{name}_logprob_moved_p99_nats": float(moved.quantile(0.99)),
            f"{name}_logprob_moved_max_nats": float(moved.max()),
        }
    return figures


def _cost(job: Job, weights: Weights) -> dict[str, float]:
    runner = _runner(job, weights, Precision(decode="fp8", activations="fp8"))
    pages = CONTEXT // PAGE_TOKENS
    batch = Batch(
        tokens=np.ones(ROWS, np.int64), positions=np.full(ROWS, CONTEXT - 1), counts=np.ones(ROWS, np.int64),
        tables=np.arange(ROWS * pages, dtype=np.int32).reshape(ROWS, pages), num_decode=ROWS, wanted=np.arange(ROWS),
    )  # fmt: skip
    weighed = _runner(job, weights, Precision(decode="fp8"))
    plain = _runner(job, weights, Precision())
    passes: dict[str, Callable[[], object]] = {
        "full": lambda: plain.run(batch), "fp8": lambda: runner.run(batch), "weights": lambda: weighed.run(batch),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(REPEATS):
        for name, run in passes.items():
            seconds[name].append(_timed(run))
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    return {
        "fp8_step_over_full_ratio": medians["fp8"] / medians["full"],
        "fp8_weights_step_over_full_ratio": medians["weights"] / medians["full"],
        "fp8_prepare_s": statistics.median(_timed(lambda: runner.prepare(weights)) for _ in range(3)),
    }


def _runner(job: Job, weights: Weights, precision: Precision) -> ScheduledRunner:
    pages = ROWS * CONTEXT // PAGE_TOKENS
    runner = ScheduledRunner(job.model, Schedule(precision), num_pages=pages, page_tokens=PAGE_TOKENS)
    runner.load(runner.prepare(weights))
    return runner


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
