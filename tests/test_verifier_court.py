"""Cache, retries, deadline, concurrency and metrics around a judge that is told how to fail."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.actors.types import Verdict
from headrace.actors.verifier.case import Case
from headrace.actors.verifier.court import Care, Court, RetryBudget
from headrace.actors.verifier.judging import InProcess
from headrace.actors.verifier.metrics import VerdictMetrics


def court_of(judge, care, places=4):
    return Court(judge, care, places=places)


PASSING = Verdict(correct=False, error="busy", kind="busy", retryable=True)
LASTING = Verdict(correct=False, error="broken", kind="broken")
RIGHT = Verdict(correct=True)


class Script:
    """Judges as told, one verdict after the other, the last one for ever."""

    def __init__(self, *verdicts: Verdict, seconds: float = 0.0) -> None:
        self.verdicts, self.seconds = list(verdicts), seconds
        self.asked = self.running = self.most = 0

    async def __call__(self, case: Case) -> Verdict:
        self.asked += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
            return self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
        finally:
            self.running -= 1


def case(text: str = "x", **fields: str) -> Case:
    return Case(reference="r", response=text, **fields)


async def test_a_verdict_is_cached_by_content_and_an_error_is_not():
    script = Script(RIGHT)
    court = court_of(script, Care(cache_size=2))
    assert [await court.verdict(case(t, row=t * 2)) for t in "aab"] == [RIGHT] * 3 and script.asked == 2
    await court.verdict(case("a", row="another name"))
    assert script.asked == 2, "a row is only a name"
    for field in ("question", "dataset"):
        await court.verdict(case("a", **{field: "other"}))
    assert script.asked == 4
    await court.verdict(case("b"))
    assert script.asked == 5, "the one used least lately was forgotten"
    assert court.metrics.snapshot()["cache_hits"] == 2
    failing = Script(LASTING, RIGHT)
    court = court_of(failing, Care())
    assert (await court.verdict(case())).error and (await court.verdict(case())).correct


def test_digests_keep_the_parts_apart():
    cases = [Case(reference=a, response=b, question=c) for a in ("", "x", "xx") for b in ("", "x") for c in ("", "x")]
    assert len({c.digest() for c in cases}) == len(cases)
    Case(reference="\ud800", response="\udfff").digest()


async def test_errors_that_may_pass_by_are_tried_again():
    script = Script(PASSING, PASSING, RIGHT)
    court = court_of(script, Care(attempts=3, pause_s=0.0))
    assert await court.verdict(case()) is RIGHT and court.metrics.snapshot()["retries"] == 2
    script = Script(LASTING)
    assert await court_of(script, Care(attempts=3)).verdict(case()) is LASTING and script.asked == 1
    script = Script(PASSING)
    assert await court_of(script, Care(attempts=3, pause_s=0.0)).verdict(case()) is PASSING and script.asked == 3


async def test_where_everything_fails_the_load_hardly_grows():
    script = Script(PASSING)
    court = court_of(script, Care(attempts=5, retry_share=0.1, pause_s=0.0, cache_size=0))
    for i in range(300):
        await court.verdict(case(str(i)))
    assert 300 < script.asked <= 300 * 1.1 + RetryBudget.RESERVE


async def test_past_the_deadline_there_is_an_error_value_that_says_why():
    court = court_of(Script(RIGHT, seconds=3600), Care(deadline_s=0.05))
    verdict = await court.verdict(case(row="set:7"))
    assert (verdict.kind, verdict.retryable) == ("deadline", True) and verdict.error.startswith("set:7: no verdict")
    court = court_of(Script(PASSING), Care(deadline_s=0.05, pause_s=3600.0))
    assert (await court.verdict(case())).error.endswith("the last attempt: busy")


async def test_waiting_for_a_place_is_not_counted_and_places_are_few():
    script = Script(RIGHT, seconds=0.02)
    court = court_of(script, Care(deadline_s=30.0), places=2)
    verdicts = await asyncio.gather(*(court.verdict(case(str(i))) for i in range(20)))
    assert verdicts == [RIGHT] * 20 and script.most == 2


async def test_a_caller_that_gives_up_frees_its_place():
    court = court_of(Script(RIGHT, seconds=3600), Care(), places=1)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await court.verdict(case())


async def test_a_bad_reference_is_an_error_that_names_the_row():
    judging = InProcess("multiple_choice", {"": {}, "few": {"letters": "AB"}})
    good = await judging.judge(Case(reference="C", response="C"))
    bad = await judging.judge(Case(reference="C", response="C", dataset="few", row="quiz.jsonl:3"))
    assert good.correct and bad.kind == "bad reference" and bad.error.startswith("quiz.jsonl:3: ")
    assert not bad.retryable


@given(st.lists(st.floats(1e-5, 200.0), min_size=1, max_size=200))
def test_quantiles_are_within_a_class(seconds):
    metrics = VerdictMetrics()
    for s in seconds:
        metrics.judged(RIGHT, s)
    numbers = metrics.snapshot()
    ordered = sorted(seconds)
    for q in (0.5, 0.9, 0.99):
        exact = ordered[max(0, -(-int(q * 100) * len(ordered) // 100) - 1)]
        shown = numbers[f"latency_p{100 * q:g}_s"]
        assert max(exact, 1e-4) <= shown * 1.000001 or exact > 120
        assert shown <= max(exact * 1.2500001, 1e-4) or exact > 120


def test_counts_by_kind():
    metrics = VerdictMetrics()
    assert metrics.snapshot()["latency_p50_s"] == 0
    verdicts = [RIGHT, Verdict(correct=False), Verdict(correct=True, reward=0.5), PASSING, PASSING, LASTING]
    for verdict in verdicts:
        metrics.judged(verdict, 0.001)
    numbers = Counter(metrics.snapshot())
    assert [numbers[k] for k in ("correct", "incorrect", "graded", "errors", "errors/busy", "errors/broken")] == [
        1, 1, 1, 3, 2, 1,
    ]  # fmt: skip
