"""A second opinion on answers to puzzles, written apart from the suite and by other means, for its tests and benchmark.

`right(task, data, answer)` takes the bare answer in the solver's own notation; what it can't read is wrong. It knows
the rules from the prompts, imports nothing of the suite, and takes arrays, matrices and sets where that takes texts and
bits. Holds no tests.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, groupby, pairwise
from typing import Any

import numpy as np

Data = dict[str, Any]

_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def right(task: str, data: Data, answer: str) -> bool:
    """Whether `answer` solves the puzzle."""
    try:
        return bool(_RULES[task](data, answer))
    except (ValueError, IndexError, KeyError, ZeroDivisionError, SyntaxError):
        return False


def _symbols(answer: str) -> np.ndarray:
    rows = [list(row.replace(" ", "")) for row in answer.split("\n")]
    return np.array(rows)  # Rows of other lengths: ValueError.


def _numbers(answer: str) -> np.ndarray:
    return np.array([[int(word) for word in row.split()] for row in answer.split("\n")])


def _keeps(given: np.ndarray, cells: np.ndarray, blank: object) -> bool:
    return given.shape == cells.shape and bool(((given == blank) | (given == cells)).all())


def _permutations(lines: np.ndarray, symbols: range) -> bool:
    return all(sorted(line) == list(symbols) for line in lines.tolist())


def _calculation(data: Data, answer: str, *, all_used: bool) -> bool:
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError(node)

    found = value(ast.parse(answer, mode="eval").body)
    missing, foreign = Counter(data["numbers"]) - Counter(used), Counter(used) - Counter(data["numbers"])
    return found == data["target"] and not foreign and not (all_used and missing)


def _cryptarithm(data: Data, answer: str) -> bool:
    digits = {name: int(digit) for name, digit in (part.split("=") for part in answer.split(", "))}
    words = [*data["addends"], data["total"]]
    *addends, total = (sum(digits[letter] * 10**i for i, letter in enumerate(reversed(word))) for word in words)
    leads = all(digits[word[0]] for word in words)
    return leads and set(digits) == set("".join(words)) and len(set(digits.values())) == len(digits) and (
        all(0 <= d <= 9 for d in digits.values()) and sum(addends) == total
    )  # fmt: skip


def _magic_square(data: Data, answer: str) -> bool:
    square, given = _numbers(answer), np.array(data["grid"])
    order = len(given)
    sums = [*square.sum(0), *square.sum(1), np.trace(square), np.trace(square[::-1])]
    return _keeps(given, square, 0) and _permutations(square.reshape(1, -1), range(1, order**2 + 1)) and (
        {int(s) for s in sums} == {order * (order**2 + 1) // 2}
    )  # fmt: skip


def _sudoku(data: Data, answer: str) -> bool:
    cells, given = _numbers(answer), np.array(data["grid"])
    size = len(given)
    height = {4: 2, 6: 2, 9: 3}[size]
    width = size // height
    if not _keeps(given, cells, 0):
        return False
    boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)
    return all(_permutations(lines, range(1, size + 1)) for lines in (cells, cells.T, boxes))


def _latin(data: Data, cells: np.ndarray) -> bool:
    return all(_permutations(lines, range(1, data["size"] + 1)) for lines in (cells, cells.T))


def _futoshiki(data: Data, answer: str) -> bool:
    cells = _numbers(answer)
    less = all(cells[r, c] < cells[y, x] for r, c, y, x in data["signs"])
    return _keeps(np.array(data["given"]), cells, 0) and _latin(data, cells) and less


def _skyscrapers(data: Data, answer: str) -> bool:
    cells = _numbers(answer)
    if cells.shape != (data["size"],) * 2 or not _latin(data, cells):
        return False
    sides = {"left": cells, "right": cells[:, ::-1], "top": cells.T, "bottom": cells[::-1].T}
    for side, lines in sides.items():
        seen = [len(set(np.maximum.accumulate(line).tolist())) for line in lines]
        if any(hint and hint != count for hint, count in zip(data[side], seen, strict=True)):
            return False
    return True


def _binario(data: Data, answer: str) -> bool:
    cells, given = _symbols(answer), _symbols("\n".join(data["grid"]))
    if not _keeps(given, cells, ".") or not set(cells.ravel()) <= {"0", "1"}:
        return False
    for lines in (cells == "1", (cells == "1").T):
        even = (lines.sum(1) * 2 == lines.shape[1]).all()
        triple = (lines[:, 2:] == lines[:, 1:-1]) & (lines[:, 1:-1] == lines[:, :-2])
        if not even or triple.any() or len(np.unique(lines, axis=0)) < len(lines):
            return False
    return True


def _black(data: Data, answer: str) -> np.ndarray:
    cells = _symbols(answer)
    if cells.shape != (len(data["rows"]), len(data["columns"])) or not set(cells.ravel()) <= {"#", "."}:
        raise ValueError(answer)
    return np.asarray(cells == "#")


def _nonogram(data: Data, answer: str) -> bool:
    black = _black(data, answer)

    def runs(line: np.ndarray) -> list[int]:
        return [len(list(run)) for dark, run in groupby(line.tolist()) if dark]

    return [runs(row) for row in black] == data["rows"] and [runs(column) for column in black.T] == data["columns"]


def _kakurasu(data: Data, answer: str) -> bool:
    black = _black(data, answer)
    across, down = black @ np.arange(1, black.shape[1] + 1), np.arange(1, len(black) + 1) @ black
    return across.tolist() == data["rows"] and down.tolist() == data["columns"]


def _star_battle(data: Data, answer: str) -> bool:
    cells, regions = _symbols(answer), _symbols("\n".join(data["regions"]))
    if cells.shape != regions.shape or not set(cells.ravel()) <= {"*", "."}:
        return False
    stars, size = np.argwhere(cells == "*"), len(regions)
    apart = all(np.abs(a - b).max() > 1 for a, b in combinations(stars, 2))
    homes = ([r for r, _ in stars], [c for _, c in stars], [regions[r, c] for r, c in stars])
    return len(stars) == size and apart and all(len(set(map(str, home))) == size for home in homes)


def _light_up(data: Data, answer: str) -> bool:
    cells, grid = _symbols(answer), _symbols("\n".join(data["grid"]))
    if cells.shape != grid.shape or (np.where(cells == "*", ".", cells) != grid).any():
        return False
    bulbs, rays = cells == "*", np.zeros(cells.shape, int)
    for r, c in np.argwhere(bulbs):
        for down, right_ in _STEPS.values():
            y, x = r + down, c + right_
            while 0 <= y < len(grid) and 0 <= x < grid.shape[1] and grid[y, x] == ".":
                rays[y, x] += 1
                y, x = y + down, x + right_
    padded = np.pad(bulbs, 1).astype(int)
    near = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    numbered = np.char.isdigit(grid)
    return not rays[bulbs].any() and bool((rays[(grid == ".") & ~bulbs] > 0).all()) and bool(
        (near[numbered] == grid[numbered].astype(int)).all()
    )  # fmt: skip


def _minesweeper(data: Data, answer: str) -> bool:
    cells, grid = _symbols(answer), _symbols("\n".join(data["grid"]))
    if cells.shape != grid.shape or not set(cells.ravel()) <= {"*", "."}:
        return False
    mines, open_ = cells == "*", grid != "?"
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mines, 1), (3, 3)).sum((2, 3))
    return int(mines.sum()) == data["mines"] and not mines[open_].any() and bool(
        (windows[open_] == grid[open_].astype(int)).all()
    )  # fmt: skip


def _hitori(data: Data, answer: str) -> bool:
    cells, numbers = _symbols(answer), np.array(data["grid"])
    if cells.shape != numbers.shape or not set(cells.ravel()) <= {"#", "."}:
        return False
    dark = cells == "#"
    if (dark[1:] & dark[:-1]).any() or (dark[:, 1:] & dark[:, :-1]).any():
        return False
    for lines, shades in ((numbers, dark), (numbers.T, dark.T)):
        kept = [line[~shade].tolist() for line, shade in zip(lines, shades, strict=True)]
        if any(len(set(line)) < len(line) for line in kept):
            return False
    white = ~dark
    wet = np.zeros_like(white)
    wet.flat[np.flatnonzero(white)[0]] = True
    for _ in range(white.size):
        p = np.pad(wet, 1)
        wet = white & (wet | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:])
    return bool((wet == white).all())


def _maze(data: Data, answer: str) -> bool:
    grid = _symbols("\n".join(data["grid"]))
    spots = np.argwhere(grid == "S")[0] + np.cumsum([_STEPS[move] for move in answer], axis=0)
    inside = (spots >= 0).all() and (spots < grid.shape).all()
    return inside and bool((grid[tuple(spots.T)] != "#").all()) and str(grid[tuple(spots[-1])]) == "E"


def _adjacency(data: Data) -> np.ndarray:
    near = np.zeros((data["vertices"],) * 2, bool)
    for a, b in data["edges"]:
        near[a, b] = near[b, a] = True
    return near


def _hamiltonian_path(data: Data, answer: str) -> bool:
    order, near = _numbers(answer)[0], _adjacency(data)
    return sorted(order) == list(range(len(near))) and all(near[a, b] for a, b in pairwise(order))


def _graph_colouring(data: Data, answer: str) -> bool:
    colours, near = _numbers(answer)[0], _adjacency(data)
    return len(colours) == len(near) and set(colours) <= set(range(1, data["colours"] + 1)) and not (
        (colours[:, None] == colours) & near
    ).any()  # fmt: skip


def _sliding_puzzle(data: Data, answer: str) -> bool:
    tiles = np.array(data["board"]).reshape(3, 3)
    for move in answer:
        r, c = np.argwhere(tiles == 0)[0]
        y, x = r + _STEPS[move][0], c + _STEPS[move][1]
        if min(y, x) < 0:
            return False
        tiles[r, c], tiles[y, x] = tiles[y, x], tiles[r, c]
    return len(answer) <= data["limit"] and tiles.ravel().tolist() == [*range(1, 9), 0]


def _tower_of_hanoi(data: Data, answer: str) -> bool:
    homes, moves = list(data["position"]), re.split(r"[\s,;]+", answer.strip(" ,.;\n"))
    for source, onto in moves:
        disk = homes.index(source)  # The smallest there is.
        if source == onto or onto in homes[:disk] or onto not in "ABC":
            return False
        homes[disk] = onto
    return set(homes) == {data["target"]} and len(moves) <= data["limit"]


def _knights_and_knaves(data: Data, answer: str) -> bool:
    kinds = dict(part.split("=") for part in answer.split(", "))
    people = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")[: len(data["claims"])]
    knight = np.array([{"knight": True, "knave": False}[kinds[name]] for name in people])

    def true(claim: list[Any]) -> bool:
        kind, *rest = claim
        rules: dict[str, Callable[[], bool]] = {
            "knight": lambda: bool(knight[rest[0]]) is bool(rest[1]),
            "same": lambda: bool(knight[rest[0]] == knight[rest[1]]),
            "count": lambda: int(knight.sum()) == rest[0],
            "and": lambda: all(map(true, rest)),
            "or": lambda: any(map(true, rest)),
            "if": lambda: true(rest[1]) if true(rest[0]) else True,
        }
        return rules[kind]()

    return len(kinds) == len(people) and [true(claim) for claim in data["claims"]] == knight.tolist()


def _zebra(data: Data, answer: str) -> bool:
    rows = [row.split() for row in answer.split("\n")]
    categories = data["categories"]
    if any(
        sorted(column) != sorted(values)
        for column, (_, values) in zip(zip(*rows, strict=True), categories, strict=True)
    ):
        return False
    if {len(row) for row in rows} != {len(categories)}:
        return False

    def house(item: list[int]) -> int:
        return [row[item[0]] for row in rows].index(categories[item[0]][1][item[1]])

    rules: dict[str, Callable[[int, int], bool]] = {
        "at": lambda a, b: a == b, "same": lambda a, b: a == b, "next": lambda a, b: abs(a - b) == 1,
        "left": lambda a, b: b - a == 1, "before": lambda a, b: a < b,
    }  # fmt: skip
    return all(rules[kind](house(a), b if kind == "at" else house(b)) for kind, a, b in data["clues"])


def _satisfiability(data: Data, answer: str) -> bool:
    if len(answer) != data["variables"] or not set(answer) <= {"T", "F"}:
        return False
    true = {i if letter == "T" else -i for i, letter in enumerate(answer, 1)}
    return all(true & set(clause) for clause in data["clauses"])


_RULES: dict[str, Callable[[Data, str], Any]] = {
    "twenty_four": lambda data, answer: _calculation(data, answer, all_used=True),
    "countdown": lambda data, answer: _calculation(data, answer, all_used=False),
    "cryptarithm": _cryptarithm, "magic_square": _magic_square, "sudoku": _sudoku, "futoshiki": _futoshiki,
    "skyscrapers": _skyscrapers, "binario": _binario, "nonogram": _nonogram, "kakurasu": _kakurasu,
    "star_battle": _star_battle, "light_up": _light_up, "minesweeper": _minesweeper, "hitori": _hitori, "maze": _maze,
    "hamiltonian_path": _hamiltonian_path, "graph_colouring": _graph_colouring, "sliding_puzzle": _sliding_puzzle,
    "tower_of_hanoi": _tower_of_hanoi, "knights_and_knaves": _knights_and_knaves, "zebra": _zebra,
    "satisfiability": _satisfiability,
}  # fmt: skip
