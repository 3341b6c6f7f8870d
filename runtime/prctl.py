"""What Linux lets a process say about itself and its family. Knows nothing of nodes."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, ClassVar

PR_SET_PDEATHSIG = 1
"""The signal to get when the parent ends."""
PR_SET_NAME = 15
"""The name in `ps` and `top`; 15 bytes count."""
PR_SET_CHILD_SUBREAPER = 36
"""What the children of this process leave behind becomes its child, not that of process 1."""

PR_GET_CHILD_SUBREAPER = 37


class Subreaper:
    """While any of these is held, this process adopts what its children leave behind."""

    _held: ClassVar[int] = 0
    _was: ClassVar[int] = 0

    def __init__(self) -> None:
        if Subreaper._held == 0:
            was = ctypes.c_int()
            prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(was))
            Subreaper._was = was.value
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        Subreaper._held += 1

    def release(self) -> None:
        Subreaper._held -= 1
        if Subreaper._held == 0:
            prctl(PR_SET_CHILD_SUBREAPER, Subreaper._was)


def prctl(option: int, value: Any) -> None:
    """Raises OSError."""
    if _libc().prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
