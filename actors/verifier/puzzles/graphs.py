"""Puzzles on graphs: a path through all vertices, and colours that differ along every edge.

Both hide a solution and add random edges that keep it. `edges` are pairs of vertices 0..n-1. Solved by search, the
most constrained vertex first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from . import answers
from .draw import Draw
from .puzzle import Data, Task, unsolvable


def _neighbours(data: Data) -> list[set[int]]:
    near: list[set[int]] = [set() for _ in range(data["vertices"])]
    for a, b in data["edges"]:
        near[a].add(b)
        near[b].add(a)
    return near


def _edge_list(data: Data) -> str:
    return ", ".join(f"{a}-{b}" for a, b in data["edges"])


class HamiltonianPath(Task):
    name = "hamiltonian_path"

    _levels: ClassVar = [4, 5, 6, 7, 8, 10, 12, 14, 16, 18]

    def invent(self, draw: Draw, level: int) -> Data:
        count = self._levels[level - 1]
        path = draw.shuffled(range(count))
        hidden = {(min(edge), max(edge)) for edge in pairwise(path)}
        others = [(a, b) for b in range(count) for a in range(b) if (a, b) not in hidden]
        edges = [*hidden, *draw.sample(others, count // 2 + 1)]
        return {"vertices": count, "edges": sorted(map(list, edges))}

    def describe(self, data: Data) -> str:
        return (
            f"A graph has the vertices 0 to {data['vertices'] - 1} and these edges, which can be walked both ways: "
            f"{_edge_list(data)}.\n\nFind a path along edges that visits every vertex exactly once, beginning "
            f"wherever you like. Answer with the vertices in order, separated by blanks."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        path = answers.integers(answer)
        if path is None or len(path) != data["vertices"] or set(path) != set(range(data["vertices"])):
            return False
        edges = {frozenset(edge) for edge in data["edges"]}
        return all(frozenset(step) in edges for step in pairwise(path))

    def solve(self, data: Data) -> str:
        near = _neighbours(data)
        for begin in sorted(range(len(near)), key=lambda vertex: len(near[vertex])):
            path = _walk(near, [begin], set())
            if path is not None:
                return " ".join(map(str, path))
        raise unsolvable(self)

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """A vertex is left out, or visited twice instead of another."""
        path = answer.split()
        first, second = draw.sample(range(len(path)), 2)
        if draw.chance(0.5):
            del path[first]
        else:
            path[first] = path[second]
        return " ".join(path)


def _walk(near: list[set[int]], path: list[int], dead: set[tuple[frozenset[int], int]]) -> list[int] | None:
    """A path that goes on from `path`; `dead` are sets of visited vertices, with the last one, that lead nowhere."""
    if len(path) == len(near):
        return path
    state = (frozenset(path), path[-1])
    if state in dead:
        return None
    for vertex in sorted(near[path[-1]] - state[0], key=lambda vertex: len(near[vertex] - state[0])):
        found = _walk(near, [*path, vertex], dead)
        if found is not None:
            return found
    dead.add(state)
    return None


class GraphColouring(Task):
    name = "graph_colouring"

    _levels: ClassVar = [(4, 3), (5, 3), (6, 3), (7, 3), (8, 3), (9, 3), (10, 3), (13, 3), (16, 3), (20, 4)]
    """Number of vertices and of colours."""

    def invent(self, draw: Draw, level: int) -> Data:
        count, colours = self._levels[level - 1]
        hidden = draw.shuffled(vertex % colours for vertex in range(count))
        pairs = [[a, b] for b in range(count) for a in range(b) if hidden[a] != hidden[b]]
        return {
            "vertices": count,
            "colours": colours,
            "edges": sorted(draw.sample(pairs, round(count * (colours - 1) * 0.95))),
        }

    def describe(self, data: Data) -> str:
        return (
            f"A graph has the vertices 0 to {data['vertices'] - 1} and these edges: {_edge_list(data)}.\n\nGive each "
            f"vertex one of the colours 1 to {data['colours']} so that the two ends of every edge differ. Answer with "
            f"the colours of the vertices in order, beginning with vertex 0, separated by blanks."
        )

    def accepts(self, data: Data, answer: str) -> bool:
        colours = answers.integers(answer)
        if colours is None or len(colours) != data["vertices"]:
            return False
        if not all(1 <= colour <= data["colours"] for colour in colours):
            return False
        return all(colours[a] != colours[b] for a, b in data["edges"])

    def solve(self, data: Data) -> str:
        near = _neighbours(data)
        colours = _colour(near, {}, data["colours"])
        if colours is None:
            raise unsolvable(self)
        return " ".join(str(colours[vertex]) for vertex in range(len(near)))

    def spoil(self, data: Data, answer: str, draw: Draw) -> str:
        """One end of an edge takes the colour of the other."""
        colours = answer.split()
        a, b = draw.shuffled(draw.pick(data["edges"]))
        colours[a] = colours[b]
        return " ".join(colours)


def _colour(near: list[set[int]], chosen: dict[int, int], count: int) -> dict[int, int] | None:
    """Colours 1..count for the vertices that `chosen` has none for; the one with most colours around it first."""
    if len(chosen) == len(near):
        return chosen
    seen = {v: {chosen[u] for u in near[v] if u in chosen} for v in range(len(near)) if v not in chosen}
    vertex = max(seen, key=lambda v: (len(seen[v]), len(near[v])))
    fresh = max(chosen.values(), default=0) + 1
    for colour in range(1, min(fresh, count) + 1):
        if colour not in seen[vertex]:
            found = _colour(near, {**chosen, vertex: colour}, count)
            if found is not None:
                return found
    return None
