"""One process of tests/gpu/exchange: an end of a carrier, driven by lines of JSON on stdin, answers on stdout.

    {"id": 1, "do": "receive", "manifest": {...}, "route": {...}}  ->  {"id": 1, "seconds": 0.01, "sums": {...}}

Each question is answered by a thread of its own, so that an abort comes through while a transfer hangs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from headrace.runtime.errors import RuntimeFault
from headrace.runtime.exchange.communicator import Limits
from headrace.runtime.exchange.cuda import cupy, nccl
from headrace.runtime.exchange.device import Gpu
from headrace.runtime.exchange.header import Manifest, Route, Seat, TensorSpec
from headrace.runtime.exchange.ipc import IpcSink, IpcSource
from headrace.runtime.exchange.nccl import CupyFabric, NcclSink, NcclSource


class Rank:
    """`gpu` and `memory`: others than the first GPU and CUDA's, to rehearse this without one."""

    def __init__(self, carrier: str, role: str, gpu: Gpu | None = None, memory: Any = None) -> None:
        self.gpu = gpu or Gpu()
        self.end: Any
        if carrier == "ipc":
            self.end = (IpcSource if role == "source" else IpcSink)(role, self.gpu, memory)
        else:
            limits = Limits(init_s=60.0, abort_s=10.0)
            self.end = (NcclSource if role == "source" else NcclSink)(role, self.gpu, limits=limits)
        self.got: Any = None
        self.lock = threading.Lock()

    def answer(self, question: dict[str, Any]) -> None:
        try:
            answer = getattr(self, question.pop("do"))(**{k: v for k, v in question.items() if k != "id"})
        except (RuntimeFault, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with self.lock:
            sys.stdout.write(json.dumps({"id": question["id"], **answer}) + "\n")
            sys.stdout.flush()

    def publish(self, version: int, shapes: dict[str, list[int]]) -> dict[str, Any]:
        """Fresh values in tensors that travel as bfloat16's bits do: uint16."""
        random = np.random.default_rng(version)
        with self.gpu.here():
            tensors = {
                name: self.gpu.from_host(random.integers(0, 0x7F80, shape, dtype=np.uint16))
                for name, shape in shapes.items()
            }
        begin = time.perf_counter()
        manifest = self.end.publish(version, tensors)
        said = {**dataclasses.asdict(manifest), "token": manifest.token.hex()}
        return {
            "manifest": said, "seconds": time.perf_counter() - begin,
            "sums": self._sums(tensors),
        }  # fmt: skip

    def open(self, epoch: int) -> dict[str, Any]:
        return {"token": self.end.open(epoch)[1].hex()}

    def send(self, manifest: dict[str, Any], route: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        self.end.send(manifest_of(manifest), route_of(route))
        return {"seconds": time.perf_counter() - begin}

    def receive(self, manifest: dict[str, Any], route: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        self.got = self.end.receive(manifest_of(manifest), route_of(route), self.got)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "sums": self._sums(self.got)}

    def abort(self, epoch: int) -> dict[str, Any]:
        begin = time.perf_counter()
        self.end.abort(epoch)
        return {"seconds": time.perf_counter() - begin}

    def copy_rate(self, num_bytes: int) -> dict[str, Any]:
        """Of plain copies within the GPU: bytes copied per second."""
        with self.gpu.here():
            source, target = self.gpu.empty(num_bytes), self.gpu.empty(num_bytes)
            target[:] = source
        begin = time.perf_counter()
        with self.gpu.here():
            for _ in range(20):
                target[:] = source
        return {"bytes_per_s": 20 * num_bytes / (time.perf_counter() - begin)}

    def alone(self, num_bytes: int) -> dict[str, Any]:
        """A communicator of one: what it sends to itself, an abort, and a second one."""
        rates, same = [], True
        for _ in range(2):
            fabric = CupyFabric(self.gpu)
            fabric.init(1, bytes(nccl().get_unique_id()), 0)
            with self.gpu.here():
                sent = cupy().random.randint(0, 256, num_bytes, dtype=np.uint8)
                got = self.gpu.empty(num_bytes)
            for _ in range(3):
                begin = time.perf_counter()
                fabric.group_start()
                fabric.send(self.gpu.address(sent), num_bytes, 0)
                fabric.receive(self.gpu.address(got), num_bytes, 0)
                fabric.group_end()
                event = fabric.record()
                while not fabric.done(event):
                    fabric.check()
                rates.append(num_bytes / (time.perf_counter() - begin))
            with self.gpu.here():
                same = same and bool((sent == got).all())
            fabric.abort()
        return {"bytes_per_s": max(rates), "same": same, "nccl": nccl().get_version()}

    def _sums(self, tensors: Any) -> dict[str, int]:
        sums = {}
        with self.gpu.here():
            out = self.gpu.from_host(np.zeros(1, np.uint64))
            for name, tensor in tensors.items():
                flat = tensor.reshape(-1).view(np.uint8)
                self.gpu.checksum(flat[: len(flat) // 4 * 4], out)
                sums[name] = int(self.gpu.to_host(out)[0])
        return sums


def manifest_of(fields: dict[str, Any]) -> Manifest:
    """What `dataclasses.asdict` made of it, back."""
    specs = [TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in fields["tensors"]]
    seat = Seat(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields["seat"].items()})
    return Manifest(**{**fields, "tensors": specs, "seat": seat, "token": bytes.fromhex(fields["token"])})


def route_of(fields: dict[str, Any]) -> Route:
    return Route(**{**fields, "members": tuple(fields["members"]), "token": bytes.fromhex(fields["token"])})


def serve(rank: Rank) -> None:
    with ThreadPoolExecutor(4) as threads:
        for line in sys.stdin:
            threads.submit(rank.answer, json.loads(line))


if __name__ == "__main__":
    logging.basicConfig()
    serve(Rank(*sys.argv[1:3]))
