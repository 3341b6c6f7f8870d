"""The 8-puzzle: slide tiles into the gap until they stand in order, within a number of moves.

Mixed up by a walk of the gap that never steps back at once; its length is the limit. Solved by A* with the distances
that tiles have to go, so with as few moves as can be.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_SIZE = 3
_GOAL = (1, 2, 3, 4, 5, 6, 7, 8, 0)
_BACK = {"U": "D", "D": "U", "L": "R", "R": "L"}
Board = tuple[int, ...]


class SlidingPuzzle(Task):
    """`board` is the tiles row by row, 0 is the gap; `limit` is the most moves allowed."""

    name = "sliding_puzzle"

    _levels: ClassVar = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]

    def invent(self, draw: Draw, level: int) -> Data:
        board: Board = _GOAL
        last, limit = "", self._levels[level - 1]
        while board == _GOAL:
            for _ in range(limit):
                move = draw.pick([move for move in "UDLR" if move != _BACK.get(last) and _slide(board, move)])
                board, last = _slide(board, move) or board, move
        return {"board": list(board), "limit": limit}

    def describe(self, data: Data) -> str:
        board, goal = _show(data["board"]), _show(_GOAL)
        return (
            f"The tiles of this sliding puzzle can be slid into the gap, written _:\n\n{board}\n\nBring them into "
            f"this order:\n\n{goal}\n\nYou may make at most {data['limit']} moves. Answer with the moves as letters "
            f"U, D, L, R in order, for example URRD. Each letter says where the gap goes: U changes it with the tile "
            f"above it, D with the one below, L with the one on its left, R with the one on its right."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        moves = answers.moves(answer, "UDLR")
        if moves is None or len(moves) > data["limit"]:
            return False
        board: Board = tuple(data["board"])
        for move in moves:
            after = _slide(board, move)
            if after is None:
                return False
            board = after
        return board == _GOAL

    def solve(self, data: Data) -> str:
        board: Board = tuple(data["board"])
        queue = [(_distance(board), board, "")]
        seen = set()
        while queue:
            _, board, way = heappop(queue)
            if board == _GOAL:
                return way
            if board in seen:
                continue
            seen.add(board)
            for move in "UDLR":
                after = _slide(board, move)
                if after is not None and after not in seen and len(way) < data["limit"]:
                    heappush(queue, (len(way) + 1 + _distance(after), after, way + move))
        raise unsolvable(self)

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One move too few or too many: each changes the board, so it is not in order."""
        return answer[:-1] if draw.chance(0.5) else answer + draw.pick("UDLR")


def _slide(board: Board, move: str) -> Board | None:
    """The board after the gap went up, down, left or right; None if it can't."""
    gap = board.index(0)
    row, column = divmod(gap, _SIZE)
    if (row, column)[move in "LR"] == (0 if move in "UL" else _SIZE - 1):
        return None
    other = gap + {"U": -_SIZE, "D": _SIZE, "L": -1, "R": 1}[move]
    tiles = list(board)
    tiles[gap], tiles[other] = tiles[other], 0
    return tuple(tiles)


def _distance(board: Board) -> int:
    """Rows and columns that tiles are away from their places, in sum."""
    return sum(
        abs(i // _SIZE - (tile - 1) // _SIZE) + abs(i % _SIZE - (tile - 1) % _SIZE)
        for i, tile in enumerate(board)
        if tile
    )


def _show(board: list[int] | Board) -> str:
    return "\n".join(" ".join(str(tile or "_") for tile in board[i : i + _SIZE]) for i in range(0, len(board), _SIZE))
