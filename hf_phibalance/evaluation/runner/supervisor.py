"""
The process that is started: it reads the job, starts the others, keeps the time, counts what is left running, kills
everything and reports the verdict.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .isolation import enter_namespaces
from .judge import be_judge
from .keeper import be_keeper
from .linux import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl
from .messages import receive
from .processes import LINGER, descendants, in_child, kill_all, processes


REPORT_LIMIT = 1 << 16


def main() -> None:
    """Runs one job: a frame with the program and its limits, then one with the checks, from standard input."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    job = receive(0)
    if os.getppid() != job["parent"]:
        os._exit(1)  # the caller has died before it could take this process along
    prctl(PR_SET_CHILD_SUBREAPER, 1)
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
        in_child(be_judge, job, ask, replies, tell)
    namespaces, by_user_namespace = enter_namespaces() if job["namespaces"] else (False, False)
    prctl(PR_SET_DUMPABLE, 0)  # so that nobody with the same user id looks inside or traces
    ready, say_ready = os.pipe()
    keeping = os.fork()
    if keeping == 0:
        in_child(be_keeper, job, namespaces, by_user_namespace, requests, answer, say_ready, output)
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
