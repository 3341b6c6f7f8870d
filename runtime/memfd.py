"""Memory without a name that processes of one host share: anonymous files, found by process id and descriptor.

The kernel frees such a file with its last holder, however that one dies, and its size does not depend on /dev/shm. Its
length is sealed: nobody can cut it short under a reader, whom that would kill. Knows nothing of what is in it.
"""

from __future__ import annotations

import fcntl
import os

_PREFIX = "headrace-"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(label: str, nbytes: int) -> int:
    """A new file of `nbytes` that takes no memory until it is written to; its descriptor. Raises OSError."""
    fd = os.memfd_create(f"{_PREFIX}{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def open_peer(label: str, pid: int, fd: int, flags: int) -> int:
    """Opens the file that another process has made with this label; the descriptor here.

    Raises FileNotFoundError if there is none (any more), PermissionError if it is not ours to read or not sealed.
    """
    path = f"/proc/{pid}/fd/{fd}"
    # The name is read first: to open whatever a hostile handle points to could block, or worse.
    name = os.readlink(path).removeprefix("/memfd:").removesuffix(" (deleted)")
    if name != f"{_PREFIX}{label}":
        raise FileNotFoundError(f"{path} is not {_PREFIX}{label}")
    opened = os.open(path, flags | os.O_CLOEXEC)
    if os.fstat(opened).st_uid != os.geteuid() or fcntl.fcntl(opened, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        os.close(opened)
        raise PermissionError(f"{path} is another user's, or its length can change")
    return opened


def available_bytes() -> int:
    """Memory that the machine can give without swapping."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10
