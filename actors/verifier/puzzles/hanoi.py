"""The tower of Hanoi from any legal position: all disks onto one peg, within a number of moves.

Solved by the recursion for a perfect position, which is optimal: to bring disk k to a peg, first bring all smaller ones
to the third peg, from the largest misplaced disk down. The limit is that number of moves, plus some slack.
"""

from __future__ import annotations

import re
from typing import ClassVar

from .draw import Draw
from .puzzle import Data, Task

_PEGS = "ABC"
_SEPARATOR = re.compile(r"[\s,;]+")
_MOVE = re.compile(r"([ABC])(?:->)?([ABC])")


class TowerOfHanoi(Task):
    """`position` holds the peg of each disk, the smallest first; all shall go to `target` within `limit` moves."""

    name = "tower_of_hanoi"

    _levels: ClassVar = [(2, 2), (3, 3), (3, 0), (4, 4), (4, 2), (4, 0), (5, 5), (5, 0), (6, 3), (6, 0)]
    """Number of disks, and moves allowed above the fewest possible."""

    def invent(self, draw: Draw, level: int) -> Data:
        disks, slack = self._levels[level - 1]
        target = draw.pick(_PEGS)
        position = [draw.pick(_PEGS) for _ in range(disks - 1)]
        position.append(draw.pick(_PEGS.replace(target, "")))
        return {"position": "".join(position), "target": target, "limit": len(_moves(position, target)) + slack}

    def describe(self, data: Data) -> str:
        position = data["position"]
        pegs = "\n".join(f"{peg}: {' '.join(map(str, disks)) or 'empty'}" for peg, disks in _stacks(position).items())
        return (
            f"The pegs A, B and C hold disks 1 (the smallest) to {len(position)}, written from the bottom "
            f"up:\n\n{pegs}\n\nBring all disks to peg {data['target']}, one at a time, taking only the top disk of a "
            f"peg and never putting a disk on a smaller one, in at most {data['limit']} moves. Answer with the moves "
            f"in order, from which peg to which, in this form: AC, AB, CB."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        moves = [_MOVE.fullmatch(move) for move in _SEPARATOR.split(answer.strip(" ,.;\n"))]
        if len(moves) > data["limit"]:
            return False
        position = data["position"]
        pegs = _stacks(position)
        for move in moves:
            if move is None or not pegs[move[1]]:
                return False
            disk, onto = pegs[move[1]].pop(), pegs[move[2]]
            if move[1] == move[2] or (onto and onto[-1] < disk):
                return False
            onto.append(disk)
        return len(pegs[data["target"]]) == len(position)

    def solve(self, data: Data) -> str:
        return ", ".join(_moves(list(data["position"]), data["target"]))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """The last move is missing, or done twice, or one move takes a disk from where it is put."""
        moves = answer.split(", ")
        kind = draw.below(3)
        if kind == 0:
            return ", ".join(moves[:-1])
        if kind == 1:
            return f"{answer}, {moves[-1][1]}{moves[-1][0]}"
        spot = draw.below(len(moves))
        moves[spot] = moves[spot][1] * 2
        return ", ".join(moves)


def _stacks(position: str) -> dict[str, list[int]]:
    """The disks on each peg, the lowest first."""
    return {peg: [disk for disk in range(len(position), 0, -1) if position[disk - 1] == peg] for peg in _PEGS}


def _moves(position: list[str], target: str) -> list[str]:
    """The fewest moves that bring the disks of `position` (smallest first) to `target`."""
    if not position:
        return []
    *smaller, peg = position
    if peg == target:
        return _moves(smaller, target)
    third = next(other for other in _PEGS if other not in (peg, target))
    return [*_moves(smaller, third), peg + target, *_moves([third] * len(smaller), target)]
