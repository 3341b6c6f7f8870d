"""The whole algorithm on one page: warm up by imitation, then stream reinforcement learning. Everything heavy is an actor.

    prompts -> rollout (newest version) -> verifier -> reward -> sample pool -> trainer
       ^          ^   partial answers go on, whatever died     |                  |
       |          '------------- weights of version v+1 <------|------------------'
       '---------- adaptation: sizes that still teach <--------'

The controller holds the run's state and nothing else does: each actor below may be killed at any moment. A rollout worker
that comes back is given the newest weights and goes on with the answers it had half written. A trainer that comes back loads its
last checkpoint and is shown the batches since then. Knows nothing of tensors, processes or sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..runtime import Actor, Lane, message
from ..runtime.codec import dumps
from ..runtime.errors import ActorDied, RemoteError
from ..runtime.exchange import Manifest
from ..runtime.pool import Entry
from ..runtime.rundir import RunSpec
from .data.adaptation import Adaptation
from .data.running_sum import RunningSum
from .evaluator import Evaluation
from .evaluator.settings import EvaluationSettings
from .rollout.requests import Request
from .run_state import POOL, STATE, load_state
from .stream.ledger import Ledger
from .stream.policy import priority, stream_policy
from .telemetry import Telemetry
from .trainer.groups import has_signal
from .trainer.settings import RlSettings, SftSettings
from .types import Group, Prompt, Trajectory

LEASE_S = 600.0
"""Longest wait for a training batch; past it the run fails and says what it waited for."""

MAX_ATTEMPTS = 8

NOTHING = -1
"""Version of a rollout worker that holds no weights."""


@dataclass(kw_only=True)
class Controller(Actor):
    """Runs the job from its beginning, or from its last checkpoint, to its end."""

    run: RunSpec
    task: RunningSum
    sft: SftSettings
    rl: RlSettings
    evaluation: EvaluationSettings

    async def start(self) -> None:
        self.rollout, self.trainer = self.find("rollout"), self.find("trainer")
        self.verifier, self.reward = self.find("verifier"), self.find("reward")
        self.pool, self.evaluator = self.find("pool"), self.find("evaluator")
        self.state, self._pool_state = load_state(self.run.path)
        self.stream = stream_policy(self.rl)
        self.ledger = Ledger.restore(self.state.ledger) if self.state.ledger else Ledger()
        self.adaptation = Adaptation(sizes=self.task.sizes, prior=self.task.size_prior, seed=self.run.seed)
        self.telemetry = Telemetry(self.run.path, self.state.stage, self.state.step, self.state.telemetry)
        self._since_checkpoint: deque[tuple[int, list[Group]]] = deque()
        self._manifest: Manifest | None = None
        self._served = NOTHING
        self._interrupted: list[int] = []
        self._trainer_lock, self._arm_lock = asyncio.Lock(), asyncio.Lock()
        self._room = asyncio.Event()
        self._draining = asyncio.Event()
        if self.state.adaptation:
            self.adaptation.load_state(self.state.adaptation)
        self.background(self._main(), name="main")

    async def _main(self) -> None:
        if self._pool_state is not None:
            await self.pool.restore(self._pool_state)
        await self._publish()
        self.background(self._keep_rollout_armed(), name="arm")
        self.background(self._keep_trainer_current(), name="recover")
        if self.state.stage == "sft":
            if self.state.step == 0:
                await self._first_rollout()
                await self._checkpoint()
            await self._warm_up()
        if self.state.stage == "rl":
            await self._stream()
        await self._checkpoint()
        self.telemetry.finish()

    # Warm-up ------------------------------------------------------------------------------------------------

    async def _first_rollout(self) -> None:
        """One group through the whole stream before anything is trained: what is broken shows now, not after the warm-up."""
        group = self._group(self.task.evaluation_set(self.run.seed, 1)[0])
        await self._generate(group)
        await self._judge(group)
        self.log("first_rollout", after_s=round(self.telemetry.elapsed_s, 2), tokens=group.num_tokens)

    async def _warm_up(self) -> None:
        """SFT on the demonstrator's answers. The trainer makes the examples by their numbers, so a restart repeats none."""
        self.telemetry.begin(self.sft.steps)
        while self.state.step < self.sft.steps and not self._draining.is_set():
            until = min(self.state.step + self.sft.report_every, self.sft.steps)
            metrics = await self._ask_trainer(lambda until=until: self.trainer.warm_up(until))
            self.state.step = until
            self.telemetry.sft_step(until, metrics)
            if until % self.sft.checkpoint_every == 0:
                await self._checkpoint()
        if self.state.step == self.sft.steps:
            self.state.version = 1
            await self._publish()
            await self._evaluate()
            self._enter("rl")

    # The stream ---------------------------------------------------------------------------------------------

    async def _stream(self) -> None:
        """Trains as batches come, while `_feed` keeps rollout supplied within the staleness bound."""
        self.telemetry.begin(self.rl.steps)
        feed = self.background(self._feed(), name="feed")
        while self.state.step < self.rl.steps and not self._draining.is_set():
            with self.telemetry.waiting():
                lease = await self.pool.lease(self.stream.batch, self.state.version, holder="trainer")
            batch = [entry.payload for entry in lease.entries]
            ordinals = [entry.id for entry in lease.entries]
            self.ledger.take(ordinals)
            self._since_checkpoint.append((self.state.step + 1, batch))
            metrics = await self._ask_trainer()
            staleness = [self.state.version - group.oldest_version for group in batch]
            self.state.step += 1
            self.state.version += 1
            await self._publish()
            await self.pool.ack(lease.id)
            self.ledger.train(ordinals)
            self._room.set()
            await self._report(metrics, batch, staleness)
            if self.evaluation.every and self.state.step % self.evaluation.every == 0:
                await self._evaluate()
            if self.state.step % self.rl.checkpoint_every == 0:
                await self._checkpoint()
        feed.cancel()
        if self.state.step == self.rl.steps:
            await self._evaluate()
            self._enter("done")

    async def _feed(self) -> None:
        """Submits groups whenever the policy has room: as many as can still be trained within the staleness bound."""
        async with asyncio.TaskGroup() as tasks:
            for group in self.state.in_flight.values():
                tasks.create_task(self._complete(group))
            while True:
                self._room.clear()
                while self.stream.capacity(self.ledger, self.state.version, self._served) > 0:
                    group = self._new_group()
                    self.ledger.submit(group.prompt.ordinal, self._served)
                    self.state.in_flight[group.prompt.ordinal] = group
                    tasks.create_task(self._complete(group))
                self.pool.expect.cast(self.ledger.pending())
                await self._room.wait()

    def _new_group(self) -> Group:
        ordinal = self.state.next_ordinal
        self.state.next_ordinal += 1
        size = self.adaptation.choose(ordinal)
        (prompt,) = self.task.prompts(self.run.seed, [ordinal], [size])
        return self._group(prompt)

    def _group(self, prompt: Prompt) -> Group:
        return Group(prompt=prompt, trajectories=[Trajectory(member=m) for m in range(self.rl.group_size)])

    async def _complete(self, group: Group) -> None:
        """Takes one group from wherever it stands into the pool, or out of the stream."""
        ordinal, ledger = group.prompt.ordinal, self.ledger
        await self._generate(group)
        judged = await self._judge(group)
        mixed = judged and has_signal(group)
        if judged:
            self.adaptation.observe(group.prompt.size, mixed=mixed)
            self.telemetry.judged(group)
        if mixed:
            key = priority(group.oldest_version, [t.reward for t in group.trajectories], ordinal)
            await self.pool.put(
                Entry(id=ordinal, key=key, started=group.oldest_version, payload=group, num_tokens=group.num_tokens)
            )
            ledger.accept(ordinal, group.oldest_version, group.num_tokens)
        else:
            if judged:
                ledger.filter(ordinal)
            else:
                ledger.fail(ordinal, "no verdict", group.num_tokens)
            self.pool.retire.cast([ordinal])
        del self.state.in_flight[ordinal]
        self._room.set()

    async def _generate(self, group: Group) -> None:
        """Has all members finished, across deaths and restarts of the worker: what was received is kept."""
        while unfinished := [t for t in group.trajectories if not t.finish]:
            request = Request(
                key=0, ordinal=group.prompt.ordinal, prompt=group.prompt.tokens,
                members=[t.member for t in unfinished], prefixes=[t.tokens() for t in unfinished],
                max_new_tokens=self.rl.max_new_tokens, temperature=self.rl.temperature,
            )  # fmt: skip
            try:
                async for chunks in self.rollout.generate.stream([request]):
                    for chunk in chunks:
                        group.trajectories[chunk.member].append(chunk)
            except ActorDied:
                self._interrupted.append(group.num_tokens)

    async def _judge(self, group: Group) -> bool:
        """Verdicts, then rewards. False if too few members could be judged: an error is never a zero reward."""
        verdicts = await self._patiently(lambda: self.verifier.judge(group))
        for trajectory, verdict in zip(group.trajectories, verdicts, strict=True):
            trajectory.verdict = verdict
        group.trajectories = [t for t in group.trajectories if t.verdict is not None and not t.verdict.error]
        if len(group.trajectories) < self.rl.min_group_size:
            return False
        for trajectory, reward in zip(
            group.trajectories, await self._patiently(lambda: self.reward.score(group)), strict=True
        ):
            trajectory.reward = reward
        return True

    async def _patiently(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Asks again when the actor died meanwhile: judging twice does no harm."""
        for _ in range(MAX_ATTEMPTS):
            try:
                return await ask()
            except ActorDied as death:
                last = death
        raise last

    # Weights and recovery -----------------------------------------------------------------------------------

    async def _ask_trainer(self, ask: Callable[[], Awaitable[Any]] | None = None) -> Any:
        """One question at a time to a trainer that holds every batch so far, whichever incarnation answers.

        Without a question: the metrics of the newest batch.
        """
        async with self._trainer_lock:
            while True:
                try:
                    metrics = await self._catch_up()
                    return metrics if ask is None else await ask()
                except ActorDied as death:
                    self.log("trainer_lost", reason=str(death), batches_to_repeat=len(self._since_checkpoint))

    async def _catch_up(self) -> dict[str, float]:
        """Shows the trainer the batches that it has not seen; all since its checkpoint if it has just come back."""
        metrics: dict[str, float] = {}
        if not self._since_checkpoint:
            return metrics
        held = await self.trainer.position(self.state.stage)
        for step, batch in self._since_checkpoint:
            if step > held:
                metrics = await self.trainer.step(step, batch)
        return metrics

    async def _publish(self) -> None:
        """Has the trainer lay out its weights as the newest version; rollout takes them while training goes on."""
        self._manifest = await self._ask_trainer(lambda: self.trainer.publish(self.state.version))
        self.background(self._arm(), name="arm rollout")

    async def _arm(self) -> None:
        """Gives rollout the newest version, if it lives; if not, `_keep_rollout_armed` does when it is back."""
        async with self._arm_lock:
            assert self._manifest is not None
            if self._served == self._manifest.version:
                return
            try:
                self._served = await self.rollout.load(self._manifest)
            except (ActorDied, RemoteError) as error:
                self.log("weights_not_taken", version=self._manifest.version, reason=str(error.args[0]))

    async def _keep_rollout_armed(self) -> None:
        incarnation = 1
        async for status in self.watch("rollout"):
            if status.incarnation != incarnation:
                incarnation = status.incarnation
                self._served = NOTHING
            if status.state == "up":
                await self._arm()
                if self._interrupted:
                    groups, tokens = len(self._interrupted), sum(self._interrupted)
                    self._interrupted.clear()
                    self.log("answers_continued", groups=groups, tokens_kept=tokens)

    async def _keep_trainer_current(self) -> None:
        incarnation = 1
        async for status in self.watch("trainer"):
            if status.state == "up" and status.incarnation != incarnation:
                incarnation = status.incarnation
                await self._publish()

    # Measuring and keeping ----------------------------------------------------------------------------------

    async def _evaluate(self) -> None:
        """Scores the newest version on the fixed problems."""
        await self._arm()
        evaluation: Evaluation = await self._patiently(self.evaluator.evaluate)
        self.telemetry.evaluated(self.state.step, evaluation)

    async def _report(self, metrics: dict[str, float], batch: list[Group], staleness: list[int]) -> None:
        """One line of metrics; what a dead worker can't say now is left out."""
        try:
            rollout = await self.rollout.stats()
        except ActorDied:
            rollout = {}
        step, version = self.state.step, self.state.version
        self.telemetry.rl_step(step, version, metrics, batch, staleness, rollout, self.ledger.counts)

    def _enter(self, stage: str) -> None:
        self.state.stage, self.state.step = stage, 0
        self.telemetry.enter(stage)

    async def _checkpoint(self) -> None:
        """Trainer, pool, half-written answers and counters of one moment, as one folder that appears whole or not at all."""
        self.state.adaptation = self.adaptation.state()
        self.state.ledger = self.ledger.snapshot()
        self.state.telemetry = self.telemetry.snapshot()
        # In this order: a group that enters the pool in between is in both, and the pool takes no id twice.
        stage, step = self.state.stage, self.state.step
        files = {STATE: dumps(self.state)}
        files[POOL] = dumps(await self.pool.snapshot())
        folder = await self._ask_trainer(lambda: self.trainer.checkpoint(stage, step, files))
        self._since_checkpoint.clear()
        self.log("checkpoint", folder=folder)

    # Messages -----------------------------------------------------------------------------------------------

    @message(concurrent=True, lane=Lane.CONTROL)
    async def drain(self) -> None:
        """Finishes the step under way, checkpoints, and ends the run; `--resume` goes on from there."""
        self._draining.set()
        self.telemetry.note = "draining: finishing the step and writing a checkpoint"

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=3600.0)
    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """Streams what a screen shows, at most a few times a second; ends with the run."""
        async for update in self.telemetry.updates():
            yield update
