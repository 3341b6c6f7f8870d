"""The state of a run: what a checkpoint holds besides the trainer's own, and how it is found again.

    checkpoints/rl-000120/   model.safetensors  config.json  optimizer...   the trainer's (trainer/checkpoint.py)
                             state.msgpack  pool.msgpack                    this file's
                             critic/                                        the critic's, if there is one
    checkpoints/LATEST       name of the newest whole one

Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime import wire
from ..runtime.codec import loads
from ..runtime.errors import CodecError
from .types import Group

STATE, POOL, LATEST = "state.msgpack", "pool.msgpack", "LATEST"


@wire
@dataclass(kw_only=True)
class RunState:
    """Where a run stands. The controller changes it; nobody else holds a copy."""

    stage: str = "sft"
    """sft, value, rl, done"""
    sft_steps: int = 0
    """Warm-up steps that are done."""
    value_steps: int = 0
    """Steps of the critic's pretraining that are done."""
    rl_steps: int = 0
    critic_updates: int = 0
    """In both of these stages."""
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

    @property
    def step(self) -> int:
        """Steps of the stage that are done."""
        return {"sft": self.sft_steps, "value": self.value_steps}.get(self.stage, self.rl_steps)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run directory, if there is one.

    Raises FileNotFoundError, saying what to do, if the pointer leads nowhere.
    """
    pointer = run / "checkpoints" / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    if not name or not pointer.with_name(name).is_dir():
        others = sorted(path.name for path in pointer.parent.iterdir() if (path / STATE).is_file())
        remedy = f"write {others[-1]} into it" if others else "delete it to begin anew"
        raise FileNotFoundError(f"{pointer} names checkpoint {name!r}, which is not there; {remedy}")
    return pointer.with_name(name)


def load_state(run: Path) -> tuple[RunState, dict[str, Any] | None]:
    """State and pool snapshot of the newest checkpoint, or a fresh state.

    Raises FileNotFoundError or ValueError, saying what to do, if a part is missing or damaged.
    """
    folder = latest_checkpoint(run)
    if folder is None:
        return RunState(), None
    state, pool = _load(folder / STATE), _load(folder / POOL)
    assert isinstance(state, RunState)
    return state, pool


def _load(path: Path) -> Any:
    try:
        return loads(path.read_bytes())
    except (OSError, CodecError) as error:
        pointer = path.parent.with_name(LATEST)
        raise ValueError(
            f"checkpoint {path.parent} can't be read ({path.name}: {error}); "
            f"write the name of an older one into {pointer}"
        ) from None
