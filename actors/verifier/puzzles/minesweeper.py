"""Minesweeper as a logic puzzle: which of the covered cells hold the mines?

The numbers of some safe cells are open, the number of mines is known. Solved by search: each open number, and the
number of all mines, says how many of a set of covered cells are mines.
"""

from __future__ import annotations

from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_MINE, _SAFE, _COVERED = "*", ".", "?"
Count = tuple[int, int]
"""A set of cells, as bits, and how many of them are mines."""


class Minesweeper(Task):
    """`grid` has rows of "0".."8" (open) and "?" (covered); `mines` is how many there are."""

    name = "minesweeper"

    _levels: ClassVar = [
        (3, 2, 0.8), (4, 3, 0.75), (4, 4, 0.7), (5, 4, 0.7), (5, 6, 0.65),
        (6, 7, 0.65), (7, 10, 0.6), (8, 14, 0.55), (9, 18, 0.55), (10, 22, 0.5),
    ]  # fmt: skip
    """Size, number of mines, share of the safe cells that are open."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, mines, share = self._levels[level - 1]
        order = draw.shuffled((r, c) for r in range(size) for c in range(size))
        mined, safe = set(order[:mines]), order[mines:]
        grid = [[_COVERED] * size for _ in range(size)]
        for r, c in safe[: round(share * len(safe))]:
            grid[r][c] = str(sum(spot in mined for spot in _around(r, c, size, size)))
        return {"grid": ["".join(row) for row in grid], "mines": mines}

    def describe(self, data: Data) -> str:
        grid = "\n".join(data["grid"])
        return (
            f"This minesweeper field hides {data['mines']} mines under covered cells, written ?. A number says how "
            f"many of the up to eight cells around it hold a mine; cells with a number hold none.\n\n{grid}\n\nFind "
            f"places for all mines that agree with all numbers. Answer with a grid of the same size, a line for each "
            f"row: * for a mine, . for every other cell."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        grid = data["grid"]
        rows = answers.cells(answer, len(grid), len(grid[0]), "*.")
        if rows is None or sum(row.count(_MINE) for row in rows) != data["mines"]:
            return False
        for r, row in enumerate(grid):
            for c, symbol in enumerate(row):
                if symbol == _COVERED:
                    continue
                near = "".join(line[max(c - 1, 0) : c + 2] for line in rows[max(r - 1, 0) : r + 2])
                if rows[r][c] == _MINE or near.count(_MINE) != int(symbol):
                    return False
        return True

    def solve(self, data: Data) -> str:
        grid = data["grid"]
        height, width = len(grid), len(grid[0])
        covered = {(r, c) for r in range(height) for c in range(width) if grid[r][c] == _COVERED}
        counts = [(_bits(covered, width), data["mines"])]
        for r, row in enumerate(grid):
            for c, symbol in enumerate(row):
                if symbol != _COVERED:
                    counts.append((_bits(covered.intersection(_around(r, c, height, width)), width), int(symbol)))
        mines = _search(counts)
        if mines is None:
            raise unsolvable(self)
        return "\n".join(
            "".join(_MINE if mines >> r * width + c & 1 else _SAFE for c in range(width)) for r in range(height)
        )

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One cell turns, so the number of mines is wrong."""
        symbols = list(answer)
        spot = draw.pick([i for i, symbol in enumerate(symbols) if symbol != "\n"])
        symbols[spot] = _SAFE if symbols[spot] == _MINE else _MINE
        return "".join(symbols)


def _around(r: int, c: int, height: int, width: int) -> list[tuple[int, int]]:
    return [
        (y, x)
        for y in range(max(r - 1, 0), min(r + 2, height))
        for x in range(max(c - 1, 0), min(c + 2, width))
        if (y, x) != (r, c)
    ]


def _bits(cells: set[tuple[int, int]], width: int) -> int:
    return sum(1 << r * width + c for r, c in cells)


def _search(counts: list[Count]) -> int | None:
    """Mines, as bits, for which all counts hold."""
    known = _settle(counts)
    if known is None:
        return None
    mines, counts = known
    if not counts:
        return mines
    cells, _ = min(counts, key=lambda count: count[0].bit_count())
    bit = cells & -cells
    for mine in (bit, 0):
        found = _search([*counts, (bit, int(mine > 0))])
        if found is not None:
            return mines | found
    return None


def _settle(counts: list[Count]) -> tuple[int, list[Count]] | None:
    """The mines that single counts give away, and the counts of what is left; None if two counts disagree."""
    mines = 0
    while True:
        found = safe = 0
        for cells, count in counts:
            if count == 0:
                safe |= cells
            elif count == cells.bit_count():
                found |= cells
            elif not 0 < count < cells.bit_count():
                return None
        if found & safe:
            return None
        if not found | safe:
            return mines, [(cells, count) for cells, count in counts if cells]
        mines |= found
        known = found | safe
        counts = [(cells & ~known, count - (cells & found).bit_count()) for cells, count in counts]
