"""The whole run in one file: warm up by imitation, then stream batches to a reinforcement learning algorithm.

    prompts -> rollout (newest version) -> verifier -> reward -> sample pool -> trainer
       ^          ^   partial answers go on, whatever died     |                  |
       |          '------------- weights of version v+1 <------|------------------'
       '---------- questions that still teach <-------------'

Everything heavy is an actor. The controller holds the run's state and nobody else does: each of the others may be
killed at any moment. A rollout worker that comes back is given the newest weights and goes on with the answers it had
half written. A trainer or critic that comes back loads its last checkpoint and is shown the updates since then
(trainer/durable.py). What a step does with its batch is the algorithm's (algorithms/). Knows nothing of tensors,
processes or sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ..runtime import Actor, Lane, Ref, message, timeout
from ..runtime.codec import dumps
from ..runtime.errors import (
    ActorDied,
    DeadlineExceeded,
    RemoteError,
    RuntimeFault,
    UnknownActor,
    UnknownMessage,
)
from ..runtime.exchange import Manifest
from ..runtime.pool import Entry, Lease
from ..runtime.rundir import RunSpec
from .algorithms import Algorithm, Batch, Metrics
from .algorithms.groups import has_signal
from .algorithms.load import needs_critic, roles_of
from .data.task import Task
from .evaluator import Evaluation
from .evaluator.settings import EvaluationSettings
from .patience import patiently
from .report import Row
from .rollout.pool import NOTHING, RolloutPool
from .run_state import POOL, STATE, load_state
from .stream.ledger import Ledger
from .stream.policy import priority, stream_policy
from .stream.stories import Stories, described
from .telemetry import Telemetry
from .trainer.actor import Trainer
from .trainer.critic import Critic
from .trainer.durable import DurableCritic, DurableTrainer
from .trainer.settings import RlSettings, SftSettings
from .types import Group, Prompt, Trajectory, refusal_kind

LEASE_S = 600.0
"""Longest wait for a training batch; past it the run is given up, and says what it waited for."""

STATS_S = 2.0
"""Longest wait for numbers that are only shown."""

DRAIN_S = 10.0
"""How long a run that drains waits for an evaluation: a verifier that does not answer must not hold it up."""

SAMPLES_BEHIND = 256
"""Groups that wait for each reader of samples."""

TRAINER = "trainer"
"""Holder of the leases."""

BALANCE_S = 0.5
"""Longest wait for the balancer, which nothing depends on."""


@dataclass(kw_only=True)
class Controller(Actor):
    """Runs the job from its beginning, or from its last checkpoint, to its end."""

    run: RunSpec
    task: Task
    sft: SftSettings
    rl: RlSettings
    algorithm: Algorithm
    evaluation: EvaluationSettings
    carrier: Literal["auto", "ipc", "nccl", "shm", "tree"] = "auto"
    """What brings weights to rollout; auto: the best for each worker."""

    live = ("rl.max_staleness", "rl.alpha", "rl.temperature", "rl.learning_rate")

    async def start(self) -> None:
        """Takes up the state of the newest checkpoint. Raises ValueError or FileNotFoundError if it is damaged."""
        self.state, self._pool_state = load_state(self.run.path)
        self.trainer = DurableTrainer(self.worker_group("trainer", Trainer), self.state, self.rl)
        self.critic = DurableCritic(self.worker_group("critic", Critic), self.state)
        roles = {"policy": self.trainer, "critic": self.critic}
        self.roles = {name: roles[name] for name in roles_of(self.algorithm.step)}
        self.steps = {"sft": self.sft.steps, "value": self.algorithm.value_steps, "rl": self.rl.steps}
        self.rollout, self.evaluator = RolloutPool(self, self, carrier=self.carrier), self.find("evaluator")
        self.verifier, self.reward, self.pool = self.find("verifier"), self.find("reward"), self.find("pool")
        self.stream, self.stories = stream_policy(self.rl), Stories()
        self.expose("rollout_pool", self.rollout)
        self.ledger = Ledger.restore(self.state.ledger) if self.state.ledger else Ledger()
        self.questions = self.task.questions(self.run.seed)
        if self.state.adaptation:
            self.questions.load_state(self.state.adaptation)
        self.telemetry = Telemetry(self.run.path, self.state.stage, self.state.step, self.state.telemetry)
        self.telemetry.begin(self.steps.get(self.state.stage, self.rl.steps))
        self._unbalanced = False
        self._readers: set[asyncio.Queue[Group]] = set()
        if self._pool_state is not None:
            self.log("resumed", stage=self.state.stage, step=self.state.step)
        self._room, self._draining = asyncio.Event(), asyncio.Event()
        self.background(self._main(), name="main")

    async def stop(self, reason: BaseException | None) -> None:
        self.telemetry.close()

    async def changed(self) -> None:
        """From the next step, and the next token, on."""
        self.stream = stream_policy(self.rl)
        self.trainer.rl = self.rl
        self._room.set()

    async def _main(self) -> None:
        await self.trainer.rewind()
        await self._rewind_critic()
        if self._pool_state is not None:
            await self.pool.take_over(self._pool_state)
            await self.pool.release_holder(TRAINER)
        await self.rollout.open()
        await self._publish()
        self.background(self._watch_trainer(), name="watch trainer")
        try:
            if self.state.stage == "sft":
                await self._warm_up()
            if self.state.stage in ("value", "rl"):
                await self._stream()
        except DeadlineExceeded as error:
            self.telemetry.finish(str(error))
            return
        await self._checkpoint()
        self.telemetry.finish()

    # Warm-up ------------------------------------------------------------------------------------------------

    async def _warm_up(self) -> None:
        """SFT on the demonstrator's answers."""
        self.telemetry.begin(self.sft.steps)
        if self.state.sft_steps == 0 and not self._draining.is_set():
            await self._first_rollout()
            await self._checkpoint()
        while self.state.sft_steps < self.sft.steps and not self._draining.is_set():
            done = self.state.sft_steps
            until = min(done + self.sft.report_every, self.sft.steps)
            metrics = await self.trainer.warm_up(until)
            last = until == self.sft.steps
            self.state.version = int(last)
            row = self.telemetry.sft_step(until, self.state.version, metrics)
            if last:
                await self._publish()
                row = {**row, **await self._evaluate()}
            self.telemetry.write(row)
            if last or until // self.sft.checkpoint_every > done // self.sft.checkpoint_every:
                await self._checkpoint()
        if self.state.sft_steps == self.sft.steps:
            await self._rewind_critic()  # It begins as the policy that the warm-up has made.
            self._enter_next()

    async def _first_rollout(self) -> None:
        """One group through the whole stream before anything is trained: what is broken shows at once."""
        group = self._group(self.task.evaluation_set(self.run.seed, 1)[0])
        if failure := await self._generate(group):
            raise RuntimeError(f"the first rollout was refused: {failure}")
        await self._judge(group)
        self.log("first_rollout", after_s=round(self.telemetry.elapsed_s, 2), tokens=group.num_tokens)

    # The stream ---------------------------------------------------------------------------------------------

    async def _stream(self) -> None:
        """Learns from batches as they come, while `_feed` keeps rollout supplied within the staleness bound."""
        self._enter_next()
        self.telemetry.begin(self.steps.get(self.state.stage, self.rl.steps))
        feed = self.background(self._feed(), name="feed")
        while self.state.stage != "done" and (lease := await self._lease()):
            groups = [entry.payload for entry in lease.entries]
            ordinals = [entry.id for entry in lease.entries]
            staleness = [self.state.version - group.oldest_version for group in groups]
            self.ledger.take(ordinals)
            await self._drop_stale()
            metrics = await self._learn(Batch(groups))
            await self.pool.ack(lease.id)
            self.ledger.train(ordinals)
            for group, stale in zip(groups, staleness, strict=True):
                self.stories.tell(group, "trained", step=self.state.step, staleness=stale)
            self._room.set()
            row = await self._measure(metrics, groups, staleness)
            stage, step = self.state.stage, self.state.step
            last = step == self.steps[stage]
            if stage == "rl" and (last or (self.evaluation.every and step % self.evaluation.every == 0)):
                row = {**row, **await self._evaluate()}
            self.telemetry.write(row)
            if (last and stage == "value") or (not last and step % self.rl.checkpoint_every == 0):
                await self._checkpoint()
            self._enter_next()
        feed.cancel()

    async def _learn(self, batch: Batch) -> Metrics:
        """One step: of the critic alone while it is pretrained, then of the whole algorithm."""
        if self.state.stage == "value":
            metrics: Metrics = await self.algorithm.pretrain(batch, critic=self.critic)
            self.state.value_steps += 1
            return metrics
        done = self.state.rl_steps
        metrics = await self.algorithm.step(batch, **self.roles)
        if self.state.rl_steps != done + 1:
            raise ValueError(
                f"{self.rl.algorithm} called policy.update {self.state.rl_steps - done} times in a step; a step makes "
                "one policy version, so it must be called once"
            )
        await self._publish()
        return metrics

    async def _drop_stale(self) -> None:
        """Finished groups past the bound will never be trained: there are some only if the bound was lowered."""
        for ordinal, started in list(self.ledger.pooled.items()):
            if started < self.state.version - self.stream.max_staleness:
                why = f"staler than {self.stream.max_staleness}"
                await self.pool.discard(ordinal, why)  # If the pool has not dropped it by itself.
                self.ledger.drop(ordinal, why)

    async def _lease(self) -> Lease | None:
        """The next batch; None if the run is told to drain before there is one."""
        asking = self.pool.lease(self.stream.batch, self.state.version, holder=TRAINER)
        lease = asyncio.create_task(asking, name=f"{self.name}:main")
        drained = asyncio.create_task(self._draining.wait())
        try:
            with self.telemetry.waiting():
                await asyncio.wait({lease, drained}, timeout=LEASE_S, return_when=asyncio.FIRST_COMPLETED)
            if self._draining.is_set():
                return None
            if not lease.done():
                reasons = "; ".join([*(wait["for"] for wait in await self.pool.waits()), *self.rollout.waits()])
                counts = ", ".join(f"{count} {place}" for place, count in self.ledger.counts.items() if count)
                raise DeadlineExceeded(f"no batch to train within {LEASE_S:g} s: {reasons}. Groups so far: {counts}")
            result: Lease = lease.result()
            return result
        finally:
            lease.cancel()
            drained.cancel()

    async def _feed(self) -> None:
        """Submits groups whenever the policy has room: as many as can still be trained within the staleness bound."""
        async with asyncio.TaskGroup() as tasks:
            for group in self.state.in_flight.values():
                self._begin(group, tasks)
            while True:
                self._room.clear()
                held = self.rollout.newest
                while held != NOTHING and self.stream.capacity(self.ledger, self.state.version, held) > 0:
                    group = self._new_group()
                    self.ledger.submit(group.prompt.ordinal, held)
                    self.state.in_flight[group.prompt.ordinal] = group
                    self._begin(group, tasks)
                self.pool.expect.cast(self.ledger.pending())
                await self._room.wait()

    def _begin(self, group: Group, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self._complete(group), name=f"{self.name}:group {group.prompt.ordinal}")

    def _new_group(self) -> Group:
        ordinal = self.state.next_ordinal
        self.state.next_ordinal += 1
        return self._group(self.questions.prompt(ordinal))

    def _group(self, prompt: Prompt) -> Group:
        return Group(prompt=prompt, trajectories=[Trajectory(member=m) for m in range(self.rl.group_size)])

    async def _complete(self, group: Group) -> None:
        """Takes one group from wherever it stands into the pool, or out of the stream."""
        ordinal, ledger = group.prompt.ordinal, self.ledger
        failure = await self._generate(group) or await self._judge(group)
        if not failure:
            self.telemetry.judged(group)
            self._tell_samples(group)
            self.questions.observe(group, mixed=has_signal(group))
        if not failure and (self.state.stage == "value" or self.algorithm.keeps(group)):
            started, num_tokens = group.oldest_version, group.num_tokens
            key = priority(started, [t.reward for t in group.trajectories], ordinal)
            await self.pool.put(Entry(id=ordinal, key=key, started=started, payload=group, num_tokens=num_tokens))
            ledger.accept(ordinal, started, num_tokens)
        else:
            if not failure:
                ledger.filter(ordinal)
                self.stories.tell(group, "filtered", reason="it teaches nothing (dynamic sampling)")
            else:
                kind = refusal_kind(failure)
                if kind not in ledger.reasons:
                    self.log("group_failed", ordinal=ordinal, reason=failure)
                ledger.fail(ordinal, kind, group.num_tokens)
                self.stories.tell(group, "failed", reason=failure)
            self.pool.retire.cast([ordinal])
        del self.state.in_flight[ordinal]
        self._room.set()

    async def _generate(self, group: Group) -> str:
        """Answers. Returns "kind: why" if the engine refused so many of them that the group fails."""
        started = self.ledger.pending().get(group.prompt.ordinal, 0)
        await self.rollout.finish(group, started, **self.rl.sampling())
        refusals = [t.refusal for t in group.trajectories if t.finish == "refused"]
        group.trajectories = [t for t in group.trajectories if t.finish != "refused"]
        return refusals[0] if refusals and len(group.trajectories) < self.rl.min_group_size else ""

    async def _judge(self, group: Group) -> str:
        """Verdicts, then rewards. Returns "kind: why" if the group fails: an error is never a zero reward."""
        try:
            verdicts = await patiently(lambda: self.verifier.judge(group.as_read()))
            for trajectory, verdict in zip(group.trajectories, verdicts, strict=True):
                trajectory.verdict = verdict
            group.trajectories = [t for t in group.trajectories if t.verdict is not None and not t.verdict.error]
            if len(group.trajectories) < self.rl.min_group_size:
                return f"too few verdicts: {next((v.error for v in verdicts if v.error), 'too few responses')}"
            rewards = await patiently(lambda: self.reward.score(group.as_read()))
        except RemoteError as error:
            return f"{error.remote_type}: {error.args[0]}"
        except DeadlineExceeded as error:
            return f"no verdict in time: {error}"
        for trajectory, reward in zip(group.trajectories, rewards, strict=True):
            trajectory.reward = reward
        return ""

    # Weights and recovery -----------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Has the trainer lay out its weights as the newest version; rollout takes them while training goes on."""
        await self.rollout.publish(self.state.version)

    async def lay_out(self, version: int, keep: dict[int, list[str]]) -> Manifest:
        return await self.trainer.publish(keep)

    def halted(self, group: Group) -> None:
        if group.prompt.ordinal in self.ledger.running:
            self.ledger.pause(group.prompt.ordinal)

    def continued(self, group: Group) -> None:
        if group.prompt.ordinal in self.ledger.partial:
            self.ledger.resume(group.prompt.ordinal)

    def armed(self, publish_s: float) -> None:
        self.telemetry.armed(publish_s)
        self._room.set()

    async def _watch_trainer(self) -> None:
        incarnation = 0
        async for status in self.watch("trainer"):
            if status.state == "up" and status.incarnation != incarnation:
                if incarnation:
                    batches = self.trainer.num_kept
                    await self._publish()
                    if batches:
                        self.log("batches_repeated", batches=batches)
                incarnation = status.incarnation

    # Measuring and keeping ----------------------------------------------------------------------------------

    async def _evaluate(self) -> Row:
        """Scores the newest version on the fixed problems; {} if that does not end soon after the run is to drain."""
        await self.rollout.arm_first()
        evaluation = asyncio.create_task(self._ask_evaluator(), name=f"{self.name}:evaluation")
        drained = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({evaluation, drained}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({evaluation}, timeout=DRAIN_S)
            if not evaluation.done():
                self.log("evaluation_given_up", after_s=DRAIN_S)
                return {}
            return self.telemetry.evaluated(self.state.step, evaluation.result())
        finally:
            evaluation.cancel()
            drained.cancel()

    async def _ask_evaluator(self) -> Evaluation:
        evaluation: Evaluation = await patiently(self.evaluator.evaluate)
        return evaluation

    async def _measure(self, metrics: dict[str, float], batch: list[Group], staleness: list[int]) -> Row:
        """The line of metrics of a step; what a dead worker can't say now is left out."""
        rollout, verifier = await asyncio.gather(self.rollout.stats(), self._stats(self.verifier))
        step, version = self.state.step, self.state.version
        stage, counts = self.state.stage, self.ledger.counts
        if stage == "rl":
            metrics = metrics | await self._balance(step)
        row = self.telemetry.stream_step(stage, step, version, metrics, batch, staleness, rollout, counts)
        return {**row, **self.telemetry.verified(verifier), **self.questions.metrics()}

    async def _stats(self, actor: Ref) -> dict[str, Any]:
        with suppress(ActorDied, TimeoutError, UnknownMessage):
            async with timeout(STATS_S):
                return dict(await actor.stats())
        return {}

    async def _balance(self, step: int) -> dict[str, float]:
        """What the balancer says of a step; nothing if there is none, or it fails: nothing else depends on it."""
        balanced: dict[str, float] = {}
        try:
            async with timeout(BALANCE_S):
                balanced = await self.find("balancer").balance(step)
        except UnknownActor:
            pass
        except (RuntimeFault, TimeoutError) as error:
            if not self._unbalanced:
                self.log("balancer_failed", step=step, reason=str(error))
            self._unbalanced = True
        return balanced

    def _enter_next(self) -> None:
        """Goes on to the next stage that has steps left, if this one has none."""
        stages = [*self.steps, "done"]
        while self.state.stage != "done" and self.state.step >= self.steps[self.state.stage]:
            self.state.stage = stages[stages.index(self.state.stage) + 1]
        if self.state.stage != self.telemetry.stage:
            self.telemetry.enter(self.state.stage)
            self.telemetry.begin(self.steps.get(self.state.stage, self.rl.steps))

    async def _rewind_critic(self) -> None:
        if needs_critic(self.algorithm):
            await self.critic.rewind()

    async def _checkpoint(self) -> None:
        """Trainer, pool, half-written answers and counters of one moment, as one folder: all of it or nothing."""
        name = f"{self.state.stage}-{self.state.step:06d}"
        parts = await self.critic.checkpoint(name)
        self.state.adaptation = self.questions.state()
        self.state.ledger = self.ledger.snapshot()
        self.state.telemetry = self.telemetry.snapshot()
        # In this order: a group that enters the pool in between is in both, and the pool takes no id twice.
        files = {STATE: dumps(self.state)}
        files[POOL] = dumps(await self.pool.state())
        self.log("checkpoint", folder=await self.trainer.checkpoint(name, files, parts))
        self.critic.forget()

    # Messages -----------------------------------------------------------------------------------------------

    @message(concurrent=True, lane=Lane.CONTROL)
    async def drain(self) -> None:
        """Finishes the step under way, checkpoints, and ends the run; `--resume` goes on from there."""
        self._draining.set()
        self.telemetry.say("draining: finishing the step and writing a checkpoint; Ctrl-C again stops at once")

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=600.0)
    async def resize_rollout(self, count: int) -> list[str]:
        """Goes on with `count` rollout workers; returns their names. Raises ValueError for less than one."""
        return await self.rollout.resize(count)

    @message(concurrent=True, lane=Lane.CONTROL)
    async def rollout_workers(self) -> list[dict[str, Any]]:
        """See RolloutPool.status."""
        return self.rollout.status()

    @message(concurrent=True, lane=Lane.CONTROL)
    async def explain(self, ordinal: int) -> list[dict[str, Any]]:
        """What became of a group, or where it stands: who generated which tokens, verdicts, rewards.
        Raises LookupError if that is not known."""
        group = self.state.in_flight.get(ordinal)
        if group is None:
            return self.stories.of(ordinal, self.state.next_ordinal)
        return [{"event": "generated" if group.finished else "generating", "prompt": ordinal}, *described(group)]

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=3600.0)
    async def samples(self) -> AsyncIterator[Group]:
        """Streams judged groups as they come; a reader that is SAMPLES_BEHIND groups behind misses the oldest."""
        queue: asyncio.Queue[Group] = asyncio.Queue(SAMPLES_BEHIND)
        self._readers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._readers.discard(queue)

    def _tell_samples(self, group: Group) -> None:
        for queue in self._readers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(group)

    @message(concurrent=True, lane=Lane.CONTROL, deadline_s=3600.0)
    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """Streams what a screen shows, at most a few times a second; ends with the run."""
        async for update in self.telemetry.updates():
            yield update
