"""The labelled running sum: add and subtract single digits, writing down every partial total.

    prompt     a+2b+7c-7=
    response   a+2=02b+7=09c-7=02#02<eos>

A response is long when the problem is, it can go wrong at every step, and one comparison judges it: what a reasoning
task needs, on a scale that two CPU cores learn in minutes. Problem number `ordinal` of a seed is always the same.
The demonstrator that the warm-up imitates is biased on purpose: it forgets carries and borrows more often than
chance errors would, so that its most likely answer is often wrong and reinforcement learning has an ability to teach,
not only a distribution to sharpen. Knows nothing of models, rewards or actors.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from ...runtime.codec import wire
from ..philox import Stream, uniforms
from ..types import Group, Prompt
from .adaptation import Adaptation
from .task import Demonstration
from .vocabulary import EOS_ID as EOS_ID
from .vocabulary import Vocabulary

MIN_OPERANDS = 2
MAX_TOTAL = 99

VOCABULARY = (
    "<eos>",
    "=",
    "#",
    *string.digits,
    *(f"+{digit}" for digit in string.digits),
    *(f"-{digit}" for digit in string.digits),
    *string.ascii_lowercase,
)
"""Text of each token id. A signed operand is one token: split in two, late positions suffer copying errors."""

DATASET = "running_sum"

_WORDS = Vocabulary("running-sum", VOCABULARY)
_ID = {text: token for token, text in enumerate(VOCABULARY)}

encode, decode = _WORDS.encode, _WORDS.decode


@wire
@dataclass(frozen=True, kw_only=True)
class RunningSum:
    """Table `[task]`: what problems look like, and how their demonstrator errs."""

    kind: Literal["running_sum"] = "running_sum"
    max_operands: Annotated[int, Ge(2), Le(26)] = 14
    """Longest problem; each operand has a letter as its label."""
    length_decay: Annotated[float, Gt(0), Lt(1)] = 0.16
    """Number of operands = 2 + geometric(length_decay), at most `max_operands`."""
    max_operand: Annotated[int, Ge(1), Le(9)] = 9
    """Operands are 1..max_operand."""
    subtraction: Annotated[float, Ge(0), Le(1)] = 0.45
    """Share of subtractions, before a sign is turned that would take the total out of 0..99; below one half totals
    grow with the length."""
    bias: Annotated[float, Ge(0), Le(1)] = 0.5
    """How often the demonstrator forgets a carry or borrow."""
    slip: Annotated[float, Ge(0), Le(1)] = 0.03
    """How often the demonstrator writes a random last digit."""

    vocab_size = len(VOCABULARY)
    eos_id = EOS_ID

    @property
    def sizes(self) -> np.ndarray:
        """Numbers of operands that occur, int64 [S]."""
        return np.arange(MIN_OPERANDS, self.max_operands + 1)

    @property
    def size_prior(self) -> np.ndarray:
        """Probability of each of `sizes`, float64 [S]."""
        prior = self.length_decay * (1 - self.length_decay) ** np.arange(len(self.sizes))
        prior[-1] = 1 - prior[:-1].sum()
        return prior

    @property
    def max_prompt_tokens(self) -> int:
        return 2 * self.max_operands + 1

    @property
    def max_response_tokens(self) -> int:
        """Longest response of a faultless solver."""
        return 5 * self.max_operands + 4

    def prompts(self, seed: int, ordinals: np.ndarray, sizes: np.ndarray | None = None) -> list[Prompt]:
        """Problems number `ordinals` (int64 [N]) of `seed`, with `sizes` (int64 [N]) operands or sizes by the prior."""
        ordinals = np.asarray(ordinals, np.int64)
        if sizes is None:
            sizes = self._sizes_by_prior(seed, ordinals, self.max_operands)
        drawn = uniforms(seed, Stream.PROBLEM, ordinals, sizes, 2 * self.max_operands)
        return [
            self._prompt(int(ordinal), int(size), u.tolist())
            for ordinal, size, u in zip(ordinals, sizes, drawn, strict=True)
        ]

    def evaluation_set(self, seed: int, count: int) -> list[Prompt]:
        """The fixed problems -1..-count, which training never uses; sizes by the prior."""
        return self.prompts(seed, -np.arange(1, count + 1))

    def demonstrations(self, seed: int, ordinals: np.ndarray, max_operands: int) -> list[Demonstration]:
        """Worked examples number `ordinals` (int64 [N]); sizes by the prior, at most `max_operands`.

        Their problems are not those of `prompts` with the same ordinals.
        """
        ordinals = np.asarray(ordinals, np.int64)
        sizes = self._sizes_by_prior(seed, ordinals, min(max_operands, self.max_operands))
        problems = uniforms(seed, Stream.DEMONSTRATION, ordinals, 0, 2 * self.max_operands)
        errors = uniforms(seed, Stream.DEMONSTRATION, ordinals, 1, 3 * self.max_operands)
        examples = []
        for ordinal, size, u, e in zip(ordinals, sizes, problems, errors, strict=True):
            prompt = self._prompt(int(ordinal), int(size), u.tolist())
            response = self._write(operands_of(prompt), self._biased_totals(operands_of(prompt), e.tolist()))
            examples.append(Demonstration(prompt=prompt, response=response))
        return examples

    def questions(self, seed: int) -> SizeQuestions:
        """Problems of the sizes that still teach something."""
        return SizeQuestions(self, seed)

    def largest_size(self, step: int, num_steps: int) -> int:
        """See `curriculum`."""
        return curriculum(step, num_steps, self.max_operands)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of `tokens` (int [n])."""
        return decode(tokens)

    def check(self, max_new_tokens: int) -> None:
        """Nothing can be wrong: prompts have a bound, and a budget below the longest answer is a choice."""

    def solve(self, prompt: Prompt) -> np.ndarray:
        """The faultless response, int32 [n]."""
        operands = operands_of(prompt)
        return self._write(operands, np.cumsum(operands).tolist())

    def _sizes_by_prior(self, seed: int, ordinals: np.ndarray, max_operands: int) -> np.ndarray:
        u = uniforms(seed, Stream.SIZE, ordinals, 0, 1)[:, 0]
        return np.minimum(MIN_OPERANDS + np.searchsorted(np.cumsum(self.size_prior)[:-1], u), max_operands)

    def _prompt(self, ordinal: int, size: int, u: list[float]) -> Prompt:
        total, text = 0, []
        for i in range(size):
            operand = 1 + int(u[2 * i + 1] * self.max_operand)
            minus = u[2 * i] < self.subtraction
            if not 0 <= total + (-operand if minus else operand) <= MAX_TOTAL:
                minus = not minus
            total += -operand if minus else operand
            text += [string.ascii_lowercase[i], f"{'-' if minus else '+'}{operand}"]
        tokens = np.array([_ID[t] for t in (*text, "=")], np.int32)
        return Prompt(ordinal=ordinal, tokens=tokens, answer=_digits(total), size=size, dataset=DATASET)

    def _biased_totals(self, operands: list[int], u: list[float]) -> list[int]:
        total, totals = 0, []
        for i, operand in enumerate(operands):
            tens, ones = total // 10, total % 10 + operand
            crosses = 1 if ones > 9 else -1 if ones < 0 else 0
            if u[3 * i] >= self.bias:
                tens = min(max(tens + crosses, 0), 9)
            if u[3 * i + 1] < self.slip:
                ones = int(10 * u[3 * i + 2])
            total = 10 * tens + ones % 10
            totals.append(total)
        return totals

    def _write(self, operands: list[int], totals: list[int]) -> np.ndarray:
        ids = []
        for label, operand, total in zip(string.ascii_lowercase, operands, totals, strict=False):
            ids += [_ID[label], _ID[f"{operand:+d}"], _ID["="], *(_ID[digit] for digit in _digits(total))]
        ids += [_ID["#"], *(_ID[digit] for digit in _digits(totals[-1])), EOS_ID]
        return np.array(ids, np.int32)


class SizeQuestions:
    """Draws problems by adaptation.py; see task.Questions."""

    def __init__(self, task: RunningSum, seed: int) -> None:
        self._task, self._seed = task, seed
        self._adaptation = Adaptation(sizes=task.sizes, prior=task.size_prior, seed=seed)

    def prompt(self, ordinal: int) -> Prompt:
        size = self._adaptation.choose(ordinal)
        (prompt,) = self._task.prompts(self._seed, np.array([ordinal]), np.array([size]))
        return prompt

    def observe(self, group: Group, *, mixed: bool) -> None:
        self._adaptation.observe(group.prompt.size, mixed=mixed)

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return self._adaptation.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._adaptation.load_state(state)


def curriculum(step: int, num_steps: int, max_operands: int) -> int:
    """Longest problem at SFT step `step` of `num_steps`: from 4 up to `max_operands` over the first half."""
    progress = min(1.0, 2 * step / max(1, num_steps))
    return min(max_operands, 4 + round(progress * max(0, max_operands - 4)))


def operands_of(prompt: Prompt) -> list[int]:
    """Signed operands of a problem."""
    return [int(VOCABULARY[token]) for token in prompt.tokens[1:-1:2]]


def _digits(total: int) -> str:
    return f"{total:02d}"
