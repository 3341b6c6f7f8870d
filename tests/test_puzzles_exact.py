"""Every verifier of the puzzle suite on instances so small that all answers can be tried.

Each oracle below says in another way than the verifier which answers are right: by eval of our own sums, by counting
neighbours cell by cell, by walking graphs as matrices. The accepted answers must be exactly the oracle's, all of them.
"""

import re
from collections import Counter
from fractions import Fraction
from itertools import chain, combinations, pairwise, permutations, product

import numpy as np
import pytest

from headrace.actors.verifier.puzzles import TASKS, generate

ONE_SOLUTION = {"binario", "sudoku", "knights_and_knaves", "zebra"}
"""Tasks whose generator promises it."""

_invented = []


def invented(task, level, ordinal):
    _invented.append(generate(task, seed=3, ordinal=ordinal, difficulty=level).data)
    return _invented[-1]


def grids(symbols, height, width):
    for cells in product(symbols, repeat=height * width):
        yield "\n".join("".join(cells[i : i + width]) for i in range(0, height * width, width))


def array(answer):
    return np.array([list(row.replace(" ", "")) for row in answer.split("\n")])


def sums(numbers, lengths):
    """Expressions of up to three numbers with all operations and brackets."""
    for length in lengths:
        for given in product(numbers, repeat=length):
            for ops in product("+-*/", repeat=length - 1):
                if length == 1:
                    yield str(given[0])
                elif length == 2:
                    yield f"{given[0]} {ops[0]} {given[1]}"
                else:
                    a, b, c = given
                    yield f"({a} {ops[0]} {b}) {ops[1]} {c}"
                    yield f"{a} {ops[0]} ({b} {ops[1]} {c})"
                    yield f"{a} {ops[0]} {b} {ops[1]} {c}"


def value(expression):
    try:
        return eval(re.sub(r"\d+", lambda match: f"Fraction({match[0]})", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None


def arithmetic_case(task, numbers, target):
    def right(data, answer):
        used, given = Counter(map(int, re.findall(r"\d+", answer))), Counter(numbers)
        return value(answer) == target and (used == given if task == "twenty_four" else not used - given)

    yield task, {"numbers": numbers, "target": target}, sums(sorted({*numbers, 7}), (1, 2, 3)), right


def cryptarithm_cases():
    def right(data, answer):
        digit = dict(part.split("=") for part in answer.split(", "))
        if not set(digit.values()) <= set("0123456789"):
            return False
        ab, ba, cac = (int("".join(digit[letter] for letter in word)) for word in ("AB", "BA", "CAC"))
        return "0" not in (digit["A"], digit["B"], digit["C"]) and len(set(digit.values())) == 3 and ab + ba == cac

    candidates = [f"A={a}, B={b}, C={c}" for a, b, c in product([*range(10), 12, "x"], repeat=3)]
    yield "cryptarithm", {"addends": ["AB", "BA"], "total": "CAC"}, candidates, right


def magic_square_cases():
    def right(data, answer):
        square = np.array([list(map(int, row.split())) for row in answer.split("\n")])
        lines = [*square, *square.T, square.diagonal(), np.fliplr(square).diagonal()]
        return {int(line.sum()) for line in lines} == {15}

    around = list(permutations([1, 2, 3, 4, 6, 7, 8, 9]))[::5]
    around += [(2, 7, 6, 9, 1, 4, 3, 8), (8, 3, 4, 1, 9, 6, 7, 2), (4, 9, 2, 3, 7, 8, 1, 6), (6, 1, 8, 7, 3, 2, 9, 4)]
    candidates = ["{} {} {}\n{} 5 {}\n{} {} {}".format(*numbers) for numbers in around]
    yield "magic_square", {"grid": [[0, 0, 0], [0, 5, 0], [0, 0, 0]]}, candidates, right


def given_agree(given, answer):
    return all(old in (0, new) for old, new in zip(chain(*given), map(int, array(answer).ravel()), strict=True))


def square_of(rows):
    return ["\n".join(chosen) for chosen in product(rows, repeat=len(rows[0]))]


ROWS_OF_3 = [*map("".join, permutations("123")), "111", "122", "131", "223", "332"]


def latin(answer):
    cells = array(answer)
    return all(len(set(line)) == len(cells) for line in (*cells, *cells.T))


def fitting(rows, given):
    return [row for row in rows if all(old in (0, int(new)) for old, new in zip(given, row, strict=True))]


def sudoku_cases():
    given = [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]]

    def right(data, answer):
        cells = array(answer)
        boxes = [cells[r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2)]
        return latin(answer) and all(len(set(box)) == 4 for box in boxes) and given_agree(data["grid"], answer)

    rows = ["".join(row) for row in permutations("1234")]
    candidates = ["\n".join(["1234", *lower]) for lower in product(rows, repeat=3)]
    made = invented("sudoku", 2, 0)
    every = ["\n".join(chosen) for chosen in product(*(fitting(rows, was) for was in made["grid"]))]
    yield "sudoku", made, every, right
    yield "sudoku", {"grid": given}, [*candidates, "1234\n3412\n2143\n4331", "2134\n3412\n1243\n4321"], right


def futoshiki_cases():
    data = {"size": 3, "signs": [[0, 0, 0, 1], [2, 2, 1, 2]], "given": [[0, 0, 0], [0, 0, 0], [0, 0, 0]]}

    def right(data, answer):
        cells = array(answer)
        return latin(answer) and cells[0, 0] < cells[0, 1] and cells[2, 2] < cells[1, 2]

    yield "futoshiki", data, square_of(ROWS_OF_3), right


def skyscraper_cases():
    def seen(line):
        return sum(all(line[j] < line[i] for j in range(i)) for i in range(3))

    def right(data, answer):
        cells = array(answer)
        edges = {"left": cells, "right": cells[:, ::-1], "top": cells.T, "bottom": cells[::-1].T}
        return latin(answer) and all(
            hint in (0, seen(line))
            for side, lines in edges.items()
            for hint, line in zip(data[side], lines, strict=True)
        )

    few = {"size": 3, "top": [0, 0, 2], "bottom": [0, 0, 0], "left": [2, 0, 0], "right": [0, 0, 0]}
    for data in (few, invented("skyscrapers", 1, 0)):
        yield "skyscrapers", data, square_of(ROWS_OF_3), right


def binario_cases():
    def right(data, answer):
        cells = array(answer)
        lines = ["".join(line) for line in (*cells, *cells.T)]
        return (
            all(sorted(line) == list("0011") for line in lines)
            and len(set(lines[:4])) == len(set(lines[4:])) == 4
            and all(old in (".", new) for old, new in zip("".join(data["grid"]), cells.ravel(), strict=True))
        )

    several = square_of(["0011", "0101", "0110", "1001", "1010", "1100", "0001", "0111", "1011"])
    yield "binario", {"grid": ["....", "0...", "....", "...1"]}, several, right
    yield "binario", invented("binario", 2, 1), several, right


def runs(line):
    return [len(run) for run in re.findall("#+", "".join(line))]


def painting_cases():
    def nonogram(data, answer):
        cells = array(answer)
        return [*map(runs, cells)] == data["rows"] and [*map(runs, cells.T)] == data["columns"]

    def kakurasu(data, answer):
        black = array(answer) == "#"
        across, down = black * np.arange(1, 5), black.T * np.arange(1, 4)
        return across.sum(1).tolist() == data["rows"] and down.sum(1).tolist() == data["columns"]

    yield "nonogram", {"rows": [[1], [1], []], "columns": [[1], [], [], [1]]}, list(grids("#.", 3, 4)), nonogram
    yield "nonogram", {"rows": [[1, 2], [4], [1]], "columns": [[2], [1], [3], [2]]}, list(grids("#.", 3, 4)), nonogram
    yield "kakurasu", {"rows": [3, 3, 4], "columns": [1, 1, 5, 3]}, list(grids("#.", 3, 4)), kakurasu
    yield "kakurasu", {"rows": [5, 5, 0], "columns": [1, 2, 2, 1]}, list(grids("#.", 3, 4)), kakurasu


def star_battle_cases():
    def right(data, answer):
        stars = list(zip(*np.nonzero(array(answer) == "*"), strict=True))
        regions = [data["regions"][r][c] for r, c in stars]
        return (
            len(stars) == 4
            and all(len(set(found)) == 4 for found in (regions, [r for r, _ in stars], [c for _, c in stars]))
            and all(max(abs(a - c), abs(b - d)) > 1 for (a, b), (c, d) in combinations(stars, 2))
        )

    candidates = square_of(["....", "*...", ".*..", "..*.", "...*", "*..*"])
    yield "star_battle", {"regions": ["AABB", "AABB", "CCDD", "CCDD"]}, candidates, right
    yield "star_battle", {"regions": ["AAAB", "AAAB", "CCDD", "CDDD"]}, candidates, right


def light_up_cases():
    def right(data, answer):
        grid, cells = array("\n".join(data["grid"])), array(answer)
        if (np.where(cells == "*", ".", cells) != grid).any():
            return False
        bulbs = set(zip(*map(list, np.nonzero(cells == "*")), strict=True))

        def sees(a, b):
            (r, c), (y, x) = sorted((a, b))
            return (r == y and (grid[r, c : x + 1] == ".").all()) or (c == x and (grid[r : y + 1, c] == ".").all())

        if any(sees(a, b) for a, b in combinations(bulbs, 2)):
            return False
        for r, c in np.ndindex(grid.shape):
            near = sum(abs(r - y) + abs(c - x) == 1 for y, x in bulbs)
            if grid[r, c] == "." and not any(sees((r, c), bulb) for bulb in bulbs):
                return False
            if grid[r, c].isdigit() and near != int(grid[r, c]):
                return False
        return True

    for grid in (["...", ".#.", "..."], ["..1.", "#...", "...2"], invented("light_up", 1, 3)["grid"]):
        white = [i for i, symbol in enumerate("\n".join(grid)) if symbol == "."]
        candidates = []
        for chosen in chain.from_iterable(combinations(white, k) for k in range(6)):
            symbols = list("\n".join(grid))
            for i in chosen:
                symbols[i] = "*"
            candidates.append("".join(symbols))
        yield "light_up", {"grid": grid}, [*candidates, "\n".join("*" * len(row) for row in grid)], right


def minesweeper_cases():
    def right(data, answer):
        grid, mines = array("\n".join(data["grid"])), array(answer) == "*"
        padded = np.pad(mines, 1)
        near = sum(np.roll(padded, (i, j), (0, 1)) * 1 for i in (-1, 0, 1) for j in (-1, 0, 1))[1:-1, 1:-1]
        shown = grid != "?"
        return mines.sum() == data["mines"] and all(
            not mines[cell] and near[cell] == int(grid[cell]) for cell in zip(*np.nonzero(shown), strict=True)
        )

    yield "minesweeper", {"grid": ["1?2?", "????", "?1??"], "mines": 3}, list(grids("*.", 3, 4)), right
    yield "minesweeper", {"grid": ["???", "?3?", "?1?"], "mines": 3}, list(grids("*.", 3, 3)), right


def hitori_cases():
    def right(data, answer):
        grid, shaded = np.array(data["grid"]), array(answer) == "#"
        if (shaded[1:] & shaded[:-1]).any() or (shaded[:, 1:] & shaded[:, :-1]).any():
            return False
        for numbers, dark in (*zip(grid, shaded, strict=True), *zip(grid.T, shaded.T, strict=True)):
            if max(Counter(numbers[~dark].tolist()).values(), default=0) > 1:
                return False
        white = list(zip(*map(list, np.nonzero(~shaded)), strict=True))
        wet = {white[0]} if white else set()
        for _ in white:
            wet |= {(r, c) for r, c in white if any(abs(r - y) + abs(c - x) == 1 for y, x in wet)}
        return bool(white) and len(wet) == len(white)

    yield "hitori", {"grid": [[1, 2, 3], [2, 2, 1], [3, 1, 2]]}, list(grids("#.", 3, 3)), right
    yield "hitori", {"grid": [[1, 2, 3], [2, 3, 1], [3, 1, 2]]}, list(grids("#.", 3, 3)), right
    yield "hitori", invented("hitori", 1, 4), list(grids("#.", 3, 3)), right


def strings(alphabet, longest):
    return ["".join(letters) for length in range(1, longest + 1) for letters in product(alphabet, repeat=length)]


def maze_cases():
    def right(data, answer):
        grid = array("\n".join(data["grid"]))
        spot = np.argwhere(grid == "S")[0]
        for move in answer:
            spot = spot + {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}[move]
            if grid[tuple(spot)] == "#":
                return False
        return grid[tuple(spot)] == "E"

    yield "maze", {"grid": ["#####", "#S..#", "#.#.#", "#..E#", "#####"]}, strings("UDLR", 6), right
    yield "maze", invented("maze", 1, 2), strings("UDLR", 6), right


def graph_cases():
    path = {"vertices": 5, "edges": [[0, 1], [0, 4], [1, 2], [1, 3], [2, 3], [3, 4]]}
    adjacent = np.zeros((5, 5), bool)
    for a, b in path["edges"]:
        adjacent[a, b] = adjacent[b, a] = True

    def walks(data, answer):
        order = [int(vertex) for vertex in answer.split()]
        return sorted(order) == list(range(5)) and all(adjacent[a, b] for a, b in pairwise(order))

    def differ(data, answer):
        colours = np.array([int(colour) for colour in answer.split()])
        if len(colours) != 5 or set(colours) - {1, 2, 3}:
            return False
        return not (adjacent & (colours[:, None] == colours)).any()

    orders = [" ".join(order) for length in (4, 5) for order in product("01234", repeat=length)]
    yield "hamiltonian_path", path, [*orders, "0 1 2 3 4 5"], walks
    yield "graph_colouring", path | {"colours": 3}, orders, differ


def sliding_cases():
    def right(data, answer):
        tiles = np.array(data["board"]).reshape(3, 3)
        for move in answer:
            (r, c) = np.argwhere(tiles == 0)[0]
            y, x = r + {"U": -1, "D": 1}.get(move, 0), c + {"L": -1, "R": 1}.get(move, 0)
            if not (0 <= y < 3 and 0 <= x < 3):
                return False
            tiles[r, c], tiles[y, x] = tiles[y, x], tiles[r, c]
        return len(answer) <= data["limit"] and tiles.ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]

    yield "sliding_puzzle", {"board": [1, 2, 3, 4, 0, 6, 7, 5, 8], "limit": 4}, strings("UDLR", 5), right
    yield "sliding_puzzle", {"board": [1, 2, 3, 0, 4, 6, 7, 5, 8], "limit": 5}, strings("UDLR", 6), right


def hanoi_cases():
    def right(data, answer):
        pegs = list(data["position"])
        for source, onto in answer.split(", "):
            movable = [disk for disk, peg in enumerate(pegs) if peg == source][:1]
            if not movable or source == onto or onto in pegs[: movable[0]]:
                return False
            pegs[movable[0]] = onto
        return set(pegs) == {data["target"]} and len(answer.split(", ")) <= data["limit"]

    steps = [a + b for a in "ABC" for b in "ABC"]
    sequences = [", ".join(moves) for length in (1, 2, 3, 4) for moves in product(steps, repeat=length)]
    yield "tower_of_hanoi", {"position": "AA", "target": "C", "limit": 4}, sequences, right
    yield "tower_of_hanoi", {"position": "CA", "target": "B", "limit": 3}, sequences, right


def knight_cases():
    names = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")

    def spoken(claim):
        """The claim as an expression of Python, to be evaluated: `k` is the list of who is a knight."""
        kind, *rest = claim
        if kind == "knight":
            return f"(k[{rest[0]}] is {rest[1]})"
        if kind == "same":
            return f"(k[{rest[0]}] is k[{rest[1]}])"
        if kind == "count":
            return f"(k.count(True) == {rest[0]})"
        a, b = map(spoken, rest)
        return {"and": f"({a} and {b})", "or": f"({a} or {b})", "if": f"({a} <= {b})"}[kind]

    def right(data, answer):
        k = [part.endswith("=knight") for part in answer.split(", ")]
        return all(eval(spoken(claim), {"k": k}) is k[i] for i, claim in enumerate(data["claims"]))

    several = {
        "claims": [["same", 0, 1], ["if", ["knight", 0, True], ["count", 2]], ["or", ["count", 0], ["count", 3]]]
    }
    for data in (several, *(invented("knights_and_knaves", level, 1) for level in (1, 3, 5, 7, 10))):
        people = names[: len(data["claims"])]
        worlds = product(("knight", "knave"), repeat=len(people))
        candidates = [", ".join(map("{}={}".format, people, kinds)) for kinds in worlds]
        yield "knights_and_knaves", data, candidates, right


def zebra_cases():
    def right(data, answer):
        rows = [row.split() for row in answer.split("\n")]
        where = {word: house for house, row in enumerate(rows) for word in row}

        def house(item):
            return where[data["categories"][item[0]][1][item[1]]]

        for kind, item, other in data["clues"]:
            apart = (other if kind == "at" else house(other)) - house(item)
            if not {
                "at": apart == 0,
                "same": apart == 0,
                "next": apart**2 == 1,
                "left": apart == 1,
                "before": apart > 0,
            }[kind]:
                return False
        return True

    colours, pets = ["colour", ["red", "blue", "green"]], ["pet", ["cat", "dog", "fish"]]
    several = {"categories": [colours, pets], "clues": [["next", [0, 0], [1, 1]], ["before", [1, 1], [0, 2]]]}
    for data in (several, *(invented("zebra", level, 1) for level in (2, 3, 4))):
        columns = product(*(permutations(values) for _, values in data["categories"]))
        candidates = ["\n".join(map(" ".join, zip(*column, strict=True))) for column in columns]
        yield "zebra", data, candidates, right


def satisfiability_cases():
    def right(data, answer):
        true = {i if letter == "T" else -i for i, letter in enumerate(answer, 1)}
        return len(answer) == data["variables"] and all(true & set(clause) for clause in data["clauses"])

    yield "satisfiability", {"variables": 4, "clauses": [[1, -2, 3], [-1, 2, 4], [-3, -4, 1]]}, strings("TF", 5), right
    yield "satisfiability", invented("satisfiability", 4, 0), strings("TF", 7), right


CASES = [
    *arithmetic_case("twenty_four", [2, 3, 4], 24), *arithmetic_case("twenty_four", [1, 3, 3], 2),
    *arithmetic_case("countdown", [2, 3, 4], 6), *cryptarithm_cases(), *magic_square_cases(), *sudoku_cases(),
    *futoshiki_cases(), *skyscraper_cases(), *binario_cases(), *painting_cases(), *star_battle_cases(),
    *light_up_cases(), *minesweeper_cases(), *hitori_cases(), *maze_cases(), *graph_cases(), *sliding_cases(),
    *hanoi_cases(), *knight_cases(), *zebra_cases(), *satisfiability_cases(),
]  # fmt: skip


def test_every_task_has_a_case():
    assert {task for task, *_ in CASES} == set(TASKS) and len(TASKS) == 22


@pytest.mark.parametrize(("task", "data", "candidates", "right"), CASES, ids=[task for task, *_ in CASES])
def test_accepted_are_exactly_the_right_answers(task, data, candidates, right):
    candidates = list(candidates)
    expected = {answer for answer in candidates if right(data, answer)}
    assert {answer for answer in candidates if TASKS[task].accepts(data, answer)} == expected
    if task in ONE_SOLUTION and any(data is made for made in _invented):
        assert len(expected) == 1
    if expected:
        assert right(data, TASKS[task].solve(data))
    else:
        with pytest.raises(ValueError, match=f"this {task} puzzle has no solution"):
            TASKS[task].solve(data)
