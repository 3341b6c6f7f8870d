"""tests/gpu/exchange: what it does, in order, and the table at the end.

    a communicator of one rank --> CUDA IPC between two processes --> two NCCL ranks on one GPU --> abort and re-init

Every byte is compared by checksums; rates are beside that of a plain copy in the same run. Each case has processes and
a deadline of its own: one that hangs is killed, and reported. Exit code 0: all that could run is right; 1: something
is wrong; 2: no CUDA here.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace.runtime.exchange.cuda import nccl, why_no_gpu, why_no_nccl

NUM_TENSORS = 300
WHOLE_BYTES = 1 << 30
DEADLINE_S = 120.0
TWO_RANKS_FROM = 23000
"""NCCL 2.30: NCCL_MULTI_RANK_GPU_ENABLE."""

TWO_RANKS = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_PROTO": "Simple"}


class Failed(Exception):
    """A case is wrong, or can't run: the text says why."""


class Process:
    """A rank in a process of its own."""

    program = Path(__file__).with_name("exchange_rank.py")

    def __init__(self, carrier: str, role: str, environment: dict[str, str] | None = None) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, "-P", self.program, carrier, role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}),
        )  # fmt: skip
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, do: str, **arguments: Any) -> Callable[[], dict[str, Any]]:
        """What it returns waits for the answer. Raises Failed for none."""
        number = len(self._answers)
        box = self._answers[number] = queue.Queue()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            box.put({"error": f"{self.role} has ended"})

        def answer() -> dict[str, Any]:
            try:
                return box.get(timeout=DEADLINE_S)
            except queue.Empty:
                raise Failed(f"{self.role} has not answered {do} within {DEADLINE_S:g} s") from None

        return answer

    def must(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises Failed for an error."""
        return good(self.ask(do, **arguments)())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer.pop("id")].put(answer)
        for box in list(self._answers.values()):
            box.put({"error": f"{self.role} has ended"})


def good(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise Failed(str(answer["error"]))
    return answer


def shapes(num_bytes: int = WHOLE_BYTES) -> dict[str, list[int]]:
    """About 300 tensors of two bytes an element, of unequal sizes."""
    each = num_bytes // 2 // NUM_TENSORS
    return {f"w{i}": [max(1, each * (i % 3 + 1) // 2 // 128), 128] for i in range(NUM_TENSORS)}


def one_rank() -> dict[str, float]:
    process = Process("nccl", "source")
    try:
        rate, alone = _copy_rate(process, 1 << 28), process.must("alone", num_bytes=1 << 28)
        if not alone["same"]:
            raise Failed("a rank has got other bytes than it sent to itself")
        return {
            "nccl_version": alone["nccl"], "copy_bytes_per_s": rate, "nccl_one_rank_bytes_per_s": alone["bytes_per_s"],
            "nccl_one_rank_of_copy_ratio": alone["bytes_per_s"] / rate,
        }  # fmt: skip
    finally:
        process.close()


def ipc(num_bytes: int = WHOLE_BYTES) -> dict[str, float]:
    source, member = Process("ipc", "source"), Process("ipc", "member")
    try:
        rate, seconds = _copy_rate(source, num_bytes), []
        for version in range(1, 5):
            published = source.must("publish", version=version, shapes=shapes(num_bytes))
            route = _route("ipc", 0, 1, source.must("open", epoch=0)["token"])
            received = member.must("receive", manifest=published["manifest"], route=route)
            _same(published, received)
            seconds.append(received["seconds"])
        moved = published["manifest"]["nbytes"]
        old = source.ask("publish", version=2, shapes=shapes(num_bytes))()
        if "can't follow" not in old.get("error", ""):
            raise Failed("a version that goes backwards was published")
        source.close()
        late = member.ask("receive", manifest=published["manifest"], route=route)()
        if "has ended" not in late.get("error", ""):
            raise Failed(f"a dead publisher's memory was read: {late}")
        best = moved / min(seconds[1:])
        return {
            "ipc_bytes_per_s": best, "ipc_of_copy_ratio": best / rate, "ipc_publish_s": published["seconds"],
            "ipc_first_receive_s": seconds[0],
        }  # fmt: skip
    finally:
        source.close()
        member.close()


def two_ranks(num_bytes: int = WHOLE_BYTES) -> dict[str, float]:
    version = nccl().get_version()
    if version < TWO_RANKS_FROM:
        raise Failed(f"left out: NCCL {version} refuses two ranks on one GPU, 2.30 and later have a switch for it")
    source, member = Process("nccl", "source", TWO_RANKS), Process("nccl", "member", TWO_RANKS)
    try:
        rate, seconds = _copy_rate(source, num_bytes), []
        token = source.must("open", epoch=1)["token"]
        for number in range(1, 4):
            published = source.must("publish", version=number, shapes=shapes(num_bytes))
            seconds.append(_together(source, member, published, 1, token))
        moved = published["manifest"]["nbytes"]
        reforming = _abort_and_form_again(source, member, published)
        best = moved / min(seconds[1:])
        return {
            "nccl_two_ranks_bytes_per_s": best, "nccl_two_ranks_of_copy_ratio": best / rate,
            "nccl_first_transfer_s": seconds[0], "nccl_abort_and_form_again_s": reforming,
        }  # fmt: skip
    finally:
        source.close()
        member.close()


def _copy_rate(process: Process, num_bytes: int) -> float:
    return float(process.must("copy_rate", num_bytes=min(num_bytes, 1 << 28))["bytes_per_s"])


def _together(source: Process, member: Process, published: dict[str, Any], epoch: int, token: str) -> float:
    """One transfer; its seconds."""
    manifest = published["manifest"]
    begin = time.perf_counter()
    sending = source.ask("send", manifest=manifest, route=_route("nccl", epoch, 0, token))
    received = good(member.ask("receive", manifest=manifest, route=_route("nccl", epoch, 1, token))())
    good(sending())
    seconds = time.perf_counter() - begin
    _same(published, received)
    return seconds


def _abort_and_form_again(source: Process, member: Process, published: dict[str, Any]) -> float:
    """Only the publisher takes part, and is aborted in the middle; then both, in the next epoch."""
    sending = source.ask("send", manifest=published["manifest"], route=_route("nccl", 1, 0, "00" * 128))
    time.sleep(0.2)
    begin = time.perf_counter()
    for process in (source, member):
        process.must("abort", epoch=1)
    if "TransferFailed" not in sending().get("error", ""):
        raise Failed("a transfer went on after it was aborted")
    _together(source, member, published, 2, source.must("open", epoch=2)["token"])
    return time.perf_counter() - begin


def _route(carrier: str, epoch: int, rank: int, token: str) -> dict[str, Any]:
    return {
        "carrier": carrier, "epoch": epoch, "members": ["source", "member"], "rank": rank, "token": token,
        "deadline_s": 60.0, "stall_s": 20.0,
    }  # fmt: skip


def _same(published: dict[str, Any], received: dict[str, Any]) -> None:
    wrong = [name for name, value in published["sums"].items() if received["sums"].get(name) != value]
    if wrong:
        raise Failed(f"{len(wrong)} tensors have not come as they were published: {', '.join(wrong[:5])}")


CASES: dict[str, Callable[[], dict[str, float]]] = {"one_rank": one_rank, "ipc": ipc, "two_ranks": two_ranks}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "tests/gpu/exchange", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  tests/gpu/exchange --json exchange.json",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    missing = {name: why_no_gpu() or (why_no_nccl() if name != "ipc" else "") for name in CASES}
    figures: dict[str, float] = {}
    said, wrong = {}, False
    for name, case in CASES.items():
        said[name] = f"not yet measured on a GPU: {missing[name]}" if missing[name] else ""
        if not missing[name]:
            try:
                figures |= case()
                said[name] = "right"
            except Failed as failure:
                said[name] = str(failure)
                wrong = wrong or not said[name].startswith("left out")
        print(f"{name:12}{said[name]}")
    for name, value in figures.items():
        print(f"{name:36}{value:.4g}")
    if options.json:
        text = {"figures": figures, "bars": [], "cases": said, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        options.json.write_text(json.dumps(text, indent=1) + "\n")
    return 1 if wrong else 2 if all(missing.values()) else 0
