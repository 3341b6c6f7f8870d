"""Calls to the kernel that a sandbox refuses, as a filter program (classic BPF, seccomp(2)).

Refused with EPERM: what makes or enters namespaces, mounts, traces others or reads their memory, loads code into the
kernel, keeps memory that no limit of ours counts (shared memory and queues of System V and POSIX, memfd), and sockets
other than pairs. clone3 is refused as if the kernel had none, because a filter can't see its flags; then clone is used,
whose flags it sees. Numbers are of x86-64; on other machines there is no filter, and the rest of the sandbox stands.
"""

from __future__ import annotations

import errno
import platform
import struct

REFUSED = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "swapon": 167, "swapoff": 168, "quotactl": 179, "quotactl_fd": 443, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "fanotify_init": 300, "fanotify_mark": 301, "acct": 163, "syslog": 103, "reboot": 169,
    "init_module": 175, "delete_module": 176, "finit_module": 313, "kexec_load": 246, "kexec_file_load": 320,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "lookup_dcookie": 212,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "add_key": 248, "request_key": 249, "keyctl": 250, "personality": 135, "modify_ldt": 154, "iopl": 172,
    "ioperm": 173,
    "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305, "sethostname": 170,
    "setdomainname": 171,
    "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447,
    "socket": 41,
}  # fmt: skip
"""Number by name; x86-64."""

MACHINES = ("x86_64",)

_CLONE, _CLONE3 = 56, 435
_NEW_NAMESPACE = 0x7E020000
"""CLONE_NEW* flags of clone: cgroup, uts, ipc, user, pid, net, mount. Time is for unshare and clone3 only."""
_ARCH_X86_64, _X32 = 0xC000003E, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _FLAGS_AT = 0, 4, 16
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def supported() -> bool:
    """Whether there is a filter for this machine."""
    return platform.machine() in MACHINES


def program() -> bytes:
    """The filter, for `bwrap --seccomp`: instructions of eight bytes."""
    refuse, missing = _ERROR | errno.EPERM, _ERROR | errno.ENOSYS
    head = [
        (_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, _ARCH_X86_64), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, refuse),
        (_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, missing),
        (_EQUAL, 0, 4, _CLONE), (_LOAD, 0, 0, _FLAGS_AT), (_ANY_BIT, 0, 1, _NEW_NAMESPACE), (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    calls = [step for number in sorted(REFUSED.values()) for step in ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse))]
    return b"".join(struct.pack("=HBBI", *step) for step in (*head, *calls, (_RETURN, 0, 0, _ALLOW)))
