"""Many tensors in one flat run of bytes, cast on the way, with a checksum: plain torch.

    bucket:  | tensor 0 | 0 | tensor 1 | 0 | ...      each begins at a multiple of 16 bytes, gaps are zero

A tensor goes as it is, from float32 to bfloat16, or from either to float8_e4m3fn by scales of its rows. Knows nothing
of who sends a bucket to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import encode

UNIT_BYTES = 16
"""Tensors begin at multiples of this."""

_CHUNK_WORDS = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the bucket, and as what."""

    offset: int
    """Bytes from the bucket's begin; a multiple of UNIT_BYTES"""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In the bucket"""

    @property
    def num_bytes(self) -> int:
        """Without the gap behind it."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """The layout of a bucket."""

    places: tuple[Place, ...]
    num_bytes: int
    """Of the whole bucket; a multiple of UNIT_BYTES"""


def plan_bucket(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> Plan:
    """Lays tensors of these shapes, with these dtypes in the bucket, one after the other."""
    places, offset = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        places.append(Place(offset, tuple(shape), dtype))
        offset += -(-places[-1].num_bytes // UNIT_BYTES) * UNIT_BYTES
    return Plan(tuple(places), offset)


def pack_weights(tensors: Sequence[Tensor], plan: Plan, scales: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The bucket (uint8) and its checksum (int64, one element). Scales: float32 [rows of the last dimension]."""
    device = tensors[0].device if tensors else None
    bucket = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device)
    for tensor, place, scale in zip(tensors, plan.places, scales, strict=True):
        cast = tensor
        if scale is not None and tensor.numel():
            cast = encode(tensor.float().reshape(len(scale), -1), scale.unsqueeze(1))
        cast = cast.to(place.dtype).contiguous().reshape(-1)
        bucket[place.offset : place.offset + place.num_bytes] = cast.view(torch.uint8)
    return bucket, checksum(bucket)


def unpack_weights(bucket: Tensor, plan: Plan, tensors: Sequence[Tensor], scales: Sequence[Tensor | None]) -> Tensor:
    """Writes what is in the bucket into `tensors`; returns the checksum of the bucket as it was read."""
    for tensor, place, scale in zip(tensors, plan.places, scales, strict=True):
        found = bucket[place.offset : place.offset + place.num_bytes].view(place.dtype)
        if scale is not None and found.numel():
            found = (found.float().reshape(len(scale), -1) * scale.unsqueeze(1)).reshape(-1)
        tensor.copy_(found.to(tensor.dtype).reshape(tensor.shape))
    return checksum(bucket)


def checksum(bucket: Tensor) -> Tensor:
    """sum over 32-bit words i of word * mix(i), + mix(-1 - bytes), modulo 2^64: int64, one element.

    mix is SplitMix64's finalizer (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014),
    made odd: a change within one word always changes the sum.
    """
    words = bucket.view(torch.int32)
    total = _mix(torch.tensor([-1 - bucket.numel()], device=bucket.device))
    for begin in range(0, len(words), _CHUNK_WORDS):
        part = words[begin : begin + _CHUNK_WORDS].long() & 0xFFFFFFFF
        total += (part * _mix(torch.arange(begin, begin + len(part), device=bucket.device))).sum()
    return total


def _mix(index: Tensor) -> Tensor:
    z = (index + 1) * -0x61C8864680B583EB
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return (z ^ _shifted(z, 31)) | 1


def _shifted(z: Tensor, by: int) -> Tensor:
    """Right by so many bits, zeros from the left."""
    return (z >> by) & ((1 << (64 - by)) - 1)
