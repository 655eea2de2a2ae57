"""
The walls around the program: namespaces, a file system of its own, Landlock, privileges and limits.

Each is built by the process that it is to hold, as far as the system has it; the keeper says what is missing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress

from .linux import PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, checked, libc, prctl


CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_PRIVATE = 2, 4, 8, 1 << 18
MOUNT_ATTR_RDONLY, AT_FDCWD, AT_RECURSIVE = 1, -100, 0x8000
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446  # everywhere


def enter_namespaces() -> tuple[bool, bool]:
    """
    Puts the children of this process into namespaces of their own.

    Returns:
        `tuple[bool, bool]`: Whether there are any, and whether they needed a user namespace.
    """
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    with suppress(OSError):
        checked(libc.unshare, flags)  # for root
        return True, False

    def enter() -> None:
        user, group = os.geteuid(), os.getegid()
        checked(libc.unshare, flags | CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    trial = os.fork()  # there is no way back from a namespace that then may not be used
    if trial == 0:
        try:
            enter()
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(trial, 0)[1] != 0:
        return False, False
    enter()
    return True, True


def other_user() -> int | None:
    """A user id for a program that root runs, one without files and other processes if there is such a one."""
    needed = 1 << 6 | 1 << 7  # CAP_SETGID, CAP_SETUID
    with open("/proc/self/status") as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    if os.geteuid() != 0 or held & needed != needed:
        return None
    for user in ((1 << 30) + int.from_bytes(os.urandom(3), "big"), 65534):
        if _mapped(user, "uid_map") and _mapped(user, "gid_map"):
            return user
    return None


def _mapped(number: int, name: str) -> bool:
    """Whether a user or group id exists in the user namespace of this process."""
    with open(f"/proc/self/{name}") as file:
        ranges = [[int(part) for part in line.split()] for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def mount_own_files(folder: str, size: int, user: int, group: int) -> bool:
    """In a mount namespace: an empty file system of limited size at `folder`, everything else read-only, and a /proc of these namespaces."""
    # struct mount_attr: what to set, what to clear, propagation, user namespace
    private = (ctypes.c_uint64 * 4)(0, 0, MS_PRIVATE, 0)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    try:
        checked(libc.unshare, CLONE_NEWNS)
        checked(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, private, 32)
        with suppress(OSError):  # a container may hide parts of /proc; others are then seen, but out of reach
            checked(libc.mount, b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
        checked(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, 32)
        options = f"size={size},nr_inodes=1024,mode=0700,uid={user},gid={group}"
        checked(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())
    except OSError:
        return False
    os.chdir(folder)
    return True


def restrict_with_landlock(folder: str) -> int:
    """
    Forbids for good to write outside of `folder`, to use TCP, and to signal processes outside of this one's children.

    Returns:
        `int`: Version of Landlock (TCP from 4 on, signals from 6 on), `0` if there is none.
    """
    version = libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return 0
    # all rights that change files: write 1, remove 4 and 5, make 6 to 12, refer 13, truncate 14
    writing = 1 << 1 | sum(1 << bit for bit in range(4, 13 + (version >= 2) + (version >= 3)))
    rules = (ctypes.c_uint64 * 3)(writing, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    try:
        ruleset = checked(libc.syscall, SYS_LANDLOCK_CREATE, rules, size, 0)
        for path, rights in ((folder, writing), ("/dev/null", writing & (1 << 1 | 1 << 14))):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
            checked(libc.syscall, SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
            os.close(descriptor)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        checked(libc.syscall, SYS_LANDLOCK_RESTRICT, ruleset, 0)
        os.close(ruleset)
    except OSError:
        return 0
    return version


def drop_privileges(user: int | None) -> None:
    """
    Gives up every capability, and root itself for `user` if there is one. Reading is kept where else the interpreter's
    own library could not be read, such as one in the home folder of root.
    """
    keep = 0
    if user is not None:
        if not all(_readable_by_all(path) for path in [os.__file__, *sys.path] if os.path.exists(path)):
            keep = CAP_DAC_READ_SEARCH
        prctl(PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0)  # effective, permitted, inheritable; low and high
    checked(libc.capset, header, sets)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _readable_by_all(path: str) -> bool:
    if not os.stat(path).st_mode & 0o004:
        return False
    while (path := os.path.dirname(path)) not in ("/", ""):
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def set_limits(job: dict, processes: int | None) -> None:
    """Resource limits of this process and all that it starts."""
    cpu = int(job["timeout"]) + 1
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, job["memory_limit"]),
        (resource.RLIMIT_FSIZE, job["file_limit"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, processes),
    ):
        if value is None:
            continue
        hard = resource.getrlimit(limit)[1]
        value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(limit, (value, value))
