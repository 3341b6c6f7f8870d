"""What the algorithms learn: DAPO and VAPO on the default task, and VAPO without two of its parts.

dapo, vapo                    cluster.toml and bin/clusters/vapo.toml as they stand, with an evaluation every 20 steps
vapo_without_pretraining      the critic learns from the first RL step on (paper: 60 falls to 11)
vapo_without_decoupled_gae    one lambda of 0.95 for advantages and for the critic's targets (paper: to 33)

One run of each with one seed: curves to look at, no statistics. Figures are pass@1 at temperature 1 and greedy accuracy
on the fixed problems after the last step, with bars for the first two, and pass@1 after SFT (step 0) and every 20
steps. About 20 minutes on two quiet cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from headrace.actors.report import read_metrics
from headrace.benchmark import ROOT, Bar, BenchmarkError, Say
from headrace.runtime.rundir import read_summary

LEARNING_BARS = [
    Bar(f"{algorithm}_{score}_ratio", ">=", 0.85) for algorithm in ("dapo", "vapo") for score in ("pass_at_1", "greedy")
]

VARIANTS: dict[str, tuple[Path, list[str]]] = {
    "dapo": (ROOT / "cluster.toml", []),
    "vapo": (ROOT / "bin" / "clusters" / "vapo.toml", []),
    "vapo_without_pretraining": (ROOT / "bin" / "clusters" / "vapo.toml", ["algorithm.value_pretraining=0"]),
    "vapo_without_decoupled_gae": (
        ROOT / "bin" / "clusters" / "vapo.toml",
        ["algorithm.adaptive_alpha=0", "algorithm.lambda_policy=0.95", "algorithm.lambda_value=0.95"],
    ),
}
"""Cluster file and settings of each."""

CURVE_STEPS = 20
"""RL steps from one evaluation to the next."""
JOB_S = 3600.0
"""A job that takes longer is killed."""


def measure_learning(say: Say, *overrides: str) -> dict[str, float | None]:
    """All figures; None for those of a run that did not reach its end. `overrides` are settings of all runs."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-learning-"))
    figures: dict[str, float | None] = {bar.name: None for bar in LEARNING_BARS}
    for name, (cluster, settings) in VARIANTS.items():
        say(f"{name}: started")
        figures |= _figures(name, _launch(name, cluster, [*settings, *overrides], folder))
        say(f"{name}: pass@1 {figures[f'{name}_pass_at_1_ratio']:.3f}, greedy {figures[f'{name}_greedy_ratio']:.3f}")
    shutil.rmtree(folder)
    return figures


def _launch(name: str, cluster: Path, settings: list[str], folder: Path) -> Path:
    """Runs a job to its end; returns its directory. Raises BenchmarkError if it does not get there."""
    common = [f"run.name={name}", f"run.directory={folder}", f"evaluation.every={CURVE_STEPS}"]
    command = [sys.executable, "-P", "-m", "headrace", "launch", str(cluster), "--plain"]
    command += [part for setting in [*common, *settings] for part in ("--set", setting)]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, timeout=JOB_S, check=False,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
    if done.returncode:
        last = " / ".join(log.read_text().strip().splitlines()[-2:])
        raise BenchmarkError(f"{name} ended with exit code {done.returncode}, see {log}: {last}")
    return folder / name


def _figures(name: str, run: Path) -> dict[str, float | None]:
    """What a finished run says of itself."""
    scores = read_summary(run)["evaluation"]
    figures: dict[str, float | None] = {
        f"{name}_pass_at_1_ratio": scores[-1]["pass_at_1"],
        f"{name}_greedy_ratio": scores[-1]["greedy"],
    }
    for score in scores:
        step = 0 if score["stage"] == "sft" else score["step"]
        figures[f"{name}_step_{step}_pass_at_1_ratio"] = score["pass_at_1"]
    if pretraining := [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "value"]:
        last = pretraining[-5:]
        figures[f"{name}_pretrained_explained_variance"] = sum(r["explained_variance"] for r in last) / len(last)
    return figures
