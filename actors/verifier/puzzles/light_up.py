"""Light up (akari): bulbs that light all white cells, none shining on another, as many beside a wall as it says.

A hidden solution places bulbs in random order wherever it is dark, then some walls say what they see. Solved by search
over bit sets, the dark cell with the fewest places for its bulb first.
"""

from __future__ import annotations

from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_BULB, _WHITE, _WALL = "*", ".", "#"


class LightUp(Task):
    """`grid` has rows of "." (white), "#" (wall) and "0".."4" (wall with a number)."""

    name = "light_up"

    _levels: ClassVar = [
        (3, 0.2, 0.8), (4, 0.2, 0.8), (4, 0.2, 0.6), (5, 0.2, 0.8), (5, 0.2, 0.6),
        (6, 0.2, 0.8), (7, 0.2, 0.8), (8, 0.2, 0.7), (9, 0.2, 0.7), (10, 0.2, 0.7),
    ]  # fmt: skip
    """Size, share of walls, share of the walls that have a number."""

    def invent(self, draw: Draw, level: int) -> Data:
        size, walls, numbered = self._levels[level - 1]
        grid = [[_WALL if draw.chance(walls) else _WHITE for _ in range(size)] for _ in range(size)]
        grid[draw.below(size)][draw.below(size)] = _WHITE
        field = _Field(["".join(row) for row in grid])
        bulbs = lit = 0
        for cell in draw.shuffled(field.sees):
            if not lit >> cell & 1:
                bulbs |= 1 << cell
                lit |= field.sees[cell]
        for r, c in field.walls:
            if draw.chance(numbered):
                grid[r][c] = str((field.beside(r, c) & bulbs).bit_count())
        return {"grid": ["".join(row) for row in grid]}

    def describe(self, data: Data) -> str:
        grid = "\n".join(data["grid"])
        return (
            f"Place light bulbs on white cells of this grid. A bulb lights its own cell and all cells in its row and "
            f"column up to the next wall. Every white cell must be lit, no bulb may be lit by another bulb, and a "
            f"wall with a number has exactly so many bulbs above, below, left and right of it. White cells are "
            f"written . and walls # or their number.\n\n{grid}\n\nAnswer with the same grid, a line for each row, "
            f"with * for each bulb."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        grid = data["grid"]
        rows = answers.cells(answer, len(grid), len(grid[0]), "*.#01234")
        if rows is None:
            return False
        for was, row in zip(grid, rows, strict=True):
            if was != row.replace(_BULB, _WHITE):
                return False
        return _all_lit_once(rows) and _walls_agree(rows)

    def solve(self, data: Data) -> str:
        grid = data["grid"]
        field = _Field(grid)
        needs = [(field.beside(r, c), int(grid[r][c])) for r, c in field.walls if grid[r][c] != _WALL]
        white = sum(1 << cell for cell in field.sees)
        bulbs = _search(field.sees, needs, 0, white, white)
        if bulbs is None:
            raise unsolvable(self)
        width = len(grid[0])
        return "\n".join(
            "".join(_BULB if bulbs >> r * width + c & 1 else symbol for c, symbol in enumerate(row))
            for r, row in enumerate(grid)
        )

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """A bulb is taken away, and its own cell is dark; or one is put where it is lit already, if there is room."""
        symbols = list(answer)
        wanted = _WHITE if _WHITE in answer and draw.chance(0.5) else _BULB
        spot = draw.pick([i for i, symbol in enumerate(symbols) if symbol == wanted])
        symbols[spot] = _BULB if wanted == _WHITE else _WHITE
        return "".join(symbols)


def _all_lit_once(rows: list[str]) -> bool:
    """Every white cell sees a bulb along its row or column or has one, and no two bulbs see each other."""
    lit = [[False] * len(rows[0]) for _ in rows]
    across = [[(r, c) for c in range(len(rows[0]))] for r in range(len(rows))]
    for line in (*across, *zip(*across, strict=True)):
        start = 0
        for end in range(len(line) + 1):
            if end < len(line) and rows[line[end][0]][line[end][1]] in "*.":
                continue
            run, start = line[start:end], end + 1
            bulbs = sum(rows[r][c] == _BULB for r, c in run)
            if bulbs > 1:
                return False
            for r, c in run if bulbs else ():
                lit[r][c] = True
    return all(
        is_lit or symbol not in "*."
        for on, row in zip(lit, rows, strict=True)
        for is_lit, symbol in zip(on, row, strict=True)
    )


def _walls_agree(rows: list[str]) -> bool:
    for r, row in enumerate(rows):
        for c, symbol in enumerate(row):
            if symbol.isdigit():
                above = rows[r - 1][c] if r else ""
                below = rows[r + 1][c] if r + 1 < len(rows) else ""
                if (above + below + row[max(c - 1, 0) : c] + row[c + 1 : c + 2]).count(_BULB) != int(symbol):
                    return False
    return True


class _Field:
    """Bit sets of a grid's cells; cell (r, c) is bit r * width + c."""

    def __init__(self, grid: list[str]) -> None:
        self.height, self.width = len(grid), len(grid[0])
        self.walls = [(r, c) for r, row in enumerate(grid) for c, symbol in enumerate(row) if symbol != _WHITE]
        self.sees: dict[int, int] = {}
        """white cell -> the cells that a bulb there lights"""
        for r, row in enumerate(grid):
            for c, symbol in enumerate(row):
                if symbol == _WHITE:
                    self.sees[r * self.width + c] = self._light(grid, r, c)

    def _light(self, grid: list[str], r: int, c: int) -> int:
        lit = 1 << r * self.width + c
        for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            y, x = r + down, c + right
            while 0 <= y < self.height and 0 <= x < self.width and grid[y][x] == _WHITE:
                lit |= 1 << y * self.width + x
                y, x = y + down, x + right
        return lit

    def beside(self, r: int, c: int) -> int:
        """The white cells next to a wall."""
        near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
        cells = [y * self.width + x for y, x in near if 0 <= y < self.height and 0 <= x < self.width]
        return sum(1 << cell for cell in cells if cell in self.sees)


def _search(sees: dict[int, int], needs: list[tuple[int, int]], bulbs: int, free: int, dark: int) -> int | None:
    """Bulbs that complete `bulbs`: more of them on cells of `free` only, until nothing of `dark` is left."""
    fewest, options = 999, 0
    for near, count in needs:
        missing, spots = count - (near & bulbs).bit_count(), near & free
        if missing < 0 or missing > spots.bit_count():
            return None
        if missing == 0:
            free &= ~spots
        elif missing == spots.bit_count():
            fewest, options = 0, spots & -spots
    if fewest:
        rest = dark
        while rest:
            bit = rest & -rest
            rest ^= bit
            spots = sees[bit.bit_length() - 1] & free
            if spots.bit_count() < fewest:
                fewest, options = spots.bit_count(), spots
        if fewest == 0:
            return None
    if not dark:
        return bulbs if all((near & bulbs).bit_count() == count for near, count in needs) else None
    while options:
        bit = options & -options
        options ^= bit
        light = sees[bit.bit_length() - 1]
        found = _search(sees, needs, bulbs | bit, free & ~light, dark & ~light)
        if found is not None:
            return found
        free &= ~bit
    return None
