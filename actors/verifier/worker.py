"""A process that judges and may be killed. Started by workers.py only.

    pool --request--> guard --request--> child   the guard imports the rule once and forks; the child judges
    pool <--report--- guard <--report--- child   the guard watches the child, kills it at the wall deadline, reports how
                                                 it ended, and forks the next one in milliseconds

The guard handles no hostile text but passes it on. What the kernel enforces on the child: processor time of a case
(SIGPROF, which arithmetic in C can't outlive), memory, and for our own rules no writing to files. Both end with the
pool: the guard sees its pipe close, the child dies with the guard. Knows no rule by itself.

A frame is its length, 4 bytes, and msgpack. A report is at most 4096 bytes long, so it is written whole or not at all.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import msgpack

Report = dict[str, Any]
"""{"verdict": {...}} | {"bad_reference": text} | {"ended": how, "own_fault": bool} | {"timeout": True}"""

MAX_REPORT_TEXT = 500
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY, _FORBIDDEN = 97, 98
_OWN_FAULT = (signal.SIGPROF, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXFSZ)
"""Signals that say that what was judged was too much for its process."""

_FORBIDDEN_EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.", "os.putenv")


def pack(value: Any) -> bytes:
    """A frame."""
    data: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return struct.pack("<I", len(data)) + data


def unpack(data: bytes) -> Any:
    """What `pack` wrote, without the length."""
    return msgpack.unpackb(data, unicode_errors="surrogatepass")


def main() -> None:
    """The guard: reads what to judge by, says that it is ready, and serves until the pool goes away."""
    requests, reports = os.dup(0), os.dup(1)
    _silence(0)
    os.dup2(2, 1)  # What a user's function prints goes to the log, not between the reports.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = unpack(_read_frame(requests) or sys.exit(0))
    _die_with(spec["parent"])
    sys.path[:0] = [folder for folder in spec["path"] if folder not in sys.path]
    try:
        judge = _prepare(spec)
    except Exception as error:  # noqa: BLE001  # Said to the pool, which says it to whoever asks.
        os.write(reports, pack({"unready": f"{type(error).__name__}: {error}"[:MAX_REPORT_TEXT]}))
        return
    gc.collect()
    gc.freeze()
    os.write(reports, pack({"ready": os.getpid()}))
    _Guard(spec, judge, requests, reports).serve()


class _Guard:
    """Passes requests to a child, one at a time, and reports to the pool."""

    def __init__(self, spec: dict[str, Any], judge: Callable[[Any], Report], requests: int, reports: int) -> None:
        self._spec, self._judge = spec, judge
        self._requests, self._reports = requests, reports
        self._child = 0
        self._served = 0

    def serve(self) -> None:
        while True:
            if not self._child:
                self._fork()
            request = _read_frame(self._requests)
            if request is None:
                self._kill()
                return
            self._served += 1
            _write_all(self._reports, self._pass_on(request))
            if self._child and self._served >= self._spec["max_cases"]:
                self._kill()

    def _pass_on(self, request: bytes) -> bytes:
        try:
            _write_all(self._to_child, struct.pack("<I", len(request)) + request)
        except BrokenPipeError:
            return pack(self._reap())
        deadline = time.monotonic() + self._spec["wall_s"]
        poll = select.poll()
        poll.register(self._from_child, select.POLLIN)
        poll.register(self._requests, 0)  # Its end only: the pool has gone.
        while True:
            events = dict(poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))))
            if self._requests in events:
                self._kill()
                os._exit(0)
            if self._from_child in events:
                report = _read_frame(self._from_child)
                return struct.pack("<I", len(report)) + report if report is not None else pack(self._reap())
            if time.monotonic() >= deadline:
                self._kill()
                return pack({"timeout": True})

    def _fork(self) -> None:
        request_read, self._to_child = os.pipe()
        self._from_child, report_write = os.pipe()
        guard = os.getpid()
        self._served = 0
        self._child = os.fork()
        if not self._child:
            others = (self._requests, self._reports, self._to_child, self._from_child)
            _child(self._spec, self._judge, guard, request_read, report_write, others)
        os.close(request_read)
        os.close(report_write)

    def _kill(self) -> None:
        """Ends the child and all that it has started."""
        try:
            os.killpg(self._child, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self._child, signal.SIGKILL)  # It has not come to have a group yet.
        self._reap()

    def _reap(self) -> Report:
        """How the child ended, which it does at once: its pipe is closed, or it was killed."""
        os.close(self._to_child)
        os.close(self._from_child)
        child, self._child = self._child, 0
        deadline = time.monotonic() + 1.0
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:  # It closed its pipes but lives on.
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        try:
            os.killpg(child, signal.SIGKILL)  # What it has started ends with it.
        except ProcessLookupError:
            pass
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            words = {_OUT_OF_MEMORY: "out of memory", _FORBIDDEN: "tried what is forbidden"}
            return {"ended": words.get(code, f"exit code {code}"), "own_fault": code == _OUT_OF_MEMORY}
        name = "out of processor time" if -code == signal.SIGPROF else signal.Signals(-code).name
        return {"ended": name, "own_fault": -code in _OWN_FAULT}


def _child(
    spec: dict[str, Any],
    judge: Callable[[Any], Report],
    guard: int,
    requests: int,
    reports: int,
    others: tuple[int, ...],
) -> NoReturn:
    """Judges until its pipe closes. Never returns into the guard's code."""
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with(guard)
        for fd in others:
            os.close(fd)
        _limit(spec)
        while (request := _read_frame(requests)) is not None:
            signal.setitimer(signal.ITIMER_PROF, spec["cpu_s"])
            report = judge(unpack(request))
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write_all(reports, pack(report))
        code = 0
    except MemoryError:
        code = _OUT_OF_MEMORY
    except BaseException as error:
        sys.stderr.write(f"verifier worker: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        raise
    finally:
        os._exit(code)


def _prepare(spec: dict[str, Any]) -> Callable[[Any], Report]:
    """Imports what judges. `spec["judge"]` is "module:function"; the function makes the judge from the rest."""
    module, _, name = spec["judge"].partition(":")
    judge: Callable[[Any], Report] = getattr(importlib.import_module(module), name)(**spec["arguments"])
    return judge


def _limit(spec: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if spec["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (spec["memory_bytes"], spec["memory_bytes"]))
    if spec["harden"]:
        _silence(1, 2)
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        sys.addaudithook(_forbid)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Ends the process if a rule of ours, misled by what it judges, turns to the system. No fence: an alarm."""
    if event.startswith(_FORBIDDEN_EVENTS) or (event == "open" and _writes(arguments)):
        os._exit(_FORBIDDEN)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _read_frame(fd: int) -> bytes | None:
    """The next frame, or None at the end."""
    head = _read_exactly(fd, 4)
    return None if head is None else _read_exactly(fd, struct.unpack("<I", head)[0])


def _read_exactly(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _silence(*fds: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)
