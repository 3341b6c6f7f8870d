"""Memory that nodes lend each other: never two owners of a byte, never old bytes, and all of it comes back."""

import asyncio
import contextlib
import gc
import os
import random
import struct
import subprocess
import sys
import threading
from collections import deque
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from arena_actors import Giver, Keeper
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sample_actors import Echo, Point, until
from test_node import network

from headrace.runtime import System, codec, memfd
from headrace.runtime import arena as arena_module
from headrace.runtime import lending as lending_module
from headrace.runtime.arena import Arena
from headrace.runtime.arena_file import HANDLE_BYTES, HEADER_BYTES, MAX_LEASES, Handle
from headrace.runtime.blocks import PAGE_BYTES, Blocks
from headrace.runtime.borrow import Borrowing
from headrace.runtime.codec import decode, encode
from headrace.runtime.doors import Delivery, Door
from headrace.runtime.errors import ActorDied, CodecError, LenderDied, MailboxFull
from headrace.runtime.lending import INLINE_BYTES, Lending
from headrace.runtime.mailbox import Lane
from headrace.runtime.protocol import Kind

LARGE = codec.LEND_BYTES
SMALL = 2000
HUGE = 4 * INLINE_BYTES
"""Copied by the arena's thread."""


class Wire:
    """A transport that keeps what is sent."""

    def __init__(self, *peers):
        self.local = set(peers)
        self.sent = deque()
        self.connected = True

    def send(self, peer, envelope, buffers, bulk=False):
        if self.connected:
            self.sent.append((peer, envelope, buffers))
        return self.connected


def send(lending, peer, value):
    """As a node does."""
    try:
        envelope, buffers = encode(value, lending.lend)
    except CodecError:
        lending.undo()
        raise
    return (lending.cargo or lending.transport).send(peer, envelope, buffers)


def read(lending, sender, message):
    """As a node does."""
    _, envelope, buffers = message
    try:
        return decode(envelope, buffers, partial(lending.borrow, sender))
    except CodecError:
        lending.refuse(sender, buffers)
        raise


def lender(key="a#1", *peers, limit=1 << 23, unsent=None):
    wire = Wire(*peers)
    return Lending(key, limit, wire, unsent or (lambda *_: None)), wire


@pytest.fixture
def pair():
    """One who lends, the wire, and one who borrows."""
    a, wire = lender("a#1", "b#1")
    b, _ = lender("b#1")
    yield a, wire, b
    a.arena.close()


def pattern(n, seed=1):
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def ordinary(message):
    """How many arrays of a message travel in it."""
    return sum(len(buffer) > HANDLE_BYTES for buffer in message[2])


def nothing_lent(lending):
    gc.collect()
    used = lending.arena.in_use()
    return used["bytes"] == used["leases"] == used["blocks"] == 0


# The allocator, beside a model that remembers the owner of every page


class BlocksMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.blocks, self.pages, self.owned = Blocks(), [], {}

    @rule(pages=st.integers(1, 30))
    def grow(self, pages):
        self.blocks.grow(pages * PAGE_BYTES)
        self.pages += [None] * pages

    @rule(nbytes=st.integers(1, 12 * PAGE_BYTES))
    def allocate(self, nbytes):
        needed = -(-nbytes // PAGE_BYTES)
        fits = [i for i in range(len(self.pages) - needed + 1) if not any(self.pages[i : i + needed])]
        start = self.blocks.allocate(nbytes)
        if not fits:
            assert start is None
            return
        assert start == fits[0] * PAGE_BYTES, "the lowest place that is large enough"
        self.owned[start] = needed
        self.pages[fits[0] : fits[0] + needed] = [start + 1] * needed

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        start = data.draw(st.sampled_from(sorted(self.owned)))
        first, count = start // PAGE_BYTES, self.owned.pop(start)
        self.pages[first : first + count] = [None] * count
        self.blocks.free(start)

    @rule(offset=st.integers(0, 100 * PAGE_BYTES), nbytes=st.integers(1, 5 * PAGE_BYTES))
    def holding(self, offset, nbytes):
        owners = set(self.pages[offset // PAGE_BYTES : (offset + nbytes - 1) // PAGE_BYTES + 1])
        inside = offset + nbytes <= self.blocks.size and len(owners) == 1 and None not in owners
        assert self.blocks.holding(offset, nbytes) == (owners.pop() - 1 if inside else None)

    @invariant()
    def counts(self):
        assert self.blocks.used == sum(page is not None for page in self.pages) * PAGE_BYTES
        assert self.blocks.size == len(self.pages) * PAGE_BYTES and len(self.blocks) == len(self.owned)
        free = next((i for i, page in enumerate(reversed(self.pages)) if page is not None), len(self.pages))
        assert self.blocks.tail == free * PAGE_BYTES


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


# Lending, beside a model that remembers what every message held


class LendingMachine(RuleBasedStateMachine):
    """One node lends to two; messages are read, lost, refused and thrown away in any order; peers die and return."""

    @initialize()
    def begin(self):
        self.small = pytest.MonkeyPatch()
        for module in (codec, lending_module):
            self.small.setattr(module, "LEND_BYTES", SMALL)
        self.a, self.wire = lender("a#1", "b#1", "c#1", limit=40 * SMALL)
        self.peers = {name: Lending(name, 0, Wire(), lambda *_: None) for name in ("b#1", "c#1")}
        self.born, self.values, self.seed = [], [], 0

    def array(self, nbytes):
        self.seed += 1
        return pattern(nbytes, self.seed)

    @rule(nbytes=st.integers(SMALL, 4 * SMALL))
    def bear(self, nbytes):
        content = self.array(nbytes)
        array = self.a.empty(nbytes, np.uint8)
        array[:] = content
        self.born.append(array)

    @rule(peer=st.sampled_from(["b#1", "c#1"]), sizes=st.lists(st.integers(1, 3 * SMALL), min_size=1, max_size=3))
    def send_copies(self, peer, sizes):
        assert send(self.a, peer, [self.array(n) for n in sizes])

    @precondition(lambda self: self.born)
    @rule(peer=st.sampled_from(["b#1", "c#1"]), data=st.data())
    def send_born(self, peer, data):
        array = self.born[data.draw(st.integers(0, len(self.born) - 1))]
        first = data.draw(st.integers(0, len(array) - 1))
        assert send(self.a, peer, [array[first:]])

    @rule(sizes=st.lists(st.integers(SMALL, 2 * SMALL), max_size=2), connected=st.booleans())
    def send_in_vain(self, sizes, connected):
        value = [self.array(n) for n in sizes]
        if connected:
            with pytest.raises(CodecError):
                send(self.a, "b#1", [value, object()])
        else:
            self.wire.connected = False
            assert not send(self.a, "b#1", value)
            self.wire.connected = True

    @precondition(lambda self: self.wire.sent)
    @rule(how=st.sampled_from(["read", "twice", "refuse"]))
    def receive(self, how):
        message = peer, _, buffers = self.wire.sent.popleft()
        if how == "refuse":
            self.peers[peer].refuse("a#1", buffers)
            return
        values = [read(self.peers[peer], "a#1", message) for _ in range(1 + (how == "twice"))]
        self.values.append((peer, values, [array.copy() for array in values[0]]))

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def forget(self, data):
        self.values.pop(data.draw(st.integers(0, len(self.values) - 1)))

    @precondition(lambda self: self.born)
    @rule()
    def forget_born(self):
        self.born.pop(0)

    @rule(peer=st.sampled_from(["b#1", "c#1"]))
    def die(self, peer):
        self.wire.sent = deque(item for item in self.wire.sent if item[0] != peer)
        self.values = [kept for kept in self.values if kept[0] != peer]
        self.peers[peer] = Lending(peer, 0, Wire(), lambda *_: None)
        self.a.peer_down(peer)

    @invariant()
    def what_is_held_stays_as_it_was(self):
        for _, values, contents in getattr(self, "values", []):
            for value in values:
                assert all(np.array_equal(got, content) for got, content in zip(value, contents, strict=True))

    def teardown(self):
        if hasattr(self, "a"):
            while self.wire.sent:
                self.receive("read")
            self.values.clear()
            self.born.clear()
            assert nothing_lent(self.a)
            self.a.arena.close()
            self.small.undo()


TestLending = LendingMachine.TestCase
TestLending.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_arrays_arrive_as_they_were_and_read_only(pair):
    a, wire, b = pair
    sent = [np.arange(LARGE, dtype=np.float32).reshape(4, -1), pattern(LARGE), np.ones((3, LARGE), bool).T, np.ones(5)]
    send(a, "b#1", sent)
    message = _, envelope, buffers = wire.sent.pop()
    assert len(envelope) + sum(map(len, buffers)) < 1000
    got = read(b, "a#1", message)
    for x, y in zip(sent, got, strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    with pytest.raises(ValueError, match="read-only"):
        got[0][0, 0] = 1
    assert a.arena.in_use()["leases"] == 3
    part = got[1][5:7]
    del got
    assert a.arena.in_use()["leases"] == 1 and np.array_equal(part, sent[1][5:7]), "a part of it holds it"
    del part
    assert nothing_lent(a)


def test_what_is_born_in_the_arena_is_not_copied(pair):
    a, wire, b = pair
    array = a.empty((3, LARGE), np.int32)
    array[:] = 7
    for part in (array, array[1], array[1:].view(np.float32)):
        send(a, "b#1", part)
    got = [read(b, "a#1", message) for message in wire.sent]
    wire.sent.clear()
    assert a.arena.in_use()["blocks"] == 1
    array[1, 0] = 9  # What nobody may do shows that it is the same memory.
    assert got[0][1, 0] == got[1][0] == got[2].view(np.int32)[0, 0] == 9
    del array, part
    assert a.arena.in_use()["blocks"] == 1 and got[0][2, 3] == 7, "held by those who have it"
    del got
    assert nothing_lent(a)


@pytest.mark.parametrize("shape, dtype", [(10, "f4"), ((), "f8"), ((0, LARGE), "f4"), ((LARGE,), object)])
def test_empty_makes_any_array(pair, shape, dtype):
    a, _, _ = pair
    array, plain = a.empty(shape, dtype), np.empty(shape, dtype)
    assert (array.shape, array.dtype, a.arena.in_use()["blocks"]) == (plain.shape, plain.dtype, 0)
    for wrong in (-1, (-1, -LARGE)):
        with pytest.raises(ValueError, match="negative"):
            a.empty(wrong, "f4")
    assert Keeper().empty((2, LARGE), np.int16).shape == (2, LARGE), "outside a system too"


def test_a_full_arena_is_done_without(pair):
    a, wire, b = pair
    a.arena.limit_bytes = 3 * LARGE
    sent = [pattern(LARGE, seed) for seed in range(5)]
    send(a, "b#1", sent)
    message = wire.sent.pop()
    assert ordinary(message) == 2 and a.arena.in_use()["full"] == 2
    assert all(np.array_equal(x, y) for x, y in zip(sent, read(b, "a#1", message), strict=True))
    del message
    assert a.empty(4 * LARGE, np.uint8).nbytes == 4 * LARGE and nothing_lent(a)
    none, wire = lender("a#2", "b#1", limit=0)
    send(none, "b#1", sent)
    assert ordinary(wire.sent[0]) == 5


def test_leases_that_run_out_are_done_without(pair):
    a, wire, b = pair
    a.arena._slots = deque(range(100))
    array = a.empty(LARGE, np.uint8)
    array[:] = 3
    for _ in range(110):
        send(a, "b#1", array)
    assert [ordinary(message) for message in wire.sent] == [0] * 100 + [1] * 10
    while wire.sent:
        assert read(b, "a#1", wire.sent.popleft())[-1] == 3
    del array
    assert nothing_lent(a)


def test_too_little_memory_and_no_memfd_are_done_without(pair, monkeypatch):
    a, wire, _ = pair
    with monkeypatch.context() as patch:
        patch.setattr(arena_module, "available_bytes", lambda: 1 << 20)
        send(a, "b#1", pattern(LARGE))
        assert ordinary(wire.sent.pop()) == 1 and a.arena.in_use()["size"] == 0

    def refuse(*_):
        raise PermissionError("seccomp")

    monkeypatch.setattr(memfd, "create", refuse)
    for _ in range(2):
        send(a, "b#1", pattern(LARGE))
        assert ordinary(wire.sent.pop()) == 1


# Handles that lie


def one_lease(a, wire):
    send(a, "b#1", pattern(LARGE))
    message = wire.sent.pop()
    (handle,) = message[2]
    return message, Handle.unpack(handle)


def test_a_lease_that_has_ended_is_refused(pair):
    a, wire, b = pair
    message, _ = one_lease(a, wire)
    read(b, "a#1", message)
    for _ in range(2):
        with pytest.raises(CodecError, match=r"lease 1 of memory of a#1 has ended"):
            read(b, "a#1", message)
        a.arena.in_use()
    old, _ = one_lease(a, wire)
    a.peer_down("b#1")
    a.arena._slots.rotate(1)
    new, _ = one_lease(a, wire)  # In the slot and the memory of the lease that ended.
    with pytest.raises(CodecError, match="has ended"):
        read(b, "a#1", old)
    assert np.array_equal(read(b, "a#1", new), pattern(LARGE))


def test_handles_that_lead_nowhere_are_refused(pair, tmp_path):
    a, wire, _ = pair
    _, good = one_lease(a, wire)
    file = open(tmp_path / "file", "wb")  # noqa: SIM115
    fifo = os.open(_fifo(tmp_path), os.O_RDWR)
    other = memfd.create("arena-c#1", HEADER_BYTES + 4096)
    short = memfd.create("arena-a#1", 4096)
    loose = os.memfd_create("headrace-arena-a#1")
    fds = [file.fileno(), fifo, other, short, loose, 2**31, 2**32 - 1]
    wrong = [good._replace(fd=fd) for fd in fds]
    wrong += [good._replace(pid=pid) for pid in (0, 1, 2**22 + 1, 2**32 - 1, os.getppid())]
    wrong += [good._replace(identity=good.identity ^ 1), good._replace(slot=MAX_LEASES), good._replace(slot=2**32 - 1)]
    wrong += [good._replace(slot=5), good._replace(generation=0), good._replace(generation=2**64 - 1)]
    for handle in wrong:
        with pytest.raises(CodecError):
            Borrowing().borrow("a#1", handle.pack())
    for data in (b"", good.pack()[:-1], good.pack() + b"x"):
        with pytest.raises(CodecError, match="another length"):
            Borrowing().borrow("a#1", data)
    with pytest.raises(CodecError):
        Borrowing().borrow("c#1", good.pack())  # Another's memory.
    table = a.arena._file
    for offset, nbytes in [(2**63, LARGE), (0, 2**63), (table.data.nbytes, 1), (2**64 - 1, 1), (0, 2**64 - 1)]:
        table.offset[good.slot], table.nbytes[good.slot] = offset, nbytes
        with pytest.raises(CodecError, match="outside its arena"):
            Borrowing().borrow("a#1", good.pack())
    for fd in (fifo, other, short, loose):
        os.close(fd)
    file.close()


def _fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_handles_raise_only_codec_errors(data):
    a, wire = lender("a#1", "b#1", limit=LARGE)
    _, good = one_lease(a, wire)
    packed = bytearray(good.pack())
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    message = lent(bytes(packed))
    b, _ = lender("b#1")
    with contextlib.suppress(CodecError):
        assert np.array_equal(read(b, "a#1", message), pattern(LARGE))
    a.arena.close()


def lent(handle):
    """A message with an array behind that handle."""
    return "b#1", *encode(pattern(LARGE), lambda _: handle)


@given(st.lists(st.one_of(st.binary(max_size=40), st.binary(min_size=HANDLE_BYTES, max_size=HANDLE_BYTES))))
def test_what_is_no_handle_is_refused_too(buffers):
    lender()[0].refuse("a#1", buffers)


def test_a_lender_that_is_gone_is_a_typed_error(pair):
    a, wire, b = pair
    message, handle = one_lease(a, wire)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    gone = lent(handle._replace(pid=done.pid).pack())
    with pytest.raises(LenderDied, match="a#1 has lent an array and ended before it was read; ask again") as caught:
        read(b, "a#1", gone)
    assert isinstance(caught.value, ActorDied)
    kept = read(b, "a#1", message)
    a.arena.close()
    b.peer_down("a#1")
    assert np.array_equal(kept, pattern(LARGE)), "what was mapped in time stays"


def test_what_cannot_be_read_is_given_back(pair):
    a, channel, b = pair
    unreadable = Point(x=1.0, data=pattern(LARGE, 2))
    send(a, "b#1", [pattern(LARGE), (unreadable,), {"k": pattern(LARGE, 3)}])
    message = channel.sent.pop()
    assert ordinary(message) == 0 and len(message[2]) == 3
    by_name = dict(codec._by_name)
    try:
        codec._by_name.clear()
        with pytest.raises(CodecError, match="unknown type"):
            read(b, "a#1", message)
    finally:
        codec._by_name.update(by_name)
    assert nothing_lent(a)


# Threads, forks


def test_any_thread_may_make_and_drop_arrays():
    arena = Arena("t#1", 64 << 20)
    faults = []

    def work(seed):
        rng, kept = random.Random(seed), []
        for _ in range(300):
            array = arena.empty(rng.randrange(1, 1 << 20), np.uint8)
            if array is not None:
                mark = rng.randrange(256)
                array[::4096] = mark
                kept.append((array, mark))
            if len(kept) > 8:
                array, mark = kept.pop(rng.randrange(len(kept)))
                if not (array[::4096] == mark).all():
                    faults.append(seed)
            array = None

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not faults and arena.in_use()["blocks"] == 0
    arena.close()


def test_a_forked_child_gives_nothing_back():
    script = """if True:
        import os, sys
        import numpy as np
        from headrace.runtime.arena import Arena
        from headrace.runtime.borrow import Borrowing
        arena, borrowing = Arena("a#1"), Borrowing()
        array = arena.empty(1 << 20, np.uint8)
        loan = arena.lend(array)
        view = borrowing.borrow("a#1", loan.handle)
        child = os.fork()
        if not child:
            del view
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert arena.in_use()["leases"] == 1
        del view
        assert arena.in_use()["leases"] == 0
        os._exit(0)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


# Between nodes


@pytest.fixture
async def net():
    async with network("a", "b") as net:
        await net.host("b", Giver(), "giver")
        await net.host("b", Echo(), "echo")
        yield net


async def all_back(net):
    for node in net.nodes.values():
        await until(lambda node=node: nothing_lent(node.lending))


@pytest.mark.parametrize("n", [LARGE, HUGE])
async def test_calls_and_answers_give_back_what_they_held(net, n):
    ref = net["a"].ref("echo")
    for seed in range(5):
        sent = pattern(n, seed)
        assert np.array_equal(await ref.echo({"x": (sent, Point(x=1.0, data=sent))}), {"x": 0}) is False
        back = await ref.echo([sent, Point(x=1.0, data=sent)])
        assert np.array_equal(back[0], sent) and np.array_equal(back[1].data, sent)
        del back
    await all_back(net)
    assert net["a"].lending.arena.in_use()["size"] > 0


async def test_items_of_a_stream_keep_their_order_whatever_their_size(net):
    sizes = [10, HUGE, 10, LARGE, HUGE, 0, 10] * 4
    stream = net["a"].ref("giver").series.stream(sizes)
    got = [(item.size, set(item[::1000].tolist())) async for item in stream]
    assert got == [(size, {i} if size else set()) for i, size in enumerate(sizes)]
    await all_back(net)


async def test_a_stream_that_is_left_gives_back_what_came(net):
    async with contextlib.aclosing(net["a"].ref("giver").series.stream([HUGE] * 40)) as stream:
        async for item in stream:
            del item
            break
    await all_back(net)


async def test_a_loop_answers_while_a_large_array_is_copied(net, monkeypatch):
    started, go = threading.Event(), threading.Event()
    copyto = np.copyto

    def slow(target, source):
        started.set()
        assert go.wait(30)
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", slow)
    call = asyncio.ensure_future(net["a"].ref("echo").echo(pattern(HUGE)))
    await until(started.is_set)
    assert await net["a"].ref("echo").echo(1) == 1
    go.set()
    assert np.array_equal(await call, pattern(HUGE))
    del call
    await all_back(net)


async def test_a_call_that_is_cancelled_while_its_array_is_copied_does_not_run(net, monkeypatch):
    started, go = threading.Event(), threading.Event()
    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", lambda *args: (started.set(), go.wait(30), copyto(*args)))
    await net["b"].ref("echo").note("first")
    holding = asyncio.ensure_future(net["a"].ref("echo").hold())
    call = asyncio.ensure_future(net["a"].ref("echo").note(pattern(HUGE)))
    await until(started.is_set)
    call.cancel()
    await asyncio.wait([call])
    del call
    go.set()
    await until(lambda: not net["a"].lending._copies)
    assert await net["a"].ref("echo").noted() == ["first", "held"]
    await net["a"].ref("echo").let_go()
    await holding
    assert await net["a"].ref("echo").noted() == ["first", "held"]
    await all_back(net)


async def test_what_dies_before_its_array_is_copied_is_told_and_gives_back(net, monkeypatch):
    started, go = threading.Event(), threading.Event()
    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", lambda *args: (started.set(), go.wait(30), copyto(*args)))
    call = asyncio.ensure_future(net["a"].ref("echo").echo(pattern(HUGE)))
    net["a"].ref("echo").note.cast(pattern(HUGE))
    await until(started.is_set)
    net["a"].peer_down("b#1", "killed")
    with pytest.raises(ActorDied, match="killed"):
        await call
    del call
    assert net["a"].lending.arena.in_use()["leases"] == 0
    go.set()
    await until(lambda: nothing_lent(net["a"].lending))
    assert net["a"].counters["sent"] == net["a"].counters["lost"] == 2


async def test_a_transport_that_refuses_a_copied_message_fails_its_caller(net, monkeypatch):
    def refuse(*_, **__):
        raise CodecError("too much")

    echo = net["a"].ref("echo")
    await echo.echo(1)
    credit = net["a"].routes.available("echo")
    original = net["a"].lending.send_later

    def then_refuse(*args):
        original(*args)
        monkeypatch.setattr(net["a"].transport, "send", refuse)

    monkeypatch.setattr(net["a"].lending, "send_later", then_refuse)
    with pytest.raises(CodecError, match="too much"):
        await echo.echo(pattern(HUGE))
    monkeypatch.undo()
    assert net["a"].routes.available("echo") == credit and net["a"].counters["lost"] == 1
    monkeypatch.setattr(net["a"].lending, "send_later", then_refuse)
    echo.note.cast(pattern(HUGE))
    await until(lambda: net["a"].counters["lost"] == 2)
    monkeypatch.undo()
    assert net["a"].routes.available("echo") == credit
    assert net["a"].counters["sent"] == 3 and net["b"].counters["handled"] == 1
    await all_back(net)


async def test_an_answer_that_a_transport_refuses_once_it_is_copied_fails_its_caller(net, monkeypatch):
    a, b = net["a"], net["b"]
    send = b.transport.send

    def refuse(peer, envelope, buffers, bulk=False):
        if buffers:
            raise MailboxFull("too much waits")
        return send(peer, envelope, buffers, bulk=bulk)

    monkeypatch.setattr(b.transport, "send", refuse)
    for n in (LARGE, HUGE):
        with pytest.raises(MailboxFull, match="too much waits"):
            await a.ref("giver").make(n, 1)
        with pytest.raises(MailboxFull, match="too much waits"):
            _ = [item async for item in a.ref("giver").series.stream([10, *[n] * 100])]
    await until(lambda: b.cells["giver"].idle)
    assert await a.ref("giver").make(10, 1) is not None
    await all_back(net)


@pytest.mark.parametrize("n", [LARGE, HUGE])
async def test_messages_that_are_never_handled_give_back_what_they_held(net, n):
    a, b = net["a"], net["b"]
    echo = a.ref("echo")
    holding = asyncio.ensure_future(echo.hold())
    await until(lambda: b.cells["echo"].actor.seen == ["held"])
    # Withdrawn before its turn, and expired before it.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await echo.echo(pattern(n))
    await until(lambda: nothing_lent(a.lending))
    # Of an older incarnation: a dead letter.
    a.directory.update(replace(a.directory.get("giver"), incarnation=7))
    a.ref("giver").keep.cast(pattern(n))
    await until(lambda: b.counters["dead_letters"] == 1)
    with pytest.raises(ActorDied):
        await a.ref("giver").keep(pattern(n))
    await until(lambda: nothing_lent(a.lending))
    # Left in the mailbox of an actor that stops.
    for _ in range(3):
        echo.note.cast(pattern(n))
    await until(lambda: len(b.cells["echo"].turns) == 3)
    b.cells["echo"].close()
    with pytest.raises(ActorDied):
        await holding
    await until(lambda: b.counters["dead_letters"] >= 5)
    await all_back(net)


@pytest.mark.parametrize("n", [LARGE, HUGE])
async def test_what_waits_for_credit_gives_back_what_it_held(net, n):
    a, b = net["a"], net["b"]
    echo = a.ref("echo")
    holding = asyncio.ensure_future(echo.hold())
    await until(lambda: b.cells["echo"].actor.seen == ["held"])
    window = a.routes.window("b#1", "echo", Lane.NORMAL)

    async def waiting():
        while window.take_nowait():
            window.charge()
        calls = [asyncio.ensure_future(echo.note(pattern(n, seed))) for seed in range(3)]
        await until(lambda: a.lending.arena.in_use()["leases"] == 3)
        return calls

    cancelled, *others = await waiting()
    cancelled.cancel()
    await until(lambda: a.lending.arena.in_use()["leases"] == 2)
    # Another incarnation has taken its place: they ask that, by the one credit that came back.
    status = a.directory.get("echo")
    a.directory.update(replace(status, incarnation=2))
    window.give(1)
    for end in await asyncio.gather(*others, return_exceptions=True):
        assert isinstance(end, ActorDied)
    await until(lambda: nothing_lent(a.lending) and window.available == 1)
    a.directory.update(status)
    calls = await waiting()
    a.peer_down("b#1", "killed")
    for end in await asyncio.gather(holding, *calls, return_exceptions=True):
        assert isinstance(end, ActorDied)
    assert a.counters["gone"] + a.counters["lost"] == window.sent
    await until(lambda: nothing_lent(a.lending))


async def test_a_message_with_something_that_cannot_travel_lends_nothing(net):
    a, b = net["a"], net["b"]
    with pytest.raises(CodecError, match=r"echo\.echo: argument 2: builtins\.object can't travel"):
        await a.ref("echo").echo(pattern(LARGE), object())
    assert nothing_lent(a.lending) and a.lending.cargo is None
    with pytest.raises(CodecError):
        answer(b, "a#1", Kind.REPLY, [pattern(HUGE), object()])
    assert nothing_lent(b.lending) and b.lending.cargo is None
    broken = Point(x=1.0, data=pattern(LARGE))
    object.__delattr__(broken, "x")
    with pytest.raises(AttributeError):
        await a.ref("echo").echo([pattern(LARGE), broken])
    assert nothing_lent(a.lending) and a.lending.cargo is None


async def test_a_full_mailbox_gives_back_what_it_refused(net):
    a, b = net["a"], net["b"]
    door = Door("a#1", "echo", "echo", Lane.NORMAL, 1)
    b.cells["echo"].open(door, credited=False)
    b.cells["echo"].turns.capacity = 0
    b._doors._table["a#1", a.routes.find("echo", "echo").head] = door
    holding = asyncio.ensure_future(a.ref("echo").hold())
    await until(lambda: b.cells["echo"].actor.seen == ["held"])
    for _ in range(3):
        a.ref("echo").echo.cast(pattern(LARGE))
    await until(lambda: b.counters["dead_letters"] >= 2)
    await a.ref("echo").let_go()
    await holding
    await all_back(net)


def answer(node, to, kind, value):
    """Answers a call that nobody has made."""
    door = Door(to, "echo", "echo", Lane.NORMAL, 1)
    node.answer(Delivery(Kind.CALL, 12345, door, 0.0, 0.0, (), {}, 0), kind, value)


@pytest.mark.parametrize("n", [LARGE, HUGE])
async def test_late_answers_give_back_what_they_held(net, n):
    a, b = net["a"], net["b"]
    for code in (Kind.REPLY, Kind.ITEM):
        answer(b, "a#1", code, pattern(n))
    await until(lambda: a.counters["late_answers"] == 2)
    await all_back(net)


async def test_a_message_of_no_known_kind_gives_back_what_it_held(net):
    assert send(net["a"].lending, "b#1", [99, 1, "echo", [pattern(LARGE)] * 2])
    await until(lambda: net["b"].counters["malformed"] == 1)
    await all_back(net)


async def test_answers_to_a_peer_that_is_gone_give_back_what_they_held(net):
    a, b = net["a"], net["b"]
    for n in (LARGE, HUGE):
        answer(b, "a#1", Kind.REPLY, pattern(n))
        answer(b, "nobody#1", Kind.REPLY, pattern(n))
    b.peer_down("a#1", "killed")
    answer(b, "a#1", Kind.REPLY, pattern(LARGE))
    await until(lambda: nothing_lent(b.lending))
    await until(lambda: b.counters["undeliverable_answers"] >= 4)
    await until(lambda: nothing_lent(a.lending))


async def test_one_array_goes_to_many_nodes_and_is_kept_by_the_last(net):
    await net.host("a", Keeper(), "keeper")
    await net["a"].ref("giver").give(["keeper"] * 3, LARGE, 2, True)
    lent = net["b"].lending.arena.in_use()
    assert lent["blocks"] == 1 and lent["leases"] == 3
    assert await net["a"].ref("keeper").sums() == [2 * LARGE] * 3
    await net["a"].ref("keeper").forget()
    await all_back(net)


async def test_a_node_that_closes_sends_what_it_has_copied():
    async with network("a", "b") as net:
        await net.host("b", Keeper(), "keeper")
        await net["a"].ref("keeper").keep(pattern(LARGE))
        net["a"].ref("keeper").keep.cast(pattern(HUGE))
        await net.nodes.pop("a").close()

        async def arrived():
            return await net["b"].ref("keeper").sums() == [pattern(n).sum() for n in (LARGE, HUGE)]

        await until(arrived)


# Between processes that die


def arenas():
    """Processes (other than this one's mapped by themselves) and the arenas they have mapped, by name."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as file:
            names = {line.split("/memfd:")[1].split()[0] for line in file if "/memfd:headrace-arena-" in line}
            if names:
                found[int(pid)] = names
    return found


async def lends_nothing(giver):
    return (await giver.lent())["bytes"] == 0


@pytest.mark.slow
async def test_killed_holders_and_owners_leave_nothing_behind():
    rng = random.Random(5)
    names = ["one", "two", "three"]
    async with System() as system:
        for name in names:
            await system.spawn(Giver(), name=name, node=f"arena-test-{name}")
        await system.spawn(Giver(), name="root_giver")
        assert not any("arena-test" in n or "-root#" in n for p in system.pids().values() for n in arenas().get(p, ()))
        for round in range(6):
            for name in [*names, "root_giver"]:
                others = [other for other in [*names, "root_giver"] if other != name]
                for born in (True, False):
                    await system.find(name).give(others, rng.choice([LARGE, HUGE]), round + 1, born)
            for name in names:
                sums = await system.find(name).sums()
                assert len(sums) == 6 and all(total % (round + 1) == 0 for total in sums)
            killed = rng.sample(names, rng.randint(1, 2))
            before = system.restarts.copy()
            for name in killed:
                os.kill(system.pids()[f"arena-test-{name}"], 9)
            await until(lambda before=before, killed=killed: all(system.restarts[n] > before[n] for n in killed))
            for name in [*names, "root_giver"]:
                await system.find(name).forget()
            for name in [*names, "root_giver"]:
                await until(partial(lends_nothing, system.find(name)))
        pids = set(system.pids().values())
    left = {pid: found for pid, found in arenas().items() if pid in pids and pid != os.getpid()}
    assert not left
    gc.collect()
    assert not any("arena-test" in name for name in arenas().get(os.getpid(), ()))


async def test_a_system_without_an_arena_sends_large_arrays_all_the_same():
    async with System(arena_bytes=0) as system:
        giver = await system.spawn(Giver(), name="giver", node="away")
        assert int((await giver.make(HUGE, 3)).sum()) == 3 * HUGE
        await giver.keep(pattern(HUGE))
        assert await giver.sums() == [pattern(HUGE).sum()]
        assert (await giver.lent())["size"] == 0 and system.node.lending.arena.in_use()["size"] == 0


def test_a_handle_has_one_layout():
    handle = Handle(2**64 - 1, 4_000_000, 1000, MAX_LEASES - 1, 2**64 - 1)
    assert Handle.unpack(handle.pack()) == handle and len(handle.pack()) == struct.calcsize("<QIIIQ")
    _, pack, buffers = lent(handle.pack())
    assert buffers == [handle.pack()]
    assert decode(pack, buffers, lambda _: memoryview(pattern(LARGE)))[0] == pattern(LARGE)[0]
