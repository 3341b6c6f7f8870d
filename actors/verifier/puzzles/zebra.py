"""Zebra puzzles (Einstein's riddle): who lives where, with what, by clues about houses in a row.

    clue = ["at", item, house] | ["same" | "next" | "left" | "before", item, item]      item = [category, value]

A solution is drawn, then clues that are true of it, until a search finds no other arrangement: each clue added is one
that the other arrangement breaks, if possible no weak one ("before"). Then every clue that the rest makes needless is
taken out. Solved by narrowing, for each item, the set of houses where it can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_CATEGORIES = (
    ("colour", ("red", "green", "blue", "white", "yellow")),
    ("pet", ("cat", "dog", "fish", "horse", "zebra")),
    ("drink", ("tea", "milk", "water", "juice", "coffee")),
    ("job", ("baker", "doctor", "pilot", "singer", "tailor")),
    ("fruit", ("apple", "pear", "plum", "cherry", "grape")),
)
_SPOKEN = {
    "same": "The house with {} is the house with {}.",
    "next": "The house with {} is next to the house with {}.",
    "left": "The house with {} is directly left of the house with {}.",
    "before": "The house with {} is somewhere left of the house with {}.",
}
Clue = list[Any]
Rooms = list[int]
"""For item category * houses + value, the houses where it can be, as bits (bit 0 is the leftmost)."""


class Zebra(Task):
    """`categories` are [name, values] with a value for each house."""

    name = "zebra"

    _levels: ClassVar = [(2, 2), (3, 2), (3, 3), (4, 2), (3, 4), (4, 3), (4, 4), (5, 3), (5, 4), (5, 5)]
    """Houses and categories."""

    def invent(self, draw: Draw, level: int) -> Data:
        houses, count = self._levels[level - 1]
        categories = [[name, draw.sample(values, houses)] for name, values in draw.sample(_CATEGORIES, count)]
        places = [place for _ in categories for place in draw.shuffled(range(houses))]
        pool = sorted(draw.shuffled(_true_clues(places, houses)), key=lambda clue: bool(clue[0] == "before"))

        def another(clues: list[Clue]) -> list[int] | None:
            """An arrangement besides the hidden one for which `clues` hold."""
            return next((found for found in _arrangements(clues, houses, count) if found != places), None)

        clues: list[Clue] = []
        while (other := another(clues)) is not None:
            clues.append(next(clue for clue in pool if not _true(clue, other, houses)))
        for clue in list(clues):
            rest = [kept for kept in clues if kept is not clue]
            if another(rest) is None:
                clues = rest
        return {"categories": categories, "clues": clues}

    def describe(self, data: Data) -> str:
        categories = data["categories"]
        houses = len(categories[0][1])

        def say(item: list[int]) -> str:
            name, values = categories[item[0]]
            return f"{name} {values[item[1]]}"

        lines = [
            f"The house with {say(clue[1])} is number {clue[2] + 1}."
            if clue[0] == "at"
            else _SPOKEN[clue[0]].format(say(clue[1]), say(clue[2]))
            for clue in data["clues"]
        ]
        kinds = "\n".join(f"{name}: {', '.join(sorted(values))}" for name, values in categories)
        clues = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
        return (
            f"{houses} houses stand in a row, numbered from left to right. Each has one of each of these, and no two "
            f"the same:\n\n{kinds}\n\n{clues}\n\nWhich house has what? Answer with a line for each house from left to "
            f"right, with its {', '.join(name for name, _ in categories)}, in this order, separated by blanks."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        categories = data["categories"]
        houses = len(categories[0][1])
        rows = answers.words(answer.lower(), houses, len(categories))
        if rows is None:
            return False
        places = []
        for (_, values), column in zip(categories, zip(*rows, strict=True), strict=True):
            if sorted(column) != sorted(values):
                return False
            places += [column.index(value) for value in values]
        return all(_true(clue, places, houses) for clue in data["clues"])

    def solve(self, data: Data) -> str:
        categories = data["categories"]
        houses = len(categories[0][1])
        places = next(_arrangements(data["clues"], houses, len(categories)), None)
        if places is None:
            raise unsolvable(self)
        rows = [[""] * len(categories) for _ in range(houses)]
        for item, place in enumerate(places):
            category, value = divmod(item, houses)
            rows[place][category] = categories[category][1][value]
        return "\n".join(map(" ".join, rows))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """Two houses change something: the solution was the only one."""
        rows = [line.split() for line in answer.splitlines()]
        (first, second), category = draw.sample(rows, 2), draw.below(len(rows[0]))
        first[category], second[category] = second[category], first[category]
        return "\n".join(map(" ".join, rows))


def _true_clues(places: list[int], houses: int) -> Iterator[Clue]:
    """All clues that hold if item i is in house places[i]; "at" seldom, since it gives most away."""
    items = [list(divmod(i, houses)) for i in range(len(places))]
    for i, here in enumerate(places):
        if (i + here) % 3 == 0:
            yield ["at", items[i], here]
        for j, there in enumerate(places):
            if i // houses == j // houses and not here < there:
                continue
            if here == there and i < j:
                yield ["same", items[i], items[j]]
            if abs(here - there) == 1 and i < j:
                yield ["next", items[i], items[j]]
            if here + 1 == there:
                yield ["left", items[i], items[j]]
            if here < there:
                yield ["before", items[i], items[j]]


def _true(clue: Clue, places: list[int], houses: int) -> bool:
    kind, (category, value), other = clue
    here: int = places[category * houses + value]
    if kind == "at":
        return bool(here == other)
    there: int = places[other[0] * houses + other[1]]
    if kind == "same":
        return here == there
    if kind == "next":
        return abs(here - there) == 1
    return here + 1 == there if kind == "left" else here < there


def _arrangements(clues: list[Clue], houses: int, count: int) -> Iterator[list[int]]:
    """Every arrangement for which all clues hold, as the house of each item."""
    every = (1 << houses) - 1
    rooms = [every] * (houses * count)
    links = []
    for kind, (category, value), other in clues:
        if kind == "at":
            rooms[category * houses + value] &= 1 << other
        else:
            links.append((kind, category * houses + value, other[0] * houses + other[1]))
    yield from _search(rooms, links, houses)


def _search(rooms: Rooms, links: list[tuple[str, int, int]], houses: int) -> Iterator[list[int]]:
    if not _narrow(rooms, links, houses):
        return
    open_items = [(room.bit_count(), item) for item, room in enumerate(rooms) if room & (room - 1)]
    if not open_items:
        yield [room.bit_length() - 1 for room in rooms]
        return
    _, item = min(open_items)
    for house in range(houses):
        if rooms[item] >> house & 1:
            yield from _search([*rooms[:item], 1 << house, *rooms[item + 1 :]], links, houses)


def _narrow(rooms: Rooms, links: list[tuple[str, int, int]], houses: int) -> bool:
    """Drops houses that a clue or another item rules out. False if an item has none left."""
    every, before = (1 << houses) - 1, None
    while before != rooms:
        before = list(rooms)
        for kind, a, b in links:
            x, y = rooms[a], rooms[b]
            if kind == "same":
                rooms[a] = rooms[b] = x & y
            elif kind == "next":
                rooms[a], rooms[b] = x & (y << 1 | y >> 1), y & (x << 1 | x >> 1)
            elif kind == "left":
                rooms[a], rooms[b] = x & y >> 1, y & x << 1
            else:
                rooms[a] = x & ((1 << max(y.bit_length() - 1, 0)) - 1)
                rooms[b] = y & every & -(2 * (x & -x)) if x else 0
        for start in range(0, len(rooms), houses):
            _keep_apart(rooms, start, houses)
        if not all(rooms):
            return False
    return True


def _keep_apart(rooms: Rooms, start: int, houses: int) -> None:
    """An item that has one house takes it from the others of its category; one that alone may have a house gets it."""
    span = range(start, start + houses)
    for item in span:
        room = rooms[item]
        if room & (room - 1) == 0:
            for other in span:
                if other != item:
                    rooms[other] &= ~room
    once = twice = 0
    for item in span:
        twice |= once & rooms[item]
        once |= rooms[item]
    for item in span:
        alone = rooms[item] & once & ~twice
        if alone:
            rooms[item] = alone if alone & (alone - 1) == 0 else 0
