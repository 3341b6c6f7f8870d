"""Puzzles as a task: problems of the suite, each puzzle at a level that follows the pass rate.

    weight(puzzle) * (share of mixed groups + FLOOR)  -> which puzzle   adaptation.py
    its ladder: up when more than `high` of the answers pass, down when less than `low`  -> which level
    seed, ordinal, puzzle, level                      -> the instance, always the same

Training and evaluation share no instance: a checksum of its text says on which side it is, and candidates are skipped
until one is on the right side; only a level that has next to no instances shares them. Demonstrations are the solver's
answers, with nothing of how they are found. Knows nothing of models or actors.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from ...runtime.codec import wire
from ...runtime.toml import nearest
from ..philox import Stream, uniforms
from ..types import Group, Prompt
from .adaptation import Adaptation
from .task import Demonstration
from .vocabulary import EOS_ID

EVALUATED = 4
"""One in so many instances is kept for evaluation."""
MAX_SKIPPED = 64
"""Candidates that are skipped for one problem."""

_SKIP, _DEMONSTRATIONS = 1 << 44, 1 << 40
_CHECKED = 4
"""Problems of each level that `check` looks at."""


@wire
@dataclass(frozen=True, kw_only=True)
class Puzzles:
    """Table `[task]`: which puzzles, how hard, how they are written. See verifier/puzzles."""

    kind: Literal["puzzles"] = "puzzles"
    puzzles: dict[str, float] = field(default_factory=lambda: {"maze": 1.0, "sudoku": 1.0, "sliding_puzzle": 1.0})
    """Name in the suite -> weight."""
    min_level: Annotated[int, Ge(1), Le(10)] = 1
    """Where each puzzle begins."""
    max_level: Annotated[int, Ge(1), Le(10)] = 4
    """Where no puzzle goes beyond. Evaluation has all levels from the least to this one, equally often."""
    demonstrated_level: Annotated[int, Ge(1), Le(10)] = 2
    """Up to which level the warm-up demonstrates; it begins with `min_level`."""
    low: Annotated[float, Ge(0), Lt(1)] = 0.3
    """A puzzle whose pass rate is below goes down a level."""
    high: Annotated[float, Gt(0), Le(1)] = 0.7
    """A puzzle whose pass rate is above goes up a level."""
    patience: Annotated[int, Ge(1)] = 64
    """Answers at a level from which the pass rate is taken, anew for each decision."""
    style: Literal["brief", "prose"] = "brief"
    """How a prompt is written: the instance alone, for small models; or with the rules, in English."""
    max_prompt_tokens: Annotated[int, Ge(8)] = 160
    """Longer problems are not asked."""

    eos_id = EOS_ID

    def __post_init__(self) -> None:
        from ..verifier.puzzles import TASKS

        for name, weight in self.puzzles.items():
            if name not in TASKS:
                raise ValueError(f"puzzles: there is no {name!r}{nearest(name, TASKS, otherwise=_known(TASKS))}")
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"puzzles: the weight of {name} must be above 0, got {weight}; leave it out for 0")
        if not self.puzzles:
            raise ValueError(f"puzzles must name at least one{_known(TASKS)}")
        if not self.min_level <= self.demonstrated_level <= self.max_level:
            raise ValueError(
                "demonstrated_level must be between min_level and max_level, got "
                f"{self.demonstrated_level} of {self.min_level}..{self.max_level}"
            )
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")

    @property
    def vocab_size(self) -> int:
        from .puzzle_text import vocabulary

        return len(vocabulary())

    @property
    def weights(self) -> np.ndarray:
        """Share of each of `puzzles`, float64 [N]."""
        weights = np.array(list(self.puzzles.values()), np.float64)
        return np.asarray(weights / weights.sum())

    def problem(self, seed: int, ordinal: int, name: str, level: int) -> Prompt:
        """Problem number `ordinal` of `seed`; negative ones are those of evaluation.

        Raises ValueError if MAX_SKIPPED candidates in a row are too long.
        """
        fitting, shortest = None, 0
        for skipped in range(MAX_SKIPPED):
            prompt, evaluated = self._written(seed, ordinal, skipped, name, level)
            shortest = min(shortest, len(prompt.tokens)) or len(prompt.tokens)
            if len(prompt.tokens) <= self.max_prompt_tokens:
                fitting = fitting or prompt
                if evaluated == (ordinal < 0):
                    return prompt
        if fitting is None:
            raise ValueError(
                f"max_prompt_tokens: no {name} of level {level} fits {self.max_prompt_tokens} tokens, the shortest has "
                f"{shortest}; raise it, or lower max_level"
            )
        return fitting

    def questions(self, seed: int) -> PuzzleQuestions:
        """Puzzles that still teach something, at levels that follow the pass rate."""
        return PuzzleQuestions(self, seed)

    def evaluation_set(self, seed: int, count: int) -> list[Prompt]:
        """The fixed problems -1..-count: puzzles by weight, all levels equally often."""
        return [self._drawn(seed, ordinal, self.max_level) for ordinal in range(-1, -count - 1, -1)]

    def largest_size(self, step: int, num_steps: int) -> int:
        """The level rises over the first half of the warm-up."""
        progress = min(1.0, 2 * step / max(1, num_steps))
        return self.min_level + round(progress * (self.demonstrated_level - self.min_level))

    def demonstrations(self, seed: int, ordinals: np.ndarray, largest: int) -> list[Demonstration]:
        """Problems number `ordinals` (int64 [N]) with the solver's answers; levels up to `largest` equally often."""
        prompts = [self._drawn(seed, _DEMONSTRATIONS + int(ordinal), largest) for ordinal in ordinals]
        return [Demonstration(prompt=prompt, response=self.solve(prompt)) for prompt in prompts]

    def solve(self, prompt: Prompt) -> np.ndarray:
        """The solver's response, int32 [n]."""
        from ..verifier.puzzles import Puzzle, solve
        from .puzzle_text import vocabulary

        data = json.loads(prompt.answer)
        text = solve(Puzzle(task=prompt.dataset, prompt="", data=data, difficulty=prompt.size))
        return np.append(vocabulary().encode(text), np.int32(EOS_ID))

    def decode(self, tokens: np.ndarray) -> str:
        from .puzzle_text import vocabulary

        return vocabulary().decode(tokens)

    def check(self, max_new_tokens: int) -> None:
        """Looks at some problems of each level."""
        for name in self.puzzles:
            for level in range(self.min_level, self.max_level + 1):
                prompts = [self.problem(0, ordinal, name, level) for ordinal in (-1, *range(_CHECKED))]
                longest = max(len(self.solve(prompt)) for prompt in prompts)
                if longest > max_new_tokens:
                    raise ValueError(
                        f"max_level: a solution of {name} at level {level} has {longest} tokens, and [rl] "
                        f"max_new_tokens is {max_new_tokens}; raise that, or lower max_level"
                    )

    def _drawn(self, seed: int, ordinal: int, largest: int) -> Prompt:
        """A puzzle by weight, a level of min_level..largest."""
        which, height = uniforms(seed, Stream.SIZE, ordinal, 0, 2).tolist()
        name = list(self.puzzles)[int(np.searchsorted(np.cumsum(self.weights)[:-1], which, side="right"))]
        return self.problem(seed, ordinal, name, self.min_level + int(height * (largest + 1 - self.min_level)))

    def _written(self, seed: int, ordinal: int, skipped: int, name: str, level: int) -> tuple[Prompt, bool]:
        """The candidate after `skipped` others, and whether it is one of evaluation."""
        from ..verifier.puzzles import generate
        from .puzzle_text import brief, vocabulary

        puzzle = generate(name, seed=seed, ordinal=ordinal + skipped * _SKIP, difficulty=level)
        text = brief(puzzle)
        prompt = Prompt(
            ordinal=ordinal, tokens=vocabulary().encode(text if self.style == "brief" else f"{puzzle.prompt}\n"),
            answer=json.dumps(puzzle.data, separators=(",", ":")), size=level, dataset=name,
        )  # fmt: skip
        return prompt, zlib.crc32(text.encode()) % EVALUATED == 0


class PuzzleQuestions:
    """See task.Questions."""

    def __init__(self, task: Puzzles, seed: int) -> None:
        from ..verifier.puzzles import Ladder

        self._task, self._seed, self._names = task, seed, list(task.puzzles)
        self._adaptation = Adaptation(sizes=np.arange(len(self._names)), prior=task.weights, seed=seed, exponent=1.0)
        self._ladders = {
            name: Ladder(
                level=task.min_level, lowest=task.min_level, highest=task.max_level,
                low=task.low, high=task.high, patience=task.patience,
            )
            for name in self._names
        }  # fmt: skip
        self._passed: Counter[str] = Counter()
        self._judged: Counter[str] = Counter()

    def prompt(self, ordinal: int) -> Prompt:
        name = self._names[self._adaptation.choose(ordinal)]
        return self._task.problem(self._seed, ordinal, name, self._ladders[name].level)

    def observe(self, group: Group, *, mixed: bool) -> None:
        name, index = group.prompt.dataset, self._names.index(group.prompt.dataset)
        ladder = self._ladders[name]
        before = ladder.level
        self._adaptation.observe(index, mixed=mixed)
        for verdict in (t.verdict for t in group.trajectories):
            if verdict is not None and not verdict.error:
                ladder.observe(group.prompt.size, passed=verdict.correct)
                self._judged[name] += 1
                self._passed[name] += verdict.correct
        if ladder.level != before:  # Else a puzzle that was too easy would be asked too seldom to climb.
            self._adaptation.forget(index)

    def metrics(self) -> dict[str, float]:
        """Level of each puzzle, and the pass rate of those judged since the last call."""
        levels = {f"puzzle_level/{name}": float(ladder.level) for name, ladder in self._ladders.items()}
        rates = {f"puzzle_pass_ratio/{name}": self._passed[name] / count for name, count in self._judged.items()}
        self._passed, self._judged = Counter(), Counter()
        return levels | rates

    def state(self) -> dict[str, Any]:
        ladders = {name: ladder.state() for name, ladder in self._ladders.items()}
        return {"puzzles": self._names, "adaptation": self._adaptation.state(), "ladders": ladders}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("puzzles") != self._names:
            raise ValueError(
                f"the checkpoint is of a run with the puzzles {state.get('puzzles')}, the task has {self._names}; "
                "resume with the task settings that the run was started with"
            )
        self._adaptation.load_state(state["adaptation"])
        for name, ladder in self._ladders.items():
            ladder.load_state(state["ladders"][name])


def _known(names: Any) -> str:
    return f"; known are {', '.join(names)}"
