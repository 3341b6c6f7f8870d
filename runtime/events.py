"""events.jsonl: one line per thing that happened to the system (starts, deaths, restarts, swaps, drops)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

Event = dict[str, Any]


class EventLog:
    """Appends events to a file, keeps the last ones, tells listeners. One line is one write: readers never see half."""

    def __init__(self, path: Path | None, *, keep: int = 200) -> None:
        self._file = path.open("ab", buffering=0) if path is not None else None
        self.recent: deque[Event] = deque(maxlen=keep)
        self.listeners: list[Callable[[Event], None]] = []

    def write(self, event: str, **fields: Any) -> None:
        """Writes `{"time": unix seconds, "event": event, **fields}`."""
        line: Event = {"time": round(time.time(), 3), "event": event, **fields}
        self.recent.append(line)
        if self._file is not None:
            self._file.write(_dump(line) + b"\n")
        for listener in self.listeners:
            listener(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _dump(line: Event) -> bytes:
    try:
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:
        # What can't be JSON (a number beyond 64 bits, half a character) is still worth a line.
        return orjson.dumps({key: value if key in ("time", "event") else ascii(value) for key, value in line.items()})
