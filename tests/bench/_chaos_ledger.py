"""The books of chaos.py, which trust nothing that the runtime says: who sent what, how it ended, who ran it.

    sent    a record per message, written by the process that sends it: begin -> open -> how it ended
    ran     a record per message, written by the process that runs it, before it does anything else

Both are files mapped into memory: what a process wrote before kill -9 stays written. A message is sent once by one
process, and at most one should run it, so no record has two writers unless the runtime has failed, which is what we
look for. `audit` reads the books when all is quiet. Knows nothing of actors.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np

GRACE_S = 0.1
"""A call ends at its deadline, or so much later."""

_SENT = struct.Struct("<dddQBBB5x")
_RAN = struct.Struct("<QB7x")
SENT = np.dtype(
    {
        "names": ["began", "deadline", "ended", "sender", "state", "cast", "target"],
        "formats": ["<f8", "<f8", "<f8", "<u8", "u1", "u1", "u1"],
        "offsets": [0, 8, 16, 24, 32, 33, 34],
        "itemsize": _SENT.size,
    }
)
"""Monotonic seconds; `sender`: the life that sent it; `target`: number of the actor it was sent to."""
RAN = np.dtype({"names": ["life", "runs"], "formats": ["<u8", "u1"], "offsets": [0, 8], "itemsize": _RAN.size})
"""The life that ran it last, and how often it was run."""


class State(IntEnum):
    """How a message ended, as its sender saw it."""

    NEVER = 0
    """It was not sent yet."""
    OPEN = 1
    REPLY = 2
    REMOTE_ERROR = 3
    FAULT = 4
    """A typed failure of the runtime."""
    REFUSED = 5
    """The cast raised: it was not handed over."""
    ACCEPTED = 6
    """The cast did not raise."""
    UNTYPED = 7
    """Something else was raised."""
    WRONG = 8
    """The answer was somebody else's."""


def life_of(pid: int, start: int) -> int:
    """One incarnation of an actor: its process, and the how-manieth start in it."""
    return pid << 20 | start


def pid_of(life: int) -> int:
    return life >> 20


class Ledger:
    """The two files of a run, open for writing in any process of it."""

    def __init__(self, folder: Path, messages: int) -> None:
        """Makes them if they are not there."""
        self.folder, self.messages = folder, messages
        self._sent = _map(folder / "sent", messages * _SENT.size)
        self._ran = _map(folder / "ran", messages * _RAN.size)

    def begin(self, id: int, began: float, deadline: float, sender: int, target: int, *, cast: bool) -> None:
        """Before it is sent."""
        _SENT.pack_into(self._sent, id * _SENT.size, began, deadline, 0.0, sender, State.OPEN, cast, target)

    def end(self, id: int, state: State, now: float) -> None:
        """How it ended. The state is written last: half a record says that it is still open."""
        offset = id * _SENT.size
        struct.pack_into("<d", self._sent, offset + 16, now)
        self._sent[offset + 32] = state

    def is_new(self, id: int) -> bool:
        return self._sent[id * _SENT.size + 32] == State.NEVER

    def ran(self, id: int, life: int) -> None:
        """The first thing that a handler does."""
        offset = id * _RAN.size
        struct.pack_into("<QB", self._ran, offset, life, min(255, self._ran[offset + 8] + 1))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of all records: SENT and RAN."""
        return np.frombuffer(self._sent[:], SENT), np.frombuffer(self._ran[:], RAN)

    def close(self) -> None:
        self._sent.close()
        self._ran.close()


def _map(path: Path, size: int) -> mmap.mmap:
    with path.open("a+b") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


@dataclass(frozen=True, kw_only=True)
class History:
    """What was done to the processes, by who did it."""

    killed: Collection[int] = ()
    """Process ids."""
    stopped: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """SIGSTOP and SIGCONT of each process, in monotonic seconds: nobody can meet a deadline meanwhile."""
    last_lives: Mapping[int, int] = field(default_factory=dict)
    """The life of each target when all was quiet again, which had answered every living sender by then."""
    restarted: Collection[int] = ()
    """Targets that had more lives than one, whether or not each life came to run anything."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the books say. All but the first group must be 0."""

    calls: int
    casts: int
    ends: dict[str, int]
    """Messages by how they ended."""
    unhandled_tail: int
    """Accepted casts that did not run, sent to a life that ended: the runtime must have reported as many."""
    senders_died: int
    """Messages whose sender was killed before it knew of any end: nobody is left to be told."""
    worst_late_s: float
    """How long after its deadline the last call ended; 0 if none did."""

    unended: int
    """Calls without any end whose sender lives: silence."""
    late: int
    """Calls that ended more than GRACE_S after their deadline."""
    untyped: int
    wrong: int
    twice: int
    """Messages that ran more than once."""
    phantom: int
    """Answers to what never ran, and refused casts that did."""
    holes: int
    """Accepted casts that did not run, though a later one to the same life did."""
    never: int
    """Messages that were not sent at all."""

    def violations(self) -> dict[str, int]:
        names = ("unended", "late", "untyped", "wrong", "twice", "phantom", "holes", "never")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def audit(sent: np.ndarray, ran: np.ndarray, history: History) -> Findings:
    """Reads the books. `sent` and `ran` are records of the same messages, in order of their ids."""
    state, runs, cast = sent["state"], ran["runs"], sent["cast"] == 1
    dead_sender = np.isin(sent["sender"] >> np.uint64(20), np.array(sorted(history.killed), np.uint64))
    count = {state.name.lower(): int(np.sum(sent["state"] == state)) for state in State}
    late, worst = _late(sent[~cast & (state > State.OPEN)], history.stopped)
    answered = (state == State.REPLY) | (state == State.REMOTE_ERROR)
    holes, tails, lost_with_sender = _casts(sent, ran, dead_sender, history)
    return Findings(
        calls=int(np.sum(~cast & (state != State.NEVER))),
        casts=int(np.sum(cast)),
        ends=count,
        unhandled_tail=tails,
        senders_died=int(np.sum((state == State.OPEN) & dead_sender & ~cast)) + lost_with_sender,
        worst_late_s=worst,
        unended=int(np.sum((state == State.OPEN) & ~dead_sender)),
        late=late,
        untyped=count["untyped"],
        wrong=count["wrong"],
        twice=int(np.sum(runs > 1)),
        phantom=int(np.sum((answered & (runs == 0)) | ((state == State.REFUSED) & (runs > 0)))),
        holes=holes,
        never=count["never"],
    )


def _late(calls: np.ndarray, stopped: Mapping[int, Sequence[tuple[float, float]]]) -> tuple[int, float]:
    """How many ended too late, and by how much the last."""
    late, worst = 0, 0.0
    for call in calls[calls["ended"] > calls["deadline"]]:
        deadline = float(call["deadline"])
        for stop, end in sorted(stopped.get(pid_of(int(call["sender"])), ())):
            if stop <= deadline + GRACE_S:
                deadline = max(deadline, end)  # It could not act before it went on.
        by = float(call["ended"]) - deadline
        worst = max(worst, by)
        late += by > GRACE_S
    return late, worst


def _casts(sent: np.ndarray, ran: np.ndarray, dead_sender: np.ndarray, history: History) -> tuple[int, int, int]:
    """Accepted casts that did not run: holes, tails, and those whose sender died with them perhaps still in its hands.

    One sender's casts to one actor run in order. Between two that ran in the same life none may be missing; one between
    two lives may have been with the life that ended.
    """
    found: Counter[str] = Counter()
    on_way = (sent["cast"] == 1) & ((sent["state"] == State.ACCEPTED) | (sent["state"] == State.OPEN))
    for sender, target in np.unique(sent[on_way][["sender", "target"]]):
        ids = np.flatnonzero(on_way & (sent["sender"] == sender) & (sent["target"] == target))
        ids = ids[np.argsort(sent["began"][ids], kind="stable")]
        first = None if int(target) in history.restarted else history.last_lives.get(int(target))
        before, missing = first, 0
        for id in ids:
            if not ran["runs"][id]:
                missing += 1
                continue
            life = int(ran["life"][id])
            found["holes" if life == before else "tails"] += missing
            before, missing = life, 0
        if dead_sender[ids[0]]:
            found["with_sender"] += missing
        else:
            found["holes" if history.last_lives.get(int(target)) == before else "tails"] += missing
    return found["holes"], found["tails"], found["with_sender"]
