"""Sudoku of 4x4, 6x6 and 9x9 cells, with one solution each.

A full grid is a shuffled pattern. A cell is blanked only if what is left then forces its digit back, because no other
digit fits there or because the digit fits nowhere else in a row, column or box: undone in reverse, every blank is
forced, so the solution is unique without searching for a second one. Solved by trying the blank with the fewest digits.
"""

from __future__ import annotations

from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

Grid = list[list[int]]


class Sudoku(Task):
    name = "sudoku"

    _levels: ClassVar = [
        (4, 0.4), (4, 0.65), (6, 0.4), (6, 0.6),
        (9, 0.3), (9, 0.38), (9, 0.46), (9, 0.54), (9, 0.6), (9, 0.66),
    ]  # fmt: skip
    """Size, and the share of blanks that is tried for."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, share = self._levels[level - 1]
        height, width = _box(size)
        rows = [height * band + r for band in draw.shuffled(range(width)) for r in draw.shuffled(range(height))]
        columns = [width * stack + c for stack in draw.shuffled(range(height)) for c in draw.shuffled(range(width))]
        digits = draw.shuffled(range(1, size + 1))
        grid = [[digits[(width * (r % height) + r // height + c) % size] for c in columns] for r in rows]
        _dig(draw, grid, round(share * size * size))
        return {"grid": grid}

    def describe(self, data: Data) -> str:
        size = len(data["grid"])
        height, width = _box(size)
        grid = "\n".join(" ".join(str(value or ".") for value in row) for row in data["grid"])
        return (
            f"Complete this sudoku: each row, each column and each of the boxes of {height} rows by {width} columns "
            f"holds each digit 1 to {size} once. Empty cells are written as dots.\n\n{grid}\n\nAnswer with the whole "
            f"grid, a line for each row, digits separated by blanks."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        given, size = data["grid"], len(data["grid"])
        height, width = _box(size)
        digits = "123456789"[:size]
        grid = answers.cells(answer, size, size, digits)
        if grid is None:
            return False
        if any(
            old and str(old) != new
            for was, row in zip(given, grid, strict=True)
            for old, new in zip(was, row, strict=True)
        ):
            return False
        boxes = [
            "".join(row[c : c + width] for row in grid[r : r + height])
            for r in range(0, size, height)
            for c in range(0, size, width)
        ]
        return all(len(set(unit)) == size for unit in (*grid, *zip(*grid, strict=True), *boxes))

    def solve(self, data: Data) -> str:
        grid = [list(row) for row in data["grid"]]
        if not _fill(grid, _Used(grid)):
            raise unsolvable(self)
        return "\n".join(" ".join(map(str, row)) for row in grid)

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One digit becomes another, which its row then holds twice."""
        rows = [line.split() for line in answer.splitlines()]
        row, (first, second) = draw.pick(rows), draw.sample(range(len(rows)), 2)
        row[first] = row[second]
        return "\n".join(map(" ".join, rows))


def _box(size: int) -> tuple[int, int]:
    """Rows and columns of a box."""
    return {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]


class _Used:
    """Bit d is set where digit d stands: by row, by column, by box."""

    def __init__(self, grid: Grid) -> None:
        size = len(grid)
        self.height, self.width = _box(size)
        self.all = (2 << size) - 2
        self.rows, self.columns, self.boxes = [0] * size, [0] * size, [0] * size
        for r, row in enumerate(grid):
            for c, digit in enumerate(row):
                if digit:
                    self.flip(r, c, digit)

    def box(self, r: int, c: int) -> int:
        return r // self.height * self.height + c // self.width

    def flip(self, r: int, c: int, digit: int) -> None:
        bit = 1 << digit
        self.rows[r] ^= bit
        self.columns[c] ^= bit
        self.boxes[self.box(r, c)] ^= bit

    def free(self, r: int, c: int) -> int:
        return self.all & ~(self.rows[r] | self.columns[c] | self.boxes[self.box(r, c)])


def _fill(grid: Grid, used: _Used) -> bool:
    size = len(grid)
    blanks = [(r, c) for r in range(size) for c in range(size) if not grid[r][c]]
    return _fill_blanks(grid, used, blanks)


def _fill_blanks(grid: Grid, used: _Used, blanks: list[tuple[int, int]]) -> bool:
    if not blanks:
        return True
    fewest, spot = 10, blanks[0]
    for r, c in blanks:
        count = used.free(r, c).bit_count()
        if count < fewest:
            fewest, spot = count, (r, c)
            if count <= 1:
                break
    r, c = spot
    rest = [blank for blank in blanks if blank != spot]
    free = used.free(r, c)
    for digit in range(1, len(grid) + 1):
        if free >> digit & 1:
            used.flip(r, c, digit)
            grid[r][c] = digit
            if _fill_blanks(grid, used, rest):
                return True
            used.flip(r, c, digit)
    grid[r][c] = 0
    return False


def _dig(draw: Draw, grid: Grid, count: int) -> None:
    """Blanks up to `count` cells that the rest forces."""
    used, size = _Used(grid), len(grid)
    for cell in draw.shuffled(range(size * size)):
        r, c = divmod(cell, size)
        digit = grid[r][c]
        used.flip(r, c, digit)
        grid[r][c] = 0
        if _forced(grid, used, r, c, 1 << digit):
            count -= 1
            if count == 0:
                return
        else:
            used.flip(r, c, digit)
            grid[r][c] = digit


def _forced(grid: Grid, used: _Used, r: int, c: int, bit: int) -> bool:
    if used.free(r, c) == bit:
        return True
    size, height, width = len(grid), used.height, used.width
    top, left = r // height * height, c // width * width
    row = [(r, x) for x in range(size)]
    column = [(y, c) for y in range(size)]
    box = [(y, x) for y in range(top, top + height) for x in range(left, left + width)]
    return any(
        all(grid[y][x] or (y, x) == (r, c) or not used.free(y, x) & bit for y, x in unit) for unit in (row, column, box)
    )
