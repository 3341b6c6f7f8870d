"""Whether the tables of a cluster file fit each other, and whether the stream can flow: what no single table can know.

    check_job(document, job) --> nothing, or ConfigError: file, line, rule, value, remedy

Knows nothing of how a job is built or started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime import toml
from ..runtime.cluster import ClusterSpec
from ..runtime.copies import copy_name
from ..runtime.pool import SamplePool
from ..runtime.toml import Document
from .algorithms.load import needs_critic
from .carriers import carriers
from .rollout import Rollout
from .rollout.openai.settings import address_of
from .stream.policy import stream_policy

if TYPE_CHECKING:
    from .job import Job

ROLES = ("controller", "rollout", "verifier", "reward", "pool", "trainer", "evaluator")
"""Actors that the controller asks for by name."""

SEVERAL = ("rollout",)
"""Roles of which there may be several."""


def check_job(document: Document, job: Job) -> None:
    """Raises ConfigError for the first thing that does not fit."""
    _check_roles(document, job)
    _check_task(document, job)
    _check_algorithm(document, job)
    _check_lengths(document, job)
    _check_ranks(document, job)
    _check_servers(document, job)
    _check_stream(document, job)
    _check_weights(document, job)
    _check_carrier(document, job)


def named_carrier(cluster: ClusterSpec) -> str:
    """The one that is named for weights, or "auto"."""
    return str(getattr(cluster.actors["controller"].instance, "carrier", "auto"))


def _check_roles(document: Document, job: Job) -> None:
    for role in ROLES:
        if role not in job.cluster.actors:
            hint = toml.nearest(role, set(job.cluster.actors) - set(ROLES))
            raise document.error(("actors", role), f"missing; the controller needs an actor of this name{hint}")
        if role not in SEVERAL and (count := job.cluster.actors[role].count) > 1:
            raise document.error(
                ("actors", role, "count"),
                f"must be 1, got {count}: the controller asks one {role}; only {', '.join(SEVERAL)} may be several",
            )


def _check_servers(document: Document, job: Job) -> None:
    """Each rollout worker that asks a server has one of its own."""
    spec = job.cluster.actors["rollout"]
    if isinstance(spec.instance, Rollout) and spec.instance.engine == "openai":
        try:
            address_of(spec.instance.base_url, copy_name("rollout", spec.count))
        except ValueError as error:
            raise document.error(("actors", "rollout", "base_url"), str(error).removeprefix("base_url ")) from None


def _check_task(document: Document, job: Job) -> None:
    try:
        job.task.check(job.rl.max_new_tokens)
    except ValueError as error:
        raise document.error(("task",), str(error)) from None


def _check_algorithm(document: Document, job: Job) -> None:
    """What the algorithm compares and asks for must be there."""
    rl, least = job.rl, job.algorithm.least_group
    if rl.min_group_size < least:
        raise document.error(
            ("rl", "min_group_size"),
            f"must be at least {least} for {rl.algorithm}, which compares the responses to a prompt, "
            f"got {rl.min_group_size}",
        )
    if not needs_critic(job.algorithm):
        return
    if "critic" not in job.cluster.actors:
        raise document.error(
            ("actors", "critic"),
            f"missing; {rl.algorithm} needs a critic: add [actors.critic] with "
            'class = "headrace.actors.trainer:Critic"',
        )
    if job.critic.mini_batches > rl.groups_per_step:
        raise document.error(
            ("critic", "mini_batches"),
            f"must be at most [rl] groups_per_step ({rl.groups_per_step}), got {job.critic.mini_batches}; an update "
            "needs a group",
        )


def _check_lengths(document: Document, job: Job) -> None:
    """What is generated must fit the model's positions."""
    if job.model.vocab_size < job.task.vocab_size:
        raise document.error(
            ("model", "vocab_size"),
            f"must be at least {job.task.vocab_size}, the tokens of the task, got {job.model.vocab_size}",
        )
    longest, positions = job.task.max_prompt_tokens + job.rl.max_new_tokens, job.model.max_positions
    if longest > positions:
        raise document.error(
            ("rl", "max_new_tokens"),
            f"prompts of {job.task.max_prompt_tokens} and responses of {job.rl.max_new_tokens} tokens don't fit into "
            f"[model] max_positions = {positions}; set that to {longest} or more, or this to "
            f"{positions - job.task.max_prompt_tokens} or less",
        )


def _check_ranks(document: Document, job: Job) -> None:
    """A rollout worker has as many ranks as it divides its model into."""
    for name, spec in job.cluster.actors.items():
        if isinstance(spec.instance, Rollout) and spec.ranks != spec.instance.mesh.size:
            mesh = spec.instance.mesh
            raise document.error(
                ("actors", name, "ranks"),
                f"must be tp * ep * sp = {mesh.tp} * {mesh.ep} * {mesh.sp}, got {spec.ranks}; set it to {mesh.size}",
            )


def _check_stream(document: Document, job: Job) -> None:
    """A batch, and all groups that the staleness bound lets in, must fit the pool: else the stream stands still."""
    rl = job.rl
    if rl.min_group_size > rl.group_size:
        raise document.error(
            ("rl", "min_group_size"), f"must be at most group_size ({rl.group_size}), got {rl.min_group_size}"
        )
    places = stream_policy(rl).places
    for name, spec in job.cluster.actors.items():
        if isinstance(spec.instance, SamplePool) and spec.instance.capacity < places:
            raise document.error(
                ("actors", name, "capacity"),
                f"with [rl] groups_per_step = {rl.groups_per_step} and max_staleness = {rl.max_staleness} there are up "
                f"to {places} groups in the system, and a pool of {spec.instance.capacity} could fill up with groups "
                f"that must wait for older ones; set capacity to {places} or more, or lower max_staleness",
            )


def _check_weights(document: Document, job: Job) -> None:
    """Weights as FP8 are for engines of ours that take whole tensors."""
    trainer, rollout = (job.cluster.actors[role] for role in ("trainer", "rollout"))
    if not getattr(trainer.instance, "publish_fp8", False):
        return
    engine = getattr(rollout.instance, "engine", "headrace")
    if rollout.ranks > 1 or engine != "headrace":
        raise document.error(
            ("actors", "trainer", "publish_fp8"),
            f"rollout has ranks = {rollout.ranks} and engine = {engine!r}, and FP8 comes only to workers of one rank "
            'with engine = "headrace"; set one or the other',
        )


def _check_carrier(document: Document, job: Job) -> None:
    try:
        carriers(job.cluster, named_carrier(job.cluster))
    except ValueError as error:
        raise document.error(("actors", "controller", "carrier"), str(error)) from None
