"""A network in memory, for tests: it drops, delays, duplicates, reorders and cuts, the same way for the same seed.

    network = MemoryNetwork(seed=1, LinkQuality(drop=0.01, delay_s=(0.001, 0.02)))
    node = Node("a#1", "a", transport=network.transport)
    network.partition({"a"}, {"b", "c"})  ...  network.heal()

With a loop whose clock is virtual a whole run of many nodes is repeatable. Messages are copied through their wire
format, so nothing is shared by accident. Knows nothing of actors.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from .codec import Buffer
from .curve import Keys
from .errors import LaunchError
from .frame import Envelope, is_system, join, size_of
from .inbox import Form, Inbox, stamp
from .transport import TELL_AGAIN_S, Backlog, OnEnvelope, OnMalformed, OnPeer, OnPlain, ignore


@dataclass(frozen=True, kw_only=True)
class LinkQuality:
    """What happens to messages on their way from one node to another. Shares lie between 0 and 1."""

    drop: float = 0.0
    """Share that is lost."""
    duplicate: float = 0.0
    """Share that arrives twice."""
    reorder: float = 0.0
    """Share that may arrive before what was sent earlier."""
    delay_s: tuple[float, float] = (0.0, 0.0)
    """Least and greatest delay."""


class MemoryNetwork:
    """Joins the transports that it makes; `transport` is what a Node takes as its factory."""

    def __init__(self, seed: int = 0, quality: LinkQuality | None = None) -> None:
        self.counters: Counter[str] = Counter()
        """Messages: sent, delivered, duplicated, dropped (by chance), cut (by a partition), astray (nobody there)."""
        self.nodes: dict[str, MemoryTransport] = {}
        """By address."""
        self._seed = seed
        self._quality = quality or LinkQuality()
        self._special: dict[tuple[str, str], LinkQuality] = {}
        self._groups: list[frozenset[str]] = []

    def transport(
        self, identity: str, address: str, on_envelope: OnEnvelope, on_malformed: OnMalformed
    ) -> MemoryTransport:
        """The transport of one node. Raises LaunchError if the address is taken."""
        return MemoryTransport(self, identity, address, on_envelope, on_malformed)

    def set_quality(self, quality: LinkQuality, source: str | None = None, target: str | None = None) -> None:
        """From now on, of the link between two nodes (names without incarnation), in that direction, or of all."""
        if source is None or target is None:
            self._quality = quality
            self._special.clear()
        else:
            self._special[source, target] = quality

    def partition(self, *groups: Collection[str]) -> None:
        """Nodes of different groups don't reach each other from now on; who is in none reaches all."""
        self._groups = [frozenset(group) for group in groups]

    def heal(self) -> None:
        """Ends the partition; what was cut is lost."""
        self._groups = []

    def inject(self, sender: str, address: str, frames: list[bytes], *, bulk: bool = False) -> None:
        """Delivers the frames of a message as they are, at once: what a hostile peer might send."""
        node = self.nodes[address]
        (node.bulk if bulk else node.control).accept(sender.encode(), [memoryview(frame) for frame in frames])

    def reaches(self, source: str, target: str) -> bool:
        """Whether no partition lies between two nodes."""
        sides = [next((i for i, group in enumerate(self._groups) if n in group), None) for n in (source, target)]
        return None in sides or sides[0] == sides[1]

    def quality(self, source: str, target: str) -> LinkQuality:
        return self._special.get((source, target), self._quality)

    def random_of(self, link: str) -> random.Random:
        """Its own for each link, so that one link's traffic does not change another's fate."""
        return random.Random(f"{self._seed}:{link}")


class MemoryTransport:
    """One node's end of a MemoryNetwork; see transport.Transport."""

    def __init__(
        self, network: MemoryNetwork, identity: str, address: str, on_envelope: OnEnvelope, on_malformed: OnMalformed
    ) -> None:
        self.identity = identity
        self.local: set[str] = set()
        self.on_beat: OnPeer = ignore
        self.on_fenced: OnPeer = ignore
        self.network = network
        self.serials = itertools.count(1)
        self._links: dict[tuple[str, bool], _Link] = {}
        self._addresses: dict[str, str] = {}
        self._past: dict[str, str] = {}
        self._told: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()
        self.control, self.bulk = (
            Inbox(on_envelope, on_malformed, self._take_beat, lambda peer: self.on_fenced(peer), self._loop.time)
            for _ in range(2)
        )
        self.address = self.listen(address, None)

    @property
    def duplicates(self) -> int:
        """Messages that came a second time and were dropped."""
        return self.control.duplicates + self.bulk.duplicates

    def listen(self, address: str, keys: Keys | None) -> str:
        if address in self.network.nodes:
            raise LaunchError(f"can't bind {address}: {self.network.nodes[address].identity} listens there")
        self.network.nodes[address] = self
        return address

    def take_plain(self, on_plain: OnPlain) -> None:
        self.control.on_plain = self.bulk.on_plain = on_plain

    def connect(self, peer: str, address: str) -> None:
        self._addresses.setdefault(peer, address)

    def disconnect(self, peer: str) -> None:
        address = self._addresses.pop(peer, None)
        for way in (False, True):
            link = self._links.pop((peer, way), None)
            if link is not None:
                link.close()
        if address is not None:
            self._past[peer] = address

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer], bulk: bool = False) -> bool:
        if peer not in self._addresses:
            return False
        size = size_of(envelope, buffers)
        link = self._link(peer, bulk)
        link.backlog.add(size, system=is_system(envelope))
        head, *rest = join([(envelope, buffers)])
        link.carry([stamp(Form.BATCH, next(self.serials), head), *map(bytes, rest)], size)
        return True

    def beat(self, peer: str) -> None:
        if peer in self._addresses:
            self._tell(peer, Form.BEAT)

    def heard(self, peer: str) -> float | None:
        times = [at for at in (self.control.heard(peer), self.bulk.heard(peer)) if at is not None]
        return max(times, default=None)

    def tell_fenced(self, peer: str) -> None:
        address, now = self._past.get(peer), self._loop.time()
        if address is not None and now >= self._told.get(peer, now - TELL_AGAIN_S) + TELL_AGAIN_S:
            self._told[peer] = now
            self._addresses[peer] = address
            self._tell(peer, Form.FENCED)
            del self._addresses[peer]

    async def close(self, *, drain_s: float = 0.5) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._addresses.clear()
        for address in [address for address, node in self.network.nodes.items() if node is self]:
            del self.network.nodes[address]

    def _take_beat(self, peer: str) -> None:
        if peer in self._past:
            self.tell_fenced(peer)
        else:
            self.on_beat(peer)

    def _tell(self, peer: str, form: Form) -> None:
        link = self._link(peer, bulk=False)
        link.backlog.add(0, system=True)
        link.carry([stamp(form, next(self.serials))], 0)

    def _link(self, peer: str, bulk: bool) -> _Link:
        link = self._links.get((peer, bulk))
        if link is None:
            link = self._links[peer, bulk] = _Link(self, peer, self._addresses[peer], bulk)
        return link


class _Link:
    """One way to one peer: what is on it, by the time at which it arrives."""

    def __init__(self, transport: MemoryTransport, peer: str, address: str, bulk: bool) -> None:
        self.backlog = Backlog(peer)
        self._network = transport.network
        self._identity = transport.identity.encode()
        self._source, self._target = (key.partition("#")[0] for key in (transport.identity, peer))
        self._address = address
        self._is_bulk = bulk
        self._random = self._network.random_of(f"{transport.identity}>{peer}{'>' * bulk}")
        self._loop = asyncio.get_running_loop()
        self._on_it: list[tuple[float, int, list[bytes], int]] = []
        self._numbers = itertools.count()
        self._last_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def carry(self, frames: list[bytes], size: int) -> None:
        """Decides what becomes of a message that the backlog has counted with `size`."""
        quality, chance, counters = (
            self._network.quality(self._source, self._target),
            self._random,
            self._network.counters,
        )
        counters["sent"] += 1
        if chance.random() < quality.drop:
            counters["dropped"] += 1
            self.backlog.remove(1, size)
            return
        self._schedule(frames, size, quality)
        if chance.random() < quality.duplicate:
            counters["duplicated"] += 1
            self.backlog.add(size, system=True)
            self._schedule(frames, size, quality)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._on_it.clear()

    def _schedule(self, frames: list[bytes], size: int, quality: LinkQuality) -> None:
        at = self._loop.time() + self._random.uniform(*quality.delay_s)
        if self._random.random() >= quality.reorder:
            at = self._last_at = max(at, self._last_at)
        heapq.heappush(self._on_it, (at, next(self._numbers), frames, size))
        self._wait()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._on_it[0][0], self._arrive) if self._on_it else None

    def _arrive(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._on_it and self._on_it[0][0] <= now:
            _, _, frames, size = heapq.heappop(self._on_it)
            self.backlog.remove(1, size)
            node = self._network.nodes.get(self._address)
            if not self._network.reaches(self._source, self._target):
                self._network.counters["cut"] += 1
            elif node is None:
                self._network.counters["astray"] += 1
            else:
                self._network.counters["delivered"] += 1
                inbox = node.bulk if self._is_bulk else node.control
                inbox.accept(self._identity, [memoryview(frame) for frame in frames])
        self._wait()
