"""Grids that are painted black or left white: nonogram (runs of black cells) and kakurasu (sums of their places).

Both list the lines that fit their hints and leave the rest to lines.py. A puzzle may have several solutions; the
verifier takes each.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from itertools import groupby, product
from typing import Any, ClassVar

from . import answers
from .draw import Draw
from .lines import Fillings, one_hot, solutions
from .puzzle import Data, Task, unsolvable

_WHITE, _BLACK = ".", "#"


class _Painting(Task):
    """`rows` and `columns` hold the hint of each line."""

    def accepts(self, data: Data, answer: str) -> bool:
        rows = answers.cells(answer, len(data["rows"]), len(data["columns"]), "#.")
        if rows is None:
            return False
        columns = map("".join, zip(*rows, strict=True))
        found = [self.hint(row) for row in rows], [self.hint(column) for column in columns]
        return (data["rows"], data["columns"]) == found

    def solve(self, data: Data) -> str:
        height, width = len(data["rows"]), len(data["columns"])
        rows = [self.fillings(hint, width) for hint in data["rows"]]
        columns = [self.fillings(hint, height) for hint in data["columns"]]
        grid = next(solutions(rows, columns, 2), None)
        if grid is None:
            raise unsolvable(self)
        return "\n".join("".join(_BLACK if cell else _WHITE for cell in row) for row in grid)

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One cell turns, so its row has another number of black cells, and another sum of them."""
        rows = [list(row) for row in answer.splitlines()]
        row = draw.pick(rows)
        c = draw.below(len(row))
        row[c] = _WHITE if row[c] == _BLACK else _BLACK
        return "\n".join(map("".join, rows))

    @abstractmethod
    def hint(self, line: str) -> Any:
        """What is told of a line."""

    @abstractmethod
    def fillings(self, hint: Any, width: int) -> Fillings:
        """The lines with this hint."""

    def _paint(self, draw: Draw, size: int, share: float) -> Data:
        rows = ["".join(_BLACK if draw.chance(share) else _WHITE for _ in range(size)) for _ in range(size)]
        columns = map("".join, zip(*rows, strict=True))
        return {"rows": [self.hint(row) for row in rows], "columns": [self.hint(column) for column in columns]}


class Nonogram(_Painting):
    name = "nonogram"

    _levels: ClassVar = [3, 4, 5, 5, 6, 7, 8, 10, 12, 14]

    def invent(self, draw: Draw, level: int) -> Data:
        return self._paint(draw, self._levels[level - 1], 0.6)

    def describe(self, data: Data) -> str:
        width = len(data["columns"])
        rows, columns = (
            "\n".join(f"{side} {i}: {' '.join(map(str, runs)) or '0'}" for i, runs in enumerate(data[f"{side}s"], 1))
            for side in ("row", "column")
        )
        return (
            f"Paint cells of this nonogram. The numbers of a line are the lengths of its runs of black cells, in "
            f"order, with at least one white cell between two runs.\n\n{rows}\n{columns}\n\nAnswer with the grid, a "
            f"line of {width} characters for each row: # for black, . for white."
        )

    def hint(self, line: str) -> list[int]:
        return [len(run) for run in line.split(_WHITE) if run]

    def fillings(self, hint: list[int], width: int) -> Fillings:
        return _with_runs(tuple(hint), width)


class Kakurasu(_Painting):
    name = "kakurasu"

    _levels: ClassVar = [3, 3, 4, 4, 5, 5, 6, 7, 7, 8]

    def invent(self, draw: Draw, level: int) -> Data:
        return self._paint(draw, self._levels[level - 1], 0.5)

    def describe(self, data: Data) -> str:
        width = len(data["columns"])
        return (
            f"Paint cells of a grid of {len(data['rows'])} rows and {width} columns. In a row, a black cell counts as "
            f"the number of its column (1 is the leftmost); in a column, as the number of its row (1 is the topmost). "
            f"The black cells of each line must add up to its sum.\n\nsums of the rows, from the top: "
            f"{' '.join(map(str, data['rows']))}\nsums of the columns, from the left: "
            f"{' '.join(map(str, data['columns']))}\n\nAnswer with the grid, a line of {width} characters for each "
            f"row: # for black, . for white."
        )

    def hint(self, line: str) -> int:
        return sum(i for i, cell in enumerate(line, 1) if cell == _BLACK)

    def fillings(self, hint: int, width: int) -> Fillings:
        return _with_sums(width).get(hint, [])


@lru_cache(maxsize=4096)
def _with_runs(runs: tuple[int, ...], width: int) -> Fillings:
    lines: list[list[int]] = []
    _place(runs, width, [], lines)
    return [one_hot(line, 2) for line in lines]


def _place(runs: tuple[int, ...], width: int, line: list[int], found: list[list[int]]) -> None:
    """Adds to `found` all lines of `width` cells that go on from `line` with `runs`."""
    left = width - len(line)
    if not runs:
        found.append(line + [0] * left)
        return
    slack = left - sum(runs) - len(runs) + 1
    for gap in range(slack + 1):
        after = [0] if len(runs) > 1 else []
        _place(runs[1:], width, line + [0] * gap + [1] * runs[0] + after, found)


@lru_cache(maxsize=16)
def _with_sums(width: int) -> dict[int, Fillings]:
    def total(line: tuple[int, ...]) -> int:
        return sum(i for i, cell in enumerate(line, 1) if cell)

    lines = sorted(product((0, 1), repeat=width), key=total)
    return {hint: [one_hot(line, 2) for line in group] for hint, group in groupby(lines, total)}
