"""Sums whose digits are replaced by letters: SEND + MORE = MONEY, with two or three rows and made-up words.

Solved column by column from the right: the letters of a column are tried, its last letter follows from the carry.
"""

from __future__ import annotations

from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Cryptarithm(Task):
    name = "cryptarithm"

    _levels: ClassVar = [(2, 1), (2, 2), (2, 2), (2, 3), (3, 2), (2, 4), (3, 3), (2, 5), (3, 4), (3, 5)]
    """Number of addends, and of their digits."""

    def invent(self, draw: Draw, level: int) -> Data:
        count, digits = self._levels[level - 1]
        numbers = [draw.between(10 ** (digits - 1), 10**digits - 1) for _ in range(count)]
        letters = draw.sample(_LETTERS, 10)
        addends = [_encode(number, letters) for number in numbers]
        return {"addends": addends, "total": _encode(sum(numbers), letters)}

    def describe(self, data: Data) -> str:
        return (
            f"Each letter stands for a digit, different letters for different digits, and no number of more than one "
            f"digit begins with 0:\n\n{' + '.join(data['addends'])} = {data['total']}\n\nFind digits for which the sum "
            f"is right. Answer with all letters and their digits in this form: A=1, B=2."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        digits = answers.pairs(answer)
        words = [*data["addends"], data["total"]]
        if digits is None or digits.keys() != set("".join(words)) or len(set(digits.values())) != len(digits):
            return False
        if not all(len(digit) == 1 and digit in "0123456789" for digit in digits.values()):
            return False
        if any(len(word) > 1 and digits[word[0]] == "0" for word in words):
            return False
        *addends, total = (int("".join(digits[letter] for letter in word)) for word in words)
        return sum(addends) == total

    def solve(self, data: Data) -> str:
        found = _columns(data["addends"], data["total"], 0, 0, {})
        if found is None:
            raise unsolvable(self)
        return ", ".join(f"{letter}={digit}" for letter, digit in sorted(found.items()))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """Two letters share a digit, or one letter has none."""
        parts = answer.split(", ")
        if draw.chance(0.3):
            parts.remove(draw.pick(parts))
            return ", ".join(parts)
        first, second = draw.sample(range(len(parts)), 2)
        parts[first] = parts[first][:-1] + parts[second][-1]
        return ", ".join(parts)


def _encode(number: int, letters: list[str]) -> str:
    return "".join(letters[int(digit)] for digit in str(number))


def _columns(addends: list[str], total: str, column: int, carry: int, digits: dict[str, int]) -> dict[str, int] | None:
    """Digits for the columns from number `column` (0 is the last letter) on, or None."""
    if column == len(total):
        return digits if carry == 0 else None
    letters = [word[-1 - column] for word in addends if column < len(word)]
    for row in _fill(letters, addends, total, digits):
        carried, digit = divmod(sum(row[letter] for letter in letters) + carry, 10)
        letter = total[-1 - column]
        if letter not in row:
            if digit in row.values() or (digit == 0 and letter in _leading(addends, total)):
                continue
            row = {**row, letter: digit}
        elif row[letter] != digit:
            continue
        found = _columns(addends, total, column + 1, carried, row)
        if found is not None:
            return found
    return None


def _fill(letters: list[str], addends: list[str], total: str, digits: dict[str, int]) -> list[dict[str, int]]:
    """All ways to give digits to those of `letters` that have none yet."""
    filled = [digits]
    for letter in dict.fromkeys(letters):
        if letter in digits:
            continue
        lowest = 1 if letter in _leading(addends, total) else 0
        filled = [{**row, letter: d} for row in filled for d in range(lowest, 10) if d not in row.values()]
    return filled


def _leading(addends: list[str], total: str) -> set[str]:
    return {word[0] for word in (*addends, total) if len(word) > 1}
