"""A GPU in numpy, and a link between threads: what carriers for GPUs do with bytes can be looked at without one."""

from __future__ import annotations

import ctypes
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from headrace.kernels.reference.bucket import checksum
from headrace.runtime.errors import TransferFailed
from headrace.runtime.exchange import fp8
from headrace.runtime.exchange.device import Gpu, dtype_name
from headrace.runtime.exchange.header import stored


class HostGpu(Gpu):
    """See device.Gpu. Checksums are those of the kernels' reference."""

    @property
    def uuid(self) -> str:
        return f"host {self.number}"

    @contextmanager
    def here(self, stream: Any = None) -> Iterator[None]:
        yield

    @contextmanager
    def on(self) -> Iterator[None]:
        yield

    def stream(self) -> Any:
        return HostStream()

    def event(self, stream: Any) -> Any:
        return stream

    def empty(self, num_bytes: int) -> np.ndarray:
        return np.full(num_bytes, 0xCB, np.uint8)

    def new(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.empty(stored(dtype).itemsize * math.prod(shape)).view(stored(dtype)).reshape(shape)

    def from_host(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def address(self, array: np.ndarray) -> int:
        return int(array.ctypes.data)

    def wrap(self, address: int, num_bytes: int, owner: Any = None) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), np.uint8)

    def adopt(self, tensor: Any) -> tuple[str, np.ndarray]:
        if isinstance(tensor, torch.Tensor):
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            return dtype_name(tensor), bits.numpy().view(stored(dtype_name(tensor)))
        return tensor.dtype.str, tensor

    def checksum(self, data: np.ndarray, out: np.ndarray) -> None:
        out.view(np.int64)[:] = checksum(torch.from_numpy(data.copy())).numpy()

    def quantize(self, box: np.ndarray, dtype: str, codes: np.ndarray, scales: np.ndarray) -> None:
        found, scales[:] = fp8.quantize(fp8.as_float(box, dtype).reshape(-1, box.shape[-1]))
        codes[:] = found.reshape(-1)

    def dequantize(self, codes: np.ndarray, scales: np.ndarray, dtype: str, box: np.ndarray) -> None:
        values = fp8.dequantize(codes.reshape(-1, box.shape[-1]), scales)
        box[...] = fp8.from_float(values, dtype).reshape(box.shape)

    def largest(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([array.max() for array in arrays], np.float64)


class HostStream:
    """Everything has happened when it was enqueued."""

    ptr = 0
    done = True

    def synchronize(self) -> None: ...


class Hub:
    """Where the fabrics of one test meet."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.joined: dict[bytes, set[int]] = defaultdict(set)
        self.mail: dict[tuple[bytes, int, int], deque[bytes]] = defaultdict(deque)
        self.inits = 0
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        """What happens to the bytes on their way."""
        self.frozen: set[str] = set()
        """Members to whom nothing comes."""
        self.mute: set[int] = set()
        """Ranks that never come to an init."""


class HostFabric:
    """See communicator.Fabric: sends are copies into a mailbox, receives wait until `done` finds something there."""

    def __init__(self, hub: Hub, name: str = "") -> None:
        self.hub, self.name = hub, name
        self.token, self.rank, self.over = b"", 0, False
        self.work: deque[Callable[[], bool]] = deque()
        self.completed = 0
        self.enqueued = 0

    def init(self, size: int, token: bytes, rank: int) -> None:
        self.token, self.rank = token, rank
        with self.hub.changed:
            self.hub.inits += 1
            if rank in self.hub.mute:
                self.hub.changed.wait_for(lambda: False, timeout=60)
            self.hub.joined[token].add(rank)
            self.hub.changed.notify_all()
            if not self.hub.changed.wait_for(lambda: len(self.hub.joined[token]) == size, timeout=20):
                raise TransferFailed("init: nobody came")

    def run(self, work: Callable[[], None]) -> None:
        self._enqueue(lambda: (work(), True)[1])

    def group_start(self) -> None: ...

    def group_end(self) -> None: ...

    def send(self, address: int, num_bytes: int, peer: int) -> None:
        def copy() -> bool:
            data = ctypes.string_at(address, num_bytes)
            with self.hub.changed:
                self.hub.mail[self.token, self.rank, peer].append(self.hub.spoil(data))
            return True

        self._enqueue(copy)

    def receive(self, address: int, num_bytes: int, peer: int) -> None:
        def copy() -> bool:
            with self.hub.changed:
                box = self.hub.mail[self.token, peer, self.rank]
                if not box or self.name in self.hub.frozen:
                    return False
                ctypes.memmove(address, box.popleft(), num_bytes)
            return True

        self._enqueue(copy)

    def _enqueue(self, step: Callable[[], bool]) -> None:
        self.work.append(step)
        self.enqueued += 1

    def record(self) -> int:
        return self.enqueued

    def done(self, event: int) -> bool:
        while self.completed < event and not self.over and self.work[0]():
            self.work.popleft()
            self.completed += 1
        return self.completed >= event

    def check(self) -> None: ...

    def abort(self) -> None:
        self.over = True

    def finalize(self) -> None:
        self.over = True
