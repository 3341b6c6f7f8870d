"""Frames: nothing is lost or reordered, large arrays arrive whole, hostile bytes raise nothing but CodecError."""

import asyncio
import shutil
import tempfile
import threading

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_actors import until

from headrace.runtime import transport as bounds
from headrace.runtime import zmq_transport as module
from headrace.runtime.codec import decode, encode
from headrace.runtime.errors import CodecError, LaunchError, MailboxFull
from headrace.runtime.frame import MAX_ENVELOPES_PER_FRAME, join, read, split
from headrace.runtime.inbox import CHUNK_BYTES, Form, stamp
from headrace.runtime.outlet import FLUSH_AT
from headrace.runtime.zmq_transport import ZmqTransport


def envelope(id=1, pack=b"\xc0", lane=2):
    return encode([1, lane, 0.0, id, pack])[0]


def number_of(env):
    return msgpack.unpackb(env)[3]


def pack_of(env):
    return msgpack.unpackb(env)[4]


@pytest.fixture
def folder():
    path = tempfile.mkdtemp(prefix="hr-")
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def link(folder):
    """A sender, a receiver, what was received, and what was malformed."""
    got, bad = [], []
    receiver = ZmqTransport("r#1", f"ipc://{folder}/r", lambda *item: got.append(item), lambda *item: bad.append(item))
    sender = ZmqTransport("s#1", f"ipc://{folder}/s", lambda *_: None, lambda *_: None)
    sender.connect("r#1", receiver.address)
    yield sender, receiver, got, bad
    await sender.close()
    await receiver.close()


async def test_envelopes_arrive_once_in_order_with_their_buffers(link):
    sender, _, got, bad = link
    rng = np.random.default_rng(0)
    sent = []
    for i in range(3 * MAX_ENVELOPES_PER_FRAME):
        buffers = [rng.bytes(int(n)) for n in rng.integers(0, 200, rng.integers(0, 4))]
        sent.append((i, buffers))
        assert sender.send("r#1", envelope(i), buffers)
        if i % 50 == 0:
            await asyncio.sleep(0)
    await until(lambda: len(got) == len(sent))
    assert [(number_of(env), [bytes(b) for b in bufs]) for _, env, bufs in got] == sent and not bad
    assert {who for who, _, _ in got} == {"s#1"}


async def test_messages_of_one_turn_travel_as_one(link, monkeypatch):
    sender, receiver, got, _ = link
    messages = []
    accept = receiver._control.accept
    monkeypatch.setattr(receiver._control, "accept", lambda *parts: messages.append(parts) or accept(*parts))
    for i in range(100):
        sender.send("r#1", envelope(i), [])
    await until(lambda: len(got) == 100)
    assert len(messages) <= 1 + 100 // FLUSH_AT + 1, "the first did not wait for the others, and these came together"


async def test_large_arrays_arrive_whole(link):
    sender, _, got, _ = link
    arrays = [np.arange(n, dtype=np.float64) for n in (10, 10_000, 3_000_000)]
    pack, buffers = encode(arrays)
    sender.send("r#1", envelope(1, pack), buffers)
    await until(lambda: got)
    (_, received, parts) = got[0]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, decode(pack_of(received), parts), strict=True))


def deafen(transport):
    """A receiver whose loop is busy."""
    for router in transport._routers:
        asyncio.get_running_loop().remove_reader(router.fileno())


def heed(transport):
    for router, inbox in zip(transport._routers, (transport._control, transport._bulk), strict=True):
        asyncio.get_running_loop().add_reader(router.fileno(), transport._drain, router, inbox)
        transport._drain(router, inbox)


async def test_more_than_the_high_water_mark_waits_in_our_queue_and_is_not_lost(folder, monkeypatch):
    monkeypatch.setattr(module, "HIGH_WATER_MARK", 4)
    got = []
    receiver = ZmqTransport("r#1", f"ipc://{folder}/r", lambda *item: got.append(item), lambda *_: None)
    sender = ZmqTransport("s#1", f"ipc://{folder}/s", lambda *_: None, lambda *_: None)
    sender.connect("r#1", receiver.address)
    deafen(receiver)
    for i in range(3000):
        sender.send("r#1", envelope(i), [b"x" * 5000])
        if i % 10 == 0:
            await asyncio.sleep(0)
    assert len(sender._links["r#1"].control._queue) > 100
    heed(receiver)
    await until(lambda: len(got) == 3000)
    assert [number_of(env) for _, env, _ in got] == list(range(3000))
    await sender.close()
    await receiver.close()


@pytest.mark.parametrize("bulk", [False, True])
async def test_what_waits_for_a_peer_is_bounded_and_the_system_lane_has_its_reserve(link, monkeypatch, bulk):
    sender, receiver, got, _ = link
    monkeypatch.setattr(module, "HIGH_WATER_MARK", 8)
    monkeypatch.setattr(bounds, "BACKLOG_BYTES", 20 << 20)
    monkeypatch.setattr(bounds, "BACKLOG_MESSAGES", 100_000)
    monkeypatch.setattr(bounds, "RESERVE_BYTES", 1 << 20)
    deafen(receiver)
    piece = b"x" * 500_000
    sent = 0
    with pytest.raises(MailboxFull, match=r"\d+ messages of \d+ MiB wait to be sent to r#1.*slow down"):
        while sent < 10_000:
            sender.send("r#1", envelope(sent), [piece], bulk)
            sent += 1
            if sent % 10 == 0:
                await asyncio.sleep(0.001)
    sender.send("r#1", envelope(sent, lane=0), [piece], bulk)
    with pytest.raises(MailboxFull):
        for _ in range(3):
            sender.send("r#1", envelope(-1, lane=0), [piece], bulk)
    sender.send("r#1", envelope(-2), [], not bulk)  # The other way has its own.
    heed(receiver)
    await until(
        lambda: any(number_of(env) == sent for _, env, _ in got) and any(number_of(env) == -2 for _, env, _ in got)
    )
    ids = [number_of(env) for _, env, _ in got if number_of(env) >= 0]
    assert ids == list(range(sent + 1))
    sender.send("r#1", envelope(), [b"x" * (21 << 20)], bulk)  # Alone, what may travel at all is taken.


async def test_the_count_of_what_waits_is_bounded(link, monkeypatch):
    sender, *_ = link
    monkeypatch.setattr(bounds, "BACKLOG_MESSAGES", 10)
    monkeypatch.setattr(bounds, "RESERVE_MESSAGES", 3)
    for i in range(1 + 10):  # The first is sent at once.
        sender.send("r#1", envelope(i), [])
    with pytest.raises(MailboxFull):
        sender.send("r#1", envelope(), [])
    for i in range(3):
        sender.send("r#1", envelope(i, lane=0), [])
    with pytest.raises(MailboxFull):
        sender.send("r#1", envelope(lane=0), [])


async def test_an_error_in_the_receiver_does_not_deafen_it(link):
    sender, receiver, got, _ = link
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))

    def fail_once(*item):
        receiver._control._on_envelope = lambda *item: got.append(item)
        raise ZeroDivisionError

    receiver._control._on_envelope = fail_once
    for i in range(5):
        sender.send("r#1", envelope(i), [])
        sender._links["r#1"].control.flush()
    await until(lambda: len(got) == 4)
    assert isinstance(complaints[0], ZeroDivisionError)


async def test_sending_to_nobody_says_so(link):
    sender, *_ = link
    assert not sender.send("x#1", envelope(), [])
    sender.disconnect("r#1")
    sender.disconnect("r#1")
    assert not sender.send("r#1", envelope(), [])


async def test_what_is_too_large_is_refused_by_the_sender(link, monkeypatch):
    sender, _, got, _ = link
    monkeypatch.setattr(bounds, "MAX_MESSAGE_BYTES", 1000)
    sender.send("r#1", envelope(1), [b"x" * 900])
    for pack, buffers in [(b"x" * 1001, []), (b"", [b"x" * 600, b"x" * 600])]:
        with pytest.raises(CodecError, match="send parts"):
            sender.send("r#1", envelope(2, pack), buffers)
    await until(lambda: len(got) == 1)


async def test_addresses_that_can_not_be_bound(folder):
    for address, said in [
        (f"ipc://{folder}/{'x' * 100}", "ipc allows 107.*TMPDIR"),
        (f"ipc://{folder}/no/such/folder", "can't bind"),
        ("tcp://127.0.0.1", "must be tcp://HOST:PORT"),
        ("tcp://*:5000", "must be tcp://HOST:PORT"),
        ("tcp://no.such.host.invalid:5000", "is not known here"),
        ("tcp://0.0.0.0:5000", "can't connect to 0.0.0.0.*address of one network interface"),
        ("tcp://[::]:5000", "can't connect to ::"),
        ("tcp://192.0.2.1:5000", "there are no keys: anybody could send messages; give keys"),
        ("inproc://x", "must start with ipc:// or tcp://"),
    ]:
        with pytest.raises(LaunchError, match=said):
            ZmqTransport("a#1", address, lambda *_: None, lambda *_: None)


async def test_raw_rubbish_on_the_socket_is_counted_and_harms_nobody(link):
    sender, receiver, got, bad = link
    context = zmq.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(receiver.address)
        rubbish = [
            [b""],
            [b"", b""],
            [b"\xc1"],
            [b"rubbish" * 1000, b"x" * 10**5],
            [stamp(Form.BATCH, 1, msgpack.packb([[1]]))],
            [stamp(Form.BATCH, 2, b"\x92\x90\x90"), b"x"],
            [stamp(9, 3)],
            [b"\x02" + stamp(Form.BATCH, 4, b"\x90")[1:]],
        ]
        for frames in rubbish:
            socket.send_multipart(frames)
        await until(lambda: len(bad) == len(rubbish))
        assert "wire version 2, this node speaks 1" in bad[-1][1] and "unknown form 9" in bad[-2][1]
    context.term()
    sender.send("r#1", envelope(7), [])
    await until(lambda: len(got) == 1)


# The bulk way


@pytest.mark.parametrize("size", [0, 1000, CHUNK_BYTES - 200, CHUNK_BYTES, CHUNK_BYTES + 1, 9 * CHUNK_BYTES + 17])
async def test_a_bulk_message_arrives_whole_whatever_its_size(link, size):
    sender, _, got, bad = link
    rng = np.random.default_rng(size)
    buffers = [rng.bytes(size), rng.bytes(100), rng.bytes(size // 3)]
    for i in range(3):
        assert sender.send("r#1", envelope(i, rng.bytes(50)), buffers, bulk=True)
    await until(lambda: len(got) == 3)
    assert not bad and [number_of(env) for _, env, _ in got] == [0, 1, 2]
    for _, _, received in got:
        assert [bytes(buffer) for buffer in received] == buffers


async def test_received_blocks_stay_as_they_are_while_somebody_looks_at_them_and_are_used_again_after(link):
    sender, receiver, got, _ = link
    kept = []
    for i in range(20):
        pack, buffers = encode(np.full(400_000, i))
        sender.send("r#1", envelope(i, pack), buffers, bulk=True)
        await until(lambda i=i: len(got) > 0)
        _, env, parts = got.pop()
        array = decode(pack_of(env), parts)
        if i % 4 == 0:
            kept.append(array[10:-10])
        del array, env, parts
    assert [int(view[0]) for view in kept] == [int(view[-1]) for view in kept] == [0, 4, 8, 12, 16]
    assert receiver._bulk._pool.idle_bytes <= 2 * 5 << 20


def test_the_receive_pool_gives_memory_back_from_any_thread_and_keeps_little(monkeypatch):
    from headrace.runtime import buffers

    monkeypatch.setattr(buffers, "MAX_IDLE_BYTES", 8 << 20)
    pool = buffers.BufferPool()

    def work(seed):
        chance = np.random.default_rng(seed)
        held = []
        for _ in range(300):
            view = pool.take(int(chance.integers(1, 3 << 20)))
            view[:1] = view[-1:] = bytes([seed])
            held.append(view)
            if len(held) > 3:
                assert {held[0][0], held[0][-1]} == {seed}  # Nobody else has written there.
                del held[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.idle_bytes <= 8 << 20


async def test_a_small_message_does_not_wait_for_a_large_one(link):
    """Two sockets of one process to one peer, each with its own queue: neither stands still, neither waits."""
    sender, _, got, _ = link
    flood = [b"x" * (32 << 20)]
    for i in range(4):
        sender.send("r#1", envelope(i), flood, bulk=True)
    sender.send("r#1", envelope(99), [])
    await until(lambda: len(got) == 5)
    assert number_of(got[0][1]) == 99 and [number_of(env) for _, env, _ in got[1:]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([[stamp(Form.BLOCK, 1, b"\xc1")]], "malformed block"),
        ([[stamp(Form.BLOCK, 1, msgpack.packb([]))]], "list of 1 to"),
        ([[stamp(Form.BLOCK, 1, msgpack.packb(["1"]))]], "whole numbers"),
        ([[stamp(Form.BLOCK, 1, msgpack.packb([-1, 1 << 21]))]], "whole numbers"),
        ([[stamp(Form.BLOCK, 1, msgpack.packb([1 << 30] * 3))]], "whole numbers"),
        ([[stamp(Form.BLOCK, 1, msgpack.packb([10]))], [stamp(Form.CHUNK, 2, b"\0" * 8)]], "lacks its piece at byte 0"),
        ([[stamp(Form.BLOCK, 1, msgpack.packb([10]))], [stamp(Form.CHUNK, 2, b"\0" * 8), b"123"]], "lacks its piece"),
        (
            [[stamp(Form.BLOCK, 1, msgpack.packb([10]))], [stamp(Form.CHUNK, 2, b"\1" * 8), b"1" * 10]],
            "lacks its piece",
        ),
        (
            [[stamp(Form.BLOCK, 1, msgpack.packb([10]))], [stamp(Form.CHUNK, 2, b"\0" * 8), b"1" * 10]],
            "",
        ),
        ([[stamp(Form.BLOCK, i, msgpack.packb([10]))] for i in (1, 2)], "cut off by the next one"),
    ],
)
async def test_hostile_blocks_are_reported_and_the_next_message_of_that_peer_is_read(link, messages, said):
    sender, receiver, got, bad = link
    for frames in messages:
        receiver._bulk.accept(b"s#1", [memoryview(frame) for frame in frames])
    assert len(bad) == 1 and said in bad[0][1] and bad[0][0] == "s#1"
    receiver._bulk.forget("s#1")
    sender.send("r#1", envelope(5), [b"x" * 3_000_000], bulk=True)
    await until(lambda: len(got) == 1)
    assert len(bad) == 1


async def test_an_oversized_message_is_reported_and_a_monstrous_one_costs_its_sender_the_connection(link):
    sender, receiver, got, bad = link
    context = zmq.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, b"fat#1")
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(bounds.bulk_address(receiver.address))
        socket.send_multipart([stamp(Form.BATCH, 1, b"\x90"), bytes(3 * CHUNK_BYTES)])
        await until(lambda: bad)
        socket.send(bytes(module.MAX_BULK_PIECE_BYTES + 1))
        sender.send("r#1", envelope(1), [b"x" * 100], bulk=True)
        sender.send("r#1", envelope(2), [])
        await until(lambda: len(got) == 2)
    context.term()
    assert len(bad) == 1 and bad[0][0] == "fat#1" and "oversized message of 3145737 bytes" in bad[0][1]


# Serial numbers


async def test_a_message_that_comes_twice_is_taken_once(link):
    _, receiver, got, _ = link
    inbox = receiver._control
    frames = {n: [memoryview(stamp(Form.BATCH, n, *join([(envelope(n), [])])))] for n in range(1, 5000)}
    for n in (1, 2, 2, 4, 3, 4, 3, 1, 900, 5, 5, 2000, 2000, 899, 1999, 1999, 4000, 4000):
        inbox.accept(b"x#1", frames[n])
    inbox.accept(b"y#1", frames[2])
    # 899 came after 2000: that long ago nobody knows.
    assert [number_of(env) for _, env, _ in got] == [1, 2, 4, 3, 900, 5, 2000, 1999, 4000, 2]
    assert receiver.duplicates == 9


async def test_a_stream_of_strangers_does_not_fill_the_memory(link, monkeypatch):
    from headrace.runtime import inbox as inbox_module

    monkeypatch.setattr(inbox_module, "MAX_SENDERS", 10)
    _, receiver, *_ = link
    for i in range(100):
        receiver._control.accept(b"s%d" % i, [memoryview(stamp(Form.BEAT, 1))])
    assert len(receiver._control._senders) <= 10 and receiver.heard("s99") is not None


# The bytes of a frame


def frames_of(*items):
    return [memoryview(frame) for frame in join(items)]


def head_of(index, envelopes=b""):
    pack = msgpack.packb(index)
    return len(pack).to_bytes(4, "big") + pack + b"\xdd\x00\x00\x00\x01" + envelopes


def test_split_gives_back_what_was_joined():
    items = [(envelope(1), [b"a", b""]), (envelope(2), []), (envelope(3), [b"x" * 100_000])]
    assert split(frames_of(*items)) == items
    assert split(frames_of(*items[1:2])) == items[1:2]


def test_read_gives_back_the_fields_of_what_was_joined():
    items = [(envelope(n), []) for n in range(300)]
    (head,) = frames_of(*items)
    assert read(head) == ([msgpack.unpackb(env) for env, _ in items], [len(env) for env, _ in items])


@pytest.mark.parametrize(
    "items",
    [
        [(envelope(1), [b"a"]), (envelope(2), [])],
        [(b"\xc7\x00\x09", []), (envelope(2), [])],
        [(envelope(1) + envelope(1), []), (envelope(2), [])],
        [(envelope(1)[:-1], []), (envelope(2), [])],
    ],
)
def test_what_read_refuses_is_split_into_the_good_and_the_bad(items):
    with pytest.raises(CodecError):
        read(frames_of(*items)[0])
    assert split(frames_of(*items)) == items


@pytest.mark.parametrize(
    ("head", "buffers", "said"),
    [
        (None, [], "without frames"),
        (b"", [], "malformed"),
        (b"\xc1", [], "malformed"),
        (b"\xff\xff\xff\xff" + b"\x91" * 5000, [], "malformed"),
        (b"\x00\x00\x00\x05\xdd\xff\xff\xff\xff", [], "malformed"),
        (head_of(7), [], "malformed"),
        (head_of({"a": 1}), [], "malformed"),
        (head_of(["a", []]), [], "sizes of its envelopes"),
        (head_of([[], 1]), [], "sizes of its envelopes"),
        (head_of([["text"], []]), [], "sizes of its envelopes"),
        (head_of([[True], []], b"a"), [], "sizes of its envelopes"),
        (head_of([[-1, 2], []], b"a"), [], "sizes of its envelopes"),
        (head_of([[2], []], b"a"), [], "2 bytes, of 1"),
        (head_of([[1 << 62], []], b"a"), [], "bytes, of 1"),
        (head_of([[], []], b"a"), [], "0 bytes, of 1"),
        (head_of([[], []]), [b"stray"], "claim 0 of 1 buffers"),
        (head_of([[1], []], b"a"), [b"stray"], "how many buffers"),
        (head_of([[1], [2]], b"a"), [b"one"], "claim 2 of 1 buffers"),
        (head_of([[1], [-1]], b"a"), [], "how many buffers"),
        (head_of([[1], [True]], b"a"), [b""], "how many buffers"),
        (head_of([[1], [0, 1]], b"a"), [b""], "how many buffers"),
    ],
)
def test_malformed_frames_are_refused(head, buffers, said):
    frames = [] if head is None else [memoryview(head), *map(memoryview, buffers)]
    with pytest.raises(CodecError, match=said):
        split(frames)


SEEDS = [
    bytes(frames_of((envelope(1, b"\x93\x01\x02\x03"), [b"a"]), (envelope(2), []))[0]),
    bytes(frames_of(*[(envelope(i), []) for i in range(20)])[0]),
]


@given(st.data())
@settings(max_examples=300)
def test_random_and_mutated_frames_raise_nothing_but_codec_errors(data):
    head = data.draw(st.sampled_from(SEEDS) | st.binary(max_size=80))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, max(0, len(head) - 1)))
        head = head[:at] + data.draw(st.binary(max_size=3)) + head[at + data.draw(st.integers(0, 2)) :]
    head = head[: data.draw(st.integers(0, len(head)))] if data.draw(st.booleans()) else head
    buffers = data.draw(st.lists(st.binary(max_size=5), max_size=3))
    try:
        read(memoryview(head))
    except CodecError:
        pass
    try:
        envelopes = split([memoryview(head), *map(memoryview, buffers)])
    except CodecError:
        return
    assert sum(len(bufs) for _, bufs in envelopes) == len(buffers)
    assert all(type(env) is bytes for env, _ in envelopes)
