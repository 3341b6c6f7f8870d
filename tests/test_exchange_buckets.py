"""Buckets: what travels of a plan, in which order, in how much memory; and FP8 on the way."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exchange_plan import TINY, Arrays, arrays_of, layouts, whole_arrays

from headrace.actors.model.shards import engine_holding, matrices, trainer_holding
from headrace.runtime.errors import BadWeights, CorruptWeights
from headrace.runtime.exchange import Intake, Publisher, Receiver, fp8
from headrace.runtime.exchange.buckets import Schedule
from headrace.runtime.exchange.header import BucketHeader, stored
from headrace.runtime.exchange.holding import Held, Holding, Part, Whole
from headrace.runtime.exchange.mesh import Mesh
from headrace.runtime.exchange.plan import Plan, make_plan
from headrace.runtime.exchange.staging import HEADER_BYTES, pack, unpack
from headrace.runtime.exchange.transfer import Transfer

HALF_ULP = 2.0**-4
"""Largest relative error of e4m3, of a value in its normal range."""


class Wires:
    """Links between threads: a sender waits until its bucket is taken, so a circle of waits is a deadlock, and seen."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], queue.Queue[bytes]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def of(self, rank: int) -> Wire:
        return Wire(self, rank)

    def queue(self, source: int, dest: int) -> queue.Queue[bytes]:
        with self._lock:
            return self._queues[source, dest]


class Wire:
    def __init__(self, wires: Wires, rank: int) -> None:
        self._wires, self._rank = wires, rank

    def send(self, dest: int, data: np.ndarray) -> Callable[[], None]:
        pair = self._wires.queue(self._rank, dest)
        pair.put(data.tobytes())
        pair.join()  # Until it is taken: nothing is stored between the ranks.
        return lambda: None

    def receive(self, source: int, into: np.ndarray) -> np.ndarray:
        pair = self._wires.queue(source, self._rank)
        data = pair.get(timeout=20)
        pair.task_done()
        into[: len(data)] = np.frombuffer(data, np.uint8)
        return into[: len(data)]


def exchange(plan: Plan, have: Arrays, *, bucket_bytes: int, quantized: tuple[str, ...] = ()) -> Arrays:
    """All ranks at once, a thread for each; returns what the destinations have then."""
    got: Arrays = {
        rank: {name: np.zeros(shape, stored(dtype)) for name, (dtype, shape) in plan.dest.local(rank).items()}
        for rank in plan.dest.mesh.ranks.tolist()
    }
    wires, failed = Wires(), []
    transfers = {
        rank: Transfer(
            Schedule(plan, rank, bucket_bytes=bucket_bytes, quantized=quantized),
            wires.of(rank),
            have.get(rank),
            got.get(rank),
        )
        for rank in sorted({*have, *got})
    }

    def run(transfer: Transfer) -> None:
        try:
            transfer.run(3, 1)
        except Exception as error:  # noqa: BLE001  (shown by the assertion below)
            failed.append(error)

    threads = [threading.Thread(target=run, args=(transfer,), daemon=True) for transfer in transfers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed and not any(thread.is_alive() for thread in threads)
    for transfer in transfers.values():
        assert transfer.nbytes <= 2 * (bucket_bytes + HEADER_BYTES)
    return got


@given(layouts(), st.sampled_from([64, 192, 4096]))
@settings(max_examples=25, deadline=None)
def test_buckets_of_any_size_bring_everything_and_never_wait_in_a_circle(
    sides: tuple[Holding, Holding], bucket_bytes: int
) -> None:
    source, dest = sides
    wholes = whole_arrays(source)
    want = arrays_of(dest, wholes)
    got = exchange(make_plan(source, dest), arrays_of(source, wholes), bucket_bytes=bucket_bytes)
    for rank, arrays in want.items():
        assert arrays.keys() == got[rank].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[rank][name], array)


def test_both_ends_of_a_pair_cut_the_same_buckets_within_the_bound() -> None:
    source = trainer_holding(TINY, fsdp=4, ep=2, tp=2)
    dest = engine_holding(TINY, engines=2, tp=2, ep=4, fuse_qkv=True, first=source.mesh.size)
    plan = make_plan(source, dest)
    names = tuple(name for name in source.wholes if "experts" in name)
    seen = defaultdict(list)
    for rank in (*source.mesh.ranks.tolist(), *dest.mesh.ranks.tolist()):
        schedule = Schedule(plan, rank, bucket_bytes=256, quantized=names)
        assert schedule.peak_bytes() <= 2 * 256
        for bucket in schedule.buckets:
            assert 0 < bucket.nbytes <= 256 and rank in (bucket.source, bucket.dest)
            rows = slice(bucket.first, bucket.last)
            boxes = [column[rows].tolist() for column in schedule.moves], schedule.offset[rows].tolist()
            seen[bucket.source, bucket.dest, bucket.number].append((bucket.num_buckets, bucket.nbytes, boxes))
    assert all(len(ends) == 2 and ends[0] == ends[1] for ends in seen.values())
    assert {(s, d): n for s, d, n in seen} == {(s, d): ends[0][0] - 1 for (s, d, _), ends in seen.items()}


def one_tensor(dtype: str, shape: tuple[int, ...]) -> Plan:
    whole = Whole("w", dtype, shape)
    return make_plan(*(Holding(Mesh({}, first=first), [Held("w", (Part(whole),))]) for first in (0, 1)))


def packed(plan: Plan, array: np.ndarray, *, quantized: tuple[str, ...] = ()) -> tuple[Schedule, np.ndarray]:
    schedule = Schedule(plan, 1, bucket_bytes=4096, quantized=quantized)
    out = np.empty(HEADER_BYTES + 4096, np.uint8)
    return schedule, pack(schedule, schedule.buckets[0], {"w": array}, out, version=7, epoch=2)


def test_a_bucket_is_refused_unless_it_is_the_one_expected_whole() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    schedule, data = packed(one_tensor("<f4", (3, 4)), array)
    header = BucketHeader.unpack(data[: BucketHeader.FORMAT.size].tobytes())
    assert (header.version, header.epoch, header.source, header.dest, header.quantized) == (7, 2, 0, 1, False)
    got = np.zeros_like(array)
    (bucket,) = schedule.buckets

    def receive(data: np.ndarray, version: int = 7, epoch: int = 2) -> None:
        unpack(schedule, bucket, data, {"w": got}, version=version, epoch=epoch)

    for wrong in ({"version": 8}, {"epoch": 3}):
        with pytest.raises(CorruptWeights, match=r"expected \(version, epoch"):
            receive(data, **wrong)
    for cut in (0, 10, HEADER_BYTES, len(data) - 1):
        with pytest.raises(CorruptWeights):
            receive(data[:cut])
    for byte in range(HEADER_BYTES, len(data)):
        damaged = data.copy()
        damaged[byte] ^= 1
        with pytest.raises(CorruptWeights, match="bucket 0 from rank 0 to 1 of version 7 does not match its checksum"):
            receive(damaged)
    assert not got.any()
    receive(data)
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bfloat16"])
def test_quantized_tensors_come_within_the_error_of_e4m3(dtype: str) -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal((33, 65)) * random.lognormal(0, 3, (33, 1))).astype(np.float32)
    if dtype == "<f2":
        values = values.clip(-60000, 60000)
    values[3] = 0
    array = fp8.from_float(values, dtype)
    exact = fp8.as_float(array, dtype)
    schedule, data = packed(one_tensor(dtype, (33, 65)), array, quantized=("w",))
    assert BucketHeader.unpack(data[: BucketHeader.FORMAT.size].tobytes()).quantized
    assert len(data) < HEADER_BYTES + 33 * 65 * 1.2
    got = np.zeros_like(array)
    unpack(schedule, schedule.buckets[0], data, {"w": got}, version=7, epoch=2)
    largest = np.abs(exact).max(1, keepdims=True)
    bound = np.maximum(np.abs(exact) * (HALF_ULP + 2.0**-8), largest / 448 * 2.0**-10 * 1.01)
    assert (np.abs(fp8.as_float(got, dtype) - exact) <= bound).all()
    assert not fp8.as_float(got, dtype)[3].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantized", [(), ("w",)])
def test_what_is_not_finite_is_not_sent(bad: float, quantized: tuple[str, ...]) -> None:
    values = np.ones((4, 8), np.float32)
    values[2, 3] = bad
    with pytest.raises(BadWeights, match=r"w of version 7.* 1 .*not finite"):
        packed(one_tensor("bfloat16", (4, 8)), fp8.from_float(values, "bfloat16"), quantized=quantized)


def test_only_floating_point_can_be_quantized_and_buckets_have_a_size() -> None:
    with pytest.raises(ValueError, match="w is <i4: only"):
        Schedule(one_tensor("<i4", (4, 8)), 0, quantized=("w",))
    with pytest.raises(ValueError, match="positive multiple of 64, got 100"):
        Schedule(one_tensor("<f4", (4, 8)), 0, bucket_bytes=100)


def test_arrays_that_the_plan_does_not_expect_are_refused() -> None:
    plan = one_tensor("<f4", (3, 4))
    schedule = Schedule(plan, 1)
    for arrays, message in (
        ({"w": np.zeros((3, 5), np.float32)}, r"plan has <f4 \[3, 4\] for w, the rank has <f4 \[3, 5\]"),
        ({"w": np.zeros((3, 4))}, r"plan has <f4 \[3, 4\] for w, the rank has <f8 \[3, 4\]"),
        ({}, r"plan has <f4 \[3, 4\] for w, the rank has nothing"),
        ({"w": np.zeros((3, 4), np.float32), "x": np.zeros(1)}, r"plan has nothing for x, the rank has <f8 \[1\]"),
    ):
        with pytest.raises(BadWeights, match=message):
            Transfer(schedule, Wires().of(1), None, arrays)


def test_e4m3_codes_are_those_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    known = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(fp8.decode(codes), known)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
    between = (known[:126] + known[1:127]) / 2
    values = np.concatenate(
        (bits.view(np.float32), known, between, -between, np.linspace(-0.02, 0.02, 9999, dtype="f4"))
    )
    clamped = np.clip(values, -448, 448).astype(np.float32)  # ml_dtypes gives NaN beyond; a clamp is what is promised.
    with np.errstate(invalid="ignore"):
        expected = clamped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    found = fp8.encode(values)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected[number])
    assert ((found[~number] & 0x7F) == 0x7F).all()


def test_bfloat16_is_that_of_ml_dtypes() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    values = bits[np.isfinite(bits)]
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    codes = fp8.from_float(values, "bfloat16")
    np.testing.assert_array_equal(codes, expected.view(np.uint16))
    np.testing.assert_array_equal(fp8.as_float(codes, "bfloat16"), expected.astype(np.float32))


async def test_a_version_published_as_fp8_is_taken_within_its_error() -> None:
    random = np.random.default_rng(2)
    shapes = {"a_proj.weight": (64, 33), "experts.down_proj": (3, 32, 64), "norm.weight": (33,), "gate.weight": (3, 33)}
    tensors = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    names = matrices(tensors)
    assert names == {"a_proj.weight", "experts.down_proj"}
    publisher, intake = Publisher("weights"), Intake(lambda version, taken: {n: a.copy() for n, a in taken.items()})
    try:
        manifest = publisher.publish(1, fp8.shrink(tensors, names))
        assert manifest.nbytes < sum(a.nbytes for a in tensors.values()) / 2
        taken = await intake.load(manifest)
    finally:
        await intake.close()
        publisher.close()
    assert taken.keys() == tensors.keys()
    for name, array in tensors.items():
        if name in names:
            bound = np.maximum(np.abs(array) * HALF_ULP, np.abs(array).max(-1, keepdims=True) / 448 * 2.0**-10) * 1.01
            assert (np.abs(taken[name] - array) <= bound).all() and (taken[name] != array).any()
        else:
            np.testing.assert_array_equal(taken[name], array)


def test_what_can_not_travel_as_fp8_is_refused() -> None:
    bad = np.array([[1.0, np.nan]], np.float32)
    with pytest.raises(BadWeights, match="w: 1 of 2 values are not finite"):
        fp8.shrink({"w": bad}, {"w"})
    with pytest.raises(BadWeights, match=r"w is <i4 \[2\]: only rows of <f4, <f2, bfloat16"):
        fp8.shrink({"w": np.zeros(2, np.int32)}, {"w"})
    with pytest.raises(CorruptWeights, match="codes without scales: w@scales"):
        fp8.restore({"w@fp8:<f4": np.zeros((1, 2), np.uint8)})


def test_a_receiver_of_shared_memory_takes_the_boxes_of_a_plan() -> None:
    source = trainer_holding(TINY)
    dest = engine_holding(TINY, engines=1, tp=2, ep=4, fuse_qkv=True, first=1)
    plan, wholes = make_plan(source, dest), whole_arrays(source)
    publisher, receiver = Publisher("weights"), Receiver()
    try:
        manifest = publisher.publish(1, arrays_of(source, wholes)[0])
        for rank, wanted in arrays_of(dest, wholes).items():
            into = {name: np.zeros(shape, stored(dtype)) for name, (dtype, shape) in dest.local(rank).items()}
            receiver.receive(manifest, into=into, copies=plan.copies(dest=rank))
            assert into.keys() == wanted.keys()
            for name, array in wanted.items():
                np.testing.assert_array_equal(into[name], array)
    finally:
        receiver.close()
        publisher.close()
