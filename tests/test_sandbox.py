"""Sandboxes as processes: what they can see, how they end, and that nothing is run where there is none."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sandboxed
from sample_actors import until

from headrace.actors.verifier.sandbox import (
    Order,
    RunLimits,
    SandboxFailed,
    SandboxPool,
    SandboxUnavailable,
    bubble,
    cgroup,
)
from headrace.actors.verifier.sandbox.bubble import Isolation
from headrace.actors.verifier.sandbox.pool import SandboxPool as Pool

sandboxed.needed()

LIMITS = RunLimits(cpu_s=5.0, wall_s=60.0)


@pytest.fixture
async def pool():
    pool = SandboxPool(Isolation(), warm=2)
    await pool.start()
    yield pool
    await pool.close()


def order(pool: Pool, source: str, limits: RunLimits = LIMITS, **more) -> Order:
    return Order(argv=[pool.python, "main.py"], files={"main.py": (source.encode(), 0o444)}, limits=limits, **more)


def children_of(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_program_runs_and_reports(pool):
    outcome = await pool.run(
        order(pool, "import sys; print(int(input()) + 1); sys.stderr.write('e'); sys.exit(3)"), stdin=b"41\n"
    )
    assert (outcome.stdout, outcome.stderr, outcome.code, outcome.stopped) == (b"42\n", b"e", 3, "")
    assert 0 < outcome.cpu_s < 5 and outcome.memory_bytes > 1 << 20


async def test_what_is_there_is_a_work_folder_and_libraries(pool):
    source = "import os; print(sorted(os.listdir('/')), os.listdir('/work'), os.getuid(), os.uname().nodename)"
    text = (await pool.run(order(pool, source))).stdout.decode()
    assert "'home'" not in text and "'root'" not in text and "'etc'" not in text
    assert "['main.py'] 1000 sandbox" in text


async def test_each_run_has_a_control_group_of_its_own_where_one_can_be_made(pool):
    groups = [(await pool.run(order(pool, "print(open('/proc/self/cgroup').read())"))).stdout for _ in range(2)]
    if cgroup.parents() is None:
        assert "no control groups" in pool.describe()
        return
    assert "a control group each" in pool.describe()
    lines = [[line for line in group.decode().splitlines() if cgroup.PREFIX in line] for group in groups]
    assert lines[0] and lines[1] and not set(lines[0]) & set(lines[1])


async def test_runs_share_nothing_and_leave_nothing(pool):
    first = await pool.run(order(pool, "open('x', 'w').write('1'); print(open('x').read())"))
    second = await pool.run(order(pool, "import os; print(os.path.exists('x'))"))
    assert (first.stdout, second.stdout) == (b"1\n", b"False\n")


async def test_what_was_written_before_a_kill_is_there(pool):
    source = "import os\nprint('x' * 70000, flush=True)\nos.kill(os.getpid(), 9)"
    outcome = await pool.run(order(pool, source))
    assert outcome.code == -9 and outcome.stdout == b"x" * 70000 + b"\n"


@pytest.mark.parametrize(
    ("source", "stopped"),
    [
        ("while True: pass", "cpu"),
        ("import time; time.sleep(999)", "wall"),
        ("x = []\nwhile True: x.append(b'x' * 100000)", "memory"),
        ("import os\nfor i in range(10 ** 9): os.symlink('x', str(i))", "inodes"),
    ],
)
async def test_a_run_that_takes_too_much_is_stopped(pool, source, stopped):
    limits = RunLimits(
        cpu_s=1.0 if stopped == "cpu" else 30.0, wall_s=2.0 if stopped == "wall" else 60.0, memory_bytes=64 << 20
    )
    outcome = await pool.run(order(pool, source, limits))
    assert outcome.stopped == stopped or (stopped == "memory" and b"MemoryError" in outcome.stderr)


async def test_waiting_for_a_processor_is_not_held_against_a_program(pool):
    """Six programs on one core are past their wall limit by the clock, and none by what it did."""
    core = next(iter(os.sched_getaffinity(0)))
    source = f"import os, time\nos.sched_setaffinity(0, [{core}])\nwhile time.process_time() < 0.6: pass"
    limits = RunLimits(cpu_s=5.0, wall_s=1.5, memory_bytes=64 << 20)
    outcomes = await asyncio.gather(*(pool.run(order(pool, source, limits)) for _ in range(6)))
    assert all(outcome.stopped in ("", "wall") for outcome in outcomes)
    assert all(not outcome.stopped for outcome in outcomes if outcome.wall_s < 3 * limits.wall_s)


async def test_a_file_is_brought_back_only_if_it_is_one(pool):
    for source, expected in (
        ("open('out', 'wb').write(b'12')", b"12"),
        ("open('out', 'wb')", b""),
        ("pass", None),
        ("import os; os.symlink('/etc/passwd', 'out')", None),
        ("import os; os.mkfifo('out')", None),
        ("import os; os.mkdir('out')", None),
    ):
        assert (await pool.run(order(pool, source, collect="out"))).collected == expected, source


async def test_many_runs_at_once_each_get_their_own_answer(pool):
    outcomes = await asyncio.gather(*(pool.run(order(pool, f"print({i})")) for i in range(12)))
    assert [int(outcome.stdout) for outcome in outcomes] == list(range(12))


async def test_a_program_that_is_not_there_is_a_failure_of_ours(pool):
    with pytest.raises(SandboxFailed, match=r"can't start \./none"):
        await pool.run(Order(argv=["./none"]))


async def test_a_sandbox_that_is_killed_from_outside_is_no_outcome(pool):
    async with pool.taken() as box:
        run = asyncio.create_task(box.run(order(pool, "import time; time.sleep(999)")))
        await asyncio.sleep(0.1)
        os.kill(next(iter(children_of(box.pid))), 9)
        with pytest.raises(SandboxFailed, match="died"):
            await run


async def test_closing_ends_all_that_runs_within_a_bound(pool):
    running = [asyncio.create_task(pool.run(order(pool, "while True: pass"))) for _ in range(2)]
    await until(lambda: len(pool._boxes) >= 2)
    await asyncio.sleep(0.2)
    started = children_of(os.getpid())
    began = time.monotonic()
    await pool.close()
    assert time.monotonic() - began < 15
    results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, SandboxFailed) for result in results)
    await until(lambda: not any(alive(pid) for pid in started))
    with pytest.raises(SandboxFailed, match="shutting down"):
        await pool.run(order(pool, "1"))


async def test_giving_up_a_run_ends_it(pool):
    run = asyncio.create_task(pool.run(order(pool, "while True: pass")))
    await asyncio.sleep(0.3)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert (await pool.run(order(pool, "print(1)"))).stdout == b"1\n"


PARENT = """
import asyncio, os, sys
from headrace.actors.verifier.sandbox import Order, SandboxPool
from headrace.actors.verifier.sandbox.bubble import Isolation
async def main():
    pool = SandboxPool(Isolation(), warm=2)
    await pool.start()
    async with pool.taken() as box:
        source = b"import os\\nwhile True: os.fork() if len(os.listdir('/proc')) < 60 else None"
        run = asyncio.create_task(box.run(Order(argv=[pool.python, "m.py"], files={"m.py": (source, 0o444)})))
        await asyncio.sleep(0.5)
        print(box.pid, flush=True)
        await run
asyncio.run(main())
"""


def descendants(pid: int) -> set[int]:
    found = children_of(pid)
    for child in list(found):
        found |= descendants(child) if alive(child) else set()
    return found


async def test_sandboxes_die_with_their_parent_however_it_ends():
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert await parent.stdout.readline()
    below = descendants(parent.pid)
    assert len(below) >= 4
    parent.kill()
    await parent.wait()
    await until(lambda: not any(alive(pid) for pid in below))


@pytest.mark.parametrize(
    ("isolation", "expected"),
    [
        (Isolation(bwrap="no-such-bwrap"), "install bubblewrap"),
        (Isolation(bwrap="false"), "no sandbox works here"),
        (Isolation(python="/no/python"), "set python to one that can"),
    ],
)
async def test_without_a_sandbox_nothing_starts(isolation, expected):
    pool = SandboxPool(isolation, warm=1)
    with pytest.raises(SandboxUnavailable, match=expected):
        await pool.start()
    with pytest.raises(SandboxFailed, match="shutting down"):
        await pool.run(Order(argv=["/bin/true"]))


def test_forbidden_namespaces_are_explained():
    text = bubble.explain(
        "bwrap: No permissions to creating new namespace, likely because the kernel does not allow it"
    )
    assert "user.max_user_namespaces" in text and "unsafe = true" in text


def list_temporary() -> list[Path]:
    return list(Path(tempfile.gettempdir()).iterdir())


async def test_unsafe_runs_without_isolation_and_says_so(tmp_path):
    pool = SandboxPool(Isolation(unsafe=True, bwrap="no-such-bwrap"), warm=1)
    await pool.start()
    try:
        assert "UNSAFE" in pool.describe()
        outcome = await pool.run(order(pool, "import os; print(os.getcwd())", RunLimits(cpu_s=5, wall_s=60)))
        assert outcome.code == 0 and "headrace-unsafe-" in outcome.stdout.decode()
        stopped = await pool.run(order(pool, "while True: pass", RunLimits(cpu_s=1, wall_s=60)))
        assert stopped.stopped == "cpu"
    finally:
        await pool.close()
    assert outcome.stdout.decode().strip() not in {str(path) for path in list_temporary()}


async def test_a_start_that_is_given_up_leaves_no_process(pool):
    await until(lambda: pool._ready.qsize() == 2)
    before = children_of(os.getpid())
    starting = asyncio.create_task(pool._begin())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await until(lambda: {pid for pid in children_of(os.getpid()) if alive(pid)} <= before)
