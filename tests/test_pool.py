"""The sample pool loses nothing, hands nothing out twice, and comes back from kill -9 as it was."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.runtime.codec import decode, encode
from headrace.runtime.entries import Entry, Selection
from headrace.runtime.errors import ActorDied, JournalError, LeaseLost, PoolFull
from headrace.runtime.journal import Journal
from headrace.runtime.pool import SamplePool
from headrace.runtime.pool_state import NUM_REMEMBERED, Pool
from headrace.runtime.system import System


def entry(id, key=None, started=0, payload=None):
    return Entry(id=id, key=(float(id),) if key is None else key, started=started, payload=payload, num_tokens=10)


def ids(lease):
    return [e.id for e in lease.entries]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# The life of an entry


def test_the_smallest_key_goes_first_and_ids_break_ties():
    pool = Pool(capacity=8)
    for id, key in [(0, (2.0, 1.0)), (1, (1.0, 9.0)), (2, (2.0, 0.0)), (3, (1.0, 9.0))]:
        assert pool.put(entry(id, key))
    assert ids(pool.lease(4, version=0)) == [1, 3, 2, 0]


def test_an_id_is_taken_once_for_ever():
    pool = Pool(capacity=8)
    assert pool.put(entry(0)) and not pool.put(entry(0))
    lease = pool.lease(1, version=0)
    assert not pool.put(entry(0)), "leased"
    assert pool.ack(lease.id) == 1
    assert not pool.put(entry(0)), "settled"
    assert pool.retire([1, 2]) == 2 and not pool.put(entry(2)) and pool.retire([2]) == 0
    assert pool.stats()["counts"]["refused"] == 4
    pool.put(entry(3, started=7))
    pool.lease(1, version=8, holder="trainer")
    pool.put(entry(4, started=7))
    stats = json.loads(json.dumps(pool.stats()))
    assert stats["waiting_by_version"] == {"7": 1} and stats["waiting_tokens"] == 10
    assert stats["leases"] == [{"id": 1, "version": 8, "holder": "trainer", "entries": 1}]
    with pytest.raises(ValueError, match="id >= 0"):
        pool.put(entry(-1))


def test_a_lease_is_all_or_nothing_unless_told():
    pool = Pool(capacity=8)
    pool.put(entry(0))
    assert pool.lease(2, version=0) is None
    assert ids(pool.lease(2, version=0, at_least=1)) == [0]
    assert pool.lease(1, version=0) is None, "what is leased is not leased again"
    with pytest.raises(ValueError, match="at_least 3, count 2"):
        pool.lease(2, version=0, at_least=3)


def test_an_expired_lease_goes_back_and_its_holder_is_told():
    clock = Clock()
    pool = Pool(capacity=8, lease_s=10.0, clock=clock)
    pool.put(entry(0))
    first = pool.lease(1, version=0, holder="a")
    clock.now = 9.0
    pool.renew(first.id)
    clock.now = 18.0
    assert pool.lease(1, version=0) is None and pool.next_expiry_s == 1.0
    clock.now = 19.0
    second = pool.lease(1, version=0, holder="b")
    assert ids(second) == [0] and second.id != first.id
    for late in (pool.ack, pool.renew):
        with pytest.raises(LeaseLost, match=f"lease {first.id} is over"):
            late(first.id)
    assert pool.ack(second.id) == 1 and pool.ack(second.id) == 0, "an ack may be repeated"
    assert [line["event"] for line in pool.explain(0)] == ["put", "leased", "released", "leased", "acked"]
    assert pool.explain(0)[2]["reason"] == "lease expired"


def test_what_a_dead_holder_had_goes_back():
    pool = Pool(capacity=8)
    for id in range(4):
        pool.put(entry(id))
    mine, others = pool.lease(2, 0, "trainer"), pool.lease(1, 0, "other")
    assert pool.release_holder("trainer") == 2 and pool.release(mine.id) == 0
    assert ids(pool.lease(3, 0)) == [0, 1, 3] and pool.ack(others.id) == 1


def test_a_full_pool_refuses_all_but_those_whose_place_is_reserved():
    pool = Pool(capacity=3)
    pool.expect({7: 0})
    pool.put(entry(0))
    pool.put(entry(1))
    with pytest.raises(PoolFull, match="holds 2 and expects 1 of 3"):
        pool.put(entry(2))
    assert pool.put(entry(7)) and len(pool) == 3
    pool.lease(1, version=0)
    with pytest.raises(PoolFull):
        pool.put(entry(3))


def test_the_policy_sees_everything_and_its_drops_are_final():
    views = []

    def policy(view):
        views.append(view)
        old = [e for e in view.waiting if e.started < view.version - 1]
        return Selection(
            picks=[e for e in view.waiting if e not in old][: view.count], drops=[(e, "stale") for e in old]
        )

    pool = Pool(capacity=8, policy=policy)
    for id, started in enumerate([1, 5, 5]):
        pool.put(entry(id, started=started))
    pool.expect({0: 1, 9: 4})
    assert ids(pool.lease(1, version=5)) == [1] and ids(pool.lease(1, version=5)) == [2]
    assert views[0].pending == {9: 4} and [e.id for e in views[1].leased] == [1]
    assert not pool.put(entry(0)) and pool.stats()["drops"] == {"stale": 1}
    assert pool.explain(0)[-1]["reason"] == "stale"
    assert not pool.discard(1, "leased") and not pool.discard(0, "gone")


def test_memory_of_the_past_is_bounded():
    pool = Pool(capacity=8)
    for id in range(3 * NUM_REMEMBERED):
        pool.put(entry(id))
        pool.ack(pool.lease(1, version=0).id)
    state = pool.snapshot()
    assert state["settled"] == (3 * NUM_REMEMBERED, [])
    assert len(state["history"]) <= NUM_REMEMBERED and len(state["acked"]) <= NUM_REMEMBERED
    assert not pool.put(entry(5))


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of operations and crashes against a model of three sets."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "pool"
        self.clock = Clock()
        self.waiting, self.leases, self.settled, self.next_id = set(), {}, set(), 0
        self.open()

    def open(self):
        self.pool = Pool(capacity=6, journal=Journal(self.path), lease_s=5.0, clock=self.clock)

    def teardown(self):
        self.pool.close()
        self.directory.cleanup()

    @rule(skip=st.integers(0, 2), back=st.integers(0, 8))
    def put(self, skip, back):
        new = back == 0
        id = self.next_id + skip if new else max(0, self.next_id - back)
        known = id in self.waiting | self.settled | {i for ids in self.leases.values() for i in ids}
        if not known and len(self.pool) >= 6:
            with pytest.raises(PoolFull):
                self.pool.put(entry(id))
            return
        assert self.pool.put(entry(id, payload={"x": np.full(200, id)})) == (not known)
        if not known:
            self.waiting.add(id)
            self.next_id = max(self.next_id, id + 1)

    @rule(count=st.integers(1, 4), version=st.integers(0, 3))
    def lease(self, count, version):
        lease = self.pool.lease(count, version, holder=f"h{version}", at_least=1)
        got = [] if lease is None else ids(lease)
        for id in [id for id in self.leases if id not in self.pool._loans]:
            self.waiting |= self.leases.pop(id)  # expired
        assert got == sorted(self.waiting)[:count]
        if lease is not None:
            assert all((e.payload["x"] == e.id).all() for e in lease.entries)
            assert lease.id not in self.leases
            self.leases[lease.id] = set(got)
            self.waiting -= set(got)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def ack(self, data):
        id = data.draw(st.sampled_from(sorted(self.leases)))
        assert self.pool.ack(id) == len(self.leases[id])
        self.settled |= self.leases.pop(id)
        assert self.pool.ack(id) == 0

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        id = data.draw(st.sampled_from(sorted(self.leases)))
        self.pool.release(id)
        self.waiting |= self.leases.pop(id)

    @rule(ahead=st.integers(0, 3))
    def retire(self, ahead):
        id = self.next_id + ahead
        self.pool.retire([id])
        self.settled.add(id)
        self.next_id = id + 1

    @rule(seconds=st.floats(0.0, 4.0))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule(torn=st.binary(max_size=11))
    def crash(self, torn):
        self.pool.close()
        with open(self.path, "ab") as file:
            file.write(torn)
        self.open()

    @rule()
    def checkpoint(self):
        self.pool.checkpoint()

    @rule()
    def travel(self):
        self.pool.restore(decode(*encode(self.pool.snapshot())))

    @invariant()
    def nothing_lost_nothing_twice(self):
        held = set(self.pool._entries)
        assert held == self.waiting | {i for ids in self.leases.values() for i in ids}
        assert {id: set(loan.ids) for id, loan in self.pool._loans.items()} == self.leases
        assert all(id in self.pool for id in self.settled) and not held & self.settled


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


# The journal


def written(path, values):
    journal = Journal(path)
    assert list(journal.replay()) == []
    for value in values:
        journal.append(value)
    journal.close()


def read(path):
    journal = Journal(path)
    try:
        return list(journal.replay()), journal.torn_bytes
    finally:
        journal.close()


def test_a_record_torn_at_any_byte_costs_that_record_only(tmp_path):
    path = tmp_path / "j"
    written(path, [1, 2])
    good = path.stat().st_size
    written_again = Journal(path)
    list(written_again.replay())
    written_again.append({"x": np.arange(3), "long": np.zeros(200)})
    written_again.close()
    whole = path.read_bytes()
    for cut in (*range(good, good + 40), *range(good + 40, len(whole) - 40, 97), *range(len(whole) - 40, len(whole))):
        path.write_bytes(whole[:cut])
        assert read(path) == ([1, 2], cut - good)
        assert path.stat().st_size == good
    path.write_bytes(whole[:good] + bytes(4096))  # what a crash of the machine may leave
    assert read(path) == ([1, 2], 4096)
    for cut in range(30):
        path.write_bytes(whole[:cut])
        values, _ = read(path)
        assert values in ([], [1])


def test_damage_in_the_middle_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "j"
    written(path, [b"a" * 50, b"b" * 50, b"c" * 50])
    whole = path.read_bytes()
    for position in (whole.index(b"bbb"), whole.index(b"bbb") - 10):
        path.write_bytes(whole[:position] + b"?" + whole[position + 1 :])
        with pytest.raises(JournalError, match=r"damaged at byte \d+ of \d+.*truncate -s"):
            read(path)
        assert path.stat().st_size == len(whole)
    path.write_text("[run]\nname = 'x'\n")
    with pytest.raises(JournalError, match="no journal"):
        read(path)


def test_one_journal_one_owner(tmp_path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(JournalError, match="in use by another process"):
        Journal(tmp_path / "j")
    journal.close()
    Journal(tmp_path / "j").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="can't open"):
        Journal(tmp_path / "file" / "j")


class Disk:
    """os.write with so many bytes left."""

    def __init__(self, monkeypatch, left):
        self.left = left
        write = os.write

        def limited(fd, data):
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = bytes(data)[: self.left]
            self.left -= len(data)
            return write(fd, data)

        monkeypatch.setattr(os, "write", limited)


def test_a_full_disk_is_reported_and_nothing_changes(tmp_path, monkeypatch):
    pool = Pool(capacity=8, journal=Journal(tmp_path / "j"))
    pool.put(entry(0))
    disk = Disk(monkeypatch, left=20)
    with pytest.raises(JournalError, match=r"can't write the journal .*No space left on device.*--resume"):
        pool.put(entry(1))
    with pytest.raises(JournalError):
        pool.lease(1, version=0)
    assert len(pool) == 1 and pool.num_waiting == 1 and pool.put(entry(0)) is False
    disk.left = 10**6
    assert pool.put(entry(1)) and ids(pool.lease(2, version=3)) == [0, 1]
    pool.close()
    again = Pool(capacity=8, journal=Journal(tmp_path / "j"))
    assert again.snapshot()["leases"] == {0: (3, "", [0, 1])}
    again.close()


def test_a_compaction_that_fails_keeps_the_old_journal(tmp_path, monkeypatch):
    pool = Pool(capacity=8, journal=Journal(tmp_path / "j"))
    pool.put(entry(0))
    with monkeypatch.context() as patch:

        def full(fd):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left"):
            pool.checkpoint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "j.lock"]
    pool.put(entry(1))
    pool.close()
    again = Pool(capacity=8, journal=Journal(tmp_path / "j"))
    assert again.num_waiting == 2
    again.close()


def test_the_journal_stays_bounded_between_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.runtime.pool_state.COMPACT_BYTES", 20_000)
    pool = Pool(capacity=8, journal=Journal(tmp_path / "j"))
    for id in range(200):
        pool.put(entry(id, payload=np.zeros(1000, np.uint8)))
        pool.ack(pool.lease(1, version=0).id)
        assert (tmp_path / "j").stat().st_size < 600_000
    pool.close()


WRITER = """
import sys
from headrace.runtime.journal import Journal
from headrace.runtime.entries import Entry
from headrace.runtime.pool_state import Pool
pool = Pool(capacity=1000, journal=Journal(sys.argv[1]))
for id in range(10**6):
    pool.put(Entry(id=id, key=(0.0,), started=0, payload=b"x" * 3000))
    done = "put"
    if id % 4 == 3:
        lease = pool.lease(4, version=id)
        print("lease", lease.id, *[e.id for e in lease.entries], flush=True)
        if lease.id % 2:
            pool.ack(lease.id)
            print("ack", lease.id, flush=True)
        else:
            pool.release(lease.id) if lease.id % 4 == 0 else None
    print("put", id, flush=True)
"""


def test_kill_minus_nine_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "journal" / "pool"
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path)], stdout=subprocess.PIPE, text=True
    )
    lines = [writer.stdout.readline().split() for _ in range(400)]
    writer.send_signal(signal.SIGKILL)
    lines += [line.split() for line in writer.stdout]
    writer.wait()
    writer.stdout.close()
    pool = Pool(capacity=1000, journal=Journal(path))
    leases = {int(line[1]): [int(id) for id in line[2:]] for line in lines if line[0] == "lease"}
    acked = {int(line[1]) for line in lines if line[0] == "ack"}
    for line in lines:
        if line[0] == "put":
            assert int(line[1]) in pool and not pool.put(entry(int(line[1])))
    for id in acked:
        assert pool.ack(id) == 0
        assert not any(member in pool._entries for member in leases[id])
    held = pool.snapshot()["leases"]
    for id in [id for id in leases if id % 4 == 2]:
        assert held[id][2] == leases[id] and pool.ack(id) == 4, "a lease stands after the crash"
    pool.close()


# The actor


async def opened(**fields):
    pool = SamplePool(**fields)
    await pool.start()
    return pool


async def test_a_full_pool_makes_put_wait_and_says_for_what():
    pool = await opened(capacity=2)
    for id in range(2):
        assert await pool.put(entry(id))
    late = asyncio.create_task(pool.put(entry(2)))
    await asyncio.sleep(0)
    assert await pool.put(entry(1)) is False, "a duplicate does not wait"
    (wait,) = await pool.waits()
    assert wait["who"] == "put of entry 2" and wait["for"] == "one of 2 places" and wait["since_s"] >= 0
    lease = await pool.lease(1, 0)
    await asyncio.sleep(0)
    assert not late.done()
    await pool.ack(lease.id)
    assert await late and await pool.waits() == []
    await pool.stop(None)


async def test_lease_waits_until_the_policy_grants_it():
    pool = await opened(capacity=4)
    asked = asyncio.create_task(pool.lease(2, 7, holder="trainer"))
    await pool.put(entry(0))
    await asyncio.sleep(0)
    (wait,) = await pool.waits()
    assert wait["who"] == "lease of 2 entries for version 7 by trainer" and wait["for"] == "too few entries wait"
    await pool.put(entry(1))
    assert ids(await asked) == [0, 1]
    await pool.stop(None)


async def test_a_caller_that_gives_up_leaves_nothing_behind():
    pool = await opened(capacity=4)
    asked = asyncio.create_task(pool.lease(1, 0))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await pool.put(entry(0))
    assert await pool.waits() == [] and (await pool.stats())["waiting"] == 1
    await pool.stop(None)


async def test_a_waiting_lease_gets_what_another_let_expire():
    pool = await opened(capacity=4, lease_s=0.02)
    await pool.put(entry(0))
    first = await pool.lease(1, 0, holder="hangs")
    second = await asyncio.wait_for(pool.lease(1, 0, holder="waits"), 5)
    assert ids(second) == [0]
    with pytest.raises(LeaseLost):
        await pool.ack(first.id)
    await pool.stop(None)


async def test_an_expected_group_never_waits_behind_a_lease_that_waits_for_it():
    class Strict(SamplePool):
        def policy(self):
            def select(view):
                return Selection(picks=() if view.pending else view.waiting[: view.count], reason="older ones run")

            return select

    pool = Strict(capacity=1)
    await pool.start()
    await pool.expect({1: 0})
    assert (await pool.stats())["pending"] == 1
    unannounced = asyncio.create_task(pool.put(entry(0)))
    asked = asyncio.create_task(pool.lease(1, 0))
    await asyncio.sleep(0)
    assert len(await pool.waits()) == 2
    assert await pool.put(entry(1))
    await pool.ack((await asked).id)
    assert await unannounced
    await pool.stop(None)


async def test_the_actor_comes_back_from_its_journal(tmp_path):
    path = str(tmp_path / "journal" / "pool")
    pool = await opened(capacity=4, journal=path)
    for id in range(3):
        await pool.put(entry(id, payload={"tokens": np.arange(300, dtype=np.int32)}))
    lease = await pool.lease(1, 5, holder="trainer")
    assert (await pool.checkpoint())["journal_bytes"] > 0
    await pool.discard(2, "test")
    with pytest.raises(JournalError, match="in use"):
        await opened(capacity=4, journal=path)
    await pool.stop(None)
    again = await opened(capacity=4, journal=path)
    assert await again.ack(lease.id) == 1
    assert [line["event"] for line in await again.explain(0)] == ["put", "leased", "acked"]
    second = await again.lease(1, 6)
    assert ids(second) == [1] and (second.entries[0].payload["tokens"] == np.arange(300)).all()
    assert await again.release(second.id) == 1 and await again.release_holder("x") == 0 and await again.retire([9]) == 1
    await again.stop(None)


# A real process, killed


async def test_killed_pools_hand_out_every_entry_once(tmp_path):
    num, used, kills = 120, [], [20, 70, 1000]

    async def insist(ask):
        while True:
            try:
                return await ask()
            except ActorDied:
                continue

    async with System(tmp_path) as system:
        keeper = SamplePool(capacity=16, journal=str(tmp_path / "journal" / "pool"))
        pool = await system.spawn(keeper, name="pool", node="keeper")

        async def produce(start):
            for id in range(start, num, 3):
                await insist(lambda id=id: pool.put(entry(id, payload={"x": np.full(200, id)})))

        async def consume():
            while len(used) < num:
                try:
                    lease = await pool.lease(4, len(used), holder="consumer", at_least=1)
                except ActorDied:
                    await insist(lambda: pool.release_holder("consumer"))
                    continue
                assert all((e.payload["x"] == e.id).all() for e in lease.entries)
                if await insist(lambda id=lease.id: pool.ack(id)) in (len(lease.entries), 0):
                    used.extend(ids(lease))
                if len(used) >= kills[0]:
                    kills.pop(0)
                    os.kill(system.pids()["keeper"], signal.SIGKILL)

        async with asyncio.timeout(60):
            await asyncio.gather(consume(), *(produce(start) for start in range(3)))
        assert sorted(used) == list(range(num))
        assert system.restarts["pool"] == 2
        assert (await pool.stats())["counts"]["acked"] == num
