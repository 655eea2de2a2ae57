# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
"""
The inside of the sandbox: what the fresh interpreter does that `sandbox.run_program` starts. Standard library only.

Four processes, of which only the last one ever sees the program run:

    supervisor    reads the job, keeps the time, kills everything, reports the verdict
    ├── judge     executes the checks; their calls of the program's functions go over a pipe
    └── keeper    first process of the new namespaces; sets them up, reaps, and takes everything along when it dies
        └── program

A message is a frame: four bytes of length, then JSON. Values cross as plain data, see `encode` and `decode`: whatever
the program sends, only numbers, text and containers of them can come out, so it can answer wrongly but not cheat.
"""

from __future__ import annotations

import builtins
import collections
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any


MAX_FRAME = 64 << 20
MAX_ITEMS = 1_000_000  # of an iterator that the program returns
MAX_REASON = 500
REPORT_LIMIT = 1 << 16
LINGER = 0.25  # seconds for threads and processes that are about to end
EXTRA_TASKS = 2  # the supervisor and the keeper count where the limit on processes is per user namespace

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_PRIVATE = 2, 4, 8, 1 << 18
MOUNT_ATTR_RDONLY, AT_FDCWD, AT_RECURSIVE = 1, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 36, 38
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446  # everywhere


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


def frame(message: Any) -> bytes:
    """`message` as bytes for a pipe."""
    data = json.dumps(message).encode()
    if len(data) > MAX_FRAME:
        raise ValueError(f"a message of {len(data)} bytes is more than the {MAX_FRAME} that can cross")
    return len(data).to_bytes(4, "big") + data


def send(descriptor: int, message: Any) -> None:
    data = memoryview(frame(message))
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """The next message, or `EOFError` if the other side is gone or sends none."""
    size = int.from_bytes(_read(descriptor, 4), "big")
    if size > MAX_FRAME:
        raise EOFError(f"a message of {size} bytes")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any) -> Any:
    """
    A value of plain data as JSON takes it, rebuilt by `decode`.

    Subclasses of the built-in types become these types (a `Counter` a `dict`, an `IntEnum` an `int`), iterators lose
    their laziness, scalars of numpy become numbers. So a comparison sees values and no methods of the program.

    Raises:
        `TypeError`: If there is something else in it.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__pos__(value)
        return number if -(1 << 63) <= number < 1 << 63 else {"int": hex(number)}
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for kind in _COLLECTIONS:
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in kind.__iter__(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
    if isinstance(value, range):
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    name = type(value).__name__
    if name in _VIEWS and type(value).__module__ == "builtins":
        return {name: [encode(item) for item in value]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    if type(value).__module__ in ("decimal", "fractions") and name in ("Decimal", "Fraction"):
        return {name: str(value)}
    if hasattr(type(value), "__next__"):
        items: list[Any] = []
        for item in value:
            if len(items) == MAX_ITEMS:
                raise TypeError(f"an iterator of more than {MAX_ITEMS} items")
            items.append(encode(item))
        return {"iterator": items}
    raise TypeError(f"a value of type {name}, which is not plain data that the checks can compare")


_COLLECTIONS: tuple[Any, ...] = (set, frozenset, collections.deque)
_VIEWS = ("dict_keys", "dict_values", "dict_items")


def decode(data: Any) -> Any:
    """The value that `encode` made `data` of; `ValueError` or `TypeError` if it made it of none."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("not an encoded value")
    ((kind, content),) = data.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind == "Decimal":
        import decimal

        return decimal.Decimal(content)
    if kind == "Fraction":
        import fractions

        return fractions.Fraction(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    items = [decode(item) for item in content]
    if kind == "iterator":
        return iter(items)
    if kind == "dict_keys":
        return dict.fromkeys(items).keys()
    if kind == "dict_values":
        return dict(enumerate(items)).values()
    if kind == "dict_items":
        return dict(items).items()
    if kind == "range":
        return range(*items)
    if kind in ("tuple", "set", "frozenset"):
        return getattr(builtins, kind)(items)
    if kind == "deque":
        return collections.deque(items)
    raise ValueError(f"not an encoded value: {kind}")


def describe(error: BaseException) -> str:
    """An exception in a line."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:MAX_REASON] if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


# Audit events of changes to the file system, with the positions of the paths and of their folders' descriptors.
FILE_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, None),),
}
SIGNAL_EVENTS = ("os.kill", "os.killpg", "signal.pthread_kill")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def forbid_harm(folder: str, replies: int) -> None:
    """
    Ends the program at once if it tries to signal a process or to change a file outside of `folder`, even where the
    system would stop it and the program would carry on. This is for the verdict; it is the kernel that protects.
    """
    folder = os.path.realpath(folder)

    def hook(event: str, args: tuple) -> None:
        if event in SIGNAL_EVENTS:
            give_up(f"tried to send a signal ({event})")
        places = FILE_EVENTS.get(event)
        if places is None or (event == "open" and not (args[2] or 0) & WRITING):
            return
        for at, folder_at in places:
            path = resolve(args[at], -1 if folder_at is None or folder_at >= len(args) else args[folder_at])
            if path is not None and path != os.devnull and os.path.commonpath((path, folder)) != folder:
                give_up(f"tried to change a file outside of its folder ({event} {path})")

    def resolve(path: Any, descriptor: Any) -> str | None:
        try:
            base = f"/proc/self/fd/{descriptor}" if isinstance(descriptor, int) and descriptor >= 0 else "."
            return os.path.realpath(os.path.join(base, os.fsdecode(path)))
        except (TypeError, ValueError, OSError):  # a descriptor, or no path
            return None

    def give_up(reason: str) -> None:
        try:
            send(replies, {"raised": ["", f"the program {reason}"[:MAX_REASON]], "end": True})
        finally:
            os._exit(1)

    sys.addaudithook(hook)


def run_program(source: str, requests: int, replies: int) -> None:
    """Executes the program, then answers calls of its functions until the judge is content."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        send(replies, {"raised": _raised(error)})
        return
    send(replies, {"value": None})
    while True:
        try:
            call = receive(requests)
        except EOFError:
            return
        send(replies, _answer(module, call))


def _answer(module: types.ModuleType, call: dict) -> dict:
    try:
        function = getattr(module, call["name"], None)
        if not callable(function):
            raise NameError(f"the program defines no function {call['name']!r}")
        args, kwargs = decode(call["args"]), decode(call["kwargs"])
        reply = {"value": encode(function(*args, **kwargs))}
    except BaseException as error:
        return {"raised": _raised(error)}
    try:
        after = encode(args)
        if after != call["args"]:
            reply["args"] = after  # arguments that were changed in place
    except BaseException:
        pass
    return reply


def _raised(error: BaseException) -> list[str]:
    kind = next((cls.__name__ for cls in type(error).__mro__ if getattr(builtins, cls.__name__, None) is cls), "")
    return [kind, describe(error)]


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------


class ProgramEnded(BaseException):
    """The program is gone before the checks were done with it."""


class ProgramRaised(BaseException):
    """The program raised an exception while it was loaded, or did what it must not."""


def judge(tests: dict, requests: int, replies: int) -> dict:
    """
    Executes the checks against the program at the other end of the pipes.

    Returns:
        `dict`: `status`, `"passed"` or `"failed"`, and `reason`.
    """
    names: dict[str, object] = {"__name__": "checks"}
    try:
        checks = compile(tests["checks"], "<checks>", "exec")
    except (SyntaxError, ValueError) as error:
        return {"status": "failed", "reason": f"the checks cannot be compiled: {describe(error)}"}
    if "random" in tests["checks"]:
        import random

        random.seed(0)
    try:
        _ask(None, requests, replies)
        try:
            exec(compile(tests["context"], "<context>", "exec"), names)
        except SyntaxError:  # the beginning of a program, that is not complete without the rest
            names = {"__name__": "checks"}
        for name in {*tests["entry_points"], *_unknown_names(checks, names)}:
            names[name] = _stand_in(name, requests, replies)
        exec(checks, names)
    except ProgramEnded:
        return {"status": "failed", "reason": "", "ended": True}
    except ProgramRaised as error:
        return {"status": "failed", "reason": str(error)}
    except BaseException as error:
        return {"status": "failed", "reason": _explain(error, tests["checks"])[:MAX_REASON]}
    return {"status": "passed", "reason": ""}


def _ask(message: dict | None, requests: int, replies: int) -> dict:
    try:
        if message is not None:
            send(requests, message)
        reply = receive(replies)
        if not isinstance(reply, dict):
            raise EOFError
    except (EOFError, OSError, ValueError, RecursionError) as error:
        raise ProgramEnded from error
    if "raised" in reply and (message is None or "end" in reply):
        raise ProgramRaised(str(reply["raised"][1]))
    return reply


def _stand_in(name: str, requests: int, replies: int):
    def call(*args, **kwargs):
        message = {"name": name, "args": encode(args), "kwargs": encode(kwargs)}
        reply = _ask(message, requests, replies)
        if "raised" in reply:
            kind, text = reply["raised"]
            cls = getattr(builtins, str(kind), None)
            if not (isinstance(cls, type) and issubclass(cls, BaseException)):
                cls = RuntimeError
            try:
                error = cls(text)
            except TypeError:  # those of Unicode want more
                error = RuntimeError(text)
            error.of_program = True  # type: ignore[attr-defined]
            raise error
        try:
            for argument, after in zip(args, decode(reply.get("args", encode(())))):
                _update(argument, after)
            return decode(reply["value"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProgramEnded from error

    call.__name__ = call.__qualname__ = name
    return call


def _update(argument: Any, after: Any) -> None:
    """Repeats in the judge what the program did to an argument in place."""
    if isinstance(argument, (list, bytearray)):
        argument[:] = after
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(after)


def _unknown_names(code: types.CodeType, names: dict) -> set[str]:
    """Names in the code that nothing defines so far; those of attributes and of the code's own functions too."""
    unknown = {name for name in code.co_names if name not in names and not hasattr(builtins, name)}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            unknown |= _unknown_names(constant, names)
    return unknown


def _explain(error: BaseException, checks: str) -> str:
    """What went wrong, with the line of the checks where it did."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<checks>":
            line = step.tb_lineno
        step = step.tb_next
    what = str(error) if getattr(error, "of_program", False) else describe(error)
    lines = checks.splitlines()
    return f"{what} at `{lines[line - 1].strip()}`" if 0 < line <= len(lines) else what


# ---------------------------------------------------------------------------------------------------------------------
# Isolation
# ---------------------------------------------------------------------------------------------------------------------


_libc = ctypes.CDLL(None, use_errno=True)


def _system(function, *args) -> int:
    result = function(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _prctl(option: int, value: int) -> None:
    _system(_libc.prctl, option, value, 0, 0, 0)


def enter_namespaces() -> tuple[bool, bool]:
    """
    Puts the children of this process into namespaces of their own.

    Returns:
        `tuple[bool, bool]`: Whether there are any, and whether they needed a user namespace.
    """
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    with suppress(OSError):
        _system(_libc.unshare, flags)  # for root
        return True, False

    def enter() -> None:
        user, group = os.geteuid(), os.getegid()
        _system(_libc.unshare, flags | CLONE_NEWUSER)
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
        _system(_libc.unshare, CLONE_NEWNS)
        _system(_libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, private, 32)
        with suppress(OSError):  # a container may hide parts of /proc; others are then seen, but out of reach
            _system(_libc.mount, b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
        _system(_libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, 32)
        options = f"size={size},nr_inodes=1024,mode=0700,uid={user},gid={group}"
        _system(_libc.mount, b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())
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
    version = _libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return 0
    # all rights that change files: write 1, remove 4 and 5, make 6 to 12, refer 13, truncate 14
    writing = 1 << 1 | sum(1 << bit for bit in range(4, 13 + (version >= 2) + (version >= 3)))
    rules = (ctypes.c_uint64 * 3)(writing, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    try:
        ruleset = _system(_libc.syscall, SYS_LANDLOCK_CREATE, rules, size, 0)
        for path, rights in ((folder, writing), ("/dev/null", writing & (1 << 1 | 1 << 14))):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
            _system(_libc.syscall, SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
            os.close(descriptor)
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _system(_libc.syscall, SYS_LANDLOCK_RESTRICT, ruleset, 0)
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
        _prctl(PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0)  # effective, permitted, inheritable; low and high
    _system(_libc.capset, header, sets)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


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


def tasks_of(user: int) -> int:
    """Threads of all processes of a user, which share one limit on their number."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:
            pass
    return count


# ---------------------------------------------------------------------------------------------------------------------
# The supervisor
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs one job: a frame with the program and its limits, then one with the checks, from standard input."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    job = receive(0)
    if os.getppid() != job["parent"]:
        os._exit(1)  # the caller has died before it could take this process along
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    sys.path += job["site"]
    requests, ask = os.pipe()
    replies, answer = os.pipe()
    report, tell = os.pipe()
    output = os.memfd_create("output")  # of limited size, as are all files of the program
    fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)
    judging = os.fork()
    if judging == 0:
        _in_child(_be_judge, job, ask, replies, tell)
    namespaces, by_user_namespace = enter_namespaces() if job["namespaces"] else (False, False)
    _prctl(PR_SET_DUMPABLE, 0)  # so that nobody with the same user id looks inside or traces
    ready, say_ready = os.pipe()
    keeping = os.fork()
    if keeping == 0:
        _in_child(_be_keeper, job, namespaces, by_user_namespace, requests, answer, say_ready, output)
    for descriptor in (requests, ask, replies, answer, tell, say_ready):
        os.close(descriptor)
    try:
        missing, files_limited, processes_limited = receive(ready)
    except EOFError:
        kill_all(judging, keeping)
        sys.exit("the sandbox could not be set up")
    start = time.monotonic()
    result: dict[str, Any] = {"status": "timed out", "reason": f"no verdict within {job['timeout']:g} s"}

    def excess() -> str:
        if not files_limited and _size(job["folder"]) > job["file_limit"]:
            return f"the program wrote more than {job['file_limit']} bytes to files"
        if not processes_limited and len(descendants(keeping)) > job["max_processes"]:
            return f"the program started more than {job['max_processes']} processes"
        return ""

    watch = None if files_limited and processes_limited else excess
    try:
        data = _read_until(report, start + job["timeout"], watch)
    except OverflowError as error:
        data = None
        result = {"status": "failed", "reason": str(error)}
    seconds = time.monotonic() - start
    if data is not None:
        try:
            result = json.loads(data)
        except ValueError:
            result = {"status": "failed", "reason": "the checks ended without a verdict (out of memory or CPU time?)"}
    if result["status"] == "passed" and (left := what_is_left(keeping, ready)):
        result = {"status": "failed", "reason": f"the program left {left} running"}
    if result["status"] == "passed" and os.fstat(output).st_size >= job["file_limit"]:
        result = {"status": "failed", "reason": f"the program printed {job['file_limit']} bytes or more"}
    if result.pop("ended", False):
        result.update(_how_it_ended(ready, job))
    kill_all(judging, keeping)
    result.update(seconds=seconds, missing=missing)
    os.write(1, json.dumps(result).encode())
    os._exit(0)


def _in_child(function, *args) -> None:
    """Runs `function` in a forked process, which ends with it."""
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        function(*args)
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{function.__name__}: {describe(error)}\n".encode())
    finally:
        os._exit(1)


def _only(*descriptors: int) -> None:
    """Closes all other descriptors; standard input, output and errors, if not given, lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in {0, 1, 2} - {*descriptors}:
        os.dup2(nowhere, standard)
    low = 3
    for descriptor in sorted({*descriptors} - {0, 1, 2}):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 1 << 16)


def _be_judge(job: dict, ask: int, replies: int, tell: int) -> None:
    _prctl(PR_SET_DUMPABLE, 0)
    tests = receive(0)
    _only(ask, replies, tell)
    os.setsid()
    set_limits(job, None)
    verdict = judge(tests, ask, replies)
    os.write(tell, json.dumps(verdict).encode())
    os.close(tell)
    signal.pause()  # the program would end with the pipes; the supervisor looks first at what it has left running


def _be_keeper(
    job: dict, namespaces: bool, by_user_namespace: bool, requests: int, answer: int, say_ready: int, output: int
) -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what leaves the program's session stays below the keeper
    _only(2, requests, answer, say_ready, output)
    missing = []
    user = None if by_user_namespace else other_user()
    owner = os.geteuid() if user is None else user
    files = namespaces and mount_own_files(job["folder"], job["file_limit"], owner, owner)
    if not files and user is not None:
        os.chown(job["folder"], user, user)
    processes = job["max_processes"] + (EXTRA_TASKS if by_user_namespace else 0)
    if not by_user_namespace:
        processes += tasks_of(owner)  # which share the limit
    reading, writing = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(reading)
        _in_child(_be_program, job, user, processes, requests, answer, writing, output)
    os.close(writing)
    os.close(requests)
    os.close(answer)
    landlock = receive(reading)
    if not namespaces:
        missing.append("no process and network namespaces")
        if landlock < 4:
            missing.append("the network stays open")
        if landlock < 6 and user is None:
            missing.append("signals to other processes of the user are not stopped")
    if not files and landlock < 3:
        missing.append("files are protected by their permissions only")
    if owner == 0:
        missing.append("the system does not limit the number of processes for root, it is only watched")
    send(say_ready, (missing, files, owner != 0))
    child = 0
    while child != program:
        child, status = os.wait()
    send(say_ready, status)
    send(say_ready, not _all_end())
    os._exit(0)


def _all_end() -> bool:
    """Whether this process soon has no children left."""
    deadline = time.monotonic() + LINGER
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
        except ChildProcessError:
            return True
    return False


def _be_program(
    job: dict, user: int | None, processes: int, requests: int, answer: int, writing: int, output: int
) -> None:
    os.setsid()
    set_limits(job, processes)
    landlock = restrict_with_landlock(job["folder"])
    drop_privileges(user)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # forgotten when the user changed
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    send(writing, landlock)
    source, folder = job["program"], job["folder"]
    job.clear()
    os.dup2(output, 1)
    os.dup2(output, 2)
    _only(1, 2, requests, answer)
    forbid_harm(folder, answer)
    run_program(source, requests, answer)
    os._exit(0)


def _read_until(descriptor: int, deadline: float, watch: Callable[[], str] | None) -> bytes | None:
    """
    All that comes until the other side closes, or `None` if that is not before the deadline. `watch` looks after what
    the system does not limit; `OverflowError` with what it says.
    """
    data = b""
    while (rest := deadline - time.monotonic()) > 0:
        if watch is not None and (excess := watch()):
            raise OverflowError(excess)
        if not select.select([descriptor], [], [], rest if watch is None else min(rest, 0.05))[0]:
            continue
        part = os.read(descriptor, REPORT_LIMIT)
        if not part:
            return data
        data += part
    return None


def _size(folder: str) -> int:
    """Bytes below a folder, at least one block for each file."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += max(os.lstat(os.path.join(root, name)).st_size, 4096)
    return total


def _how_it_ended(ready: int, job: dict) -> dict:
    """Says how a program has died that did so before the checks were done."""
    status = None
    if select.select([ready], [], [], LINGER)[0]:
        with suppress(EOFError):
            status = receive(ready)
    if not isinstance(status, int):
        return {"reason": "the program broke off the checks"}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return {"status": "timed out", "reason": f"killed by {signal.Signals(number).name}, a limit on CPU time"}
        return {"reason": f"the program was ended by {signal.Signals(number).name} before the checks were done"}
    return {"reason": f"the program ended with exit status {os.WEXITSTATUS(status)} before the checks were done"}


def processes() -> dict[int, tuple[int, str]]:
    """Parent and state of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
                found[int(name)] = (int(parent), state.decode())
            except OSError:
                pass
    return found


def descendants(of: int) -> list[int]:
    """The living processes below a process."""
    found, everything = {of}, processes()
    grown = True
    while grown:
        new = {pid for pid, (parent, _) in everything.items() if parent in found} - found
        found |= new
        grown = bool(new)
    return [pid for pid in found - {of} if everything[pid][1] not in "ZX"]


def what_is_left(keeping: int, ready: int) -> str:
    """
    Ends a program that has passed its checks. Threads and processes that it should have ended, in words, or nothing.

    Once the program is dead, the keeper is the parent of all that it has started and left, so it knows for sure.
    """
    deadline = time.monotonic() + LINGER
    while True:
        children = [pid for pid, (parent, state) in processes().items() if parent == keeping and state not in "ZX"]
        threads = 0
        for pid in children:
            with suppress(OSError):
                threads += len(os.listdir(f"/proc/{pid}/task")) - 1
        if len(children) <= 1 and not threads:
            break
        if time.monotonic() > deadline:
            return f"{threads} threads" if threads else f"{len(children) - 1} processes"
        time.sleep(0.01)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    try:
        receive(ready)  # how it ended
        return "processes" if receive(ready) else ""
    except EOFError:
        return "a killed keeper and perhaps processes"


def kill_all(judging: int, keeping: int) -> None:
    """Kills and reaps everything below the supervisor; with namespaces, the keeper takes its own along."""
    for pid in (keeping, judging):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                alive = descendants(os.getpid())
                for deadly in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none slips away by forking
                    for pid in alive:
                        with suppress(ProcessLookupError):
                            os.kill(pid, deadly)
                time.sleep(0.002)
        except ChildProcessError:
            return
