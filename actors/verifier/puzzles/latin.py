"""Latin squares with hints: futoshiki (signs between neighbours) and skyscrapers (how many are seen from the edge).

Both list, for each row and column, the orders of 1..n that its hints allow, and leave the rest to lines.py. A puzzle
may have several solutions; the verifier takes each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from typing import ClassVar

from . import answers
from .draw import Draw
from .lines import Fillings, one_hot, solutions
from .puzzle import Data, Task, unsolvable


@lru_cache(maxsize=8)
def _orders(size: int) -> list[tuple[tuple[int, ...], int]]:
    """All orders of 1..size with their one-hot filling."""
    return [(order, one_hot((v - 1 for v in order), size)) for order in permutations(range(1, size + 1))]


def _full(draw: Draw, size: int) -> list[list[int]]:
    rows, columns, values = (draw.shuffled(range(size)) for _ in range(3))
    return [[values[(r + c) % size] + 1 for c in columns] for r in rows]


class _Latin(Task):
    def accepts(self, data: Data, answer: str) -> bool:
        size = data["size"]
        rows = answers.cells(answer, size, size, "123456789"[:size])
        if rows is None:
            return False
        grid = [list(map(int, row)) for row in rows]
        columns = [list(column) for column in zip(*grid, strict=True)]
        return all(len(set(line)) == size for line in (*grid, *columns)) and self.obeys(data, grid, columns)

    def solve(self, data: Data) -> str:
        size = data["size"]
        rows = [self.fillings(data, "row", r) for r in range(size)]
        columns = [self.fillings(data, "column", c) for c in range(size)]
        grid = next(solutions(rows, columns, size), None)
        if grid is None:
            raise unsolvable(self)
        return "\n".join(" ".join(str(value + 1) for value in row) for row in grid)

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One number becomes another, which its row then holds twice."""
        rows = [line.split() for line in answer.splitlines()]
        row, (first, second) = draw.pick(rows), draw.sample(range(len(rows)), 2)
        row[first] = row[second]
        return "\n".join(map(" ".join, rows))

    @abstractmethod
    def obeys(self, data: Data, rows: list[list[int]], columns: list[list[int]]) -> bool:
        """Whether a Latin square obeys the hints."""

    @abstractmethod
    def fillings(self, data: Data, side: str, index: int) -> Fillings:
        """What the hints allow in a "row" or "column"."""


class Futoshiki(_Latin):
    """`signs` are [row, column, other row, other column]: the first cell is less than the other, its neighbour."""

    name = "futoshiki"

    _levels: ClassVar = [
        (4, 8, 5), (4, 8, 3), (4, 8, 1), (5, 12, 6), (5, 14, 4),
        (5, 14, 2), (5, 16, 0), (6, 18, 6), (6, 22, 3), (6, 26, 0),
    ]  # fmt: skip
    """Size, number of signs, number of cells that are given."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, num_signs, num_given = self._levels[level - 1]
        grid = _full(draw, size)
        cells = [(r, c) for r in range(size) for c in range(size)]
        pairs = [(r, c, r, c + 1) for r, c in cells if c + 1 < size] + [
            (r, c, r + 1, c) for r, c in cells if r + 1 < size
        ]
        signs = [
            [r, c, y, x] if grid[r][c] < grid[y][x] else [y, x, r, c] for r, c, y, x in draw.sample(pairs, num_signs)
        ]
        given = [[0] * size for _ in range(size)]
        for r, c in draw.sample(cells, num_given):
            given[r][c] = grid[r][c]
        return {"size": size, "signs": sorted(signs), "given": given}

    def describe(self, data: Data) -> str:
        size = data["size"]
        canvas = [[" "] * (2 * size - 1) for _ in range(2 * size - 1)]
        for r, row in enumerate(data["given"]):
            canvas[2 * r][::2] = [str(value or ".") for value in row]
        for r, c, y, x in data["signs"]:
            sign = "<" if x > c else ">" if x < c else "^" if y > r else "v"
            canvas[r + y][c + x] = sign
        grid = "\n".join("".join(line).rstrip() for line in canvas)
        return (
            f"Complete this futoshiki: each row and each column holds each number 1 to {size} once, and the signs "
            f"between neighbours hold. < and > compare left with right; between two rows, ^ says that the number "
            f"above is less than the number below, v that it is greater. Empty cells are written as "
            f"dots.\n\n{grid}\n\nAnswer with the whole grid without signs, a line for each row, numbers separated by "
            f"blanks."
        )

    def obeys(self, data: Data, rows: list[list[int]], columns: list[list[int]]) -> bool:
        return all(rows[r][c] < rows[y][x] for r, c, y, x in data["signs"]) and all(
            old in (0, new)
            for was, row in zip(data["given"], rows, strict=True)
            for old, new in zip(was, row, strict=True)
        )

    def fillings(self, data: Data, side: str, index: int) -> Fillings:
        if side == "row":
            given = data["given"][index]
            less = [(c, x) for r, c, y, x in data["signs"] if r == y == index]
        else:
            given = [row[index] for row in data["given"]]
            less = [(r, y) for r, c, y, x in data["signs"] if c == x == index]
        fixed = [(i, value) for i, value in enumerate(given) if value]
        return [
            filling
            for order, filling in _orders(data["size"])
            if all(order[i] < order[j] for i, j in less) and all(order[i] == value for i, value in fixed)
        ]


class Skyscrapers(_Latin):
    """`top`, `bottom`, `left`, `right` are the hints, 0 where there is none."""

    name = "skyscrapers"

    _levels: ClassVar = [
        (3, 1.0), (4, 1.0), (4, 0.85), (4, 0.7), (5, 1.0), (5, 0.9), (5, 0.75), (6, 1.0), (6, 0.9), (6, 0.8),
    ]  # fmt: skip
    """Size and share of hints that are shown."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, share = self._levels[level - 1]
        rows = _full(draw, size)
        columns = [list(column) for column in zip(*rows, strict=True)]

        def hints(lines: list[list[int]]) -> list[int]:
            return [_visible(line) if draw.chance(share) else 0 for line in lines]

        return {
            "size": size,
            "top": hints(columns),
            "bottom": hints([column[::-1] for column in columns]),
            "left": hints(rows),
            "right": hints([row[::-1] for row in rows]),
        }

    def describe(self, data: Data) -> str:
        size = data["size"]

        def show(hint: int) -> str:
            return str(hint or ".")

        middle = [
            f"{show(a)} | {' '.join('_' * size)} | {show(b)}" for a, b in zip(data["left"], data["right"], strict=True)
        ]
        rim = "    " + "-" * (2 * size - 1)
        top, bottom = ("    " + " ".join(map(show, data[side])) for side in ("top", "bottom"))
        grid = "\n".join([top, rim, *middle, rim, bottom])
        return (
            f"Fill the grid with the heights of skyscrapers: each row and each column holds each height 1 to {size} "
            f"once. A number at the edge says how many skyscrapers are seen from there along the row or column: a "
            f"higher one hides all lower ones behind it. A dot at the edge is no hint.\n\n{grid}\n\nAnswer with the "
            f"heights alone, a line for each row, numbers separated by blanks."
        )

    def obeys(self, data: Data, rows: list[list[int]], columns: list[list[int]]) -> bool:
        sides = [("left", rows), ("top", columns)]
        sides += [("right", [row[::-1] for row in rows]), ("bottom", [column[::-1] for column in columns])]
        return all(
            hint in (0, _visible(line)) for side, lines in sides for hint, line in zip(data[side], lines, strict=True)
        )

    def fillings(self, data: Data, side: str, index: int) -> Fillings:
        near, far = ("left", "right") if side == "row" else ("top", "bottom")
        return _seen(data["size"], data[near][index], data[far][index])


@lru_cache(maxsize=512)
def _seen(size: int, near: int, far: int) -> Fillings:
    """Fillings that show `near` skyscrapers from their begin and `far` from their end; 0 is any number."""
    return [
        filling
        for order, filling in _orders(size)
        if near in (0, _visible(order)) and far in (0, _visible(order[::-1]))
    ]


def _visible(line: Sequence[int]) -> int:
    seen = highest = 0
    for height in line:
        if height > highest:
            seen, highest = seen + 1, height
    return seen
