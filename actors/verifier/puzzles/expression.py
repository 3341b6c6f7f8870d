"""Sums of whole numbers as people write them: a tokeniser, a parser with caps, exact fractions. Nothing is evaluated.

    sum     = product { ("+" | "-") product }
    product = atom { ("*" | "/") atom }
    atom    = number | "(" sum ")"

No signs, powers, points or names. Knows nothing of the puzzles that use it.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 200
MAX_DEPTH = 16
MAX_DIGITS = 4

_TOKEN = re.compile(rf"[0-9]{{1,{MAX_DIGITS}}}(?![0-9])|[-+*/()]")


class _Refused(Exception):
    """The text is no expression of this grammar, or divides by zero."""


def value_of(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression and the numbers in it, in their order. None if it is none or has no value."""
    text = "".join(text.split(" "))
    tokens = _TOKEN.findall(text) if len(text) <= MAX_CHARS else []
    if not tokens or "".join(tokens) != text:
        return None
    parser = _Parser(tokens)
    try:
        value = parser.sum(0)
    except _Refused:
        return None
    return None if parser.tokens else (value, parser.numbers)


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self._next() in ("+", "-"):
            sign = self.tokens.pop()
            term = self._product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._atom(depth)
        while self._next() in ("*", "/"):
            sign = self.tokens.pop()
            factor = self._atom(depth)
            if sign == "/" and not factor:
                raise _Refused
            value = value * factor if sign == "*" else value / factor
        return value

    def _atom(self, depth: int) -> Fraction:
        token = self.tokens.pop() if self.tokens else ""
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(self.numbers[-1])
        if token != "(" or depth == MAX_DEPTH:
            raise _Refused
        value = self.sum(depth + 1)
        if not self.tokens or self.tokens.pop() != ")":
            raise _Refused
        return value

    def _next(self) -> str:
        return self.tokens[-1] if self.tokens else ""
