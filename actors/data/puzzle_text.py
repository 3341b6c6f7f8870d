"""How puzzles are written for a model: a vocabulary, and a brief form of an instance.

    maze: ##### #...# #.#.# #S#E# #####       "brief": the name of the puzzle, and its data, value after value
    Answer:                                   the response, as verifiers read it
    UURRDD

The vocabulary is the same for whatever puzzles are chosen, so that a model trained on some goes on with others:
printable ASCII, a token for the mark of the answer, one for each name. Knows no puzzle.
"""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from ..verifier.puzzles import TASKS, Puzzle
from .vocabulary import Vocabulary

MARK = "Answer:\n"


@cache
def vocabulary() -> Vocabulary:
    """The tokens of puzzles, prompts and responses alike."""
    characters = [*sorted(set(string.printable) - set(string.whitespace)), " ", "\n"]
    return Vocabulary("puzzle", ["<eos>", MARK, *characters, *(f"{name}: " for name in TASKS)])


def brief(puzzle: Puzzle) -> str:
    """The instance without its rules, which training has to teach: another text for another instance."""
    return f"{puzzle.task}: {';'.join(_value(value) for value in puzzle.data.values())}\n"


def _value(value: Any) -> str:
    """Scalars as they are; a list of them with blanks, of lists with slashes; what is deeper in parentheses."""
    if not isinstance(value, list):
        return _scalar(value)
    if any(isinstance(item, list) for item in value):
        return "/".join(" ".join(map(_nested, item)) if isinstance(item, list) else _scalar(item) for item in value)
    return " ".join(map(_scalar, value))


def _nested(value: Any) -> str:
    return f"({' '.join(map(_nested, value))})" if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> str:
    return {True: "T", False: "F"}[value] if isinstance(value, bool) else str(value)
