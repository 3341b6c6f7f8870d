"""The controller against actors that the test holds in its hand: it decides when they answer, die and come back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.actors import controller as controller_module
from headrace.actors.algorithms import Algorithm
from headrace.actors.algorithms.dapo import Dapo
from headrace.actors.algorithms.updates import PolicyUpdate, ValueUpdate
from headrace.actors.algorithms.vapo import Vapo
from headrace.actors.controller import Controller
from headrace.actors.data.running_sum import RunningSum
from headrace.actors.evaluator import Evaluation
from headrace.actors.evaluator.settings import EvaluationSettings
from headrace.actors.report import read_metrics
from headrace.actors.reward import Reward
from headrace.actors.rollout.requests import Chunk, Request
from headrace.actors.run_state import LATEST, STATE, load_state
from headrace.actors.stream import StreamPool
from headrace.actors.trainer.settings import RlSettings, SftSettings
from headrace.actors.types import Group
from headrace.actors.verifier import RuleVerifier
from headrace.runtime import Actor, Lane, RestartPolicy, System, message
from headrace.runtime.codec import dumps, wire
from headrace.runtime.errors import ActorDied, RestartBudgetExceeded, StaleIncarnation
from headrace.runtime.exchange import Manifest, Route, Seat
from headrace.runtime.rundir import RunSpec

TASK = RunningSum(max_operands=3)
SFT = SftSettings(steps=3, report_every=2, checkpoint_every=2)
RL = RlSettings(
    steps=6, group_size=2, groups_per_step=2, mini_batches=1, max_running=6, max_staleness=2, checkpoint_every=2,
    max_new_tokens=48,
)  # fmt: skip

Position = tuple[int, int]
"""SFT and RL steps."""


@dataclass
class World:
    """What outlives the actors, as disks and outer worlds do; and the test's hand on them."""

    run: Path
    kept: Position = (0, 0)
    """Of the trainer's last checkpoint."""
    trained: list[tuple[int, list[int]]] = field(default_factory=list)
    """RL step and ordinals, each time a trainer was shown a batch."""
    batches: dict[int, list[Group]] = field(default_factory=dict)
    updates: dict[int, PolicyUpdate] = field(default_factory=dict)
    values: list[list[int]] = field(default_factory=list)
    """Ordinals, each time a critic was asked for values."""
    returns: list[tuple[int, ValueUpdate]] = field(default_factory=list)
    """Number and update, each time a critic was shown one."""
    critic_kept: int = 0
    """Updates in the critic's last checkpoint."""
    regress: Callable[[int], Awaitable[None]] | None = None
    """Called by the critic in the middle of an update."""
    published: list[tuple[int, Position]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    """Ordinals whose answers stop half-way."""
    same: Callable[[int], bool] = lambda ordinal: ordinal % 4 == 3
    """Whether all answers to this ordinal are right, so that the group is filtered."""
    train: Callable[[int], Awaitable[None]] | None = None
    """Called by the trainer in the middle of a step."""
    stale: set[int] = field(default_factory=set)
    """Versions that rollout can't fetch."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                moved = self.moved
                try:
                    async with asyncio.timeout(0.02):
                        await moved.wait()
                except TimeoutError:
                    pass


WORLD: World


@dataclass(kw_only=True)
class Mortal(Actor):
    @message(concurrent=True, lane=Lane.CONTROL)
    async def die(self) -> None:
        raise RuntimeError("the test killed it")


@dataclass(kw_only=True)
class FakeTrainer(Mortal):
    """Knows how many steps it has done, and nothing else."""

    async def start(self) -> None:
        self.sft, self.rl = WORLD.kept

    @message
    async def position(self) -> int:
        return self.rl

    @message
    async def rewind(self) -> None:
        self.sft, self.rl = WORLD.kept

    @message
    async def warm_up(self, until: int) -> dict[str, float]:
        self.sft = max(self.sft, until)
        return {"loss": 1.0 / self.sft if self.sft else 1.0}

    @message
    async def step(self, number: int, update: PolicyUpdate) -> dict[str, float]:
        groups = update.groups
        assert (self.sft, number) == (SFT.steps, self.rl + 1)
        WORLD.trained.append((number, [group.prompt.ordinal for group in groups]))
        WORLD.batches[number] = groups
        before = WORLD.updates.setdefault(number, update)
        assert [*map(bytes_of, before.advantages)] == [*map(bytes_of, update.advantages)], "not what it was given"
        WORLD.tell()
        if WORLD.train is not None:
            await WORLD.train(number)
        self.rl = number
        return {"loss": float(number), "trained_tokens": sum(group.num_tokens for group in groups)}

    @message
    async def publish(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        WORLD.published.append((version, (self.sft, self.rl)))
        return Manifest(
            name="policy", version=version, pid=1, fd=0, incarnation=1, generation=len(WORLD.published), nbytes=0,
            bucket_bytes=1, tensors=[],
        )  # fmt: skip

    @message
    async def checkpoint(self, name: str, files: dict[str, bytes], parts: dict[str, str]) -> str:
        WORLD.kept = self.sft, self.rl
        WORLD.critic_kept = max([WORLD.critic_kept, *(int(part) for part in parts.values())])
        folder = WORLD.run / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        folder.with_name(LATEST).write_text(name)
        return name


@dataclass(kw_only=True)
class FakeCritic(Mortal):
    """Counts its updates, and says something else of the same state whenever it is asked."""

    async def start(self) -> None:
        self.number = WORLD.critic_kept

    @message
    async def position(self) -> int:
        return self.number

    @message
    async def rewind(self) -> None:
        self.number = WORLD.critic_kept

    @message
    async def values(self, groups: list[Group]) -> list[np.ndarray]:
        WORLD.values.append([group.prompt.ordinal for group in groups])
        random = np.random.default_rng(len(WORLD.values))
        return [random.random(t.num_tokens).astype(np.float32) for group in groups for t in group.trajectories]

    @message
    async def update(self, number: int, update: ValueUpdate) -> dict[str, float]:
        assert number == self.number + 1
        before = next((u for n, u in WORLD.returns if n == number), update)
        assert [*map(bytes_of, before.returns)] == [*map(bytes_of, update.returns)], "not what it was given"
        WORLD.returns.append((number, update))
        WORLD.tell()
        if WORLD.regress is not None:
            await WORLD.regress(number)
        self.number = number
        return {"value_loss": 1.0 / number}

    @message
    async def checkpoint(self, name: str) -> str:
        return str(self.number)


def bytes_of(row: np.ndarray | None) -> bytes:
    return b"" if row is None else row.tobytes()


@dataclass(kw_only=True)
class FakeRollout(Mortal):
    """Writes right answers, in pieces of three tokens, except one member of most groups."""

    async def start(self) -> None:
        self.version = -1
        self.armed = asyncio.Event()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def seat(self) -> Seat:
        return Seat()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def load(self, manifest: Manifest, route: Route) -> int:
        if manifest.version in WORLD.stale:
            WORLD.stale.remove(manifest.version)
            raise StaleIncarnation("its process has ended")
        self.version = manifest.version
        self.armed.set()
        return self.version

    @message(concurrent=True, lane=Lane.CONTROL)
    async def stats(self) -> dict[str, Any]:
        return {"version": self.version, "tokens": 0, "steps": 0, "busy_s": 0.0}

    @message(concurrent=True)
    async def generate(self, requests: list[Request]) -> AsyncIterator[list[Chunk]]:
        await self.armed.wait()
        (request,) = requests
        WORLD.requests.append(request)
        for member, prefix in zip(request.members, request.prefixes, strict=True):
            answer = answer_of(request.ordinal, member)
            for at in range(len(prefix), len(answer), 3):
                if at >= 3:
                    await WORLD.until(lambda: request.ordinal not in WORLD.held)
                tokens = answer[at : at + 3]
                yield [
                    Chunk(
                        key=0, member=member, version=self.version, tokens=tokens,
                        logprobs=np.full(len(tokens), -0.5, np.float32),
                        finish="stop" if at + 3 >= len(answer) else "",
                    )
                ]  # fmt: skip
                WORLD.tell()
                await asyncio.sleep(0)


@dataclass(kw_only=True)
class FakeEvaluator(Actor):
    @message
    async def evaluate(self) -> Evaluation:
        version = (await self.find("rollout").stats())["version"]
        WORLD.evaluated.append(version)
        return Evaluation(version=version, n=4, pass_at_1=0.5, greedy=0.5, mean_tokens=9.0, by_size={2: (4, 0.5, 0.5)})


def answer_of(ordinal: int, member: int) -> np.ndarray:
    """Member 0 is right; member 1 misses the last digit of the total, unless the group shall be filtered."""
    (prompt,) = TASK.prompts(0, np.array([ordinal]), np.array([3]))
    answer = TASK.solve(prompt)
    if member == 1 and not WORLD.same(ordinal):
        answer[-2] = 3 + (answer[-2] - 2) % 10
    return answer


@dataclass(kw_only=True)
class OneSize(Controller):
    """All problems have three operands, so that the test can tell the answers from the ordinals."""

    async def start(self) -> None:
        await super().start()
        self.questions.prompt = lambda ordinal: TASK.prompts(0, np.array([ordinal]), np.array([3]))[0]


@asynccontextmanager
async def running(
    policies: dict[str, RestartPolicy] | None = None, every: int = 0, algorithm: Algorithm | None = None
) -> AsyncIterator[System]:
    """The whole system in this process; DAPO, unless told otherwise."""
    run = RunSpec(name=WORLD.run.name, directory=str(WORLD.run.parent))
    actors: dict[str, Actor] = {
        "rollout": FakeRollout(), "trainer": FakeTrainer(), "evaluator": FakeEvaluator(), "verifier": RuleVerifier(),
        "reward": Reward(rl=RL, overlong_cache=0), "pool": StreamPool(run=run, rl=RL, capacity=32),
        "controller": OneSize(
            run=run, task=TASK, sft=SFT, rl=RL, algorithm=algorithm or Dapo(),
            evaluation=EvaluationSettings(every=every),
        ),
        "critic": FakeCritic(),
    }  # fmt: skip
    WORLD.run.mkdir(parents=True, exist_ok=True)
    async with System(WORLD.run) as system:
        for name, actor in actors.items():
            system.declare(name, type(actor))
        for name, actor in actors.items():
            policy = (policies or {}).get(name, RestartPolicy(backoff_s=0.01))
            await system.spawn(actor, name=name, policy=policy)
        yield system


async def end_of(system: System) -> dict[str, Any]:
    """The controller's summary when the run is over."""
    async with asyncio.timeout(30):
        while True:
            try:
                async for update in system.find("controller").progress.stream():
                    if update["done"]:
                        return dict(update["summary"])
            except ActorDied:
                if system.failed.done():
                    system.failed.result()


def rows(stage: str = "rl") -> list[dict[str, Any]]:
    return [row for row in read_metrics(WORLD.run / "metrics.jsonl") if row["stage"] == stage]


def check_stream(steps: int = RL.steps) -> None:
    """No step twice, no group twice, no group too old, every group accounted for, every version labelled as it is."""
    assert [row["step"] for row in rows()] == list(range(1, steps + 1))
    assert [row["loss"] for row in rows()] == [float(step) for step in range(1, steps + 1)]
    shown: dict[int, list[int]] = {}
    for step, ordinals in WORLD.trained:
        assert shown.setdefault(step, ordinals) == ordinals, "a trainer that came back was shown another batch"
    trained = [ordinal for ordinals in shown.values() for ordinal in ordinals]
    assert len(trained) == len(set(trained)) == steps * RL.groups_per_step
    assert not any(WORLD.same(ordinal) for ordinal in trained)
    for step, batch in WORLD.batches.items():
        for group in batch:
            assert 0 <= step - group.oldest_version <= RL.max_staleness
            for t in group.trajectories:
                np.testing.assert_array_equal(t.tokens(), answer_of(group.prompt.ordinal, t.member))
                assert t.reward == (1.0 if t.member == 0 else -1.0)
    for row in rows():
        ends = ("running", "partial", "accepted", "filtered", "failed")
        assert row["submitted_groups"] == sum(row[f"{end}_groups"] for end in ends)
    assert all(version == (rl + 1 if sft == SFT.steps else 0) for version, (sft, rl) in WORLD.published)


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> World:
    global WORLD
    WORLD = World(tmp_path / "runs" / "r")
    return WORLD


async def test_an_undisturbed_run(world: World) -> None:
    async with running(every=4) as system:
        summary = await end_of(system)
    check_stream()
    assert summary["ok"] and summary["steps"] == 6
    assert [(e["stage"], e["step"], e["version"]) for e in summary["evaluation"]] == [
        ("sft", 3, 1), ("rl", 4, 5), ("rl", 6, 7),
    ]  # fmt: skip
    assert world.evaluated == [1, 5, 7]
    assert len(world.trained) == 6
    assert rows()[-1]["filtered_groups"] > 0
    assert sorted(path.name for path in (world.run / "checkpoints").iterdir() if path.is_dir()) == [
        "done-000006", "rl-000002", "rl-000004", "sft-000000", "sft-000002", "sft-000003",
    ]  # fmt: skip
    state, _ = load_state(world.run)
    assert (state.stage, state.step, state.version) == ("done", 6, 7)


async def test_half_written_answers_go_on_after_the_worker_died_and_keep_their_versions(world: World) -> None:
    world.held = {0}
    async with running() as system:
        await world.until(lambda: world.trained and max(step for step, _ in world.trained) >= 2)
        await world.until(lambda: system.node.directory.get("rollout").state == "up")
        system.find("rollout").die.cast()
        await world.until(lambda: any(e["event"] == "answers_continued" for e in system.events.recent))
        world.held = set()
        summary = await end_of(system)
    check_stream()
    assert summary["ok"]
    first, second = [request for request in world.requests if request.ordinal == 0]
    assert first.members == second.members == [0, 1]
    kept = second.prefixes[0]
    np.testing.assert_array_equal(kept, answer_of(0, 0)[:3])
    (group,) = [g for batch in world.batches.values() for g in batch if g.prompt.ordinal == 0]
    continued, later = group.trajectories
    assert continued.versions()[:3].tolist() == [1, 1, 1]
    assert continued.versions()[3:].min() > 1
    assert later.versions().min() > 1
    assert group.oldest_version == 1


async def test_a_trainer_that_dies_in_a_step_is_shown_the_batches_since_its_checkpoint(world: World) -> None:
    async def die_in_step_4(step: int) -> None:
        if step == 4:
            world.train = None
            system.find("trainer").die.cast()
            await asyncio.sleep(60)

    world.train = die_in_step_4
    async with running() as system:
        await end_of(system)
        events = list(system.events.recent)
    check_stream()
    assert [step for step, _ in world.trained] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert [e["batches"] for e in events if e["event"] == "batches_repeated"] == [2]


async def test_a_trainer_that_dies_in_the_warm_up_or_idle_comes_back_where_it_was(world: World) -> None:
    world.held = set(range(1000))
    async with running() as system:
        system.find("trainer").die.cast()
        await world.until(lambda: world.requests and load_state(world.run)[0].sft_steps == 3)
        world.kept = 2, 0  # As if the checkpoint after the warm-up had not been reached.
        system.find("trainer").die.cast()
        await world.until(lambda: system.node.directory.get("trainer").incarnation == 3)
        world.held = set()
        await end_of(system)
    check_stream()


async def test_weights_that_can_not_be_fetched_are_published_again(world: World) -> None:
    world.stale = {0, 1, 4, 7}
    async with running() as system:
        summary = await end_of(system)
    check_stream()
    assert summary["ok"] and world.evaluated == [1, 7]
    assert Counter(version for version, _ in world.published)[7] == 2


async def test_a_controller_that_fails_goes_on_from_its_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, failures = Controller._measure, []

    async def fail_once(self: Controller, *args: Any) -> Any:
        if self.state.rl_steps == 3 and not failures:
            failures.append(self.state.rl_steps)
            raise ZeroDivisionError("a controller's bug")
        return await measure(self, *args)

    monkeypatch.setattr(Controller, "_measure", fail_once)
    async with running() as system:
        summary = await end_of(system)
        assert dict(system.restarts) == {"controller": 1}
    assert summary["ok"] and failures == [3]
    assert [row["step"] for row in rows()] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in world.trained] == [1, 2, 3, 3, 4, 5, 6]


async def test_drain_does_not_wait_for_a_batch_and_a_resumed_run_goes_on_with_half_written_answers(
    world: World,
) -> None:
    async with running() as system:
        await world.until(lambda: len(world.trained) >= 3)
        world.held = set(range(1000))
        await asyncio.sleep(0.05)
        await system.find("controller").drain()
        summary = await end_of(system)
    assert not summary["ok"] and summary["reason"] == ""
    state, _ = load_state(world.run)
    done = state.rl_steps
    assert 3 <= done < 6 and len(rows()) == done
    half = {o: g.num_tokens for o, g in state.in_flight.items() if any(not t.finish for t in g.trajectories)}
    assert any(half.values())

    world.held = set()
    num_before = len(world.requests)
    async with running() as system:
        summary = await end_of(system)
    check_stream()
    again = {r.ordinal: sum(map(len, r.prefixes)) for r in world.requests[num_before:]}
    for ordinal, num_tokens in half.items():
        finished = sum(t.num_tokens for t in state.in_flight[ordinal].trajectories if t.finish)
        assert again[ordinal] == num_tokens - finished, "tokens that had been received are not generated again"
    assert min(set(again) - set(half)) >= state.next_ordinal, "ordinals go on"
    assert [e["stage"] for e in summary["evaluation"]] == ["sft", "rl"]


async def test_a_group_that_entered_the_pool_as_the_checkpoint_was_taken_is_trained_once(world: World) -> None:
    """The state was packed before it was there, the pool after."""
    drained = asyncio.Event()

    async def wait_in_step_3(step: int) -> None:
        if step == 3:
            await drained.wait()

    world.train = wait_in_step_3
    async with running() as system:
        await world.until(lambda: len(world.trained) == 3)
        controller = system.node.cells["controller"].actor
        await world.until(lambda: controller.ledger.pooled)  # type: ignore[attr-defined]
        await system.find("controller").drain()
        drained.set()
        await end_of(system)

    state, pool = load_state(world.run)
    assert pool is not None
    entry = pool["entries"][0]
    ledger = state.ledger
    ledger["running"][entry.id] = ledger["pooled"].pop(entry.id)
    ledger["totals"]["accepted"] -= 1
    del ledger["num_tokens"][entry.id]
    state.in_flight[entry.id] = entry.payload
    (world.run / "checkpoints" / "rl-000003" / STATE).write_bytes(dumps(state))

    async with running() as system:
        await end_of(system)
    check_stream()
    assert entry.id in [ordinal for _, ordinals in world.trained for ordinal in ordinals]


async def test_a_finished_run_that_is_resumed_before_its_summary_was_written_only_ends(world: World) -> None:
    async with running() as system:
        first = await end_of(system)
    lines = rows()
    async with running() as system:
        second = await end_of(system)
    assert rows() == lines
    assert first["ok"] and second["ok"] and second["steps"] == 6
    assert second["evaluation"] == first["evaluation"]
    assert len(world.trained) == 6


async def test_a_run_without_any_batch_is_given_up_and_says_what_it_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "LEASE_S", 0.3)
    world.same = lambda ordinal: True
    async with running() as system:
        summary = await end_of(system)
    assert not summary["ok"]
    assert summary["reason"].startswith("no batch to train within 0.3 s: 0 of 2 groups are finished. Groups so far: ")
    assert "filtered" in summary["reason"] and "\n" not in summary["reason"]


async def test_an_actor_that_has_stopped_for_good_fails_the_run(world: World) -> None:
    policies = {
        "rollout": RestartPolicy(restart="temporary"),
        "controller": RestartPolicy(max_restarts=2, backoff_s=0.01),
    }
    world.held = {0}
    async with running(policies) as system:
        await world.until(lambda: len(world.trained) >= 1)
        system.find("rollout").die.cast()
        async with asyncio.timeout(20):
            with pytest.raises(
                RestartBudgetExceeded, match="rollout has stopped for good: RuntimeError: the test killed"
            ):
                await system.failed


# With a critic -----------------------------------------------------------------------------------------------


def check_critic(steps: int) -> None:
    """No update left out, none but those since a checkpoint shown twice; the RL batches are the policy's."""
    shown = [number for number, _ in WORLD.returns]
    assert sorted(set(shown)) == list(range(1, steps + 1))
    last = {number: [g.prompt.ordinal for g in update.groups] for number, update in WORLD.returns}
    trained = dict(WORLD.trained)
    for step, ordinals in trained.items():
        assert last[steps - RL.steps + step] == ordinals
    used = [ordinal for number in last for ordinal in last[number]]
    assert len(used) == len(set(used)) == steps * RL.groups_per_step, "no group is learned from twice"


async def test_a_critic_learns_first_and_then_with_the_policy(world: World) -> None:
    async with running(algorithm=Vapo(value_pretraining=3)) as system:
        summary = await end_of(system)
    assert summary["ok"] and list(summary["stages"]) == ["sft", "value", "rl"]
    check_critic(3 + RL.steps)
    assert [row["step"] for row in rows("value")] == [1, 2, 3]
    assert [row["step"] for row in rows()] == [1, 2, 3, 4, 5, 6]
    assert {row["version"] for row in rows("value")} == {1} and rows()[-1]["version"] == 7
    assert len(world.values) == RL.steps, "pretraining asks for no values"
    kept = sorted(path.name for path in (world.run / "checkpoints").iterdir() if path.is_dir())
    assert {"value-000002", "value-000003", "rl-000002", "done-000006"} <= set(kept)
    assert any(world.same(ordinal) for ordinals in world.values for ordinal in ordinals), "VAPO keeps every group"
    assert rows()[-1]["filtered_groups"] == 0


async def test_both_learners_are_shown_again_the_very_numbers_that_they_were_given(world: World) -> None:
    """Though by then the critic would say something else."""

    async def die_in_update_6(number: int) -> None:
        if number == 6:
            world.regress = None
            system.find("critic").die.cast()
            system.find("trainer").die.cast()
            await asyncio.sleep(60)

    world.regress = die_in_update_6
    async with running(algorithm=Vapo(value_pretraining=2)) as system:
        await end_of(system)
    check_critic(2 + RL.steps)
    assert [number for number, _ in world.returns] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert len(world.values) == RL.steps


async def test_a_controller_that_fails_takes_critic_and_trainer_back_to_one_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, failures = Controller._measure, []

    async def fail_once(self: Controller, *args: Any) -> Any:
        if self.state.rl_steps == 3 and not failures:
            failures.append(3)
            world.updates.clear()  # The batches after the checkpoint are made anew.
            del world.returns[-1:]
            raise ZeroDivisionError("once")
        return await measure(self, *args)

    monkeypatch.setattr(Controller, "_measure", fail_once)
    async with running(algorithm=Vapo(value_pretraining=2)) as system:
        summary = await end_of(system)
    assert summary["ok"] and summary["steps"] == RL.steps
    assert [number for number, _ in world.returns] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, _ in world.trained] == [1, 2, 3, 3, 4, 5, 6]
    assert [row["step"] for row in rows()] == [1, 2, 3, 4, 5, 6]


async def test_a_step_that_updates_the_policy_twice_is_refused(world: World) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twice(Dapo):
        async def step(self, batch: Any, *, policy: Any) -> dict[str, float]:
            return await super().step(batch, policy=policy) | await super().step(batch, policy=policy)

    policies = {"controller": RestartPolicy(max_restarts=1, backoff_s=0.01)}
    async with running(policies, algorithm=wire(Twice)()) as system:
        async with asyncio.timeout(20):
            with pytest.raises(RestartBudgetExceeded, match=r"called policy.update 2 times in a step"):
                await system.failed
