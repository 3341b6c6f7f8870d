"""What is printed when a run has ended: what was learned, on which problems, what it took, and what to try next.

Reads summary.json and config.toml only; knows nothing of models or actors. Needs rich.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .actors.report import EvaluationRecord, SamplePair
from .screen import duration, short

By = Literal["by_size", "by_dataset"]

NUM_RANGES = 4
"""Columns of the accuracy table: ranges of problem sizes."""

STILL_RISING = 0.01
"""Gain between the last two evaluations from which longer training is worth a try."""


def final_report(summary: Mapping[str, Any], run: Path, *, console: Console | None = None) -> None:
    """Prints the report of a run from its summary (keys: actors/report.py, SUMMARY); `run` is its directory."""
    console = console or Console(highlight=False)
    console.print()
    console.print(_headline(summary, run), soft_wrap=True)
    before, after = first_and_last(summary["evaluation"])
    if before is not None and after is not None:
        console.print()
        console.print(f"Accuracy on {after['n']} fixed problems, by their size", style="bold")
        console.print(accuracy_table(before, after))
        if len(after.get("by_dataset", {})) > 1:
            console.print()
            console.print("The same by puzzle", style="bold")
            console.print(accuracy_table(before, after, by="by_dataset"))
    if summary["samples"]:
        has_steps = _config(run).get("task", {}).get("kind", "running_sum") == "running_sum"
        console.print()
        console.print(
            "Greedy answers to problems that the warm-up left wrong"
            + ("; the first wrong step is in [ ]" if has_steps else ""),
            style="bold",
        )
        for sample in summary["samples"]:
            console.print()
            console.print(_side_by_side(sample, has_steps=has_steps))
    console.print()
    console.print("What to try next", style="bold")
    for why, command in suggestions(summary, run):
        console.print(Text.assemble((f"  # {why}\n", "dim"), f"  {command}"), soft_wrap=True)


def accuracy_table(before: EvaluationRecord, after: EvaluationRecord, *, by: By = "by_size") -> Table:
    """pass@1 and greedy accuracy of two evaluations by ranges of problem size, or by data set."""
    columns = {name: [name] for name in after.get(by, {})} if by == "by_dataset" else _sizes(after)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("all", justify="right")
    table.add_row(
        "problems",
        "",
        *(str(round(_over(after.get(by, {}), keys, 0)[0])) for keys in columns.values()),
        str(after["n"]),
        style="dim",
    )
    for name, column in (("greedy", 2), ("pass@1", 1)):
        for label, evaluation in ((_after(before), before), (_after(after), after)):
            scores = [_over(evaluation.get(by, {}), keys, column)[1] for keys in columns.values()]
            whole = evaluation["greedy"] if column == 2 else evaluation["pass_at_1"]
            style = "bold" if evaluation is after else ""
            first = name if evaluation is before else ""
            table.add_row(first, label, *(f"{s:.2f}" for s in scores), f"{whole:.3f}", style=style)
    return table


def first_and_last(
    evaluations: Sequence[EvaluationRecord],
) -> tuple[EvaluationRecord | None, EvaluationRecord | None]:
    """The last evaluation of SFT (or the first of all) and the last of all."""
    if not evaluations:
        return None, None
    before = [e for e in evaluations if e["stage"] == "sft"]
    return (before or list(evaluations))[-1 if before else 0], evaluations[-1]


def size_ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """At most NUM_RANGES ranges (first, last) that cover `sizes`, of nearly equally many sizes."""
    sizes = sorted(sizes)
    count = min(NUM_RANGES, len(sizes))
    edges = [-(-i * len(sizes) // count) for i in range(count + 1)] if count else []
    return [(sizes[a], sizes[b - 1]) for a, b in itertools.pairwise(edges)]


def wrong_step(answer: str, solution: str) -> tuple[int, int] | None:
    """Where the first step that differs from the solution begins and ends in `answer`; None if they are the same.

    A step begins at a letter or "#" (see actors/data/running_sum.py). An answer that stops early is marked at its end.
    """
    if answer == solution:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(answer, solution, strict=False)) if a != b), min(len(answer), len(solution))
    )
    starts = [m.start() for m in re.finditer(r"[a-z#]", answer)]
    begin = max((s for s in starts if s <= at), default=0) if at < len(answer) else len(answer)
    return begin, min((s for s in starts if s > max(at, begin)), default=len(answer))


def suggestions(summary: Mapping[str, Any], run: Path) -> list[tuple[str, str]]:
    """Reason and command of what could be done now; each command can be run as it stands."""
    launch = f"bin/launch {run / 'config.toml'}"
    steps = summary["steps"]
    found = []
    scores = [e["greedy"] for e in summary["evaluation"]]
    if steps and len(scores) > 1 and scores[-1] - scores[-2] > STILL_RISING:
        found.append(
            ("it was still getting better: train longer", f"{launch} {_named(run, 'long')} --set rl.steps={2 * steps}")
        )
    operands = _config(run).get("task", {}).get("max_operands", 0)
    if 0 < operands < 20:
        harder = f"--set task.max_operands={operands + 4}"
        found.append(("longer problems", f"{launch} {_named(run, 'hard')} {harder} --set rl.max_new_tokens=120"))
    if not sum(summary["restarts"].values()):
        found.append(
            (
                "kill -9 the trainer while it runs (the live screen shows its pid), and watch the run go on",
                f"{launch} {_named(run, 'killed')}",
            )
        )
    found.append(
        (
            "synchronous, for comparison: nothing stale is ever trained",
            f"{launch} {_named(run, 'sync')} --set rl.max_staleness=0",
        )
    )
    if (run / "tensorboard").is_dir():
        found.append(("all curves", f"tensorboard --logdir {run.parent}"))
    return found


def _headline(summary: Mapping[str, Any], run: Path) -> Text:
    stages = ", ".join(f"{stage.upper()} {duration(seconds)}" for stage, seconds in summary["stages"].items())
    restarts = {name: count for name, count in summary["restarts"].items() if count}
    tokens, staleness = summary["tokens"], summary["staleness"]
    how = "finished" if summary["ok"] else f"stopped ({summary['reason']})"
    text = Text.assemble((f"{summary['run']} {how}", "bold green" if summary["ok"] else "bold red"))
    text.append(f": {summary['steps']} RL steps in {duration(summary['wall_s'])}" + (f" ({stages})" if stages else ""))
    text.append(f"\n{short(tokens['sampled'])} tokens sampled, {short(tokens['trained'])} trained; staleness ")
    text.append(f"{staleness['mean']:.1f} on average, {staleness['max']} at most; ")
    text.append(f"memory {summary['peak_rss_bytes'] / 2**30:.1f} GiB")
    counts = ", ".join(f"{name} {count}" for name, count in restarts.items())
    text.append(f"\nrestarts: {counts or 'none'}; files are in {run}/")
    return text


def _sizes(evaluation: EvaluationRecord) -> dict[str, list[str]]:
    """Keys of `by_size` for each range of sizes, by its name."""
    sizes = sorted(int(size) for size in evaluation["by_size"])
    return {
        f"{low}-{high}" if low < high else str(low): [str(size) for size in sizes if low <= size <= high]
        for low, high in size_ranges(sizes)
    }


def _over(scores: Mapping[str, Sequence[float]], keys: Sequence[str], column: int) -> tuple[float, float]:
    """Problems under `keys`, and the mean of a column over them."""
    rows = [scores[key] for key in keys if key in scores]
    total = sum(row[0] for row in rows)
    return total, sum(row[0] * row[column] for row in rows) / total if total else 0.0


def _after(evaluation: EvaluationRecord) -> str:
    return "after SFT" if evaluation["stage"] == "sft" else f"after {evaluation['step']} RL steps"


def _side_by_side(sample: SamplePair, *, has_steps: bool) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    table.add_row("  problem", sample["prompt"])
    answers = (
        ("before", sample["before"], sample["before_correct"]),
        ("after", sample["after"], sample["after_correct"]),
    )
    for label, answer, correct in answers:
        verdict = Text("right", "green") if correct else Text("wrong", "red")
        table.add_row(f"  {label}", _marked(answer, sample["solution"]) if has_steps else Text(answer), verdict)
    return table


def _marked(answer: str, solution: str) -> Text:
    span = wrong_step(answer, solution)
    if span is None:
        return Text(answer)
    begin, end = span
    return Text.assemble(answer[:begin], (f"[{answer[begin:end] or 'stops'}]", "bold red"), answer[end:])


def _named(run: Path, suffix: str) -> str:
    return f"--set run.name={run.name}-{suffix}"


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    return tomllib.loads(path.read_text()) if path.is_file() else {}
