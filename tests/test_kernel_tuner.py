"""The kernel tuner against devices that are plain functions: the best is known, so is what finding it may cost."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.kernels import launch
from headrace.kernels.buckets import SKEWS, Bucket, Load, Watch
from headrace.kernels.launch import KernelSpec
from headrace.kernels.live import LiveTuner, build_of_sources, choices_file, fitting, open_tuner, tuned
from headrace.kernels.rows import PERMUTE as permute
from headrace.kernels.timings import Cell, Replay, Timings, label
from headrace.kernels.tuner import (
    EXPLORE,
    MARGIN,
    PROOF,
    Device,
    Kernel,
    Report,
    Tuner,
    occupancy,
    prune,
    search,
)
from headrace.tune import tune_main

CONFIGS = [f"BLOCK={32 << i}" for i in range(8)]
HERE = Load(4096, 1.0, 8).bucket

loads = st.builds(Load, st.integers(0, 2**24), st.floats(1.0, 128.0, allow_nan=False), st.integers(0, 512))


def test_a_bucket_says_how_many_tokens_how_skewed_and_how_many_experts() -> None:
    assert Load.of([0, 0, 0, 0]).bucket == Load(0, 1.0, 0).bucket
    even, skewed = Load.of([10, 10, 10, 10]), Load.of([40, 0, 0, 0])
    assert (even.tokens, even.skew, even.active) == (40, 1.0, 4)
    assert (skewed.tokens, skewed.skew, skewed.active) == (40, 4.0, 1)
    assert even.bucket.tokens == skewed.bucket.tokens
    assert even.bucket.skew < skewed.bucket.skew and even.bucket.active > skewed.bucket.active


@given(loads)
def test_a_bucket_is_read_back_as_written(load: Load) -> None:
    assert Bucket.parse(str(load.bucket)) == load.bucket
    assert 0 <= load.bucket.skew <= len(SKEWS)


@pytest.mark.parametrize("text", ["", "t1-s2", "1-2-3", "t1-s2-ax", "s1-t2-a3"])
def test_what_is_no_bucket_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Bucket.parse(text)


@pytest.mark.parametrize("skew", [0.5, math.nan, math.inf])
def test_a_load_that_cannot_be_is_refused(skew: float) -> None:
    with pytest.raises(ValueError, match="finite skew"):
        Load(1, skew, 1)


@given(loads, st.lists(st.floats(-0.01, 0.01), max_size=30))
def test_a_load_that_trembles_stays_in_its_bucket(load: Load, nudges: list[float]) -> None:
    watch = Watch()
    first = watch.bucket(load)
    for nudge in nudges:
        near = Load(round(load.tokens * (1 + nudge)), load.skew, load.active)
        assert watch.bucket(near) == first


@given(loads, loads)
def test_a_load_that_jumps_is_followed_at_once(before: Load, after: Load) -> None:
    watch = Watch()
    watch.bucket(before)
    followed = watch.bucket(after)
    for now, then, was in zip(followed, after.bucket, before.bucket, strict=True):
        assert now == then or (now == was and abs(now - then) <= 1)


def test_occupancy_is_what_the_scarcest_resource_allows() -> None:
    # 65536 registers / (256 threads x 128) = 2 blocks of 256 threads, of 2048.
    assert occupancy(Report(256, 128, 0, 0)) == 2 * 256 / 2048
    assert occupancy(Report(256, 32, 0, 0)) == 1.0
    assert occupancy(Report(256, 32, 0, 100 * 1024)) == 2 * 256 / 2048
    assert occupancy(Report(32, 8, 0, 0)) == 32 * 32 / 2048
    assert occupancy(Report(1024, 255, 0, 0)) == 0.0
    assert occupancy(Report(128, 16, 0, 0), Device(shared_bytes=0)) == 1.0


def test_what_spills_or_leaves_the_device_empty_is_not_measured() -> None:
    fine, spilling, huge, empty = (
        Report(256, 32, 0, 0), Report(256, 32, 8, 0), Report(1024, 255, 0, 0), Report(64, 32, 0, 200 * 1024)
    )  # fmt: skip
    assert prune([fine, spilling, huge, empty]) == [0]
    assert prune([spilling, fine]) == [0, 1], "the default stays: something has to run"
    assert prune([huge]) == []


def noisy(truth: dict[str, float], seed: int, noise: float = 0.02):
    generator = random.Random(seed)
    asked: Counter[str] = Counter()

    def measure(config: str, runs: int) -> list[float]:
        asked[config] += runs
        return [truth[config] * math.exp(noise * generator.gauss(0, 1)) for _ in range(runs)]

    return measure, asked


@given(st.permutations(range(8)), st.integers(0, 1000))
def test_a_search_finds_a_configuration_near_the_best_for_a_part_of_the_cost(order: list[int], seed: int) -> None:
    truth = {config: 1.0 + 0.15 * place for config, place in zip(CONFIGS, order, strict=True)}
    measure, asked = noisy(truth, seed)
    best = search(CONFIGS, measure).best
    assert truth[best] <= 1.16
    assert asked.total() <= 8 * 5, "exhaustive would be 8 x 20"


@given(st.integers(0, 10_000))
def test_a_search_among_equals_stays_with_the_default(seed: int) -> None:
    truth = dict.fromkeys(CONFIGS, 1.0)
    truth[CONFIGS[3]] = 1 - MARGIN / 4
    measure, _ = noisy(truth, seed, noise=0.002)
    assert search(CONFIGS, measure).best == CONFIGS[0]


def test_a_lone_configuration_is_not_measured() -> None:
    measure, asked = noisy({CONFIGS[0]: 1.0}, 0)
    assert search(CONFIGS[:1], measure).best == CONFIGS[0]
    assert not asked


def test_what_falls_off_a_cliff_in_the_next_bucket_is_given_up() -> None:
    kernel = Kernel(CONFIGS[:3])
    here, there = HERE, HERE._replace(tokens=HERE.tokens + 1)
    truth = {
        here: dict(zip(CONFIGS, (1.0, 0.5, 0.8), strict=False)),
        there: dict(zip(CONFIGS, (1.0, 1.7, 0.8), strict=False)),
    }
    for bucket in (here, there):
        kernel.tune(bucket, noisy(truth[bucket], 1)[0])
    assert kernel.incumbent(here) == CONFIGS[1]
    kernel.settle(lambda bucket, config, runs: [truth[bucket][config]] * runs)
    assert [kernel.incumbent(bucket) for bucket in (here, there)] == [CONFIGS[2], CONFIGS[2]]


def test_a_bucket_that_was_never_searched_goes_by_the_nearest_one() -> None:
    kernel = Kernel(CONFIGS)
    truth = {config: 2.0 - 0.2 * (config == CONFIGS[5]) for config in CONFIGS}
    kernel.tune(HERE, noisy(truth, 3)[0])
    assert kernel.pick(HERE._replace(tokens=HERE.tokens + 3))[0] == CONFIGS[5]
    assert Kernel(CONFIGS).pick(HERE)[0] == CONFIGS[0]


def run_live(kernel: Kernel, truth: dict[str, float], calls: int, seed: int, noise: float = 0.02) -> Counter[str]:
    generator, picked = random.Random(seed), Counter[str]()
    for _ in range(calls):
        config, timed = kernel.pick(HERE)
        picked[config] += 1
        if timed:
            disturbed = 1.33 if generator.random() < 0.05 else 1.0
            kernel.observe(HERE, config, truth[config] * disturbed * math.exp(noise * generator.gauss(0, 1)))
    return picked


def test_live_it_comes_to_the_best_and_tries_others_in_less_than_one_call_of_a_hundred() -> None:
    truth = dict(zip(CONFIGS, (1.0, 1.3, 0.9, 1.1, 0.7, 1.5, 1.2, 2.0), strict=True))
    kernel = Kernel(CONFIGS)
    run_live(kernel, truth, 100 * EXPLORE, seed=0)
    assert kernel.incumbent(HERE) == CONFIGS[4]
    steady = run_live(kernel, truth, 200 * EXPLORE, seed=1)
    assert kernel.incumbent(HERE) == CONFIGS[4]
    assert 1 - steady[CONFIGS[4]] / steady.total() <= 0.01


@pytest.mark.parametrize("seed", range(5))
def test_live_it_follows_a_device_that_changes(seed: int) -> None:
    kernel = Kernel(CONFIGS[:3])
    run_live(kernel, dict(zip(CONFIGS, (1.0, 0.8, 1.2), strict=False)), 100 * EXPLORE, seed)
    assert kernel.incumbent(HERE) == CONFIGS[1]
    run_live(kernel, dict(zip(CONFIGS, (1.0, 1.1, 0.8), strict=False)), 200 * EXPLORE, seed)
    assert kernel.incumbent(HERE) == CONFIGS[2]


@pytest.mark.parametrize("seed", range(10))
def test_live_it_does_not_flap_among_equals(seed: int) -> None:
    kernel = Kernel(CONFIGS)
    run_live(kernel, dict.fromkeys(CONFIGS, 1.0), 400 * EXPLORE, seed)
    assert kernel.choices[HERE].switches <= 1


def test_times_that_no_call_takes_are_ignored() -> None:
    kernel = Kernel(CONFIGS[:2])
    kernel.pick(HERE)
    for _ in range(2 * PROOF):
        for config, seconds in ((CONFIGS[0], 1.0), (CONFIGS[1], 0.0), (CONFIGS[1], math.nan), ("BLOCK=7", 0.1)):
            kernel.observe(HERE, config, seconds)
    kernel.observe(HERE._replace(tokens=0), CONFIGS[1], 1.0)
    assert kernel.incumbent(HERE) == CONFIGS[0]


def test_a_kernel_without_configurations_is_refused() -> None:
    with pytest.raises(ValueError, match="all were pruned"):
        Kernel([])


def test_the_table_of_choices_is_read_back(tmp_path: Path) -> None:
    tuner = Tuner("H200", "abc")
    kernel = tuner.kernel("permute", "H2048", CONFIGS)
    truth = {config: 1.0 + (config != CONFIGS[6]) for config in CONFIGS}
    kernel.tune(HERE, noisy(truth, 0)[0])
    kernel.pick(HERE._replace(tokens=1))  # was never searched: not worth keeping
    path = tmp_path / "choices.json"
    tuner.write(path)
    again = Tuner.read(path, "H200", "abc").kernel("permute", "H2048", CONFIGS)
    assert {b: c.config for b, c in again.choices.items()} == {HERE: CONFIGS[6]}
    assert Tuner.read(path).rows()[0][:2] == ("permute/H2048", HERE)
    assert not Tuner.read(path, "H100", "abc").rows(), "another device's choices are of no use"
    assert not Tuner.read(path, "H200", "abd").rows()
    other = Tuner.read(path, "H200", "abc").kernel("permute", "H2048", CONFIGS[:3])
    assert not other.choices, "configurations have changed"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "device": "a", "build": "b", "kernels": {"k": {}}}',
     '{"format": 1, "device": "a", "build": "b", "kernels": {"k": {"configs": ["x"], "choices": '
     '{"t1-s0-a0": {"config": "y", "calls": 0, "switches": 0}}}}}'],
)  # fmt: skip
def test_a_damaged_table_of_choices_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"choices\.json: not a table of choices .*delete it"):
        Tuner.read(path)


def test_recorded_timings_are_read_back_and_replayed(tmp_path: Path) -> None:
    cell = Cell(Load(100, 1.5, 3), {label({"VEC": 8, "BLOCK": 256}): (1.0, 2.0, 3.0)})
    assert list(cell.seconds) == ["BLOCK=256,VEC=8"]
    path = tmp_path / "timings.json"
    Timings("H200", True, {"cuda": "13.0"}, {"permute/H2048": [cell]}).write(path)
    table = Timings.read(path)
    assert (table.device, table.measured, table.cells["permute/H2048"]) == ("H200", True, [cell])
    replay = Replay(table.cells["permute/H2048"])
    runs = replay.measure(cell.load, "BLOCK=256,VEC=8", 2) + replay.measure(cell.load, "BLOCK=256,VEC=8", 2)
    assert runs == [1.0, 2.0, 3.0, 1.0]
    assert replay.num_runs == 4
    path.write_text(json.dumps({"format": 1, "device": "x"}))
    with pytest.raises(ValueError, match=r"timings\.json: not a timing table"):
        Timings.read(path)


def test_on_a_modelled_table_the_tuner_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    import _timing_model

    table = _timing_model.recorded(0, held_out=False)
    cells = [c for c in table.cells["unpermute/H2048-k8"] if c.load.skew == 1.07 and c.load.active == 100]
    kernel, replay = Kernel(list(cells[0].seconds)), Replay(cells)
    for load in replay.loads:
        kernel.tune(load.bucket, lambda config, runs, load=load: replay.measure(load, config, runs))
    gains = []
    for cell in cells:
        medians = {config: statistics.median(runs) for config, runs in cell.seconds.items()}
        gains.append(medians[kernel.configs[0]] / medians[kernel.pick(cell.load.bucket)[0]])
    assert min(gains) >= 0.98
    assert statistics.fmean(gains) >= 1.1


class Launches:
    """Stands for a GPU: what is launched takes as long as its configuration says, and is known a launch later."""

    def __init__(self, truth: dict[str, float]) -> None:
        self.truth, self.now, self.num_timed = truth, "", 0

    def begin(self) -> str:
        self.num_timed += 1
        return self.now

    def end(self, begun: str) -> float:
        return self.truth[begun]

    def seconds(self, mark: float) -> float | None:
        return mark


SPEC = KernelSpec(source="none.cu", name="none", configs=tuple({"BLOCK": 32 << i} for i in range(4)))


def test_installed_it_decides_for_every_launch_and_learns_from_the_timed_ones() -> None:
    gpu = Launches(dict(zip(CONFIGS, (1.0, 1.2, 0.6, 1.1), strict=False)))
    live = LiveTuner(Tuner("none", "0"), gpu, lambda spec: spec.configs)
    live.saw([5, 0, 0, 3])
    used: Counter[str] = Counter()
    with live.installed():
        for _ in range(120 * EXPLORE):
            config = launch.pick(SPEC, tokens=1000, H=64)
            gpu.now = label(config)
            used[gpu.now] += 1
            with live.around(SPEC, config):
                pass
            live.poll()
    assert used.most_common(1)[0][0] == CONFIGS[2]
    assert launch.pick(SPEC, tokens=1000, H=64) == SPEC.configs[0], "no longer installed"
    assert gpu.num_timed <= 2 * 120 + 1


def test_a_launch_in_a_captured_graph_is_not_timed() -> None:
    class Capturing(Launches):
        def begin(self) -> None:  # type: ignore[override]
            return None

    live = LiveTuner(Tuner("none", "0"), Capturing({}), lambda spec: spec.configs)
    for _ in range(3 * EXPLORE):
        with live.around(SPEC, live.choose(SPEC, {"tokens": 10})):
            pass
    assert live.poll() == 0


def test_bin_tune_shows_the_choices_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuner = Tuner("H200", "abc")
    tuner.kernel("permute", "H2048", CONFIGS).tune(HERE, lambda config, runs: [1.0 + (config != CONFIGS[6])] * runs)
    path = tmp_path / "choices.json"
    tuner.write(path)
    assert tune_main(["kernels", "--show", "--table", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "H200" in shown and "permute/H2048" in shown and "4,096" in shown and CONFIGS[6] in shown
    assert tune_main(["kernels", "--show", "--table", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_bin_tune_says_that_nothing_was_tuned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    assert tune_main(["kernels", "--show"]) == 1
    assert "nothing was tuned" in capsys.readouterr().err


def test_a_recorded_table_becomes_choices_that_a_process_goes_by_and_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    names = [label(config) for config in fitting(permute, "sm_90")]
    assert len(names) > 1
    seconds = {name: (1.0 + (name != names[1]),) for name in names}
    table = Timings("GPU 1", True, {}, {"permute_rows/T1": [Cell(Load(5000, 1.0, 1), seconds)]})
    tuned(table, build_of_sources()).write(choices_file("GPU 1"))
    for _ in range(2):
        with open_tuner("GPU 1", "sm_90"):
            assert label(launch.pick(permute, tokens=5000, T=1)) == names[1]
            assert label(launch.pick(permute, tokens=5000, T=2)) == names[0], "a shape that was never timed"
    with open_tuner("GPU 2", "sm_90"):
        assert label(launch.pick(permute, tokens=5000, T=1)) == names[0], "another device"
    kept = Tuner.read(choices_file("GPU 1"))
    assert [(name, choice.config, choice.calls) for name, _, choice in kept.rows()] == [
        ("permute_rows/T1", names[1], 2)
    ]
