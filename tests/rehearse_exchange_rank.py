"""tests/gpu/exchange_rank.py with numpy for a GPU and files for its memory; the folder is in HEADRACE_REHEARSAL."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

from host_gpu import HostGpu

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from exchange_rank import Rank, serve

from headrace.runtime.errors import TransferFailed
from headrace.runtime.exchange.ipc import HANDLE_BYTES


class Files:
    """See ipc.Memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[int, mmap.mmap] = {}

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        path = self._folder / f"{os.getpid()}-{len(self._mapped)}"
        path.write_bytes(bytes(num_bytes))
        handle = path.name.encode().ljust(HANDLE_BYTES)
        return self.open(handle), handle

    def free(self, address: int) -> None:
        self._mapped.pop(address)

    def open(self, handle: bytes) -> int:
        try:
            with (self._folder / handle.decode().strip()).open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
        except FileNotFoundError as error:
            raise TransferFailed(str(error)) from None
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(memory))
        self._mapped[address] = memory
        return address

    def close(self, address: int) -> None:
        self._mapped.pop(address)


if __name__ == "__main__":
    serve(Rank(sys.argv[1], sys.argv[2], HostGpu(), Files(Path(os.environ["HEADRACE_REHEARSAL"]))))
