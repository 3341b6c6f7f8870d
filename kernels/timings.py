"""Timings of kernels by configuration and load: a file that a device wrote, and what answers in the device's place.

    tests/gpu/run --measures--> timings.json --Replay--> measure(kernel, load, config, runs) -> seconds

The file is JSON for people to read: for each kernel and shape its configurations, and for each load the seconds of
each of them, several runs. Knows nothing of how a configuration is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .buckets import Load

FORMAT = 1

Config = Mapping[str, int]
"""Macros of a kernel's source, by name."""


def label(config: Config) -> str:
    """A configuration as one word: BLOCK=256,VEC=8."""
    return ",".join(f"{name}={value}" for name, value in sorted(config.items())) or "default"


@dataclass(frozen=True)
class Cell:
    """What was measured of one kernel and shape under one load."""

    load: Load
    seconds: Mapping[str, tuple[float, ...]]
    """Runs of each configuration, by its label."""


@dataclass
class Timings:
    """A recorded table."""

    device: str
    measured: bool
    """False for a table that a model computed."""
    versions: dict[str, str] = field(default_factory=dict)
    cells: dict[str, list[Cell]] = field(default_factory=dict)
    """By "kernel/shape"."""

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        table = {
            name: [
                {"tokens": c.load.tokens, "skew": c.load.skew, "active": c.load.active, "seconds": dict(c.seconds)}
                for c in cells
            ]
            for name, cells in self.cells.items()
        }
        text = json.dumps(
            {
                "format": FORMAT, "device": self.device, "measured": self.measured, "versions": self.versions,
                "cells": table,
            },
            indent=1,
        )  # fmt: skip
        beside = path.with_name(path.name + ".new")
        beside.write_text(text + "\n")
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Timings:
        """Raises ValueError, saying what is wrong where, for a file that is no timing table."""
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
            cells = {
                name: [
                    Cell(
                        Load(int(row["tokens"]), float(row["skew"]), int(row["active"])),
                        {config: tuple(map(float, runs)) for config, runs in row["seconds"].items()},
                    )
                    for row in rows
                ]
                for name, rows in data["cells"].items()
            }
            return cls(str(data["device"]), bool(data["measured"]), dict(data["versions"]), cells)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a timing table ({error}); record it again with tests/gpu/run") from None


class Replay:
    """Answers as the device did: run after run of the table, from the first again when they are used up."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._cells = {cell.load: cell for cell in cells}
        self._next: dict[tuple[Load, str], int] = {}
        self.num_runs = 0
        """Runs that were asked for."""

    @property
    def loads(self) -> list[Load]:
        return list(self._cells)

    def measure(self, load: Load, config: str, runs: int) -> list[float]:
        """Seconds of `runs` runs. Raises KeyError for a load or configuration that was not recorded."""
        recorded = self._cells[load].seconds[config]
        at = self._next.get((load, config), 0)
        self._next[load, config] = at + runs
        self.num_runs += runs
        return [recorded[i % len(recorded)] for i in range(at, at + runs)]
