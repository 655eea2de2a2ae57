"""
Runs a generated program, once, in a fresh interpreter with hard limits, and says whether it did what it should.

It is off until the user opts in: `HF_ALLOW_CODE_EVAL=1`, or `allow_code_execution=True` where a function has it.

What happens to a program (`run_program`; the other side of the pipe is `runner`):

- **Two processes.** The program runs in one process and the checks in another, the judge, that holds no line of the
  program. The checks call the program's functions over a pipe, and only plain data (numbers, text, lists, dictionaries
  and the like, rebuilt from their values) comes back. The judge alone says "passed", after the last check. So neither
  `os._exit(0)`, nor a redefined `check`, `assert` or `__eq__`, nor a patched built-in, nor anything else that the
  program does to its own interpreter is a pass. A program fails, whatever it answers, if it leaves threads or processes
  running, prints more than `file_limit`, or tries to send signals or to change files outside of its folder.
- **Limits** on wall-clock time, CPU time, address space, processes and threads, file size, total size of files and
  output, which goes nowhere; no core files, no input.
- **Its own world**, as far as the system has it: process, network, mount and IPC namespaces (unprivileged ones for
  an ordinary user), an empty temporary file system as the working directory, everything else read-only, an unused
  user id without capabilities if the caller is root, Landlock rules (no writing outside of the working directory, no
  TCP, no signals to others), no new privileges, an empty environment. What is missing is said in one warning.
- **Nothing stays.** When the verdict is in, or the time is up, every process of the program is killed, those that left
  the process group or the session included, and the directory is removed.

This is not a security sandbox. Not covered:

- *Reading.* The program can read every file that all users, or an ordinary caller, can read. (Without the network it
  can hardly send it.)
- *The kernel.* A program that exploits a bug of the kernel or of the interpreter is not stopped, and no system call is
  filtered. Unix sockets that lie in the file system (of a container daemon, say) can be connected to if the caller can.
- *Memory and CPU time are limited per process*: all its processes together may use `max_processes` times as much.
- *Without namespaces*, Landlock still stops writing elsewhere, TCP (from Linux 6.7 on) and signals to others (from 6.12
  on), but UDP and shared memory stay open, other processes can be seen, and files are only counted every 50 ms.
- *Without namespaces and without Landlock*, a program of an ordinary user can send signals to that user's processes and
  change that user's files; one of root runs as another user, which can still write where all users can.
- *Where the user id cannot be changed*, the processes of root are only counted every 50 ms, not limited.
- *A program that holds its own checks* (`run_program` without `checks`) is believed when it ends normally: a program
  that wants to can claim that. Give checks that matter as `checks`.
- *The checks are trusted*: they run as the caller, within the limits on time and memory only. A program that answers
  right passes, whatever else it has tried that is not named above. The checks see copies of what it returns, so they
  cannot ask whether two values are the same object, and functions and other objects without a value do not cross.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from . import runner


logger = logging.getLogger(__name__)

CODE_EVAL_VARIABLE = "HF_ALLOW_CODE_EVAL"
STARTUP_GRACE = 20.0  # seconds beyond the time-out before the runner itself, which keeps the time, is given up


class CodeExecutionError(RuntimeError):
    """Generated code was not run, because nobody allowed it or because it cannot be run here."""


@dataclass(frozen=True)
class Verdict:
    """
    How a program fared.

    Args:
        status (`str`): `"passed"`, `"failed"` or `"timed out"`.
        reason (`str`): Why it did not pass, in a line; empty if it did.
        seconds (`float`): Wall-clock time from the start of the program.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every check was made and held."""
        return self.status == "passed"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON takes it, `passed` included."""
        return {"passed": self.passed, **asdict(self)}


def require_opt_in(allow_code_execution: bool | None = None) -> None:
    """
    Refuses to go on unless the user has allowed generated code to be run.

    Args:
        allow_code_execution (`bool`, *optional*):
            The user's word; by default it is `HF_ALLOW_CODE_EVAL=1` in the environment.

    Raises:
        `CodeExecutionError`: If it is not allowed.
    """
    if allow_code_execution is None:
        allow_code_execution = os.environ.get(CODE_EVAL_VARIABLE) == "1"
    if not allow_code_execution:
        raise CodeExecutionError(
            "Scoring this runs code that a model has written, which can do harm although it is run with limits (see "
            "hf_phibalance.evaluation.sandbox for what they do not cover). If you want that, set the environment "
            f"variable {CODE_EVAL_VARIABLE}=1 or pass allow_code_execution=True."
        )


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
) -> Verdict:
    """
    Runs a program in a fresh interpreter, and checks of its functions in another process.

    Args:
        program (`str`):
            Python source, not trusted.
        checks (`str`, *optional*, defaults to `""`):
            Python source, trusted, that calls functions of the program and raises if something is wrong. A name that
            neither the checks nor `context` nor the built-ins define stands for the function of that name in the
            program. Without checks, a program passes if it ends without an exception.
        context (`str`, *optional*, defaults to `""`):
            Python source, trusted, that is executed before the checks in their process: imports and helper functions
            that they use. Ignored if it is not complete Python.
        entry_points (`Sequence[str]`, *optional*, defaults to `()`):
            Names that stand for the program's functions even though `context` defines them.
        timeout (`float`, *optional*, defaults to `3.0`):
            Seconds of wall-clock time for the program and its checks, not counting the start of the interpreter.
        memory_limit (`int`, *optional*, defaults to 1 GiB):
            Bytes of address space of each process.
        max_processes (`int`, *optional*, defaults to `8`):
            Processes and threads that the program may have at a time.
        file_limit (`int`, *optional*, defaults to 16 MiB):
            Bytes that the program may write to files.
        allow_code_execution (`bool`, *optional*):
            Permission to run the program; by default it is `HF_ALLOW_CODE_EVAL=1` in the environment.

    Returns:
        [`Verdict`]: Passed only if the last check was reached, all of them held, and nothing is left running.

    Raises:
        `CodeExecutionError`: If running code is not allowed, or not possible on this system.
        `ValueError`: If a limit is not positive.
    """
    require_opt_in(allow_code_execution)
    limits = {
        "timeout": timeout,
        "memory_limit": memory_limit,
        "max_processes": max_processes,
        "file_limit": file_limit,
    }
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r}: a limit has to be positive.")
    if sys.platform != "linux":
        raise CodeExecutionError(
            f"sys.platform={sys.platform!r}: generated code is only run on Linux, whose limits it relies on. Use a "
            "Linux machine, a container or a virtual machine."
        )
    folder = tempfile.mkdtemp(prefix="hf_phibalance_")
    job = {**limits, "program": program, "folder": folder, "parent": os.getpid(), "site": _site_packages()}
    job["namespaces"] = _NAMESPACES
    tests = {"checks": checks, "context": context, "entry_points": list(entry_points)}
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the same verdict every time
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    source = os.path.dirname(os.path.dirname(os.path.abspath(runner.__file__)))
    # no site packages, no user site, no bytecode; the runner from its bytecode, which a script would not have
    command = [sys.executable, "-S", "-s", "-B", "-c", _BOOTSTRAP, source]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(
                runner.frame(job) + runner.frame(tests), timeout=timeout + STARTUP_GRACE
            )
        except subprocess.TimeoutExpired:
            return Verdict("timed out", f"no verdict within {timeout + STARTUP_GRACE:g} s", timeout)
        finally:
            if process.poll() is None:
                process.kill()  # and with it, by their death signals, all that it has started
                process.communicate()
    finally:
        _remove(folder)
    try:
        result = json.loads(output)
    except ValueError:
        if process.returncode < 0:
            return Verdict("failed", f"the runner was ended by signal {-process.returncode}")
        raise CodeExecutionError(
            f"The runner of generated code ended with exit status {process.returncode} and no verdict. Its last "
            f"words: {errors.decode(errors='replace')[-2000:]}"
        ) from None
    if result["missing"]:
        _warn_once("; ".join(result["missing"]))
    return Verdict(result["status"], result["reason"], round(result["seconds"], 3))


def _remove(folder: str) -> None:
    """Removes a folder, also one with folders that a program has made inaccessible."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):
        for root, folders, _ in os.walk(folder):
            for path in (os.path.join(root, name) for name in folders):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
        shutil.rmtree(folder)


_NAMESPACES = True  # False only in tests of what is done where there are none
_BOOTSTRAP = (  # afterwards the runner, all of it loaded, is on no path on which a program could look
    "import sys; sys.path[0] = sys.argv[1]; import runner; "
    "del sys.path[0], sys.argv[1:], runner.__path__[:]; runner.main()"
)


@lru_cache
def _warn_once(missing: str) -> None:
    logger.warning("Generated code runs with less isolation than it should have on this system: %s.", missing)


@lru_cache
def _site_packages() -> list[str]:
    """Where installed packages lie, which a program may import as it could in the interpreter of the caller."""
    return [path for path in site.getsitepackages() if os.path.isdir(path)]
