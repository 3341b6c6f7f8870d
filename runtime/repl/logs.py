"""Python's logging in the processes of a run: off until somebody sets a level at a prompt."""

from __future__ import annotations

import logging
from pathlib import Path

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def set_level(level: str, file: Path | None = None) -> None:
    """For all loggers that have none of their own; lines go to a file, or to standard error, the log of a node."""
    logging.basicConfig(filename=file, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger().setLevel(level)
