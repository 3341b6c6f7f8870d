"""Measures a policy on the fixed evaluation set, also while workers die: answers go on from where they were. Knows
nothing of training."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ...runtime import Actor, message, wire
from ..data.task import Task
from ..patience import patiently
from ..rollout.answers import finish_answers
from ..trainer.settings import RlSettings
from ..types import Group, Prompt, Trajectory, Verdict
from .settings import EvaluationSettings

PROBLEMS_PER_STREAM = 64

CANDIDATES = 8
"""Samples that are kept for each one that will be shown."""


@wire
@dataclass(kw_only=True, slots=True)
class Sample:
    """One greedy answer, for people to read."""

    ordinal: int
    size: int
    prompt: str
    solution: str
    """A faultless response."""
    response: str
    correct: bool


@wire
@dataclass(kw_only=True, slots=True)
class Evaluation:
    """What one policy version can do."""

    version: int
    n: int
    """Problems in the set."""
    pass_at_1: float
    """Share of correct answers at temperature 1."""
    greedy: float
    """Share of correct greedy answers."""
    mean_tokens: float
    """Mean length of the answers at temperature 1."""
    by_size: dict[int, tuple[int, float, float]] = field(default_factory=dict)
    """Problem size -> (problems, pass@1, greedy)."""
    by_dataset: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """The same by data set: name of the puzzle."""
    samples: list[Sample] = field(default_factory=list)
    """Greedy answers to problems of all sizes, easy ones first; CANDIDATES for each that will be shown."""


@dataclass(kw_only=True)
class Evaluator(Actor):
    """Asks `rollout` for answers to the fixed problems and `verifier` for verdicts."""

    task: Task
    evaluation: EvaluationSettings
    rl: RlSettings

    def __post_init__(self) -> None:
        self._prompts: list[Prompt] = []

    @message(deadline_s=600.0)
    async def evaluate(self) -> Evaluation:
        """Scores the newest version at temperature 1 and greedily, on all problems.

        Raises RuntimeError if an answer was refused or could not be judged: a score over fewer problems is another one.
        """
        prompts = await self._problems()
        batches = [prompts[i : i + PROBLEMS_PER_STREAM] for i in range(0, len(prompts), PROBLEMS_PER_STREAM)]
        async with asyncio.TaskGroup() as tasks:
            sampled = [tasks.create_task(self._answer(batch, self.evaluation.samples, 1.0)) for batch in batches]
            greedy = [tasks.create_task(self._answer(batch, 1, 0.0)) for batch in batches]
        sampled_groups = list(itertools.chain(*(task.result() for task in sampled)))
        greedy_groups = list(itertools.chain(*(task.result() for task in greedy)))
        for group in (*sampled_groups, *greedy_groups):
            if error := next((t.verdict.error for t in group.trajectories if t.verdict and t.verdict.error), ""):
                raise RuntimeError(f"evaluation problem {group.prompt.ordinal} could not be judged: {error}")
        pass_at_1 = np.array([_accuracy(group) for group in sampled_groups])
        greedy_correct = np.array([_accuracy(group) for group in greedy_groups])
        sizes = np.array([prompt.size for prompt in prompts])
        datasets = np.array([prompt.dataset for prompt in prompts])

        def scores(those: np.ndarray) -> tuple[int, float, float]:
            return int(those.sum()), float(pass_at_1[those].mean()), float(greedy_correct[those].mean())

        return Evaluation(
            version=max(group.newest_version for group in sampled_groups),
            n=len(prompts),
            pass_at_1=float(pass_at_1.mean()),
            greedy=float(greedy_correct.mean()),
            mean_tokens=float(np.mean([t.num_tokens for group in sampled_groups for t in group.trajectories])),
            by_size={int(size): scores(sizes == size) for size in np.unique(sizes)},
            by_dataset={str(name): scores(datasets == name) for name in np.unique(datasets)},
            samples=self._samples(greedy_groups),
        )

    async def _problems(self) -> list[Prompt]:
        """The set, made on the actor's thread: that of puzzles takes a second."""
        if not self._prompts:
            settings = self.evaluation
            self._prompts = await self.in_thread(self.task.evaluation_set, settings.seed, settings.num_problems)
        return self._prompts

    async def _answer(self, prompts: list[Prompt], samples: int, temperature: float) -> list[Group]:
        """Answers to `prompts` with their verdicts."""
        groups = [
            Group(prompt=prompt, trajectories=[Trajectory(member=m) for m in range(samples)]) for prompt in prompts
        ]
        rollout, verifier = self.find("rollout"), self.find("verifier")
        asked = {"max_new_tokens": self.rl.max_new_tokens, "stop_strings": list(self.rl.stop_strings)}
        await finish_answers(rollout, groups, temperature=temperature, **asked)
        for group in groups:
            if refusal := next((t.refusal for t in group.trajectories if t.finish == "refused"), ""):
                raise RuntimeError(f"evaluation problem {group.prompt.ordinal} could not be answered: {refusal}")
            verdicts: list[Verdict] = await patiently(partial(verifier.judge, group))
            for trajectory, verdict in zip(group.trajectories, verdicts, strict=True):
                trajectory.verdict = verdict
        return groups

    def _samples(self, groups: list[Group]) -> list[Sample]:
        by_difficulty = sorted(groups, key=lambda group: group.prompt.size)
        count = min(CANDIDATES * self.evaluation.num_shown, len(groups))
        chosen = [by_difficulty[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]
        return [
            Sample(
                ordinal=group.prompt.ordinal,
                size=group.prompt.size,
                prompt=self.task.decode(group.prompt.tokens),
                solution=self.task.decode(self.task.solve(group.prompt)),
                response=self.task.decode(group.trajectories[0].tokens()),
                correct=_accuracy(group) == 1.0,
            )
            for group in chosen
        ]


def _accuracy(group: Group) -> float:
    return float(np.mean([t.verdict is not None and t.verdict.correct for t in group.trajectories]))
