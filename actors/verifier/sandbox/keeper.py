"""The program inside a sandbox, process 1 there: takes one order over a socket, runs it under limits, reports.

    host --fds: order, streams--> keeper --fork, limits, exec--> the program and all that it starts
    host <------ a JSON line ---- keeper    watches the clock, processor time, memory; ends all; reaps all

What runs can't end the keeper (signals to process 1 of a namespace don't arrive), can't trace it or look into its
files (it isn't dumpable), and holds none of its descriptors. So the report is the keeper's own, whatever ran.

Standard library only, and nothing of headrace: it runs under the sandbox's own interpreter. With a process number other
than 1 it is in no namespace (`unsafe`), and ends only the session that it began.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MAX_FDS = 16
PATIENCE = 3.0
"""How many times the wall limit a program may take that waits for a processor."""

_HIGH_FD = 64
_TICK_S = 0.01
_libc = ctypes.CDLL(None)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_HERTZ = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20
_STACK_BYTES = 64 * _MIB
_SPARE_ADDRESSES = 512 * _MIB
"""Address space above the memory limit: programs reserve more than they use."""


def main() -> None:
    """Serves one order, and ends. `argv`: the number of the socket, the work folder."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    work = sys.argv[2]
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getpid() != 1:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    channel.sendall(b"ready\n")
    start, fds, _, _ = socket.recv_fds(channel, 1, _MAX_FDS)
    if not start:
        return
    try:
        report = _serve(work, fds)
    except Exception as error:  # noqa: BLE001  # Said to the host: an error of ours is no verdict.
        report = {"failed": f"{type(error).__name__}: {error}"}
    channel.sendall(json.dumps(report).encode() + b"\n")


def _serve(work: str, fds: list[int]) -> dict[str, Any]:
    order_fd, collect_fd, *streams = fds
    with open(order_fd, "rb") as file:
        order = json.loads(file.readline())
        os.chdir(work)
        for name, size, mode in order["files"]:
            _write(name, file.read(size), mode)
    limits = order["limits"]
    child, began = _spawn(order, streams), time.monotonic()
    for fd in streams:
        os.close(fd)
    watch = _Watch(child, limits, began)
    stopped = watch.until_end()
    status = _end_all(child)
    wall_s = time.monotonic() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if order["collect"]:
        _collect(order["collect"], collect_fd, limits["output_bytes"])
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stopped": stopped,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": wall_s,
        "memory_bytes": max(usage.ru_maxrss * 1024, watch.peak),
    }


def _spawn(order: dict[str, Any], streams: list[int]) -> int:
    """Starts the program; returns its process number. Raises OSError if it can't be executed."""
    trouble, say = os.pipe()
    child = os.fork()
    if not child:
        try:
            say = fcntl.fcntl(say, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
            _become(order, streams, say)
        except BaseException as error:  # noqa: BLE001  # The parent raises it.
            os.write(say, f"{type(error).__name__}: {error}".encode()[:500])
        finally:
            os._exit(1)
    os.close(say)
    with open(trouble, "rb") as file:
        text = file.read().decode(errors="replace")
    if text:
        raise OSError(f"can't start {order['argv'][0]}: {text}")
    return child


def _become(order: dict[str, Any], streams: list[int], say: int) -> None:
    os.setsid()
    if os.getppid() != 1:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, say) for fd in streams]
    for target, fd in enumerate(moved):
        os.dup2(fd, target, inheritable=True)
    os.closerange(len(streams), say)
    os.closerange(say + 1, max(moved) + 1)
    _limit(order["limits"])
    os.execve(order["argv"][0], order["argv"], order["environment"])


def _limit(limits: dict[str, Any]) -> None:
    cpu_s = int(limits["cpu_s"]) + 2
    space = limits["memory_bytes"] + _SPARE_ADDRESSES
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_STACK, _STACK_BYTES),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"] + (os.getppid() == 1)),  # The keeper counts as one.
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_SIGPENDING, 256),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
    ):
        if what != resource.RLIMIT_NPROC or os.getppid() == 1:  # Outside a namespace all of the user's would count.
            resource.setrlimit(what, (value, value))


class _Watch:
    """Looks at what the program uses until it ends, or uses too much."""

    def __init__(self, child: int, limits: dict[str, Any], began: float) -> None:
        self._child, self._limits, self._began = child, limits, began
        self.peak = 0

    def until_end(self) -> str:
        """Why the program has to be ended; "" once it has ended."""
        pidfd = os.pidfd_open(self._child)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        try:
            while not poll.poll(1000 * _TICK_S):
                if reason := self._excess():
                    return reason
            return ""
        finally:
            os.close(pidfd)

    def _excess(self) -> str:
        cpu_s, memory = _used()
        disk = os.statvfs(".")
        if os.getpid() == 1:
            memory += (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        self.peak = max(self.peak, memory)
        past = {
            "cpu": cpu_s > self._limits["cpu_s"],
            "wall": self._is_late(),
            "memory": memory > self._limits["memory_bytes"],
            "inodes": os.getpid() == 1 and disk.f_files - disk.f_ffree > self._limits["inodes"],
        }
        return next((reason for reason, is_past in past.items() if is_past), "")

    def _is_late(self) -> bool:
        """By the clock, without the time that the program waited for a processor; by the clock alone after PATIENCE."""
        passed, limit = time.monotonic() - self._began, float(self._limits["wall_s"])
        return passed > limit and (passed > PATIENCE * limit or passed - _queued_s() > limit)


def _queued_s() -> float:
    """Seconds in which a process could have run, and others did: of the one that waited longest."""
    longest = 0
    for name in _others():
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/schedstat") as file:
            longest = max(longest, int(file.read().split()[1]))
    return longest / 1e9


def _others() -> list[str]:
    """The numbers of all processes but the keeper; where it is in no namespace, of its own child."""
    if os.getpid() != 1:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return file.read().split()
    return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _used() -> tuple[float, int]:
    """Processor seconds, of the living and the dead, and resident bytes of all processes but the keeper."""
    ticks = pages = 0
    for name in _others():
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # It has just ended.
        ticks += int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
        pages += int(fields[21])
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime + ticks / _HERTZ, pages * _PAGE


def _end_all(child: int) -> int:
    """Kills what is left, reaps all, and returns the status of `child`."""
    status = 0
    while True:
        with contextlib.suppress(ProcessLookupError):
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)
            else:
                os.killpg(child, signal.SIGKILL)
        try:
            pid, ended = os.wait()
        except ChildProcessError:
            return status
        if pid == child:
            status = ended


def _write(name: str, content: bytes, mode: int) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    os.fchmod(fd, mode)
    with open(fd, "wb") as file:
        file.write(content)


def _collect(name: str, to: int, limit: int) -> None:
    """Copies a plain file, if it is one and not too long."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
        os.close(fd)
        return
    with open(fd, "rb") as file, open(to, "wb", closefd=False) as out:
        out.write(b"1" + file.read(limit))


if __name__ == "__main__":
    main()
