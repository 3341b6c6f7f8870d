"""Propositional satisfiability: truth values that make one literal of every clause true.

A hidden assignment satisfies all clauses. Solved by DPLL: what a clause of one literal forces, then a guess for the
first literal of the shortest clause.
"""

from __future__ import annotations

from typing import ClassVar

from .answers import moves
from .draw import Draw
from .puzzle import Data, Task, unsolvable

Clauses = list[list[int]]
"""Literal v is variable v (1..n), -v its opposite."""


class Satisfiability(Task):
    name = "satisfiability"

    _levels: ClassVar = [(3, 6), (4, 10), (5, 14), (6, 18), (7, 22), (8, 28), (9, 34), (10, 40), (14, 57), (20, 82)]
    """Number of variables and of clauses of three."""

    def invent(self, draw: Draw, level: int) -> Data:
        count, num_clauses = self._levels[level - 1]
        hidden = [draw.chance(0.5) for _ in range(count)]
        clauses: Clauses = []
        while len(clauses) < num_clauses:
            variables = sorted(draw.sample(range(1, count + 1), 3))
            clause = [variable if draw.chance(0.5) else -variable for variable in variables]
            if any(hidden[abs(literal) - 1] == (literal > 0) for literal in clause):
                clauses.append(clause)
        return {"variables": count, "clauses": clauses}

    def describe(self, data: Data) -> str:
        clauses = "\n".join(
            " or ".join(f"x{literal}" if literal > 0 else f"not x{-literal}" for literal in clause)
            for clause in data["clauses"]
        )
        return (
            f"Find truth values of x1 to x{data['variables']} for which every one of these lines is "
            f"true:\n\n{clauses}\n\nAnswer with one letter for each variable in order, T for true and F for false, "
            f"for example {'TF' * (data['variables'] // 2)}{'T' * (data['variables'] % 2)}."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        values = moves(answer, "TF")
        if values is None or len(values) != data["variables"]:
            return False
        return all(any((values[abs(x) - 1] == "T") == (x > 0) for x in clause) for clause in data["clauses"])

    def solve(self, data: Data) -> str:
        true = _satisfy(data["clauses"], frozenset())
        if true is None:
            raise unsolvable(self)
        return "".join("T" if variable in true else "F" for variable in range(1, data["variables"] + 1))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """All literals of one clause become false."""
        values = list(answer)
        for literal in draw.pick(data["clauses"]):
            values[abs(literal) - 1] = "F" if literal > 0 else "T"
        return "".join(values)


def _satisfy(clauses: Clauses, true: frozenset[int]) -> frozenset[int] | None:
    """`true` with literals that make all `clauses` true; None if none do."""
    if not clauses:
        return true
    shortest = min(clauses, key=len)
    if not shortest:
        return None
    literal = shortest[0]
    for choice in (literal, -literal) if len(shortest) > 1 else (literal,):
        left = [[x for x in clause if x != -choice] for clause in clauses if choice not in clause]
        found = _satisfy(left, true | {choice})
        if found is not None:
            return found
    return None
