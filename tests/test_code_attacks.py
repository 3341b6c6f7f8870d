"""Every attack of code_attacks.py ends in its right verdict, reaches nothing, and leaves the host as it was."""

import json
import os
import re
import secrets
import socket
from pathlib import Path

import pytest
import sandboxed
from code_attacks import ATTACKS, LEAK, Attack
from sample_actors import until

from headrace.actors.verifier import Case, CodeVerifier
from headrace.actors.verifier.court import Care
from headrace.actors.verifier.sandbox import RunLimits

sandboxed.needed()
pytestmark = pytest.mark.slow

LIMITS = RunLimits(cpu_s=1.0, wall_s=8.0, memory_bytes=128 << 20, output_bytes=1 << 20)
PARTS = 4
FUNCTION = {"names": ["f"], "tests": "assert f(3) == 10\nassert all(abs(f(n) - n * n - 1) < 1 for n in range(4, 9))"}


def case(attack: Attack, port: int, path: Path) -> Case:
    source = attack.source.replace("HOST_PORT", str(port)).replace("HOST_PID", str(os.getpid()))
    tests = [{"input": "7\n", "output": secrets.token_hex(8)}]
    reference = {"function": FUNCTION} if attack.function else {"language": attack.language, "tests": tests}
    return Case(reference=json.dumps(reference), response=source.replace("HOST_FILE", str(path)), row=attack.name)


@pytest.mark.parametrize("part", range(PARTS))
async def test_attacks_are_contained(part, tmp_path):
    attacks = ATTACKS[part::PARTS]
    path = tmp_path / "secret"
    path.write_text("host")
    os.chmod(tmp_path, 0o755)
    verifier = CodeVerifier(fenced=False, limits=LIMITS, warm=2, places=2, care=Care(deadline_s=110.0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await verifier.start()
        listener.setblocking(False)
        try:
            verdicts = await verifier.judge_cases([case(attack, listener.getsockname()[1], path) for attack in attacks])
            with pytest.raises(BlockingIOError):
                listener.accept()
        finally:
            await verifier.stop(None)
    for attack, verdict in zip(attacks, verdicts, strict=True):
        assert not verdict.error, f"{attack.name}: {verdict.error}"
        assert re.match("[A-Z]+", verdict.note)[0] in attack.right, f"{attack.name}: {verdict.note}"
        assert LEAK not in verdict.note
    assert path.read_text() == "host" and os.listdir(tmp_path) == ["secret"]
    await until(lambda: not _sandboxed_children())


def _sandboxed_children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split() if "keeper" in _command(child)]


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_the_table_is_large_enough_and_names_are_unique():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40


async def test_a_program_that_is_under_attack_beside_it_is_judged_as_ever():
    verifier = CodeVerifier(fenced=False, limits=LIMITS, warm=2, places=4, care=Care(deadline_s=110.0))
    await verifier.start()
    attacks = [attack for attack in ATTACKS if attack.name in ("fork bomb", "kills everything", "memory bomb")]
    honest = Case(reference=json.dumps({"tests": [{"input": "4", "output": "5"}]}), response="print(int(input()) + 1)")
    try:
        *_, verdict = await verifier.judge_cases([*(case(a, 1, Path("/x")) for a in attacks), honest])
    finally:
        await verifier.stop(None)
    assert verdict.correct, verdict
