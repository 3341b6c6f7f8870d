"""FP8 by searched scales: the cast to the bit, the error of a layer, and a trained model's next tokens and routes.

cast     every finite bf16 number and scale 1, against the dtype of ml_dtypes after clamping.
layers   error on held-out inputs over that of scales by row amax, for layers with outliers: the worst of all fixtures
         and seeds, by the search at each sync and with error feedback. Only weights are FP8.
model    the default job's model after SFT and some RL steps (--rl-steps), or that of a finished run (--run): KL(bf16 ||
         fp8) of the next token and shared expert choices, over answers of its own to other problems than those that
         moments were taken from. KL is over response tokens: what a prompt goes on with is nothing that was learned.
         Experts and attention are FP8; router, embedding and output layer bf16. `w8a8`: inputs, too, by 1x128 groups.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _fp8_layers import FIXTURES, error_ratio, make
from _fp8_model import Moments, Policy, by_amax, by_feedback, by_search, divergence, router_agreement, run
from _plain import sample
from torch import Tensor

from headrace.actors.job import Job, load_job
from headrace.actors.model import checkpoint
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.run_state import latest_checkpoint
from headrace.benchmark import ROOT, Bar, BenchmarkError, Figures, Say
from headrace.kernels.precision import fp8_quant

EXAMPLE = "bin/bench fp8 --run runs/default --json fp8.json"

BARS = [
    Bar("cast_equal_ratio", ">=", 1.0),
    Bar("layer_error_search_ratio", "<=", 0.85),
    Bar("layer_error_feedback_ratio", "<=", 0.75),
    Bar("model_kl_millinats", "<=", 2.0),
    Bar("model_w8a8_kl_millinats", "<=", 2.0),
    Bar("router_agreement_ratio", ">=", 0.97),
    Bar("router_agreement_w8a8_ratio", ">=", 0.97),
]

UNSEEN = 10**9
"""Ordinal of the first prompt that is answered: no run comes to it."""
JOB_S = 1800.0
"""A job that takes longer is killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="DIR", help="take the model of this run, instead of training one")
    parser.add_argument("--rl-steps", type=int, default=40, metavar="N", help="of the job that is trained (default 40)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="of that job, as in bin/launch"
    )
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="layers of each kind (default 4)")
    parser.add_argument(
        "--sequences", type=int, default=1024, metavar="N", help="answers, half held out (default 1024)"
    )


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures. Raises BenchmarkError if the job fails, or the run has no checkpoint."""
    figures: dict[str, float] = {"cast_equal_ratio": cast_equal_ratio()}
    say("layers")
    figures |= layer_figures(options.seeds)
    if options.run is not None:
        return figures | _model_figures(options.run, options.sequences, say)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        return figures | _model_figures(_train(Path(folder), options, say), options.sequences, say)


def cast_equal_ratio() -> float:
    """Share of the finite bf16 numbers whose code is that of ml_dtypes. Raises BenchmarkError without that package."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise BenchmarkError(
            "the yardstick of the cast, ml_dtypes, is not installed; install headrace[test]"
        ) from error
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    found = fp8_quant(numbers.reshape(-1, 1).contiguous(), "row", scales=torch.ones(len(numbers), 1)).codes_RC
    clamped = np.clip(numbers.float().numpy(), -448, 448)
    wanted = clamped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return float((found.view(torch.uint8).reshape(-1).numpy() == wanted).mean())


def layer_figures(seeds: int) -> dict[str, float]:
    """Errors over those of row amax: the worst, and the mean."""
    ratios: dict[str, list[float]] = {"search": [], "feedback": []}
    for fixture in FIXTURES:
        for seed in range(seeds):
            layer = make(fixture, seed)
            plain = by_amax(layer.weight, layer.moments())
            for name, quantizer in (("search", by_search), ("feedback", by_feedback)):
                ratios[name].append(error_ratio(layer, quantizer, plain))
    worst = {f"layer_error_{name}_ratio": max(values) for name, values in ratios.items()}
    return worst | {f"layer_error_{name}_mean_ratio": statistics.mean(values) for name, values in ratios.items()}


def _train(folder: Path, options: argparse.Namespace, say: Say) -> Path:
    say(f"the default job, {options.rl_steps} RL steps")
    command = [sys.executable, "-P", "-m", "headrace", "launch", str(ROOT / "cluster.toml"), "--plain"]
    sets = ["run.name=model", f"run.directory={folder}", f"rl.steps={options.rl_steps}", "evaluation.num_problems=64"]
    command += [part for override in [*sets, *options.set] for part in ("--set", override)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_S, check=False)
    if done.returncode:
        raise BenchmarkError(f"the job failed: {done.stdout[-300:]} {done.stderr[-300:]}")
    return folder / "model"


def _model_figures(path: Path, num_sequences: int, say: Say) -> dict[str, float]:
    folder = latest_checkpoint(path) if (path / "config.toml").exists() else None
    if folder is None:
        raise BenchmarkError(f"{path} has no checkpoint; name the folder of a run")
    torch.set_num_threads(1)
    job = load_job(path / "config.toml")
    _, weights = checkpoint.load(folder)
    model = Qwen3Moe(job.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    sequences, answers = _sequences(job, weights, num_sequences)
    half = len(sequences) // 2
    held_out, answer = sequences[half:], torch.cat(answers[half:])
    layers, k = job.model.num_layers, job.model.num_experts_per_tok
    observed = Moments(layers)
    run(model, sequences[:half], observed)
    moments = observed.means()
    exact = Policy(layers)
    wanted = run(model, held_out, exact)[answer]

    figures: dict[str, float] = {"model_tokens": float(len(wanted))}
    for fp8_inputs in (False, True):
        for name, quantizer in (("", by_search), ("_feedback", by_feedback), ("_amax", by_amax)):
            what = f"{'_w8a8' if fp8_inputs else ''}{name}"
            say(f"model{what.replace('_', ' ')}")
            policy = Policy(layers, quantizer, moments, fp8_inputs=fp8_inputs)
            found = run(model, held_out, policy)[answer]
            figures[f"model{what}_kl_millinats"] = 1e3 * float(divergence(wanted, found).mean())
            figures[f"router_agreement{what}_ratio"] = router_agreement(exact.router, policy.router, k)
    return figures


def _sequences(job: Job, weights: dict[str, np.ndarray], num: int) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts that the run has not seen, with their answers; and which tokens are followed by one of the answer."""
    questions = job.task.questions(job.run.seed)
    num_groups = -(-num // job.rl.group_size)
    groups = sample(job, weights, [questions.prompt(UNSEEN + i) for i in range(num_groups)])
    sequences, answers = [], []
    for prompt, answer in ((g.prompt.tokens, t.tokens()) for g in groups for t in g.trajectories if t.num_tokens):
        sequences.append(torch.from_numpy(np.concatenate([prompt, answer])).long())
        at = torch.arange(len(sequences[-1]))
        answers.append((at >= len(prompt) - 1) & (at < len(at) - 1))
    return sequences, answers
