"""The live screen: what a run does, on one terminal page, redrawn at most four times a second.

    80 x 24:  progress, curves, stream, actors, last events        from 132 x 30 on: charts beside the actors

Knows nothing of where the numbers come from. Needs rich.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .actors.report import EvaluationRecord, Row
from .screen import Event, Screen, describe, duration, percent, remaining_s, short

REDRAW_S = 0.25
SMALLEST, WIDE = (76, 20), (132, 30)
"""Columns and lines from which a page can be drawn, and from which there is room for charts."""

STREAM_COLUMNS = 80

_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BLOCKS = " ..::--=="
_STATE_STYLES = {"up": "green", "starting": "yellow", "down": "bold red", "stopped": "dim"}
_ALARMS = ("exit", "lost", "failed", "malformed", "late", "not_taken", "interrupted")
_STAGE_NAMES = {"sft": "SFT warm-up", "value": "value pretraining", "rl": "RL", "done": "finished"}


class LiveScreen(Screen):
    """Draws on the terminal's alternate screen, which is given back at the end."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console()
        self._events: list[Event] = []
        self._drawn_s = 0.0
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._live.start()

    def show(self, rows: list[Row], evaluations: list[EvaluationRecord], events: list[Event]) -> None:
        """Draws, unless it was done a moment ago: the next update will."""
        self._events = (self._events + events)[-100:]
        now = time.monotonic()
        if now - self._drawn_s >= REDRAW_S:
            self._drawn_s = now
            width, height = self._console.size
            self._live.update(self.page(width, height), refresh=True)

    def close(self) -> None:
        """Gives the terminal back. May be called twice."""
        self._live.stop()

    def page(self, width: int, height: int) -> RenderableType:
        """The whole screen, at most `height` lines of `width` columns."""
        return Page(self, width, height, ascii_only=self._console.options.ascii_only).render()

    @property
    def events(self) -> Sequence[Event]:
        """The last events, oldest first."""
        return self._events


def can_draw() -> bool:
    """Whether this terminal moves its cursor and has room for a page."""
    console = Console()
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and console.width >= SMALLEST[0]
        and console.height >= SMALLEST[1]
    )


class Page:
    """One drawing of a screen's state."""

    def __init__(self, screen: LiveScreen, width: int, height: int, *, ascii_only: bool = False) -> None:
        self.screen, self.state, self.rows = screen, screen.state, screen.rows
        self.width, self.height = width, height
        self.blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
        self.stage = self.state.get("stage", "sft")
        self.last = self.rows[-1] if self.rows else {}
        trained = self.last["stage"] if self.stage == "done" and self.last else self.stage
        self.stage_rows = [row for row in self.rows if row["stage"] == trained]
        steps = self.state.get("steps", 0)
        self.done = 1.0 if self.stage == "done" else min(1.0, self.state.get("step", 0) / steps) if steps else 0.0

    def render(self) -> RenderableType:
        """Top to bottom; the events fill what is left."""
        wide = self.width >= WIDE[0] and self.height >= WIDE[1]
        actors = self._actors()
        top: list[RenderableType] = [self._title(), self._bar(), Text()]
        if wide:
            room, lines = self.width - STREAM_COLUMNS - 4, max(actors.row_count + 6, 15)
            left = Group(*self._charts(room, lines))
            right = Group(self._stream(), Text(), actors)
            top += [_side_by_side(left, right, room), Text()]
            used = 3 + lines + 1
        else:
            top += [*self._curves(), Text(), self._stream(), Text(), actors, Text()]
            used = 3 + 2 + 1 + 4 + 1 + actors.row_count + 1 + 1
        return Group(*top, *self._event_lines(self.height - used))

    def _title(self) -> Text:
        step, steps = self.state.get("step", 0), self.state.get("steps", 0)
        left = Text.assemble(("headrace ", "bold cyan"), (self.state.get("run", ""), "bold"))
        middle = _STAGE_NAMES.get(self.stage, self.stage)
        if self.stage != "done":
            middle += f", step {step}" + (f" of {steps}" if steps else "")
        right = f"policy version {self.last['version']}" if "version" in self.last else ""
        gap = self.width - left.cell_len - len(right)
        return left + Text(f"{middle:^{max(1, gap)}}"[: max(1, gap)]) + Text(right, "dim")

    def _bar(self) -> RenderableType:
        elapsed = duration(self.state.get("elapsed_s", 0.0))
        steps = self.state.get("steps", 0)
        left_s = remaining_s(self.rows, self.stage, steps)
        words = elapsed if left_s is None else f"{elapsed}, about {duration(left_s)} left in this stage"
        if note := self.state.get("note"):
            words = f"{elapsed}  {note}"
        words = words[: self.width - 12]
        bar = ProgressBar(total=1.0, completed=self.done, width=self.width - len(words) - 2)
        return Columns([bar, Text(words)], padding=(0, 2, 0, 0))

    def _series(self) -> list[tuple[str, list[float], str]]:
        """The two curves of the stage: name, values, newest value in words."""
        names = [("loss", "loss", "{:.3f}"), ("right tokens", "accuracy_ratio", "{:.1%}")]
        if self.stage == "value":
            names = [("value loss", "value_loss", "{:.3f}"), ("explained", "explained_variance", "{:.1%}")]
        elif self.stage != "sft":
            names = [("reward", "reward_mean", "{:.3f}"), ("pass rate", "pass_ratio", "{:.1%}")]
        series = []
        for title, name, form in names:
            values = [float(row[name]) for row in self.stage_rows if row.get(name) is not None]
            series.append((title, values, form.format(values[-1]) if values else ""))
        return series

    def _curves(self) -> list[RenderableType]:
        (title, values, newest), second = self._series()
        if self.stage in ("sft", "value"):
            return [self._curve(title, values, newest), self._curve(*second)]
        return [self._curve(title, values, newest), self._scores()]

    def _curve(self, title: str, values: list[float], newest: str) -> Text:
        width = self.width - 24
        return Text.assemble(
            (f"{title:<13}", "dim"), (self._chart(values, width, 1)[0], "cyan"), "  ", (newest, "bold")
        )

    def _scores(self) -> Text:
        """pass@1 and greedy accuracy on the fixed problems, first and last."""
        scores = self.state.get("evaluations", [])
        text = Text("evaluation   ", "dim")
        if not scores:
            return text
        for name, key in (("pass@1", "pass_at_1"), ("greedy", "greedy")):
            values = [score[key] for score in scores]  # type: ignore[literal-required]
            room = (self.width - 13) // 2 - len(name) - 12
            shown = values if 5 * len(values) <= room else [values[0], *values[-max(1, room // 5 - 1) :]]
            text.append(f"{name} ", "dim")
            text.append(" ".join(f"{v:.2f}".removeprefix("0") for v in shown[:-1]) + " ")
            text.append(f"{shown[-1]:.3f}   ", "bold")
        return text

    def _chart(self, values: list[float], width: int, lines: int) -> list[str]:
        """`values` as block columns, `lines` high; `width` is the whole stage, so the curve grows with it."""
        if not values:
            return [" " * width] * lines
        columns = max(1, round(width * (self.done or 1.0)))
        starts = [i * len(values) // columns for i in range(columns)]
        ends = [max(a + 1, (i + 1) * len(values) // columns) for i, a in enumerate(starts)]
        means = [sum(values[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)]
        low, high = min(means), max(means)
        levels = len(self.blocks) - 1
        heights = [1 + round((lines * levels - 1) * (m - low) / (high - low or 1.0)) for m in means]
        return [
            "".join(self.blocks[min(levels, max(0, h - floor * levels))] for h in heights).ljust(width)
            for floor in range(lines - 1, -1, -1)
        ]

    def _charts(self, width: int, lines: int) -> list[RenderableType]:
        """Two charts, with the evaluations below in RL."""
        out: list[RenderableType] = []
        scores = self.state.get("evaluations", [])
        table_lines = min(len(scores), 5) + 1 if scores else 0
        each = max(2, (lines - 3 - table_lines) // 2)
        for title, values, newest in self._series():
            ends = f"  from {min(values):.3g} to {max(values):.3g}" if values else ""
            out.append(Text.assemble((f"{title}  ", "dim"), (newest, "bold"), (ends, "dim")))
            out += [Text(line, "cyan") for line in self._chart(values, width, each)]
        if scores:
            out.append(Text())
            table = Table.grid(padding=(0, 3, 0, 0))
            table.add_row(*(Text(name, "dim") for name in ("evaluation after", "pass@1", "greedy")))
            for score in scores[:1] + scores[1:][-(table_lines - 2) :] if table_lines > 2 else scores[:1]:
                after = f"{score['stage'].upper()} step {score['step']}"
                table.add_row(after, f"{score['pass_at_1']:.3f}", f"{score['greedy']:.3f}")
            out.append(table)
        return out

    def _stream(self) -> RenderableType:
        """What flows, in four lines."""
        last = self.last
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(5):
            grid.add_column(no_wrap=True)
        grid.add_row(*self._worker("rollout", "sampled_tokens_per_s", "rollout_idle_ratio"), *self._pair("pool", [
            (last.get("pool_groups"), "ready"), (last.get("running_groups"), "running"),
            (last.get("partial_groups"), "partial"),
        ]))  # fmt: skip
        grid.add_row(
            *self._worker("trainer", "trained_tokens_per_s", "trainer_idle_ratio"),
            Text("staleness", "dim"),
            self._staleness(),
        )
        length, filtered = last.get("response_tokens_mean"), self._filtered()
        grid.add_row(
            Text("length", "dim"), Text("-" if length is None else f"{length:.0f} tokens"),
            Text("" if length is None else f"{percent(last.get('truncated_ratio') or 0)} cut", "dim"),
            Text("filtered", "dim"), Text("-" if filtered is None else f"{percent(filtered)} of groups"),
        )  # fmt: skip
        rss = self.state.get("rss_bytes")
        restarts = sum(actor.get("restarts", 0) for actor in self.state.get("actors", []))
        grid.add_row(
            Text("memory", "dim"), Text("-" if not rss else f"{rss / 2**30:.2f} GiB"), "",
            Text("restarts", "dim"), Text(str(restarts), "bold yellow" if restarts else ""),
        )  # fmt: skip
        return grid

    def _worker(self, name: str, rate: str, idle: str) -> list[Text]:
        speed, share = self.last.get(rate), self.last.get(idle)
        return [
            Text(name, "dim"),
            Text("-" if speed is None else f"{short(speed)} tokens/s"),
            Text("" if share is None else f"{percent(share)} idle", "dim"),
        ]

    def _pair(self, name: str, counts: list[tuple[int | None, str]]) -> list[Text]:
        words = [f"{count} {what}" for count, what in counts if count is not None]
        return [Text(name, "dim"), Text(", ".join(words) or "-")]

    def _staleness(self) -> Text:
        """Each staleness with a bar for its share of the trained groups."""
        counts = self.state.get("staleness", [])
        if not sum(counts):
            return Text("-")
        top = max(counts)
        text = Text()
        for value, count in enumerate(counts[:8]):
            level = (len(self.blocks) - 1) * count / top
            text.append(f"{value}", "dim")
            text.append(f"{self.blocks[max(round(level), 1 if count else 0)]} ", "cyan")
        mean = sum(value * count for value, count in enumerate(counts)) / sum(counts)
        return text.append(f" mean {mean:.1f}")

    def _filtered(self) -> float | None:
        filtered, accepted = self.last.get("filtered_groups"), self.last.get("accepted_groups")
        return None if filtered is None or not filtered + (accepted or 0) else filtered / (filtered + (accepted or 0))

    def _actors(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        for name, justify in (
            ("actor", "left"),
            ("node", "left"),
            ("state", "left"),
            ("pid", "right"),
            ("restarts", "right"),
        ):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("", no_wrap=True, overflow="ellipsis")
        for actor in self.state.get("actors", []):
            restarts, state = actor.get("restarts", 0), actor.get("state", "")
            table.add_row(
                actor.get("name", ""), Text(actor.get("node", ""), "dim"), Text(state, _STATE_STYLES.get(state, "")),
                Text(str(actor.get("pid", "")), "dim"), Text(str(restarts), "yellow" if restarts else "dim"),
                Text("" if state == "up" else actor.get("reason", "").partition("\n")[0], "red"),
            )  # fmt: skip
        return table

    def _event_lines(self, room: int) -> list[RenderableType]:
        started = self.state.get("started", 0.0)
        lines: list[RenderableType] = []
        for event in list(self.screen.events)[-room:] if room > 0 else []:
            alarm = any(word in event["event"] for word in _ALARMS)
            text = Text.assemble(
                (f"{duration(event['time'] - started):>6}  ", "dim"), (describe(event), "red" if alarm else "")
            )
            text.truncate(self.width, overflow="ellipsis")
            text.no_wrap = True
            lines.append(text)
        return lines


def _side_by_side(left: RenderableType, right: RenderableType, width: int) -> Table:
    grid = Table.grid()
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(width=4)
    grid.add_column(width=STREAM_COLUMNS, no_wrap=True, overflow="ellipsis")
    grid.add_row(left, "", right)
    return grid
