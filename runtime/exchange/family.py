"""The copies of tensors that lie alike on both sides, such as those of the layers of a model: found once for all.

    pieces of the source   | a | b | c | d |        every overlap, for every rank that needs it, is one row;
    pieces of a rank       |   e   |   f   |        which of several holders sends it may change from tensor to tensor

Knows nothing of the plan that it is a part of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import BadWeights
from .boxes import Box, overlaps, volume
from .header import stored
from .holding import Holding, Whole


class Moves(NamedTuple):
    """Many copies: columns of n rows. Boxes have leading dimensions of length one, so that all have equally many."""

    whole: np.ndarray
    """Number of the tensor, in the order of `Plan.wholes`."""
    source: np.ndarray
    """Rank"""
    dest: np.ndarray
    """Rank"""
    source_held: np.ndarray
    """Number in the holding of the source."""
    dest_held: np.ndarray
    source_at: np.ndarray
    """[n, dimensions]: where the box begins in the array of the source."""
    dest_at: np.ndarray
    shape: np.ndarray
    """[n, dimensions]"""

    def take(self, rows: np.ndarray) -> Moves:
        """Those rows, in that order."""
        return Moves(*(column[rows] for column in self))


def no_moves(dims: int) -> Moves:
    flat, wide = np.zeros(0, np.int64), np.zeros((0, dims), np.int64)
    return Moves(flat, flat, flat, flat, flat, wide, wide, wide)


class _Rows(NamedTuple):
    """Each rank's piece of a whole tensor, one row for each."""

    rank: np.ndarray
    entry: np.ndarray
    """Which of the Held that contain the tensor."""
    start: np.ndarray
    stop: np.ndarray
    at: np.ndarray
    """Where it begins in the array that the rank holds."""
    group: np.ndarray
    """Rows with equal boxes have the same number; rows are in the order of (group, rank)."""


@dataclass(frozen=True)
class Family:
    """Whole tensors that lie alike on both sides."""

    source: Holding
    dest: Holding
    wholes: Sequence[Whole]
    order: Mapping[str, int]
    """Number of each tensor, by name."""

    def require_all(self) -> None:
        """Raises BadWeights if nobody has a part that is needed."""
        dest, sends, whole = self._to, self._sends, self.wholes[0]
        found = np.bincount(sends.to, volume(sends.start, sends.stop), len(dest.rank)).astype(np.int64)
        wrong = np.flatnonzero(found != volume(dest.start, dest.stop))
        if len(wrong):
            row = wrong[0]
            box = Box(tuple(dest.start[row].tolist()), tuple(dest.stop[row].tolist()))
            raise BadWeights(
                f"rank {dest.rank[row]} needs {box} of {whole.name} {whole}, and the ranks of the source have "
                f"{found[row]} of its {volume(dest.start, dest.stop)[row]} elements; each must be held there, by one "
                "array of a rank"
            )

    def count(self, sent: np.ndarray, received: np.ndarray, kept: np.ndarray) -> None:
        """Adds the bytes of this family."""
        sends = self._sends
        nbytes = volume(sends.start, sends.stop) * stored(self.wholes[0].dtype).itemsize
        row, away = self._to.rank[sends.to] - self.dest.mesh.first, sends.own < 0
        for column, chosen in ((received, away), (kept, ~away)):
            column += np.bincount(row[chosen], nbytes[chosen], len(column)).astype(np.int64) * len(self.wholes)
        rows = np.flatnonzero(away)
        for numbers in self._alike():
            sender = self._from.rank[self._sender(numbers[0], rows)] - self.source.mesh.first
            sent += np.bincount(sender, nbytes[rows], len(sent)).astype(np.int64) * len(numbers)

    def moves(self, dims: int, source: int | None, dest: int | None) -> list[Moves]:
        """The copies of every tensor between these ranks."""
        sends, result = self._sends, []
        held = [
            np.array([[h for h, _ in side.by_whole[w.name]] for w in self.wholes]) for side in (self.source, self.dest)
        ]
        order = np.array([self.order[whole.name] for whole in self.wholes])
        wanted = np.arange(len(sends.to)) if dest is None else np.flatnonzero(self._to.rank[sends.to] == dest)
        for numbers in self._alike():
            sender = self._sender(numbers[0], wanted)
            chosen = slice(None) if source is None else self._from.rank[sender] == source
            rows, sender = wanted[chosen], sender[chosen]
            receiver, start = sends.to[rows], sends.start[rows]
            sides = ((self._from, sender), (self._to, receiver))
            at = [_widen(where.at[row] + start - where.start[row], dims, 0) for where, row in sides]
            shape = _widen(sends.stop[rows] - start, dims, 1)
            ranks = [where.rank[row] for where, row in sides]
            number, again = np.repeat(numbers, len(rows)), np.tile(np.arange(len(rows)), len(numbers))
            entries = [table[number, where.entry[row][again]] for table, (where, row) in zip(held, sides, strict=True)]
            result.append(Moves(order[number], *(c[again] for c in ranks), *entries, *(c[again] for c in (*at, shape))))
        return result

    def _alike(self) -> list[np.ndarray]:
        """Numbers of the tensors, together if they have the same senders."""
        numbers, sends = np.arange(len(self.wholes)), self._sends
        steady = not ((sends.own < 0) & (sends.turns % sends.holders != 0)).any()
        return [numbers] if steady else [numbers[n : n + 1] for n in numbers]

    def _sender(self, number: int, rows: np.ndarray) -> np.ndarray:
        """The row of `_from` that sends, for these rows of `_sends`, of tensor `number` of the family.

        Its own, if the destination has it. Otherwise the holders of a box take turns: block by block if the copies of
        one tensor can be dealt out evenly, else from tensor to tensor.
        """
        _, _, _, first, holders, own, turn, turns = (column[rows] for column in self._sends)
        block = turn * holders // np.maximum(turns, 1)
        dealt = np.where(turns % holders == 0, block, (turn + number * turns) % holders)
        sender: np.ndarray = np.where(own >= 0, own, first + dealt)
        return sender

    @cached_property
    def _from(self) -> _Rows:
        return _rows(self.source, self.wholes[0])

    @cached_property
    def _to(self) -> _Rows:
        return _rows(self.dest, self.wholes[0])

    @cached_property
    def _sends(self) -> _Sends:
        """What must come to whom, of one tensor of the family."""
        source, dest = self._from, self._to
        first, to_first = (np.flatnonzero(np.diff(rows.group, prepend=-1)) for rows in (source, dest))
        groups, to_groups = overlaps(source.start[first], source.stop[first], dest.start[to_first], dest.stop[to_first])
        wanted = np.diff(to_first, append=len(dest.group))[to_groups]
        to = np.repeat(to_first[to_groups], wanted) + _within(wanted)
        group = np.repeat(groups, wanted)
        order = np.lexsort((dest.rank[to], group))
        to, group = to[order], group[order]
        start = np.maximum(source.start[first][group], dest.start[to])
        stop = np.minimum(source.stop[first][group], dest.stop[to])
        holders = np.diff(first, append=len(source.group))
        own = _find(source.group, source.rank, group, dest.rank[to])
        away = own < 0
        turns = np.bincount(group[away], minlength=len(first))
        turn = np.zeros(len(to), np.int64)
        turn[away] = _within(turns)
        return _Sends(to, start, stop, first[group], holders[group], own, turn, turns[group])


class _Sends(NamedTuple):
    """Boxes of one whole tensor that must come to ranks: one row for each box and rank."""

    to: np.ndarray
    """Row of the destination."""
    start: np.ndarray
    """In the whole tensor, [n, dimensions]."""
    stop: np.ndarray
    first: np.ndarray
    """First of the rows of the source that have it; the others follow."""
    holders: np.ndarray
    """How many have it."""
    own: np.ndarray
    """The row of the source that is the destination itself, or -1."""
    turn: np.ndarray
    """Number of this row among those that the same holders send ..."""
    turns: np.ndarray
    """... and how many those are."""


def _rows(side: Holding, whole: Whole) -> _Rows:
    """The pieces of `whole` on all ranks that have any of it."""
    entries = []
    for entry, (h, part) in enumerate(side.by_whole[whole.name]):
        pieces = side.pieces(side.held[h])
        start, stop, at = (column[:, part] for column in pieces[:3])
        have = volume(start, stop) > 0
        entries.append(
            (side.mesh.ranks[have], np.full(have.sum(), entry), start[have], stop[have], at[have])
        )  # fmt: skip
    rank, entry_, start, stop, at = (np.concatenate(columns) for columns in zip(*entries, strict=True))
    _, group = np.unique(np.concatenate((start, stop), 1), axis=0, return_inverse=True)
    order = np.lexsort((entry_, rank, group.reshape(-1)))
    return _Rows(*(column[order] for column in (rank, entry_, start, stop, at, group.reshape(-1))))


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, .. for each of `counts`, end to end."""
    numbers: np.ndarray = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def _find(group: np.ndarray, rank: np.ndarray, want_group: np.ndarray, want_rank: np.ndarray) -> np.ndarray:
    """Row with this group and rank, or -1; (group, rank) is in order."""
    width = int(max(rank.max(initial=0), want_rank.max(initial=0))) + 1
    keys, want = group * width + rank, want_group * width + want_rank
    row = np.minimum(np.searchsorted(keys, want), len(keys) - 1)
    return np.where(keys[row] == want, row, -1)


def _widen(columns: np.ndarray, dims: int, fill: int) -> np.ndarray:
    """[n, fewer] -> [n, dims], filled in front."""
    return np.pad(columns, ((0, 0), (dims - columns.shape[1], 0)), constant_values=fill)
