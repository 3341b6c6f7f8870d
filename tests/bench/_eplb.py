"""The placement that others use, as the bar: DeepSeek's Expert Parallelism Load Balancer, written from its description.

Two pieces. Replicas: while there are slots, the expert with the most load per replica gets one more. Packing: items
from the heaviest to the lightest, each to the lightest pack that has room. With groups and nodes, groups are first
packed to nodes, experts replicated inside their node, and replicas packed to the node's ranks. It knows no earlier
placement, and replicas of one expert share its load alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Ints = NDArray[np.int64]


def eplb(load_E: Array, num_slots: int, num_ranks: int, *, groups: int = 1, nodes: int = 1) -> Ints:
    """The expert of each slot, int64 [P]; slots of a rank are neighbours, ranks of a node too."""
    load = np.asarray(load_E, np.float32)
    size = len(load) // groups
    group_packs = _pack(load.reshape(groups, size).sum(1), nodes)
    slots = []
    for packed in group_packs:
        experts = np.concatenate([np.arange(group * size, (group + 1) * size) for group in packed])
        replicas, counts = _replicate(load[experts], num_slots // nodes)
        ranks = _pack((load[experts] / counts)[replicas], num_ranks // nodes)
        slots += [experts[replicas[rank]] for rank in ranks]
    return np.concatenate(slots)


def _replicate(load: Array, num_slots: int) -> tuple[Ints, Array]:
    """Experts with their replicas after them, in the order of their making; and how many each has."""
    counts = np.ones(len(load), np.float32)
    replicas = list(range(len(load)))
    while len(replicas) < num_slots:
        neediest = int(np.argmax(load / counts))
        counts[neediest] += 1
        replicas.append(neediest)
    return np.array(replicas), counts


def _pack(weights: Array, num_packs: int) -> list[list[int]]:
    """Items of each pack, in the order in which they came."""
    room = len(weights) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [np.float32(0)] * num_packs
    if room == 1:
        return [[index] for index in range(num_packs)]
    for item in np.argsort(-weights, kind="stable"):
        lightest = min((p for p in range(num_packs) if len(packs[p]) < room), key=total.__getitem__)
        packs[lightest].append(int(item))
        total[lightest] += weights[item]
    return packs
