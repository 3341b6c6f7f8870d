"""What a run says of itself: metrics.jsonl, summary.json, TensorBoard events, and the state that screens draw.

METRICS is the one place where a metric has its name, unit and meaning: writing another name is an error. `x/*` stands
for one metric of each puzzle, each kind of error. Suffixes are units: `_s` seconds, `_per_s` per second, `_ratio` a
share between 0 and 1, `_bytes`, `_nats`. Knows nothing of how the numbers come about, nor of how they are shown.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import orjson

from ..runtime.rundir import write_atomically

Row = dict[str, Any]
"""A line of metrics.jsonl: stage, step, and METRICS."""

STAGES = ("sft", "value", "rl")
"""In the order of a run."""


class Metric(NamedTuple):
    """Unit ("" = a plain number) and meaning."""

    unit: str
    text: str


METRICS: dict[str, Metric] = {
    # every stage
    "elapsed_s": Metric("s", "since the run began, earlier processes of a resumed run included"),
    "version": Metric("", "policy version after the step"),
    "loss": Metric("nats", "SFT: cross-entropy per token; RL: the objective of the step, lower is better"),
    "aux_loss": Metric("", "load-balancing loss of the router before its weight; 1 is even"),
    "grad_norm": Metric("", "norm of the gradient before clipping, mean over the step's updates"),
    "learning_rate": Metric("", "of the last update of the step"),
    "trained_tokens": Metric("tokens", "response tokens in the step's loss"),
    "trained_tokens_per_s": Metric("1/s", "trained tokens over the time that the trainer computed"),
    "step_s": Metric("s", "wall time since the previous step"),
    "train_s": Metric("s", "the trainer computed"),
    "expert_load": Metric("", "tokens of the busiest expert over the mean, worst layer"),
    # the balancer, if there is one: its virtual ranks, layers added up
    "rank_load_before": Metric("", "busiest rank over the mean, experts in order and no replicas; 1 is even"),
    "rank_load_after": Metric("", "the same, as placed when the step began, its pairs divided over replicas"),
    "expert_moves": Metric("", "experts copied to another rank before the next step"),
    # SFT
    "accuracy_ratio": Metric("0..1", "demonstration tokens that are the model's first choice"),
    "max_size": Metric("", "largest problem of the curriculum at this step"),
    # RL: what was trained
    "reward_mean": Metric("", "shaped reward of the trained responses"),
    "pass_ratio": Metric("0..1", "correct among all responses judged since the last step, filtered ones too"),
    "truncated_ratio": Metric("0..1", "trained responses that used up their token budget"),
    "response_tokens_mean": Metric("tokens", "length of the trained responses"),
    "response_tokens_max": Metric("tokens", "longest trained response"),
    "groups": Metric("", "groups trained in the step"),
    "responses": Metric("", "responses trained in the step"),
    "prompt_size_mean": Metric("", "size of the trained problems"),
    "entropy_nats": Metric("nats", "entropy of the policy per trained token"),
    "behaviour_kl_nats": Metric("nats", "KL estimate per token of the policies that sampled to the one that trains"),
    "ratio_max": Metric("", "largest importance ratio of a trained token"),
    "clip_ratio": Metric("0..1", "trained tokens whose gradient the clipping removed"),
    "truncated_weight_ratio": Metric("0..1", "trained tokens whose importance weight met its bound (correction tis)"),
    # RL: the stream
    "staleness_mean": Metric("versions", "trained version minus version of a group's oldest token"),
    "staleness_max": Metric("versions", "the same, worst group of the step"),
    "on_policy_ratio": Metric("0..1", "groups generated wholly by the newest version (completion ratio alpha)"),
    "partial_ratio": Metric("0..1", "responses of the step that cross versions"),
    "sampled_tokens": Metric("tokens", "tokens that rollout generated since the previous step"),
    "sampled_tokens_per_s": Metric("1/s", "sampled tokens over wall time"),
    "decode_batch_mean": Metric("responses", "live in a decode step of rollout, mean since the previous step"),
    "rollout_idle_ratio": Metric("0..1", "time that rollout had nothing to generate"),
    "trainer_idle_ratio": Metric("0..1", "time that the trainer waited for a batch"),
    "wait_s": Metric("s", "the trainer waited for its batch"),
    "publish_s": Metric("s", "from the end of the step until rollout held the new version"),
    "fp8_token_kl_nats": Metric("nats", "token KL(FP8 || full precision) of rollout's policy, as last measured"),
    "precision_bits/*": Metric("bits", "of a weight of attention and experts, by phase of rollout: 8 is FP8"),
    "pool_groups": Metric("groups", "finished and waiting in the sample pool"),
    "running_groups": Metric("groups", "being generated or judged"),
    "partial_groups": Metric("groups", "interrupted, to be continued"),
    "submitted_groups": Metric("groups", "since the run began: = running + partial + accepted + filtered + failed"),
    "accepted_groups": Metric("groups", "put into the pool since the run began"),
    "filtered_groups": Metric("groups", "without advantage (all right or all wrong) since the run began"),
    "failed_groups": Metric("groups", "given up since the run began"),
    # algorithms
    "skipped_updates": Metric("", "updates of the step that were not made, for their gradient was not finite"),
    "imitation_loss": Metric("nats", "negative log-likelihood of correct responses per token of the step (VAPO)"),
    # the critic, in its pretraining (stage "value") and in RL
    "value_loss": Metric("", "half the squared error of the values, mean over tokens, before the updates"),
    "value_mean": Metric("", "what the critic expects, mean over tokens"),
    "return_mean": Metric("", "what it shall expect, mean over tokens"),
    "explained_variance": Metric("", "1 - Var(return - value) / Var(return): 1 is a perfect critic, 0 knows the mean"),
    "critic_grad_norm": Metric("", "norm of its gradient before clipping, mean over the step's updates"),
    "critic_learning_rate": Metric("", "of its last update of the step"),
    "critic_skipped_updates": Metric("", "its updates that were not made, for their gradient was not finite"),
    "critic_train_s": Metric("s", "it computed its updates"),
    # RL: verdicts since the run began, less what a verifier judged between the last row and its death
    "verifier_verdicts": Metric("", "responses judged, in evaluations too; from the cache or not, errors included"),
    "verifier_correct": Metric("", "found right, not counting those from the cache"),
    "verifier_incorrect": Metric("", "found wrong, not counting those from the cache"),
    "verifier_graded": Metric("", "given a number, not counting those from the cache"),
    "verifier_out_of_tokens": Metric("", "of the wrong ones, those that had no end"),
    "verifier_past_limits": Metric("", "of the wrong ones, those that were too much for the process that judged them"),
    "verifier_cache_hits": Metric("", "verdicts from the cache"),
    "verifier_retries": Metric("", "attempts beyond the first"),
    "verifier_errors": Metric("", "no verdict: the response is left out"),
    "verifier_errors/*": Metric("", "of these, by kind: timeout, worker died, bad reference, ..."),
    "verifier_latency_p50_s": Metric("s", "of a verdict since the verifier's last start, cache and queue left out"),
    "verifier_latency_p90_s": Metric("s", "the same"),
    "verifier_latency_p99_s": Metric("s", "the same"),
    # RL: puzzles
    "puzzle_level/*": Metric("", "level at which the puzzle is asked now, 1..10"),
    "puzzle_pass_ratio/*": Metric("0..1", "correct among its responses judged since the last step"),
    # evaluation, in the row of the step that it follows
    "eval_version": Metric("", "policy version that was evaluated"),
    "eval_pass_at_1": Metric("0..1", "share of right answers at temperature 1 on the fixed set"),
    "eval_greedy": Metric("0..1", "share of right greedy answers on the fixed set"),
}

SUMMARY: dict[str, str] = {
    "ok": "whether the run reached its end",
    "reason": "why it did not; empty if it did",
    "run": "name of the run",
    "steps": "RL steps done",
    "wall_s": "seconds from the start of the first process, time between processes of a resumed run left out",
    "stages": "{stage: seconds}",
    "evaluation": "list of {stage, step, version, pass_at_1, greedy, n, by_size {size: [n, pass_at_1, greedy]}, "
    "by_dataset {name: the same}}",
    "samples": "list of {prompt, solution, before, after, before_correct, after_correct}: greedy answers",
    "restarts": "{actor: restarts}",
    "staleness": "{mean, max} over all trained groups, in versions",
    "tokens": "{sampled, trained}: response tokens",
    "peak_rss_bytes": "most resident memory of all processes together",
}
"""Keys of summary.json; all must be there."""


class EvaluationRecord(TypedDict):
    """Score of one policy on the fixed set."""

    stage: str
    step: int
    version: int
    pass_at_1: float
    greedy: float
    n: int
    by_size: dict[str, list[float]]
    """Size -> [n, pass_at_1, greedy]."""
    by_dataset: NotRequired[dict[str, list[float]]]
    """The same by data set."""


class SamplePair(TypedDict):
    """One problem of the fixed set, answered greedily before and after RL."""

    prompt: str
    solution: str
    """A faultless response."""
    before: str
    after: str
    before_correct: bool
    after_correct: bool


class ActorState(TypedDict, total=False):
    """One line of the actor tree."""

    name: str
    node: str
    state: str
    """starting, up, down or stopped"""
    pid: int
    restarts: int
    reason: str
    """Why it is down."""


class Progress(TypedDict, total=False):
    """What a screen draws. Any key may be missing."""

    run: str
    stage: str
    step: int
    """Steps of the stage that are done."""
    steps: int
    """Steps that the stage will have; 0 or missing = unknown."""
    elapsed_s: float
    resumed_s: float
    """What `elapsed_s` was as this process began: 0 unless the run was resumed."""
    note: str
    """What goes on besides, for example that the run drains after Ctrl-C."""
    rows: list[Row]
    """Lines of metrics.jsonl; those seen before may be left out or repeated."""
    evaluations: list[EvaluationRecord]
    """All so far."""
    staleness: list[int]
    """Trained groups by staleness 0, 1, 2, ..."""
    started: float
    """Unix seconds of the start; events are shown relative to it."""
    events: list[dict[str, Any]]
    """The last lines of events.jsonl, oldest first."""
    actors: list[ActorState]
    rss_bytes: int


class MetricsWriter:
    """Appends rows to metrics.jsonl, and to TensorBoard events in `tensorboard` if that package is installed."""

    def __init__(self, path: Path, *, tensorboard: Path | None = None) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._board = _Board(tensorboard) if tensorboard and importlib.util.find_spec("tensorboard") else None

    def write(self, stage: str, step: int, **values: float) -> Row:
        """Writes and returns {"stage", "step", **values}. Raises ValueError for a name that METRICS does not have."""
        if unknown := {name for name in values if _documented(name) not in METRICS}:
            raise ValueError(f"metric {min(unknown)!r} is not documented; add it to METRICS in {__name__}")
        row: Row = {"stage": stage, "step": step, **values}
        self._file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        if self._board is not None:
            self._board.write(stage, step, values)
        return row

    def close(self) -> None:
        """May be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None


def _documented(name: str) -> str:
    family, _, member = name.partition("/")
    return f"{family}/*" if member else name


def read_metrics(path: Path) -> list[Row]:
    """The rows of metrics.jsonl; none if there is no such file. A half-written last line is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [orjson.loads(line) for line in whole.splitlines()]


def rewind_metrics(path: Path, stage: str, step: int) -> list[Row]:
    """Drops the rows after `step` of `stage`, which a resumed run writes again; returns the others."""
    last = (STAGES.index(stage), step)
    rows = [row for row in read_metrics(path) if (STAGES.index(row["stage"]), row["step"]) <= last]
    write_atomically(path, b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return rows


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json whole or not at all. Raises ValueError unless it has exactly the keys of SUMMARY."""
    if wrong := summary.keys() ^ SUMMARY.keys():
        raise ValueError(f"summary key {min(wrong)!r} is missing or unknown; the keys are {', '.join(SUMMARY)}")
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    write_atomically(path, orjson.dumps({key: summary[key] for key in SUMMARY}, option=options))


class _Board:
    """TensorBoard events by its own writer: torch's would load torch, which the root process does without."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=f"{stage}/{name}", simple_value=float(v)) for name, v in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def close(self) -> None:
        self._writer.close()
