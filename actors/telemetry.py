"""What a run reports while it runs: rows of metrics.jsonl, totals of summary.json, updates for a screen.

Metric names and units: report.py. Knows nothing of how the numbers come about; the controller tells it what happened.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .evaluator import Evaluation
from .evaluator.actor import CANDIDATES
from .report import STAGES, MetricsWriter, Row, rewind_metrics
from .types import Group
from .verifier.metrics import COUNTS

UPDATE_S = 0.25
"""Shortest time between two updates of a screen."""

IDLE_S = 60.0
"""Longest time without an update, so that those who wait for one know that the run lives."""

STALENESS_BINS = 16

PRECISION = ("fp8_token_kl_nats", "precision_bits/")
"""Numbers of rollout that become metrics as they are."""


class Telemetry:
    """The reporting side of one run. `totals` are what `snapshot` gave at the checkpoint that is resumed."""

    def __init__(self, run: Path, stage: str, step: int, totals: dict[str, Any]) -> None:
        self.stage, self.num_steps = stage, 0
        self.note = ""
        self.rows: list[Row] = rewind_metrics(run / "metrics.jsonl", "rl" if stage == "done" else stage, step)
        self.evaluations: list[dict[str, Any]] = list(totals.get("evaluations", []))
        self.stages: dict[str, float] = {"sft": 0.0, "rl": 0.0, **totals.get("stages", {})}
        self.tokens: Counter[str] = Counter(totals.get("tokens", {}))
        self.staleness: Counter[int] = Counter(totals.get("staleness", {}))
        self._samples: dict[str, list[dict[str, Any]]] = dict(totals.get("samples", {}))
        self._writer = MetricsWriter(run / "metrics.jsonl", tensorboard=run / "tensorboard")
        self._before_s = float(totals.get("elapsed_s", 0.0))
        self._started = self._mark = self._stage_started = time.monotonic()
        self._waited_s = 0.0
        self._publish_s: float | None = None
        self._judged = [0, 0]
        self._rollout = {"tokens": 0.0, "steps": 0.0, "busy_s": 0.0}
        self._verifier: dict[str, float] = dict(totals.get("verifier", {}))
        self.verdicts: Counter[str] = Counter(totals.get("verdicts", {}))
        self._changed = asyncio.Event()
        self._reason: str | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken, earlier processes included."""
        return self._before_s + time.monotonic() - self._started

    def snapshot(self) -> dict[str, Any]:
        """Totals that a resumed run goes on from."""
        return {
            "elapsed_s": self.elapsed_s, "stages": self._stage_seconds(), "tokens": dict(self.tokens),
            "staleness": dict(self.staleness), "evaluations": self.evaluations, "samples": self._samples,
            "verifier": self._verifier, "verdicts": dict(self.verdicts),
        }  # fmt: skip

    def begin(self, num_steps: int) -> None:
        """A stage is under way and will have `num_steps`."""
        self.num_steps = num_steps
        self._mark = time.monotonic()
        self._notify()

    def say(self, note: str) -> None:
        """What goes on besides the steps, for people who watch."""
        self.note = note
        self._notify()

    def enter(self, stage: str) -> None:
        """The next stage begins."""
        self.stages = self._stage_seconds()
        self.stage = stage
        if stage != "done":
            self.stages.setdefault(stage, 0.0)
        self._stage_started = self._mark = time.monotonic()
        self._notify()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The trainer waits for its batch."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - begun

    def armed(self, publish_s: float) -> None:
        """Rollout holds the newest version, so many seconds after it was there."""
        self._publish_s = publish_s

    def judged(self, group: Group) -> None:
        """A group has its verdicts, whether it is trained or filtered."""
        self._judged[0] += sum(t.verdict is not None and t.verdict.correct for t in group.trajectories)
        self._judged[1] += len(group.trajectories)

    def sft_step(self, step: int, version: int, metrics: dict[str, float]) -> Row:
        """The row of some SFT steps that are done; `metrics` are the trainer's."""
        self.tokens["trained_sft"] += int(metrics.get("trained_tokens", 0))
        return self._row("sft", step, version, metrics)

    def stream_step(
        self, stage: str, step: int, version: int, metrics: dict[str, float], batch: list[Group], staleness: list[int],
        rollout: dict[str, Any], ledger: dict[str, int],
    ) -> Row:  # fmt: skip
        """The row of a step on the stream. `rollout`: its stats, {} if it could not be asked; `ledger`: its counts."""
        trajectories = [t for group in batch for t in group.trajectories]
        lengths = np.array([t.num_tokens for t in trajectories])
        wall_s = time.monotonic() - self._mark
        sampled, decoded, busy_s = self._since_last(rollout)
        if stage == "rl":
            self.staleness.update(staleness)
            self.tokens["trained"] += int(lengths.sum())
        self.tokens["sampled"] += int(sampled)
        correct, judged = self._judged
        self._judged = [0, 0]
        row = self._row(stage, step, version, {
            **metrics,
            "reward_mean": float(np.mean([t.reward for t in trajectories])),
            "pass_ratio": correct / max(1, judged),
            "truncated_ratio": float(np.mean([t.finish == "length" for t in trajectories])),
            "response_tokens_mean": float(lengths.mean()),
            "response_tokens_max": int(lengths.max()),
            "groups": len(batch),
            "responses": len(trajectories),
            "prompt_size_mean": float(np.mean([group.prompt.size for group in batch])),
            "staleness_mean": float(np.mean(staleness)),
            "staleness_max": int(max(staleness)),
            "on_policy_ratio": float(np.mean([lag == 0 for lag in staleness])),
            "partial_ratio": float(np.mean([len(t.segments) > 1 for t in trajectories])),
            "sampled_tokens": sampled,
            "sampled_tokens_per_s": sampled / wall_s,
            "decode_batch_mean": sampled / max(1.0, decoded),
            "rollout_idle_ratio": min(1.0, max(0.0, 1 - busy_s / wall_s)),
            **{name: value for name, value in rollout.items() if name.startswith(PRECISION)},
            "trainer_idle_ratio": min(1.0, self._waited_s / wall_s),
            "wait_s": self._waited_s,
            **({} if self._publish_s is None else {"publish_s": self._publish_s}),
            "pool_groups": ledger["pooled"],
            "running_groups": ledger["running"],
            "partial_groups": ledger["partial"],
            **{f"{end}_groups": ledger[end] for end in ("submitted", "accepted", "filtered", "failed")},
        })  # fmt: skip
        self._waited_s, self._publish_s = 0.0, None
        return row

    def verified(self, stats: dict[str, float]) -> Row:
        """What belongs into the row of a step of the verifier's `stats` (VerdictMetrics.snapshot), {} if it did not
        answer: totals go on over its restarts."""
        again = stats.get("since") == self._verifier.get("since")
        for name, now in stats.items():
            if name in COUNTS or name.startswith("errors/"):
                self.verdicts[name] += int(now - (self._verifier.get(name, 0) if again else 0))
        self._verifier = stats or self._verifier
        if not self._verifier:
            return {}
        outcomes = ("correct", "incorrect", "graded", "errors", "cache_hits")
        return {
            "verifier_verdicts": sum(self.verdicts[name] for name in outcomes),
            **{f"verifier_{name}": count for name, count in self.verdicts.items()},
            **{f"verifier_{name}": value for name, value in self._verifier.items() if name.startswith("latency_")},
        }

    def write(self, row: Row) -> None:
        """Puts a row into the files; what was learned since it was made may have been added."""
        self._writer.write(**row)

    def evaluated(self, step: int, evaluation: Evaluation) -> Row:
        """The newest version was scored on the fixed problems. Returns what belongs into the row of its step."""
        self.evaluations.append(
            {
                "stage": self.stage, "step": step, "version": evaluation.version, "n": evaluation.n,
                "pass_at_1": evaluation.pass_at_1, "greedy": evaluation.greedy,
                "by_size": {str(size): list(scores) for size, scores in evaluation.by_size.items()},
                "by_dataset": {name: list(scores) for name, scores in evaluation.by_dataset.items()},
            }
        )  # fmt: skip
        self._samples[self.stage] = [
            {"prompt": s.prompt, "solution": s.solution, "response": s.response, "correct": s.correct}
            for s in evaluation.samples
        ]
        self._notify()
        return {
            "eval_version": evaluation.version, "eval_pass_at_1": evaluation.pass_at_1, "eval_greedy": evaluation.greedy
        }  # fmt: skip

    def samples(self) -> list[dict[str, Any]]:
        """Greedy answers to the same problems after SFT and RL: of each CANDIDATES the first that SFT left wrong."""
        pairs = list(zip(self._samples.get("sft", []), self._samples.get("rl", []), strict=False))
        parts = [pairs[i : i + CANDIDATES] for i in range(0, len(pairs), CANDIDATES)]
        chosen = [next((pair for pair in part if not pair[0]["correct"]), part[0]) for part in parts]
        return [
            {
                "prompt": before["prompt"], "solution": before["solution"],
                "before": before["response"], "before_correct": before["correct"],
                "after": after["response"], "after_correct": after["correct"],
            }
            for before, after in chosen
        ]  # fmt: skip

    def finish(self, reason: str = "") -> None:
        """The run is over: at its end, drained, or given up for a `reason`."""
        self.stages = self._stage_seconds()
        self._reason = reason
        self._notify()

    def close(self) -> None:
        """Closes the files. May be called twice."""
        self._writer.close()

    def summary(self) -> dict[str, Any]:
        """What the controller knows of summary.json, as far as the run has come."""
        trained = sum(self.staleness.values())
        total = sum(staleness * count for staleness, count in self.staleness.items())
        return {
            "steps": max((row["step"] for row in self.rows if row["stage"] == "rl"), default=0),
            "stages": {stage: round(seconds, 2) for stage, seconds in self._stage_seconds().items()},
            "evaluation": list(self.evaluations),
            "samples": self.samples(),
            "staleness": {"mean": total / max(1, trained), "max": max(self.staleness, default=0)},
            "tokens": {"sampled": self.tokens["sampled"], "trained": self.tokens["trained"]},
            "wall_s": self.elapsed_s,
            "ok": self.stage == "done" and self._reason == "",
            "reason": self._reason or "",
        }

    async def updates(self) -> AsyncIterator[dict[str, Any]]:
        """What a screen needs, after each change but not more often than UPDATE_S. `rows` holds only new ones."""
        shown = 0
        while True:
            changed, done = self._changed, self._reason is not None
            yield {
                "stage": self.stage, "step": self.rows[-1]["step"] if self._in_stage() else 0, "steps": self.num_steps,
                "note": self.note, "rows": self.rows[shown:], "evaluations": list(self.evaluations),
                "staleness": [self.staleness[i] for i in range(1 + max(self.staleness, default=0))][:STALENESS_BINS],
                "elapsed_s": self.elapsed_s, "resumed_s": self._before_s,
                "summary": self.summary(), "done": done,
            }  # fmt: skip
            shown = len(self.rows)
            if done:
                return
            await asyncio.sleep(UPDATE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await changed.wait()

    def _in_stage(self) -> bool:
        return bool(self.rows) and self.rows[-1]["stage"] == self.stage

    def _row(self, stage: str, step: int, version: int, metrics: dict[str, float]) -> Row:
        """A row for `write`, on the screen from now on."""
        now = time.monotonic()
        step_s, self._mark = now - self._mark, now
        common = {"elapsed_s": self.elapsed_s, "version": version, "step_s": step_s}
        self.rows.append({"stage": stage, "step": step, **common, **metrics})
        self._notify()
        return self.rows[-1]

    def _stage_seconds(self) -> dict[str, float]:
        seconds = dict(self.stages)
        if self._reason is None and self.stage in seconds:
            seconds[self.stage] += time.monotonic() - self._stage_started
        return {stage: seconds[stage] for stage in STAGES if stage in seconds}

    def _since_last(self, rollout: dict[str, Any]) -> tuple[float, float, float]:
        """Tokens, decode steps and busy seconds since the previous step; a restarted worker counts from zero."""
        delta = {}
        for name, last in self._rollout.items():
            now = float(rollout.get(name, last))
            delta[name] = now - last if now >= last else now
            self._rollout[name] = now
        return delta["tokens"], delta["steps"], delta["busy_s"]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
