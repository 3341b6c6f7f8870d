"""Weights over ZeroMQ: sources that are dead, stopped, slow, empty or lie; aborts; keys; processes that are killed."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.runtime import System
from headrace.runtime.curve import Keys
from headrace.runtime.errors import CorruptWeights, LaunchError, StaleIncarnation, TransferFailed
from headrace.runtime.exchange import Exchange, Publisher, Route
from headrace.runtime.exchange.header import BucketHeader
from headrace.runtime.exchange.shelf import Shelf, Work
from headrace.runtime.exchange.tree import TreeSink
from headrace.runtime.launcher import NodeSpec

sys.path.append(str(Path(__file__).parent / "bench"))
from _weights_faults import ALWAYS, Taker, Teller, _mixed, fault_trials, tensor

ANY = "tcp://127.0.0.1:0"


def weights(version: int) -> dict[str, np.ndarray]:
    """Some buckets, of which tensors share a few."""
    return {"a": np.full(900_000, version, np.float32), "b": np.arange(7), "c": np.full((70, 9_000), version, np.int16)}


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher("policy")
    publisher.serve(ANY)
    yield publisher
    publisher.close()


@pytest.fixture
def sink() -> Iterator[TreeSink]:
    with closing(TreeSink(ANY)) as sink:
        yield sink


def route(*sources: str, deadline_s: float = 20.0, stall_s: float = 0.3, epoch: int = 1) -> Route:
    return Route(carrier="tree", sources=sources, epoch=epoch, deadline_s=deadline_s, stall_s=stall_s)


@contextmanager
def stopped() -> Iterator[str]:
    """The address of a process that was stopped: its kernel takes connections, and nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def relay(work: Work) -> Iterator[str]:
    """A member that has got so far."""
    with closing(Shelf(ANY, lambda incarnation, generation: work, growing=True)) as shelf:
        yield shelf.address


def same(got: object, wanted: dict[str, np.ndarray]) -> bool:
    assert isinstance(got, dict)
    return got.keys() == wanted.keys() and all(np.array_equal(got[name], x) for name, x in wanted.items())


def test_versions_come_whole_into_two_payloads_in_turn(publisher: Publisher, sink: TreeSink) -> None:
    address = publisher.publish(0, weights(0)).seat.address
    before: dict[str, np.ndarray] = {}
    for version in range(5):
        got = sink.receive(publisher.publish(version, weights(version)), route(address))
        assert same(got, weights(version))
        assert not before or same(before, weights(version - 1)), "what is in use is not written to"
        before = dict(got)
    into = {name: np.empty_like(x) for name, x in weights(4).items()}
    assert publisher.manifest is not None
    assert sink.receive(publisher.manifest, route(address), into)["a"] is into["a"] and same(into, weights(4))


def test_a_member_hands_on_while_it_receives(publisher: Publisher, sink: TreeSink) -> None:
    manifest = publisher.publish(3, weights(3))
    found = publisher.written(manifest.incarnation, manifest.generation)
    assert found is not None
    work = Work(*found, num_here=2)
    with closing(Shelf(ANY, lambda incarnation, generation: work, growing=True)) as shelf:
        received: list[object] = []
        child = threading.Thread(
            target=lambda: received.append(sink.receive(manifest, route(shelf.address, stall_s=20)))
        )
        child.start()
        until(lambda: sink._works[-1] is not None and sink._works[-1].num_here == 2)
        assert not received
        for here in range(3, len(manifest.checksums) + 1):
            work.num_here = here
            shelf.grown()
        child.join(timeout=20)
    assert same(received[0], weights(3)) and not sink.passed_over


def until(holds: object) -> None:
    assert callable(holds)
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_sources_that_are_stopped_dead_late_or_wrong_are_passed_over(publisher: Publisher, sink: TreeSink) -> None:
    manifest = publisher.publish(5, weights(5))
    found = publisher.written(manifest.incarnation, manifest.generation)
    assert found is not None
    damaged = found[1].copy()
    damaged[manifest.bucket_bytes + 3] ^= 1
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        with stopped() as silent, relay(Work(*found, num_here=3)) as late, relay(Work(found[0], damaged, 9)) as wrong:
            got = sink.receive(manifest, route(silent, dead, late, wrong, manifest.seat.address))
            assert list(sink.passed_over)[:4] == [silent, dead, late, wrong]
    assert same(got, weights(5))


def test_what_only_the_publisher_can_settle_is_an_error(publisher: Publisher, sink: TreeSink) -> None:
    manifest = publisher.publish(5, weights(5))
    address = manifest.seat.address
    publisher.publish(6, weights(6))
    publisher.publish(7, weights(7))
    with pytest.raises(StaleIncarnation, match="version 5 of policy can't be fetched: its publisher has it no more"):
        sink.receive(manifest, route(address))
    newest = publisher.manifest
    assert newest is not None
    with pytest.raises(CorruptWeights, match="bucket 2 of version 7 of policy does not match"):
        sink.receive(replace(newest, checksums=[*newest.checksums[:2], 0, *newest.checksums[3:]]), route(address))
    with pytest.raises(CorruptWeights, match=r"a bucket of policy says it is \(7, .* and \(8, "):
        sink.receive(replace(newest, version=8), route(address))
    with stopped() as silent, pytest.raises(TimeoutError, match=r"0 of \d+ buckets within 0.3 s; .* silent: " + silent):
        sink.receive(newest, route(silent, deadline_s=0.3, stall_s=0.1))
    assert same(sink.receive(newest, route(address)), weights(7))


def test_an_abort_ends_a_receive_and_a_repeat_goes_on_from_there(publisher: Publisher, sink: TreeSink) -> None:
    manifest = publisher.publish(1, weights(1))
    found = publisher.written(manifest.incarnation, manifest.generation)
    assert found is not None
    with relay(Work(*found, num_here=4)) as late:
        threading.Timer(0.1, lambda: sink.abort(4)).start()
        with pytest.raises(TransferFailed, match=r"4 of \d+ buckets had come when epoch 4 was aborted"):
            sink.receive(manifest, route(late, epoch=4, stall_s=20))
        closing_one = TreeSink()
        threading.Timer(0.1, closing_one.close).start()
        for _ in range(2):
            with pytest.raises(TransferFailed, match=r"of \d+ buckets had come when epoch 9 was aborted"):
                closing_one.receive(manifest, route(late, epoch=9, stall_s=20))
    assert sink._works[-1] is not None and sink._works[-1].num_here == 4
    assert same(sink.receive(manifest, route(manifest.seat.address, epoch=5)), weights(1))


def test_strange_questions_are_answered_by_nothing(publisher: Publisher, sink: TreeSink) -> None:
    manifest = publisher.publish(1, weights(1))
    dealer = sink.dealer(manifest.seat.address)
    for question in (b"", b"x" * 32, b"\xff" * 28, b"x" * 100):
        dealer.send(question)
    dealer.send_multipart([b"a", b"b", b"c"])
    assert dealer.poll(5000)
    head, data = dealer.recv_multipart()
    assert BucketHeader.unpack(head).nbytes == 0 and data == b""
    dealer.close()
    assert same(sink.receive(manifest, route(manifest.seat.address)), weights(1))
    with pytest.raises(CorruptWeights, match="3 bytes are no header"):
        BucketHeader.unpack(b"abc")


async def test_only_who_has_the_keys_can_fetch() -> None:
    keys, others = Keys.generate(), Keys.generate()
    publisher = Publisher("policy")
    publisher.serve(ANY, keys)
    manifest = publisher.publish(1, weights(1))
    address = manifest.seat.address
    friend, stranger, nobody = TreeSink(keys=keys), TreeSink(keys=others), TreeSink()
    assert same(await asyncio.to_thread(friend.receive, manifest, route(address)), weights(1))
    for other in (stranger, nobody):
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(other.receive, manifest, route(address, deadline_s=0.4))
    for open_one in (publisher, friend, stranger, nobody):
        open_one.close()
    with pytest.raises(LaunchError, match="there are no keys"):
        Publisher("policy").serve("tcp://192.0.2.1:0")


async def test_processes_on_tcp_fetch_with_the_keys_of_their_system(tmp_path: Path) -> None:
    nodes = {name: NodeSpec(name=name, transport="tcp") for name in ("teller", "taker")}
    async with System(tmp_path / "run", nodes=nodes) as system:
        teller = await system.spawn(Teller(), name="teller", node="teller", policy=ALWAYS)
        taker = await system.spawn(Taker(), name="taker", node="taker", policy=ALWAYS)
        exchange = Exchange(teller.publish, carrier="tree")
        await exchange.join("taker", taker)
        await exchange.publish(4)
        assert await exchange.settled() == {"taker": 4} and await taker.audit() == (4, 0)
        stranger = TreeSink()
        assert exchange.manifest is not None
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(
                stranger.receive, exchange.manifest, route(exchange.manifest.seat.address, deadline_s=0.3)
            )
        stranger.close()
        await exchange.close()


@pytest.mark.slow
def test_kills_and_stops_at_random_moments_leave_whole_versions() -> None:
    counts = fault_trials(8, seed=3)
    assert counts["trials"] == 8 and counts["hangs"] == counts["mixed"] == counts["went_back"] == 0
    assert sum(counts["faults"].values()) == 8
    mixture = {"0": tensor(3, 0), "1": np.concatenate([tensor(3, 1)[:-9], tensor(2, 1)[-9:]])}
    assert _mixed(3, mixture) == 1 and _mixed(3, {"0": tensor(3, 0)}) == 0
