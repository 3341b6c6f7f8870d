"""Memory that a node lends to others on its host: large arrays travel as a handle, and are mapped, not copied.

    free -> block, held by its local array and by one lease per message  -> nobody holds it -> free
                                      |                      |
              handle on the wire -> borrow.py maps it        given back: a word in shared memory, or its holder died

Grows in slabs up to a limit and keeps what it has: pages in use once are four times as fast as new ones. A block is
free again when its local array is gone and every lease was given back; that is looked at when memory is asked for, so
nobody sends a message about it. A lease or an array that can't be had is no error: the caller then does without.

Any thread may call. Knows nothing of messages or sockets; see lending.py.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from .arena_file import MAX_LEASES, OwnFile
from .blocks import PAGE_BYTES, Blocks
from .memfd import available_bytes

ARENA_BYTES = 1 << 30
"""Default limit of one node's arena."""

SLAB_BYTES = 32 << 20
"""It grows by at least so much."""

RESERVE_BYTES = 256 << 20
"""Of the machine's memory, left to others: it does not grow into them."""

_NOT_LEASED = np.uint64((1 << 64) - 1)
_MADV_POPULATE_WRITE = 23
_POPULATE_BYTES = 4 << 20
"""Pages made at a time: what else maps memory in this process waits as long."""

_FEW_LEASES = 64
"""Are looked at one by one."""


class Loan(NamedTuple):
    """One lease, as its lender needs it."""

    slot: int
    generation: int
    handle: bytes
    """Travels in place of the bytes."""
    start: int
    """Of the block."""
    target: np.ndarray | None
    """Where the bytes must be copied to before they are read; None: they are there."""


class Arena:
    """The memory one node lends. It is made when first needed: a process that forks before has nothing to share."""

    def __init__(self, key: str, limit_bytes: int = ARENA_BYTES) -> None:
        self.key = key
        self.limit_bytes = limit_bytes // PAGE_BYTES * PAGE_BYTES
        self.full = 0
        """Times that there was no room or no lease."""
        self._file: OwnFile | None = None
        self._data = np.zeros(0, np.uint8)
        self._address = 0
        self._porter: ThreadPoolExecutor | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._blocks = Blocks()
        self._holds: dict[int, int] = {}
        """start of a block -> its local array and its leases, counted."""
        self._dropped: deque[int] = deque()
        """Blocks whose local array is gone: filled by the garbage collector, which may not take the lock."""
        self._arrays: dict[int, weakref.ref[np.ndarray]] = {}
        self._leases: dict[int, tuple[int, int, str]] = {}
        """slot -> (generation, start of its block, key of its holder)."""
        self._expected = np.full(MAX_LEASES, _NOT_LEASED)
        """What `released` says in a slot whose lease was given back."""
        self._slots = deque(range(MAX_LEASES))
        """Free ones, used again as late as possible: one declared dead by mistake writes to a slot that is idle."""
        self._generation = 0

    def empty(self, shape: int | Sequence[int], dtype: Any) -> np.ndarray | None:
        """A new array in the arena, or None if there is no room. Its pages are made behind it, by another thread."""
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        nbytes = kind.itemsize * math.prod(dims)
        with self._lock:
            self._sweep()
            start = self._take(nbytes)
            if start is None:
                return None
            self._holds[start] = 1
            memory = self._data[start : start + nbytes]
        self._arrays[start] = weakref.ref(memory, lambda _: self._drop(start))
        # By a memoryview: a view of a view would hold the whole file, and not this part of it.
        return np.frombuffer(memory.data, kind).reshape(dims)

    def lend(self, source: np.ndarray) -> Loan | None:
        """Lends the bytes of `source`, to whom `assign` will say: where they are, if they were born here, else in a new
        block into which the caller copies them. None if there is no room, or no lease."""
        with self._lock:
            self._sweep()
            if self._closed or not self._slots:
                self.full += 1
                return None
            target = None
            found = self._find(source)
            if found is None:
                start = self._take(source.nbytes)
                if start is None:
                    return None
                found = start, start
                target = self._data[start : start + source.nbytes]
            start, offset = found
            slot = self._slots.popleft()
            self._generation += 1
            generation, file = self._generation, self._file
            assert file is not None
            file.offset[slot], file.nbytes[slot], file.generation[slot] = offset, source.nbytes, generation
            self._expected[slot] = generation
            self._leases[slot] = generation, start, ""
            self._holds[start] = self._holds.get(start, 0) + 1
            return Loan(slot, generation, file.handle(slot, generation), start, target)

    def holds(self, array: np.ndarray) -> bool:
        """Whether it was born here, or is a part of one that was."""
        with self._lock:
            return self._find(array) is not None

    def assign(self, loans: Sequence[Loan], holder: str) -> None:
        """Says which node gets what was lent."""
        with self._lock:
            for loan in loans:
                if self._is_out(loan):
                    self._leases[loan.slot] = loan.generation, loan.start, holder

    def hold(self, start: int) -> None:
        """Keeps a block, whatever becomes of its leases, until `release`."""
        with self._lock:
            self._holds[start] += 1

    def release(self, start: int) -> None:
        """One who held a block needs it no more."""
        with self._lock:
            self._release(start)

    def cancel(self, loans: Sequence[Loan]) -> None:
        """Takes back what was never sent."""
        with self._lock:
            for loan in loans:
                if self._is_out(loan):
                    self._end(loan.slot)

    def reclaim(self, holder: str) -> None:
        """Takes back all that a node held which is dead."""
        with self._lock:
            for slot in [slot for slot, lease in self._leases.items() if lease[2] == holder]:
                self._end(slot)

    def in_use(self) -> dict[str, int]:
        """bytes and blocks that somebody holds, leases that are out, size of the arena in bytes, times it was full."""
        with self._lock:
            self._sweep()
            return {
                "bytes": self._blocks.used, "blocks": len(self._blocks), "leases": len(self._leases),
                "size": self._blocks.size, "full": self.full,
            }  # fmt: skip

    @property
    def porter(self) -> ThreadPoolExecutor:
        """The one thread that makes pages and copies large arrays, in the order it was asked to."""
        if self._porter is None:
            self._porter = ThreadPoolExecutor(1, f"arena-{self.key}")
        return self._porter

    def close(self) -> None:
        """Lends no more. Who holds something keeps it."""
        with self._lock:
            self._closed = True
            if self._porter is not None:
                self._porter.shutdown(wait=False, cancel_futures=True)
            if self._file is not None:
                self._file.close()
                self._file = None

    # With the lock held -------------------------------------------------------------------------------------

    def _find(self, source: np.ndarray) -> tuple[int, int] | None:
        """The block in which `source` was born, and where it lies."""
        offset = _address(source) - self._address
        if not 0 <= offset < self._blocks.size:
            return None
        start = self._blocks.holding(offset, source.nbytes)
        return None if start is None else (start, offset)

    def _take(self, nbytes: int) -> int | None:
        start = self._blocks.allocate(nbytes)
        if start is None and self._grow(nbytes):
            start = self._blocks.allocate(nbytes)
        if start is None:
            self.full += 1
        return start

    def _grow(self, nbytes: int) -> bool:
        """Makes room for a block of `nbytes` at the end, unless the limit or the machine's memory forbids it."""
        blocks = self._blocks
        needed = -(-nbytes // PAGE_BYTES) * PAGE_BYTES - blocks.tail
        slab = min(max(SLAB_BYTES, needed), self.limit_bytes - blocks.size)
        if self._closed or slab < needed or available_bytes() < slab + RESERVE_BYTES:
            return False
        if self._file is None:
            try:
                self._file = OwnFile(self.key, self.limit_bytes)
            except OSError:
                self.limit_bytes = 0  # No such memory on this machine.
                return False
            self._data, self._address = self._file.data, _address(self._file.data)
        self.porter.submit(_populate, self._data[blocks.size : blocks.size + slab])
        blocks.grow(slab)
        return True

    def _is_out(self, loan: Loan) -> bool:
        return self._leases.get(loan.slot, (0,))[0] == loan.generation

    def _sweep(self) -> None:
        """Frees what nobody holds any more."""
        while self._dropped:
            self._release(self._dropped.popleft())
        file, leases = self._file, self._leases
        if file is None:
            return
        if len(leases) <= _FEW_LEASES:
            ended = [slot for slot, lease in leases.items() if file.released[slot] == lease[0]]
        else:
            ended = np.flatnonzero(np.asarray(file.released) == self._expected).tolist()
        for slot in ended:
            self._end(slot)

    def _end(self, slot: int) -> None:
        _, start, _ = self._leases.pop(slot)
        self._expected[slot] = _NOT_LEASED
        if self._file is not None:
            self._file.generation[slot] = 0
        self._slots.append(slot)
        self._release(start)

    def _release(self, start: int) -> None:
        self._holds[start] -= 1
        if not self._holds[start]:
            del self._holds[start]
            self._blocks.free(start)

    # From the garbage collector, in any thread and at any time ----------------------------------------------

    def _drop(self, start: int) -> None:
        del self._arrays[start]
        self._dropped.append(start)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _populate(memory: np.ndarray) -> None:
    """Has the kernel make the pages of `memory` without changing what is in them. Where it can't, they are made as they
    are first written."""
    libc = ctypes.CDLL(None, use_errno=True)
    start = _address(memory) // mmap.PAGESIZE * mmap.PAGESIZE
    end = _address(memory) + memory.nbytes
    for piece in range(start, end, _POPULATE_BYTES):
        length = ctypes.c_size_t(min(_POPULATE_BYTES, end - piece))
        if libc.madvise(ctypes.c_void_p(piece), length, _MADV_POPULATE_WRITE):
            return
