"""Star battle: one star in each row, each column and each region, no two of them touching, not even at corners.

Regions grow from the stars of a hidden solution. Solved as an exact cover with neighbours barred: the row, column or
region with the fewest free cells is tried first.
"""

from __future__ import annotations

from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_STAR, _NONE = "*", "."
_LETTERS = "ABCDEFGHIJKL"


class StarBattle(Task):
    """`regions` has rows of letters, one for each region."""

    name = "star_battle"

    _levels: ClassVar = [4, 5, 5, 6, 6, 7, 7, 8, 9, 10]

    def invent(self, draw: Draw, level: int) -> Data:
        size = self._levels[level - 1]
        columns = _stars(draw, size, [])
        assert columns is not None
        region = {(r, c): _LETTERS[r] for r, c in enumerate(columns)}
        edge = list(region)
        while edge:
            r, c = cell = edge[draw.below(len(edge))]
            free = [spot for spot in _sides(r, c, size) if spot not in region]
            if not free:
                edge.remove(cell)
                continue
            spot = draw.pick(free)
            region[spot] = region[cell]
            edge.append(spot)
        return {"regions": ["".join(region[r, c] for c in range(size)) for r in range(size)]}

    def describe(self, data: Data) -> str:
        size = len(data["regions"])
        grid = "\n".join(data["regions"])
        return (
            f"Place stars on this {size} x {size} grid so that each row, each column and each region has exactly one "
            f"star, and no two stars touch, not even diagonally. Cells with the same letter are one region.\n\n{grid}"
            f"\n\nAnswer with the grid, a line of {size} characters for each row: * for a star, . for none."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        regions, size = data["regions"], len(data["regions"])
        rows = answers.cells(answer, size, size, "*.")
        if rows is None or any(row.count(_STAR) != 1 for row in rows):
            return False
        columns = [row.index(_STAR) for row in rows]
        return (
            len(set(columns)) == size
            and len({regions[r][c] for r, c in enumerate(columns)}) == size
            and all(abs(columns[r] - columns[r + 1]) > 1 for r in range(size - 1))
        )

    def solve(self, data: Data) -> str:
        regions, size = data["regions"], len(data["regions"])
        cells = range(size * size)
        houses = [sum(1 << i for i in cells if i // size == r) for r in range(size)]
        houses += [sum(1 << i for i in cells if i % size == c) for c in range(size)]
        letters = "".join(regions)
        houses += [sum(1 << i for i in cells if letters[i] == letter) for letter in sorted(set(letters))]
        barred = [
            sum(1 << j for j in cells if max(abs(i // size - j // size), abs(i % size - j % size)) <= 1) for i in cells
        ]
        found = _cover(houses, barred, (1 << size * size) - 1)
        if found is None:
            raise unsolvable(self)
        return "\n".join("".join(_STAR if r * size + c in found else _NONE for c in range(size)) for r in range(size))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """A star moves within its row, into another star's column; or one is lost; or there is one too many."""
        rows = [list(row) for row in answer.splitlines()]
        row = draw.pick(rows)
        star = row.index(_STAR)
        kind, other = draw.below(3), draw.pick([c for c in range(len(row)) if c != star])
        if kind != 0:
            row[star] = _NONE
        if kind != 1:
            row[other] = _STAR
        return "\n".join(map("".join, rows))


def _stars(draw: Draw, size: int, columns: list[int]) -> list[int] | None:
    """A column for the star of each row, after those of `columns`."""
    if len(columns) == size:
        return columns
    for column in draw.shuffled(range(size)):
        if column not in columns and (not columns or abs(column - columns[-1]) > 1):
            found = _stars(draw, size, [*columns, column])
            if found is not None:
                return found
    return None


def _sides(r: int, c: int, size: int) -> list[tuple[int, int]]:
    near = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
    return [(y, x) for y, x in near if 0 <= y < size and 0 <= x < size]


def _cover(houses: list[int], barred: list[int], free: int) -> set[int] | None:
    """Cells for stars among the bits of `free`: one in each of `houses`, none barred by another."""
    if not houses:
        return set()
    house = min(houses, key=lambda house: (house & free).bit_count())
    options = house & free
    while options:
        bit = options & -options
        options ^= bit
        cell = bit.bit_length() - 1
        taken = barred[cell]
        for other in houses:
            if other & bit:
                taken |= other
        found = _cover([other for other in houses if not other & bit], barred, free & ~taken)
        if found is not None:
            return found | {cell}
    return None
