"""Weights from one process to others on the same host, by memory that both have mapped.

    publisher: buffer [header | version 7]   [header | version 8]   [header | version 9]   <- publish writes a free one
                       kept: somebody goes on with it   |              the newest stays
    Manifest (a message) --> receiver: opens /proc/<pid>/fd/<fd>, maps, verifies; copies out, or reads where it lies

A buffer is an anonymous file (memfd.py): the kernel frees it with its last holder, however that one dies. The header
holds the generation twice, written before and after the bytes; a reader whose manifest names another one is refused.
What is not the newest, and that nobody needs, is overwritten: one version stays while the next is written. Knows
nothing of models, and sends no message: manifests travel by whatever the caller has.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..curve import Keys
from ..errors import BadWeights, CorruptWeights, ExchangeFull
from . import payload
from .carrier import Copy
from .header import BUCKET_BYTES, Manifest, Route, Seat, host_id
from .mapped import BEGUN, DONE, INCARNATION, Mapped

if TYPE_CHECKING:
    from .tree import TreeSource


class Publisher:
    """Owns the buffers. `publish` on one thread; readers need this process alive only until they have mapped a buffer.

    `budget_bytes` bounds what older versions, kept for those who still use them, may hold; by default there may be one.
    """

    collective: ClassVar[bool] = False

    def __init__(self, name: str, *, budget_bytes: int | None = None) -> None:
        self.name = name
        self.manifest: Manifest | None = None
        """The last version that was published whole."""
        self._budget_bytes = budget_bytes
        self._incarnation = secrets.randbits(63) | 1
        self._generation = 0
        self._buffers: list[Mapped] = []
        self._seat = Seat(host=host_id())
        self._tree: TreeSource | None = None
        self._lock = threading.Lock()
        """Of which buffers there are: the tree asks from a thread of its own."""

    @property
    def versions(self) -> list[int]:
        """The versions that are there."""
        return sorted(b.manifest.version for b in self._buffers if b.manifest is not None)

    def serve(self, address: str, keys: Keys | None = None) -> None:
        """Lets members of other hosts fetch by the tree; see Shelf."""
        from .tree import TreeSource

        self._tree = TreeSource(self, address, keys=keys)
        self._seat = replace(self._seat, address=self._tree.address)

    def publish(
        self,
        version: int,
        tensors: Mapping[str, np.ndarray],
        *,
        bfloat16: Collection[str] = (),
        keep: Mapping[int, Sequence[str]] | None = None,
    ) -> Manifest:
        """Copies `tensors` where receivers can get them; those named in `bfloat16` are its bits, in uint16. Versions in
        `keep` (and who needs each) are not overwritten, nor is the newest.

        Raises BadWeights (NaN, infinity, a dtype that can't travel, a version before the newest) or ExchangeFull; then
        `manifest` stays good.
        """
        if self.manifest is not None and version < self.manifest.version:
            raise BadWeights(
                f"version {version} of {self.name} can't follow {self.manifest.version}: versions never go back; after "
                "a rewind to a checkpoint, say so first (Publisher.rewind)"
            )
        specs, nbytes = payload.layout(tensors, bfloat16)
        buffer = self._free(version, nbytes, keep or {})
        self._generation += 1
        buffer.words[INCARNATION] = self._incarnation
        buffer.words[BEGUN] = self._generation
        checksums = payload.fill(buffer.payload, specs, nbytes, tensors, version)
        buffer.words[DONE] = self._generation
        buffer.manifest = self.manifest = Manifest(
            name=self.name,
            version=version,
            pid=os.getpid(),
            fd=buffer.fd,
            incarnation=self._incarnation,
            generation=self._generation,
            nbytes=nbytes,
            bucket_bytes=BUCKET_BYTES,
            tensors=specs,
            checksums=checksums,
            seat=self._seat,
        )
        return self.manifest

    def rewind(self) -> None:
        """From here on any version may be published: who made the weights has gone back to a checkpoint."""
        with self._lock:
            self.manifest = None
            self._incarnation = secrets.randbits(63) | 1
            for buffer in self._buffers:
                buffer.manifest = None

    def written(self, incarnation: int, generation: int) -> tuple[Manifest, np.ndarray] | None:
        """What was written as number `generation`, and its bytes, uint8; None if it is not there any more."""
        with self._lock:
            wanted = incarnation, generation
            for buffer in self._buffers:
                if (held := buffer.manifest) is not None and (held.incarnation, held.generation) == wanted:
                    return held, buffer.payload
        return None

    def close(self) -> None:
        """Frees the buffers (receivers that have them mapped keep them until they close)."""
        if self._tree is not None:
            self._tree.close()
            self._tree = None
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()
        self.manifest = None

    # As a Source: there is nothing to do for a receiver, which comes and takes.

    def open(self, epoch: int) -> tuple[str, bytes]:
        return "", b""

    def send(self, manifest: Manifest, route: Route) -> None: ...

    def abort(self, epoch: int) -> None: ...

    def _free(self, version: int, nbytes: int, keep: Mapping[int, Sequence[str]]) -> Mapped:
        """A buffer to write to. Raises ExchangeFull."""
        with self._lock:
            older = [b for b in self._buffers if b.manifest is not None and b.manifest is not self.manifest]
            kept = [b for b in older if b.manifest is not None and b.manifest.version in keep]
            self._refuse_to_keep(kept, version, nbytes, keep)
            free = [
                b for b in self._buffers if b not in kept and (b.manifest is None or b.manifest is not self.manifest)
            ]
            fitting = next((b for b in free if len(b.payload) >= nbytes), None)
            for buffer in free:
                buffer.manifest = None
                if buffer is not fitting:
                    self._buffers.remove(buffer)
                    buffer.close()
        if fitting is not None:
            return fitting
        buffer = Mapped.create(self.name, nbytes)
        with self._lock:
            self._buffers.append(buffer)
        return buffer

    def _refuse_to_keep(self, kept: list[Mapped], version: int, nbytes: int, keep: Mapping[int, Sequence[str]]) -> None:
        held = sum(len(buffer.payload) for buffer in kept)
        budget = len(kept[0].payload) if self._budget_bytes is None and kept else self._budget_bytes or 0
        if held > budget:
            versions = sorted(buffer.manifest.version for buffer in kept if buffer.manifest)
            holders = "; ".join(f"version {number} for {', '.join(keep[number])}" for number in versions)
            raise ExchangeFull(
                f"version {version} of {self.name} ({nbytes / 2**20:.1f} MiB) was not published: older versions hold "
                f"{held / 2**20:.1f} MiB of memory, and their budget is {budget / 2**20:.1f} MiB ({holders}); "
                "have these go on with the newest version, or raise the budget"
            )


class Receiver:
    """Fetches published weights. Keeps the buffers of living publishers mapped, so that a fetch is one copy."""

    def __init__(self) -> None:
        self._mapped: dict[str, dict[int, Mapped]] = {}
        """name of the publisher -> its descriptor -> mapping, all of one incarnation."""
        self._incarnation: dict[str, int] = {}

    def receive(
        self,
        manifest: Manifest,
        route: Route | None = None,
        into: Mapping[str, np.ndarray] | None = None,
        copies: Sequence[Copy] | None = None,
    ) -> Mapping[str, np.ndarray]:
        """The tensors of `manifest`: verified copies that the caller owns; or, in `into`, the boxes of `copies`.

        `into` holds arrays to copy into (memory in use is faster than new memory); after an error their contents are
        undefined. Raises StaleIncarnation if the publisher has gone or has overwritten this version: ask it for the
        newest manifest. Raises CorruptWeights if the bytes do not match.
        """
        manifest.check()
        targets = into if copies is not None and into is not None else payload.targets_for(manifest, into)
        with self._reading(manifest) as source:
            if copies is None:
                payload.take(source, manifest, targets)
            else:
                payload.copy_boxes(source, manifest, targets, copies)
        return targets

    @contextmanager
    def hold(self, manifest: Manifest) -> Iterator[Mapping[str, np.ndarray]]:
        """The tensors where they lie, verified, read-only, while the block runs: for who makes something else of them,
        and so would copy a copy. Raises as `receive`, at the end of the block too: what was made of them is void then.
        """
        manifest.check()
        with self._reading(manifest) as source:
            payload.verify(source, manifest)
            yield manifest.views(source)

    @contextmanager
    def _reading(self, manifest: Manifest) -> Iterator[np.ndarray]:
        """The mapped payload. Whatever goes wrong inside while it was overwritten, went wrong because of that."""
        buffer = self._map(manifest)
        try:
            yield buffer.payload
        except CorruptWeights:
            buffer.require(manifest)
            raise
        buffer.require(manifest)

    def abort(self, epoch: int) -> None:
        """Copying needs nobody else: there is nothing to end."""

    def close(self) -> None:
        """Unmaps everything."""
        for name in list(self._mapped):
            self._forget(name)

    def _map(self, manifest: Manifest) -> Mapped:
        if self._incarnation.get(manifest.name) != manifest.incarnation:
            self._forget(manifest.name)
            self._incarnation[manifest.name] = manifest.incarnation
        mapped = self._mapped.setdefault(manifest.name, {})
        if manifest.fd in mapped and not mapped[manifest.fd].holds(manifest):
            # Overwritten, or the publisher has made a larger buffer that got the same descriptor.
            mapped.pop(manifest.fd).close()
        if manifest.fd not in mapped:
            buffer = Mapped.open(manifest)
            buffer.require(manifest)
            mapped[manifest.fd] = buffer
        return mapped[manifest.fd]

    def _forget(self, name: str) -> None:
        for buffer in self._mapped.pop(name, {}).values():
            buffer.close()
        self._incarnation.pop(name, None)
