"""The zygote: a process that has imported what every node needs, and forks nodes from there in milliseconds.

    zygote: fork -> mother: fork -> spare
    zygote <---"fork", files--- root        the mother ends, and the root adopts the spare (PR_SET_CHILD_SUBREAPER)
    zygote ---pid of the spare---> root
    zygote ---"go", files---> spare: process.run

One spare waits ready for the next order. The root adopts only while an order is under way: what its nodes leave behind
when they are killed is for process 1 to bury. The zygote has one thread, no loop and no ZeroMQ context: those don't
survive a fork. Its end does no harm to the nodes; the root starts another at the next need. It is also the guard: when
the root is gone (its end of the socket closes) it kills the process groups of all nodes, also those started elsewhere,
and removes the folder of their sockets. Knows nothing of actors and messages.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .errors import ZygoteGone
from .prctl import PR_SET_NAME, Subreaper, prctl

CLOSE_S = 2.0
"""Time the zygote may take to end."""

REAP_S = 0.02
REAP_TRIES = 50

_MAX_ORDER_BYTES = 64


# The root's end --------------------------------------------------------------------------------------------------


class Zygote:
    """The root's end. Starts the process when it is needed; `start` may be called before, to save the wait."""

    def __init__(self, folder: Path, log: Path) -> None:
        """`folder`: where the sockets of this system are; it is removed if the root dies."""
        self.pid = 0
        """0: not running."""
        self._folder = folder
        self._log = log
        self._groups: set[int] = set()
        self._orders: deque[asyncio.Future[int]] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ended: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Starts the process if it does not run; it takes orders at once and works on them when it is warm."""
        if self._process is not None:
            return
        package = __package__ or "headrace.runtime"
        code = f"{die_with_parent(signal.SIGTERM)}; from {package}.zygote import main; main()"
        # The threads of a numeric library would not survive the fork.
        env = {**os.environ, "PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code, str(os.getpid()), str(self._folder)],
                    stdin=theirs.fileno(), stdout=output, stderr=output, env=env, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise ZygoteGone(f"can't start the zygote: {error}") from None
        self.pid = self._process.pid
        ours.setblocking(False)
        self._socket = ours
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        loop.add_reader(ours.fileno(), self._on_reply)
        for group in self._groups:
            self._send(f"watch {group}")

    def fork(self, spec: int, log: int, beats: int) -> asyncio.Future[int]:
        """Orders a node whose standard input is the file `spec`, whose output goes to `log`. The result is its pid, a
        child of this process; or raises ZygoteGone."""
        self.start()
        order: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        assert self._socket is not None
        adoption = Subreaper()
        try:
            socket.send_fds(self._socket, [b"fork"], [spec, log, beats])
        except OSError as error:
            adoption.release()
            raise ZygoteGone(f"the zygote takes no order: {error}") from None
        order.add_done_callback(lambda _: adoption.release())
        self._orders.append(order)
        return order

    def watch(self, pid: int) -> None:
        """The process group of a node shall not outlive the root."""
        self._groups.add(pid)
        self._send(f"watch {pid}")

    def forget(self, pid: int) -> None:
        """That group has ended."""
        self._groups.discard(pid)
        self._send(f"forget {pid}")

    def kill(self) -> None:
        """It answers no more. What it has forked that nobody was told of ends with it; another one can be started."""
        if self._process is not None:
            self._gone()

    async def close(self) -> None:
        """Ends it, and what it has forked that nobody has taken. Answers to earlier orders still arrive."""
        process = self._process
        if process is not None:
            assert self._ended is not None
            self._send("end")
            await asyncio.wait([self._ended], timeout=CLOSE_S)
            self.kill()
            for _ in range(REAP_TRIES):
                if reap(process.pid):
                    break
                await asyncio.sleep(REAP_S)

    def _send(self, order: str) -> None:
        if self._socket is not None:
            with suppress(OSError):  # It is gone, which the reader of replies will see, or hangs: it can't guard then.
                self._socket.send(order.encode())

    def _on_reply(self) -> None:
        assert self._socket is not None
        try:
            reply = self._socket.recv(_MAX_ORDER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            reply = b""
        if not reply:
            self._gone()
            return
        order, answer = self._orders.popleft(), int(reply)
        if answer < 0:
            order.set_exception(ZygoteGone(f"the zygote can't fork: {os.strerror(-answer)}"))
        else:
            order.set_result(answer)

    def _gone(self) -> None:
        process, self._process, self.pid = self._process, None, 0
        assert process is not None and self._socket is not None and self._ended is not None
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        process.kill()
        process.wait()
        reap_group(process.pid)  # A spare, or what was just forked and nobody was told of.
        while self._orders:
            order = self._orders.popleft()
            if not order.done():
                order.set_exception(ZygoteGone(f"the zygote ended: see {self._log}"))
        self._ended.set_result(None)


def reap(group: int) -> bool:
    """Takes the exit codes of all children in a process group that was killed; True if none is left."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def reap_group(group: int, tries: int = REAP_TRIES) -> None:
    """Goes on until none is left: to end takes them a moment."""
    if not reap(group) and tries:
        asyncio.get_running_loop().call_later(REAP_S, reap_group, group, tries - 1)


def die_with_parent(number: signal.Signals) -> str:
    """Code that has the kernel send a signal when the launcher ends, however that happens. It runs before all imports:
    until then a process would outlive its launcher."""
    prctl = f"ctypes.CDLL(None).prctl(1, {int(number)})"
    return f"import ctypes, os; {prctl}; os.getppid() == {os.getpid()} or os._exit(1)"


# The process -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Serves the root until it says `end` or is gone."""
    root, folder = int(sys.argv[1]), sys.argv[2]
    from . import process  # noqa: F401, I001 (what a node needs; numpy and zmq come with it)
    import uvloop  # noqa: F401

    groups: set[int] = set()

    def end(*, orderly: bool) -> NoReturn:
        for group in list(groups):
            for kill in (os.kill, os.killpg):  # It may not have a group yet.
                with suppress(ProcessLookupError, PermissionError):
                    kill(group, signal.SIGKILL)
        if not orderly:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    def on_term(*_: object) -> None:
        # Sent by the kernel when the root ends, or by who ends all processes of a machine: the root decides then.
        if os.getppid() != root:
            end(orderly=False)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_NAME, b"zygote")
    gc.collect()
    gc.freeze()
    orderly = False
    try:
        orderly = _serve(socket.socket(fileno=0), groups)
    except OSError:
        pass  # The root went away in the middle of an order.
    finally:
        end(orderly=orderly)


def _serve(orders: socket.socket, groups: set[int]) -> bool:
    """Whether the root has said `end`."""
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    spare: _Spare | None = None
    while True:
        if spare is None and not poll.poll(0):
            spare = _bear(groups, [])
        order, files, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, 3)
        verb, _, pid = order.decode().partition(" ")
        if verb == "fork":
            _hand_over(orders, spare or _bear(groups, files), files)
            spare = None
        elif verb == "watch":
            groups.add(int(pid))
        elif verb == "forget":
            groups.discard(int(pid))
        else:
            return verb == "end"


@dataclass(frozen=True)
class _Spare:
    pid: int
    """Minus an error number: it could not be forked."""
    line: socket.socket
    mother: int
    """0: there is none."""
    release: int
    """The mother ends when this file is closed."""


def _hand_over(orders: socket.socket, spare: _Spare, files: list[int]) -> None:
    """Makes a node of a spare. The root knows of it first: a node that nobody knows must not run."""
    os.close(spare.release)
    if spare.mother:
        os.waitpid(spare.mother, 0)
    orders.send(str(spare.pid).encode())
    with suppress(BrokenPipeError):  # It was killed, as its parent sees.
        socket.send_fds(spare.line, [b"go"], files)
    spare.line.close()
    for fd in files:
        os.close(fd)


def _bear(groups: set[int], files: list[int]) -> _Spare:
    """`files`: what is open here for somebody else."""
    told, tell = os.pipe()
    held, release = os.pipe()
    mother = 0
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # In the child no signal may ever go the zygote's way.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        mother = os.fork()
        if mother == 0:
            ours.close()
            os.close(release)
            _be_mother(tell, held, theirs, [told, *files])
        pid = int(os.read(told, 16))
    except OSError as error:
        pid = -(error.errno or errno.EAGAIN)
    if pid > 0:
        groups.add(pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for fd in (told, tell, held):
        os.close(fd)
    theirs.close()
    return _Spare(pid, ours, mother, release)


def _be_mother(tell: int, held: int, line: socket.socket, files: list[int]) -> NoReturn:
    answer = -errno.EAGAIN
    try:
        answer = os.fork()
        if answer == 0:
            _be_spare(line, [tell, held, *files])
    finally:
        os.write(tell, str(answer).encode())
        os.read(held, 1)
        os._exit(0)


def _be_spare(line: socket.socket, files: list[int]) -> NoReturn:
    """Until it is told to go it is in the zygote's process group, and ends with the zygote."""
    try:
        import uvloop

        for fd in files:
            os.close(fd)
        prctl(PR_SET_NAME, b"spare")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        gc.enable()
        loop = uvloop.new_event_loop()
        order, files, _, _ = socket.recv_fds(line, _MAX_ORDER_BYTES, 3)
        if order != b"go":
            os._exit(1)
        os.setsid()
        line.close()
        spec, log, beats = files
        for number, fd in enumerate((spec, log, log)):
            os.dup2(fd, number)
        os.close(spec)
        os.close(log)
        from .process import run

        run(beats, loop)
    except BaseException:  # noqa: BLE001 (the edge of a process: it goes to the log)
        traceback.print_exc()
    finally:
        os._exit(1)
