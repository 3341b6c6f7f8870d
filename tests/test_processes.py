"""How nodes are started, watched and ended: warm and cold, hung, stopped, killed, orphaned. Real processes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from orphans import Trial
from sample_actors import Early, Echo, Fragile, Hog, Parent, Relay, until

from headrace.runtime import NodeSpec, RestartPolicy, System
from headrace.runtime import launcher as launcher_module
from headrace.runtime.errors import ActorDied, InspectError, LaunchError, ZygoteGone
from headrace.runtime.exits import OomKills, exit_of, oom_counters
from headrace.runtime.inspector import MAX_REQUEST_BYTES, Inspector, inspect_node
from headrace.runtime.liveness import SUSPECT_S, Beats, Watch
from headrace.runtime.node import Node
from headrace.runtime.stacks import state_of
from headrace.runtime.zygote import Zygote

QUICK = RestartPolicy(max_restarts=50, backoff_s=0.0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def exists(pid):
    """Also as a zombie."""
    return Path(f"/proc/{pid}").exists()


def events(system, event, /, **fields):
    return [e for e in system.events.recent if e["event"] == event and fields.items() <= e.items()]


def zygote_of(system):
    return system._nodes._launcher.zygote_pid


@pytest.fixture
async def system(tmp_path):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    nodes = {
        "cold": NodeSpec(name="cold", start="cold"),
        "strict": NodeSpec(name="strict", hang_s=0.6),
        "env": NodeSpec(name="env", start="warm", env={"HEADRACE_TEST": "yes"}),
    }
    async with System(tmp_path / "run", nodes=nodes) as system:
        yield system
        scratch = system._scratch
    assert not children(), "processes are left, or their exit codes"
    assert not scratch.exists()
    assert not complaints, complaints


# Starting


async def test_a_warm_node_is_a_child_of_the_root_with_nothing_of_the_zygote(system, monkeypatch):
    await system.spawn(Parent(), name="first", node="n0")
    zygote = zygote_of(system)
    monkeypatch.setenv("HEADRACE_LATE", "set after the zygote was started")
    actors = [await system.spawn(Parent(), name=f"p{i}", node=node) for i, node in enumerate(("n1", "n2", "env"))]
    selves = [await actor.describe() for actor in actors]
    for node, seen in zip(("n1", "n2", "env"), selves, strict=True):
        pid = system.pids()[node]
        assert seen["pid"] == seen["group"] == seen["session"] == pid != zygote
        assert seen["parent"] == os.getpid() and seen["stdin"] == ""
        assert seen["blocked"] == [] and seen["interrupts"] == "SIG_IGN"
        assert seen["environment"]["HEADRACE_LATE"]
        sockets = os.readlink(f"/proc/{zygote}/fd/0")
        assert sockets not in [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert name_of(pid) == node
    assert selves[2]["environment"]["HEADRACE_TEST"] == "yes" and "HEADRACE_TEST" not in selves[0]["environment"]
    assert len({tuple(seen["random"]) for seen in selves}) == 3, "each has random numbers of its own"
    assert len({n for seen in selves for n in seen["random"]}) == 6


async def test_a_cold_node_does_not_need_the_zygote(system, monkeypatch):
    def gone(*_):
        raise ZygoteGone("there is none")

    monkeypatch.setattr(Zygote, "start", gone)
    ref = await system.spawn(Parent(), name="cold", node="cold")
    assert (await ref.describe())["parent"] == os.getpid()
    assert zygote_of(system) == 0


async def test_without_a_zygote_warm_nodes_start_cold(system, monkeypatch):
    monkeypatch.setattr("headrace.runtime.zygote.die_with_parent", lambda _: "raise SystemExit(1)")
    ref = await system.spawn(Parent(), name="p", node="env")
    seen = await ref.describe()
    assert seen["parent"] == os.getpid() and seen["environment"]["HEADRACE_TEST"] == "yes"


async def test_the_end_of_the_zygote_harms_no_node_and_another_takes_its_place(system):
    one = await system.spawn(Echo(), name="one", node="n1")
    zygote = zygote_of(system)
    os.kill(zygote, signal.SIGKILL)
    two = await system.spawn(Echo(), name="two", node="n2")
    assert await one.echo(1) == 1 and await two.echo(2) == 2
    assert zygote_of(system) not in (0, zygote) and not exists(zygote)
    assert events(system, "node_exit") == []


async def test_a_zygote_that_answers_no_more_is_done_without(system, monkeypatch):
    await system.spawn(Echo(), name="one", node="n1")
    zygote = zygote_of(system)
    monkeypatch.setattr(launcher_module, "ORDER_S", 0.3)
    os.kill(zygote, signal.SIGSTOP)
    two = await system.spawn(Echo(), name="two", node="n2")
    assert await two.echo(1) == 1 and not exists(zygote)
    await until(lambda: not strays(system))


def strays(system):
    """Children of this process that are neither nodes of the system, nor its zygote, nor the one node to come."""
    return {pid for pid in children() - {*system.pids().values(), zygote_of(system)} if name_of(pid) != "spare"}


def children():
    files = [task / "children" for task in Path("/proc/self/task").iterdir()]
    return {int(pid) for file in files for pid in file.read_text().split()}


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def test_many_nodes_start_at_a_time(system):
    refs = await asyncio.gather(*(system.spawn(Echo(), name=f"e{i}", node=f"n{i}") for i in range(8)))
    assert len({await ref.pid() for ref in refs}) == 8
    relay = await system.spawn(Relay(target="e7"), name="relay", node="n0")
    assert await relay.ask("echo", 5) == 5


async def test_an_actor_may_ask_others_before_it_is_up(system):
    """They must be able to answer a node of which nobody has heard yet."""
    await system.spawn(Echo(), name="echo", node="n0")
    actors = {f"early{i}": f"n{1 + i // 2}" for i in range(4)}
    spawns = [system.spawn(Early(target="echo"), name=name, node=node, policy=QUICK) for name, node in actors.items()]
    await asyncio.gather(*spawns)
    os.kill(system.pids()["n1"], signal.SIGKILL)
    await until(lambda: system.restarts["early0"] == system.restarts["early1"] == 1)
    assert await system.find("early0").ask("echo", 2) == 2


async def test_a_start_that_is_given_up_leaves_no_process(system):
    await system.spawn(Echo(), name="first", node="n0")
    before = strays(system)
    spawning = [asyncio.create_task(system.spawn(Echo(), name=f"e{i}", node=f"n{i}")) for i in range(1, 5)]
    await asyncio.sleep(0.001)
    for task in spawning:
        task.cancel()
    await asyncio.gather(*spawning, return_exceptions=True)
    await until(lambda: strays(system) <= before)
    assert await (await system.spawn(Echo(), name="e1", node="n1")).echo(1) == 1


async def test_a_start_that_was_killed_is_told_from_one_that_failed(system):
    """So that the supervisor can try again."""
    starting = asyncio.create_task(system._nodes.open("cold"))
    await until(lambda: events(system, "node_start"))
    os.kill(system.pids()["cold"], signal.SIGKILL)
    with pytest.raises(LaunchError, match="node cold did not start: killed by SIGKILL") as caught:
        await starting
    assert caught.value.exit.kind == "signal"
    await system._nodes.open("cold")


def test_ctrl_c_during_a_start_leaves_nothing(tmp_path):
    program = textwrap.dedent("""
        import asyncio, os, signal
        from headrace.runtime import System
        from sample_actors import Echo

        async def main():
            async with System() as system:
                asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), signal.SIGINT)
                await asyncio.gather(*(system.spawn(Echo(), name=f"e{i}", node=f"n{i}") for i in range(3)))
                await asyncio.sleep(60)

        asyncio.run(main())
    """)
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "HEADRACE_ORPHANS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr and "never retrieved" not in done.stderr
    marked = [p for p in Path("/proc").glob("[0-9]*") if f"HEADRACE_ORPHANS={tmp_path}" in environment(p)]
    assert not marked and not list(tmp_path.iterdir())


def environment(process):
    try:
        return (process / "environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


# Ending


@pytest.mark.parametrize("trials", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_of_the_root_leaves_no_process_and_no_folder(tmp_path, trials):
    for number in range(trials):
        folder = tmp_path / str(number)
        folder.mkdir()
        trial = Trial(folder)
        time.sleep(0.03 * number)
        assert len(trial.living()) >= 7, "the root, the zygote, four nodes and the child of one"
        trial.kill()
        assert trial.gone_after(20) is not None, trial.living()


async def test_what_a_node_has_started_dies_with_it(system):
    parent = await system.spawn(Parent(), name="p", node="n1", policy=QUICK)
    child = await parent.bears()
    assert alive(child)
    with pytest.raises(ActorDied):
        await parent.bears_and_dies()
    await until(lambda: not exists(child))
    await until(lambda: not strays(system))


async def test_exits_have_a_kind(system):
    echo = await system.spawn(Echo(), name="echo", node="n1", policy=QUICK)
    with pytest.raises(ActorDied, match="exit code"):
        await echo.exits()
    await echo.echo(1)
    os.kill(system.pids()["n1"], signal.SIGTERM)
    await until(lambda: len(events(system, "node_exit")) == 2)
    await echo.echo(1)
    os.kill(system.pids()["n1"], signal.SIGKILL)
    await until(lambda: len(events(system, "node_exit")) == 3)
    assert [(e["kind"], e["reason"]) for e in events(system, "node_exit")] == [
        ("exit_code", "exit code 1"), ("exit_code", "exit code 0"), ("signal", "killed by SIGKILL"),
    ]  # fmt: skip


def test_exits_in_words(tmp_path):
    assert str(exit_of(0)) == "exit code 0" and exit_of(3).code == 3
    assert str(exit_of(-11)) == "killed by SIGSEGV" and exit_of(-11).kind == "signal"
    assert str(exit_of(-40)) == "killed by signal 40"
    starved = exit_of(-9, out_of_memory=True)
    assert starved.kind == "out_of_memory" and starved.code == 9 and "killed by SIGKILL, most likely" in starved.detail
    assert exit_of(-15, out_of_memory=True).kind == "signal", "the kernel uses SIGKILL"


@pytest.mark.parametrize(
    "text", ["low 0\noom 3\noom_kill {}\n", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n", "nr_free 9\noom_kill {}"]
)
def test_the_kernel_s_kills_for_want_of_memory_are_counted(tmp_path, text):
    counter = tmp_path / "counter"
    counter.write_text(text.format(7))
    kills = OomKills([tmp_path / "missing", counter])
    assert not kills.rose()
    counter.write_text(text.format(8))
    kills.refresh()
    assert kills.rose(), "a reading has not made it old news yet"


def test_this_kernel_counts_its_kills():
    assert any("oom_kill" in path.read_text() for path in oom_counters() if path.exists())


async def test_a_kill_for_want_of_memory_has_its_kind(system, tmp_path):
    await system.spawn(Echo(), name="echo", node="n1", policy=QUICK)
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 0")
    system._nodes._launcher.oom_kills.__init__([counter])
    counter.write_text("oom_kill 1")
    os.kill(system.pids()["n1"], signal.SIGKILL)
    await until(lambda: events(system, "node_exit", kind="out_of_memory"))


# Hanging


async def test_a_blocked_loop_is_suspected_with_its_stacks_and_recovers(system):
    hog = await system.spawn(Hog(), name="hog", node="n1")
    await hog.block(1.0)
    await until(lambda: events(system, "node_recovered"))
    first, *_ = events(system, "node_suspect", node="n1")
    assert "in block" in first["stacks"] and 'Thread "inspector"' not in first["stacks"]
    assert first["pid"] == system.pids()["n1"] and first["quiet_s"] >= SUSPECT_S
    assert events(system, "node_exit") == []


async def test_a_thread_that_keeps_the_interpreter_is_seen_through(system):
    hog = await system.spawn(Hog(), name="hog", node="n1")
    await hog.keep_the_gil(1.5)
    await until(lambda: events(system, "node_suspect", node="n1"))
    assert "in keep_the_gil" in events(system, "node_suspect")[0]["stacks"]


async def test_a_stopped_process_is_suspected_and_recovers(system):
    await system.spawn(Hog(), name="hog", node="n1")
    pid = system.pids()["n1"]
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: events(system, "node_suspect", node="n1"))
    assert "[no stacks: the process is stopped by a signal]" in await system._nodes.stacks("n1")
    os.kill(pid, signal.SIGCONT)
    await until(lambda: events(system, "node_recovered", node="n1"))


async def test_a_node_that_hangs_for_too_long_is_killed_and_comes_back(system):
    fragile = await system.spawn(Fragile(), name="fragile", node="strict", policy=QUICK)
    pid = await fragile.ping()
    with pytest.raises(ActorDied, match="hung: its loop did not run for"):
        await fragile.hang_loop()
    assert await fragile.ping() != pid
    (end,) = events(system, "node_exit")
    assert end["kind"] == "hung" and "hang_loop" in end["traceback"]


async def test_loading_a_class_is_no_hang(system, tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text(
        "import time\nfrom dataclasses import dataclass\nfrom headrace.runtime import Actor\n"
        "time.sleep(1.5)\n@dataclass\nclass Slow(Actor):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("slow_module")
    await system.spawn(module.Slow(), name="slow", node="strict")
    assert events(system, "node_suspect", node="strict") == [] and events(system, "node_exit") == []


async def test_the_root_is_watched_too(system):
    time.sleep(0.8)  # noqa: ASYNC251
    await until(lambda: events(system, "node_recovered", node="root"))
    assert "test_the_root_is_watched_too" in events(system, "node_suspect", node="root")[0]["stacks"]


def test_a_reader_that_was_late_accuses_nobody():
    beats, verdicts = Beats(), []
    watch = Watch(beats, lambda *verdict: verdicts.append(verdict[:3]))
    watch.close()
    word = beats.take()
    watch.add("a#1", word, hang_s=2.0, look=lambda: "stacks")
    watched = watch._watched["a#1"]
    for _ in range(10):
        watch._look(watched, 0.02)
    assert verdicts == [] and watch.quiet_s("a#1") == pytest.approx(0.2)
    for _ in range(100):
        watch._look(watched, 0.02)
    assert [(key, verdict) for key, verdict, _ in verdicts] == [("a#1", "suspect"), ("a#1", "hung")]
    assert [quiet for *_, quiet in verdicts] == pytest.approx([0.3, 2.0], abs=0.05)
    beats._words[word] = 1
    watch._look(watched, 0.02)
    assert verdicts[-1][1] == "recovered" and watch.quiet_s("a#1") == 0.0
    beats.close()


# Looking into it


async def ask(path, what, seconds=10.0):
    return await asyncio.to_thread(inspect_node, path, what, seconds)


@pytest.mark.parametrize("node", ["n1", "root"])
async def test_the_inspector_answers_while_the_loop_is_blocked(system, node):
    echo = await system.spawn(Echo(), name="echo", node="n2")
    await system.spawn(Relay(target="echo"), name="relay", node=node)
    holding = asyncio.create_task(echo.hold())
    await until(echo.noted)
    asking = asyncio.create_task(system.find("relay").ask("echo", 1))
    hog = await system.spawn(Hog(), name="hog", node=node)
    path = system._nodes.inspector_of(node)

    async def running():
        return any(row["name"] == "relay" and row["running"] for row in await ask(path, "actors"))

    await until(running)
    answers = {}
    questions = ("ping", "stacks", "waits", "actors", "tasks")
    looking = asyncio.gather(*(in_thread(answers, path, what) for what in questions))
    await hog.block(1.0)
    await looking
    assert answers["ping"]["pid"] == system.pids()[node] and answers["ping"]["key"].startswith(node)
    assert "Thread MainThread" in answers["stacks"] and "Thread inspector" in answers["stacks"]
    assert ("echo", "echo") in [(row["target"], row["method"]) for row in answers["waits"]]
    rows = {row["name"]: row for row in answers["actors"]}
    assert rows["relay"]["running"] == ["ask"] and rows["hog"]["class"] == "Hog"
    assert any("sample_actors.py" in line for task in answers["tasks"] for line in task["at"])
    assert isinstance(await ask(path, "counters"), dict) and await ask(path, "dead_letters") == []
    await echo.let_go()
    await asyncio.gather(holding, asking)


async def in_thread(answers, path, what):
    answers[what] = await ask(path, what)


async def test_the_inspector_refuses_what_it_does_not_know_and_lives_on(system):
    await system.spawn(Echo(), name="echo", node="n1")
    path = system._nodes.inspector_of("n1")
    with pytest.raises(InspectError, match="no such question; there are ping, stacks, tasks, waits"):
        await ask(path, "eval")
    for data in (b"\n", b"[]\n", b'{"ask": []}\n', b"\xff" * 10 + b"\n", b"x" * 10 * MAX_REQUEST_BYTES, b'{"ask"', b""):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(data)
    assert (await ask(path, "ping"))["pid"] == system.pids()["n1"]
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    os.kill(system.pids()["n1"], signal.SIGSTOP)
    await until(lambda: state_of(system.pids()["n1"]) == "T")
    with pytest.raises(InspectError, match=r"no answer to 'ping' within 0\.2 s"):
        await ask(path, "ping", 0.2)
    os.kill(system.pids()["n1"], signal.SIGKILL)
    await until(lambda: events(system, "node_exit"))
    with pytest.raises(InspectError, match="has the process ended"):
        await ask(path, "ping")


async def test_stacks_of_any_node(system):
    hog = await system.spawn(Hog(), name="hog", node="n1")
    keeping = asyncio.create_task(hog.keep_the_gil(4.0))
    await until(lambda: events(system, "node_suspect"))
    assert "in keep_the_gil" in await system._nodes.stacks("n1")
    assert "test_stacks_of_any_node" in await system._nodes.stacks("root")
    os.kill(system.pids()["n1"], signal.SIGKILL)
    with pytest.raises(ActorDied):
        await keeping
    assert await system._nodes.stacks("other") == "[no stacks: the process does not run]"


async def test_the_inspector_listens_below_any_path(tmp_path):
    """Longer than the address of a socket may be."""
    node = Node("x#1", f"ipc://{tmp_path}/x")
    folder = tmp_path / ("y" * 120)
    folder.mkdir()
    inspector = Inspector(node, f"{folder}/z")
    assert (await ask(f"{folder}/z", "ping"))["key"] == "x#1"
    with pytest.raises(LaunchError, match=r"can't listen at .*z: Address already in use"):
        Inspector(node, f"{folder}/z")
    inspector.close()
    await node.close()
