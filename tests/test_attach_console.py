"""The prompt itself, typed at in a terminal."""

import asyncio
import os
import time

import pytest
from attach_actors import Stuck, Subject
from console import Console
from sample_actors import until

from headrace.runtime import System
from headrace.runtime.inspector import steady


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


@pytest.mark.xfail(strict=False, raises=TimeoutError, reason="Ctrl-C at the prompt is sometimes not seen: open")
async def test_a_conversation(tmp_path, state):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)

    def talk():
        with Console([str(run)], state) as console:
            console.read_until("attached to", ">>>")
            console.write('find("subj\t')
            console.read_until("ect")
            console.write('").sums(1, 2)\r')
            console.read_until("3", ">>>")
            console.write("def double(x):\rreturn x * 2\r\rdouble(21)\r")
            console.read_until("42", ">>>")
            console.write("await subject.nap(60)\r")
            while not (working := [row for row in steady(system.node.wait_rows) if row["method"] == "nap"]):
                time.sleep(0.01)
            assert working[0]["owner"].startswith("attach-")
            console.write("\x03")
            console.read_until("KeyboardInterrupt", ">>>")
            console.write('print("be" + "gun"); [0 for _ in iter(int, 1)]\r')
            console.read_until("begun")
            console.write("\x03")
            console.read_until("KeyboardInterrupt", ">>>")
            console.write("enter(subject)\r")
            console.read_until("subject>>>")
            console.write("self.te\t")
            console.read_until("am")
            console.write(".size + 40\r")
            console.read_until("42", "subject>>>")
            console.write("while True: pass\r\r")
            time.sleep(0.3)  # If that is too early to be seen, it ends by itself after HOLD_S.
            os.write(console.master, b"\x03")
            console.read_until("KeyboardInterrupt", "subject>>>")
            console.write("\x04")
            console.read_until(">>>")
            console.write("1/0\r")
            console.read_until("ZeroDivisionError", ">>>")
            console.write("\x04")
            assert console.process.wait(20) == 0
        with Console([str(run)], state) as console:  # Up arrow: the history of the last one.
            console.read_until(">>>")
            console.write("\x1b[A")
            console.read_until("1/0")

    async with System(run) as system:
        await system.spawn(Subject(), name="subject", node="one")
        await asyncio.to_thread(talk)
        assert await system.find("subject").add() == 1
        assert not system.node.wait_rows()
    history = state / "headrace" / "attach_history"
    assert "subject" in history.read_text() and os.stat(history).st_mode & 0o077 == 0


async def test_the_run_ends_under_a_console_and_its_files_stay_open(tmp_path, state):
    run = tmp_path / "one"
    run.mkdir()
    async with System(run) as system:
        await system.spawn(Stuck(), name="stuck", node="one")
        console = await asyncio.to_thread(Console, [str(run)], state)
        await asyncio.to_thread(console.read_until, ">>>")

    def after():
        with console:
            console.write("tree()\r")
            console.read_until("the run has ended")
            assert console.process.wait(20) == 1
        with Console([str(run)], state) as files:
            files.read_until("does not run any more", ">>>")
            files.write("tail(lines=1)\r")
            files.read_until("system_stop", ">>>")
            files.write("exit\r")
            assert files.process.wait(20) == 0

    await asyncio.to_thread(after)
    await until(lambda: not (run / "attach.json").exists())
