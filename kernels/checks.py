"""Refuses bad input before any launch, in one sentence: operation, argument, rule, value, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require(fine: bool, op: str, message: str) -> None:
    """Raises ValueError("op: message") unless `fine`."""
    if not fine:
        raise ValueError(f"{op}: {message}")


def require_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raises ValueError unless the tensor's dtype is one of `allowed`."""
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(tensor.dtype in allowed, op, f"{name} must be {kinds}, not {str(tensor.dtype).removeprefix('torch.')}")


def require_contiguous(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless each tensor (or None) is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            shape, strides = tuple(tensor.shape), tensor.stride()
            raise ValueError(f"{op}: {name} must be contiguous; shape {shape} has strides {strides}: use .contiguous()")


def require_device(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError unless each tensor (or None) is on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors on {like.device}; move it there")


def require_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Raises ValueError unless the tensor has this shape; -1 allows any size."""
    fine = tensor.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True))
    wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
    require(fine, op, f"{name} must have the shape [{wanted}], not {list(tensor.shape)}")


def require_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError unless low <= value <= high."""
    require(low <= value <= high, op, f"{name} must be from {low} to {high}, not {value}")


def require_one_of(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    require(value in allowed, op, f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
