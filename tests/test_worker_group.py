"""Worker groups in real processes: what each rank gets, what comes back, what stays there, who is blamed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_actors import Rank

from headrace.runtime import System, timeout, wire
from headrace.runtime.batches import count, join, part
from headrace.runtime.dispatch import ALL_TO_ALL, Arguments, Whole, joined, split
from headrace.runtime.errors import (
    ActorDied,
    BadSample,
    BatchesFull,
    BatchGone,
    RankError,
    RemoteError,
)
from headrace.runtime.layout import Layout
from headrace.runtime.remote_batch import RemoteBatch, RemotePart
from headrace.runtime.worker_group import WorkerGroup


@wire
@dataclass(frozen=True)
class Pair:
    a: np.ndarray
    b: list[str]
    scale: float = 1.0


@asynccontextmanager
async def ranks(layout: Layout, name: str = "ranks", system: System | None = None) -> AsyncIterator[WorkerGroup]:
    """A group of its own processes."""
    if system is not None:
        yield await WorkerGroup.spawn(system, Rank(), name=name, layout=layout)
        return
    async with System() as own:
        yield await WorkerGroup.spawn(own, Rank(), name=name, layout=layout)


# Values -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_and_places_are_each_others_inverse(dp: int, tp: int, pp: int) -> None:
    layout = Layout(dp, tp, pp)
    places = [layout.place(rank) for rank in range(layout.size)]
    assert [layout.rank(*place) for place in places] == list(range(layout.size))
    assert places == [(p, d, t) for p, d, t in itertools.product(range(pp), range(dp), range(tp))]
    assert layout.place(layout.rank(-1, 0, -1)) == (pp - 1, 0, tp - 1)
    with pytest.raises(ValueError, match="rank must be from 0"):
        layout.place(layout.size)


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_batch_that_was_cut_is_joined_to_itself(number: int, parts: int) -> None:
    batch = {
        "x": np.arange(3 * number).reshape(number, 3),
        "pair": Pair(np.arange(number), [str(i) for i in range(number)], 2.5),
        "note": "of all",
    }
    asked = Arguments((batch,), {"also": list(range(number))})
    pieces = split(asked, parts)
    assert len(pieces) == parts
    assert {count(*piece.args) for piece in pieces} == {-(-number // parts)}
    for piece in pieces:
        assert piece.samples is not None
        assert piece.kwargs["also"] == list(piece.samples) == (piece.args[0]["x"][:, 0] // 3).tolist()
    whole = joined([piece.args[0] for piece in pieces], asked, np.empty)
    assert np.array_equal(whole["x"], batch["x"])
    assert np.array_equal(whole["pair"].a, batch["pair"].a) and whole["pair"].b == batch["pair"].b
    assert joined([piece.kwargs["also"] for piece in pieces], asked, np.empty) == list(range(number))


def test_parts_of_arrays_are_views() -> None:
    x = np.arange(8)
    assert part(x, 2, 5).base is x
    assert part(x, 6, 10).tolist() == [6, 7, 0, 1]
    assert join([x[:3], x[3:]]).tolist() == x.tolist()


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 0, x has 3 samples, argument 0, y has 2"):
        split(Arguments(({"x": [1, 2, 3], "y": np.zeros(2)},), {}), 2)
    with pytest.raises(ValueError, match="the batch is empty"):
        split(Arguments(([],), {}), 2)
    with pytest.raises(ValueError, match="none of its arguments is a batch"):
        split(Arguments((3,), {}), 2)
    with pytest.raises(ValueError, match="one item for each of the 2 ranks"):
        ALL_TO_ALL.distribute(Layout(2), Arguments(([1],), {}))
    assert [piece.args for piece in split(Arguments(([1, 2], Whole([7, 8, 9]), 5), {}), 2)] == [
        ([1], [7, 8, 9], 5),
        ([2], [7, 8, 9], 5),
    ]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_handle_is_cut_as_the_batch_would_be(sizes: list[int], data: st.DataObject) -> None:
    parts = [RemotePart(str(owner), "k", 0, size) for owner, size in enumerate(sizes)]
    samples = [(p.owner, i) for p in parts for i in range(p.stop)]
    start = data.draw(st.integers(0, len(samples) - 1))
    stop = data.draw(st.integers(start + 1, start + 2 * len(samples)))
    cut = RemoteBatch(parts, 100).part(start, stop)
    assert len(cut) == stop - start
    assert [(p.owner, i) for p in cut.parts for i in range(p.start, p.stop)] == part(samples, start, stop)


# Processes ----------------------------------------------------------------------------------------------------


async def test_every_protocol_gives_and_takes_what_it_says() -> None:
    async with ranks(Layout(dp=2, tp=1, pp=2)) as group:
        assert await group.whoami("r") == ["r0/4", "r1/4", "r2/4", "r3/4"]
        assert await group.lead(["a"]) == ["a", "0"]
        assert await group.each([1, 2, 3, 4]) == [10, 21, 32, 43]
        assert await group.stage() == [0, 1]
        assert await group.first() == 0
        assert await group.mine([7, 1, 4, 2]) == [1, 2, 4, 7]
        batch = {"x": np.arange(5), "names": list("abcde")}
        # Five samples over four ranks: two each, the rest is filled up and dropped again.
        out = await group.double(batch, factor=3)
        assert out["x"].tolist() == [0, 3, 6, 9, 12]
        assert out["names"] == ["a@0", "b@0", "c@1", "d@1", "e@2"]
        # Rows to two replicas; the last stage of each answers: ranks 2 and 3.
        rows = np.arange(6.0).reshape(3, 2)
        assert (await group.sums(rows)).tolist() == [2001.0, 2005.0, 3009.0]


async def test_two_groups_work_at_the_same_time_and_answers_come_in_order() -> None:
    async with System() as system, ranks(Layout(2), "a", system) as one, ranks(Layout(2), "b", system) as two:
        first, second = one.whoami("x"), two.whoami("y")
        assert not first.done() and not second.done()
        assert await second == ["y0/2", "y1/2"]
        assert await first == ["x0/2", "x1/2"]


async def test_a_batch_stays_with_the_ranks_and_goes_from_rank_to_rank() -> None:
    async with System() as system, ranks(Layout(2), "a", system) as one, ranks(Layout(3), "b", system) as two:
        rows = np.arange(14.0).reshape(7, 2)
        kept = await one.sums.keep(rows)
        assert len(kept) == 7 and {p.owner for p in kept.parts} == {"a", "a/1"}
        # Seven samples that lie four and three go on as three, three and one, padded by the first ones.
        received = system.node.counters["handled"]
        doubled = await two.add.keep(kept, kept)
        assert system.node.counters["handled"] == received  # Nobody asked this process for anything.
        expected = rows.sum(1) + np.repeat([0, 1000], [4, 3])
        assert (await one.fetch(kept)).tolist() == expected.tolist()
        assert (await two.fetch(doubled)).tolist() == (2 * expected).tolist()
        assert await two.add(doubled, expected) is not None
        await one.release(kept)
        with pytest.raises(BatchGone, match="keeps no batch"):
            await one.fetch(kept)
        assert await system.find("a").kept_bytes() == 0
        assert await system.find("b").kept_bytes() > 0
        with pytest.raises(BatchesFull, match="release batches"):
            await two.add.keep(np.zeros(1 << 20), np.zeros(1 << 20))
        with pytest.raises(TypeError, match="none to keep"):
            one.whoami.keep()


async def test_a_call_that_fails_leaves_nothing_behind() -> None:
    async with System() as system, ranks(Layout(2), "a", system) as group:
        with pytest.raises(RankError, match="rank 0 has kept its part"):
            await group.fussy.keep(np.ones((4, 2)))
        async with timeout(10):
            while await system.find("a").kept_bytes():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_only_the_rank_that_counts_keeps_a_batch() -> None:
    async with System() as system, ranks(Layout(dp=1, tp=2), "a", system) as group:
        kept = await group.sums.keep(np.ones((4, 2)))
        assert [p.owner for p in kept.parts] == ["a"]
        assert await system.find("a/1").kept_bytes() == 0


async def test_an_error_names_the_rank_and_the_sample_as_the_caller_counts() -> None:
    async with ranks(Layout(3)) as group:
        with pytest.raises(BadSample, match=r"sample 4: -5 is negative \(found by rank 2 of ranks") as bad:
            await group.picky([1, 2, 3, 4, -5])
        assert bad.value.index == 4
        with pytest.raises(RankError, match=r"rank 1 of ranks .*thirteen") as raised:
            await group.picky([1, 2, 13, 4, 5])
        assert raised.value.rank == 1 and raised.value.remote_type == "ArithmeticError"
        assert isinstance(raised.value, RemoteError)
        with pytest.raises(ValueError, match="the batch is empty"):
            group.picky([])
        with pytest.raises(ValueError, match="came back with 1 samples, it was given 2"):
            await group.short([1, 2, 3, 4, 5])
        with pytest.raises(AttributeError, match="no @dispatch method 'pick'"):
            group.pick  # noqa: B018
        assert await group.picky([1, 2, 3]) == [1, 2, 3]


async def test_deadline_and_cancellation_reach_every_rank() -> None:
    async with ranks(Layout(2)) as group:
        refs = [group._node.ref(name) for name in group.names]

        async def waiting(wanted: int) -> None:
            while [await ref.num_waiting() for ref in refs] != [wanted, wanted]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        # On a busy loop the block itself may end first; else the error names a rank and what it was asked.
        with pytest.raises(TimeoutError, match=r"^$|rank [01] of ranks"):
            async with timeout(0.3):
                await group.hang([1, 2])
        await asyncio.wait_for(waiting(0), 10)
        call = group.hang([1, 2])
        await asyncio.wait_for(waiting(1), 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(waiting(0), 10)
        # One rank fails: the other need not go on.
        assert await group.whoami() == ["0/2", "1/2"]


async def test_a_rank_is_killed_and_the_gang_restarts_as_one() -> None:
    async with ranks(Layout(2)) as group:
        pids = await group.pid()
        kept = await group.sums.keep(np.ones((4, 2)))
        call = group.hang([1, 2])
        await asyncio.sleep(0.05)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(ActorDied, match=r"rank [01] of ranks"):
            await call
        async with timeout(30):
            while True:
                try:
                    assert await group.epochs() == [2, 2]
                    break
                except ActorDied:
                    continue
        with pytest.raises(BatchGone):
            await group.fetch(kept)
        assert await group.picky([3, 4, 5]) == [3, 4, 5]


async def test_large_arrays_are_lent_and_given_back() -> None:
    """Cut, sent, answered, joined and kept by shared memory, wherever they were made."""
    async with ranks(Layout(3)) as group:
        node = group._node
        rows = node.empty((3000, 64), np.float64)  # 1.5 MB: 512 KB for each rank
        rows[:] = np.arange(rows.size).reshape(rows.shape)
        more = np.ones_like(rows)
        for _ in range(3):
            out = await group.add(rows, more)
            assert np.array_equal(out, rows + 1)
            kept = await group.add.keep(out, more)
            there = await group.fetch(kept)
            assert np.array_equal(there, rows + 2)
            await group.release(kept)
        del out, there
        async with timeout(10):
            while node.lending.arena.in_use()["leases"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # The ranks have answered, and are about to drop what they were given.
