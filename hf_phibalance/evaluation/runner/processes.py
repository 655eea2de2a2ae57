"""Forks of this process, and what all processes of the system are: starting, finding and killing them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from .linux import PR_SET_PDEATHSIG, prctl
from .messages import describe


LINGER = 0.25  # seconds for threads and processes that are about to end


def in_child(function, *args) -> None:
    """Runs `function` in a forked process, which ends with it."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        function(*args)
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{function.__name__}: {describe(error)}\n".encode())
    finally:
        os._exit(1)


def keep_only(*descriptors: int) -> None:
    """Closes all other descriptors; standard input, output and errors, if not given, lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in {0, 1, 2} - {*descriptors}:
        os.dup2(nowhere, standard)
    low = 3
    for descriptor in sorted({*descriptors} - {0, 1, 2}):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 1 << 16)


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
