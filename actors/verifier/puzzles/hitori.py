"""Hitori: shade cells so that no number is twice in a row or column, no shaded cells touch, all others hang together.

A hidden shading is filled with a Latin square, whose shaded cells then repeat a number of their row or column. Solved
by search: two equal numbers in a line, both unshaded, mean that one or the other is shaded. A cell without a double is
never shaded: unshading it breaks no rule.
"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_SHADED, _WHITE = "#", "."
Cell = tuple[int, int]


class Hitori(Task):
    name = "hitori"

    _levels: ClassVar = [(3, 1), (4, 2), (4, 3), (5, 4), (5, 5), (6, 6), (6, 8), (7, 11), (8, 14), (9, 19)]
    """Size and most cells that are shaded in the hidden solution."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, most = self._levels[level - 1]
        shaded: set[Cell] = set()
        for cell in draw.shuffled((r, c) for r in range(size) for c in range(size)):
            if len(shaded) < most and not shaded & set(_beside(cell, size)) and _connected(shaded | {cell}, size):
                shaded.add(cell)
        rows, columns, values = (draw.shuffled(range(size)) for _ in range(3))
        grid = [[values[(r + c) % size] + 1 for c in columns] for r in rows]
        for r, c in sorted(shaded):
            row = [grid[r][x] for x in range(size) if (r, x) not in shaded]
            column = [grid[y][c] for y in range(size) if (y, c) not in shaded]
            grid[r][c] = draw.pick(row + column)
        return {"grid": grid}

    def describe(self, data: Data) -> str:
        size = len(data["grid"])
        grid = "\n".join(" ".join(map(str, row)) for row in data["grid"])
        return (
            f"Solve this hitori: shade cells so that among the unshaded cells no number stands twice in a row or "
            f"column, no two shaded cells touch along an edge, and all unshaded cells hang together along "
            f"edges.\n\n{grid}\n\nAnswer with a line of {size} characters for each row: # for a shaded cell, . for "
            f"any other."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        grid, size = data["grid"], len(data["grid"])
        rows = answers.cells(answer, size, size, "#.")
        if rows is None:
            return False
        columns = ["".join(column) for column in zip(*rows, strict=True)]
        if any(_SHADED * 2 in line for line in (*rows, *columns)):
            return False
        for numbers, line in (*zip(grid, rows, strict=True), *zip(zip(*grid, strict=True), columns, strict=True)):
            left = [number for number, symbol in zip(numbers, line, strict=True) if symbol == _WHITE]
            if len(set(left)) != len(left):
                return False
        return _connected(
            {(r, c) for r, row in enumerate(rows) for c, symbol in enumerate(row) if symbol == _SHADED}, size
        )

    def solve(self, data: Data) -> str:
        grid, size = data["grid"], len(data["grid"])
        across = [[(r, c) for c in range(size)] for r in range(size)]
        lines = [*across, *map(list, zip(*across, strict=True))]
        doubles = [(a, b) for line in lines for a, b in combinations(line, 2) if grid[a[0]][a[1]] == grid[b[0]][b[1]]]
        shaded = _shade(doubles, frozenset(), frozenset(), size)
        if shaded is None:
            raise unsolvable(self)
        return "\n".join("".join(_SHADED if (r, c) in shaded else _WHITE for c in range(size)) for r in range(size))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """A cell next to a shaded one is shaded too."""
        rows = [list(row) for row in answer.splitlines()]
        size = len(rows)
        shaded = [(r, c) for r in range(size) for c in range(size) if rows[r][c] == _SHADED]
        r, c = draw.pick(_beside(draw.pick(shaded), size))
        rows[r][c] = _SHADED
        return "\n".join(map("".join, rows))


def _beside(cell: Cell, size: int) -> list[Cell]:
    r, c = cell
    near = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
    return [(y, x) for y, x in near if 0 <= y < size and 0 <= x < size]


def _connected(shaded: set[Cell] | frozenset[Cell], size: int) -> bool:
    """Whether all unshaded cells hang together (and there are some), by flooding rows of bits."""
    white = [sum(1 << c for c in range(size) if (r, c) not in shaded) for r in range(size)]
    first = next((r for r in range(size) if white[r]), None)
    if first is None:
        return False
    wet = [0] * size
    wet[first] = white[first] & -white[first]
    while True:
        before = list(wet)
        for r in (*range(size), *reversed(range(size))):
            near = wet[r] | (wet[r - 1] if r else 0) | (wet[r + 1] if r + 1 < size else 0)
            wet[r] = (near | wet[r] << 1 | wet[r] >> 1) & white[r]
        if wet == before:
            return wet == white


def _shade(
    doubles: list[tuple[Cell, Cell]], shaded: frozenset[Cell], white: frozenset[Cell], size: int
) -> frozenset[Cell] | None:
    """Shades one of each of `doubles`, beginning with `shaded`, nothing of `white`."""
    left = [pair for pair in doubles if pair[0] not in shaded and pair[1] not in shaded]
    if not left:
        return shaded
    pair = max(left, key=lambda pair: (pair[0] in white) + (pair[1] in white))
    for cell, other in (pair, pair[::-1]):
        if cell not in white:
            grown = shaded | {cell}
            if _connected(grown, size):
                found = _shade(left, grown, white.union(_beside(cell, size)), size)
                if found is not None:
                    return found
            white = white | {cell}
            if other in white:
                return None
    return None
