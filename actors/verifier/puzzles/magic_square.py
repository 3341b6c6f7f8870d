"""Magic squares with blanks: 1..n*n once each, all rows, columns and both diagonals with the same sum.

Full squares come from two orthogonal Latin squares whose diagonals hold every symbol too (orders 4 and 5), or are the
one of order 3; symbols are renamed, the square turned and mirrored.
"""

from __future__ import annotations

from itertools import chain
from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

Square = list[list[int]]

_ORDER_3: Square = [[2, 7, 6], [9, 5, 1], [4, 3, 8]]
_LATIN_4: Square = [[0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0], [1, 0, 3, 2]]
"""Orthogonal to its transpose."""
_LATIN_5: Square = [[(row + 2 * column) % 5 for column in range(5)] for row in range(5)]
"""So is this one."""


class MagicSquare(Task):
    name = "magic_square"

    _levels: ClassVar = [(3, 3), (3, 5), (3, 7), (4, 4), (4, 6), (4, 8), (4, 10), (5, 8), (5, 10), (5, 12)]
    """Order and number of blanks."""

    def invent(self, draw: Draw, level: int) -> Data:
        order, blanks = self._levels[level - 1]
        grid = _full(draw, order)
        for cell in draw.sample(range(order * order), blanks):
            grid[cell // order][cell % order] = 0
        return {"grid": grid}

    def describe(self, data: Data) -> str:
        order = len(data["grid"])
        grid = "\n".join(" ".join(str(value or "_") for value in row) for row in data["grid"])
        return (
            f"Complete the magic square: it holds each of the numbers 1 to {order * order} once, and all rows, all "
            f"columns and both diagonals have the same sum. Blanks are written _.\n\n{grid}\n\nAnswer with the whole "
            f"square, a line for each row, numbers separated by blanks."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        given, order = data["grid"], len(data["grid"])
        grid = answers.number_rows(answer, order, order)
        if grid is None or sorted(chain(*grid)) != list(range(1, order * order + 1)):
            return False
        if any(
            old and old != new for was, row in zip(given, grid, strict=True) for old, new in zip(was, row, strict=True)
        ):
            return False
        sums = {sum(line) for line in (*grid, *zip(*grid, strict=True))}
        sums |= {sum(grid[i][i] for i in range(order)), sum(grid[i][-1 - i] for i in range(order))}
        return len(sums) == 1

    def solve(self, data: Data) -> str:
        order = len(data["grid"])
        cells: list[int] = [*chain(*data["grid"])]
        if not _complete(cells, _lines(order), order * (order * order + 1) // 2):
            raise unsolvable(self)
        return "\n".join(" ".join(map(str, cells[i : i + order])) for i in range(0, order * order, order))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One number becomes another, which then stands there twice; or two change places in one row."""
        rows = [line.split() for line in answer.splitlines()]
        row, (first, second) = draw.pick(rows), draw.sample(range(len(rows)), 2)
        swapped = row[second] if draw.chance(0.5) else row[first]
        row[first], row[second] = row[second], swapped
        return "\n".join(map(" ".join, rows))


def _full(draw: Draw, order: int) -> Square:
    if order == 3:
        grid = [list(row) for row in _ORDER_3]
    else:
        latin = _LATIN_4 if order == 4 else _LATIN_5
        high, low = draw.shuffled(range(order)), draw.shuffled(range(order))
        span = range(order)
        grid = [[order * high[latin[r][c]] + low[latin[c][r]] + 1 for c in span] for r in span]
    for _ in range(draw.below(4)):
        grid = [list(column) for column in zip(*grid[::-1], strict=True)]
    return grid[::-1] if draw.chance(0.5) else grid


def _lines(order: int) -> list[list[int]]:
    span = range(order)
    rows = [[order * r + c for c in span] for r in span]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return [*rows, *columns, [rows[i][i] for i in span], [rows[i][-1 - i] for i in span]]


def _complete(cells: list[int], lines: list[list[int]], total: int) -> bool:
    """Fills the blanks (0) of `cells` in place: what a line forces first, else a guess in the fullest line."""
    open_lines = [(len(blanks), line) for line in lines if (blanks := [i for i in line if not cells[i]])]
    if not open_lines:
        return all(sum(cells[i] for i in line) == total for line in lines)
    count, line = min(open_lines)
    spot = next(i for i in line if not cells[i])
    missing = total - sum(cells[i] for i in line)
    free = set(range(1, len(cells) + 1)) - set(cells)
    for value in sorted(free & {missing} if count == 1 else free):
        cells[spot] = value
        if all(_may_be(cells, other, total) for other in lines if spot in other) and _complete(cells, lines, total):
            return True
        cells[spot] = 0
    return False


def _may_be(cells: list[int], line: list[int], total: int) -> bool:
    values = [cells[i] for i in line]
    return sum(values) < total if 0 in values else sum(values) == total
