"""The ranks of a cluster file's worker groups, as actors, nodes and groups of their own.

    [actors.trainer]  node = "trainer", ranks = 3      trainer     on node trainer      .
                                                       trainer/1   on node trainer-1    | group trainer: one_for_all
                                                       trainer/2   on node trainer-2    '

Each node is like that of rank 0, unless [nodes.trainer-1] says otherwise. So are those of copies (`count = N`; see
copies.py), which come first: a copy has all its ranks. Starts nothing.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import cast

from .cluster import ActorSpec, ClusterSpec, GroupSpec, NodeSettings
from .copies import copy_name, home_of
from .layout import Layout
from .worker import Worker
from .worker_group import rank_names


def with_ranks(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with every copy and every rank written out; an equal one if there are none."""
    cluster = _with_copies(cluster)
    nodes, groups, actors = dict(cluster.nodes), dict(cluster.groups), {}
    for spec in cluster.actors.values():
        if spec.ranks == 1:
            actors[spec.name] = spec
            continue
        gang = _free(spec.name, groups)
        groups[gang] = GroupSpec(strategy="one_for_all", parent=spec.group, policy=spec.policy)
        for rank in _ranks(spec, gang):
            actors[rank.name] = rank
            if rank.name != spec.name:
                nodes.setdefault(rank.node, cluster.nodes.get(spec.node, NodeSettings()))
    return replace(cluster, nodes=nodes, groups=groups, actors=actors)


def _with_copies(cluster: ClusterSpec) -> ClusterSpec:
    nodes, actors = dict(cluster.nodes), {}
    for spec in cluster.actors.values():
        for number in range(1, spec.count + 1):
            name = copy_name(spec.name, number)
            node = spec.node if number == 1 else home_of(name)
            actors[name] = replace(spec, name=name, node=node, instance=copy(spec.instance), count=1)
            if number > 1:
                nodes.setdefault(node, cluster.nodes.get(spec.node, NodeSettings()))
    return replace(cluster, nodes=nodes, actors=actors)


def _ranks(spec: ActorSpec, gang: str) -> list[ActorSpec]:
    names, layout = rank_names(spec.name, spec.ranks), Layout(dp=spec.ranks)
    ranks = []
    for rank, name in enumerate(names):
        instance = replace(cast(Worker, spec.instance), rank=rank, layout=layout)
        node = spec.node if rank == 0 else f"{spec.name}-{rank}"
        ranks.append(replace(spec, name=name, node=node, group=gang, instance=instance, ranks=1))
    return ranks


def _free(name: str, taken: dict[str, GroupSpec]) -> str:
    while name in taken:
        name += "-ranks"
    return name
