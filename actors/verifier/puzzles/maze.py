"""Mazes: a way from S to E between walls. Carved by random walks that turn back at dead ends, then some walls opened.

Any way counts, also a longer one; solved by breadth-first search.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
_WALL, _WAY = "#", "."
Cell = tuple[int, int]


class Maze(Task):
    """`grid` has rows of "#" (wall), "." (way), one "S" and one "E"."""

    name = "maze"

    _levels: ClassVar = [2, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    """Rooms along each side; walls between them are cells too."""

    def invent(self, draw: Draw, level: int) -> Data:
        rooms = self._levels[level - 1]
        size = 2 * rooms + 1
        grid = [[_WALL] * size for _ in range(size)]
        _carve(draw, grid, rooms)
        for _ in range(rooms // 2):
            r, c = 2 * draw.between(1, rooms - 1), 2 * draw.below(rooms) + 1
            grid[r][c] = _WAY
        (r, c), (y, x) = draw.sample([(r, c) for r in range(1, size, 2) for c in range(1, size, 2)], 2)
        grid[r][c], grid[y][x] = "S", "E"
        return {"grid": ["".join(row) for row in grid]}

    def describe(self, data: Data) -> str:
        grid = "\n".join(data["grid"])
        return (
            f"Find a way through this maze from S to E, cell by cell up, down, left and right, never onto a wall "
            f"(#).\n\n{grid}\n\nAnswer with the moves as letters U, D, L, R in order, for example DDRRU. The last "
            f"move must end on E."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        way = answers.moves(answer, "UDLR")
        if way is None:
            return False
        grid = data["grid"]
        r, c = _find(grid, "S")
        for move in way:
            down, right = _STEPS[move]
            r, c = r + down, c + right
            if not (0 <= r < len(grid) and 0 <= c < len(grid[0])) or grid[r][c] == _WALL:
                return False
        return bool(grid[r][c] == "E")

    def solve(self, data: Data) -> str:
        grid = data["grid"]
        begin, end = _find(grid, "S"), _find(grid, "E")
        came: dict[Cell, tuple[Cell, str]] = {begin: (begin, "")}
        queue = deque([begin])
        while queue and end not in came:
            r, c = cell = queue.popleft()
            for move, (down, right) in _STEPS.items():
                spot = (r + down, c + right)
                inside = 0 <= spot[0] < len(grid) and 0 <= spot[1] < len(grid[0])
                if inside and spot not in came and grid[spot[0]][spot[1]] != _WALL:
                    came[spot] = (cell, move)
                    queue.append(spot)
        if end not in came:
            raise unsolvable(self)
        way, cell = "", end
        while cell != begin:
            cell, move = came[cell]
            way = move + way
        return way

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One move too few, or one too many: both end beside E, or in a wall."""
        return answer[:-1] if draw.chance(0.5) else answer + draw.pick("UDLR")


def _carve(draw: Draw, grid: list[list[str]], rooms: int) -> None:
    trail = [(2 * draw.below(rooms) + 1, 2 * draw.below(rooms) + 1)]
    grid[trail[0][0]][trail[0][1]] = _WAY
    while trail:
        r, c = trail[-1]
        near = [(r + 2 * down, c + 2 * right) for down, right in _STEPS.values()]
        closed = [(y, x) for y, x in near if 0 < y < 2 * rooms and 0 < x < 2 * rooms and grid[y][x] == _WALL]
        if not closed:
            trail.pop()
            continue
        y, x = draw.pick(closed)
        grid[(r + y) // 2][(c + x) // 2] = grid[y][x] = _WAY
        trail.append((y, x))


def _find(grid: list[str], mark: str) -> Cell:
    return next((r, row.index(mark)) for r, row in enumerate(grid) if mark in row)
