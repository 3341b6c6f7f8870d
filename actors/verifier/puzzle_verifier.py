"""The verifier of puzzles: each answer is read by its puzzle's own parser and held against the rules.

[actors.verifier]
class = "headrace.actors.verifier:PuzzleVerifier"

The data set of a prompt names the puzzle, its answer is the instance as JSON. Reading and checking an answer is bounded
by construction (puzzles/answers.py: at most 4096 characters, and no search), so it is done in this process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache

from ..data.puzzles import Puzzles
from ..data.task import Task
from ..types import Verdict
from .case import BadReference, Case
from .hearing import CourtVerifier
from .judging import failed
from .puzzles import TASKS, Puzzle, verify
from .text_rules import RIGHT, WRONG


@dataclass(kw_only=True)
class PuzzleVerifier(CourtVerifier):
    """Judges answers to the puzzles of the suite; any solution is right, not only the solver's."""

    task: Task = field(default_factory=Puzzles)
    """Decodes prompts and responses."""

    async def start(self) -> None:
        self.open_court(judge_puzzle, places=1)


async def judge_puzzle(case: Case) -> Verdict:
    """Right iff the response solves the puzzle; an error value if `case` names none, or an instance of another form."""
    try:
        puzzle = _puzzle(case.dataset, case.reference)
    except BadReference as error:
        return failed(case, str(error), "bad reference")
    try:
        return RIGHT if verify(puzzle, case.response) else WRONG
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # Of no text: so it is the instance's.
        text = f"the reference is no instance of {case.dataset}: {type(error).__name__}: {error}"
        return failed(case, text, "bad reference")


@lru_cache(maxsize=256)
def _puzzle(name: str, reference: str) -> Puzzle:
    if name not in TASKS:
        raise BadReference(f"there is no puzzle {name!r}; the data set of a prompt must be one of {', '.join(TASKS)}")
    try:
        data = json.loads(reference)
    except (ValueError, RecursionError) as error:
        raise BadReference(f"the reference is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadReference(f"the reference must be a JSON object, got {reference[:80]!r}")
    return Puzzle(task=name, prompt="", data=data, difficulty=1)
