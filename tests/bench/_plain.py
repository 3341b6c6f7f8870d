"""What two actors of a finished run do, as plain loops without any of what surrounds it: the yardsticks of job.py.

    python -P _plain.py decode RUN ROWS      steps of Decoder.step over ROWS sequences at a time
    python -P _plain.py train RUN            DAPO updates: forward, loss, backward, clip, AdamW

Prepares, prints "ready", then for each line of its input, a number of seconds, measures that long and prints tokens
per second as JSON. In between it uses no CPU. The work is the run's own: its last weights answer the prompts that would
have come next, in the sizes that its adaptation asks for. One thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from headrace.actors.algorithms import Batch, Objective
from headrace.actors.algorithms.advantages import standard_scores
from headrace.actors.algorithms.groups import has_signal
from headrace.actors.job import Job, load_job
from headrace.actors.model import checkpoint
from headrace.actors.model.decode import Decoder, KvCache
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.requests import Request
from headrace.actors.run_state import latest_checkpoint, load_state
from headrace.actors.trainer.batch import MicroBatch, collate, rated
from headrace.actors.trainer.optim import BETAS
from headrace.actors.trainer.packing import pack
from headrace.actors.types import Group, Prompt, Trajectory
from headrace.actors.verifier.rules import judge_running_sum

NUM_BATCHES = 4
"""Training batches that the train loop goes round."""
MAX_ROUNDS = 8
"""Rounds of sampling in search of groups with signal; what is then missing is filled up with groups without."""
SLICE_S = 0.25
"""Rates are medians over slices of this length or of one update, whichever is longer."""

Measure = Callable[[], tuple[int, float]]
"""Does a little work; returns its tokens and the seconds that count."""


@dataclass
class Work:
    """What a run left behind."""

    job: Job
    weights: dict[str, np.ndarray]
    groups: list[Group]
    """Answered and judged, in the order of their ordinals"""


def open_work(run: Path) -> Work:
    """Loads the newest checkpoint of `run` and samples its next groups."""
    job = load_job(run / "config.toml")
    folder = latest_checkpoint(run)
    assert folder is not None
    _, weights = checkpoint.load(folder)
    work = Work(job, weights, [])
    state, _ = load_state(run)
    questions = job.task.questions(job.run.seed)
    if state.adaptation:
        questions.load_state(state.adaptation)
    wanted = NUM_BATCHES * job.rl.groups_per_step
    for first in range(state.next_ordinal, state.next_ordinal + MAX_ROUNDS * wanted, wanted):
        work.groups += sample(job, weights, [questions.prompt(o) for o in range(first, first + wanted)])
        if sum(map(has_signal, work.groups)) >= wanted:
            break
    return work


def sample(job: Job, weights: dict[str, np.ndarray], prompts: list[Prompt]) -> list[Group]:
    """The model's own answers to these prompts, judged."""
    engine = Engine(
        job.model, weights, version=1, num_slots=128, max_prompt_tokens=job.task.max_prompt_tokens,
        max_new_tokens=job.rl.max_new_tokens, eos_id=job.task.eos_id, seed=job.run.seed,
    )  # fmt: skip
    members = list(range(job.rl.group_size))
    groups = [Group(prompt=prompt, trajectories=[Trajectory(member=m) for m in members]) for prompt in prompts]
    for key, prompt in enumerate(prompts):
        engine.submit(
            Request(
                key=key, ordinal=prompt.ordinal, prompt=prompt.tokens, members=members,
                max_new_tokens=job.rl.max_new_tokens, temperature=job.rl.temperature,
            )
        )  # fmt: skip
    while engine.num_live or engine.num_waiting:
        for chunk in engine.step():
            groups[chunk.key].trajectories[chunk.member].append(chunk)
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.verdict = judge_running_sum(trajectory.tokens(), group.prompt.answer)
            trajectory.reward = 1.0 if trajectory.verdict.correct else -1.0
    return groups


def decode_loop(work: Work, num_rows: int) -> Measure:
    """Feeds the groups' answers, token by token, to the decoder: as in a run, rows are at different positions, and one
    that ends is followed by the next. Only the decode steps are timed, not the prefill of those that follow."""
    answers = [(g.prompt.tokens, t.tokens()) for g in work.groups for t in g.trajectories if t.num_tokens > 1]
    sequences = np.zeros((len(answers), max(len(p) + len(a) for p, a in answers)), np.int64)
    for row, (prompt, answer) in zip(sequences, answers, strict=True):
        row[: len(prompt) + len(answer)] = np.concatenate([prompt, answer])
    begins = np.array([len(prompt) for prompt, _ in answers])
    ends = np.array([len(prompt) + len(answer) - 1 for prompt, answer in answers])  # the last token is not fed

    job = work.job
    cache = KvCache(job.model, num_slots=num_rows, max_len=job.task.max_prompt_tokens + job.rl.max_new_tokens)
    decoder = Decoder(job.model, work.weights)
    order = itertools.cycle(np.random.default_rng(0).permutation(len(answers)).tolist())
    held = np.zeros(num_rows, np.int64)
    at = np.zeros(num_rows, np.int64)

    def occupy(rows: np.ndarray, progress: np.ndarray) -> None:
        """Puts the next answers into `rows`, `progress` (0..1) of each already written."""
        held[rows] = [next(order) for _ in rows]
        at[rows] = begins[held[rows]] + (progress * (ends[held[rows]] - begins[held[rows]])).astype(np.int64)
        tokens = np.concatenate([sequences[s, :n] for s, n in zip(held[rows], at[rows], strict=True)])
        decoder.prefill(cache, torch.from_numpy(tokens), at[rows].tolist(), torch.from_numpy(rows))

    def measure() -> tuple[int, float]:
        tokens, positions = torch.from_numpy(sequences[held, at]), torch.from_numpy(at.copy())
        begun = time.perf_counter()
        decoder.step(cache, tokens, positions)
        seconds = time.perf_counter() - begun
        at[:] += 1
        if len(ended := np.flatnonzero(at == ends[held])):
            occupy(ended, np.zeros(len(ended)))
        return num_rows, seconds

    occupy(np.arange(num_rows), np.arange(num_rows) / num_rows)
    return measure


def train_loop(work: Work) -> Measure:
    """DAPO updates on batches that are packed beforehand. Muon, if a run uses it for RL, is left out."""
    job, rl, objective = work.job, work.job.rl, Objective()
    model = Qwen3Moe(job.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(work.weights[name]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rl.learning_rate, betas=BETAS, weight_decay=rl.weight_decay, fused=True
    )
    updates = itertools.cycle(list(_updates(work)))

    def loss_of(batch: MicroBatch, num_tokens: int, num_inputs: int) -> torch.Tensor:
        out = model(batch.tokens, batch.positions, batch.lengths)
        logits = model.logits(out.hidden[batch.rows]) / rl.temperature
        logprobs = torch.log_softmax(logits, -1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        ratio = (logprobs - batch.behaviour).exp()
        clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        loss = -torch.minimum(ratio * batch.target, clipped * batch.target).sum() / num_tokens
        aux_loss: torch.Tensor = rl.aux_weight * out.aux_loss * (len(batch.tokens) / num_inputs)
        return loss + aux_loss

    def measure() -> tuple[int, float]:
        batches = next(updates)
        num_tokens, num_inputs = sum(len(b.targets) for b in batches), sum(len(b.tokens) for b in batches)
        begun = time.perf_counter()
        for batch in batches:
            loss_of(batch, num_tokens, num_inputs).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rl.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return num_tokens, time.perf_counter() - begun

    return measure


def _updates(work: Work) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each optimizer update, in the composition that Learner.rl_step gives them."""
    rl = work.job.rl
    groups = sorted(work.groups, key=has_signal, reverse=True)[: NUM_BATCHES * rl.groups_per_step]
    for first in range(0, len(groups), rl.groups_per_step):
        batch = Batch(groups[first : first + rl.groups_per_step])
        parts_of = np.split(batch.rewards, np.cumsum(batch.group_sizes)[:-1])
        rows = rated(batch.groups, batch.spread(np.concatenate([standard_scores(rewards) for rewards in parts_of])))
        for part in np.array_split(np.arange(len(rows)), rl.mini_batches):
            samples = [sample for i in part for sample in rows[i]]
            parts = pack([s.num_inputs for s in samples], rl.micro_batch_tokens)
            yield [collate([samples[i] for i in indices]) for indices in parts]


def rate(measure: Measure, seconds: float) -> float:
    """Tokens per second: the median over slices."""
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        tokens, counted_s, slice_end = 0, 0.0, time.perf_counter() + SLICE_S
        while time.perf_counter() < slice_end:
            more_tokens, more_s = measure()
            tokens, counted_s = tokens + more_tokens, counted_s + more_s
        rates.append(tokens / counted_s)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["decode", "train"])
    parser.add_argument("run", type=Path)
    parser.add_argument("rows", type=int, nargs="?", default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = open_work(options.run)
    measure = decode_loop(work, options.rows) if options.loop == "decode" else train_loop(work)
    rate(measure, SLICE_S)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({"tokens_per_s": rate(measure, float(line))}), flush=True)


if __name__ == "__main__":
    main()
