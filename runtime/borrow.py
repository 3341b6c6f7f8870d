"""Arrays that other nodes of this host lend: finds the bytes behind a handle, gives them back when nobody here looks.

    handle -> map the lender's file (once) -> lease valid? -> read-only view ... garbage-collected -> `released` word

The view keeps the mapping alive, so it is good even after its lender has died. Knows nothing of messages.
"""

from __future__ import annotations

import os
import struct
import weakref
from functools import partial

import numpy as np

from .arena_file import MAX_LEASES, Handle, PeerFile
from .codec import Buffer
from .errors import CodecError, LenderDied


class Borrowing:
    """What this node has mapped of others."""

    def __init__(self) -> None:
        self._lenders: dict[str, _Lender] = {}

    def borrow(self, lender: str, packed: Buffer) -> memoryview:
        """The bytes of a handle that came from the node `lender`, read-only; borrowed as long as they are in use.

        Raises LenderDied, or CodecError if it leads to nothing that `lender` lends.
        """
        try:
            handle = Handle.unpack(packed)
        except struct.error:
            raise CodecError(f"a handle of lent memory has another length than {len(packed)} bytes") from None
        known = self._lenders.get(lender)
        if known is None:
            known = self._lenders[lender] = _Lender(lender, _open(lender, handle))
        return known.borrow(handle)

    def forget(self, lender: str) -> None:
        """It is dead. What is still in use here stays."""
        self._lenders.pop(lender, None)

    def close(self) -> None:
        """Forgets all."""
        self._lenders.clear()


class _Lender:
    def __init__(self, key: str, file: PeerFile) -> None:
        self._key = key
        self._file = file
        self._views: dict[int, weakref.ref[np.ndarray]] = {}
        """By generation: what is in use here."""
        self._pid = os.getpid()

    def borrow(self, handle: Handle) -> memoryview:
        slot, generation, file = handle.slot, handle.generation, self._file
        if handle.identity != file.identity or slot >= MAX_LEASES:
            raise CodecError(f"the handle is of no arena of {self._key}")
        known = self._views.get(generation)
        if known is not None:  # The message came twice.
            view = known()
            if view is None:
                raise self._stale(generation)
            return view.data
        if file.generation[slot] != generation or file.released[slot] == generation:
            raise self._stale(generation)
        offset, nbytes = file.offset[slot], file.nbytes[slot]
        if offset + nbytes > file.data.nbytes:
            raise CodecError(f"{self._key} lends {nbytes} bytes at {offset}, which is outside its arena")
        view = file.data[offset : offset + nbytes]
        self._views[generation] = weakref.ref(view, partial(self._give_back, slot, generation))
        return view.data

    def _give_back(self, slot: int, generation: int, _: object) -> None:
        """Runs in any thread, and at any time; not for the copy that a forked child has of this object."""
        if os.getpid() == self._pid:
            self._file.released[slot] = generation
            self._views.pop(generation, None)

    def _stale(self, generation: int) -> CodecError:
        return CodecError(f"lease {generation} of memory of {self._key} has ended")


def _open(lender: str, handle: Handle) -> PeerFile:
    try:
        return PeerFile(lender, handle)
    except (FileNotFoundError, ProcessLookupError):
        raise LenderDied(f"{lender} has lent an array and ended before it was read; ask again") from None
    except OSError as error:
        raise CodecError(f"can't map the arena of {lender}: {error}") from None
