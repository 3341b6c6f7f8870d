"""What the ranks of a worker add up and hand round while they compute: gloo between CPUs, NCCL between GPUs.

    Link.meet(place, meeting) --> sum over heads, experts or all; keys and values of all tokens; logits to the first

Sums come out in the same bits on every rank: each piece is added up once and handed to all. Any failure lets go of all
connections, so that ranks which wait for this one fail at once, too. Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore, GatherOptions, PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from ...meeting import LOOPBACK
from .lost import RankLost
from .mesh import Place
from .orders import Door, Orders

STEP_S = 60.0
"""Longest wait of a rank for the others in a step; death is seen at once."""

DOOR = "door"


class Link:
    """One rank's connections."""

    def __init__(self, place: Place, store: Store, device: torch.device, orders: Orders) -> None:
        self.place = place
        self.device = device
        self.orders = orders
        self._store = store
        self._groups: dict[str, Any] = {}
        mesh, rank = place.mesh, place.rank
        everyone = range(mesh.size)
        places = [mesh.place(other) for other in everyone]
        self._members = {
            "all": list(everyone),
            "heads": [p.rank for p in places if (p.s, p.e) == (place.s, place.e)],
            "experts": [p.rank for p in places if p.s == place.s],
            "slots": [p.rank for p in places if (p.s, p.t) == (place.s, place.t)],
            "tokens": [p.rank for p in places if p.t == place.t],
        }
        """Who takes part: those who hold other heads of the same tokens; other parts of the experts; other experts of
        the same width; other tokens of the same heads."""
        assert all(rank in members for members in self._members.values())

    @classmethod
    def meet(cls, place: Place, meeting: Path, device: torch.device, *, patience_s: float = STEP_S) -> Link:
        """Waits for the others. `meeting`: a file that is new, and the same for all. Raises RankLost."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        store = FileStore(str(meeting), place.mesh.size)
        store.set_timeout(timedelta(seconds=patience_s))
        if place.rank == 0:
            door = Door()
            store.set(DOOR, door.address)
            orders = door.welcome(place.mesh.size - 1, patience_s)
        else:
            orders = Orders.enter(_guarded(place, lambda: store.get(DOOR)).decode())
        link = cls(place, store, device, orders)
        for name, members in link._members.items():
            if len(members) > 1:
                link._groups[name] = _guarded(place, partial(link._group, name, timedelta(seconds=patience_s)))
                link.sum(name, torch.zeros(1, device=device))  # Connections are made by the first use.
        return link

    def sum(self, among: str, x: Tensor) -> Tensor:
        """x becomes the sum over those ranks, in the same bits at each of them. Raises RankLost."""
        if among in self._groups:
            self._do(lambda: self._groups[among].allreduce([x]))
        return x

    def hand_round(self, among: str, x: Tensor) -> list[Tensor]:
        """The x of all those ranks, by their order. They have the same shape. Raises RankLost."""
        if among not in self._groups:
            return [x]
        parts = [torch.empty_like(x) for _ in self._members[among]]
        self._do(lambda: self._groups[among].allgather([parts], [x]))
        return parts

    def exchange(self, among: str, x: Tensor, sizes_in: Sequence[int], sizes_out: Sequence[int]) -> Tensor:
        """Sends pieces of x, flat, of `sizes_in` to those ranks in their order; those of `sizes_out` that they send
        come one after the other. Raises RankLost."""
        received = x.new_empty(sum(sizes_out))
        self._do(lambda: self._groups[among].alltoall_base(received, x, list(sizes_out), list(sizes_in)))
        return received

    def to_first(self, x: Tensor) -> list[Tensor]:
        """The x of all ranks at the first one, nothing at the others. Raises RankLost."""
        options = GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in self._members["all"]] if self.place.rank == 0 else []
        self._do(lambda: self._groups["all"].gather([parts] if parts else [], [x], options))
        return parts

    def close(self) -> None:
        """From any thread."""
        self.orders.close()
        groups, self._groups = self._groups, {}
        if self.device.type == "cuda":
            for group in groups.values():
                group.abort()

    def _do(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except (RuntimeError, KeyError) as error:
            self.close()
            raise _lost(self.place, error) from error

    def _group(self, name: str, patience: timedelta) -> Any:
        members = self._members[name]
        store = PrefixStore(f"{name}-{members[0]}", self._store)
        rank, size = members.index(self.place.rank), len(members)
        if self.device.type != "cuda":
            return ProcessGroupGloo(store, rank, size, patience)
        from torch.distributed import ProcessGroupNCCL

        group = ProcessGroupNCCL(store, rank, size, ProcessGroupNCCL.Options())
        group._set_default_timeout(patience)
        return group


def _guarded(place: Place, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RuntimeError as error:
        raise _lost(place, error) from error


def _lost(place: Place, error: Exception) -> RankLost:
    first = str(error).partition("\n")[0]
    return RankLost(f"rank {place.rank} of {place.mesh.size} can't go on with the others: {first}")
