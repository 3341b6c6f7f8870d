"""Chooses each kernel's configuration by the load that is on it: searched on the device, then corrected while it runs.

    configs --prune--> those that fit --search--> choice of each bucket --pick--> the configuration to launch with
             compiler's          halving on                 ^   |
             report              the device                 |   '- 1 call in 128 tries another one
                                                            '----- observe: seconds of calls that were timed

A choice moves away from the default, and from what it is, only for a gain that the timings prove: a tuner that is now
and then slower than none is not worth having. A bucket that was never searched goes by the nearest one that was. The
table of choices is a file that people can read (`bin/tune kernels --show`). Knows nothing of launching or timing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .buckets import Bucket

FORMAT = 1

MARGIN = 0.02
"""Share of the time that a configuration must save to be taken in the place of another."""

SLACK = 0.01
"""Share of the time that noise may make of a configuration that is as fast as the default."""

DOUBT = 0.06
"""A ratio so near to one, of a run or two, may be either side of it: it is measured again."""

SURE_RUNS = 3

EXPLORE = 128
"""One call in so many tries another configuration: less than 1 %."""

TRIALS = 6
"""Timed calls of a challenger, and of the incumbent beside them, before they are compared."""

PROOF = 24
"""As many before the challenger takes the place: of a few runs, noise makes a winner now and then."""

ROUNDS = ((1, 1), (2, 1), (5, 3))
"""Of a search: what part of the configurations is left, and how many more runs each of them gets."""


class Report(NamedTuple):
    """What the compiler says of one configuration."""

    threads: int
    """Of a block."""
    registers: int
    """Of a thread."""
    spill_bytes: int
    shared_bytes: int
    """Of a block, dynamic ones included."""


class Device(NamedTuple):
    """What one multiprocessor has."""

    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared_bytes: int = 227 * 1024


H200 = Device()


def occupancy(report: Report, device: Device = H200) -> float:
    """Share of a multiprocessor's threads that can be resident; 0 if not even one block fits."""
    if report.threads < 1:
        return 0.0
    warps = -(-report.threads // 32)
    registers = warps * 32 * (-(-max(report.registers, 1) // 8) * 8)
    fits = [device.threads // (warps * 32), device.blocks, device.registers // registers]
    if report.shared_bytes:
        fits.append(device.shared_bytes // report.shared_bytes)
    return min(1.0, min(fits) * report.threads / device.threads)


def prune(reports: Sequence[Report], device: Device = H200) -> list[int]:
    """Indices worth measuring: nothing spills, a block fits, and at least a quarter as many threads are resident as
    with the best. The first configuration, the default, stays if it can run at all."""
    resident = [occupancy(report, device) for report in reports]
    best = max((r for r, report in zip(resident, reports, strict=True) if not report.spill_bytes), default=0.0)
    return [
        i
        for i, (share, report) in enumerate(zip(resident, reports, strict=True))
        if share and (i == 0 or (not report.spill_bytes and share >= best / 4))
    ]


Measure = Callable[[str, int], Sequence[float]]
"""(configuration, runs) -> seconds of each run"""


class Finding(NamedTuple):
    """What a search came to."""

    best: str
    ratios: dict[str, float]
    """Median time of each configuration over that of the default, as far as it was measured."""
    default_s: float
    """Median time of the default."""


def search(configs: Sequence[str], measure: Measure) -> Finding:
    """The fastest of `configs` by successive halving; the first, the default, unless another is faster by `MARGIN`.

    The default stays to the end, so that each round compares with it on equal terms.
    """
    default, rivals = configs[0], list(configs[1:])
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for part, runs in ROUNDS:
        rivals = rivals[: -(-len(configs[1:]) // part)]
        for name in (default, *rivals) if rivals else ():
            seconds[name] += measure(name, runs)
        rivals.sort(key=lambda name: statistics.median(seconds[name]))
    if not rivals:
        return Finding(default, {default: 1.0}, math.nan)
    base = statistics.median(seconds[default])
    ratios = {name: statistics.median(runs) / base for name, runs in seconds.items()}
    return Finding(rivals[0] if proven(seconds[rivals[0]], seconds[default]) else default, ratios, base)


def proven(challenger: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Whether the challenger saves `MARGIN` of the incumbent's time, by medians, and three times out of four at all."""
    ours, theirs = statistics.median(challenger), statistics.median(incumbent)
    upper_quartile = sorted(challenger)[(3 * len(challenger) - 1) // 4]
    return ours < (1 - MARGIN) * theirs and upper_quartile < theirs


@dataclass
class Choice:
    """What one bucket goes by, and what is being tried against it."""

    config: str
    searched: bool = True
    """False while it is that of the nearest bucket."""
    whole: bool = False
    """Whether all configurations were measured for it."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Of the search: time over the default's."""
    default_s: float = math.nan
    sure: set[str] = field(default_factory=set)
    """Configurations whose ratio was measured again."""
    calls: int = 0
    switches: int = 0
    challenger: int = 0
    """Counts through the other configurations."""
    trials: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of timed calls since the last comparison: the challenger's and the incumbent's."""


class Kernel:
    """The choices of one kernel and shape on one device. `configs` are labels, the default first, pruned already."""

    def __init__(self, configs: Sequence[str]) -> None:
        if not configs:
            raise ValueError("a kernel needs at least one configuration that fits the device; all were pruned")
        self.configs = tuple(configs)
        self.choices: dict[Bucket, Choice] = {}

    def tune(self, bucket: Bucket, measure: Measure) -> str:
        """Searches on the device and keeps the choice.

        Where at least two searches at as many tokens, and nearly the same skew and active experts, came to at most two
        configurations, only these and the default are measured.
        """
        near = [
            choice.config
            for other, choice in self.choices.items()
            if choice.whole and other.tokens == bucket.tokens and 0 < bucket.distance(other) <= 1
        ]
        known = list(dict.fromkeys((self.configs[0], *near)))
        whole = len(near) < 2 or len(known) > 3
        best, ratios, default_s = search(self.configs if whole else known, measure)
        self.choices[bucket] = Choice(best, whole=whole, ratios=ratios, default_s=default_s)
        return best

    def settle(self, measure: Callable[[Bucket, str, int], Sequence[float]]) -> None:
        """Gives up, after all searches, what is fast in the middle of a bucket but slow in the next one.

        Between the middles of two buckets lies the cliff, nobody knows where: only what is no slower than the default
        on both sides is safe up to the bound. `measure` is (bucket, configuration, runs) -> seconds.
        """
        settled = {}
        for bucket, choice in self.choices.items():
            beside = [(b, self.choices[b]) for b in self._beside(bucket)]
            for config in sorted(choice.ratios, key=choice.ratios.__getitem__):
                if choice.ratios[config] >= 1 - MARGIN or config == self.configs[0]:
                    break
                for other, its in beside:
                    if abs(its.ratios.get(config, 1.0) - 1.0) < DOUBT and config not in its.sure:
                        its.ratios[config] = statistics.median(measure(other, config, SURE_RUNS)) / its.default_s
                        its.sure.add(config)
                if all(its.ratios[config] < 1 + SLACK for _, its in beside):
                    settled[bucket] = config
                    break
        for bucket, choice in self.choices.items():
            choice.config = settled.get(bucket, self.configs[0])

    def _beside(self, bucket: Bucket) -> list[Bucket]:
        sides = (bucket._replace(tokens=bucket.tokens + step) for step in (-1, 1))
        return [side for side in sides if side in self.choices]

    def incumbent(self, bucket: Bucket) -> str:
        """What the bucket goes by now; changes nothing."""
        choice = self.choices.get(bucket)
        return choice.config if choice else self._nearest(bucket)

    def pick(self, bucket: Bucket) -> tuple[str, bool]:
        """The configuration for the next call under this load, and whether the caller should time that call.

        In 128 calls one tries a challenger, and the one after it times the incumbent.
        """
        choice = self.choices.get(bucket)
        if choice is None:
            choice = self.choices[bucket] = Choice(self._nearest(bucket), searched=False)
        choice.calls += 1
        place = choice.calls % EXPLORE
        rivals = [config for config in self.configs if config != choice.config]
        if not rivals or place > 1:
            return choice.config, False
        if place == 1 and choice.calls > 1:
            return choice.config, True
        return (rivals[choice.challenger % len(rivals)], True) if place == 0 else (choice.config, False)

    def observe(self, bucket: Bucket, config: str, seconds: float) -> None:
        """Takes the time of a call that `pick` asked to be timed; one that no call can take is ignored."""
        choice = self.choices.get(bucket)
        if choice is None or config not in self.configs or not (0.0 < seconds < math.inf):
            return
        rivals = [c for c in self.configs if c != choice.config]
        challenger = rivals[choice.challenger % len(rivals)] if rivals else ""
        if config not in (choice.config, challenger):
            return  # Timed before the last switch.
        choice.trials.setdefault(config, []).append(seconds)
        tried, held = choice.trials.get(challenger, []), choice.trials.get(choice.config, [])
        number = min(len(tried), len(held))
        ahead = number >= TRIALS and proven(tried, held)
        hopeless = number >= 2 and min(tried) > (1 + MARGIN) * statistics.median(held)
        if (number < TRIALS and not hopeless) or (ahead and number < PROOF):
            return
        if ahead:
            choice.config, choice.searched = challenger, True
            choice.switches += 1
            choice.challenger = 0
        else:
            choice.challenger += 1
        choice.trials.clear()

    def _nearest(self, bucket: Bucket) -> str:
        searched = [(b.distance(bucket), b, c.config) for b, c in self.choices.items() if c.searched]
        return min(searched)[2] if searched else self.configs[0]


class Tuner:
    """All kernels of one device and build."""

    def __init__(self, device: str, build: str) -> None:
        self.device, self.build = device, build
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str, shape: str, configs: Sequence[str]) -> Kernel:
        """That kernel's choices; made anew if its configurations have changed."""
        key = f"{name}/{shape}"
        known = self._kernels.get(key)
        if known is None or known.configs != tuple(configs):
            known = self._kernels[key] = Kernel(configs)
        return known

    def rows(self) -> list[tuple[str, Bucket, Choice]]:
        """All choices, for people."""
        return [
            (name, b, kernel.choices[b])
            for name, kernel in sorted(self._kernels.items())
            for b in sorted(kernel.choices)
        ]

    def write(self, path: Path) -> None:
        """Writes the table of choices, whole or not at all."""
        kernels = {
            name: {
                "configs": list(kernel.configs),
                "choices": {str(b): _plain(c) for b, c in sorted(kernel.choices.items()) if c.searched},
            }
            for name, kernel in sorted(self._kernels.items())
        }
        data = {"format": FORMAT, "device": self.device, "build": self.build, "kernels": kernels}
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(data, indent=1) + "\n")
        beside.replace(path)

    @classmethod
    def read(cls, path: Path, device: str = "", build: str = "") -> Tuner:
        """Goes on from a table. One of another device or build is of no use: the tuner begins empty.

        Without `device` and `build` it is taken as it is. Raises ValueError, saying what to do, for a damaged file.
        """
        try:
            data: Mapping[str, Any] = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
            tuner = cls(device or str(data["device"]), build or str(data["build"]))
            if (tuner.device, tuner.build) == (data["device"], data["build"]):
                for name, kernel in data["kernels"].items():
                    tuner._kernels[name] = _kernel(kernel)
            return tuner
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a table of choices ({error}); delete it, it is made anew") from None


def _plain(choice: Choice) -> dict[str, Any]:
    return {"config": choice.config, "calls": choice.calls, "switches": choice.switches}


def _kernel(data: Mapping[str, Any]) -> Kernel:
    kernel = Kernel([str(config) for config in data["configs"]])
    for bucket, values in data["choices"].items():
        if values["config"] not in kernel.configs:
            raise ValueError(f"bucket {bucket} goes by {values['config']!r}, which is none of the configurations")
        kernel.choices[Bucket.parse(bucket)] = Choice(
            values["config"], calls=int(values["calls"]), switches=int(values["switches"])
        )
    return kernel
