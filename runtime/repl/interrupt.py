"""A stretch of code in one thread that another thread may interrupt, be it an endless loop.

    with region:                other thread: region.interrupt("why") -> KeyboardInterrupt in there, soon
        the user's code

The main thread is interrupted by a signal, which also ends a sleep; any other one by an exception that the interpreter
raises at its next line of Python. Neither can end a long call of C code. Nothing is raised outside of the region.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from types import FrameType, TracebackType

FILE = __file__
"""Of the frames that an interruption adds to a traceback."""

SIGNAL = signal.SIGRTMIN + 9


class Interrupted(KeyboardInterrupt):
    """Raised in the region; no `except Exception` stops it."""


class Region:
    """May be entered again and again, by one thread at a time."""

    def __init__(self) -> None:
        self.why = ""
        """Why it was interrupted the last time."""
        self._lock = threading.Lock()
        self._thread = 0
        self._asked = False

    def __enter__(self) -> Region:
        if threading.current_thread() is threading.main_thread():
            signal.signal(SIGNAL, _on_signal)
        with self._lock:
            self._thread, self._asked = threading.get_ident(), False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        while True:
            try:
                with self._lock:
                    if self._asked:
                        _raise_in(self._thread, None)
                    self._thread, self._asked = 0, False
                return
            except Interrupted:
                continue  # It came just now, as the code had ended.

    def clear(self) -> None:
        """Nobody is in it any more: called by whoever catches Interrupted, which may have struck while it was left."""
        with self._lock:
            self._thread, self._asked = 0, False

    def interrupt(self, why: str) -> bool:
        """False if no code is in the region. From any other thread."""
        with self._lock:
            if not self._thread:
                return False
            self.why, self._asked = why, True
            main = threading.main_thread().ident
            if self._thread == main:
                _asked_of_main.append(self)
                signal.pthread_kill(main, SIGNAL)
            else:
                _raise_in(self._thread, Interrupted)
            return True

    def _take(self) -> bool:
        """In the main thread: whether it is in the region, and shall leave."""
        asked, self._asked = self._asked and self._thread == threading.get_ident(), False
        return asked


_asked_of_main: list[Region] = []


def _on_signal(number: int, frame: FrameType | None) -> None:
    asked = [region for region in _asked_of_main if region._take()]
    _asked_of_main.clear()
    if asked:
        raise Interrupted(asked[0].why)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """None takes back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind))
