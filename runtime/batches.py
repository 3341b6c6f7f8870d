"""Batches as plain values: counted, cut and joined along their first dimension.

A batch is an array, a list, or a dict or dataclass of such: sample i is element i of each. What else is in it (numbers,
texts, None, tuples, arrays without dimensions) belongs to the batch as a whole and goes with every part. Parts of
arrays are views. Knows nothing of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Empty = Callable[[Any, Any], np.ndarray]
"""(shape, dtype) -> an array for the result; see Actor.empty."""


def count(*values: Any) -> int | None:
    """Samples of batches that belong together; None if no value is a batch.

    Raises ValueError, saying where, if two differ.
    """
    found = [leaf for number, value in enumerate(values) for leaf in _leaves(value, f"argument {number}")]
    for where, length in found:
        if length != found[0][1]:
            raise ValueError(f"{found[0][0]} has {found[0][1]} samples, {where} has {length}; a batch has one number")
    return found[0][1] if found else None


def part(value: Any, start: int, stop: int) -> Any:
    """Samples start..stop-1; what is no batch, as it is. Past the end it begins again with the first sample."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value[start:stop] if stop <= len(value) else value[np.arange(start, stop) % len(value)]
    if isinstance(value, list):
        return value[start:stop] if stop <= len(value) else [value[i % len(value)] for i in range(start, stop)]
    if isinstance(value, Cuttable):
        return value.part(start, stop)
    return _map(value, lambda inner: part(inner, start, stop))


def join(values: Sequence[Any], empty: Empty = np.empty) -> Any:
    """The batch whose parts are `values`, in order. What belongs to a part as a whole becomes a list, one of each part.

    Raises ValueError if the parts are not alike.
    """
    first = values[0]
    if isinstance(first, np.ndarray) and first.ndim and all(isinstance(v, np.ndarray) for v in values):
        return _concatenate(values, empty)
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise ValueError(f"parts of a batch have other keys: {[list(value) for value in values]}")
        return {key: join([value[key] for value in values], empty) for key in first}
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in dataclasses.fields(first) if f.init]
        return dataclasses.replace(first, **{n: join([getattr(v, n) for v in values], empty) for n in names})
    return list(values)


def arrays(value: Any) -> list[np.ndarray]:
    """Those that are a batch, or a part of a dict or dataclass; not those in lists."""
    if isinstance(value, np.ndarray):
        return [value]
    return [] if isinstance(value, list) else [array for _, inner in _items(value) for array in arrays(inner)]


def with_arrays(value: Any, others: dict[int, np.ndarray]) -> Any:
    """The same batch with other arrays, by the `id` of those in whose place they are."""
    if isinstance(value, np.ndarray):
        return others.get(id(value), value)
    return _map(value, lambda inner: with_arrays(inner, others))


def nbytes(value: Any) -> int:
    """Of all arrays in it."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(nbytes(inner) for _, inner in _items(value))


class Cuttable:
    """A batch of another kind: it says how many samples it has, and cuts itself."""

    def __len__(self) -> int:
        raise NotImplementedError

    def part(self, start: int, stop: int) -> Any:
        raise NotImplementedError


def _concatenate(arrays: Sequence[np.ndarray], empty: Empty) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    out = empty(shape, np.result_type(*arrays))
    return np.concatenate(arrays, out=out)


def _leaves(value: Any, where: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, np.ndarray):
        if value.ndim:
            yield where, len(value)
    elif isinstance(value, list | Cuttable):
        yield where, len(value)
    else:
        for name, inner in _items(value):
            yield from _leaves(inner, f"{where}, {name}")


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list):
        return [(str(index), inner) for index, inner in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    return []


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: change(inner) for key, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _items(value):
        return dataclasses.replace(value, **{name: change(inner) for name, inner in _items(value)})
    return value
