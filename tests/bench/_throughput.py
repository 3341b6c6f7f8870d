"""Tokens per second of one trainer process: beside a plain torch loop, and packed beside padded. One thread.

The plain loop has the same model and the same tokens without padding: its batches are laid out beforehand, and a step
is forward, loss, backward, clipping, fused AdamW. It checks nothing, counts nothing and keeps no metrics. The padded
loop is the plain one with every sequence of a micro-batch as long as the longest of it, as many of them as fit the same
number of tokens; it skips the logits of padding. Turn by turn in one run; a ratio is one of medians.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from headrace.actors.algorithms.updates import Objective, PolicyUpdate
from headrace.actors.job import load_job
from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.trainer.batch import MicroBatch, Sample, collate, rated
from headrace.actors.trainer.learner import Learner
from headrace.actors.trainer.optim import BETAS
from headrace.actors.trainer.packing import pack
from headrace.actors.trainer.settings import RlSettings
from headrace.actors.types import Group, Prompt, Segment, Trajectory, Verdict
from headrace.benchmark import Bar, Say

THROUGHPUT_BARS = [
    Bar("trainer_over_plain_loop_ratio", ">=", 0.9),
    Bar("packed_over_padded_ratio", ">=", 2.0),
]

CLUSTER = Path(__file__).parents[2] / "cluster.toml"
STEPS = 4
"""Batches that each loop goes round."""
TAIL_POSITIONS = 1024
TAIL_TOKENS = 8192
"""Of a micro-batch of the long-tailed lengths."""


def measure_throughput(rounds: int, say: Say) -> dict[str, float]:
    """All figures of this file."""
    torch.set_num_threads(1)
    job = load_job(CLUSTER)
    model, rl = job.model, replace(job.rl, warmup_steps=1)
    updates = [_update(seed, rl, job.task.vocab_size, job.task.max_prompt_tokens) for seed in range(STEPS)]
    samples = [[s for group in rated(u.groups, u.advantages) for s in group] for u in updates]
    figures = _beside_plain(model, rl, updates, samples, rounds)
    say("beside the plain loop: done, packed beside padded: started")
    return figures | _packed_beside_padded(replace(model, max_positions=TAIL_POSITIONS), rl, rounds)


def _beside_plain(
    model: ModelConfig, rl: RlSettings, updates: list[PolicyUpdate], samples: list[list[Sample]], rounds: int
) -> dict[str, float]:
    learner = Learner(model, load_job(CLUSTER).sft, rl, seed=0)
    cycle = itertools.cycle(updates)

    def ours() -> None:
        learner.rl_step(next(cycle))

    packed = [[collate([s[i] for i in part]) for part in _parts(s, rl.micro_batch_tokens)] for s in samples]
    plain = _loop(Qwen3Moe(model, seed=0), rl, itertools.cycle(packed))
    tokens = sum(len(sample.response) for s in samples for sample in s) / len(samples)
    times = _turns({"ours": ours, "plain": plain}, rounds)
    return {
        "trainer_tokens_per_s": tokens / times["ours"],
        "plain_loop_tokens_per_s": tokens / times["plain"],
        "trainer_over_plain_loop_ratio": times["plain"] / times["ours"],
    }


def _packed_beside_padded(model: ModelConfig, rl: RlSettings, rounds: int) -> dict[str, float]:
    """Lengths with a long tail: exp(N(4, 1)), from 16 to the model's positions."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(4.0, 1.0, 256)), 16, TAIL_POSITIONS).astype(int)
    samples = [_sample(random, int(length), model.vocab_size) for length in lengths]
    packed = [collate([samples[i] for i in part]) for part in _parts(samples, TAIL_TOKENS)]
    padded = [_pad([samples[i] for i in part]) for part in _padded_parts(samples, TAIL_TOKENS)]
    times = _turns(
        {
            "packed": _loop(Qwen3Moe(model, seed=0), rl, itertools.cycle([packed])),
            "padded": _loop(Qwen3Moe(model, seed=0), rl, itertools.cycle([padded])),
        },
        max(2, rounds // 4),
    )
    tokens = sum(len(s.response) for s in samples)
    return {
        "packed_tokens_per_s": tokens / times["packed"],
        "padded_tokens_per_s": tokens / times["padded"],
        "packed_over_padded_ratio": times["padded"] / times["packed"],
        "padding_share_ratio": float(1 - sum(s.num_inputs for s in samples) / sum(len(b.tokens) for b in padded)),
    }


def _turns(loops: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each."""
    times = defaultdict(list)
    for turn in range(rounds + 1):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def _loop(model: Qwen3Moe, rl: RlSettings, updates: Iterator[Sequence[MicroBatch]]) -> Callable[[], None]:
    objective = Objective()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rl.learning_rate, betas=BETAS, weight_decay=rl.weight_decay, fused=True
    )

    def step() -> None:
        batches = next(updates)
        num_tokens, num_inputs = sum(len(b.targets) for b in batches), sum(len(b.tokens) for b in batches)
        for batch in batches:
            out = model(batch.tokens, batch.positions, batch.lengths)
            logits = model.logits(out.hidden[batch.rows]) / rl.temperature
            logprobs = torch.log_softmax(logits, -1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
            ratio = (logprobs - batch.behaviour).exp()
            clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            loss = -torch.minimum(ratio * batch.target, clipped * batch.target).sum() / num_tokens
            (loss + rl.aux_weight * out.aux_loss * (len(batch.tokens) / num_inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rl.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _parts(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    return pack([s.num_inputs for s in samples], max_tokens)


def _padded_parts(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[int]]:
    """In the order in which they came, as many as fit when all are as long as the longest."""
    part: list[int] = []
    longest = 0
    for index, sample in enumerate(samples):
        widest = max(longest, sample.num_inputs)
        if part and widest * (len(part) + 1) > max_tokens:
            yield part
            part, widest = [], sample.num_inputs
        part.append(index)
        longest = widest
    yield part


def _pad(samples: Sequence[Sample]) -> MicroBatch:
    """Every sample as long as the longest; rows and targets are those of real tokens."""
    width = max(s.num_inputs for s in samples)
    batch = collate(samples)
    tokens = torch.zeros((len(samples), width), dtype=torch.int64)
    rows = []
    for index, sample in enumerate(samples):
        inputs = np.concatenate([sample.prompt, sample.response[:-1]])
        tokens[index, : len(inputs)] = torch.from_numpy(inputs.astype(np.int64))
        rows.append(index * width + len(sample.prompt) - 1 + torch.arange(len(sample.response)))
    return batch._replace(
        tokens=tokens.reshape(-1),
        positions=torch.arange(width).repeat(len(samples)),
        lengths=[width] * len(samples),
        rows=torch.cat(rows),
    )


def _sample(random: np.random.Generator, length: int, vocab_size: int, prompt: int = 8) -> Sample:
    size = max(1, length - prompt)
    tokens = random.integers(0, vocab_size, prompt + size).astype(np.int32)
    logprobs = np.full(size, -np.log(vocab_size), np.float32)
    return Sample(tokens[:prompt], tokens[prompt:], logprobs, random.normal(size=size).astype(np.float32))


def _update(seed: int, rl: RlSettings, vocab_size: int, max_prompt: int) -> PolicyUpdate:
    """A step as the default job has it, but with random tokens: answers of 4 to 96 tokens, 35 on average."""
    random = np.random.default_rng(seed)
    groups, advantages = [], []
    for ordinal in range(rl.groups_per_step):
        prompt = random.integers(0, vocab_size, int(random.integers(4, max_prompt))).astype(np.int32)
        members = []
        for member in range(rl.group_size):
            size = int(np.clip(random.lognormal(3.4, 0.6), 4, rl.max_new_tokens))
            tokens = random.integers(0, vocab_size, size).astype(np.int32)
            segment = Segment(version=1, tokens=tokens, logprobs=np.full(size, -np.log(vocab_size), np.float32))
            members.append(
                Trajectory(
                    member=member, segments=[segment], finish="stop", verdict=Verdict(correct=bool(member % 2)),
                    reward=float(member % 2),
                )
            )  # fmt: skip
            advantages.append(np.full(size, 2.0 * (member % 2) - 1, np.float32))
        groups.append(Group(prompt=Prompt(ordinal=ordinal, tokens=prompt, answer="", size=1), trajectories=members))
    return PolicyUpdate(groups=groups, advantages=[*advantages], objective=Objective())
