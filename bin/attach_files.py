"""A run that works no more, seen through its files, which are only read: explain, tail, summary."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .attach_names import help_text, tail_file
from .attach_tables import Text, told_text


class Files:
    """What can be called at the prompt of a run that has ended."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def summary(self) -> dict[str, Any]:
        """summary.json: how the run ended"""
        try:
            summary: dict[str, Any] = json.loads((self._run / "summary.json").read_bytes())
        except FileNotFoundError:
            raise LookupError(f"{self._run} has no summary.json: the run was interrupted") from None
        return summary

    def explain(self, sample: int) -> Text:
        """what happened to a sample, from the journal of the pool: explain(17)"""
        journal = self._run / "journal" / "pool"
        if not journal.exists():
            raise LookupError(f"{journal} is not there: this run has kept no samples")
        from .actors.stream.stories import described
        from .runtime.journal import Journal
        from .runtime.pool_state import Pool

        with tempfile.TemporaryDirectory(prefix="headrace-attach-") as scratch:
            copy = Path(scratch) / "pool"
            shutil.copyfile(journal, copy)  # Opening a journal claims it, and cuts off what is torn.
            journaled = Journal(copy)
            entries = [record[2] for record in journaled.replay() if record[0] in ("put", "keep")]
            journaled.close()
            pool = Pool(capacity=1, journal=Journal(copy))
            told, known = pool.explain(sample), pool.snapshot()["history"]
            pool.close()
        group = next((entry.payload for entry in entries if entry.id == sample), None)
        told += [] if group is None else described(group)
        missing = f"nothing is known of sample {sample}" + (
            f"; known are some of {min(known)} to {max(known)}" if known else ""
        )
        return told_text([{"actor": "pool", "told": told, "error": missing}])

    def tail(self, what: str = "events", lines: int = 10) -> Text | None:
        """the last events, or lines of a node's log: tail("rollout", lines=50)"""
        return tail_file(self._run, what, lines, follow=False)

    def help(self) -> Text:
        """this list"""
        return help_text(self, NAMES)


NAMES = ("explain", "summary", "tail", "help")


def offline_names(run: Path) -> dict[str, Any]:
    """What code at the prompt sees."""
    files = Files(run)
    return {"__name__": "__console__", **{name: getattr(files, name) for name in NAMES}}
