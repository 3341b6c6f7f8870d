"""Knights and knaves: everybody says something, knights what is true, knaves what is false. Who is which?

    claim = ["knight", i, yes] | ["same", i, j] | ["count", k] | ["and" | "or" | "if", claim, claim]

People are numbers; ["knight", i, false] says that i is a knave. A puzzle has one solution. It is found with truth
tables: bit w of a whole number is a claim's truth in world w, in which person i is a knight if bit i of w is set.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_KINDS = ("knave", "knight")
Claim = list[Any]


class KnightsAndKnaves(Task):
    """`claims` has one claim for each person."""

    name = "knights_and_knaves"

    _levels: ClassVar = [
        (2, 0.0),
        (3, 0.0),
        (3, 0.3),
        (4, 0.2),
        (4, 0.5),
        (5, 0.3),
        (5, 0.6),
        (6, 0.5),
        (7, 0.6),
        (8, 0.7),
    ]
    """Number of people, share of claims that are compound."""

    def invent(self, draw: Draw, level: int) -> Data:
        count, compound = self._levels[level - 1]
        world = draw.below(1 << count)
        claims = [_claim_of(draw, i, world, count, compound) for i in range(count)]
        while _worlds(claims) != 1 << world:
            i = draw.below(count)
            claims[i] = _claim_of(draw, i, world, count, compound)
        return {"claims": claims}

    def describe(self, data: Data) -> str:
        names = _NAMES[: len(data["claims"])]
        spoken = "\n".join(f"{name} says: {_say(claim)}." for name, claim in zip(names, data["claims"], strict=True))
        return (
            f"On an island everybody is either a knight, who always tells the truth, or a knave, who always lies. You "
            f"meet {', '.join(names)}.\n\n{spoken}\n\nWho is what? Answer with all names in this form: Ada=knight, "
            f"Ben=knave."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        kinds = answers.pairs(answer.lower())
        names = [name.lower() for name in _NAMES[: len(data["claims"])]]
        if kinds is None or kinds.keys() != set(names) or not set(kinds.values()) <= set(_KINDS):
            return False
        knights = [kinds[name] == "knight" for name in names]
        return all(_holds(claim, knights) == knights[i] for i, claim in enumerate(data["claims"]))

    def solve(self, data: Data) -> str:
        worlds = _worlds(data["claims"])
        if not worlds:
            raise unsolvable(self)
        world = (worlds & -worlds).bit_length() - 1
        return ", ".join(f"{_NAMES[i]}={_KINDS[world >> i & 1]}" for i in range(len(data["claims"])))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One person turns: the solution was the only one."""
        parts = answer.split(", ")
        spot = draw.below(len(parts))
        name, _, kind = parts[spot].partition("=")
        parts[spot] = f"{name}={_KINDS[kind == 'knave']}"
        return ", ".join(parts)


def _claim_of(draw: Draw, person: int, world: int, count: int, compound: float) -> Claim:
    """A claim that `person` can make in `world`: true if a knight, else false."""
    while True:
        claim = _claim(draw, person, count, compound)
        if (_truth(claim, count) >> world & 1) == (world >> person & 1):
            return claim


def _claim(draw: Draw, person: int, count: int, compound: float) -> Claim:
    if draw.chance(compound):
        return [draw.pick(("and", "or", "if")), _claim(draw, person, count, 0), _claim(draw, person, count, 0)]
    kind = draw.below(5)
    if kind == 0:
        return ["count", draw.between(0, count)]
    if kind == 1:
        return ["same", *sorted(draw.sample(range(count), 2))]
    return ["knight", draw.pick([i for i in range(count) if i != person]), draw.chance(0.5)]


def _holds(claim: Claim, knights: list[bool]) -> bool:
    """Whether a claim is true, if these are the knights."""
    match claim:
        case ["knight", person, yes]:
            return knights[person] == bool(yes)
        case ["same", a, b]:
            return knights[a] == knights[b]
        case ["count", count]:
            return bool(sum(knights) == count)
        case ["and", a, b]:
            return _holds(a, knights) and _holds(b, knights)
        case ["or", a, b]:
            return _holds(a, knights) or _holds(b, knights)
        case ["if", a, b]:
            return _holds(b, knights) or not _holds(a, knights)
    raise ValueError(f"no claim: {claim!r}; see the grammar at the top of knights.py")


@lru_cache(maxsize=64)
def _table(count: int, person: int) -> int:
    """The worlds in which `person` is a knight."""
    return sum(1 << world for world in range(1 << count) if world >> person & 1)


def _truth(claim: Claim, count: int) -> int:
    """The worlds in which a claim is true."""
    every = (1 << (1 << count)) - 1
    match claim:
        case ["knight", person, yes]:
            return _table(count, person) ^ (0 if yes else every)
        case ["same", a, b]:
            return every ^ _table(count, a) ^ _table(count, b)
        case ["count", number]:
            return sum(1 << world for world in range(1 << count) if world.bit_count() == number)
        case ["and", a, b]:
            return _truth(a, count) & _truth(b, count)
        case ["or", a, b]:
            return _truth(a, count) | _truth(b, count)
        case ["if", a, b]:
            return _truth(b, count) | (every ^ _truth(a, count))
    raise ValueError(f"no claim: {claim!r}; see the grammar at the top of knights.py")


def _worlds(claims: list[Claim]) -> int:
    """The worlds in which everybody keeps to the rule."""
    count = len(claims)
    left = (1 << (1 << count)) - 1
    for i, claim in enumerate(claims):
        left &= ~(_table(count, i) ^ _truth(claim, count))
    return left


def _say(claim: Claim) -> str:
    match claim:
        case ["knight", person, yes]:
            return f"{_NAMES[person]} is a {_KINDS[yes]}"
        case ["same", a, b]:
            return f"{_NAMES[a]} and {_NAMES[b]} are of the same kind"
        case ["count", count]:
            return f"exactly {count} of us {'is a knight' if count == 1 else 'are knights'}"
        case ["if", a, b]:
            return f"if {_say(a)}, then {_say(b)}"
        case [word, a, b]:
            return f"{_say(a)}, {word} {_say(b)}"
    raise ValueError(f"no claim: {claim!r}; see the grammar at the top of knights.py")
