"""Binario: zeros and ones, as many of each in every line, never three alike in a row, no two rows or columns the same.

Cells are blanked only if two neighbours, two cells around, or a half that is full already force them back, so the
solution is unique. Solved by listing the lines that fit what is given (lines.py).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product, repeat
from typing import ClassVar

from . import answers
from .draw import Draw
from .lines import Fillings, one_hot, solutions
from .puzzle import Data, Task, unsolvable

_SYMBOLS = "01"


class Binario(Task):
    """`grid` has rows of "0", "1" and "." (empty)."""

    name = "binario"

    _levels: ClassVar = [
        (4, 0.5), (4, 0.75), (6, 0.4), (6, 0.55), (6, 0.75), (8, 0.5), (8, 0.65), (8, 0.8), (10, 0.6), (10, 0.8),
    ]  # fmt: skip
    """Size, and the share of blanks that is tried for."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, share = self._levels[level - 1]
        grid = [list(row) for row in _full(draw, size)]
        blanks = round(share * size * size)
        for cell in draw.shuffled(range(size * size)):
            r, c = divmod(cell, size)
            symbol, grid[r][c] = grid[r][c], "."
            if blanks and (_forces(grid[r], c, symbol) or _forces([row[c] for row in grid], r, symbol)):
                blanks -= 1
            else:
                grid[r][c] = symbol
        return {"grid": ["".join(row) for row in grid]}

    def describe(self, data: Data) -> str:
        size = len(data["grid"])
        grid = "\n".join(data["grid"])
        return (
            f"Complete this {size} x {size} binario with 0 and 1: each row and each column holds {size // 2} zeros and "
            f"{size // 2} ones, nowhere do three equal digits stand next to each other in a row or column, no two rows "
            f"are equal and no two columns are equal. Empty cells are written as dots.\n\n{grid}\n\nAnswer with the "
            f"whole grid, a line of {size} digits for each row."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        given, size = data["grid"], len(data["grid"])
        rows = answers.cells(answer, size, size, _SYMBOLS)
        if rows is None or any(
            old not in (".", new)
            for was, row in zip(given, rows, strict=True)
            for old, new in zip(was, row, strict=True)
        ):
            return False
        columns = ["".join(column) for column in zip(*rows, strict=True)]
        return _differ(rows) and _differ(columns) and all(map(_balanced, (*rows, *columns)))

    def solve(self, data: Data) -> str:
        rows = data["grid"]
        columns = ["".join(column) for column in zip(*rows, strict=True)]
        for grid in solutions([_fitting(row) for row in rows], [_fitting(column) for column in columns], 2):
            found = ["".join(map(str, row)) for row in grid]
            if _differ(found) and _differ(list(map("".join, zip(*found, strict=True)))):
                return "\n".join(found)
        raise unsolvable(self)

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One digit turns, so its row is out of balance."""
        rows = [list(row) for row in answer.splitlines()]
        row, c = draw.pick(rows), draw.below(len(rows))
        row[c] = "0" if row[c] == "1" else "1"
        return "\n".join(map("".join, rows))


def _balanced(line: str) -> bool:
    return 2 * line.count("1") == len(line) and "000" not in line and "111" not in line


def _differ(lines: list[str]) -> bool:
    return len(set(lines)) == len(lines)


@lru_cache(maxsize=8)
def _lines(size: int) -> list[tuple[str, int]]:
    """The lines that may occur, with their one-hot fillings."""
    every = map("".join, product(_SYMBOLS, repeat=size))
    return [(line, one_hot(map(int, line), 2)) for line in every if _balanced(line)]


def _fitting(line: str) -> Fillings:
    fixed = [(i, symbol) for i, symbol in enumerate(line) if symbol != "."]
    return [filling for other, filling in _lines(len(line)) if all(other[i] == symbol for i, symbol in fixed)]


def _full(draw: Draw, size: int) -> list[str]:
    """Rows drawn one below the other; begun anew at a dead end, which costs less than to undo its cause."""
    every = [line for line, _ in _lines(size)]
    while True:
        rows: list[str] = []
        columns = [""] * size
        while len(rows) < size:
            fitting = [
                line for line in every if line not in rows and all(map(_goes_on, columns, line, repeat(size // 2)))
            ]
            if not fitting:
                break
            rows.append(draw.pick(fitting))
            columns = list(map(str.__add__, columns, rows[-1]))
        if len(rows) == size and _differ(columns):
            return rows


def _goes_on(column: str, symbol: str, most: int) -> bool:
    """Whether `symbol` may stand below `column`, and be there `most` times."""
    return column[-2:] != symbol * 2 and column.count(symbol) < most


def _forces(line: list[str], i: int, symbol: str) -> bool:
    """Whether a simple rule says that cell `i`, empty, is `symbol`."""
    other = "1" if symbol == "0" else "0"
    text = "".join(line)
    trio = [text[max(i - 2, 0) : i], text[i + 1 : i + 3], text[max(i - 1, 0) : i] + text[i + 1 : i + 2]]
    return other * 2 in trio or 2 * text.count(other) == len(text)
