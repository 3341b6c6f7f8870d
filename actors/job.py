"""cluster.toml as a reasoning-RL job: its own tables (TABLES) beside those of any cluster.

    cluster.toml, --set --> load_job --> Job --> to_toml --> config.toml --> load_job --> an equal Job

What no single table can know is checked by job_checks.py. Builds actors but starts none; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime import Actor, toml
from ..runtime.cluster import ROOT, ClusterSpec, build, load_cluster, to_table, with_actors
from ..runtime.gang import with_ranks
from ..runtime.rundir import RunDirectory, RunSpec, write_atomically
from ..runtime.toml import ConfigError, Document
from .algorithms import Algorithm
from .algorithms.load import load_algorithm, make_algorithm
from .carriers import carriers, described
from .data import TASKS, RunningSum, Task
from .evaluator.settings import EvaluationSettings
from .job_checks import check_job, named_carrier
from .model.config import ModelConfig
from .trainer.settings import CriticSettings, RlSettings, SftSettings

TABLES = {
    "model": ModelConfig,
    "task": RunningSum,
    "sft": SftSettings,
    "rl": RlSettings,
    "algorithm": Algorithm,
    "critic": CriticSettings,
    "evaluation": EvaluationSettings,
}
"""The dataclass of each; that of `[algorithm]` is a base, the algorithm itself is named in `[rl]`, and `[task]` is of
another class where its `kind` says so."""

LAYOUT = ("nodes", "groups", "actors")
"""Tables that a resumed run may change: where its actors live and how they do their work, not what is learned."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked configuration with its actors built."""

    cluster: ClusterSpec
    model: ModelConfig
    task: Task
    sft: SftSettings
    rl: RlSettings
    algorithm: Algorithm
    critic: CriticSettings
    evaluation: EvaluationSettings

    @property
    def run(self) -> RunSpec:
        return self.cluster.run

    def table(self) -> dict[str, Any]:
        """The resolved configuration as nested dicts, every default written out."""
        return to_table(self.cluster, {name: getattr(self, name) for name in TABLES})

    def to_toml(self) -> str:
        """The resolved configuration; loads to an equal job."""
        return f"# The settings of run {self.run.name}, every default written out.\n\n{toml.dump(self.table())}"

    def describe(self) -> str:
        """What would be started, for `--check`."""
        cluster = with_ranks(self.cluster)
        homes = {node: ", ".join(s.name for s in cluster.actors_on(node)) for node in (ROOT, *cluster.nodes)}
        width = max(map(len, homes))
        lines = [
            f"run {self.run.path}, seed {self.run.seed}: {self.sft.steps} SFT steps, then {self.rl.steps} "
            f"RL steps of {self.rl.algorithm} on {self.rl.groups_per_step} groups of {self.rl.group_size}",
            *(f"  node {node:<{width}}  {actors or '(nothing, not started)'}" for node, actors in homes.items()),
            *described(carriers(self.cluster, named_carrier(self.cluster))),
        ]
        return "\n".join(lines)

    def open_run(self, *, resume: bool = False) -> RunDirectory:
        """Claims the run's directory: a new one, or that of an interrupted run. Raises ConfigError if that can't be."""
        if not resume:
            return RunDirectory.create(self.run.path, self.to_toml())
        run = RunDirectory.resume(self.run.path)
        try:
            _refuse_changes(load_job(run.config), self, run)
            write_atomically(run.config, self.to_toml().encode())
        except BaseException:
            run.close()
            raise
        return run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a program opens."""

    cluster: ClusterSpec
    job: Job | None = None
    """None for a cluster that trains nothing."""
    run_dir: Path | None = None
    """Of a cluster without a job; None for a temporary one."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Reads and checks a cluster.toml with `--set` arguments ("rl.steps=20"). Raises ConfigError."""
    return _job(toml.read(path, overrides))


def load_config(
    source: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any],
    actors: Mapping[str, Actor | type[Actor]],
    algorithm: Any,
) -> Plan:
    """Reads and checks what a program wants opened: see headrace.Config. Raises ConfigError.

    It is a training job if it says anything that only such a job has.
    """
    overrides = [f"{key}={toml.dump_value(value)}" for key, value in settings.items()]
    if isinstance(source, Mapping):
        document = toml.from_table(source, overrides)
    else:
        document = toml.read(source, overrides)
    if TABLES.keys() & document.table.keys() or "controller" in document.table.get("actors", {}):
        job = _job(document, actors, algorithm)
        return Plan(cluster=job.cluster, job=job)
    named = "run" in document.table
    document.table.setdefault("run", {"name": "embedded"})
    cluster, _ = load_cluster(document, {}, may_be_empty=True)
    cluster = with_actors(cluster, actors, {}, document)
    return Plan(cluster=cluster, run_dir=cluster.run.path if named else None)


def _job(document: Document, actors: Mapping[str, Actor | type[Actor]] | None = None, algorithm: Any = None) -> Job:
    chosen = _algorithm(document) if algorithm is None else _own_algorithm(document, algorithm)
    classes = {**TABLES, "algorithm": chosen, "task": _task_class(document)}
    cluster, tables = load_cluster(document, classes)
    job = Job(cluster=with_actors(cluster, actors or {}, tables, document), **tables)
    check_job(document, job)
    return job


def _algorithm(document: Document) -> type[Algorithm]:
    rl = build(document, ("rl",), RlSettings)
    try:
        return load_algorithm(rl.algorithm)
    except ValueError as error:
        raise document.error(("rl", "algorithm"), str(error)) from None


def _own_algorithm(document: Document, algorithm: Any) -> type[Algorithm]:
    """A program's own class or coroutine, named in the run's configuration as if the file had said so."""
    name = f"{algorithm.__module__}:{algorithm.__qualname__}"
    try:
        made = make_algorithm(algorithm, name)
    except ValueError as error:
        raise document.error(("rl", "algorithm"), str(error)) from None
    document.table.setdefault("rl", {})["algorithm"] = name
    return made


def _task_class(document: Document) -> type:
    table = document.table.get("task", {})
    kind = table.get("kind", "running_sum") if isinstance(table, dict) else "running_sum"
    if kind not in TASKS:
        hint = toml.nearest(str(kind), TASKS, otherwise=f"; known are {', '.join(TASKS)}")
        raise document.error(("task", "kind"), f"there is no task {toml.dump_value(kind)}{hint}")
    return TASKS[kind]


def _refuse_changes(old: Job, new: Job, run: RunDirectory) -> None:
    was, now = dict(_leaves(old.table())), dict(_leaves(new.table()))
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key) and key != "run.directory"]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{run.config}: the run was started with {key} = {toml.dump_value(was.get(key, 'nothing'))}, now it is "
            f"{toml.dump_value(now.get(key, 'nothing'))}{more}; resume it with the settings it had, or start another "
            "with --set run.name=NAME"
        )


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in LAYOUT:
            yield from _leaves(value, f"{prefix}{key}.")
        elif prefix + key not in LAYOUT:
            yield prefix + key, value
