"""ZeroMQ between nodes: two ROUTERs to receive, two DEALERs per peer to send, one of each for bulk.

    send(peer, envelope) -> queue -> a message per loop turn -> DEALER ==ipc/tcp==> ROUTER -> inbox -> on_envelope(...)

Plain sockets on the loop's file descriptor, drained at each wake-up: zmq.asyncio costs 24 times the throughput. The
envelopes of one loop turn to one peer travel as one ZeroMQ message: their packs in the first frame, their buffers in
the frames after. By the bulk way a large message travels in chunks, few of them at a time, through sockets of its own:
a small message waits for none of them. Nothing is ever sent on a ROUTER, so its silent drops can't happen. A DEALER at
its high-water mark leaves the rest in our own queue, which is bounded. Knows nothing of actors.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections import OrderedDict
from functools import partial

import zmq

from .codec import Buffer
from .curve import Gate, Keys
from .errors import LaunchError
from .frame import Envelope
from .inbox import CHUNK_BYTES, Form, Inbox, stamp
from .outlet import BulkOutlet, Outlet, Socket
from .transport import (
    TELL_AGAIN_S,
    OnEnvelope,
    OnMalformed,
    OnPeer,
    OnPlain,
    bulk_address,
    check_address,
    ignore,
    resolve,
)

MAX_ENVELOPES_PER_DRAIN = 1000
"""Received before other work of the loop gets its turn."""

HIGH_WATER_MARK = 128
BULK_HIGH_WATER_MARK = 8
"""Messages that ZeroMQ holds for one peer; by the bulk way these are chunks."""

MAX_PIECE_BYTES = (1 << 31) + (1 << 25)
MAX_BULK_PIECE_BYTES = 1 << 26
"""Of one frame by each way. The inbox refuses less and says so; whoever goes beyond, ZeroMQ hangs up on."""

PORT_ATTEMPTS = 50
MAX_PAST_PEERS = 1024

SLICE_S = 0.001
"""And so long at most, beside the last message."""

# As plain numbers: pyzmq's enums cost as much as the receiving.
_NOBLOCK = int(zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_RCVMORE = int(zmq.RCVMORE)
_READABLE = int(zmq.POLLIN)


class ZmqTransport:
    """The sockets of one node; see transport.Transport."""

    def __init__(
        self,
        identity: str,
        address: str,
        on_envelope: OnEnvelope,
        on_malformed: OnMalformed,
        *,
        keys: Keys | None = None,
    ) -> None:
        """Binds `address`. `keys`: for tcp, the system's. Raises LaunchError."""
        self.identity = identity
        self.local: set[str] = set()
        self.on_beat: OnPeer = ignore
        self.on_fenced: OnPeer = ignore
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._on_malformed = on_malformed
        receive = partial(Inbox, on_envelope, on_malformed, self._take_beat, lambda peer: self.on_fenced(peer))
        self._control = receive(self._loop.time)
        self._bulk = receive(self._loop.time, 2 * CHUNK_BYTES)
        self.serials = itertools.count(1)
        """Of all that this node sends: they rise on every way, also if a peer is connected again."""
        self._addresses: dict[str, str] = {}
        self._links: dict[str, _Link] = {}
        self._past: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """Of peers that were disconnected: the address, and when they were last told so. The oldest are forgotten."""
        self._routers: list[Socket] = []
        self._gate: Gate | None = None
        self._context: zmq.Context[Socket] = zmq.Context(io_threads=1)
        try:
            self.address = self.listen(address, keys)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    @property
    def keys(self) -> Keys | None:
        """The system's, for tcp."""
        return self._keys

    @property
    def duplicates(self) -> int:
        """Messages that came a second time and were dropped."""
        return self._control.duplicates + self._bulk.duplicates

    def listen(self, address: str, keys: Keys | None) -> str:
        check_address(address, keys)
        self._keys = self._keys or keys
        if address.startswith("tcp://") and self._keys is not None and self._gate is None:
            self._gate = Gate(self._context, self._keys, lambda why: self._on_malformed("?", f"refused {why}"))
        address, routers = self._bind_ipc(address) if address.startswith("ipc://") else self._bind_tcp(resolve(address))
        for router, inbox in zip(routers, (self._control, self._bulk), strict=True):
            drain = partial(self._drain, router, inbox)
            self._routers.append(router)
            self._loop.add_reader(router.fileno(), drain)
            self._loop.call_soon(drain)
        return address

    def take_plain(self, on_plain: OnPlain) -> None:
        self._control.on_plain = self._bulk.on_plain = on_plain

    def connect(self, peer: str, address: str) -> None:
        """Says where a peer is, whose socket had better be bound: ZeroMQ tries again only after a while.

        The way to it is opened by the first message: most nodes never talk to most others.
        """
        self._addresses.setdefault(peer, address)
        if address.startswith("ipc://"):
            self.local.add(peer)

    def disconnect(self, peer: str) -> None:
        self.local.discard(peer)
        address, link = self._addresses.pop(peer, None), self._links.pop(peer, None)
        self._control.forget(peer)
        self._bulk.forget(peer)
        if link is not None:
            link.close(linger_ms=0)
        if address is not None:
            self._past[peer] = address, -TELL_AGAIN_S
            if len(self._past) > MAX_PAST_PEERS:
                self._past.popitem(last=False)

    def send(self, peer: str, envelope: Envelope, buffers: list[Buffer], bulk: bool = False) -> bool:
        link = self._links.get(peer) or self._open(peer)
        if link is None:
            return False
        (link.bulk if bulk else link.control).put(envelope, buffers)
        return True

    def beat(self, peer: str) -> None:
        link = self._links.get(peer) or self._open(peer)
        if link is not None:
            link.control.beat()

    def heard(self, peer: str) -> float | None:
        times = [at for at in (self._control.heard(peer), self._bulk.heard(peer)) if at is not None]
        return max(times, default=None)

    def tell_fenced(self, peer: str) -> None:
        address, told = self._past.get(peer, ("", 0.0))
        now = self._loop.time()
        if address.startswith("tcp://") and now - told >= TELL_AGAIN_S:
            self._past[peer] = address, now
            dealer = self.dealer(address, 1)
            dealer.send(stamp(Form.FENCED, next(self.serials)))
            dealer.close(linger=1000)

    async def close(self, *, drain_s: float = 0.5) -> None:
        until = self._loop.time() + drain_s
        outlets = [outlet for link in self._links.values() for outlet in link.outlets()]
        for outlet in outlets:
            outlet.flush()
            await outlet.sent(until)
        for router in self._routers:
            self._loop.remove_reader(router.fileno())
        for link in self._links.values():
            link.close(linger_ms=int(drain_s * 1000))
        self._links.clear()
        self._addresses.clear()
        self.local.clear()
        for router in self._routers:
            router.close(linger=0)
        if self._gate is not None:
            self._gate.close()
        await self._loop.run_in_executor(None, self._context.term)

    def dealer(self, address: str, high_water_mark: int) -> Socket:
        """A socket that sends to the node at `address`."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self.identity.encode())
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDHWM, high_water_mark)
        dealer.setsockopt(zmq.RECONNECT_IVL, 20)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if address.startswith("tcp://"):
            _harden(dealer, address)
            if self._keys is not None:
                self._keys.introduce(dealer)
        dealer.connect(address)
        return dealer

    def _take_beat(self, peer: str) -> None:
        if peer in self._past:
            self.tell_fenced(peer)
        else:
            self.on_beat(peer)

    def _open(self, peer: str) -> _Link | None:
        address = self._addresses.get(peer)
        if address is None:
            return None
        link = self._links[peer] = _Link(self, peer, address)
        return link

    # Receiving ----------------------------------------------------------------------------------------------

    def _drain(self, router: Socket, inbox: Inbox) -> None:
        work = 0
        until = time.perf_counter() + SLICE_S
        try:
            while not router.closed:
                # A chunk costs as much as hundreds of small envelopes.
                work += inbox.accept(*_receive(router)) if inbox is self._control else self._accept_chunk(router)
                # To run into Again would cost more than the message.
                if not _has_more(router):
                    return
                if work >= MAX_ENVELOPES_PER_DRAIN or time.perf_counter() > until:
                    break
        except zmq.Again:
            return
        except BaseException:
            # The descriptor won't tell again of what still waits.
            self._loop.call_soon(self._drain, router, inbox)
            raise
        if not router.closed:
            self._loop.call_soon(self._drain, router, inbox)

    def _accept_chunk(self, router: Socket) -> int:
        identity, frames = _receive(router)
        self._bulk.accept(identity, frames)
        return 1 + MAX_ENVELOPES_PER_DRAIN * sum(map(len, frames)) // CHUNK_BYTES

    # Binding ------------------------------------------------------------------------------------------------

    def _bind_ipc(self, address: str) -> tuple[str, list[Socket]]:
        for path in (address, bulk_address(address)):
            # ZeroMQ would take the path away from whoever listens there, and say nothing.
            if _answers(path.removeprefix("ipc://")):
                raise LaunchError(f"can't bind {path}: another process listens there; stop it, or use another folder")
        return address, self._bind(address)

    def _bind_tcp(self, address: str) -> tuple[str, list[Socket]]:
        """Port 0 stands for any whose neighbour, for bulk, is free too."""
        any_port = address.endswith(":0")
        for attempt in range(PORT_ATTEMPTS):
            try:
                routers = self._bind(address)
            except LaunchError:
                if not any_port or attempt == PORT_ATTEMPTS - 1:
                    raise
            else:
                return routers[0].getsockopt_string(zmq.LAST_ENDPOINT), routers
        raise AssertionError("every attempt returns or raises")

    def _bind(self, address: str) -> list[Socket]:
        """The control socket at `address`, the bulk socket beside it."""
        control, bulk = self._router(HIGH_WATER_MARK, address), self._router(BULK_HIGH_WATER_MARK, address)
        control.setsockopt(zmq.MAXMSGSIZE, MAX_PIECE_BYTES)
        bulk.setsockopt(zmq.MAXMSGSIZE, MAX_BULK_PIECE_BYTES)
        try:
            control.bind(address)
            address = bulk_address(control.getsockopt_string(zmq.LAST_ENDPOINT))
            bulk.bind(address)
        except zmq.ZMQError as error:
            control.close(linger=0)
            bulk.close(linger=0)
            remedy = (
                "choose another port, or port 0 for any that is free" if "tcp" in address else "is its folder there?"
            )
            raise LaunchError(f"can't bind {address}: {zmq.strerror(error.errno or 0)}; {remedy}") from None
        return [control, bulk]

    def _router(self, high_water_mark: int, address: str) -> Socket:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.RCVHWM, high_water_mark)
        # A peer that connects again is the same peer: without this its new connection would never be read.
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if address.startswith("tcp://"):
            _harden(router, address)
            if self._keys is not None:
                self._keys.guard(router)
        return router


class _Link:
    """The two ways to one peer; the bulk way is opened when something is sent by it."""

    def __init__(self, transport: ZmqTransport, peer: str, address: str) -> None:
        self._address = address
        self._transport = transport
        self._peer = peer
        self._bulk: BulkOutlet | None = None
        self.control = Outlet(peer, transport.dealer(address, HIGH_WATER_MARK), transport.serials)

    @property
    def bulk(self) -> BulkOutlet:
        if self._bulk is None:
            dealer = self._transport.dealer(bulk_address(self._address), BULK_HIGH_WATER_MARK)
            self._bulk = BulkOutlet(self._peer, dealer, self._transport.serials)
        return self._bulk

    def outlets(self) -> list[Outlet]:
        return [self.control] if self._bulk is None else [self.control, self._bulk]

    def close(self, *, linger_ms: int) -> None:
        for outlet in self.outlets():
            outlet.close(linger_ms)


def _has_more(router: Socket) -> bool:
    return not router.closed and bool(int(router.getsockopt(_EVENTS)) & _READABLE)


def _receive(router: Socket) -> tuple[bytes, list[Buffer]]:
    """The sender's identity and the frames of one message. Raises zmq.Again."""
    identity = router.recv(_NOBLOCK)
    frames: list[Buffer] = [router.recv(_NOBLOCK)]
    more = router.getsockopt(_RCVMORE)
    while more:
        part = router.recv(_NOBLOCK, copy=False)
        frames.append(part.buffer)
        more = part.more
    return identity, frames


def _harden(socket: Socket, address: str) -> None:
    """Has a tcp socket notice when the other end is gone, and drop who does not finish its handshake."""
    for option, value in (
        (zmq.IPV6, int("[" in address)),
        (zmq.HANDSHAKE_IVL, 10_000),
        (zmq.HEARTBEAT_IVL, 2_000),
        (zmq.HEARTBEAT_TIMEOUT, 10_000),
        (zmq.HEARTBEAT_TTL, 10_000),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 30),
        (zmq.TCP_KEEPALIVE_INTVL, 10),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        socket.setsockopt(option, value)


def _answers(path: str) -> bool:
    """Whether a process listens on the unix socket at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
