"""Tasks: problems, demonstrations, and which problems to ask. No torch.

task.py          what a job needs of a task: `[task] kind` says which of TASKS it is
running_sum.py   that of the default job           puzzles.py   the logic suite; puzzle_text.py writes it for a model
adaptation.py    draws what still teaches          vocabulary.py   texts of tokens
"""

from .puzzles import Puzzles as Puzzles
from .running_sum import RunningSum as RunningSum
from .task import Task as Task

TASKS: dict[str, type] = {"running_sum": RunningSum, "puzzles": Puzzles}
"""By `kind`. Imported here, so that every process that knows the protocol can be sent its task."""
