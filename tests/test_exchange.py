"""A receiver gets the weights of one version, whole, or an error that says why not; no death leaves anything behind."""

import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from headrace.runtime.codec import decode, encode
from headrace.runtime.errors import BadWeights, CorruptWeights, ExchangeFull, StaleIncarnation
from headrace.runtime.exchange import Publisher, Receiver


@pytest.fixture
def publisher():
    publisher = Publisher("policy")
    yield publisher
    publisher.close()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


def weights(version, n=300_000):
    return {"a": np.full((n,), version, np.float32), "b": np.full((3, 7), version, np.int64), "c": np.float16(version)}


def all_mappings():
    with open("/proc/self/maps") as file:
        return sum("memfd:headrace" in line for line in file)


@pytest.fixture(autouse=True)
def others(monkeypatch):
    """What tests before this one have left to the garbage collector."""
    gc.collect()
    monkeypatch.setitem(OTHERS, "mappings", all_mappings())


OTHERS = {"mappings": 0}


def mappings():
    return all_mappings() - OTHERS["mappings"]


dtypes = st.sampled_from("|b1 |u1 |i1 <u2 <i2 <u4 <i4 <u8 <i8 <f2 <f4 <f8".split()).map(np.dtype)
arrays = npst.arrays(dtypes, npst.array_shapes(min_dims=0, min_side=0, max_side=40))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays, max_size=5), st.booleans())
def test_what_is_received_is_what_was_published(tensors, transposed):
    tensors = {name: x.T if transposed else x for name, x in tensors.items()}
    finite = all(x.dtype.kind != "f" or np.isfinite(x).all() for x in tensors.values())
    publisher, receiver = Publisher("policy"), Receiver()
    if not finite:
        with pytest.raises(BadWeights):
            publisher.publish(1, tensors)
        assert publisher.manifest is None
    else:
        got = receiver.receive(decode(*encode(publisher.publish(1, tensors))))
        assert list(got) == list(tensors)
        for name, x in tensors.items():
            assert got[name].dtype == x.dtype and got[name].shape == x.shape
            np.testing.assert_array_equal(got[name], x)
    receiver.close()
    publisher.close()


def test_two_versions_stay_and_older_ones_are_refused(publisher, receiver):
    manifests = [publisher.publish(v, weights(v)) for v in range(3)]
    with pytest.raises(StaleIncarnation, match=r"version 0 of policy .* overwritten by a newer one; ask for"):
        receiver.receive(manifests[0])
    for v in (1, 2):
        assert (receiver.receive(manifests[v])["a"] == v).all()
    assert publisher.manifest is manifests[2]


def test_copies_are_the_callers_and_may_be_copied_into(publisher, receiver):
    mine = receiver.receive(publisher.publish(0, weights(0)))
    for v in range(1, 5):
        publisher.publish(v, weights(v))
    assert (mine["a"] == 0).all()
    assert receiver.receive(publisher.manifest, into=mine)["a"] is mine["a"] and (mine["a"] == 4).all()
    for wrong in ({}, {**mine, "a": mine["a"][:5]}, {**mine, "a": np.zeros(300_000)}, {**mine, "b": mine["b"].T}):
        with pytest.raises(ValueError, match=r"into\['[ab]'\] must be"):
            receiver.receive(publisher.manifest, into=wrong)
    read_only = mine["a"].copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="must be contiguous and writeable"):
        receiver.receive(publisher.manifest, into={**mine, "a": read_only})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite_keep_the_last_good_version(publisher, receiver, bad, dtype):
    good = publisher.publish(7, weights(7))
    broken = np.ones(400_000, dtype)
    broken[399_999] = bad
    with pytest.raises(BadWeights, match=r"expert\.0 of version 8 has at least 1 values that are not finite"):
        publisher.publish(8, {"fine": np.ones(3), "expert.0": broken})
    assert publisher.manifest is good and (receiver.receive(good)["a"] == 7).all()
    assert (receiver.receive(publisher.publish(9, weights(9)))["a"] == 9).all()


def test_large_finite_weights_are_not_mistaken_for_infinite_ones(publisher, receiver):
    big = np.full(1000, np.finfo(np.float32).max)
    assert (receiver.receive(publisher.publish(0, {"x": big}))["x"] == big).all()


def test_dtypes_that_cannot_travel_are_named(publisher):
    for array in (np.zeros(3, ">f4"), np.zeros(3, complex), np.array(["a"]), np.array([object()])):
        with pytest.raises(BadWeights, match=r"w has dtype .*, which can't travel; allowed: <f2, "):
            publisher.publish(0, {"w": array})


def test_buffers_are_reused_and_grow_without_a_leak(publisher, receiver):
    receiver.receive(publisher.publish(0, weights(0)))
    receiver.receive(publisher.publish(1, weights(1)))
    fds, maps = len(os.listdir("/proc/self/fd")), mappings()
    for v in range(2, 30):
        receiver.receive(publisher.publish(v, weights(v)))
    assert len(os.listdir("/proc/self/fd")) == fds and mappings() <= maps + 1
    for v in range(30, 40):
        got = receiver.receive(publisher.publish(v, weights(v, n=100_000 * (v - 25))))
        assert (got["a"] == v).all() and len(got["a"]) == 100_000 * (v - 25)
    assert len(os.listdir("/proc/self/fd")) == fds and mappings() <= 4
    receiver.close()
    publisher.close()
    assert mappings() == 0


def test_a_new_incarnation_unmaps_the_old_one(receiver):
    for round in range(5):
        publisher = Publisher("policy")
        for v in range(3):
            assert (receiver.receive(publisher.publish(v, weights(round)))["a"] == round).all()
        old = publisher.manifest
        publisher.close()
    assert mappings() == 2, "what the receiver still has of the last one"
    publisher = Publisher("policy")
    with pytest.raises(StaleIncarnation):
        receiver.receive(dataclasses.replace(publisher.publish(0, weights(0)), incarnation=old.incarnation))
    publisher.close()


def test_a_changed_byte_is_found(publisher, receiver):
    manifest = publisher.publish(3, weights(3))
    (buffer,) = publisher._buffers
    buffer.payload[manifest.tensors[1].offset + 5] ^= 1
    with pytest.raises(CorruptWeights, match="a and b and c in version 3 of policy does not match its checksum"):
        receiver.receive(manifest)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_hostile_manifest_leads_nowhere(data):
    publisher, receiver = Publisher("policy"), Receiver()
    manifest = publisher.publish(0, weights(0, n=50))
    spec = data.draw(st.sampled_from(manifest.tensors))
    field, value = data.draw(
        st.sampled_from(
            [
                ("offset", -64),
                ("offset", 10**9),
                ("shape", (10**6,)),
                ("shape", (-3, -7)),
                ("dtype", "|O8"),
                ("checksums", []),
                ("bucket_bytes", 0),
            ]
        )
    )
    if field in ("checksums", "bucket_bytes"):
        hostile = dataclasses.replace(manifest, **{field: value})
    else:
        hostile = dataclasses.replace(manifest, tensors=[dataclasses.replace(spec, **{field: value})])
    with pytest.raises(CorruptWeights, match="the manifest of policy version 0"):
        receiver.receive(hostile)
    with pytest.raises(StaleIncarnation):
        receiver.receive(dataclasses.replace(manifest, nbytes=10**9, bucket_bytes=10**9))
    for fd in (0, 999_999):
        with pytest.raises(StaleIncarnation):
            receiver.receive(dataclasses.replace(manifest, fd=fd))
    receiver.close()
    publisher.close()


def test_too_little_memory_is_one_clear_error(publisher, receiver, monkeypatch):
    good = publisher.publish(0, weights(0, n=10))
    monkeypatch.setattr("headrace.runtime.exchange.mapped.available_bytes", lambda: 1 << 20)
    with pytest.raises(ExchangeFull, match=r"can't get 4 MiB .* policy: only 1 MiB of memory are available; free"):
        publisher.publish(1, weights(1, n=1 << 20))
    assert publisher.manifest is good and (receiver.receive(good)["a"] == 0).all()


def test_a_limit_of_the_system_is_one_clear_error():
    code = """
import resource, numpy as np
from headrace.runtime.exchange import Publisher
from headrace.runtime.errors import ExchangeFull
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
publisher = Publisher("policy")
good = publisher.publish(0, {"x": np.zeros(10)})
try:
    publisher.publish(1, {"x": np.zeros(1 << 20)})
except ExchangeFull as error:
    assert publisher.manifest is good
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("can't get 8 MiB of shared memory for weights of policy: File too large"), done.stderr


# Real processes

PUBLISH = """
import sys, numpy as np
from headrace.runtime.codec import encode
from headrace.runtime.exchange import Publisher
publisher = Publisher("policy")
version = 0
for line in sys.stdin:
    for _ in range(int(line)):
        tensors = {"a": np.full(500_000, version, np.float32), "b": np.full(70_000, version)}
        manifest = publisher.publish(version, tensors)
        pack, buffers = encode(manifest)
        assert not buffers
        sys.stdout.buffer.write(len(pack).to_bytes(4, "little") + pack)
        sys.stdout.buffer.flush()
        version += 1
"""


class Remote:
    """A process that publishes as often as it is told, as fast as it can."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PUBLISH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        return self

    def order(self, count):
        self.process.stdin.write(b"%d\n" % count)

    def next(self):
        """The next manifest, or None after its death."""
        length = self.process.stdout.read(4)
        return decode(self.process.stdout.read(int.from_bytes(length, "little"))) if len(length) == 4 else None

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __exit__(self, *_):
        self.kill()
        self.process.stdout.close()
        self.process.stdin.close()


def is_whole(got, manifest):
    return (got["a"] == manifest.version).all() and (got["b"] == manifest.version).all()


def test_a_reader_beside_a_writer_never_gets_a_mixture(receiver):
    with Remote() as remote:
        for _ in range(60):
            remote.order(4)
            for _ in range(3):
                manifest = remote.next()
                try:
                    got = receiver.receive(manifest)
                except StaleIncarnation:
                    continue
                assert is_whole(got, manifest)
            newest = remote.next()
            assert is_whole(receiver.receive(newest), newest)


def test_a_publisher_killed_at_any_moment_leaves_the_whole_old_version_or_an_error(receiver):
    rng = random.Random(0)
    for trial in range(8):
        mapped = trial % 2
        with Remote() as remote:
            remote.order(2)
            manifests = [remote.next(), remote.next()]
            if mapped:
                assert all(is_whole(receiver.receive(manifest), manifest) for manifest in manifests)
            remote.order(1000)
            time.sleep(rng.random() * 0.01)
            remote.kill()
            while (manifest := remote.next()) is not None:
                manifests.append(manifest)
            if mapped:
                assert is_whole(receiver.receive(manifests[-1]), manifests[-1])
            for manifest in manifests[:-2] if mapped else manifests:
                with pytest.raises(StaleIncarnation):
                    receiver.receive(manifest)
    receiver.close()
    assert mappings() == 0 and not any("headrace" in name for name in os.listdir("/dev/shm"))


def test_a_receiver_killed_in_the_middle_costs_the_publisher_nothing(publisher):
    code = """
import sys
from headrace.runtime.codec import decode
from headrace.runtime.exchange import Receiver
receiver, manifest = Receiver(), decode(sys.stdin.buffer.read())
while True:
    receiver.receive(manifest)
    print("ok", flush=True)
"""
    pack, _ = encode(publisher.publish(0, weights(0)))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        reader.stdin.write(pack)
        reader.stdin.close()
        assert reader.stdout.readline() == b"ok\n"
        reader.send_signal(signal.SIGKILL)
    for v in range(1, 4):
        publisher.publish(v, weights(v))
    assert (Receiver().receive(publisher.manifest)["a"] == 3).all()
