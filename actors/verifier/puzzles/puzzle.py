"""What a puzzle is, and what a task of the suite must be able to do. Knows no task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from ....runtime.codec import wire
from .draw import Draw

MIN_LEVEL, MAX_LEVEL = 1, 10

Data: TypeAlias = dict[str, Any]
"""What a puzzle's rules apply to: dicts with text keys, lists, whole numbers, texts and booleans, as JSON has them."""


@wire
@dataclass(frozen=True, kw_only=True, slots=True)
class Puzzle:
    """One problem with a question for a model and all that its verifier needs."""

    task: str
    """name in the suite"""
    prompt: str
    """rules, instance and form of the answer, for the model"""
    data: Data
    """the instance, for the verifier; plain values, so that a puzzle can be stored as JSON"""
    difficulty: int
    """1..10; each level has its own sizes"""


class Task(ABC):
    """A family of puzzles. Its methods are pure: what is random comes from the `Draw`.

        invent  -> data -> describe -> the prompt
                        -> solve    -> a right answer -> spoil -> a wrong one
                        -> accepts(an answer)

    Answers are bare here; suite.py wraps and unwraps them.
    """

    name: ClassVar[str]

    @abstractmethod
    def invent(self, draw: Draw, level: int) -> Data:
        """A puzzle that has a solution."""

    @abstractmethod
    def describe(self, data: Data) -> str:
        """The rules, the instance, and the form that the answer must have."""

    @abstractmethod
    def accepts(self, data: Data, answer: str) -> bool:
        """True for every answer that obeys the rules, whoever found it; False for any other text. Never raises."""

    @abstractmethod
    def solve(self, data: Data) -> str:
        """An answer found from `data` alone. ValueError if there is none."""

    @abstractmethod
    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """A near miss: `answer`, which `solve` gave, changed a little so that it must break a rule."""


def unsolvable(task: Task) -> ValueError:
    """The error of `solve` for data that `invent` did not make."""
    return ValueError(f"this {task.name} puzzle has no solution; puzzles that the suite generates always have one")
