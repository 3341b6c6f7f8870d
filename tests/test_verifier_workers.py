"""Verdicts from processes that may be killed: hostile answers, limits, deaths of all kinds, nothing left behind."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from hostile_answers import HOSTILE, MARKER, WANTED
from sample_actors import until

from headrace.actors.verifier.case import Case
from headrace.actors.verifier.judging import ByWorkers
from headrace.actors.verifier.workers import Limits

FUNCTIONS = "verifier_functions"
SHORT = Limits(cpu_s=1.0, wall_s=60.0)


def case(response: str, reference: str = WANTED, **fields: str) -> Case:
    return Case(reference=reference, response=response, **fields)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
async def opened():
    """Judges made by this are closed in time, and leave no process behind."""
    made = []

    def keep(judging: ByWorkers) -> ByWorkers:
        made.append(judging)
        return judging

    yield keep
    for judging in made:
        pids = judging._pool.pids
        pids += [child for pid in pids if not gone(pid) for child in children(pid)]
        async with asyncio.timeout(30):
            await judging.close()
        await until(lambda pids=pids: all(map(gone, pids)))


@pytest.fixture
def functions(opened, monkeypatch):
    """By a function of verifier_functions.py."""
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def make(name: str, limits: Limits = SHORT, **options: object) -> ByWorkers:
        return opened(ByWorkers.function(f"{FUNCTIONS}:{name}", options, workers=1, limits=limits))

    return make


def by_rule(name: str, limits: Limits = SHORT, workers: int = 1, **policies: dict) -> ByWorkers:
    return ByWorkers.rule(name, {"": {}, **policies}, workers=workers, limits=limits)


# Hostile text


def test_the_hostile_set_is_large_enough():
    assert len(HOSTILE) == len(set(HOSTILE)) >= 60


@pytest.mark.slow
async def test_hostile_answers_end_with_a_verdict_and_nothing_runs(opened, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setenv("HEADRACE_SECRET", "sesame")
    judging = opened(by_rule("math", Limits(cpu_s=0.3, wall_s=60.0), workers=2))
    texts = [text.replace(MARKER, str(marker)) for text in HOSTILE]
    verdicts = await asyncio.gather(*(judging.judge(case(text)) for text in texts))
    assert not [(text[:60], v) for text, v in zip(texts, verdicts, strict=True) if v.correct or v.error]
    assert not marker.exists()
    assert all("sesame" not in v.note for v in verdicts)
    assert (await judging.judge(case(f"\\boxed{{{WANTED}}}"))).correct


async def test_the_alarm_rings_if_a_rule_is_misled(functions, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_SECRET", "sesame")
    judging = functions("betray")
    judging._pool._spec["harden"] = True  # As a rule of ours would run.
    marker = tmp_path / "marker"
    for response in ("write", "run", "fork"):
        verdict = await judging.judge(case(response, reference=str(marker)))
        assert "tried what is forbidden" in verdict.error and not marker.exists()
    assert not (await judging.judge(case("environment"))).correct
    assert (await judging.judge(case("read"))).correct, "libraries load parts of themselves late"


async def test_other_rules_are_killed_in_time_too(opened):
    regex = opened(by_rule("regex", Limits(cpu_s=0.3, wall_s=60.0)))
    verdict = await regex.judge(case("a" * 40 + "b", reference="(a+)+"))
    assert not verdict.correct and not verdict.error and "processor time" in verdict.note
    assert (await regex.judge(case("aaa", reference="(a+)+"))).correct


async def test_references_past_the_limits_and_policies_by_data_set(opened):
    judging = opened(by_rule("math", Limits(cpu_s=0.3, wall_s=60.0), gsm8k={"percent": "ignore"}))
    verdict = await judging.judge(case("5", reference="9^{9^{9^{9}}}", row="train.jsonl:12"))
    assert verdict.kind == "bad reference" and verdict.error.startswith("train.jsonl:12: the reference is past")
    verdict = await judging.judge(case("5", reference="}{", row="train.jsonl:13"))
    assert verdict.kind == "bad reference" and verdict.error.startswith("train.jsonl:13: the reference can't be read")
    assert not (await judging.judge(case("Answer: 1/2", reference="50%", dataset="gsm8k"))).correct
    assert (await judging.judge(case("Answer: 1/2", reference="50%"))).correct


# Deaths


async def test_killed_workers_are_replaced(opened):
    judging = opened(by_rule("exact"))
    assert (await judging.judge(case(WANTED))).correct
    [guard] = judging._pool.pids
    [child] = children(guard)
    os.kill(child, signal.SIGKILL)
    verdict = await judging.judge(case(WANTED))
    assert verdict.correct or (verdict.kind == "worker died" and verdict.retryable)
    assert (await judging.judge(case(WANTED))).correct and judging._pool.pids == [guard], "its guard lives on"
    [child] = children(guard)
    os.kill(guard, signal.SIGKILL)
    await until(lambda: gone(child))
    verdict = await judging.judge(case(WANTED))
    assert verdict.kind == "worker died" and verdict.retryable
    assert (await judging.judge(case(WANTED))).correct


async def test_a_killed_pool_leaves_no_process(tmp_path):
    program = tmp_path / "pool.py"
    program.write_text(
        "import asyncio\n"
        "from headrace.actors.verifier.case import Case\n"
        "from headrace.actors.verifier.judging import ByWorkers\n"
        "from headrace.actors.verifier.workers import Limits\n"
        "async def main():\n"
        "    judging = ByWorkers.rule('regex', {'': {}}, workers=1, limits=Limits(cpu_s=60.0, wall_s=90.0))\n"
        "    await judging.judge(Case(reference='a', response='a'))\n"
        "    print(*judging._pool.pids, flush=True)\n"
        "    await judging.judge(Case(reference='(a+)+', response='a' * 40 + 'b'))\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", str(program), stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    guard = int(await process.stdout.readline())
    [child] = await until(lambda: children(guard))
    process.kill()
    await process.wait()
    await until(lambda: gone(guard) and gone(child))


async def test_who_gives_up_waiting_costs_a_worker_and_no_more(opened):
    judging = opened(by_rule("regex", Limits(cpu_s=60.0, wall_s=60.0)))
    await judging.judge(case("a", reference="a"))
    [guard] = judging._pool.pids
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await judging.judge(case("a" * 40 + "b", reference="(a+)+"))
    await until(lambda: gone(guard))
    assert (await judging.judge(case("a", reference="a"))).correct


async def test_closing_does_not_wait_for_what_is_under_way():
    judging = by_rule("regex", Limits(cpu_s=60.0, wall_s=60.0))
    await judging.judge(case("a", reference="a"))
    [guard] = judging._pool.pids
    busy = asyncio.create_task(judging.judge(case("a" * 40 + "b", reference="(a+)+")))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        await judging.close()
        assert (await busy).kind in ("worker died", "no worker")
        await judging.close()
    await until(lambda: gone(guard))
    assert (await judging.judge(case("a", reference="a"))).kind == "no worker"


# Functions of the user's own


async def test_a_function_and_a_class(functions):
    judging = functions("judge")
    assert (await judging.judge(case("a+2=02#02", reference="02"))).correct
    assert not (await judging.judge(case("02", reference="03"))).correct
    verdict = await functions("Closeness", scale=10.0).judge(case("8", reference="10"))
    assert verdict.correct and verdict.reward == pytest.approx(0.8)


async def test_whatever_a_function_does_is_an_error_value(functions):
    judging = functions("misbehave", Limits(cpu_s=0.5, wall_s=60.0, memory_bytes=2 << 30))
    kinds = {
        "raise": ("raised", False), "busy": ("raised", True), "nan": ("raised", False), "none": ("raised", False),
        "exit": ("worker died", True), "segfault": ("worker died", False), "spin": ("worker died", False),
        "eat": ("worker died", False),
    }  # fmt: skip
    for response, (kind, retryable) in kinds.items():
        verdict = await judging.judge(case(response))
        assert (verdict.kind, verdict.retryable) == (kind, retryable), (response, verdict)
    assert not (await judging.judge(case("print"))).error
    assert not (await judging.judge(case("thread"))).error
    started = int((await judging.judge(case("start"))).reward or 0)
    assert (await judging.judge(case("exit"))).kind == "worker died"
    await until(lambda: gone(started))
    assert len(judging._pool.pids) == 1, "one guard has outlived them all"


async def test_a_function_that_hangs_is_killed_at_the_wall_deadline(functions):
    judging = functions("misbehave", Limits(cpu_s=30.0, wall_s=1.0))
    verdict = await judging.judge(case("hang"))
    assert verdict.kind == "timeout" and verdict.retryable
    first, second = [(await judging.judge(case("pid"))).reward for _ in range(2)]
    assert first == second


async def test_a_class_that_can_not_be_made(functions):
    verdict = await functions("CannotBeMade").judge(case("x"))
    assert verdict.kind == "raised" and "no model file" in verdict.error


async def test_a_function_that_is_not_there_any_more(functions):
    verdict = await functions("gone").judge(case("x"))
    assert verdict.kind == "no worker" and not verdict.retryable and "has no gone" in verdict.error
