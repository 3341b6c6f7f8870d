"""The rollout engine: against transformers, against bare decode steps, handing over, and with FP8 weights.

peers      384 responses with lengths p99/mean >= 2.5, greedy, on two threads: ours, transformers' generate in static
           batches (the better of two sizes), its continuous batching; useful tokens per second, medians of interleaved
           rounds; tokens and log-probabilities compared
decode     inside the rollout actor over bare decode steps, at 16, 64 and 256 responses, one thread; prompts of groups
           computed once; memory lost to paging; the longest step while new weights come
handover   128 responses go on in another process
fp8        the default job with FP8 rollout, and its token KL to full precision (--run for a finished one)
gpu        left out where there is none
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _engine_fp8 import FP8_BARS, measure_fp8
from _engine_work import make_work, save_model, tail

from headrace.benchmark import FOLDER, Bar, BenchmarkError, Figures, Say

EXAMPLE = "bin/bench engine --json engine.json"

BARS = [
    Bar("lengths_p99_over_mean_ratio", ">=", 2.5),
    Bar("over_static_batches_ratio", ">=", 2.5),
    Bar("over_continuous_batching_ratio", ">=", 4.0),
    Bar("greedy_equal_ratio", ">=", 1.0),
    Bar("logprob_difference_millionths", "<=", 100.0),
    Bar("decode_16_ratio", ">=", 0.85),
    Bar("decode_64_ratio", ">=", 0.85),
    Bar("decode_256_ratio", ">=", 0.85),
    Bar("kv_waste_ratio", "<=", 0.05),
    Bar("prompt_computed_ratio", "<=", 1.0),
    Bar("swap_delay_ratio", "<=", 1.0),
    Bar("handover_ms", "<=", 50.0),
    Bar("handover_equal_ratio", ">=", 1.0),
    *FP8_BARS,
]

PEERS = ("headrace", "static", "continuous")
SECTIONS = ("peers", "decode", "handover", "fp8")
SECTION_S = 900.0
"""A part that takes longer is killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="with each peer (default 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each peer (default 2)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="take this run of bin/clusters/fp8.toml for FP8")
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}"
    )


def measure(options: argparse.Namespace, say: Say) -> Figures:
    if options.rounds < 1:
        raise BenchmarkError(f"--rounds must be at least 1, got {options.rounds}")
    wanted = options.only or SECTIONS
    figures: dict[str, float | None] = dict.fromkeys(bar.name for bar in BARS)
    if "peers" in wanted:
        figures |= _peers(options.rounds, options.threads, say)
    if "decode" in wanted:
        say("decoding inside the actor and bare")
        figures |= _script("_engine_decode.py")
    if "handover" in wanted:
        say("128 responses go on in another process")
        figures |= _script("_engine_handover.py")
    if "fp8" in wanted:
        figures |= measure_fp8(say, options.run)
    if not torch.cuda.is_available():
        say("no GPU: the engine is not yet measured on one")
    return figures


def _peers(rounds: int, threads: int, say: Say) -> dict[str, float]:
    work = make_work()
    with tempfile.TemporaryDirectory() as folder:
        save_model(work, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in PEERS}
        processes = {}
        try:
            for name in PEERS:
                say(f"{name}: first pass")
                processes[name] = _start(name, folder, threads)
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}: all write {work.num_tokens} tokens")
                for name, process in processes.items():
                    seconds[name].append(_pass(name, process))
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
        compared = _script("_engine_peers.py", "compare", folder)
    rates = {name: work.num_tokens / statistics.median(values) for name, values in seconds.items()}
    return {
        "lengths_p99_over_mean_ratio": tail(work.lengths),
        "headrace_tokens_per_s": rates["headrace"],
        "static_batches_tokens_per_s": rates["static"],
        "continuous_batching_tokens_per_s": rates["continuous"],
        "over_static_batches_ratio": rates["headrace"] / rates["static"],
        "over_continuous_batching_ratio": rates["headrace"] / rates["continuous"],
        **compared,
    }


def _start(name: str, folder: str, threads: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", str(FOLDER / "_engine_peers.py"), name, folder, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise BenchmarkError(f"{name} ended with status {process.wait()} before it was ready; what it said is above")


def _pass(name: str, process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return float(json.loads(line)["seconds"])
    raise BenchmarkError(f"{name} ended with status {process.wait()}; what it said is above")


def _script(name: str, *arguments: str) -> dict[str, float]:
    """Runs a part in a process of its own; the last line it prints are its figures."""
    command = [sys.executable, "-P", str(FOLDER / name), *arguments]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=SECTION_S, check=True, env=_environment()
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{name} took longer than {SECTION_S:g} s") from None
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{name} ended with status {error.returncode}; what it said is above") from None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    """Without the current folder on the path, where transformers would find kernels; the parts find each other."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
