"""The engine over a runner in two forms: what is generated when phases differ, and when they change in the middle."""

from __future__ import annotations

import numpy as np

from headrace.actors.model.config import ModelConfig
from headrace.actors.model.qwen3_moe import Qwen3Moe
from headrace.actors.rollout.engine import Engine
from headrace.actors.rollout.precision import Kind, Precision, Read, Schedule
from headrace.actors.rollout.requests import Request
from headrace.actors.rollout.room import num_pages_of
from headrace.actors.rollout.scheduled import ScheduledRunner
from headrace.actors.types import Trajectory

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
    moe_intermediate_size=16, max_positions=64, initializer_range=0.2,
)  # fmt: skip
EOS, PROMPT = 10, np.array([1, 2, 3, 4], np.int32)


def engine(settings: Precision) -> tuple[Engine, Schedule, Read]:
    schedule = Schedule(settings)
    weights = {name: p.detach().numpy() for name, p in Qwen3Moe(CONFIG, seed=3).named_parameters()}
    runner = ScheduledRunner(
        CONFIG, schedule, num_pages=num_pages_of(4, 16, 32, page_tokens=4), page_tokens=4, routes=True
    )
    made = Engine(
        CONFIG, weights, version=1, num_slots=4, max_prompt_tokens=16, max_new_tokens=32, eos_id=EOS, seed=5,
        runner=runner, precision=schedule.describe(),
    )  # fmt: skip
    return made, schedule, runner.read


def submit(to: Engine, keys: range, members: int = 2) -> list[list[Trajectory]]:
    for key in keys:
        prompt = np.append(PROMPT, key).astype(np.int32)
        to.submit(Request(key=key, ordinal=key, prompt=prompt, members=list(range(members)), max_new_tokens=32))
    return [[Trajectory(member=m) for m in range(members)] for _ in keys]


def finish(of: Engine, groups: list[list[Trajectory]]) -> None:
    while of.num_live or of.num_waiting:
        for chunk in of.step():
            groups[chunk.key][chunk.member].append(chunk)


def logprobs(settings: Precision) -> list[np.ndarray]:
    made, _, _ = engine(settings)
    groups = submit(made, range(6))
    finish(made, groups)
    return [t.logprobs() for group in groups for t in group]


def test_requests_that_come_while_others_decode_are_read_in_a_pass_of_their_own() -> None:
    """Ten requests for four slots, phases in different precision: all are answered, each as if it were alone."""
    settings = Precision(decode="fp8")
    made, _, _ = engine(settings)
    groups = submit(made, range(10), 1)
    finish(made, groups)
    for key in (0, 4, 9):
        alone, _, _ = engine(settings)
        single = submit(alone, range(key, key + 1), 1)
        finish(alone, [*[[]] * key, *single])
        np.testing.assert_array_equal(groups[key][0].tokens(), single[0][0].tokens())
        np.testing.assert_allclose(groups[key][0].logprobs(), single[0][0].logprobs(), atol=1e-4)


def test_the_first_token_is_of_prefill_and_the_others_of_decode() -> None:
    full, decode, both = (logprobs(p) for p in (Precision(), Precision(decode="fp8"), Precision(prefill="fp8")))
    for plain, mixed, other in zip(full, decode, both, strict=True):
        assert abs(mixed[0] - plain[0]) < 1e-5 < abs(other[0] - plain[0])
        assert abs(mixed[1] - plain[1]) > 1e-5


def test_falling_back_in_the_middle_goes_on_at_once_and_is_on_record() -> None:
    made, schedule, read = engine(Precision(prefill="fp8", decode="fp8", kl_bound=0.01))
    groups = submit(made, range(2))
    chunks = [chunk for _ in range(6) for chunk in made.step()]
    schedule.measured(1, 1.0)
    made.now_in(schedule.describe())
    for chunk in chunks:
        groups[chunk.key][chunk.member].append(chunk)
    finish(made, groups)
    distances: dict[Kind, list[float]] = {"full": [], "fp8": []}
    for key, group in enumerate(groups):
        for t in group:
            before, *after = t.segments
            assert before.origin is not None and before.origin.precision == "prefill fp8, decode fp8, score full"
            assert [s.origin.precision for s in after if s.origin] == ["full"] * len(after)
            assert len(before.tokens) == min(6, t.num_tokens)
            text = np.concatenate([PROMPT, [key], t.tokens()])
            drawn = np.arange(len(PROMPT) + 6, len(text) - 1)
            for kind, found in distances.items():
                said = read([text], kind).log_softmax(-1).numpy()[drawn, text[drawn + 1]]
                found += np.abs(said - t.logprobs()[6:]).tolist()
    # What comes after is as full precision says, but for the keys and values before it, which are of FP8.
    assert len(distances["full"]) > 20
    assert np.mean(distances["full"]) < 0.7 * np.mean(distances["fp8"])
