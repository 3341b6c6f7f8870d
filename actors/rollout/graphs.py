"""Doing the same step again and again at fixed addresses: as a CUDA graph, or as it is where there is no GPU.

Knows nothing of models or tokens. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

MIN_CAPABILITY = (9, 0)
"""Below, torch's grouped product reads its offsets on the host, which no graph can hold."""


class Capture(Protocol):
    """Where steps run. All but `aside` are called by the thread that launches them."""

    device: torch.device

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does as `run`, which reads and writes tensors that stay where they are. Calls `run` to warm up."""

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of this host, [size], from and to which copies need not be waited for."""

    def mark(self) -> Callable[[], None]:
        """What it returns waits until all that was launched so far is done."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is launched in here, by any thread, runs beside the steps, and is done at the end."""


class Eager:
    """Runs each step as it is: on a CPU, and on a GPU to compare with."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def mark(self) -> Callable[[], None]:
        return torch.cuda.synchronize if self.device.type == "cuda" else _nothing

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield


class CudaGraphs:
    """Captures each step once; all graphs share the memory of what lives only inside one."""

    def __init__(self, number: int = 0) -> None:
        self.device = torch.device("cuda", number)
        self._pool = torch.cuda.graph_pool_handle()
        self._beside = torch.cuda.Stream(self.device)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        here = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            run()  # Libraries make their handles and workspaces now.
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: they bring the next weights.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            run()
        here.wait_stream(side)
        return graph.replay

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    @contextmanager
    def aside(self) -> Iterator[None]:
        with torch.cuda.stream(self._beside):
            yield
        self._beside.synchronize()


def why_no_cuda() -> str:
    """Why steps can't be captured here; empty if they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one that is built with it"
    if not torch.cuda.is_available():
        return "torch finds no GPU; check the driver and CUDA_VISIBLE_DEVICES"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 9.0 (H100)"
    return ""


def buckets(most: int) -> list[int]:
    """Sizes up to `most` at which steps are captured, ascending: at most a third of one is empty."""
    sizes, size = {most}, 1
    while size < most:
        sizes |= {size, min(most, size + size // 2)}
        size *= 2
    return sorted(sizes)


def _nothing() -> None:
    pass
