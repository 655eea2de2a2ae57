"""
The first process of the new namespaces: it sets them up, starts the program, reaps what the program has left, and takes
everything along when it dies.
"""

from __future__ import annotations

import os
import time

from .isolation import mount_own_files, other_user
from .linux import PR_SET_CHILD_SUBREAPER, prctl
from .messages import receive, send
from .processes import LINGER, in_child, keep_only, tasks_of
from .program import be_program


EXTRA_TASKS = 2  # the supervisor and the keeper count where the limit on processes is per user namespace


def be_keeper(
    job: dict, namespaces: bool, by_user_namespace: bool, requests: int, answer: int, say_ready: int, output: int
) -> None:
    """Sets up the world of the program, starts it there, and says how it ended and whether it left anything."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what leaves the program's session stays below the keeper
    keep_only(2, requests, answer, say_ready, output)
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
        in_child(be_program, job, user, processes, requests, answer, writing, output)
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
