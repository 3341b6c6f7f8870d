"""Tensors laid out as a payload, and taken out of one: copied, searched, hashed piece by piece, each while cached.

Knows nothing of where payloads come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ..errors import BadWeights, CorruptWeights
from .header import ALIGN, BUCKET_BYTES, DTYPES, Manifest, TensorSpec, checksum, stored

if TYPE_CHECKING:
    from .carrier import Copy

_ZEROS = np.zeros(ALIGN, np.uint8)
MAX_FINITE: dict[str, tuple[type[Any], type[Any], int]] = {
    "<f2": (np.int16, np.uint16, 0x7C00), "bfloat16": (np.int16, np.uint16, 0x7F80),
    "<f4": (np.int32, np.uint32, 0x7F80 << 16), "<f8": (np.int64, np.uint64, 0x7FF << 52),
    "float8_e4m3fn": (np.int8, np.uint8, 0x7F),
}  # fmt: skip
"""Integers of the same size, and the bits of the least pattern that is not a finite number."""


def layout(tensors: Mapping[str, np.ndarray], bfloat16: Collection[str] = ()) -> tuple[list[TensorSpec], int]:
    """Places tensors one after the other, aligned; returns them and the size of the payload.

    Those named in `bfloat16` are its bits, in arrays of uint16. Raises BadWeights for a dtype that can't travel.
    """
    specs, end = [], 0
    for name, array in tensors.items():
        dtype = array.dtype.str if array.dtype.kind != "V" else array.dtype.name
        if name in bfloat16 and dtype == "<u2":
            dtype = "bfloat16"
        if dtype not in DTYPES:
            raise BadWeights(
                f"{name} has dtype {array.dtype}, which can't travel; allowed: {', '.join(sorted(DTYPES))}"
            )
        specs.append(TensorSpec(name=name, dtype=dtype, shape=array.shape, offset=end))
        end = -(-(end + array.nbytes) // ALIGN) * ALIGN
    return specs, end


def fill(
    payload: np.ndarray, specs: list[TensorSpec], nbytes: int, tensors: Mapping[str, np.ndarray], version: int
) -> list[int]:
    """Copies `tensors` to their places; the checksums of the buckets. Raises BadWeights for NaN and infinity."""
    sources = {spec.name: as_bytes(np.ascontiguousarray(tensors[spec.name])) for spec in specs}
    checksums = []
    for start, stop, pieces in _buckets(specs, nbytes, BUCKET_BYTES):
        for spec, begin, end in pieces:
            target = payload[spec.offset + begin : spec.offset + end]
            np.copyto(target, sources[spec.name][begin:end])
            refuse_non_finite(target, spec, version)
            if end == spec.nbytes:
                payload[spec.offset + end : -(-(spec.offset + end) // ALIGN) * ALIGN] = 0
        checksums.append(checksum(payload[start:stop]))
    return checksums


def take(payload: np.ndarray, manifest: Manifest, targets: Mapping[str, np.ndarray]) -> None:
    """Copies all tensors out of a payload into `targets`, and verifies the copies. Raises CorruptWeights."""
    flat = {name: as_bytes(array) for name, array in targets.items()}
    buckets = _buckets(manifest.tensors, manifest.nbytes, manifest.bucket_bytes)
    for (_, stop, pieces), expected in zip(buckets, manifest.checksums, strict=True):
        hasher = xxhash.xxh3_64()
        for spec, begin, end in pieces:
            target = flat[spec.name][begin:end]
            np.copyto(target, payload[spec.offset + begin : spec.offset + end])
            hasher.update(target.data)
            if end == spec.nbytes:
                hasher.update(_ZEROS[: min(-(spec.offset + end) % ALIGN, stop - spec.offset - end)].data)
        if hasher.intdigest() != expected:
            raise corrupt(manifest, pieces)


def verify(payload: np.ndarray, manifest: Manifest, only: Collection[str] | None = None) -> None:
    """Compares the buckets of a payload, or those with a part of the tensors `only`, with their checksums where they
    lie. Raises CorruptWeights."""
    buckets = _buckets(manifest.tensors, manifest.nbytes, manifest.bucket_bytes)
    for (start, stop, pieces), expected in zip(buckets, manifest.checksums, strict=True):
        wanted = only is None or any(spec.name in only for spec, _, _ in pieces)
        if wanted and checksum(payload[start:stop]) != expected:
            raise corrupt(manifest, pieces)


def copy_boxes(
    payload: np.ndarray, manifest: Manifest, targets: Mapping[str, np.ndarray], copies: Sequence[Copy]
) -> None:
    """Copies those boxes of the tensors that `copies` names into `targets`. Raises CorruptWeights."""
    verify(payload, manifest, {copy.source_name for copy in copies})
    views = manifest.views(payload)
    for copy in copies:
        np.copyto(targets[copy.dest_name][copy.dest_box.slices], views[copy.source_name][copy.source_box.slices])


def targets_for(manifest: Manifest, into: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Arrays to receive into: those of `into`, or new ones. Raises ValueError if one does not fit."""
    if into is None:
        return manifest.views(np.empty(manifest.nbytes, np.uint8))
    for spec in manifest.tensors:
        array, dtype = into.get(spec.name), stored(spec.dtype)
        if array is None or (array.dtype, array.shape) != (dtype, spec.shape):
            found = "nothing" if array is None else f"{array.dtype.str} {list(array.shape)}"
            raise ValueError(f"into[{spec.name!r}] must be {dtype.str} {list(spec.shape)}, got {found}")
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise ValueError(f"into[{spec.name!r}] must be contiguous and writeable")
    return {spec.name: into[spec.name] for spec in manifest.tensors}


def as_bytes(array: np.ndarray) -> np.ndarray:
    """A contiguous array as uint8 [nbytes], sharing its memory."""
    return array.reshape(-1).view(np.uint8)


def refuse_non_finite(data: np.ndarray, spec: TensorSpec, version: int) -> None:
    """Raises BadWeights if `data`, uint8 [n], part of a tensor, has NaN or infinity.

    As integers, what is not finite lies above all else of its sign: two maxima find it, at the speed of the cache.
    """
    if spec.dtype not in MAX_FINITE or not data.size:
        return
    signed, unsigned, least = MAX_FINITE[spec.dtype]
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    if data.view(signed).max() < least and data.view(unsigned).max() < least + sign:
        return
    bad = int(((data.view(unsigned) & unsigned(sign - 1)) >= least).sum())
    raise BadWeights(
        f"{spec.name} of version {version} has at least {bad} values that are not finite (NaN, infinity) and "
        "was not published. Look at the loss of the last step, lower the learning rate, or go back to a checkpoint"
    )


_Piece = tuple[TensorSpec, int, int]
"""Bytes begin..end of a tensor."""


def corrupt(manifest: Manifest, pieces: Sequence[_Piece]) -> CorruptWeights:
    names = " and ".join(spec.name for spec, _, _ in pieces[:3]) or "padding"
    return CorruptWeights(
        f"{names} in version {manifest.version} of {manifest.name} does not match its checksum; "
        "publish the version again"
    )


def _buckets(specs: Sequence[TensorSpec], nbytes: int, bucket_bytes: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Each bucket: where it starts and stops in the payload, and the pieces of tensors that are in it."""
    first = 0
    for start in range(0, nbytes, bucket_bytes):
        stop = min(start + bucket_bytes, nbytes)
        pieces = []
        for index in range(first, len(specs)):
            spec = specs[index]
            if spec.offset >= stop:
                break
            end = spec.offset + spec.nbytes
            if end <= start:
                first = index + 1
                continue
            pieces.append((spec, max(start, spec.offset) - spec.offset, min(stop, end) - spec.offset))
        yield start, stop, pieces
