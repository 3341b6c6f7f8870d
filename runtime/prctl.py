"""What Linux lets a process say about itself and its parents. Knows nothing of nodes."""

from __future__ import annotations

import ctypes
import functools
import os

PR_SET_PDEATHSIG = 1
"""The signal to get when the parent ends."""
PR_SET_NAME = 15
"""The name in `ps` and `top`; 15 bytes count."""
PR_SET_CHILD_SUBREAPER = 36
"""What the children of this process leave behind becomes its child, not that of process 1."""


def prctl(option: int, value: int | bytes) -> None:
    """Raises OSError."""
    if _libc().prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
