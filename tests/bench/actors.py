"""The actor runtime beside raw ZeroMQ: latency, rates, arrays, faults, spawning, fan-in; and its peers.

One run, on the cores that it is given; two are enough. Raw floors (_floor.py) are taken in the same run, in the same
process, with the same pinning, and turn by turn with what they are compared with. A ratio is one of medians over the
rounds. p50 and p90 have bars; p99 is reported only, for waking a core now and then takes milliseconds.

same_core_, cross_core_  where asking and answering side run; see _messages.py. Each has its own bars, and each must be
                         met: nothing is averaged over them.
call, calls_100, casts   one call at a time; calls per second with 100 in flight; casts handled per second. The floor of
                         the first is a raw round trip, that of the others raw coalesced messages (Z). cpu_us: processor
                         time of both processes per call, which stays true on a machine that others keep busy.
100kb, 500kb             a call with an array of that size, beside the same array by raw ZeroMQ.
copy_in_64mib            one memcpy of 64 MiB beside the whole call with that array: 1 would be a copy and nothing else.
born_64mib               the whole call with an array that was made by `Actor.empty`.
control_beside_bulk      control calls between two nodes while such arrays are copied between the same two, beside idle
                         ones; control_beside_born: arrays that were made in shared memory. Not pinned.
error, back              from SIGKILL of a node to the error at its caller; to the answer of its next incarnation.
suspected                from a loop's standstill to the event, in heartbeats: the longest of all trials.
spawn_in_process         actors put into a running node by its own agent, until `start` has returned; spawn_supervised:
                         `System.spawn` into the root, one by one, with a place in the tree and an event each.
warm_nodes               `NodeSpec(start="warm")`, many at a time, each until its hello; answering: each with an
                         actor that has answered.
first_answer             from opening a System to the first answer of an actor in a new node.
fan_in                   1,000 callers in 4 processes, 8 calls at a time each, on one actor: the growth of its process
                         beside what all credits allow, and what the callers would like to send at once.
ray, xoscar              with --peer, or where they are importable: ours beside theirs, not pinned, in the same rounds.
                         They share the cores with services of their own: figures for this machine, never general ones.

A figure that this runtime can't give yet is "-".
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import _faults
import _messages
import _peers
import uvloop

from headrace.benchmark import Bar, Figures, Say

EXAMPLE = "bin/bench actors --quick --json actors.json"

_PLACED = [
    ("call_p50_ratio", "<=", 1.3),
    ("call_p90_ratio", "<=", 1.3),
    ("calls_100_ratio", ">=", 0.5),
    ("calls_1000_ratio", ">=", 0.55),
    ("casts_ratio", ">=", 0.25),
    ("100kb_p50_ratio", "<=", 1.3),
    ("500kb_p50_ratio", "<=", 1.3),
]

BARS = [
    *(Bar(f"{where}_{name}", rule, limit) for where in ("same_core", "cross_core") for name, rule, limit in _PLACED),  # type: ignore[arg-type]
    Bar("casts_lost", "<=", 0),
    Bar("copy_in_64mib_ratio", ">=", 0.85),
    Bar("born_64mib_p50_us", "<=", 200.0),
    Bar("control_beside_bulk_ratio", "<=", 2.0),
    Bar("error_p50_us", "<=", 5_000.0),
    Bar("error_max_us", "<=", 25_000.0),
    Bar("warm_back_p50_us", "<=", 20_000.0),
    Bar("cold_back_p50_us", "<=", 300_000.0),
    Bar("suspected_beats_ratio", "<=", 3.5),
    Bar("spawn_in_process_per_s", ">=", 50_000.0),
    Bar("warm_nodes_per_s", ">=", 150.0),
    Bar("warm_node_private_bytes", "<=", 8 << 20),
    Bar("first_answer_s", "<=", 0.4),
    Bar("fan_in_lost", "<=", 0),
    Bar("fan_in_peak_to_credits_ratio", "<=", 1.0),
    Bar("fan_in_growth_to_credits_ratio", "<=", 4.0),
    Bar("ray_call_p50_ratio", "<=", 1 / 5),
    Bar("ray_calls_100_ratio", ">=", 60.0),
    Bar("xoscar_call_p50_ratio", "<=", 1 / 1.5),
    Bar("xoscar_calls_100_ratio", ">=", 20.0),
]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    rounds: int = 5
    calls: int = 800
    """Of each latency, per round."""
    seconds: float = 0.4
    """Of each rate, per round."""
    casts: int = 100_000
    samples: int = 200
    large: int = 7
    kills: int = 100
    cold_kills: int = 10
    blocks: int = 10
    actors: int = 20_000
    supervised: int = 500
    nodes: int = 48
    systems: int = 5
    fan_in_calls: int = 96
    """Of each of the 1,000 callers."""
    peer_calls: int = 300


QUICK = Scale(
    rounds=2, calls=200, seconds=0.15, casts=20_000, samples=40, large=3, kills=6, cold_kills=2, blocks=2, actors=5_000,
    supervised=100, nodes=16, systems=2, fan_in_calls=16, peer_calls=100,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer of everything: half a minute, rough figures")
    parser.add_argument(
        "--peer", type=_peers.chosen, default=[], metavar="NAMES",
        help=f"also measure these ({','.join(_peers.PEERS)}), in environments of their own where need be",
    )  # fmt: skip


def measure(options: argparse.Namespace, say: Say) -> Figures:
    """All figures, the barred ones first."""
    scale = QUICK if options.quick else Scale()
    pythons = _peers.interpreters(options.peer, say)
    figures = uvloop.run(_messages.measure_messages(scale, say))
    figures |= uvloop.run(_faults.measure_faults(scale, say))
    figures |= uvloop.run(_peers.measure_peers(pythons, scale, say))
    return {name: figures.get(name) for name in dict.fromkeys([*(bar.name for bar in BARS), *figures])}
