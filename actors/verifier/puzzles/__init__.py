"""Logic puzzles: 22 tasks with generator, verifier, solver and a difficulty that follows the pass rate."""

from .ladder import Ladder as Ladder
from .puzzle import MAX_LEVEL as MAX_LEVEL
from .puzzle import MIN_LEVEL as MIN_LEVEL
from .puzzle import Puzzle as Puzzle
from .suite import TASKS as TASKS
from .suite import corrupt as corrupt
from .suite import generate as generate
from .suite import solve as solve
from .suite import verify as verify
