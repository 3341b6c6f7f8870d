"""Shows a run while it runs: a live screen on a terminal, one line a step anywhere else.

    with open_screen(plain=False) as screen:
        screen.update(progress)      as often as anything changes; see Progress in actors/report.py

Knows nothing of where the numbers come from. The live screen is in live.py, so that nothing here needs rich.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import IO, Any, Self

from .actors.report import STAGES, EvaluationRecord, Progress, Row

SFT_STEPS_PER_LINE = 25
HEADER_EVERY = 40

ROUTINE = frozenset({"system_start", "system_stop", "node_start", "pool_opened", "system_failed", "run_failed"})
"""Events that no screen shows: nothing new, or said at the end."""

Event = Mapping[str, Any]


class Screen:
    """Takes in what a run tells and keeps what was new. Subclasses show it."""

    def __init__(self) -> None:
        self.state: Progress = {}
        self.rows: list[Row] = []
        """All rows so far, whichever the updates held."""
        self._num_evaluations = 0
        self._last_event: Event | None = None
        self._first_news: tuple[int, int] | None = None

    def update(self, progress: Progress) -> None:
        """Shows the newest state. The caller may change `progress` afterwards."""
        self.state = {**self.state, **progress}
        last = _position(self.rows[-1]) if self.rows else (-1, 0)
        rows = [row for row in progress.get("rows", []) if _position(row) > last]
        self.rows += rows
        # A resumed run begins with the rows of earlier processes, which were shown in their time.
        resumed_s = self.state.get("resumed_s", 0.0)
        rows = [row for row in rows if row.get("elapsed_s") is None or row["elapsed_s"] > resumed_s]
        if rows and self._first_news is None:
            self._first_news = _position(rows[0])
        evaluations = progress.get("evaluations", [])[self._num_evaluations :]
        self._num_evaluations += len(evaluations)
        if self.rows:
            evaluations = [e for e in evaluations if self._first_news and _position(e) >= self._first_news]
        self.show(rows, evaluations, [e for e in self._new_events(progress) if e["event"] not in ROUTINE])

    def _new_events(self, progress: Progress) -> list[Event]:
        events: list[Event] = list(progress.get("events", []))
        seen = next((i for i in range(len(events) - 1, -1, -1) if events[i] == self._last_event), -1)
        if events:
            self._last_event = events[-1]
        return events[seen + 1 :]

    def show(self, rows: list[Row], evaluations: list[EvaluationRecord], events: list[Event]) -> None:
        """Called with what is new since the last update."""

    def close(self) -> None:
        """Leaves the terminal as it was. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class PlainScreen(Screen):
    """Lines of fixed columns, for logs, pipes and people who like them."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__()
        self._file = file or sys.stdout
        self._headed = ""
        self._since_header = 0
        self._last_sft_step = 0
        self._note = ""

    def show(self, rows: list[Row], evaluations: list[EvaluationRecord], events: list[Event]) -> None:
        """Prints a line for each step, evaluation and event, in this order."""
        for row in rows:
            if row["stage"] != "sft":
                self._print_row(row, _RL_COLUMNS if row["stage"] == "rl" else _VALUE_COLUMNS)
            elif row["step"] >= self._last_sft_step + SFT_STEPS_PER_LINE or row["step"] == self.state.get("steps"):
                self._last_sft_step = row["step"]
                self._print_row(row, _SFT_COLUMNS)
        for e in evaluations:
            self._print(
                f"{duration(self.state.get('elapsed_s', 0)):>6}  evaluation after {e['stage']} step {e['step']}: "
                f"pass@1 {e['pass_at_1']:.3f}, greedy {e['greedy']:.3f} ({e['n']} problems)"
            )
        for event in events:
            if event["event"] != "checkpoint" and not (event["event"] == "actor_up" and event.get("incarnation") == 1):
                self._print(
                    f"{duration(event['time'] - self.state.get('started', event['time'])):>6}  {describe(event)}"
                )
        if (note := self.state.get("note", "")) != self._note:
            self._note = note
            self._print(note)

    def _print_row(self, row: Row, columns: Mapping[str, int]) -> None:
        if self._headed != row["stage"] or self._since_header >= HEADER_EVERY:
            self._headed, self._since_header = row["stage"], 0
            self._print("  ".join(f"{name:>{width}}" for name, width in columns.items()))
        self._since_header += 1
        cells = _cells(row, self.state.get("steps", 0))
        self._print("  ".join(f"{cells[name]:>{width}}" for name, width in columns.items()))

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)


_SFT_COLUMNS = {"time": 6, "stage": 5, "step": 9, "loss": 7, "right tokens": 12, "trained/s": 9}
_VALUE_COLUMNS = {
    "time": 6, "stage": 5, "step": 9, "value loss": 10, "explained": 9, "pass": 5, "length": 6, "sampled/s": 9,
}  # fmt: skip
_RL_COLUMNS = {
    "time": 6, "stage": 5, "step": 9, "reward": 7, "pass": 5, "length": 6, "stale": 5, "sampled/s": 9, "trained/s": 9,
    "idle r/t": 8, "pool": 4, "running": 7,
}  # fmt: skip


def open_screen(*, plain: bool = False) -> Screen:
    """The live screen if standard output is a terminal that can show it, else (or if `plain`) lines."""
    if plain or not sys.stdout.isatty():
        return PlainScreen()
    from .live import LiveScreen, can_draw

    return LiveScreen() if can_draw() else PlainScreen()


def duration(seconds: float) -> str:
    """75.2 -> "1:15", 3723 -> "1:02:03"."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(number: float) -> str:
    """19812 -> "19.8k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def percent(share: float) -> str:
    """0.123 -> "12%"."""
    return f"{100 * share:.0f}%"


def describe(event: Event) -> str:
    """One line on an event: who, what, why."""
    subject = event.get("actor") or (f"node {event['node']}" if "node" in event else "")
    words = event["event"].removeprefix("actor_" if "actor" in event else "node_").replace("_", " ")
    shown = {k: v for k, v in event.items() if k not in _NOT_SHOWN and v not in ("", None)}
    reason = str(event.get("reason", "")).partition("\n")[0]
    details = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
    text = f"{subject}: {words}" if subject else words
    return text + (f" ({details})" if details else "") + (f": {reason}" if reason else "")


_NOT_SHOWN = frozenset({"time", "event", "actor", "node", "reason", "traceback", "log", "folder", "run_dir", "restart"})


def remaining_s(rows: Iterable[Row], stage: str, steps: int) -> float | None:
    """Seconds to the end of the stage at the pace of its last half; None if that can't be told yet."""
    own = [row for row in rows if row["stage"] == stage and row.get("elapsed_s") is not None]
    if len(own) < 3 or steps <= own[-1]["step"]:
        return None
    then, now = own[len(own) // 2 - 1], own[-1]
    return float((now["elapsed_s"] - then["elapsed_s"]) / (now["step"] - then["step"]) * (steps - now["step"]))


def _position(row: Mapping[str, Any]) -> tuple[int, int]:
    return STAGES.index(row["stage"]), row["step"]


def _cells(row: Row, steps: int) -> dict[str, str]:
    def cell(name: str, write: Any) -> str:
        value = row.get(name)
        return "-" if value is None else write(value)

    idle = [cell(name, percent) for name in ("rollout_idle_ratio", "trainer_idle_ratio")]
    return {
        "time": cell("elapsed_s", duration),
        "stage": row["stage"],
        "step": f"{row['step']}/{steps}" if steps else str(row["step"]),
        "loss": cell("loss", "{:.3f}".format),
        "value loss": cell("value_loss", "{:.3f}".format),
        "explained": cell("explained_variance", percent),
        "right tokens": cell("accuracy_ratio", percent),
        "reward": cell("reward_mean", "{:.3f}".format),
        "pass": cell("pass_ratio", percent),
        "length": cell("response_tokens_mean", "{:.0f}".format),
        "stale": cell("staleness_mean", "{:.1f}".format),
        "sampled/s": cell("sampled_tokens_per_s", short),
        "trained/s": cell("trained_tokens_per_s", short),
        "idle r/t": "/".join(idle),
        "pool": cell("pool_groups", str),
        "running": cell("running_groups", str),
    }
