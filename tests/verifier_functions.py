"""Verifiers as a user writes them, for tests: imported by worker processes, without pytest."""

import os
import signal
import subprocess
import threading
import time


def judge(question: str, reference: str, response: str) -> bool:
    """The running sum: what stands after the last mark is the total."""
    return response.rpartition("#")[2] == reference


class Closeness:
    """A graded verdict: how near a number is."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, question: str, reference: str, response: str) -> float:
        return 1.0 - abs(float(reference) - float(response)) / self.scale


def misbehave(question: str, reference: str, response: str) -> object:
    """Does what the response says."""
    match response:
        case "raise":
            raise KeyError("no such key")
        case "busy":
            raise ConnectionError("the service is busy")
        case "nan":
            return float("nan")
        case "none":
            return None
        case "exit":
            os._exit(3)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGPROF])
            time.sleep(3600)
        case "spin":
            while True:
                pass
        case "eat":
            return len(bytearray(8 << 30)) > 0
        case "print":
            print("x" * 100_000, flush=True)  # noqa: T201
        case "thread":
            threading.Thread(target=time.sleep, args=(3600,)).start()
        case "start":
            return float(subprocess.Popen(["sleep", "3600"]).pid)
        case "pid":
            return float(os.getpid())
    return True


def betray(question: str, reference: str, response: str) -> bool:
    """Does what a rule that evaluates answers would be made to do; right if it gets away with it."""
    match response:
        case "write":
            open(reference, "w").close()
        case "run":
            os.system(f"touch {reference}")
        case "fork":
            os.fork()
        case "environment":
            return "HEADRACE_SECRET" in os.environ
        case "read":
            return len(open(__file__).read()) > 0
    return True


class CannotBeMade:
    def __init__(self) -> None:
        raise OSError("no model file")


async def later(question: str, reference: str, response: str) -> bool:
    return True


NUMBER = 5


def hang(question: str, reference: str, response: str) -> bool:
    """Judges until there is a file HEADRACE_TEST_HANG; then it says so, never answers, and takes no hint."""
    flag = os.environ["HEADRACE_TEST_HANG"]
    if os.path.exists(flag):
        open(f"{flag}.reached", "w").close()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGPROF])
        while True:
            time.sleep(3600)
    return judge(question, reference, response)
