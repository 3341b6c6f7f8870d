"""Where the ranks of a worker group find each other. Knows nothing of torch, or of what they do then."""

from __future__ import annotations

from pathlib import Path

from ..runtime.worker import Worker

LOOPBACK = "lo"
"""The interface of ranks on one host."""


def meeting_file(worker: Worker, run: Path) -> Path:
    """A file for the ranks of a worker's group in this epoch; it is new. Called as they start: by the first rank before
    the others."""
    meeting = run / "ranks" / f"{worker.name.partition('/')[0]}-{worker.epoch}"
    meeting.parent.mkdir(parents=True, exist_ok=True)
    if worker.rank == 0:
        meeting.unlink(missing_ok=True)  # An earlier process of this run has counted the same epochs.
    return meeting
