"""The tuner at work: hands each launch its configuration, times one in sixty of them, and learns from it.

    router's counts --saw--> skew, active experts        launch.pick --choose--> configuration
    GPU events of timed launches --poll--> tuner.observe      (tokens of this very call)

Nothing here waits for the GPU: a timed launch has an event before and one after it, and is looked at when both have
happened. In a captured graph nothing is timed. Knows nothing of any one kernel.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from . import launch
from .buckets import Bucket, Load, Watch
from .build import SOURCES, cache_folder, compile_source
from .launch import Config, KernelSpec
from .timings import Replay, Timings, label
from .tuner import Kernel, Report, Tuner, prune

PENDING = 256
"""Timed launches that the GPU has not done yet, at most; past it the oldest are forgotten."""


class Clock(Protocol):
    """Times what is launched without waiting for it."""

    def begin(self) -> Any:
        """Before the launch; None if it can't be timed now."""

    def end(self, begun: Any) -> Any:
        """After it."""

    def seconds(self, mark: Any) -> float | None:
        """What `end` gave -> seconds; None while it is not known."""


class CudaClock:
    """Events on torch's current stream."""

    def begin(self) -> Any:
        import torch

        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, begun: Any) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return begun, event

    def seconds(self, mark: Any) -> float | None:
        begun, ended = mark
        return float(begun.elapsed_time(ended)) / 1000 if ended.query() else None


def fitting(spec: KernelSpec, architecture: str) -> list[Config]:
    """The configurations that the compiler's report leaves, the default first; all of one variant.

    Raises RuntimeError if one does not compile, ImportError without NVRTC.
    """
    reports = []
    for config in spec.configs:
        usage = compile_source(spec.source, {**config, **spec.variants[0]}, architecture).usage[spec.name]
        reports.append(Report(config.get("BLOCK", 256), usage.registers, usage.spill_bytes, usage.shared_bytes))
    return [spec.configs[i] for i in prune(reports)]


class LiveTuner:
    """Decides for every launch of this process, while `installed`. `configs_of` says what a kernel may use."""

    def __init__(self, tuner: Tuner, clock: Clock, configs_of: Callable[[KernelSpec], Sequence[Config]]) -> None:
        self._tuner, self._clock, self._configs_of = tuner, clock, configs_of
        self._configs: dict[KernelSpec, dict[str, Config]] = {}
        self._watches: weakref.WeakKeyDictionary[Kernel, Watch] = weakref.WeakKeyDictionary()
        self._timing: dict[KernelSpec, tuple[Kernel, Bucket, str]] = {}
        self._pending: deque[tuple[Kernel, Bucket, str, Any]] = deque(maxlen=PENDING)
        self._skew, self._active = 1.0, 1

    def saw(self, counts_E: Sequence[int]) -> None:
        """Takes what the router did of late: pairs of each expert, on the host."""
        load = Load.of(counts_E)
        self._skew, self._active = load.skew, load.active

    def choose(self, spec: KernelSpec, situation: Mapping[str, int]) -> Config:
        """The configuration for a launch; `situation` is what `launch.pick` was given, `tokens` among it."""
        configs = self._configs.get(spec)
        if configs is None:
            configs = self._configs[spec] = {label(config): config for config in self._configs_of(spec)}
        shape = "-".join(f"{name}{value}" for name, value in situation.items() if name != "tokens")
        kernel = self._tuner.kernel(spec.name, shape, list(configs))
        watch = self._watches.setdefault(kernel, Watch())
        bucket = watch.bucket(Load(situation.get("tokens", 0), self._skew, self._active))
        name, timed = kernel.pick(bucket)
        if timed:
            self._timing[spec] = kernel, bucket, name
        else:
            self._timing.pop(spec, None)
        return configs[name]

    @contextmanager
    def around(self, spec: KernelSpec, config: Config) -> Iterator[None]:
        """Times the launch inside, if it is the one that was chosen to be timed."""
        wanted = self._timing.pop(spec, None)
        begun = self._clock.begin() if wanted is not None and wanted[2] == label(config) else None
        yield
        if begun is not None and wanted is not None:
            self._pending.append((*wanted, self._clock.end(begun)))

    def poll(self) -> int:
        """Takes the times that are known by now; returns how many. Call it between steps."""
        taken = 0
        while self._pending and (seconds := self._clock.seconds(self._pending[0][3])) is not None:
            kernel, bucket, name, _ = self._pending.popleft()
            kernel.observe(bucket, name, seconds)
            taken += 1
        return taken

    @contextmanager
    def installed(self) -> Iterator[LiveTuner]:
        """Decides for all launches of the process until it is left."""
        with launch.picking(self.choose), launch.timing(self.around):
            yield self


def tuned(table: Timings, build: str) -> Tuner:
    """Choices for every kernel, shape and load of a recorded table."""
    tuner = Tuner(table.device, build)
    for name, cells in table.cells.items():
        own, _, shape = name.partition("/")
        kernel, replay = tuner.kernel(own, shape, list(cells[0].seconds)), Replay(cells)
        loads = {load.bucket: load for load in replay.loads}
        for bucket, load in loads.items():
            kernel.tune(bucket, partial(replay.measure, load))
        kernel.settle(partial(_measure, replay, loads))
    return tuner


@contextmanager
def open_tuner(device: str, architecture: str) -> Iterator[LiveTuner]:
    """Decides for all launches of the process by the choices that are kept for this device; keeps what it learns.

    `architecture`: "sm_90". Raises ValueError if the file of choices is damaged.
    """
    path, build = choices_file(device), build_of_sources()
    tuner = Tuner.read(path, device, build) if path.exists() else Tuner(device, build)
    live = LiveTuner(tuner, CudaClock(), partial(fitting, architecture=architecture))
    try:
        with live.installed():
            yield live
    finally:
        live.poll()
        path.parent.mkdir(parents=True, exist_ok=True)
        tuner.write(path)


def choices_file(device: str) -> Path:
    """Where the choices of a device are kept, for `bin/tune kernels --show` and the next process."""
    return cache_folder() / f"choices-{''.join(c if c.isalnum() else '-' for c in device)}.json"


def build_of_sources() -> str:
    """A word that changes with any kernel's source: old choices are then of no use."""
    texts = (path.read_bytes() for path in sorted(SOURCES.iterdir()))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _measure(replay: Replay, loads: Mapping[Bucket, Load], bucket: Bucket, config: str, runs: int) -> list[float]:
    return replay.measure(loads[bucket], config, runs)
