"""The one door to cupy: imported when something on a GPU is wanted, and never before."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def cupy() -> Any:
    """Raises ImportError if it is not installed."""
    return importlib.import_module("cupy")


def nccl() -> Any:
    """cupy's binding of NCCL; it has nothing but `available` where NCCL is not found. Raises ImportError as above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cupy says, at length, what `available` says.
        return importlib.import_module("cupy.cuda.nccl")


def why_no_gpu(number: int = 0) -> str:
    """Why this process can't use a GPU through cupy; empty if it can."""
    try:
        runtime = cupy().cuda.runtime
    except ImportError as error:
        return f"cupy can't be imported ({error}); install headrace[cuda]"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"there is no GPU ({error})"
    return "" if number < count else f"there is no GPU {number}, only {count}"


def why_no_nccl() -> str:
    """Why this process can't use NCCL through cupy; empty if it can. A GPU is another question."""
    try:
        found = nccl().available
    except ImportError as error:
        return f"cupy can't be imported ({error}); install headrace[cuda]"
    return "" if found else "cupy finds no NCCL; install nvidia-nccl-cu13"


def gpu_uuid(number: int = 0) -> str:
    """What tells this GPU from all others: two processes with equal ones sit on one GPU. Empty without a GPU."""
    if why_no_gpu(number):
        return ""
    return bytes(cupy().cuda.runtime.getDeviceProperties(number)["uuid"]).hex()
