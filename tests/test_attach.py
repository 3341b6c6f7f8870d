"""The REPL's door and what it does to actors, in a real system: looked at, entered, paused, restarted, changed."""

import asyncio
import contextlib
import io
import json
import os
import queue
import random
import socket
import stat
import subprocess
import sys
import threading
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from attach_actors import Computer, Pace, Stuck, Subject
from hypothesis import given
from sample_actors import until

from headrace.attach import attach_main, find_run
from headrace.attach_complete import complete
from headrace.attach_link import AttachError, Link, _error
from headrace.attach_shell import Shell
from headrace.runtime import NodeSpec, RestartPolicy, System
from headrace.runtime.errors import ActorDied, RemoteError
from headrace.runtime.repl import door, frames
from headrace.runtime.repl.interrupt import Interrupted, Region
from headrace.runtime.repl.show import show
from headrace.runtime.repl.snippets import Snippet
from headrace.runtime.toml import ConfigError


@contextlib.asynccontextmanager
async def running(run, *actors, **options):
    """A system in `run` with (name, actor, node); yields it and a link."""
    run.mkdir(parents=True, exist_ok=True)
    async with System(run, **options) as system:
        for name, actor, node in actors:
            await system.spawn(actor, name=name, node=node)
        link = await asyncio.to_thread(Link, run)
        try:
            yield system, link
        finally:
            await asyncio.to_thread(link.close)


def printed(shell, source):
    """What a statement prints, both ways, and whether it went well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ok = shell.run(source)
    return ok, out.getvalue(), err.getvalue()


async def at_prompt(link, *sources):
    """Runs these one after the other in a new shell; what each printed."""

    def work():
        shell = Shell(link)
        try:
            return [printed(shell, source) for source in sources]
        finally:
            shell.loop.close()

    return await asyncio.to_thread(work)


async def shows(link, source, shown):
    """Whether code inside of the subject has this value now."""
    return await asyncio.to_thread(link.ask, "evaluate", actor="subject", source=source) == ["value", shown]


async def test_at_the_prompt(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one"), ("other", Computer(), "root")) as (_, link):
        told = await at_prompt(
            link, "tree()", "await subject.add()", "await subject.fails()", "enter(subject)",
            "print('seen'); x = self.count + 1", "x", "await self.find('other').add()", "1/0", "def broken(:",
            "object()", "'x' * 10**8", "raise SystemExit(3)", "leave()", "x",
            "await team_of_subject.resize(5); team_of_subject", "await team_of_subject.resize(0)",
            "explain(1)", "help()", "find('subjet')", "await subject.told()", "async for x in subject.add.stream(): x",
            "subject.nap.cast(0.0)", "subject.nope()",
            "subject.add(); explain(7); ps(); waits(); dead_letters(); settings(); await cluster.counters()",
            "(1,\n 2)",
        )  # fmt: skip
    of = "tree call raises enter print x remote zero syntax object huge exit leave nox team refused explain help find"
    by = dict(zip([*of.split(), "value", "stream", "cast", "unknown", "rest", "lines"], told, strict=True))
    assert all(name in by["tree"][1] for name in ("subject", "other", "one", "up", "mailbox 0/2048"))
    assert by["call"] == (True, "1\n", "")
    ok, _, text = by["raises"]
    assert not ok and "KeyError: 'no such thing'" in text and "attach_actors.py" in text and "<attach" in text
    assert by["print"][1] == "seen\n" and by["x"][1] == "2\n" and by["remote"][1] == "1\n"
    assert "ZeroDivisionError" in by["zero"][2] and "1/0" in by["zero"][2]
    assert "SyntaxError" in by["syntax"][2] and by["object"][1].startswith("<object object at")
    assert len(by["huge"][1]) < 20_000 and "100000000 characters" in by["huge"][1]
    assert not by["exit"][0] and "SystemExit" in by["exit"][2]
    assert "NameError" in by["nox"][2], "names that were bound inside stay there"
    assert by["team"][1] == "5\nTeam of 5\n" and "ValueError: size must be at least 1" in by["refused"][2]
    assert "seen" in by["explain"][1] and "dead_letters()" in by["help"][1]
    assert "no actor named 'subjet'; there is subject" in by["find"][2]
    assert by["value"][1] == "Pace(share=0.5, most=10, least=1)\n", "a class of the run is found here, too"
    assert "is no stream" in by["stream"][2] and by["cast"][0] and by["rest"][0]
    assert "has no @message 'nope'; it has: add, answer" in by["unknown"][2], "a call that stands alone is awaited"
    assert by["rest"][1].startswith("2\nnobody knows this sample\n")
    assert by["lines"][1] == "(1, 2)\n"


async def test_what_is_evaluated_inside_an_actor_comes_between_two_messages(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one")) as (system, link):
        subject = system.find("subject")
        calls = [asyncio.create_task(subject.add()) for _ in range(150)]
        for _ in range(20):
            source = "n = self.count\nawait asyncio.sleep(0)\nself.count = n + 1"
            assert (await asyncio.to_thread(link.ask, "evaluate", actor="subject", source=source))[0] == "value"
        await asyncio.gather(*calls)
        assert await subject.add() == 171

        napping = asyncio.create_task(subject.nap(0.3))
        await until(lambda: link.ask("tree")["actors"][0]["running"] == ["nap"])
        evaluated = await asyncio.to_thread(link.ask, "evaluate", actor="subject", source="'after the nap'")
        assert napping.done() and evaluated == ["value", "'after the nap'"]


def interrupted(link, actor, source):
    """What came of code that was cancelled as soon as it ran. Not on the root's loop, which may be held up by it."""
    ended: queue.SimpleQueue = queue.SimpleQueue()
    asked = link.start("evaluate", lambda kind, value: ended.put(value), {"actor": actor, "source": source})
    while ended.empty() and not any(row["name"] == actor and row["running"] for row in link.ask("tree")["actors"]):
        time.sleep(0.01)
    link.cancel(asked)
    return ended.get(timeout=30)


async def test_an_endless_loop_is_ended_and_the_actor_lives_on(tmp_path):
    actors = ("subject", Subject(), "one"), ("computer", Computer(), "two"), ("here", Subject(), "root")
    async with running(tmp_path, *actors) as (system, link):
        await system.find("computer").compute(0.0)  # From now on it has a thread.
        for name in ("subject", "computer", "here"):
            nap_s = 0.05 if name == "computer" else 30  # Outside of the main thread, C code runs to its end.
            for source in ("while True: pass", f"import time\nwhile True: time.sleep({nap_s})"):
                ended = await asyncio.to_thread(interrupted, link, name, source)
                late = isinstance(ended, list) and "it held up the loop" in ended[1]
                assert isinstance(ended, KeyboardInterrupt) or (late and name != "computer")
                assert await system.find(name).add() > 0
        told = await asyncio.gather(
            asyncio.to_thread(link.ask, "evaluate", actor="subject", source="while True: pass"),
            asyncio.to_thread(
                link.ask, "evaluate", actor="here", source="await asyncio.sleep(0)\nwhile True: pass"
            ),
        )  # fmt: skip
        for (kind, text), node in zip(told, ("one", "root"), strict=True):
            assert kind == "error" and f"it held up the loop of node {node}" in text, "it ends without Ctrl-C, too"
        assert {row["incarnation"] for row in system.tree()} == {1}


async def test_a_blocked_loop_and_a_blocked_root_are_looked_into(tmp_path):
    spec = {"one": NodeSpec(name="one", hang_s=None)}
    async with running(tmp_path, ("stuck", Stuck(), "one"), ("here", Stuck(), "root"), nodes=spec) as (system, link):
        working = asyncio.create_task(system.find("stuck").synchronous_work(0.8))
        await until(lambda: link.ask("peek", actor="stuck", path="where") == "'inside'")
        stack = await asyncio.to_thread(link.ask, "stack", name="stuck")
        assert "in synchronous_work" in stack and not working.done()
        await working

        seen = {}

        def look() -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and "in synchronous_work" not in seen.get("stack", ""):
                seen["stack"] = link.ask("stack", name="here")
            seen["peek"], seen["names"] = link.ask("peek", actor="here", path="where"), link.ask("names", actor="here")

        looking = threading.Thread(target=look)
        looking.start()
        await system.find("here").synchronous_work(0.8)
        assert seen["peek"] == "'inside'" and "where" in seen["names"]
        await asyncio.to_thread(looking.join)


async def test_pause_restart_and_kill(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one"), ("here", Subject(), "root")) as (system, link):
        assert await asyncio.to_thread(link.ask, "pause", actor="subject") == 0
        waiting = asyncio.create_task(system.find("subject").add())
        assert await system.find("subject").answer() == "here", "the control lane is open"
        await until(lambda: link.ask("tree")["actors"][0]["waiting"] == 1)
        assert not waiting.done()
        evaluated = await asyncio.to_thread(link.ask, "evaluate", actor="subject", source="self.count")
        assert evaluated == ["value", "0"], "so is the system lane"
        await asyncio.to_thread(link.ask, "pause", actor="subject", paused=False)
        assert await waiting == 1

        await asyncio.to_thread(link.ask, "evaluate", actor="subject", source="mine = 1")
        await asyncio.to_thread(link.ask, "restart", actor="subject")
        await until(lambda: system.tree()[0]["incarnation"] == 2 and system.tree()[0]["state"] == "up")
        assert await system.find("subject").add() == 1
        told = await asyncio.to_thread(link.ask, "evaluate", actor="subject", source="mine")
        assert "NameError" in told[1], "it is another incarnation"

        pid = await asyncio.to_thread(link.ask, "kill", actor="subject")
        await until(lambda: system.tree()[0]["incarnation"] == 3 and system.tree()[0]["state"] == "up")
        assert system.pids()["one"] != pid and await system.find("subject").add() == 1
        with pytest.raises(ValueError, match="the process that was started"):
            await asyncio.to_thread(link.ask, "kill", actor="here")
        await system.spawn(Subject(), name="brief", node="one", policy=RestartPolicy(restart="temporary"))
        with pytest.raises(ValueError, match="temporary"):
            await asyncio.to_thread(link.ask, "restart", actor="brief")
        events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        assert {"actor_paused", "actor_resumed", "killed_by_hand", "actor_restart"} <= set(events)


async def test_a_dead_actor_and_one_that_is_away_are_said(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one")) as (system, link):
        running_there = asyncio.to_thread(link.ask, "evaluate", actor="subject", source="await asyncio.sleep(60)")
        waiting = asyncio.create_task(running_there)
        await until(lambda: "repl" in link.ask("tree")["actors"][0]["running"])
        await asyncio.to_thread(link.ask, "kill", actor="subject")
        with pytest.raises(ActorDied, match="killed by SIGKILL"):
            await waiting
        await until(lambda: system.tree()[0]["state"] == "up")
        assert await system.find("subject").add() == 1


async def test_settings_are_checked_kept_and_survive(tmp_path):
    first = ("subject", Subject(), "one"), ("again", Subject(), "root")
    async with running(tmp_path, *first) as (system, link):
        rows = {row["name"]: row for row in link.ask("settings")}
        assert rows["share"]["rule"] == "float >= 0 and <= 1" and rows["share"]["actors"] == ["subject", "again"]
        done = await asyncio.to_thread(link.ask, "change", name="share", value=0.25)
        assert done == {"name": "share", "old": 0.5, "new": 0.25, "late": {}}
        for name, value, why in (
            ("share", 1.5, "share must be less than or equal to 1"), ("share", "much", "share must be a valid number"),
            ("shar", 0.1, 'did you mean "share"'), ("least", 1, "no live setting"), ("most", 0, "greater than 0"),
            ("limit", 5000, "too large for this pace"), ("log_level", "LOUD", "log_level must be one of"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=why):
                await asyncio.to_thread(link.ask, "change", name=name, value=value)
        assert (await system.find("subject").told()).share == 0.25
        assert await asyncio.to_thread(link.ask, "peek", actor="again", path="taken") == "[0.5, 0.25]"
        await asyncio.to_thread(link.ask, "change", name="log_level", value="DEBUG")
        level = "import logging; logging.getLogger().level"
        await until(lambda: shows(link, level, "10"))
        await asyncio.to_thread(link.ask, "kill", actor="subject")
        await until(lambda: system.tree()[0]["incarnation"] == 2 and system.tree()[0]["state"] == "up")
        assert await system.find("subject").told() == Pace(share=0.25)
        await until(lambda: shows(link, level, "10"))
        await asyncio.to_thread(link.ask, "change", name="log_level", value="WARNING")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    changed = [(e["setting"], e["old"], e["new"]) for e in events if e["event"] == "setting_changed"]
    assert changed[0] == ("share", 0.5, 0.25) and len(changed) == 3
    async with running(tmp_path, *first) as (system, link):
        assert await system.find("subject").told() == Pace(share=0.25), "a system that goes on in this directory has it"
        assert {row["name"] for row in link.ask("settings") if row["changed"]} == {"share", "log_level"}


async def test_trace_follows_messages_and_leaves_no_trace(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one"), ("computer", Computer(), "one")) as (system, link):
        rows: list[dict] = []
        asked = link.start(
            "trace",
            lambda kind, value: rows.extend(value if kind == "item" else ()),
            {"actor": "subject", "seconds": 30.0},
        )
        subject = system.find("subject")
        while not rows:
            assert await subject.sums(1, 2) == 3
        with pytest.raises(RemoteError):
            await subject.fails()
        await until(lambda: any("error" in row for row in rows))
        assert rows[0]["method"] == "sums" and rows[0]["arguments"] == "(1, 2)" and rows[0]["from"] == "root#1"
        assert "KeyError" in next(row["error"] for row in rows if "error" in row) and rows[0]["took_s"] >= 0
        await asyncio.to_thread(link.cancel, asked)
        await until(lambda: shows(link, "self._node.cells['subject'].tracers", "()"))
        assert await subject.sums(1, 2) == 3


async def test_who_is_no_friend_is_refused_and_does_no_harm(tmp_path, caplog):
    async with running(tmp_path, ("subject", Subject(), "one")) as (system, link):
        file = tmp_path / "attach.json"
        given = json.loads(file.read_text())
        for path in (file, given["socket"]):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

        def try_with(data, told=None):
            """What is answered, up to these words, or to the end."""
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(given["socket"])
                client.sendall(data)
                if told is None:
                    client.shutdown(socket.SHUT_WR)
                answer = b""
                while (told is None or told not in answer) and (part := client.recv(4096)):
                    answer += part
                return answer

        greeting = frames.pack({"token": given["token"]})
        assert b"wrong token" in await asyncio.to_thread(try_with, frames.pack({"token": "no"}))
        assert b"wrong token" in await asyncio.to_thread(try_with, frames.pack({"token": None, "ask": "kill"}))
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, frames.pack({"token": "x" * 10_000}), b"\0" * 8):
            assert await asyncio.to_thread(try_with, garbage) in (b"",) or garbage[:1] == b"\0"
        for ask, told in (("__class__", b"there is no question '__class__'"), ("kill", b"TypeError")):
            asked = frames.pack({"id": 1, "ask": ask, "with": {"x": 1}})
            assert told in await asyncio.to_thread(try_with, greeting + asked, told)
        caplog.clear()
        assert await asyncio.to_thread(try_with, frames.SIZES.pack(4000, 0) + b"[" * 4000) == b""
        for nonsense in (
            frames.pack({"id": []}),
            frames.pack({"cancel": []}),
            frames.pack({"id": "x"}),
            frames.pack({}),
            b"\xff" * 64,
        ):
            await asyncio.to_thread(try_with, greeting + nonsense)
        await until(lambda: len(system._door._sessions) == 1)
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
        file.write_text(json.dumps({**given, "token": "0" * 32}))
        with pytest.raises(AttachError, match="wrong token"):
            await asyncio.to_thread(Link, tmp_path)
        assert await system.find("subject").add() == 1 and link.ask("pids")["root"] == os.getpid()
    assert not file.exists() and link.closed


async def test_a_console_that_dies_takes_along_what_it_had_asked_for(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one")) as (system, link):
        other = await asyncio.to_thread(Link, tmp_path)
        other.start("evaluate", lambda kind, value: None, {"actor": "subject", "source": "while True: pass"})
        await until(lambda: "repl" in link.ask("tree")["actors"][0]["running"])
        other.start("call", lambda kind, value: None, {"actor": "subject", "method": "nap", "args": [60], "kwargs": {}})
        await until(lambda: link.ask("waits"))
        await asyncio.to_thread(other.close)
        async with asyncio.timeout(30):
            assert await system.find("subject").add() == 1
        await until(lambda: not link.ask("waits"))


async def test_completion_is_remote(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "one"), ("other", Subject(), "root")) as (_, link):

        def look():
            shell = Shell(link)
            found = {text: [name for name, _ in complete(shell, text)] for text in (
                "su", "await subject.a", 'find("o', 'peek(subject, "state', 'peek(subject, "team.', "tre",
                "team_of_other.re", "nobody.x",
            )}  # fmt: skip
            shell.run("enter(subject)")
            found |= {
                f">{text}": [name for name, _ in complete(shell, text)] for text in ("self.te", "self.team.", "lea")
            }
            shell.loop.close()
            return found

        found = await asyncio.to_thread(look)
    assert "subject" in found["su"] and found["await subject.a"] == ["add", "answer"] and found['find("o'] == ["other"]
    assert found['peek(subject, "state'] == ["state"] and found['peek(subject, "team.'] == ["size"]
    assert found["tre"] == ["tree("] and found["team_of_other.re"] == ["resize"] and found["nobody.x"] == []
    assert found[">self.te"] == ["team"] and found[">self.team."] == ["resize(", "size"] and found[">lea"] == ["leave("]


async def test_which_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert attach_main([]) == 2
    assert "runs has none; start one with bin/launch" in capsys.readouterr().err
    runs = tmp_path / "runs"
    async with running(runs / "one", ("subject", Subject(), "root")):
        assert find_run("", runs) == runs / "one" == find_run(str(runs / "one"), runs) == find_run("one", runs)
        async with running(runs / "two", ("subject", Subject(), "root")):
            with pytest.raises(AttachError, match="2 runs are running: one, two; name one"):
                find_run("", runs)
        with pytest.raises(AttachError, match=r"there is no such run; in runs there is one \(running\), two"):
            find_run("three", runs.relative_to(tmp_path))
        with pytest.raises(AttachError, match="no way in by network"):
            find_run("tcp://host:1", runs)
        assert await asyncio.to_thread(attach_main, ["-c", "await subject.add()\n1/0\n3"]) == 1
        out = capsys.readouterr()
        assert out.out == "1\n" and "ZeroDivisionError" in out.err
    assert await asyncio.to_thread(attach_main, ["one", "-c", "tail(lines=1); explain(3)"]) == 1
    out = capsys.readouterr()
    assert "system_stop" in out.out and "this run has kept no samples" in out.err, "a finished run shows its files"


def test_importing_the_console_is_cheap():
    slow = "{'numpy', 'torch', 'pydantic', 'zmq', 'rich'}"
    code = f"import sys, headrace.attach_console, headrace.attach_files\nprint(sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
)


@hypothesis.settings(max_examples=50)
@given(values)
def test_frames_keep_every_value(value):
    data = frames.put({"id": 1}, "value", value)
    header, beside = frames.sizes(data[:8])
    assert len(data) == 8 + header + beside
    got = frames.get(frames.unpack(data[8 : 8 + header]), "value", data[8 + header :])
    assert got == value and type(got) is type(value)


@hypothesis.settings(max_examples=30)
@given(values)
def test_shown_values_are_bounded(value):
    assert len(show([value] * 300, limit=500)) < 600
    if len(repr(value)) < 100:
        assert show(value) == repr(value)
    assert show(np.arange(3)) == "array([0, 1, 2])"


def test_an_interruption_never_leaves_its_region():
    """Whenever it comes: a thread that computes in the region again and again sees it there, or not at all."""
    region, done, outside = Region(), threading.Event(), []

    def compute():
        chance = random.Random(1)
        while not done.is_set():
            try:
                try:
                    with region:
                        for _ in range(chance.randrange(200)):
                            pass
                except Interrupted:
                    pass
                for _ in range(100):
                    pass
            except BaseException as error:  # noqa: BLE001
                outside.append(error)

    worker = threading.Thread(target=compute)
    worker.start()
    chance = random.Random(2)
    hits = 0
    while hits < 100:
        hits += region.interrupt("test")
        time.sleep(chance.random() * 1e-4)
    done.set()
    worker.join()
    assert outside == []


def test_a_sleep_in_the_main_thread_is_interrupted():
    region = Region()
    timer = threading.Timer(0.1, region.interrupt, ["enough"])
    timer.start()
    with pytest.raises(Interrupted, match="enough"), region:
        time.sleep(60)
    timer.join()
    assert not region.interrupt("nobody is there")


def test_a_snippet_keeps_the_value_of_its_last_expression():
    names: dict[str, object] = {}
    first = Snippet("x = 2\nx + 1")
    first.run(names)
    assert first.value == 3 and not first.awaits and Snippet("await f()").awaits
    again = Snippet("async def f():\n    return x\ny = await f()\ny * 10")
    asyncio.run(again.run_async(names))
    assert again.value == 20 and names["y"] == 2


async def test_a_console_that_does_not_read_is_put_out(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "SEND_S", 0.3)
    async with running(tmp_path, ("subject", Subject(), "root")) as (system, link):
        given = json.loads((tmp_path / "attach.json").read_text())

        def flood():
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(given["socket"])
                client.sendall(frames.pack({"token": given["token"]}))
                with contextlib.suppress(OSError):  # Until it has been put out.
                    for number in range(200_000):
                        client.sendall(frames.pack({"id": number, "ask": "hello", "with": {}}))
                    return False
                return True

        assert await asyncio.to_thread(flood)
        await until(lambda: len(system._door._sessions) == 1)
        assert link.ask("pids")["root"] == os.getpid()


async def test_another_users_run_is_not_attached_to(tmp_path, monkeypatch):
    async with running(tmp_path, ("subject", Subject(), "root")):
        me = os.geteuid()
        monkeypatch.setattr("headrace.attach_link.os.geteuid", lambda: me + 1)
        with pytest.raises(AttachError, match=f"belongs to user {me}"):
            await asyncio.to_thread(Link, tmp_path)


async def test_errors_that_are_made_of_more_than_a_text_are_told_and_nothing_acts_on_the_terminal(tmp_path):
    async with running(tmp_path, ("subject", Subject(), "root")) as (_, link):
        link_error = _error("UnicodeDecodeError", "text", "trace", "")
        assert isinstance(link_error, RemoteError) and "UnicodeDecodeError: text" in str(link_error)
        told = await at_prompt(link, "enter(subject)", "print('\\x1b[2Jx\\x07')", "leave()", "cluster.pids()")
    assert told[1][1] == "?[2Jx?\n" and told[3][0]


async def test_an_interruption_that_strikes_as_its_region_is_left_is_forgotten(tmp_path, monkeypatch):
    def strike(self, *error):
        raise Interrupted("late")

    async with running(tmp_path, ("here", Subject(), "root")) as (system, link):
        with monkeypatch.context() as patch:
            patch.setattr(Region, "__exit__", strike)
            told = await asyncio.to_thread(link.ask, "evaluate", actor="here", source="1")
        assert told[0] == "error"
        assert [region.interrupt("again") for region in system.node.regions.values()] == [False]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not valid JSON"), ("[]", "must be an object"), ('{"log_level": "LOUD"}', "log_level of DEBUG"),
        ('{"pace.share": 7}', "pace.share must be less than or equal to 1"),
        ('{"limit": 5000}', "too large for this pace"),
    ],
)  # fmt: skip
async def test_kept_settings_that_do_not_fit_are_refused(tmp_path, content, why):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ConfigError, match=f"settings.json: .*{why}"):
        async with running(tmp_path, ("subject", Subject(), "root")):
            pass
