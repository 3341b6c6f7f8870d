"""Kills the root of a system with SIGKILL and looks for what it leaves: processes, grandchildren, folders.

    python tests/orphans.py [TRIALS]    prints how long the last process lived, and what was left after 100 ms

A process belongs to a trial if it was started with the trial's mark in its environment, whoever is its parent now.
"""

import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from pathlib import Path

MARK = "HEADRACE_ORPHANS"

ROOT_PROGRAM = textwrap.dedent("""
    import asyncio, sys
    from headrace.runtime import NodeSpec, System
    from sample_actors import Echo, Fragile, Parent

    async def main():
        async with System(nodes={"cold": NodeSpec(name="cold", start="cold")}) as system:
            await asyncio.gather(
                system.spawn(Echo(), name="e0", node="n0"),
                system.spawn(Echo(), name="e1", node="cold"),
                system.spawn(Fragile(), name="f", node="n1"),
                system.spawn(Parent(), name="p", node="n2"),
            )
            await system.find("p").bears()
            system.find("f").hang_loop.cast()
            specs = [NodeSpec(name=f"late{i}", start="cold" if i % 2 else "warm") for i in range(4)]
            system._specs.update({spec.name: spec for spec in specs})
            starts = [asyncio.create_task(system.spawn(Echo(), name=spec.name, node=spec.name)) for spec in specs]
            await asyncio.sleep(0)
            print("ready", flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
""")


class Trial:
    """A root with nodes, a hung one, one with a child of its own, and some that are just starting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"{MARK}={uuid.uuid4()}"
        path = [str(Path(__file__).parent), *(p for p in sys.path if p)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(folder)}
        env[MARK] = self.mark.partition("=")[2]
        self.root = subprocess.Popen([sys.executable, "-c", ROOT_PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
        assert self.root.stdout is not None
        assert self.root.stdout.readline() == "ready\n"

    def living(self) -> list[str]:
        """pid and name of each process of this trial."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (process / "environ").read_text(errors="replace").split("\0"):
                    found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
            except OSError:
                continue
        return found

    def kill(self) -> None:
        self.root.kill()
        self.root.wait()
        assert self.root.stdout is not None
        self.root.stdout.close()

    def gone_after(self, seconds: float) -> float | None:
        """Seconds until nothing was left; None if something was left after `seconds`."""
        begun = time.monotonic()
        while self.living() or any(self.folder.iterdir()):
            if time.monotonic() - begun > seconds:
                return None
            time.sleep(0.002)
        return time.monotonic() - begun


def main(trials: int) -> None:
    times, left = [], []
    for _ in range(trials):
        with tempfile.TemporaryDirectory(prefix="hr-") as folder:
            trial = Trial(Path(folder))
            time.sleep(random.uniform(0, 0.3))
            trial.kill()
            time.sleep(0.1)
            left += trial.living()
            gone = trial.gone_after(10)
            times.append(10.0 if gone is None else gone)
    last = max(times) + 0.1
    sys.stdout.write(f"{trials} trials: {len(left)} left after 100 ms {left[:5]}; all gone within {last:.3f} s\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
