"""How answers look at the prompt: rows that are lists of dicts to a program, and a table to a person."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

MAX_ROWS = 200

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""But tabs and newlines."""


class Text(str):
    """A string that is shown as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return harmless(str(self).rstrip("\n"))


class Rows(list[Row]):
    """Rows that are shown as a table of `columns`: title -> what stands there."""

    def __init__(self, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], Any]], empty: str) -> None:
        super().__init__(rows)
        self._columns = columns
        self._empty = empty

    def __repr__(self) -> str:
        if not self:
            return self._empty
        cells = [[str(write(row)) for write in self._columns.values()] for row in self[:MAX_ROWS]]
        lines = align([list(self._columns), *cells])
        return harmless("\n".join(lines + ([f"... {len(self) - MAX_ROWS} more"] if len(self) > MAX_ROWS else [])))


def harmless(text: str) -> str:
    """Without what would do something to a terminal."""
    return _CONTROLS.sub("?", text)


def align(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns, each cell cut to its first line and 100 characters."""
    short = [[cell.partition("\n")[0][:100] for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in short) for i in range(len(short[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in short]


def tree_text(tree: Mapping[str, Any]) -> Text:
    """Groups and actors as a tree."""
    rows: list[list[str]] = []

    def group(name: str, depth: int) -> None:
        for actor in tree["actors"]:
            if actor["group"] == name:
                rows.append(
                    ["  " * depth + actor["name"], actor["node"], _state(actor), _mailbox(actor), _trouble(actor)]
                )
        for inner in tree["groups"]:
            if inner["parent"] == name:
                rows.append(["  " * depth + f"{inner['name']} ({inner['strategy']})", "", "", "", ""])
                group(inner["name"], depth + 1)

    group("root", 1)
    return Text("\n".join([tree["run"], *(align(rows) if rows else ["  no actors yet"])]))


def _state(actor: Row) -> str:
    state = "paused" if actor["paused"] else actor["state"]
    if state != "up" or not actor["running"]:
        return str(state)
    running = Counter(actor["running"])
    return "up, " + " ".join(f"{method} x{n}" if n > 1 else method for method, n in running.items())


def _mailbox(actor: Row) -> str:
    return "" if actor["waiting"] is None else f"mailbox {actor['waiting']}/{actor['capacity']}"


def _trouble(actor: Row) -> str:
    words = [f"restarts {actor['restarts']}"] if actor["restarts"] else []
    return "  ".join([*words, *([actor["reason"]] if actor["reason"] else [])])


def process_rows(rows: Sequence[Row]) -> Rows:
    """For ps()."""
    return Rows(rows, {
        "node": lambda r: r["node"], "pid": lambda r: r["pid"], "state": lambda r: r["state"],
        "memory": lambda r: f"{r['rss_bytes'] / 2**20:.0f} MiB", "cpu": lambda r: f"{r['cpu_s']:.1f} s",
        "threads": lambda r: r["threads"], "actors": lambda r: ", ".join(r["actors"]),
    }, "no process")  # fmt: skip


def wait_rows(rows: Sequence[Row]) -> Rows:
    """For waits(), those that wait longest first; tasks without a name that wait for the same are one row."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda r: -(r.get("waited_s") or 0.0)):
        owner = str(row.get("owner") or "")
        kind = "" if owner.startswith("Task-") else owner
        alike.setdefault((row["node"], kind, _whom(row), str(row.get("why"))), []).append(row)
    folded = [{**same[0], "count": len(same), "owner": key[1]} for key, same in alike.items()]
    return Rows(folded, {
        "who": lambda r: r["owner"] or _nameless(r), "waits for": _whom,
        "since": lambda r: _seconds(r.get("waited_s")), "until": lambda r: _seconds(r.get("left_s")),
        "why": lambda r: r.get("why") or r.get("unanswered", ""),
    }, "nobody waits")  # fmt: skip


def letter_rows(rows: Sequence[Row]) -> Rows:
    """For dead_letters()."""
    return Rows(rows, {
        "time": lambda r: clock(r.get("time")), "message": lambda r: f"{r.get('actor', '?')}.{r.get('method', '?')}",
        "from": lambda r: r.get("from", ""), "reason": lambda r: r.get("reason") or r.get("unanswered", ""),
    }, "no dead letters")  # fmt: skip


def setting_rows(rows: Sequence[Row]) -> Rows:
    """For settings()."""
    return Rows(rows, {
        "setting": lambda r: r["name"], "value": lambda r: r["value"],
        "": lambda r: "changed" if r["changed"] else "", "rule": lambda r: r["rule"],
        "of": lambda r: ", ".join(r["actors"]),
    }, "no settings")  # fmt: skip


def trace_line(row: Row) -> str:
    """One message of trace()."""
    waited = f"waited {_seconds(row.get('waited_s'))}, " if row.get("waited_s") is not None else ""
    items = f", {row['items']} items" if "items" in row else ""
    error = f", {row['error']}" if "error" in row else ""
    lost = f"[{row['dropped']} messages are missing here]\n" if row.get("dropped") else ""
    who = f"{row['from'].partition('#')[0]} -> {row['method']}{row['arguments']}"
    return f"{lost}{clock(row['time'])}  {who}  {waited}took {_seconds(row['took_s'])}{items}{error}"


def told_text(told: Sequence[Row]) -> Text:
    """For explain()."""
    lines = []
    if told and not any(part["told"] for part in told):
        whys = [part["error"].partition("LookupError: ")[2] or part["error"] for part in told if part.get("error")]
        return Text("; ".join(["nobody knows this sample", *whys]))
    for part in told:
        lines.append(f"{part['actor']}:" + ("" if part["told"] else f" {part.get('error') or 'nothing'}"))
        for event in part["told"] or ():
            at = event.get("time", event.get("at"))
            rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "at", "event"))
            lines.append(f"  {clock(at):<12}  {event.get('event', '')}  {rest}".rstrip())
    return Text("\n".join(lines) or "no actor explains samples")


def clock(seconds: float | None) -> str:
    """Unix seconds as a time of day."""
    return (
        "" if seconds is None else time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1000):03}"
    )


def _nameless(row: Row) -> str:
    if "target" not in row:
        return f"node {row['node']}"
    return f"{row['count']} tasks" if row["count"] > 1 else "a task"


def _whom(row: Row) -> str:
    return f"{row['target']}.{row['method']}" if "target" in row else ""


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.1f} s"
