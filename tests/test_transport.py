"""Frames: nothing is lost or reordered, large arrays arrive whole, hostile bytes raise nothing but CodecError."""

import asyncio
import shutil
import tempfile

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_actors import until

from headrace.runtime import transport as module
from headrace.runtime.codec import decode, encode
from headrace.runtime.errors import CodecError, LaunchError
from headrace.runtime.frame import MAX_ENVELOPES_PER_FRAME, join, split
from headrace.runtime.transport import Transport


def envelope(id=1, pack=b"\xc0"):
    """Opaque to a transport."""
    return b"%d " % id + pack


def id_of(envelope):
    return int(envelope.split(b" ", 1)[0])


@pytest.fixture
def folder():
    path = tempfile.mkdtemp(prefix="hr-")
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def link(folder):
    """A sender, a receiver, what was received, and what was malformed."""
    got, bad = [], []
    receiver = Transport("r#1", f"ipc://{folder}/r", lambda *item: got.append(item), lambda *item: bad.append(item))
    sender = Transport("s#1", f"ipc://{folder}/s", lambda *_: None, lambda *_: None)
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
    assert [(id_of(env), [bytes(b) for b in bufs]) for _, env, bufs in got] == sent and not bad
    assert {who for who, _, _ in got} == {"s#1"}


async def test_messages_of_one_turn_travel_as_one(link, monkeypatch):
    sender, receiver, got, _ = link
    frames = []
    receive = receiver._receive
    monkeypatch.setattr(receiver, "_receive", lambda parts: frames.append(parts) or receive(parts))
    for i in range(100):
        sender.send("r#1", envelope(i), [])
    await until(lambda: len(got) == 100)
    assert len(frames) == 1


async def test_large_arrays_arrive_whole(link):
    sender, _, got, _ = link
    arrays = [np.arange(n, dtype=np.float64) for n in (10, 10_000, 3_000_000)]
    pack, buffers = encode(arrays)
    sender.send("r#1", pack, buffers)
    await until(lambda: got)
    (_, received, parts) = got[0]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, decode(received, parts), strict=True))


async def test_more_than_the_high_water_mark_waits_in_our_queue_and_is_not_lost(folder, monkeypatch):
    monkeypatch.setattr(module, "HIGH_WATER_MARK", 4)
    got = []
    receiver = Transport("r#1", f"ipc://{folder}/r", lambda *item: got.append(item), lambda *_: None)
    sender = Transport("s#1", f"ipc://{folder}/s", lambda *_: None, lambda *_: None)
    sender.connect("r#1", receiver.address)
    asyncio.get_running_loop().remove_reader(receiver._router.fileno())  # A receiver whose loop is busy.
    for i in range(3000):
        sender.send("r#1", envelope(i), [b"x" * 5000])
        if i % 10 == 0:
            await asyncio.sleep(0)
    assert len(sender._peers["r#1"].queue) > 100
    asyncio.get_running_loop().add_reader(receiver._router.fileno(), receiver._drain)
    receiver._drain()
    await until(lambda: len(got) == 3000)
    assert [id_of(env) for _, env, _ in got] == list(range(3000))
    await sender.close()
    await receiver.close()


async def test_an_error_in_the_receiver_does_not_deafen_it(link):
    sender, receiver, got, _ = link
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))

    def fail_once(*item):
        receiver._on_envelope = lambda *item: got.append(item)
        raise ZeroDivisionError

    receiver._on_envelope = fail_once
    for i in range(5):
        sender.send("r#1", envelope(i), [])
        sender._flush("r#1")
    await until(lambda: len(got) == 4)
    assert isinstance(complaints[0], ZeroDivisionError)


async def test_sending_to_nobody_says_so(link):
    sender, *_ = link
    assert not sender.send("x#1", envelope(), [])
    sender.disconnect("r#1")
    sender.disconnect("r#1")
    assert not sender.send("r#1", envelope(), [])


async def test_what_zeromq_would_cut_off_is_refused_before(link, monkeypatch):
    sender, _, got, _ = link
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", module.MAX_FRAME_BYTES + 1000)
    sender.send("r#1", envelope(1), [b"x" * 1000])
    for pack, buffers in [(b"x" * 1001, []), (b"", [b"", b"x" * 1001])]:
        with pytest.raises(CodecError, match="send it in parts"):
            sender.send("r#1", pack, buffers)
    await until(lambda: len(got) == 1)


async def test_addresses_that_can_not_be_bound(folder):
    for address, said in [
        (f"ipc://{folder}/{'x' * 100}", "ipc allows 107.*TMPDIR"),
        (f"ipc://{folder}/no/such/folder", "can't bind"),
        ("tcp://256.0.0.1:1", "can't bind"),
    ]:
        with pytest.raises(LaunchError, match=said):
            Transport("a#1", address, lambda *_: None, lambda *_: None)


async def test_raw_rubbish_on_the_socket_is_counted_and_harms_nobody(link):
    sender, receiver, got, bad = link
    context = zmq.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(receiver.address)
        for frames in (
            [b""],
            [b"", b""],
            [b"\xc1"],
            [b"rubbish" * 1000, b"x" * 10**5],
            [msgpack.packb([[1]])],
            [b"\x92\x90\x90", b"x"],
        ):
            socket.send_multipart(frames)
        await until(lambda: len(bad) == 6)
    context.term()
    sender.send("r#1", envelope(7), [])
    await until(lambda: len(got) == 1)


# The bytes of a frame


def frames_of(*items):
    return [memoryview(frame) for frame in join(items)]


def test_split_gives_back_what_was_joined():
    items = [(envelope(1), [b"a", b""]), (envelope(2), []), (envelope(3), [b"x" * 100_000])]
    assert split(frames_of(*items)) == items
    assert split(frames_of(*items[1:2])) == items[1:2]


@pytest.mark.parametrize(
    ("head", "buffers", "said"),
    [
        (None, [], "without frames"),
        (b"", [], "malformed"),
        (b"\xc1", [], "malformed"),
        (b"\x91" * 5000, [], "malformed"),
        (b"\xdd\xff\xff\xff\xff", [], "malformed"),
        (msgpack.packb(7), [], "malformed"),
        (msgpack.packb({"a": 1}), [], "malformed"),
        (msgpack.packb(["a", []]), [], "list of envelopes"),
        (msgpack.packb([[], 1]), [], "list of envelopes"),
        (msgpack.packb([["text"], []]), [], "list of envelopes"),
        (msgpack.packb([[[1]], []]), [], "list of envelopes"),
        (msgpack.packb([[], []]), [b"stray"], "claim 0 of 1 buffers"),
        (msgpack.packb([[b"a"], []]), [b"stray"], "how many buffers"),
        (msgpack.packb([[b"a"], [2]]), [b"one"], "claim 2 of 1 buffers"),
        (msgpack.packb([[b"a"], [-1]]), [], "how many buffers"),
        (msgpack.packb([[b"a"], [True]]), [b""], "how many buffers"),
        (msgpack.packb([[b"a"], [0, 1]]), [b""], "how many buffers"),
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
        envelopes = split([memoryview(head), *map(memoryview, buffers)])
    except CodecError:
        return
    assert sum(len(bufs) for _, bufs in envelopes) == len(buffers)
    assert all(type(env) is bytes for env, _ in envelopes)
