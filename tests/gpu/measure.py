"""What a GPU does with a case: is it right, is it the same each time, how long does it take.

Times are medians of CUDA events, with the caches flushed before each run by writing four times the L2 cache. Knows
nothing of any one kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from case import Case, difference, tensors

from headrace.kernels.buckets import Load
from headrace.kernels.launch import Config, KernelSpec, picking
from headrace.kernels.live import fitting
from headrace.kernels.timings import Cell, Timings, label

RUNS = 30
DEVICE = torch.device("cuda", 0)


class Bench:
    """A GPU, its copy rate, and the memory that empties its caches."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self._flush = torch.empty(4 * max(l2_bytes, 2**24), dtype=torch.uint8, device=DEVICE)
        source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        self.copy_rate = 2 * source.nbytes / self.seconds(lambda: target.copy_(source))
        """Bytes read and written per second."""

    def seconds(self, run: Callable[[], Any], runs: int = RUNS) -> float:
        """Median of one run."""
        return statistics.median(self.each(run, runs))

    def each(self, run: Callable[[], Any], runs: int = RUNS) -> list[float]:
        """Seconds of each run, after three that don't count."""
        for _ in range(3):
            run()
        events = []
        for _ in range(runs):
            self._flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(DEVICE)
        return [begin.elapsed_time(end) / 1000 for begin, end in events]


def architecture() -> str:
    """As the compiler names that of the GPU."""
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return f"sm_{major}{minor}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def wrong(case: Case, seed: int, *, large: bool, repeats: int) -> str:
    """What is wrong with the case on fresh data: its values, or that two of the runs differ. Empty if nothing is."""
    for size in (*case.small, *((case.large,) if large else ())):
        args = case.make(size, generator(seed))
        got = case.run(*args)
        if message := difference(case, got, case.exact(*args)):
            return f"{size}: {message}"
        kept = [part.clone() for part in tensors(got)]
        for _ in range(repeats if size != case.large else 5):
            again = tensors(case.run(*args))
            if any(not torch.equal(_bits(a), _bits(b)) for a, b in zip(kept, again, strict=True)):
                return f"{size}: two runs differ"
    return ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one replay of a CUDA graph."""
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(case: Case, bench: Bench, seed: int) -> dict[str, float | None]:
    """Seconds, in a graph too, and the ratios that the bars are about."""
    args = case.make(case.large, generator(seed))
    own = bench.seconds(lambda: case.run(*args))
    figures: dict[str, float | None] = {"seconds": own}
    figures["graph_seconds"] = best = _graphed_seconds(case, args, bench)
    fastest = min(own, best or own)
    if case.moved_bytes:
        figures["copy"] = case.moved_bytes(*args) / fastest / bench.copy_rate
    if case.eager:
        eager = case.eager
        figures["eager"] = bench.seconds(lambda: eager(*args)) / fastest
        figures["compiled"] = _compiled_seconds(eager, args, bench) / fastest
    return figures


def _graphed_seconds(case: Case, args: tuple[Any, ...], bench: Bench) -> float | None:
    """None for what can't be captured because it calls autograd or allocates on the host."""
    try:
        return bench.seconds(graphed(lambda: case.run(*args)))
    except RuntimeError as error:
        print(f"  {case.name} is not captured: {str(error).splitlines()[0]}")
        torch.cuda.synchronize(DEVICE)
        return None


def _compiled_seconds(eager: Callable[..., Any], args: tuple[Any, ...], bench: Bench) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    return bench.seconds(lambda: compiled(*args))


def record(case: Case, bench: Bench, table: Timings, sizes: list[Any], seed: int) -> None:
    """Times every configuration of the case's kernel at each size, into the table that the tuner is tested with."""
    spec = case.spec
    assert spec is not None
    for size in sizes:
        args = case.make(size, generator(seed))
        seen: dict[str, int] = {}

        def choose(asked: KernelSpec, situation: Mapping[str, int], config: Config, seen: dict[str, int]) -> Config:
            if asked is not spec:
                return asked.configs[0]
            seen.update(situation)
            return config

        times: dict[str, tuple[float, ...]] = {}
        for config in fitting(spec, architecture()):
            with picking(lambda asked, situation, config=config, seen=seen: choose(asked, situation, config, seen)):
                times[label(config)] = tuple(bench.each(lambda args=args: case.run(*args), 10))
        if not seen:
            continue  # at this size the operation takes another path
        tokens = seen.pop("tokens", 0)
        load = Load.of(case.load(*args)) if case.load else None
        shape = "-".join(f"{name}{value}" for name, value in seen.items())
        cell = Cell(Load(tokens, load.skew if load else 1.0, load.active if load else 1), times)
        table.cells.setdefault(f"{spec.name}/{shape}", []).append(cell)
