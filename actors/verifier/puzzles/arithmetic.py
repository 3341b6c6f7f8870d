"""Make a number out of numbers: the 24-point game (all of them used) and the countdown round (some of them used).

A 24-point puzzle is made backwards: 24 is split into two numbers that give it, one of these again, and so on. A
countdown round is made forwards: numbers are joined until one is left. So whole numbers always suffice. Solved
by listing what each subset can make, and looking up what the other part must be.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from . import expression
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_RIGHT_SIDE = re.compile(r"= ?([0-9]{1,6})$")
_FORM = "Use + - * / and parentheses only. Answer with the expression alone, for example (7 - 3) * 6."


class _Arithmetic(Task):
    all_used: ClassVar[bool]

    def accepts(self, data: Data, answer: str) -> bool:
        right_side = _RIGHT_SIDE.search(answer)
        if right_side is not None:
            if int(right_side[1]) != data["target"]:
                return False
            answer = answer[: right_side.start()]
        found = expression.value_of(answer)
        if found is None or found[0] != data["target"]:
            return False
        used: Counter[int] = Counter(found[1])
        given: Counter[int] = Counter(data["numbers"])
        return used == given if self.all_used else used <= given

    def solve(self, data: Data) -> str:
        found = _make(data["numbers"], data["target"], all_used=self.all_used)
        if found is None:
            raise unsolvable(self)
        return found

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One number becomes one that was not given; or one more that was not given is multiplied in."""
        spans = [match.span() for match in re.finditer("[0-9]+", answer)]
        foreign = max(data["numbers"]) + draw.between(1, 3)
        if draw.chance(0.3):
            return f"({answer}) * {foreign} / {foreign}"
        start, end = draw.pick(spans)
        return f"{answer[:start]}{foreign}{answer[end:]}"


class TwentyFour(_Arithmetic):
    """24 out of four, then five numbers, each used once."""

    name = "twenty_four"
    all_used = True

    _levels: ClassVar = [(4, 6), (4, 8), (4, 9), (4, 10), (4, 11), (4, 13), (5, 10), (5, 13), (5, 16), (5, 20)]

    def invent(self, draw: Draw, level: int) -> Data:
        count, largest = self._levels[level - 1]
        return {"numbers": draw.shuffled(_split_up(draw, 24, count, largest)), "target": 24}

    def describe(self, data: Data) -> str:
        numbers = ", ".join(map(str, data["numbers"]))
        return (
            f"Make {data['target']} out of the numbers {numbers}. Use each of them exactly once, with fractions in "
            f"between if you like. {_FORM}"
        )


class Countdown(_Arithmetic):
    """A number up to 999 out of three to five numbers, each used at most once."""

    name = "countdown"
    all_used = False

    _levels: ClassVar = [
        (3, 30, 12), (3, 60, 15), (3, 99, 25), (4, 99, 25), (4, 150, 25), (4, 300, 50),
        (5, 150, 25), (5, 300, 50), (5, 600, 75), (5, 999, 99),
    ]  # fmt: skip

    def invent(self, draw: Draw, level: int) -> Data:
        count, highest, largest = self._levels[level - 1]
        while True:
            numbers = [draw.between(1, largest) for _ in range(count)]
            target = _join(draw, numbers[draw.below(2) :])
            if 10 <= target <= highest and target not in numbers:
                return {"numbers": numbers, "target": target}

    def describe(self, data: Data) -> str:
        numbers = ", ".join(map(str, data["numbers"]))
        return f"Make {data['target']} out of some of the numbers {numbers}. Use each of them at most once. {_FORM}"


def _join(draw: Draw, numbers: list[int]) -> int:
    """What `numbers` make, joined in random order by operations that keep them whole and positive."""
    value, *rest = draw.shuffled(numbers)
    for other in rest:
        high, low = max(value, other), min(value, other)
        value = draw.pick([high + low, high - low or high + low, high * low, high * low if high % low else high // low])
    return value


def _split_up(draw: Draw, target: int, count: int, largest: int) -> list[int]:
    """`count` numbers of 1..largest that make `target`."""
    parts = [target]
    while len(parts) < count or max(parts) > largest:
        if len(parts) == count:
            parts = [target]
        widest = parts.index(max(parts))
        parts += _split(draw, parts.pop(widest if parts[widest] > largest else draw.below(len(parts))), largest)
    return parts


def _split(draw: Draw, value: int, largest: int) -> tuple[int, int]:
    """Two numbers, the second one of 1..largest, whose sum, difference, product or quotient is `value`."""
    kind, other = draw.below(7), draw.between(1, largest)
    factors = [f for f in range(2, min(value, largest) + 1) if value % f == 0] if 2 <= kind < 5 else []
    if factors:
        other = draw.pick(factors)
        return value // other, other
    if kind < 2 and other < value:
        return value - other, other
    if kind == 5 and value * other <= 2 * largest:
        return value * other, other
    return value + other, other


def _make(numbers: list[int], target: int, *, all_used: bool) -> str | None:
    """An expression of `numbers` that makes `target` with whole numbers in between; small subsets first."""
    full = (1 << len(numbers)) - 1
    made: dict[int, dict[int, str]] = {}
    for subset in sorted(range(1, full + 1), key=int.bit_count):
        if subset == full or not all_used:
            found = _look_up(numbers, made, subset, target)
            if found is not None:
                return found
        if subset != full:
            made[subset] = _combine(numbers, made, subset)
    return None


def _parts(subset: int) -> Iterator[tuple[int, int]]:
    """Each way to cut `subset` in two, once."""
    part = (subset - 1) & subset
    while part > subset ^ part:
        yield part, subset ^ part
        part = (part - 1) & subset


def _single(numbers: list[int], subset: int) -> dict[int, str] | None:
    if subset & (subset - 1):
        return None
    number = numbers[subset.bit_length() - 1]
    return {number: str(number)}


def _combine(numbers: list[int], made: dict[int, dict[int, str]], subset: int) -> dict[int, str]:
    """All positive whole numbers that the whole of `subset` makes, each with one expression."""
    single = _single(numbers, subset)
    if single is not None:
        return single
    found: dict[int, str] = {}
    for left, right in _parts(subset):
        for a, x in made[left].items():
            for b, y in made[right].items():
                if a < b:
                    high, low, p, q = b, a, y, x
                else:
                    high, low, p, q = a, b, x, y
                found[high + low] = f"({p} + {q})"
                found[high * low] = f"({p} * {q})"
                if high != low:
                    found[high - low] = f"({p} - {q})"
                if high % low == 0:
                    found[high // low] = f"({p} / {q})"
    return found


def _look_up(numbers: list[int], made: dict[int, dict[int, str]], subset: int, target: int) -> str | None:
    """An expression of the whole of `subset` for `target`: for each value of one part, the other part's is known."""
    single = _single(numbers, subset)
    if single is not None:
        return single.get(target)
    for left, right in _parts(subset):
        for a, x in made[left].items():
            others = made[right]
            if (y := others.get(target - a)) is not None:
                return f"{x} + {y}"
            if (y := others.get(a - target)) is not None:
                return f"{x} - {y}"
            if (y := others.get(a + target)) is not None:
                return f"{y} - {x}"
            if target % a == 0 and (y := others.get(target // a)) is not None:
                return f"{x} * {y}"
            if a % target == 0 and (y := others.get(a // target)) is not None:
                return f"{x} / {y}"
            if (y := others.get(a * target)) is not None:
                return f"{y} / {x}"
    return None
