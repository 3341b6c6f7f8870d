"""The liveness word: every loop writes a beat into shared memory, and a thread of the root reads them all.

    node's loop --every BEAT_S--> word <--every POLL_S-- root's thread: quiet for SUSPECT_S -> suspect, with stacks
                                                                        beats again         -> recovered
                                                                        quiet for hang_s    -> hung

It sees what no message shows: a loop that is blocked, a thread that never lets go of the interpreter, a process that
was stopped. The reader counts only time in which it ran itself, so that a machine that slept accuses nobody. A
suspicion is no verdict: on a loaded machine a loop may well be late. Knows nothing of actors, and kills nothing.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .errors import LaunchError

BEAT_S = 0.1
SUSPECT_S = 0.3
"""Without a beat for so long, a loop is suspected: within 3.5 beats of the moment when it stopped."""

POLL_S = 0.02
WORDS = 4096
_WORD_BYTES = 8

Verdict = Literal["suspect", "recovered", "hung"]
OnVerdict = Callable[[str, Verdict, float, str], None]
"""(key, verdict, seconds without a beat, stacks of all threads)"""


class Beats:
    """The words of all processes of one system: one page file in memory, inherited by the nodes."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("headrace-beats")
        os.ftruncate(self.fd, WORDS * _WORD_BYTES)
        self._words = _map(self.fd)
        self._free = list(range(WORDS - 1, -1, -1))

    def take(self) -> int:
        """A word for one incarnation of a node. Raises LaunchError."""
        if not self._free:
            raise LaunchError(f"a system has at most {WORDS} nodes at a time on one host")
        word = self._free.pop()
        self._words[word] = 0
        return word

    def give(self, word: int) -> None:
        """Of a process that has ended."""
        self._free.append(word)

    def read(self, word: int) -> int:
        return self._words[word]

    def close(self) -> None:
        """When nobody reads any more."""
        _unmap(self._words)
        os.close(self.fd)


class Pulse:
    """Writes the beats of the running loop, by a timer of that loop."""

    def __init__(self, fd: int, word: int) -> None:
        self._words = _map(fd)
        self._word = word
        self._loop = asyncio.get_running_loop()
        self._beat()

    def stop(self) -> None:
        self._timer.cancel()
        _unmap(self._words)

    def _beat(self) -> None:
        self._words[self._word] = time.monotonic_ns()
        self._timer = self._loop.call_later(BEAT_S, self._beat)


@dataclass(slots=True, eq=False)
class _Watched:
    key: str
    word: int
    hang_s: float | None
    look: Callable[[], str | None]
    last: int
    quiet_s: float = 0.0
    suspect: bool = False
    hung: bool = False


class Watch:
    """The thread that reads the words. `on_verdict` is called there, with no lock held."""

    def __init__(self, beats: Beats, on_verdict: OnVerdict) -> None:
        self._beats = beats
        self._on_verdict = on_verdict
        self._watched: dict[str, _Watched] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def add(self, key: str, word: int, *, hang_s: float | None, look: Callable[[], str | None]) -> None:
        """Watches a word whose loop is beating. `look` is called in the thread when the word is quiet, and returns the
        stacks; or None if there is a good reason: then counting starts again."""
        self._watched[key] = _Watched(key, word, hang_s, look, self._beats.read(word))

    def remove(self, key: str) -> None:
        self._watched.pop(key, None)

    def quiet_s(self, key: str) -> float:
        """Seconds without a beat that were seen, about."""
        watched = self._watched.get(key)
        return 0.0 if watched is None else watched.quiet_s

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(POLL_S):
            now = time.monotonic()
            # A reader that was late itself says nothing about the others.
            passed = min(now - before, 3 * POLL_S)
            before = now
            for watched in list(self._watched.values()):
                self._look(watched, passed)

    def _look(self, watched: _Watched, passed: float) -> None:
        beat = self._beats.read(watched.word)
        if beat != watched.last:
            quiet_s, watched.last, watched.quiet_s = watched.quiet_s, beat, 0.0
            if watched.suspect:
                watched.suspect = watched.hung = False
                self._on_verdict(watched.key, "recovered", quiet_s, "")
            return
        watched.quiet_s += passed
        if not watched.suspect and watched.quiet_s >= SUSPECT_S:
            watched.suspect = self._tell(watched, "suspect")
        elif not watched.hung and watched.hang_s is not None and watched.quiet_s >= watched.hang_s:
            watched.hung = self._tell(watched, "hung")

    def _tell(self, watched: _Watched, verdict: Verdict) -> bool:
        stacks = watched.look()
        if stacks is None:
            watched.quiet_s, watched.suspect = 0.0, False
        elif self._watched.get(watched.key) is watched:
            self._on_verdict(watched.key, verdict, watched.quiet_s, stacks)
        return stacks is not None


def _map(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, WORDS * _WORD_BYTES)).cast("Q")


def _unmap(words: memoryview) -> None:
    mapping = words.obj
    words.release()
    if isinstance(mapping, mmap.mmap):
        mapping.close()
