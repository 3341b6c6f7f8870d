"""Control groups of sandboxes: the kernel's limits hold, nothing is left, and where groups can't be made none are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.actors.verifier.sandbox.cgroup import PREFIX, Cgroup, Parents, candidates, parents, sweep

V1 = """\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""
V2 = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"


def possible() -> Parents:
    found = parents()
    if found is None:
        pytest.skip("control groups can't be made here")
    return found


def started(group: Cgroup, code: str) -> subprocess.Popen[str]:
    """Runs Python in the group, which it joins before it does anything."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", f"input(); {code}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    group.admit([process.pid])
    return process


def test_the_kernel_ends_what_takes_too_much_memory() -> None:
    group = Cgroup(possible())
    try:
        group.limit(memory_bytes=64 << 20, processes=8)
        with started(group, "x = b'x' * (300 << 20); print(len(x))") as process:
            assert process.communicate("\n", timeout=60)[0] == ""
        assert process.returncode == -9
        group.limit(memory_bytes=512 << 20, processes=8)
        with started(group, "x = b'x' * (100 << 20); print(len(x))") as process:
            assert process.communicate("\n", timeout=60)[0] == f"{100 << 20}\n"
    finally:
        group.remove()


def test_the_kernel_starts_no_more_processes_than_allowed() -> None:
    group = Cgroup(possible())
    forks = (
        "exec('''import os, time\nn = 0\ntry:\n  while n < 50:\n    if not os.fork(): time.sleep(60)\n    n += 1\n"
        "except OSError: pass\nprint(n, flush=True)\nos.killpg(0, 9)''')"
    )
    try:
        group.limit(memory_bytes=512 << 20, processes=5)
        with started(group, f"import os; os.setsid(); {forks}") as process:
            assert process.communicate("\n", timeout=60)[0] == "4\n"
    finally:
        group.remove()


def test_what_a_dead_process_has_left_is_removed_and_what_a_living_one_has_stays() -> None:
    found = possible()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = [folder / f"{PREFIX}{gone.pid}-1" for folder in {found.memory, found.pids}]
    for folder in left:
        folder.mkdir()
    ours = Cgroup(found)
    try:
        sweep(found)
        assert not any(folder.exists() for folder in left)
        ours.limit(memory_bytes=1 << 30, processes=4)
    finally:
        ours.remove()


def test_groups_are_looked_for_in_both_versions() -> None:
    own = "9:memory:/a/b\n8:pids:/\n3:cpu,cpuacct:/a\n0::/user.slice\n"
    memory, pids, unified = (Path("/sys/fs/cgroup") / name for name in ("memory", "pids", "unified"))
    assert list(candidates(V1, own)) == [
        Parents(memory / "a/b", pids, "memory.limit_in_bytes"),
        Parents(memory, pids, "memory.limit_in_bytes"),
        Parents(unified / "user.slice", unified / "user.slice", "memory.max"),
        Parents(unified, unified, "memory.max"),
    ]
    top = Path("/sys/fs/cgroup")
    assert list(candidates(V2, "0::/\n")) == [Parents(top, top, "memory.max")]
    assert list(candidates("proc /proc proc rw 0 0\n", own)) == []
