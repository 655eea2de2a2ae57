"""
Runs a generated program once inside the walls of bubblewrap (`bwrap`) and returns whether it passes its checks.

It is off until the user opts in: `HF_ALLOW_CODE_EVAL=1`, or `allow_code_execution=True`.

- **Two processes.** The judge holds the checks and calls the program's functions in another process. Only plain data
  comes back (numbers, text, lists, dictionaries and the like). The program can change everything in its own
  interpreter, but the kernel keeps it from reading or tracing the judge.
- **Walls.** Both have their own namespaces (processes, network, IPC, mounts), no capabilities, no environment of the
  caller and a seccomp filter (`FORBIDDEN`). They can read `/proc`, `/dev` and what `_bwrap_command` lists (interpreter,
  installed packages, the system's programs and libraries). They can write to `/tmp` and `/dev/shm`, which are limited
  in size and vanish afterwards. If the caller is root, they run with an unused user id.
- **Limits.** At the deadline the caller kills everything behind the walls. CPU time, address space and file size are
  limited per process. Processes and threads are limited in number.
- **Verdict.** A program with right answers still fails if it leaves threads or processes running, prints `file_limit`
  bytes, or openly tries to signal other processes, use the network or change files elsewhere.

Not covered:

- Errors of the kernel, of `bwrap` and of the interpreter.
- The total memory of a program's processes (up to `max_processes` times `memory_limit`), and memory that the kernel
  uses for them (pipes, sockets, the names of many files). It is free again after the deadline.
- Programs without `checks`: they pass if they claim to have ended normally.
- The checks themselves, which are trusted. They see copies: functions and objects without a value cannot be sent.

`unsafe=True` runs the same two processes without walls, on Linux and macOS. Only time and memory are limited: files,
other processes and the network are not protected, and a program can cheat, survive and do harm.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO


logger = logging.getLogger(__name__)

CODE_EVAL_VARIABLE = "HF_ALLOW_CODE_EVAL"
START_LIMIT = 60.0  # seconds for the start of the interpreter
FOLDER = "/tmp/program"  # working directory behind the walls
RUNNER = Path(__file__).with_name("runner.py")

# System calls that the walls would leave open: memory without a limit, keys of the caller, tracing, new namespaces,
# and parts of the kernel that had many errors.
FORBIDDEN = (
    "memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "semget", "semop", "semctl", "msgget", "msgsnd",
    "keyctl", "add_key", "request_key", "ptrace", "pidfd_getfd", "process_vm_readv", "process_vm_writev", "unshare",
    "setns", "clone3", "io_uring_setup", "userfaultfd", "bpf", "perf_event_open", "syslog",
)  # fmt: skip
CLONE_NEWUSER, AF_NETLINK = 0x10000000, 16

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same verdict every time
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a thread that pandas would leave running
}
TRIAL = f"""
import os
with open({os.__file__!r}): pass
try:
    for started in range(9):
        if os.fork() == 0: os._exit(0)
except BlockingIOError: pass
assert started == 3, f"with a limit of 4 processes {{started + 1}} could run; root has to be outside of user namespaces"
"""
REMEDY = (
    "It needs bubblewrap 0.7 or newer (`apt install bubblewrap`), libseccomp (`apt install libseccomp2`) and pyseccomp "
    '(`pip install "hf_phibalance[recipes]"`). An ordinary user also needs user namespaces (`sysctl '
    "kernel.unprivileged_userns_clone=1`, on Ubuntu `sysctl kernel.apparmor_restrict_unprivileged_userns=0`). A Docker "
    "container needs `--cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined`. If root "
    "calls, all users have to be able to read the interpreter's files (`chmod -R o+rX`). "
    "unsafe=True runs generated code without any protection."
)


class CodeExecutionError(RuntimeError):
    """Generated code was not run, because nobody allowed it or because it cannot be run here."""


@dataclass(frozen=True)
class Verdict:
    """
    Whether a program passed its checks.

    Args:
        status (`str`): `"passed"`, `"failed"` or `"timed out"`.
        reason (`str`): Why it did not pass, in a printable line of at most 200 characters; empty if it did.
        seconds (`float`): Wall-clock time from the start of the program.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """`True` if every check was made and held."""
        return self.status == "passed"

    def to_dict(self) -> dict[str, Any]:
        """Returns the verdict as JSON values, including `passed`."""
        return {"passed": self.passed, **asdict(self)}


def require_sandbox(allow_code_execution: bool | None = None, unsafe: bool = False) -> None:
    """
    Checks that generated code may be run and can be run here. Call it before anything expensive.

    Args:
        allow_code_execution (`bool`, *optional*):
            Permission to run generated code. The default is `HF_ALLOW_CODE_EVAL=1` in the environment.
        unsafe (`bool`, *optional*, defaults to `False`):
            Whether to run it without walls, which logs a warning.

    Raises:
        `CodeExecutionError`: If it is not allowed, or if `bwrap` is missing or does not work here.
    """
    if allow_code_execution is None:
        allow_code_execution = os.environ.get(CODE_EVAL_VARIABLE) == "1"
    if not allow_code_execution:
        raise CodeExecutionError(
            "Scoring this runs code that a model has written. It runs in a sandbox; hf_phibalance.evaluation.sandbox "
            f"says what that does not cover. If you want it, set the environment variable {CODE_EVAL_VARIABLE}=1 or "
            "pass allow_code_execution=True."
        )
    system = {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
    if system == "Windows":
        raise CodeExecutionError("Generated code is not run on Windows. Use the Windows Subsystem for Linux (WSL).")
    if unsafe:
        _warn_of_no_sandbox()
    elif system != "linux":
        raise CodeExecutionError(
            f"Generated code is run in bubblewrap, which {system} does not have. Use Linux, a container or a virtual "
            "machine, or unsafe=True, which runs it without any protection."
        )
    else:
        _try_sandbox()


def run_program(
    program: str,
    checks: str = "",
    *,
    context: str = "",
    entry_points: Sequence[str] = (),
    timeout: float = 3.0,
    memory_limit: int = 1 << 30,
    max_processes: int = 8,
    file_limit: int = 16 << 20,
    allow_code_execution: bool | None = None,
    unsafe: bool = False,
) -> Verdict:
    """
    Runs a program in a fresh interpreter, and checks of its functions in another one.

    Args:
        program (`str`):
            Python source, not trusted.
        checks (`str`, *optional*, defaults to `""`):
            Trusted Python source that calls functions of the program and raises if something is wrong. A name that is
            not defined in the checks, in `context` or as a built-in means the program's function of that name. Without
            checks, a program passes if it ends without an exception.
        context (`str`, *optional*, defaults to `""`):
            Trusted Python source that runs before the checks, in the same process: their imports and helper functions.
            Ignored if it is not complete Python.
        entry_points (`Sequence[str]`, *optional*, defaults to `()`):
            Names that mean the program's functions even if `context` defines them.
        timeout (`float`, *optional*, defaults to `3.0`):
            Seconds of wall-clock time for the program and its checks, not counting the start of the interpreters.
        memory_limit (`int`, *optional*, defaults to 1 GiB):
            Bytes of address space of each process.
        max_processes (`int`, *optional*, defaults to `8`):
            Processes and threads that the program may have at a time.
        file_limit (`int`, *optional*, defaults to 16 MiB):
            Bytes that the program may print, may have in `/tmp`, and may have in `/dev/shm`.
        allow_code_execution (`bool`, *optional*):
            Permission to run the program. The default is `HF_ALLOW_CODE_EVAL=1` in the environment.
        unsafe (`bool`, *optional*, defaults to `False`):
            Whether to run it without walls. `max_processes` then has no effect, and `file_limit` limits single files.

    Returns:
        [`Verdict`]: Passed only if the last check was reached, all of them held, and nothing is left running.

    Raises:
        `CodeExecutionError`: If running code is not allowed, or not possible on this system.
        `ValueError`: If a limit is not positive.
    """
    limits = {
        "timeout": timeout,
        "memory_limit": memory_limit,
        "max_processes": max_processes,
        "file_limit": file_limit,
    }
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r}: a limit has to be positive.")
    require_sandbox(allow_code_execution, unsafe)
    tests = {"checks": checks, "context": context, "entry_points": [*entry_points]}
    return _run(program, tests, limits, unsafe)


def _run(program: str, tests: dict, limits: dict, unsafe: bool) -> Verdict:
    """Starts the interpreter, waits for the verdict or the deadline, and kills everything."""
    user = None if unsafe else _unused_user()
    folder = os.path.realpath(tempfile.mkdtemp(prefix="hf_phibalance_")) if unsafe else FOLDER
    settings = {**limits, "folder": folder, "walls": not unsafe, "user": user, "packages": _packages()}
    command = [os.path.realpath(sys.executable), "-SsB", "-c", RUNNER.read_text(), json.dumps(settings)]
    with ExitStack() as stack:
        job, rules, output = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        job.write(json.dumps({"program": program, **tests}).encode())
        job.seek(0)
        if unsafe:  # shutil.rmtree cannot remove a thousand levels
            stack.callback(subprocess.run, ["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', folder], stderr=output)
        else:
            rules.write(_seccomp())
            rules.seek(0)
            command = [*_bwrap_command(limits["file_limit"], user), "--seccomp", str(rules.fileno()), *command]
        process = subprocess.Popen(
            command,
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=output,
            pass_fds=[rules.fileno()],
            env={**ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        stack.callback(_kill, process)
        report: Any = process.stdout
        stack.callback(report.close)
        if not _read(report, 1, START_LIMIT):
            output.seek(max(0, os.fstat(output.fileno()).st_size - 1000))
            raise CodeExecutionError(f"The interpreter does not start: {output.read().decode(errors='replace')}")
        start = time.monotonic()
        data = _read(report, 1 << 16, limits["timeout"])
        seconds = round(time.monotonic() - start, 3)
    if data is None:
        return Verdict("timed out", f"no verdict within {limits['timeout']:g} s", seconds)
    reason = json.loads(data) if data else "the checks ended without a verdict (killed, or out of memory or CPU time?)"
    # one printable line
    reason = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(reason.split()))[:200]
    return Verdict("failed" if reason else "passed", reason, seconds)


def _read(pipe: BinaryIO, size: int, seconds: float) -> bytes | None:
    """Returns up to `size` bytes of a pipe, no bytes at its end, or `None` if nothing came within `seconds`."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return os.read(pipe.fileno(), size) if poll.poll(math.ceil(seconds * 1000)) else None


def _kill(process: subprocess.Popen) -> None:
    """Kills the process group. Behind walls everything dies with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@lru_cache
def _try_sandbox() -> None:
    """Runs a harmless program. Raises `CodeExecutionError` if it does not run, or its limits do not hold."""
    limits = {"timeout": START_LIMIT, "memory_limit": 1 << 30, "max_processes": 4, "file_limit": 1 << 20}
    try:
        problem = _run(TRIAL, {"checks": "", "context": "", "entry_points": []}, limits, unsafe=False).reason
    except (OSError, ImportError, RuntimeError) as error:
        problem = str(error)
    if problem:
        raise CodeExecutionError(f"Generated code is not run, because bubblewrap does not work: {problem}\n{REMEDY}")


@lru_cache
def _warn_of_no_sandbox() -> None:
    logger.warning(
        "UNSAFE: generated code runs as your own user without a sandbox. It can read, change and delete your files, use "
        "the network, and stay behind. Only its time and its memory are limited."
    )


def _bwrap_command(size: float, user: int | None) -> list[str]:
    """Returns the `bwrap` command, without the seccomp filter and the command to run."""
    if not (bwrap := shutil.which("bwrap")):
        raise CodeExecutionError("there is no `bwrap` on the PATH")
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
    if user is None:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    else:  # needed to take on that user id; lost with root
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for folder in ("/tmp", "/dev/shm"):
        command += ["--perms", "1777", "--size", str(int(size)), "--tmpfs", folder]
    prefixes = ["", "/usr", "/usr/local", sys.base_prefix, str(Path(sys.executable).resolve().parents[1])]
    readable = [
        f"{prefix}/{name}" for prefix in prefixes for name in ("bin", "sbin", "lib", "lib32", "lib64", "libexec")
    ]
    readable += ["/usr/share", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime", *_packages()]
    for path in dict.fromkeys(readable):
        for parent in reversed(Path(path).parents):
            command += ["--dir", str(parent)]  # open to all users, even where the real one is not
        command += ["--ro-bind-try", path, path]
    command += ["--perms", "0777", "--dir", FOLDER]
    command += ["--tmpfs", "/proc/1"]  # the inner `bwrap`, whose memory an ordinary user's program could write to
    return [*command, "--remount-ro", "/proc/1", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]


@lru_cache
def _packages() -> list[str]:
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [path for path in [*site.getsitepackages(), *user] if os.path.isdir(path)]


@lru_cache
def _seccomp() -> bytes:
    """Returns the compiled filter of system calls."""
    import pyseccomp

    refuse = pyseccomp.ERRNO(errno.ENOSYS)  # so that libraries look for another way
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in FORBIDDEN:
        rules.add_rule(refuse, name)
    rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_NEWUSER, CLONE_NEWUSER))
    rules.add_rule(refuse, "socket", pyseccomp.Arg(0, pyseccomp.GT, AF_NETLINK))  # vsock leaves the network namespace
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _unused_user() -> int | None:
    """Returns a random user id from the upper half of all ids; `None` if the caller is not root or has only one id."""
    if os.geteuid() != 0:
        return None
    first, _, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[-1].split())
    return first + count // 2 + secrets.randbelow(count // 2) if count > 1 else None
