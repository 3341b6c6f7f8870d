"""Programs that attack what judges them: each with its way, and the verdicts that are right for it.

A program is judged by one test, whose expected output is random and nowhere to be read; `function` programs, by asserts
on f(n) = n * n + 1 from another sandbox. HOST_PORT, HOST_PID and HOST_FILE stand for a listener, a process and a file of
the host. LEAK is what a program prints that has reached what it must not; judged right it is never seen, and a program
that only looks around and finds nothing prints WRONG and ends well: WA.
"""

# ruff: noqa: E501  # Programs in a line each.

from dataclasses import dataclass
from textwrap import dedent

LEAK = "LEAKED"


@dataclass(frozen=True)
class Attack:
    """One of them."""

    name: str
    source: str
    right: frozenset[str]
    language: str = "python"
    function: bool = False


ATTACKS: list[Attack] = []


def _attack(name: str, right: str, source: str, *, language: str = "python", function: bool = False) -> None:
    ATTACKS.append(Attack(name, dedent(source).lstrip(), frozenset(right.split()), language, function))


def _probe(name: str, *, code: str) -> None:
    """A program that tries `code`, which must raise or come to nothing, and says which."""
    body = "\n".join("    " + line for line in dedent(code).strip().splitlines())
    _attack(
        name,
        "WA",
        f"import ctypes, os, sys\ntry:\n{body}\n    print('{LEAK}')\nexcept Exception:\n    print('WRONG')\n",
    )


def _call(name: str, number: int, *arguments: str) -> None:
    """A system call that must fail."""
    given = ", ".join([f"ctypes.c_long({number})", *arguments])
    _probe(name, code=f"if ctypes.CDLL(None, use_errno=True).syscall({given}) < 0: raise OSError(ctypes.get_errno())")


# What eats the machine

_attack(
    "fork bomb",
    "TLE RE",
    """
    import os
    while True:
        try:
            os.fork()
        except OSError:
            pass
""",
)
_attack("fork bomb in C++", "TLE", "#include <unistd.h>\nint main() { for (;;) fork(); }", language="cpp")
_attack(
    "thread bomb",
    "RE TLE MLE",
    """
    import threading, time
    while True:
        threading.Thread(target=time.sleep, args=(99,)).start()
""",
)
_attack("memory bomb", "MLE", "x = []\nwhile True: x.append(bytearray(1 << 20))")
_attack("memory at once", "MLE", "x = bytearray(1 << 40)")
_attack(
    "memory bomb in C++",
    "MLE",
    """
    #include <cstring>
    #include <cstdlib>
    int main() { for (;;) { char *p = (char *)malloc(1 << 20); if (p) memset(p, 1, 1 << 20); } }
""",
    language="cpp",
)
_attack(
    "memory spread over processes",
    "MLE TLE",
    """
    import os, time
    for _ in range(6):
        if not os.fork():
            break
    x = bytearray(b"x") * (60 << 20)
    time.sleep(3)
""",
)
_attack("big integer", "TLE MLE", "print(9 ** 9 ** 9)")
_attack("endless recursion", "RE", "def f(): return f()\nf()")
_attack(
    "endless recursion in C++",
    "RE",
    "int f(int x) { volatile int y = x; return f(y + 1) + y; }\nint main() { return f(0); }",
    language="cpp",
)
_attack(
    "disk filler",
    "RE MLE",
    """
    for i in range(10 ** 6):
        with open(f"f{i}", "wb") as file:
            file.write(b"x" * 900_000)
""",
)
_attack("huge file by truncate", "RE", "open('x', 'wb').truncate(1 << 42)")
_attack(
    "inode bomb",
    "RE TLE",
    """
    import os
    for i in range(10 ** 9):
        os.symlink("x", f"s{i}")
""",
)
_attack(
    "deep folders",
    "RE TLE",
    """
    import os
    while True:
        os.mkdir("d")
        os.chdir("d")
""",
)
_attack("output flood", "RE", "import sys\nwhile True: sys.stdout.write('x' * 100000)")
_attack(
    "output flood that ignores the signal",
    "RE TLE",
    """
    import os, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    while True:
        try:
            os.write(1, b"x" * 100000)
        except OSError:
            os._exit(0)
""",
)
_attack(
    "error flood",
    "TLE RE",
    """
    import sys
    while True:
        try:
            sys.stderr.write("x" * 100000)
        except OSError:
            pass
""",
)
_attack("files opened without end", "RE", "x = []\nwhile True: x.append(open('/dev/zero'))")
_attack(
    "memory file",
    "WA",
    f"""
    import os
    try:
        fd = os.memfd_create("x")
        print("{LEAK}")
    except OSError:
        print("WRONG")
""",
)

# What does not end

_attack("endless loop", "TLE", "while True: pass")
_attack("endless sleep", "TLE", "import time; time.sleep(1e6)")
_attack(
    "signals caught",
    "TLE",
    """
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True: pass
""",
)
_attack("reads after the end of input", "WA", "import sys\nsys.stdin.read(); sys.stdin.read(); print('WRONG')")
_attack(
    "daemon",
    "WA",
    """
    import os, time
    if os.fork():
        print("WRONG", flush=True)
        os._exit(0)
    os.setsid()
    if not os.fork():
        time.sleep(1e6)
""",
)
_attack(
    "zombies",
    "WA",
    """
    import os
    for _ in range(8):
        if not os.fork():
            os._exit(0)
    print("WRONG")
""",
)
_attack("stops itself", "TLE", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
_attack("closes its files", "WA RE", "import os\nos.closerange(0, 1024)\nos._exit(0)")

# What reaches out

_probe("network", code="import socket; socket.create_connection(('127.0.0.1', HOST_PORT), 1).send(b'x')")
_probe("network outside", code="import socket; s = socket.socket(); s.settimeout(1); s.connect(('192.0.2.1', 53))")
_probe(
    "network interfaces",
    code="""
    names = [line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]]
    if names in (['lo'], []): raise OSError
""",
)
_probe("host's user list", code="open('/etc/passwd').read()")
_probe("host's file", code="open('HOST_FILE').read()")
_probe("host's file by a link", code="os.symlink('HOST_FILE', 'link'); open('link').read()")
_probe("host's file by the parent's root", code="open('/proc/1/root/HOST_FILE').read()")
_probe("keeper's memory", code="open('/proc/1/mem', 'rb').read(1)")
_probe("keeper's descriptors", code="os.listdir('/proc/1/fd')")
_probe("keeper's environment", code="open('/proc/1/environ').read()")
_probe(
    "environment of the host",
    code="""
    if not set(os.environ) - {'PATH', 'HOME', 'TMPDIR', 'LANG', 'PYTHONHASHSEED', 'PYTHONDONTWRITEBYTECODE',
                              'PYTHONIOENCODING', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE', 'PWD'}:
        raise OSError
""",
)
_probe("host's process", code="os.kill(HOST_PID, 0)")
_probe(
    "other processes",
    code="""
    if {int(n) for n in os.listdir('/proc') if n.isdigit()} <= {1, os.getpid()}: raise OSError
""",
)
_attack(
    "kills everything",
    "WA",
    """
    import os, signal
    for pid in (1, -1):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    print("WRONG")
""",
)
_probe("writes to the root", code="open('/x', 'w')")
_probe("writes to shared memory", code="open('/dev/shm/x', 'w')")
_probe("writes to the library", code="open(os.__file__, 'a')")
_probe("kernel settings", code="open('/proc/sys/kernel/core_pattern', 'w').write('|/x')")
_probe("own limits", code="import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))")
_probe("own oom score", code="open('/proc/self/oom_score_adj', 'w').write('-1000')")
_probe(
    "setuid programs",
    code="""
    found = [n for f in ('/usr/bin', '/bin', '/usr/lib/openssh') for r, _, ns in os.walk(f) for n in ns
             if os.path.exists(p := os.path.join(r, n)) and os.stat(p).st_mode & 0o4000 and not os.statvfs(p).f_flag & 2]
    if not found: raise OSError
""",
)
_probe("becomes root", code="os.setuid(0)")
_probe("unshare", code="if ctypes.CDLL(None).unshare(0x10000000): raise OSError")
_probe("mount", code="if ctypes.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, b''): raise OSError")
_probe("unmount", code="if ctypes.CDLL(None).umount2(b'/work', 2): raise OSError")
_probe("chroot", code="os.chroot('/work')")
_call("ptrace", 101, "ctypes.c_long(16)", "ctypes.c_long(1)", "ctypes.c_long(0)", "ctypes.c_long(0)")
_call("process_vm_readv", 310, "ctypes.c_long(1)", "ctypes.c_long(0)", "ctypes.c_long(0)", "ctypes.c_long(0)")
_call("keyctl", 250, "ctypes.c_long(0)", "ctypes.c_long(-3)", "ctypes.c_long(1)")
_call("bpf", 321, "ctypes.c_long(0)", "ctypes.c_long(0)", "ctypes.c_long(0)")
_call("perf_event_open", 298, "ctypes.c_long(0)", "ctypes.c_long(0)", "ctypes.c_long(-1)", "ctypes.c_long(-1)")
_call("io_uring", 425, "ctypes.c_long(8)", "ctypes.create_string_buffer(256)")
_call("clone into a new namespace", 56, "ctypes.c_long(0x10000011)", "ctypes.c_long(0)", "ctypes.c_long(0)")
_call("clone3", 435, "ctypes.create_string_buffer(88)", "ctypes.c_long(88)")
_call("shared memory of System V", 29, "ctypes.c_long(0)", "ctypes.c_long(1 << 30)", "ctypes.c_long(0o1666)")
_call("userfaultfd", 323, "ctypes.c_long(0)")

# What would rather be judged than solve

_attack("prints a verdict", "WA", "print('AC'); print('{\"found\": \"passed\"}'); print('{\"code\": 0}')")
_attack("exit before the answer", "WA", "import sys; sys.exit(0)")
_attack(
    "reads the tests",
    "WA",
    f"""
    import os
    for folder, _, names in os.walk("/"):
        for name in names:
            if name.endswith((".ans", ".out")) or name in ("answer", "tests.py", "input"):
                print("{LEAK}", folder, name)
    print("WRONG")
""",
)
_attack("leaves files for the next test", "WA", "open('main.pyc', 'w').write('x'); print('WRONG')")
_attack("compiler reads the host", "CE", '#include "/etc/passwd"\nint main() {}', language="cpp")
_attack("compiler reads without end", "CE", '#include "/dev/zero"\nint main() {}', language="cpp")
_attack(
    "templates without end",
    "CE",
    """
    template <int A, int B> struct X { static const int v = X<A - 1, B>::v + X<A - 1, B + 1>::v; };
    template <int B> struct X<0, B> { static const int v = B; };
    int main() { return X<800, 0>::v; }
""",
    language="cpp",
)
_attack("huge array in the binary", "CE", "int x[1 << 28] = {1};\nint main() { return x[5]; }", language="cpp")
_attack("exit(0) before the tests", "RE", "import os\nos._exit(0)", function=True)
_attack("SystemExit in the function", "RE WA", "import sys\ndef f(n): sys.exit(0)", function=True)
_attack(
    "overridden equality",
    "WA",
    """
    class Any(int):
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        __hash__ = int.__hash__
    def f(n): return Any(7)
""",
    function=True,
)
_attack(
    "an object that equals all",
    "WA",
    """
    class Any:
        def __eq__(self, other): return True
    def f(n): return Any()
""",
    function=True,
)
_attack(
    "patched builtins",
    "WA RE",
    """
    import builtins
    builtins.abs = builtins.all = builtins.isinstance = lambda *a: True
    builtins.AssertionError = Exception
    def f(n): return 0
""",
    function=True,
)
_attack(
    "tests by frames and garbage",
    "WA",
    """
    import gc, re, sys
    def seen():
        frame = sys._getframe()
        while frame:
            yield from frame.f_locals.values()
            yield from frame.f_globals.values()
            frame = frame.f_back
        yield from gc.get_objects()
        for name in ("tests.py", "/proc/self/cmdline", "/proc/self/fd/3"):
            try:
                yield open(name).read(0 if "fd" in name else -1)
            except OSError:
                pass
    def f(n):
        for o in seen():
            found = re.search(r"assert f.%d. == (.+)" % n, o) if isinstance(o, str) else None
            if found:
                return int(found[1])
        return 0
""",
    function=True,
)
_attack(
    "answers in the tests' place",
    "RE WA",
    """
    import os
    os.write(4, b'["loaded"]\\n' + b'["return", true, []]\\n' * 99)
    def f(n): return 0
""",
    function=True,
)
_attack(
    "calls back into the tests",
    "WA",
    """
    import os
    os.write(4, b'["loaded"]\\n["call", 0, [["str", "x"]], []]\\n["get", 0, "__globals__"]\\n')
    def f(n): return 0
""",
    function=True,
)
_attack(
    "endless answer",
    "WA",
    """
    import os
    def f(n):
        while True: os.write(4, b"x" * 65536)
""",
    function=True,
)
_attack(
    "deep answer",
    "WA RE",
    """
    def f(n):
        x = []
        for _ in range(100000): x = [x]
        return x
""",
    function=True,
)
_attack(
    "deep frame",
    "WA",
    """
    import os
    def f(n):
        os.write(4, b"[" * 200000 + b"\\n")
""",
    function=True,
)
_attack("answer that is long to list", "WA", "def f(n): return range(10 ** 18)", function=True)
_attack("never answers", "TLE", "import time\ndef f(n): time.sleep(1e6)", function=True)
_attack(
    "kills the examiner",
    "WA RE",
    "import os\ndef f(n):\n    try: os.kill(-1, 9)\n    except OSError: pass\n    return 0",
    function=True,
)
_attack("no function", "RE", "x = 1", function=True)
_attack("no program", "CE", "def f(n: return", function=True)
