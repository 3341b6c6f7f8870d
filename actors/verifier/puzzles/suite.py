r"""The 22 logic tasks, and the three verbs that are all most users need.

    puzzle = generate("sudoku", seed=0, ordinal=17, difficulty=5)
    verify(puzzle, "...so it must be\nAnswer:\n1 2 3 ...")         True or False, for any text whatever
    solve(puzzle)                                                  a text that verify accepts

The task of each puzzle is a class of its own file; this one only looks it up, and puts the answer in and out of the
frame that all share. Knows nothing of rewards or policies.
"""

from __future__ import annotations

from difflib import get_close_matches

from .answers import final_answer
from .arithmetic import Countdown, TwentyFour
from .binario import Binario
from .cryptarithm import Cryptarithm
from .draw import Draw
from .graphs import GraphColouring, HamiltonianPath
from .hanoi import TowerOfHanoi
from .hitori import Hitori
from .knights import KnightsAndKnaves
from .latin import Futoshiki, Skyscrapers
from .light_up import LightUp
from .magic_square import MagicSquare
from .maze import Maze
from .minesweeper import Minesweeper
from .painting import Kakurasu, Nonogram
from .puzzle import MAX_LEVEL, MIN_LEVEL, Puzzle, Task
from .satisfiability import Satisfiability
from .sliding import SlidingPuzzle
from .star_battle import StarBattle
from .sudoku import Sudoku
from .zebra import Zebra

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        TwentyFour(), Countdown(), Cryptarithm(), MagicSquare(),
        Sudoku(), Futoshiki(), Skyscrapers(), Binario(), Nonogram(), Kakurasu(),
        StarBattle(), LightUp(), Minesweeper(), Hitori(),
        Maze(), HamiltonianPath(), GraphColouring(), SlidingPuzzle(), TowerOfHanoi(),
        KnightsAndKnaves(), Zebra(), Satisfiability(),
    )
}  # fmt: skip
"""Name -> task."""

_FRAME = 'Write the answer last, below a line "Answer:", with nothing after it.'


def generate(task: str, *, seed: int, ordinal: int, difficulty: int) -> Puzzle:
    """Puzzle number `ordinal` (any whole number) of `seed`: always the same. It has a solution.

    Raises ValueError for a task that is not in the suite or a difficulty outside 1..10.
    """
    if not MIN_LEVEL <= difficulty <= MAX_LEVEL:
        raise ValueError(f"the difficulty of a puzzle is one of {MIN_LEVEL}..{MAX_LEVEL}, got {difficulty}")
    inventor = _task(task)
    data = inventor.invent(Draw(seed, ordinal, task, difficulty), difficulty)
    return Puzzle(task=task, prompt=f"{inventor.describe(data)}\n\n{_FRAME}", data=data, difficulty=difficulty)


def verify(puzzle: Puzzle, text: str) -> bool:
    r"""Whether the last "Answer:" or \boxed{} of `text` holds a solution of `puzzle`. Never raises for any text."""
    answer = final_answer(text)
    return answer is not None and _task(puzzle.task).accepts(puzzle.data, answer)


def solve(puzzle: Puzzle) -> str:
    """A text that ends with a solution, found from the puzzle alone. ValueError if there is none."""
    return _framed(_task(puzzle.task).solve(puzzle.data))


def corrupt(puzzle: Puzzle, text: str, *, seed: int, ordinal: int) -> str:
    """What `solve` wrote, changed a little so that it is wrong for certain: for tests, and for training judges."""
    answer = final_answer(text)
    assert answer is not None, "only what solve() wrote can be corrupted"
    draw = Draw(seed, ordinal, f"corrupt {puzzle.task}", puzzle.difficulty)
    return _framed(_task(puzzle.task).spoil(puzzle.data, answer, draw))


def _task(name: str) -> Task:
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(TASKS)}"
        raise ValueError(f"no puzzle task {name!r}; {hint}")
    return TASKS[name]


def _framed(answer: str) -> str:
    return f"Answer:\n{answer}"
