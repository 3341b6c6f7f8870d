"""Who sends what to whom, so that a side that holds tensors in one way gets those of a side that holds them in another.

    Holding (FSDP, TP, EP) --.                        for every box of every tensor that a rank of `dest` needs:
                              >-- make_plan --> Plan  one copy, from one of the ranks that have it
    Holding (TP, EP) --------'

Each element comes to each rank that needs it once, straight from a rank that has it: no rank gathers anything. Where
several have it they share the sending; a rank that has it itself copies it within its memory. Both sides compute the
same plan from the same two holdings, and compare `digest` before they use it.

Tensors that lie alike (the layers of a model) are a family, planned once: what differs between them is at most which of
several equal holders sends. Knows nothing of models, of memory and of how bytes travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import BadWeights
from .boxes import Box
from .family import Family, Moves, no_moves
from .holding import Held, Holding, Whole

_SHOWN = 5
"""Differences that an error names."""


class Copy(NamedTuple):
    """Elements that the rank `dest` needs and the rank `source` has; boxes are in the arrays that each holds."""

    source: int
    source_name: str
    source_box: Box
    dest: int
    dest_name: str
    dest_box: Box


class Plan:
    """All copies from `source` to `dest`; made by `make_plan`."""

    def __init__(self, source: Holding, dest: Holding, families: Sequence[Family]) -> None:
        self.source = source
        self.dest = dest
        self.wholes = list(dest.wholes.values())
        self._families = families
        self._dims = max((len(whole.shape) for whole in self.wholes), default=0)

    def copies(self, *, source: int | None = None, dest: int | None = None) -> list[Copy]:
        """Those from and to these ranks (of all, if None), in order; what a rank copies within its memory included."""
        moves = self.moves(source=source, dest=dest)
        sources, dests = self.source.held, self.dest.held
        return [
            Copy(s, sources[sh].name, _box(sources[sh], s_at, shape), d, dests[dh].name, _box(dests[dh], d_at, shape))
            for _, s, d, sh, dh, s_at, d_at, shape in zip(*(column.tolist() for column in moves), strict=True)
        ]

    def moves(self, *, source: int | None = None, dest: int | None = None) -> Moves:
        """The same as columns, in the order of (destination, source, tensor, place in it)."""
        parts = [moves for family in self._families for moves in family.moves(self._dims, source, dest)]
        columns = [np.concatenate([part[k] for part in parts]) for k in range(len(Moves._fields))] if parts else []
        moves = Moves(*columns) if parts else no_moves(self._dims)
        place = [moves.dest_at[:, d] for d in reversed(range(self._dims))]
        return moves.take(np.lexsort((*place, moves.dest_held, moves.whole, moves.source, moves.dest)))

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes by rank."""
        sent = np.zeros(self.source.mesh.size, np.int64)
        received, kept = np.zeros(self.dest.mesh.size, np.int64), np.zeros(self.dest.mesh.size, np.int64)
        for family in self._families:
            family.count(sent, received, kept)
        return Traffic(sent, received, kept)

    @cached_property
    def digest(self) -> str:
        """Of both holdings, so of the plan: members with equal digests speak of the same copies."""
        text = hashlib.sha256()
        for holding in (self.source, self.dest):
            text.update(repr((holding.mesh, holding.held)).encode())
        return text.hexdigest()


class Traffic(NamedTuple):
    """Bytes that a plan moves, int64, by rank of its side."""

    sent: np.ndarray
    received: np.ndarray
    kept: np.ndarray
    """Copied by a rank of the destination within its own memory."""


def make_plan(source: Holding, dest: Holding) -> Plan:
    """Plans the exchange. Raises BadWeights, with the values of both sides, if they differ in a name, shape or dtype,
    or if nobody at the source has a part that is needed."""
    check(source, dest)
    order = {name: number for number, name in enumerate(dest.wholes)}
    members: dict[object, list[Whole]] = {}
    for whole in dest.wholes.values():
        key = (whole.dtype, whole.shape, *(_forms(side, whole) for side in (source, dest)))
        members.setdefault(key, []).append(whole)
    families = [Family(source, dest, wholes, order) for wholes in members.values()]
    for family in families:
        family.require_all()
    return Plan(source, dest, families)


def check(source: Holding, dest: Holding) -> None:
    """Raises BadWeights unless both sides speak of the same whole tensors: names, shapes, dtypes."""
    wrong = [
        f"{name}: {have} at the source, {want} at the destination"
        for name in {**source.wholes, **dest.wholes}
        if (have := source.wholes.get(name, "missing")) != (want := dest.wholes.get(name, "missing"))
    ]
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise BadWeights(
            f"the two sides of a weight exchange disagree about {len(wrong)} tensors; give both the same model:\n  "
            + "\n  ".join(wrong[:_SHOWN])
            + more
        )


def _forms(side: Holding, whole: Whole) -> tuple[object, ...]:
    return tuple((side.held[h].form, part) for h, part in side.by_whole[whole.name])


def _box(held: Held, at: Sequence[int], shape: Sequence[int]) -> Box:
    """In the array as `held` has it."""
    skip = len(at) - held.dims
    return Box(tuple(at[skip:]), tuple(a + n for a, n in zip(at[skip:], shape[skip:], strict=True)))
