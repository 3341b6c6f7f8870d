"""The state of a run: what a checkpoint holds besides the trainer's own, and how it is found again.

    checkpoints/rl-000120/   model.safetensors  config.json  optimizer...   the trainer's (trainer/checkpoint.py)
                             state.msgpack  pool.msgpack                    this file's
    checkpoints/LATEST       name of the newest whole one

Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime import wire
from ..runtime.codec import loads
from .types import Group

STATE, POOL, LATEST = "state.msgpack", "pool.msgpack", "LATEST"


@wire
@dataclass(kw_only=True)
class RunState:
    """Where a run stands. The controller changes it; nobody else holds a copy."""

    stage: str = "sft"
    """sft, rl, done"""
    step: int = 0
    """Steps of the stage that are done."""
    version: int = 0
    """Newest policy version: 0 untrained, 1 after SFT, one higher with each RL step."""
    next_ordinal: int = 0
    """Number of the next new prompt."""
    in_flight: dict[int, Group] = field(default_factory=dict)
    """Groups that are being generated or judged, half-written answers included, by ordinal."""
    ledger: dict[str, Any] = field(default_factory=dict)
    """Snapshot of the stream's accounting."""
    adaptation: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)
    """Totals that go on after a resume."""


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run directory, if there is one."""
    pointer = run / "checkpoints" / LATEST
    if not pointer.exists():
        return None
    folder = pointer.with_name(pointer.read_text().strip())
    if not folder.is_dir():
        raise FileNotFoundError(f"{pointer} names {folder.name}, which is not there; write the name of one that is into it")
    return folder


def load_state(run: Path) -> tuple[RunState, dict[str, Any] | None]:
    """State and pool snapshot of the newest checkpoint, or a fresh state. Raises FileNotFoundError, CodecError."""
    folder = latest_checkpoint(run)
    if folder is None:
        return RunState(), None
    state = loads((folder / STATE).read_bytes())
    assert isinstance(state, RunState)
    return state, loads((folder / POOL).read_bytes())


