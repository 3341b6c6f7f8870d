"""A rank's schedule as waves of a communicator: each bucket is packed, travels and is checked where the weights are.

    sender     arrays --boxes--> [header | bucket] --send-->      the checksum is written into the header on the GPU
    receiver   --receive--> [header | bucket] --boxes--> arrays   header and own checksum are kept for `verify`

One buffer is all that a rank needs beside its arrays: everything is enqueued on one stream, so that a bucket is packed
when the one before has gone. Nothing is read back before `verify`. What the schedule quantizes travels as FP8, see
fp8.py. Knows nothing of NCCL.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..errors import CorruptWeights
from .buckets import Bucket, Schedule
from .communicator import Part, Wave
from .header import BucketHeader
from .staging import HEADER_BYTES, box_of, copy_local, scales_at

Arrays = Mapping[str, Any]
"""What a rank holds, by name: arrays on its device, of the dtypes that header.stored says."""

_CHECKSUM = slice(48, 56)
"""Of BucketHeader."""


class Device(Protocol):
    """See device.Gpu."""

    def empty(self, num_bytes: int) -> Any: ...

    def from_host(self, array: np.ndarray) -> Any: ...

    def to_host(self, array: Any) -> np.ndarray: ...

    def address(self, array: Any) -> int: ...

    def checksum(self, data: Any, out: Any) -> None: ...

    def quantize(self, box: Any, dtype: str, codes: Any, scales: Any) -> None: ...

    def dequantize(self, codes: Any, scales: Any, dtype: str, box: Any) -> None: ...


class DeviceTransfer:
    """One version from the arrays of this rank, or into them; `dest` is a mixture until `verify` has returned."""

    def __init__(
        self,
        device: Device,
        schedule: Schedule,
        source: Arrays,
        dest: Arrays,
        *,
        version: int,
        epoch: int,
    ) -> None:
        """Allocates the buffer on the device of the caller."""
        self._device = device
        self._schedule = schedule
        self._source, self._dest = source, dest
        self._version, self._epoch = version, epoch
        buckets = schedule.buckets
        self._buffer = device.empty(HEADER_BYTES + max((bucket.nbytes for bucket in buckets), default=0))
        headers = np.zeros((len(buckets), HEADER_BYTES), np.uint8)
        for row, bucket in zip(headers, buckets, strict=True):
            packed = self._header(bucket).pack()
            row[: len(packed)] = np.frombuffer(packed, np.uint8)
        self._headers = device.from_host(headers)
        """What is sent, but for the checksums; at a receiver, what came."""
        self._sums = device.from_host(np.zeros(len(buckets), np.uint64))

    def waves(self) -> list[Wave]:
        """One for each bucket of this rank, in the order of all ranks."""
        address = self._device.address(self._buffer)
        waves = []
        for number, bucket in enumerate(self._schedule.buckets):
            size = HEADER_BYTES + bucket.nbytes
            if bucket.source == self._schedule.rank:
                waves.append(
                    Wave(
                        label=f"bucket {bucket.number} to rank {bucket.dest}",
                        sends=[Part(bucket.dest, address, size)],
                        before=partial(self._pack, number, bucket),
                    )
                )
            else:
                waves.append(
                    Wave(
                        label=f"bucket {bucket.number} from rank {bucket.source}",
                        receives=[Part(bucket.source, address, size)],
                        after=partial(self._unpack, number, bucket),
                    )
                )
        return waves

    def copy_local(self) -> None:
        """What this rank has itself."""
        copy_local(self._schedule, self._source, self._dest)

    def verify(self) -> None:
        """Raises CorruptWeights unless every bucket that came is the one that was due, whole."""
        headers, sums = self._device.to_host(self._headers), self._device.to_host(self._sums)
        for bucket, row, found in zip(self._schedule.buckets, headers, sums.tolist(), strict=True):
            if bucket.source == self._schedule.rank:
                continue
            header, wanted = BucketHeader.unpack(row[: BucketHeader.FORMAT.size].tobytes()), self._header(bucket, found)
            if header != wanted:
                raise CorruptWeights(
                    f"bucket {bucket.number} from rank {bucket.source} to {bucket.dest} did not arrive as it was sent: "
                    f"expected {wanted}, got {header}; send the version again"
                )

    def _header(self, bucket: Bucket, checksum: int = 0) -> BucketHeader:
        return BucketHeader(
            version=self._version, epoch=self._epoch, incarnation=0, generation=0, index=bucket.number,
            num_buckets=bucket.num_buckets, nbytes=bucket.nbytes, checksum=checksum, source=bucket.source,
            dest=bucket.dest, quantized=any(map(self._schedule.quantized, range(bucket.first, bucket.last))),
        )  # fmt: skip

    def _pack(self, number: int, bucket: Bucket) -> None:
        payload = self._buffer[HEADER_BYTES : HEADER_BYTES + bucket.nbytes]
        for row in range(bucket.first, bucket.last):
            box, dtype = box_of(self._schedule, self._source, row, sending=True)
            target = payload[self._schedule.offset[row] :]
            if self._schedule.quantized(row):
                self._device.quantize(box, dtype, *_codes_and_scales(target, box))
            else:
                target[: box.nbytes].view(box.dtype).reshape(box.shape)[...] = box
        header = self._buffer[:HEADER_BYTES]
        header[:] = self._headers[number]
        self._device.checksum(payload, header[_CHECKSUM].view(np.uint64))

    def _unpack(self, number: int, bucket: Bucket) -> None:
        payload = self._buffer[HEADER_BYTES : HEADER_BYTES + bucket.nbytes]
        self._headers[number] = self._buffer[:HEADER_BYTES]
        self._device.checksum(payload, self._sums[number : number + 1])
        for row in range(bucket.first, bucket.last):
            box, dtype = box_of(self._schedule, self._dest, row, sending=False)
            source = payload[self._schedule.offset[row] :]
            if self._schedule.quantized(row):
                self._device.dequantize(*_codes_and_scales(source, box), dtype, box)
            else:
                box[...] = source[: box.nbytes].view(box.dtype).reshape(box.shape)


def _codes_and_scales(place: Any, box: Any) -> tuple[Any, Any]:
    """Where in a bucket those of a box lie: uint8 [values], float32 [rows]."""
    at = scales_at(box.size)
    return place[: box.size], place[at : at + 4 * (box.size // box.shape[-1])].view(np.float32)
