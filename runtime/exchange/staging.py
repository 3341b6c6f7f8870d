"""Fills a bucket from the arrays of the rank that sends it, and empties it into those of the rank that receives it.

    bucket   | header | box, padded to 16 | box: e4m3 codes, padded | its scales, padded | ...

The checksum in the header is of what travels. A box that lies in one piece is one memcpy; others go row by row.
Knows nothing of what carries buckets.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..codec import Buffer
from ..errors import BadWeights, CorruptWeights
from . import fp8
from .boxes import Box
from .buckets import Bucket, Schedule
from .header import BucketHeader, TensorSpec, checksum, stored
from .payload import refuse_non_finite

HEADER_BYTES = 128
"""Of which BucketHeader takes a part; the rest keeps what follows aligned."""

Arrays = Mapping[str, np.ndarray]
"""What a rank holds, by name; dtypes that numpy does not know as header.stored says."""


def require_arrays(schedule: Schedule, arrays: Arrays, *, receiving: bool) -> None:
    """Raises BadWeights, with both values, unless `arrays` are those that the plan expects of this rank."""
    plan = schedule.plan
    expected = (plan.dest if receiving else plan.source).local(schedule.rank)
    for name in [*expected, *(name for name in arrays if name not in expected)]:
        dtype, shape = expected.get(name, ("nothing", ()))
        array = arrays.get(name)
        wanted = f"{stored(dtype).str} {list(shape)}" if name in expected else "nothing"
        found = "nothing" if array is None else f"{array.dtype.str} {list(array.shape)}"
        if wanted != found:
            raise BadWeights(f"rank {schedule.rank}: the plan has {wanted} for {name}, the rank has {found}")


def pack(
    schedule: Schedule, bucket: Bucket, arrays: Arrays, out: np.ndarray, *, version: int, epoch: int
) -> np.ndarray:
    """Writes header and boxes into `out`, uint8 [HEADER_BYTES + bucket_bytes or more]; returns the part it filled.

    Raises BadWeights if a value is not finite.
    """
    end = HEADER_BYTES + bucket.nbytes
    payload = out[HEADER_BYTES:end]
    for row in range(bucket.first, bucket.last):
        box, dtype = box_of(schedule, arrays, row, sending=True)
        target = payload[schedule.offset[row] :]
        if schedule.quantized(row):
            _quantize(
                box, dtype, target, f"{schedule.plan.wholes[schedule.moves.whole[row]].name} of version {version}"
            )
        else:
            np.copyto(target[: box.nbytes].view(box.dtype).reshape(box.shape), box)
            refuse_non_finite(target[: box.nbytes], _spec(schedule, row), version)
    header = BucketHeader(
        version=version, epoch=epoch, incarnation=0, generation=0, index=bucket.number, num_buckets=bucket.num_buckets,
        nbytes=bucket.nbytes, checksum=checksum(payload), source=bucket.source, dest=bucket.dest,
        quantized=any(map(schedule.quantized, range(bucket.first, bucket.last))),
    )  # fmt: skip
    out[:HEADER_BYTES] = np.frombuffer(header.pack().ljust(HEADER_BYTES, b"\0"), np.uint8)
    return out[:end]


def unpack(
    schedule: Schedule, bucket: Bucket, data: Buffer | np.ndarray, arrays: Arrays, *, version: int, epoch: int
) -> None:
    """Empties what `pack` filled into `arrays`. Raises CorruptWeights if it is not this bucket, of this version and
    epoch, whole; then nothing was written."""
    view = np.frombuffer(data, np.uint8)
    header, payload = BucketHeader.unpack(view[: BucketHeader.FORMAT.size].tobytes()), view[HEADER_BYTES:]
    wanted = (version, epoch, bucket.source, bucket.dest, bucket.number, bucket.num_buckets, bucket.nbytes)
    found = (
        header.version, header.epoch, header.source, header.dest, header.index, header.num_buckets, header.nbytes,
    )  # fmt: skip
    if wanted != found or len(payload) != bucket.nbytes:
        raise CorruptWeights(
            f"expected (version, epoch, source, dest, index, buckets, bytes) {wanted}, "
            f"got {found} with {len(payload)} bytes"
        )
    if checksum(payload) != header.checksum:
        raise CorruptWeights(
            f"bucket {bucket.number} from rank {bucket.source} to {bucket.dest} of version {version} does not match "
            "its checksum; send the version again"
        )
    for row in range(bucket.first, bucket.last):
        box, dtype = box_of(schedule, arrays, row, sending=False)
        source = payload[schedule.offset[row] :]
        if schedule.quantized(row):
            _dequantize(source, dtype, box)
        else:
            np.copyto(box, source[: box.nbytes].view(box.dtype).reshape(box.shape))


def copy_local(schedule: Schedule, source: Arrays, dest: Arrays) -> None:
    """What a rank has itself, from its arrays to those that it receives into."""
    plan, local = schedule.plan, schedule.local
    for _, _, _, s, d, s_at, d_at, shape in zip(*(column.tolist() for column in local), strict=True):
        np.copyto(
            _part(dest[plan.dest.held[d].name], d_at, shape), _part(source[plan.source.held[s].name], s_at, shape)
        )


def box_of(schedule: Schedule, arrays: Arrays, row: int, *, sending: bool) -> tuple[np.ndarray, str]:
    """The part of an array that row `row` of the schedule means, and its dtype."""
    moves, plan = schedule.moves, schedule.plan
    held = (plan.source.held[moves.source_held[row]]) if sending else plan.dest.held[moves.dest_held[row]]
    at = (moves.source_at if sending else moves.dest_at)[row].tolist()
    return _part(arrays[held.name], at, moves.shape[row].tolist()), plan.wholes[moves.whole[row]].dtype


def _spec(schedule: Schedule, row: int) -> TensorSpec:
    whole = schedule.plan.wholes[schedule.moves.whole[row]]
    return TensorSpec(name=whole.name, dtype=whole.dtype, shape=whole.shape, offset=0)


def _part(array: np.ndarray, at: list[int], shape: list[int]) -> np.ndarray:
    """A box with the leading dimensions that its row has."""
    full = array.reshape((1,) * (len(at) - array.ndim) + array.shape)
    return full[Box(tuple(at), tuple(a + n for a, n in zip(at, shape, strict=True))).slices]


def _quantize(box: np.ndarray, dtype: str, target: np.ndarray, name: str) -> None:
    rows = fp8.as_float(box, dtype).reshape(-1, box.shape[-1])
    try:
        codes, scales = fp8.quantize(rows)
    except ValueError as error:
        raise BadWeights(
            f"{name}: {error}; it was not sent. Go back to a checkpoint, or lower the learning rate"
        ) from None
    target[: codes.size] = codes.reshape(-1)
    at = scales_at(codes.size)
    target[at : at + scales.nbytes].view(np.float32)[:] = scales


def _dequantize(source: np.ndarray, dtype: str, box: np.ndarray) -> None:
    shape = -1, box.shape[-1]
    codes = source[: box.size].reshape(shape)
    at = scales_at(box.size)
    scales = source[at : at + 4 * len(codes)].view(np.float32)
    np.copyto(box, fp8.from_float(fp8.dequantize(codes, scales), dtype).reshape(box.shape))


def scales_at(num_codes: int) -> int:
    return -(-num_codes // 16) * 16
