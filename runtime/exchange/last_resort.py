"""Ends this process for certain, a moment from now: the kernel does it, whatever the process does in the meantime.

A timer of Python's would need the interpreter, which may already be ending, and may hang in that: libraries with a call
that never returned are known to. Knows nothing of why.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal

REPORT_S = 0.5
"""So long it can still say why."""

_SIGEV_SIGNAL = 0


class _SignalEvent(ctypes.Structure):
    """struct sigevent"""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Times(ctypes.Structure):
    """struct itimerspec"""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


def end_this_process(why: str) -> None:
    """Returns; SIGKILL follows after REPORT_S."""
    logging.getLogger(__name__).critical("this process ends: %s", why)
    libc = ctypes.CDLL(None, use_errno=True)
    timer = ctypes.c_void_p()
    event = _SignalEvent(signal=signal.SIGKILL, notify=_SIGEV_SIGNAL)
    times = _Times(value_s=int(REPORT_S), value_ns=int(REPORT_S % 1 * 1e9))
    if libc.timer_create(1, ctypes.byref(event), ctypes.byref(timer)) or libc.timer_settime(
        timer, 0, ctypes.byref(times), None
    ):
        os.kill(os.getpid(), signal.SIGKILL)  # At once, then.
