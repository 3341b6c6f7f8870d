"""Fills a grid of which each row and each column must be one of listed fillings.

A filling is one-hot: symbol s in cell c of the line is bit `c * symbols + s`, so that whether a line fits what its
crossing lines allow is one AND. Lines are narrowed by one another until nothing changes; then the row with the fewest
fillings left is tried, one after the other. Nonogram, kakurasu, binario, futoshiki and skyscrapers differ only in
what they list. Knows nothing of their rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import TypeAlias

Fillings: TypeAlias = list[int]


def one_hot(line: Iterable[int], symbols: int) -> int:
    """The filling whose cells hold the symbols `line`, each 0..symbols-1."""
    return sum(1 << (cell * symbols + symbol) for cell, symbol in enumerate(line))


def solutions(rows: Sequence[Fillings], columns: Sequence[Fillings], symbols: int) -> Iterator[list[list[int]]]:
    """Every grid whose rows and columns are among the fillings, as symbols [rows][columns]; in the order listed."""
    rows, columns = list(rows), list(columns)
    if not _narrow(rows, columns, symbols):
        return
    open_rows = [(len(fillings), r) for r, fillings in enumerate(rows) if len(fillings) > 1]
    if not open_rows:
        yield [_symbols(row, len(columns), symbols) for [row] in rows]
        return
    _, r = min(open_rows)
    for filling in rows[r]:
        yield from solutions([*rows[:r], [filling], *rows[r + 1 :]], columns, symbols)


def _narrow(rows: list[Fillings], columns: list[Fillings], symbols: int) -> bool:
    """Drops fillings that no crossing line allows. False if a line has none left."""
    before = -1
    while (left := sum(map(len, rows)) + sum(map(len, columns))) != before:
        before = left
        if not (_filter(columns, rows, symbols) and _filter(rows, columns, symbols)):
            return False
    return True


def _filter(lines: list[Fillings], crossing: list[Fillings], symbols: int) -> bool:
    cell = (1 << symbols) - 1
    unions = [reduce(or_, fillings, 0) for fillings in crossing]
    for i, fillings in enumerate(lines):
        allowed = sum((union >> i * symbols & cell) << j * symbols for j, union in enumerate(unions))
        lines[i] = [filling for filling in fillings if not filling & ~allowed]
        if not lines[i]:
            return False
    return True


def _symbols(filling: int, width: int, symbols: int) -> list[int]:
    cell = (1 << symbols) - 1
    return [(filling >> c * symbols & cell).bit_length() - 1 for c in range(width)]
