"""Prepares an interpreter: both processes call `start` first."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from contextlib import suppress


def start() -> dict:
    """
    Reads this process's job from standard input, sets its limits and gives up root.

    Returns:
        `dict`: The job, as `sandbox` has written it.
    """
    with open(0, "rb") as file:
        job = json.load(file)
    os.open(os.devnull, os.O_RDONLY)  # becomes standard input
    sys.path[:1] = []  # the folder of this package
    sys.path += job["packages"]
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    os.chdir(job["folder"])
    given = job["limits"]
    limits = {"CPU": math.ceil(given["timeout"]) + 1, "AS": given["memory_limit"], "FSIZE": given["file_limit"]}
    limits |= {"NOFILE": 256, "CORE": 0}
    if job["walls"]:  # the inner `bwrap` of an ordinary user counts as well
        limits |= {"NPROC": given["max_processes"] + (job["user"] is None), "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, value in limits.items():
        with suppress(ValueError, OSError):  # a lower one holds already, or macOS has none
            spare = name == "CPU"  # a second between SIGXCPU and SIGKILL
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(value), int(value) + spare))
    if job["user"] is not None:
        os.setgroups([])
        os.setresgid(*[job["user"]] * 3)
        os.setresuid(*[job["user"]] * 3)  # and with root goes every capability
    return job
