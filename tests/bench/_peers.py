"""The peers of actors.py: the same two figures of Ray and xoscar, beside ours in the same rounds.

    python -P _peers.py NAME      the peer's side: prints "ready", then for each line of input, a number of calls,
                                  measures and prints {"p50_s": seconds, "calls_100_per_s": rate} as JSON

A peer that can't be imported here gets an environment of its own, made once with pip and kept in the user's cache.
What fails is said in a line, and its figures are None: peers are no part of what is tested.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PEERS = ("ray", "xoscar")
IN_FLIGHT = 100
RATE_S = 1.0
INSTALL_S = 600.0
ANSWER_S = 120.0
CLOSE_S = 20.0
PAYLOAD = bytes(80)
READY = "ready"

Pythons = dict[str, str]
"""Peer -> interpreter that can import it."""


def chosen(text: str) -> list[str]:
    """The names in a comma-separated list, for argparse."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
    return names


def interpreters(asked: Sequence[str], say: Callable[[str], None]) -> Pythons:
    """An interpreter for each peer that can be measured. Only those `asked` for are installed."""
    found: Pythons = {}
    for name in PEERS:
        if _importable(name):
            found[name] = sys.executable
        elif (reason := _ready(name, install=name in asked, say=say)) is None:
            found[name] = str(_environment(name) / "bin" / "python")
        elif name in asked:
            say(f"{name} is left out: {reason}")
    return found


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _environment(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "headrace" / f"peer-{name}-{sys.version_info.major}.{sys.version_info.minor}"


def _ready(name: str, *, install: bool, say: Callable[[str], None]) -> str | None:
    """None if the peer's own environment is complete; else why not."""
    folder = _environment(name)
    stamp = folder / "complete"
    if stamp.exists():
        return None
    if not install:
        return "not installed"
    say(f"making an environment for {name} in {folder}: once, and it takes a while")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", name],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
                return f"{' '.join(command)}: {lines[-1]}"
        stamp.touch()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


async def measure_peers(pythons: Pythons, scale: Any, say: Callable[[str], None]) -> dict[str, float | None]:
    """Ours and theirs by turns: a round each, as often as the other figures."""
    figures: dict[str, float | None] = {}
    for name in PEERS:
        ours: list[dict[str, float]] = []
        theirs: list[dict[str, float]] = []
        if name in pythons:
            try:
                await _rounds(name, pythons[name], scale, say, ours, theirs)
            except (PeerError, OSError) as error:
                say(f"{name} is left out: {error}")
                theirs = []
        for figure, key in (("call_p50", "p50_s"), ("calls_100", "calls_100_per_s")):
            unit, factor = ("_us", 1e6) if key == "p50_s" else ("_per_s", 1.0)
            a, b = (statistics.median([row[key] for row in rows]) if theirs else None for rows in (ours, theirs))
            figures[f"{name}_{figure}_ratio"] = a / b if a is not None and b else None
            if a is not None and b is not None:
                figures |= {f"{name}_{figure}{unit}": b * factor, f"{name}_ours_{figure}{unit}": a * factor}
    return figures


class PeerError(Exception):
    """A peer could not be measured. The text says why."""


async def _rounds(name: str, python: str, scale: Any, say: Callable[[str], None], ours: list, theirs: list) -> None:
    from _bench_actors import Callee
    from _messages import calls_per_s, seconds_of

    from headrace.runtime import System

    peer = _Peer(name, python)
    try:
        async with System() as system:
            ref = await system.spawn(Callee(), name="callee", node="callee")

            async def call() -> None:
                await ref.echo(PAYLOAD)

            for number in range(scale.rounds):
                say(f"{name}, round {number + 1} of {scale.rounds}")
                times = await seconds_of(call, scale.peer_calls)
                rate = await calls_per_s(call, IN_FLIGHT, RATE_S)
                ours.append({"p50_s": statistics.median(times), "calls_100_per_s": rate})
                theirs.append(await asyncio.to_thread(peer.round, scale.peer_calls))
    finally:
        peer.close()


class _Peer:
    """The process of a peer. Raises PeerError with the last line that it said."""

    def __init__(self, name: str, python: str) -> None:
        here = Path(__file__).resolve()
        environment = {**os.environ, "PYTHONPATH": str(here.parent), "RAY_USAGE_STATS_ENABLED": "0"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [python, str(here), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            self._read()
        except PeerError:
            self.close()
            raise

    def round(self, calls: int) -> dict[str, float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{calls}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        answer: dict[str, float] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """Asks it to end, and with it what it has started; then kills its group."""
        try:
            self._process.communicate(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._errors.close()

    def _read(self) -> str:
        """The next line that is for us; it may talk of other things."""
        watchdog = threading.Timer(ANSWER_S, self._process.kill)
        watchdog.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if line.strip() == READY or line.startswith("{"):
                    return line.strip()
        finally:
            watchdog.cancel()
        raise PeerError(self._last_words())

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"it ended without an answer, or gave none within {ANSWER_S:g} s"


def _serve(measure: Callable[[int], dict[str, float]]) -> None:
    print(READY, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(int(line))), flush=True)


def _ray() -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    @ray.remote
    class Echo:
        def echo(self, payload: bytes) -> bytes:
            return payload

    echo = Echo.remote()
    ray.get([echo.echo.remote(PAYLOAD) for _ in range(200)])

    def measure(calls: int) -> dict[str, float]:
        times, done = [], 0
        for _ in range(calls):
            began = time.perf_counter()
            ray.get(echo.echo.remote(PAYLOAD))
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        while time.perf_counter() < began + RATE_S:
            ray.get([echo.echo.remote(PAYLOAD) for _ in range(IN_FLIGHT)])
            done += IN_FLIGHT
        return {"p50_s": statistics.median(times), "calls_100_per_s": done / (time.perf_counter() - began)}

    try:
        _serve(measure)
    finally:
        ray.shutdown()


def _xoscar() -> None:
    asyncio.run(_xoscar_serve())


async def _xoscar_serve() -> None:
    import xoscar
    from _peer_xoscar import Echo
    from xoscar.backends.allocate_strategy import ProcessIndex

    pool = await xoscar.create_actor_pool("127.0.0.1", n_process=1)
    await pool.start()
    echo = await xoscar.create_actor(Echo, address=pool.external_address, allocate_strategy=ProcessIndex(1))

    async def measure(calls: int) -> dict[str, float]:
        times, done = [], 0
        for _ in range(calls):
            began = time.perf_counter()
            await echo.echo(PAYLOAD)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        end = began + RATE_S

        async def ask() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await echo.echo(PAYLOAD)
                done += 1

        await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
        return {"p50_s": statistics.median(times), "calls_100_per_s": done / (time.perf_counter() - began)}

    print(READY, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await measure(int(line))), flush=True)
    await pool.stop()


if __name__ == "__main__":
    {"ray": _ray, "xoscar": _xoscar}[sys.argv[1]]()
