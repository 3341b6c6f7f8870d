"""What goes wrong in data and answers, through each rule and its court: a verdict, or an error that names the row."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from headrace.actors.verifier import Case, TextVerifier
from headrace.actors.verifier.policies import MATH_POLICIES

REFERENCES = {"exact": "43", "multiple_choice": "B", "regex": "4[3]", "json_schema": '{"const": 43}', "math": "43"}

EMPTY = ["", " ", "\n\n\t", "\\boxed{}", "Answer:", "####", "<think></think>", "$$", "```json\n```"]
CUT = [
    "so it is \\boxed{4", "<think>it is 43, B, so", "the answer is", "Answer: \\frac{4", '```json\n{"a": 4',
    "\\boxed{\\boxed{4", "first 4, then",
]  # fmt: skip
OTHER_LANGUAGES = [
    "\u7b54\u6848\u662f\u56db\u5341\u4e09\u3002", "\u043e\u0442\u0432\u0435\u0442: \u0441\u043e\u0440\u043e\u043a",
    "\u0627\u0644\u062c\u0648\u0627\u0628", "la r\u00e9ponse est quarante-trois", "\U0001f600\U0001f600",
]  # fmt: skip
OTHER_ENCODINGS = [
    "\u00d0\u00be\u00d1\u201a\u00d0\u00b2\u00d0\u00b5\u00d1\u201a", "\ud83d", "\udc80\udcff\udc34", "4\x003\x00",
    "\ufffd\ufffd", "\x80\x81\xfe\xff", "\x1b[31m",
]  # fmt: skip
SEVERAL = ["\\boxed{41} or \\boxed{42}", "\\boxed{A} or maybe \\boxed{C}", "Answer: A\nAnswer: C"]


@asynccontextmanager
async def opened(rule: str, **fields: object) -> AsyncIterator[TextVerifier]:
    verifier = TextVerifier(rule=rule, **fields)  # type: ignore[arg-type]
    await verifier.start()
    try:
        yield verifier
    finally:
        await verifier.stop(None)


@pytest.mark.parametrize("rule", REFERENCES)
async def test_an_answer_that_is_none_is_incorrect_and_no_error(rule: str) -> None:
    texts = [*EMPTY, *CUT, *OTHER_LANGUAGES, *OTHER_ENCODINGS, *SEVERAL]
    async with opened(rule) as verifier:
        cases = [Case(reference=REFERENCES[rule], response=text, row=repr(text)) for text in texts]
        verdicts = await verifier.judge_cases(cases)
        wrong = [(case.row, v) for case, v in zip(cases, verdicts, strict=True) if v.correct or v.error]
        assert not wrong
        stats = await verifier.stats()
        assert stats["incorrect"] == len(texts) and stats["errors"] == stats["correct"] == 0


@pytest.mark.parametrize("rule", ["exact", "math", "regex"])
async def test_a_right_answer_in_other_digits_or_words_is_right(rule: str) -> None:
    texts = [
        "\u7b54\u6848\uff1a\\boxed{43}",
        "\\boxed{\uff14\uff13}",
        "Answer: \u0664\u0663",
        "\\boxed{\u200b4\u20603}",
    ]
    async with opened(rule) as verifier:
        cases = [Case(reference=REFERENCES[rule], response=text) for text in texts]
        assert [v.correct for v in await verifier.judge_cases(cases)] == [True] * len(texts)


@pytest.mark.parametrize(
    ("rule", "references"),
    [
        ("exact", ["", "  "]),
        ("multiple_choice", ["", "Z", "A or B"]),
        ("regex", ["(", "a{99999999999}", "x" * 20_000]),
        ("json_schema", ["", "{", '{"type": 5}', '{"$ref": "#/nowhere"}']),
        ("math", ["", "}{", "\\frac{", "x" * 20_000]),
    ],
)
async def test_a_reference_that_can_not_be_read_is_an_error_that_names_its_row(
    rule: str, references: list[str]
) -> None:
    async with opened(rule) as verifier:
        cases = [Case(reference=r, response="\\boxed{43}", row=f"data.jsonl:{i}") for i, r in enumerate(references)]
        verdicts = await verifier.judge_cases(cases)
        assert [v.kind for v in verdicts] == ["bad reference"] * len(cases)
        assert all(v.error.startswith(f"data.jsonl:{i}: ") for i, v in enumerate(verdicts))
        assert not any(v.correct or v.retryable or v.reward is not None for v in verdicts)
        stats = await verifier.stats()
        assert stats["errors"] == stats["errors/bad reference"] == len(cases) and stats["incorrect"] == 0
        again = await verifier.judge_cases(cases[:1])
        assert again[0].kind == "bad reference", "an error is not kept as a verdict"


async def test_several_boxes_mean_what_the_policy_says() -> None:
    policies = {"aime": {"several_boxes": MATH_POLICIES["aime"].several_boxes}, "last": {"several_boxes": "last"}}
    async with opened("math", policies=policies) as verifier:
        text = "\\boxed{41}, no: \\boxed{43}"
        cases = [Case(reference="43", response=text, dataset=dataset) for dataset in ("", "aime", "last")]
        assert [v.correct for v in await verifier.judge_cases(cases)] == [False, False, True]
        cases = [
            Case(reference="43", response="\\boxed{43}, again: \\boxed{43}", dataset=d) for d in ("", "aime", "last")
        ]
        assert [v.correct for v in await verifier.judge_cases(cases)] == [True, True, True]
