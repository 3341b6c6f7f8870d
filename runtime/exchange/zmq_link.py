"""A link between the ranks of a plan over ZeroMQ, for hosts without GPUs: who receives asks, so nothing piles up.

    receiver  DEALER --- epoch, rank ---> ROUTER  sender      an answer is one bucket; the next question follows it

A rank that waits is silent for as long as it takes its peer to come to it, so silence is no fault here: the transfer
has a deadline, and whoever learns of a death calls `abort` at the others. Knows nothing of plans and buckets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Any

import numpy as np
import zmq

from ..curve import Gate, Keys
from ..errors import TransferFailed
from ..transport import check_address, resolve

_ASK = Struct("<qq")
"""Epoch, rank that asks."""

_POLL_MS = 20
"""How soon an abort is noticed."""

Socket = zmq.Socket[bytes]


class ZmqLink:
    """One end; `send` and `receive` are called by one thread, `abort` by any. See transfer.Link."""

    def __init__(self, rank: int, address: str, *, keys: Keys | None = None) -> None:
        """Binds `address`, port 0 for any. With keys it lets in who has them, and needs the loop that runs here.

        Raises LaunchError if the address can be reached from elsewhere and there are no keys.
        """
        check_address(address, keys)
        self.rank = rank
        self._keys = keys
        self._context: zmq.Context[Socket] = zmq.Context(io_threads=1)
        self._gate: Gate | None = None
        self._router = self._context.socket(zmq.ROUTER)
        if keys is not None and address.startswith("tcp://"):
            self._gate = Gate(self._context, keys, lambda why: None)
            keys.guard(self._router)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, 1024)
        self._router.bind(resolve(address) if address.startswith("tcp://") else address)
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._peers: dict[int, str] = {}
        self._dealers: dict[int, Socket] = {}
        self._asking: dict[int, bytes] = {}
        """Ranks that wait for a bucket of this one -> where they are."""
        self._epoch = -1
        self._until = 0.0
        self._aborted = -1
        self._lock = threading.Lock()

    def begin(self, epoch: int, peers: Mapping[int, str], *, deadline_s: float) -> None:
        """From here on `epoch`, among `peers`: rank -> address. What is of an earlier one is not answered any more.

        Raises TransferFailed if the epoch is over already.
        """
        self._epoch, self._until = epoch, time.monotonic() + deadline_s
        self._check("the transfer")
        for dealer in self._dealers.values():
            dealer.close(linger=0)
        self._peers, self._dealers, self._asking = dict(peers), {}, {}

    def send(self, dest: int, data: np.ndarray) -> Callable[[], None]:
        """Raises TransferFailed if it was aborted, TimeoutError past the deadline."""
        what = f"rank {dest} to ask for a bucket"
        while dest not in self._asking:
            self._check(what)
            if self._router.poll(_POLL_MS):
                who, *rest = self._router.recv_multipart()
                if len(rest) == 1 and len(rest[0]) == _ASK.size:
                    epoch, rank = _ASK.unpack(rest[0])
                    if epoch == self._epoch:
                        self._asking[rank] = who
        self._router.send(self._asking.pop(dest), zmq.SNDMORE)
        tracker: Any = self._router.send(data.data, copy=False, track=True)

        def sent() -> None:
            while not tracker.done:
                self._check(f"rank {dest} to take a bucket")
                time.sleep(_POLL_MS / 1e3 / 20)

        return sent

    def receive(self, source: int, into: np.ndarray) -> np.ndarray:
        """Where ZeroMQ received it: `into` stays as it is. Raises as `send`."""
        dealer = self._dealers.get(source) or self._connect(source)
        dealer.send(_ASK.pack(self._epoch, self.rank))
        while not dealer.poll(_POLL_MS):
            self._check(f"a bucket from rank {source}")
        return np.frombuffer(dealer.recv(copy=False).buffer, np.uint8)

    def abort(self, epoch: int) -> None:
        """Ends what goes on in this epoch or earlier ones, within some milliseconds."""
        with self._lock:
            self._aborted = max(self._aborted, epoch)

    def close(self) -> None:
        """After `send` and `receive` have returned."""
        if self._gate is not None:
            self._gate.close()
        self._context.destroy(linger=0)

    def _connect(self, source: int) -> Socket:
        dealer = self._dealers[source] = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, 20)
        if self._keys is not None and self._peers[source].startswith("tcp://"):
            self._keys.introduce(dealer)
        dealer.connect(self._peers[source])
        return dealer

    def _check(self, what: str) -> None:
        if self._epoch <= self._aborted:
            raise TransferFailed(f"rank {self.rank} waited for {what} when epoch {self._epoch} was aborted")
        if time.monotonic() > self._until:
            raise TimeoutError(f"rank {self.rank} waited for {what} until the deadline of epoch {self._epoch}")
