"""Plain lines and the live page, from the same updates."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from headrace.live import SMALLEST, WIDE, LiveScreen
from headrace.screen import PlainScreen, describe, duration, percent, remaining_s, short

STARTED = 1_000_000.0
NAMES = ("controller", "pool", "evaluator", "rollout", "trainer", "verifier", "reward")


def sft_row(step: int) -> dict[str, Any]:
    return {
        "stage": "sft", "step": step, "version": 0, "elapsed_s": 0.2 * step, "loss": 3.0 - step / 100,
        "accuracy_ratio": step / 300, "trained_tokens_per_s": 22_100,
    }  # fmt: skip


def rl_row(step: int) -> dict[str, Any]:
    return {
        "stage": "rl", "step": step, "version": step + 1, "elapsed_s": 60.0 + step, "reward_mean": step / 200,
        "pass_ratio": step / 250, "response_tokens_mean": 43.2, "truncated_ratio": 0.01, "staleness_mean": 1.3,
        "sampled_tokens_per_s": 19_812, "trained_tokens_per_s": 15_100, "rollout_idle_ratio": 0.04,
        "trainer_idle_ratio": 0.12, "pool_groups": 14, "running_groups": 40, "partial_groups": 3,
        "filtered_groups": 10, "accepted_groups": 30,
    }  # fmt: skip


def evaluation(stage: str, step: int, score: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "version": 1,
        "pass_at_1": score,
        "greedy": score + 0.01,
        "n": 512,
        "by_size": {},
    }


def progress(rl_steps: int) -> Any:
    """A run of 100 SFT and 200 RL steps that has done `rl_steps`."""
    rows = [sft_row(step) for step in range(5, 101, 5)] + [rl_row(step) for step in range(1, rl_steps + 1)]
    tree = [{"name": n, "node": n, "state": "up", "pid": 4700, "restarts": 0, "reason": ""} for n in NAMES]
    tree[4] |= {"state": "down", "restarts": 2, "reason": "killed by SIGKILL"}
    return {
        "run": "default", "stage": "rl", "step": rl_steps, "steps": 200, "elapsed_s": rows[-1]["elapsed_s"],
        "rows": rows,
        "evaluations": [evaluation("sft", 100, 0.4), *(evaluation("rl", s, 0.5) for s in range(20, rl_steps + 1, 20))],
        "staleness": [30, 44, 20, 5, 1], "started": STARTED, "rss_bytes": 3 << 29, "actors": tree,
        "events": [
            {"time": STARTED + 1, "event": "system_start", "pid": 1},
            {"time": STARTED + 2, "event": "actor_up", "actor": "trainer", "incarnation": 1, "pid": 5},
            {"time": STARTED + 70, "event": "node_exit", "node": "trainer", "reason": "killed by SIGKILL", "log": "x"},
            {"time": STARTED + 70, "event": "actor_restart", "actor": "trainer", "reason": "killed by SIGKILL"},
            {"time": STARTED + 71, "event": "actor_up", "actor": "trainer", "incarnation": 2, "pid": 6},
        ],
    }  # fmt: skip


def lines_of(*updates: Any) -> list[str]:
    file = io.StringIO()
    screen = PlainScreen(file)
    for update in updates:
        screen.update(update)
    return file.getvalue().splitlines()


def replay(rl_steps: int) -> list[Any]:
    """One update for each row, as a run gives them."""
    whole = progress(rl_steps)
    updates = []
    for i, row in enumerate(whole["rows"]):
        done = [
            e
            for e in whole["evaluations"]
            if (e["stage"] == "sft", -e["step"]) >= (row["stage"] == "sft", -row["step"])
        ]
        updates.append(
            {
                **whole, "rows": whole["rows"][: i + 1], "stage": row["stage"], "step": row["step"],
                "steps": 100 if row["stage"] == "sft" else 200, "elapsed_s": row["elapsed_s"], "evaluations": done,
                "events": [e for e in whole["events"] if e["time"] <= STARTED + row["elapsed_s"]],
            }
        )  # fmt: skip
    return updates


def test_plain_prints_one_line_a_step_and_says_each_thing_once() -> None:
    lines = lines_of(*replay(45))
    assert [int(m[1]) for line in lines if (m := re.search(r" rl +(\d+)/200 ", line))] == list(range(1, 46))
    assert [int(m[1]) for line in lines if (m := re.search(r" sft +(\d+)/100 ", line))] == [25, 50, 75, 100]
    assert [line.split("evaluation ")[1] for line in lines if "evaluation" in line] == [
        "after sft step 100: pass@1 0.400, greedy 0.410 (512 problems)",
        "after rl step 20: pass@1 0.500, greedy 0.510 (512 problems)",
        "after rl step 40: pass@1 0.500, greedy 0.510 (512 problems)",
    ]
    assert [line for line in lines if "trainer" in line] == [
        "  1:10  node trainer: exit: killed by SIGKILL",
        "  1:10  trainer: restart: killed by SIGKILL",
        "  1:11  trainer: up (incarnation 2, pid 6)",
    ]


def test_plain_columns_are_aligned_under_a_header_that_is_seldom_repeated() -> None:
    lines = lines_of(*replay(85))
    headers = [i for i, line in enumerate(lines) if "reward" in line]
    assert len(headers) == 3
    ends = [m.end() for m in re.finditer(r"\S+(?: \S+)*", lines[headers[0]])]
    for line in lines[headers[0] :]:
        if re.search(r" rl +\d+/200 ", line):
            assert [m.end() for m in re.finditer(r"\S+", line)] == ends


def test_plain_shows_missing_numbers_as_dashes() -> None:
    (header, line) = lines_of({"rows": [{"stage": "rl", "step": 1, "reward_mean": None}]})
    assert len(header) == len(line)
    assert line.split() == ["-", "rl", "1", "-", "-", "-", "-", "-", "-", "-/-", "-", "-"]


def test_rows_may_come_whole_or_only_when_new() -> None:
    whole = replay(30)
    new = [{**update, "rows": update["rows"][-1:]} for update in whole]
    assert lines_of(*new) == lines_of(*whole)


def test_a_controller_that_comes_back_repeats_nothing() -> None:
    updates = replay(30)
    assert lines_of(*updates, updates[-5], *updates[-5:]) == lines_of(*updates)


def test_a_resumed_run_does_not_print_its_past() -> None:
    whole = progress(60)
    past = progress(59) | {"elapsed_s": 200.0, "resumed_s": 200.0}
    assert [line for line in lines_of({"rows": []}, past) if "/200" in line or "evaluation" in line] == []
    later = {**whole, "rows": [*past["rows"], rl_row(60) | {"elapsed_s": 201.0}], "elapsed_s": 201.0}
    shown = [line for line in lines_of({"rows": []}, past, later) if "/200" in line or "evaluation" in line]
    assert [line.split()[2] for line in shown] == ["60/200", "after"]


def test_plain_says_a_note_once() -> None:
    draining = {"note": "draining"}
    assert lines_of({}, draining, draining, {"note": ""}).count("draining") == 1


def page(width: int, height: int, state: Any, *, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    console = Console(width=width, height=height, file=file, force_terminal=True, record=True, color_system=None)
    screen = LiveScreen(console)
    screen.update(state)
    screen.close()
    console.export_text()
    console.print(screen.page(width, height))
    return [line.rstrip() for line in console.export_text().rstrip("\n").split("\n")]


@pytest.mark.parametrize(("width", "height"), [SMALLEST, (80, 24), (100, 50), WIDE, (140, 40), (250, 70)])
@pytest.mark.parametrize("state", [{}, progress(57), progress(0) | {"stage": "rl", "step": 0}, replay(3)[10]])
def test_a_page_fits_its_terminal(width: int, height: int, state: Any) -> None:
    lines = page(width, height, state)
    if height >= 24:
        assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_the_small_page_has_everything() -> None:
    text = "\n".join(page(80, 24, progress(57)))
    for part in (
        "headrace default", "RL, step 57 of 200", "policy version 58", "1:57", "about 2:23 left in this stage", "0.285",
        "pass@1 .40 .50 0.500", "greedy .41 .51 0.510", "19.8k tokens/s  4% idle", "15.1k tokens/s  12% idle",
        "14 ready, 40 running, 3 partial", "mean 1.0", "43 tokens", "25% of groups", "1.50 GiB", *NAMES,
        "killed by SIGKILL", "1:10  node trainer: exit", "1:11  trainer: up",
    ):  # fmt: skip
        assert part in text, part


def test_the_wide_page_has_charts_and_the_table_of_evaluations() -> None:
    lines = page(140, 40, progress(57))
    text = "\n".join(lines)
    for part in ("pass rate  22.8%", "from ", "evaluation after   pass@1   greedy", "SFT step 100", "RL step 40"):
        assert part in text, part
    assert sum("\u2588" in line for line in lines) >= 4


def test_curves_grow_with_the_stage_and_rise_with_the_reward() -> None:
    def curve(steps: int) -> str:
        line = next(line for line in page(80, 24, progress(steps)) if line.startswith("reward "))
        return re.sub(r"[^\u2581-\u2588]", "", line)

    assert len(curve(50)) < len(curve(100)) < len(curve(200))
    assert list(curve(200)) == sorted(curve(200))
    assert len(curve(1)) == 1


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert "\n".join(page(80, 24, progress(57), encoding="ascii")).isascii()


def test_a_finished_run_has_a_full_bar() -> None:
    bar = page(80, 24, progress(200) | {"stage": "done", "step": 0})[1]
    assert "\u2578" not in bar
    assert "left in this stage" not in bar


def test_the_live_screen_draws_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("headrace.live.time.monotonic", lambda: now[0])
    screen = LiveScreen(Console(file=io.StringIO(), force_terminal=True, width=80, height=24))
    drawn = []
    monkeypatch.setattr(screen, "page", lambda width, height: drawn.append(now[0]) or "")
    for step in range(100):
        now[0] = 1.0 + step / 50
        screen.update(progress(1))
    screen.close()
    screen.close()
    assert len(drawn) == 8
    assert len(screen.events) == 4


def test_plain_screens_need_no_rich() -> None:
    code = "import sys; from headrace.screen import open_screen; open_screen().close(); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_events_in_words() -> None:
    assert describe({"time": 1, "event": "checkpoint", "actor": "controller", "step": 4, "folder": "x"}) == (
        "controller: checkpoint (step 4)"
    )
    assert describe(
        {"time": 1, "event": "actor_exit", "actor": "a", "reason": "ValueError: no\nmore", "traceback": "T"}
    ) == ("a: exit: ValueError: no")
    assert describe({"time": 1, "event": "malformed_message", "sender": "x#1"}) == "malformed message (sender x#1)"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (75, "1:15"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(number=st.floats(0, 9.9e11))
def test_short_numbers_are_near_and_short(number: float) -> None:
    text = short(number)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1.0)
    assert float(text.rstrip("kMG")) * scale == pytest.approx(number, rel=6e-3)


def test_percent() -> None:
    assert [percent(x) for x in (0, 0.004, 0.126, 1)] == ["0%", "0%", "13%", "100%"]


def test_the_end_is_told_from_the_pace_of_late() -> None:
    rows = [
        {"stage": "rl", "step": s, "elapsed_s": 100.0 + (5 * s if s <= 10 else 50 + (s - 10))} for s in range(1, 21)
    ]
    assert remaining_s(rows, "rl", 30) == pytest.approx(10.0)
    assert remaining_s(rows, "rl", 20) is None
    assert remaining_s(rows[:2], "rl", 20) is None
    assert remaining_s(rows, "sft", 30) is None
