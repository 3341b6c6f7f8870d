"""headrace inside somebody's own program: a cluster that is a value.

    async with headrace.open_cluster("cluster.toml") as cluster:      headrace.run("cluster.toml")
        async for step in cluster.steps(): ...

A cluster file with the tables of a training job runs that job; one without is just its actors. Works on whatever event
loop is running (a script's, pytest-asyncio's, a notebook's), and leaves nothing behind: processes, sockets and shared
memory end with the `async with`, however that ends. Prints nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .following import Following, position, start_actors
from .runtime import Actor, NodeSpec, Ref, RestartPolicy, System
from .runtime.errors import ActorDied, RuntimeFault

if TYPE_CHECKING:
    from .actors.algorithms import Algorithm
    from .actors.job import Job
    from .actors.types import Group
    from .runtime.cluster import ClusterSpec
    from .runtime.rundir import RunDirectory

EVENTS_BEHIND = 1024
"""Events that someone who iterates over them may be behind; then the oldest are left out."""

AGAIN_S = 0.2
"""After the controller died: before it is asked again."""

DRAIN_S = 120.0
"""Time to finish a step and write its checkpoint."""


@dataclass(frozen=True)
class Config:
    """What is to be opened: a cluster file, or nested dicts like one, and what a program changes in it."""

    source: str | Path | Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values in place of the file's: {"rl.steps": 20}."""
    actors: Mapping[str, Actor | type[Actor]] = field(default_factory=dict)
    """Actors in the place of the file's, or beside them. A class gets the tables that its fields name, as in the file;
    what no other process could import lives in this one."""
    algorithm: Callable[..., Awaitable[dict[str, float]]] | type[Algorithm] | None = None
    """In the place of `[rl] algorithm`: a class derived from Algorithm, or `async def step(batch, *, policy)`."""


@asynccontextmanager
async def open_cluster(
    config: str | Path | Mapping[str, Any] | Config, *, resume: bool = False
) -> AsyncGenerator[Cluster, None]:
    """Starts what `config` describes, all actors of it, and ends it.

    Raises ConfigError for what can't be, before anything is started; LaunchError or RemoteError if an actor does not
    start; and at its end what the system failed with, unless the body raised something itself.
    """
    from .actors.job import load_config

    given = config if isinstance(config, Config) else Config(config)
    plan = load_config(given.source, given.settings, given.actors, given.algorithm)
    if plan.job is None:
        async with _make_system(plan.cluster, plan.run_dir) as system:
            await start_actors(system, plan.cluster)
            yield Cluster(system)
            _raise_failure(system)
        return
    with plan.job.open_run(resume=resume) as run:
        async with _job(plan.job, run) as cluster:
            yield cluster


def run(config: str | Path | Mapping[str, Any] | Config, *, resume: bool = False) -> dict[str, Any]:
    """Runs a job to its end, from a program without an event loop, and returns its summary (summary.json).

    Also where a loop runs in this thread, as in a notebook: it is blocked meanwhile. Ctrl-C stops it in good order and
    raises KeyboardInterrupt. Raises as `open_cluster`, and RuntimeFault if the run fails.
    """

    async def whole() -> dict[str, Any]:
        async with open_cluster(config, resume=resume) as cluster:
            return await cluster.wait()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(whole())
    return _in_thread(whole)


class Cluster:
    """A running cluster, made by `open_cluster`."""

    def __init__(self, system: System, seen: Following | None = None, job: Job | None = None) -> None:
        self.system = system
        """The supervisor beneath: groups, policies, stacks."""
        self.job = job
        """The training job, if there is one."""
        self._seen = seen
        self._ended: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # Actors -------------------------------------------------------------------------------------------------

    def find(self, name: str | type[Actor]) -> Ref:
        """The ref to an actor by name, or to the only one of a class. Raises LookupError if there is no such one."""
        if isinstance(name, str):
            self.system.node.directory.get(name)
            return self.system.find(name)
        names = [status.name for status in self.system.node.directory.all() if status.class_name == name.__name__]
        if len(names) != 1:
            raise LookupError(
                f"there are {len(names)} actors of class {name.__name__}{_listed(names)}; find one by name"
            )
        return self.system.find(names[0])

    async def spawn(self, actor: Actor, *, name: str, node: str = "root", policy: RestartPolicy | None = None) -> Ref:
        """Starts one more actor, supervised as all are: see System.spawn."""
        return await self.system.spawn(actor, name=name, node=node, policy=policy)

    async def resize(self, of: str, count: int) -> list[str]:
        """Has `count` actors that are configured as `of` is, and returns their names; for rollout workers what those
        that leave were writing goes on elsewhere."""
        asked = self.system.find("controller").resize_rollout(count) if self._seen and of == "rollout" else None
        names: list[str] = await (asked or self.system.find("$root").resize(of, count))
        return names

    # Looking ------------------------------------------------------------------------------------------------

    def tree(self) -> list[dict[str, Any]]:
        """One row per actor: see System.tree."""
        return self.system.tree()

    async def waits(self) -> list[dict[str, Any]]:
        """Who waits for whom: see System.waits."""
        return await self.system.waits()

    async def dead_letters(self) -> list[dict[str, Any]]:
        """What could not be delivered: see System.dead_letters."""
        return await self.system.dead_letters()

    @property
    def run_dir(self) -> Path:
        """Where the run's files are."""
        return self.system.run_dir

    # The job ------------------------------------------------------------------------------------------------

    async def steps(self) -> AsyncIterator[dict[str, Any]]:
        """The rows of metrics.jsonl, those that were there first, until the run is over.

        Raises RuntimeFault if it fails, and TypeError if this cluster trains nothing.
        """
        seen, last = self._job(), (-1, 0)
        assert self._ended is not None
        while True:
            changed, over = self._changed, self._ended.done()
            # A controller that comes back tells its rows again.
            for row in [row for row in seen.state["rows"] if position(row) > last]:
                last = position(row)
                yield row
            if over:
                break
            await changed.wait()
        await self._ended

    async def samples(self) -> AsyncIterator[Group]:
        """Judged groups, as they come, whether they are trained or filtered, until the run is over. Those that a slow
        reader can't take in, or that are judged while the controller is started again, are left out."""
        self._job()
        assert self._ended is not None
        while not self._ended.done():
            stream = aiter(self.system.find("controller").samples.stream())
            try:
                while group := await self._unless_over(anext(stream)):
                    yield group
            except ActorDied:
                await asyncio.sleep(AGAIN_S)

    async def _unless_over(self, coming: Awaitable[Group]) -> Group | None:
        """What comes, or None if the run is over before."""
        assert self._ended is not None
        next_one = asyncio.ensure_future(coming)
        try:
            await asyncio.wait([next_one, self._ended], return_when=asyncio.FIRST_COMPLETED)
            return await next_one if next_one.done() else None
        finally:
            next_one.cancel()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Lines of events.jsonl, the last ones first, until the cluster ends; see EVENTS_BEHIND."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(EVENTS_BEHIND)

        def listen(event: dict[str, Any]) -> None:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

        log = self.system.events
        for event in list(log.recent):
            listen(event)
        log.listeners.append(listen)
        try:
            while True:
                event = await queue.get()
                yield event
                if event["event"] == "system_stop":
                    return
        finally:
            log.listeners.remove(listen)

    def text(self, tokens: Any) -> str:
        """What token ids mean to people, in the job's task."""
        self._job()
        assert self.job is not None
        return self.job.task.decode(tokens)

    async def wait(self) -> dict[str, Any]:
        """Returns what summary.json says, when the run is over. Raises RuntimeFault if it fails."""
        seen = self._job()
        assert self._ended is not None
        await asyncio.shield(self._ended)
        return dict(seen.summary)

    async def drain(self) -> None:
        """Finishes the step under way, writes a checkpoint, and ends the run; `resume` goes on from there."""
        self._job()
        assert self._ended is not None
        await self.system.find("controller").drain()
        async with asyncio.timeout(DRAIN_S):
            await asyncio.shield(self._ended)

    def _job(self) -> Following:
        if self._seen is None:
            raise TypeError("this cluster trains nothing: its file has no controller")
        return self._seen

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@asynccontextmanager
async def _job(job: Job, run: RunDirectory) -> AsyncGenerator[Cluster, None]:
    """A job from its start to its end, or to that of the body."""
    async with _make_system(job.cluster, run) as system:
        cluster = Cluster(system, job=job)
        cluster._seen = seen = Following(system, job, run, cluster._tell)
        watching = asyncio.create_task(seen.watch())
        cluster._ended = ended = asyncio.create_task(_until_over(system, seen, watching))
        ended.add_done_callback(lambda _: cluster._tell())
        reason = "stopped by the program"
        try:
            up = asyncio.create_task(seen.up.wait())
            try:
                await asyncio.wait([up, ended], return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
            if ended.done():
                ended.result()
            yield cluster
            if ended.done():
                ended.result()
        except RuntimeFault as error:
            reason = str(error.args[0] if error.args else error).partition("\n")[0]
            system.events.write("run_failed", reason=reason)
            raise
        finally:
            for task in (ended, watching):
                task.cancel()
            with suppress(asyncio.CancelledError, RuntimeFault):
                await ended
            seen.conclude(reason)


async def _until_over(system: System, seen: Following, watching: asyncio.Task[None]) -> None:
    work = asyncio.create_task(seen.run())
    try:
        await asyncio.wait([work, watching, system.failed], return_when=asyncio.FIRST_COMPLETED)
        for end in (system.failed, work, watching):
            if end.done():
                end.result()
    finally:
        work.cancel()


def _make_system(cluster: ClusterSpec, run_dir: RunDirectory | Path | None) -> System:
    from .runtime.gang import with_ranks

    nodes: dict[str, NodeSpec] = {name: node.spec(name) for name, node in with_ranks(cluster).nodes.items()}
    return System(run_dir, nodes=nodes, seed=cluster.run.seed)


def _raise_failure(system: System) -> None:
    if system.failed.done():
        system.failed.result()


def _listed(names: list[str]) -> str:
    return f" ({', '.join(sorted(names))})" if names else ""


def _in_thread(work: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any]:
    """Runs a coroutine on a loop of its own, in a thread of its own; cancelled by what interrupts the caller."""
    outcome: Future[dict[str, Any]] = Future()
    started: Future[Callable[[], object]] = Future()

    async def main() -> dict[str, Any]:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        started.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work()

    def target() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001  # It is raised in the caller's thread.
            outcome.set_exception(error)

    thread = threading.Thread(target=target, name="headrace.run")
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        started.result()()
        raise
    finally:
        thread.join()
