"""The chaos benchmark: its books and their audit on made-up runs, with violations planted; then short real runs."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.benchmark import FOLDER, load

chaos = load("chaos", FOLDER)

from _chaos_actors import DurableCounter  # noqa: E402
from _chaos_ledger import GRACE_S, RAN, SENT, Findings, History, Ledger, State, audit, life_of  # noqa: E402
from _chaos_run import figures, run  # noqa: E402

SENDER, DOOMED = life_of(100, 1), life_of(101, 1)
"""Lives of two senders; the process of the second is killed."""
TARGETS = {0: [life_of(200, 1), life_of(201, 1)], 1: [life_of(300, 1)]}
"""The lives of two runners, in order; the first runner's process 200 is killed."""
HISTORY = History(killed={101, 200}, last_lives={0: life_of(201, 1), 1: life_of(300, 1)}, restarted={0})


class Books:
    """Records as an honest run would leave them; a test then forges one."""

    def __init__(self) -> None:
        self._sent: list[tuple[float, float, float, int, int, int, int]] = []
        self._ran: list[tuple[int, int]] = []

    def call(self, state: State = State.REPLY, *, sender: int = SENDER, ended: float = 0.5, ran: bool = True) -> int:
        now = float(len(self._sent))
        self._sent.append((now, now + 1.0, now + ended, sender, state, 0, 1))
        self._ran.append((TARGETS[1][0], int(ran)))
        return len(self._sent) - 1

    def cast(
        self, life: int | None, *, sender: int = SENDER, target: int = 0, state: State = State.ACCEPTED, runs: int = 1
    ) -> int:
        now = float(len(self._sent))
        self._sent.append((now, 0.0, now, sender, state, 1, target))
        self._ran.append((0, 0) if life is None else (life, runs))
        return len(self._sent) - 1

    def audit(self, history: History = HISTORY) -> Findings:
        return audit(np.array(self._sent, SENT), np.array(self._ran, RAN), history)


def honest() -> Books:
    """Every way to end that is allowed."""
    books = Books()
    old, new = TARGETS[0]
    for life in (old, old, None, None, new, new):
        books.cast(life)
    books.cast(None, state=State.REFUSED)
    for life in (old, None):
        books.cast(life, sender=DOOMED)
    books.cast(None, sender=DOOMED, state=State.OPEN)
    for state in (State.REPLY, State.REMOTE_ERROR, State.FAULT):
        books.call(state)
    books.call(State.FAULT, ran=False, ended=1.0 + GRACE_S / 2)
    books.call(State.OPEN, sender=DOOMED, ran=False)
    return books


def test_an_honest_run_shows_nothing() -> None:
    found = honest().audit()
    assert found.violations() == {}
    assert (found.calls, found.casts) == (5, 10)
    assert found.unhandled_tail == 2
    assert found.senders_died == 3
    assert 0 < found.worst_late_s <= GRACE_S


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("unended", lambda books: books.call(State.OPEN)),
        ("unended", lambda books: books.cast(None, state=State.OPEN)),
        ("late", lambda books: books.call(State.FAULT, ended=1.0 + GRACE_S * 1.5)),
        ("late", lambda books: books.call(State.REPLY, ended=9.0)),
        ("untyped", lambda books: books.call(State.UNTYPED)),
        ("wrong", lambda books: books.call(State.WRONG)),
        ("twice", lambda books: books.cast(TARGETS[0][1], runs=2)),
        ("phantom", lambda books: books.call(State.REPLY, ran=False)),
        ("phantom", lambda books: books.call(State.REMOTE_ERROR, ran=False)),
        ("phantom", lambda books: books.cast(TARGETS[0][1], state=State.REFUSED)),
        ("never", lambda books: books.call(State.NEVER, ran=False)),
        # The last life of the runner had answered this sender, so it had run all that came before.
        ("holes", lambda books: books.cast(None)),
        ("holes", lambda books: books.cast(None, target=1) + books.cast(TARGETS[1][0], target=1)),
        # Not even a sender that dies takes along what it sent before something that ran.
        ("holes", lambda books: [books.cast(life, sender=DOOMED) for life in (TARGETS[0][0], None, TARGETS[0][0])]),
    ],
)  # fmt: skip
def test_each_violation_is_found(name: str, plant: object) -> None:
    books = honest()
    plant(books)  # type: ignore[operator]
    found = books.audit().violations()
    assert name in found


def test_what_was_with_a_life_that_ended_must_have_been_reported() -> None:
    found = honest().audit()
    for reported, silent in (({}, 2), ({"lost": 1}, 1), ({"lost": 1, "dead_letters": 1}, 0), ({"lost": 50}, 0)):
        assert figures(found, Counter(reported))["silent_messages"] == silent
    assert figures(found, Counter(lost=2))["counters_disagree"] is None
    for counts, disagree in (
        ({"sent": 10, "handled": 10}, 0),
        ({"sent": 10, "handled": 11}, 1),
        ({"sent": 10, "handled": 5, "dead_letters": 1, "withdrawn": 1}, 0),  # The rest was with senders that died.
        ({"sent": 20, "handled": 5, "dead_letters": 1, "withdrawn": 1}, 10),
        ({"sent": 20, "handled": 5, "dead_letters": 1, "withdrawn": 1, "lost": 12}, 0),
    ):
        assert figures(found, Counter(counts))["counters_disagree"] == disagree
    worse = dataclasses.replace(found, holes=3, unended=4)
    assert figures(worse, Counter(lost=50))["silent_messages"] == 7


@pytest.mark.parametrize(
    ("stops", "late"),
    [
        ([(0.2, 0.9)], 1),  # It went on in time.
        ([(0.9, 3.0)], 0),
        ([(1.05, 3.0)], 0),  # It had not spent its grace.
        ([(1.2, 3.0)], 1),  # It had.
        ([(0.9, 1.5), (1.55, 3.0)], 0),
        ([(0.9, 1.5), (1.7, 3.0)], 1),
        ([(0.9, 2.5)], 1),
    ],
)
def test_only_a_stopped_process_may_be_late(stops: list[tuple[float, float]], late: int) -> None:
    books = Books()
    books.call(State.FAULT, ended=3.05)
    assert books.audit(History(stopped={100: stops})).late == late
    assert books.audit(History(stopped={999: stops})).late == 1


@given(st.data())
def test_any_honest_sequence_of_casts_is_cleared_and_any_loss_within_a_life_is_not(data: st.DataObject) -> None:
    lives = [life_of(200 + n, 1) for n in range(data.draw(st.integers(1, 4)))]
    ran_by: list[int | None] = []
    lost = 0
    for life in lives:
        ran_by += [life] * data.draw(st.integers(1, 5))
        if life != lives[-1]:
            tail = data.draw(st.integers(0, 3))
            ran_by += [None] * tail
            lost += tail
    books = Books()
    for life in ran_by:
        books.cast(life)
    history = History(killed={200 + n for n in range(len(lives) - 1)}, last_lives={0: lives[-1]}, restarted={0})
    found = books.audit(history)
    assert found.violations() == {}
    assert found.unhandled_tail == lost
    inner = [i for i in range(1, len(ran_by)) if ran_by[i] is not None and ran_by[i - 1] == ran_by[i]]
    if inner:
        forged = Books()
        gone = data.draw(st.sampled_from(inner))
        for i, life in enumerate(ran_by):
            forged.cast(None if i == gone else life)
        assert forged.audit(history).holes + forged.audit(history).unhandled_tail == lost + 1
        if gone + 1 < len(ran_by) and ran_by[gone + 1] == ran_by[gone]:
            assert forged.audit(history).holes == 1


def test_what_a_killed_process_wrote_stays_written(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from collections import Counter
from pathlib import Path
sys.path.append({str(FOLDER)!r})
from _chaos_actors import DurableCounter
from _chaos_ledger import Ledger, State
ledger = Ledger(Path({str(tmp_path)!r}), 5)
counters = DurableCounter(Path({str(tmp_path)!r}) / "counters", Counter(sent=2))
ledger.begin(3, 1.0, 2.0, 77, 4, cast=False)
ledger.begin(4, 1.5, 0.0, 77, 4, cast=True)
ledger.end(4, State.ACCEPTED, 1.6)
ledger.ran(4, 88)
ledger.ran(4, 89)
counters["sent"] += 3
counters["handled"] += 1
counters["other"] += 1
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(tmp_path, 5)
    sent, ran = ledger.read()
    assert list(sent["state"]) == [State.NEVER] * 3 + [State.OPEN, State.ACCEPTED]
    assert sent[3].tolist() == (1.0, 2.0, 0.0, 77, State.OPEN, 0, 4)
    assert sent[4].tolist() == (1.5, 0.0, 1.6, 77, State.ACCEPTED, 1, 4)
    assert ran[4].tolist() == (89, 2)
    assert ledger.is_new(2)
    assert not ledger.is_new(3)
    ledger.close()
    counters = DurableCounter.read(tmp_path / "counters")
    assert (counters["sent"], counters["handled"]) == (5, 1)


def _must_not_be(found: dict[str, float | None]) -> dict[str, float | None]:
    """What no run may show, however busy the machine: all but lateness."""
    names = (
        "unended_calls", "hung", "untyped_failures", "wrong_answers", "ran_twice", "phantoms", "not_sent",
        "casts_missing_within_a_life", "leaked_segments", "leaked_processes",
    )  # fmt: skip
    if found["counted_sent"]:  # The runtime counts what it sends, and so what it can't account for.
        names += ("silent_messages", "counters_disagree")
    return {name: found[name] for name in names if found[name]}


async def test_a_short_run(tmp_path: Path) -> None:
    found = await run(tmp_path, 2_000, 1, lambda text: None)
    assert _must_not_be(found) == {}
    assert found["calls"] == found["casts"] == 1_000


async def test_a_lossy_runner_is_found_out(tmp_path: Path) -> None:
    from bench_actors_lossy import LOST_OF, LossyRunner

    found = await run(tmp_path, 2_000, 2, lambda text: None, runner=LossyRunner, disturbed=False)
    lost = len(range(LOST_OF, 2_000, 2 * LOST_OF))
    assert found["casts_missing_within_a_life"] == found["silent_messages"] == lost
    assert found["wrong_answers"]
    assert found["ran_twice"]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_longer_run(tmp_path: Path) -> None:
    found = await run(tmp_path, 30_000, random.randrange(1_000_000), lambda text: None)
    assert _must_not_be(found) == {}, found
    assert found["faults_kill_runner"]
    assert found["faults_stop_runner"]


def test_partitions_in_memory() -> None:
    from _chaos_memory import run as partition

    found = partition(3, lambda text: None, rounds=1)
    if found["partition_violations"] is None:
        pytest.skip("no network in memory")
    names = ("late", "untyped", "wrong", "twice", "phantom", "waiting", "hung")
    if found["partition_told"]:
        names += ("silent",)
    assert {name: found[f"partition_{name}"] for name in names if found[f"partition_{name}"]} == {}
    assert found["partition_replies"]
    assert found["partition_faults"]


def test_a_root_that_is_killed_leaves_its_children_to_be_counted() -> None:
    from _chaos_orphans import run as kill_roots

    found = kill_roots(1, 0, lambda text: None)
    assert found["orphan_trials"] == 1
    assert found["processes_per_trial"]
