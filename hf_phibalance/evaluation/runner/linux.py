"""What the processes ask of the Linux kernel and Python has no function for."""

from __future__ import annotations

import ctypes
import os


PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 36, 38

libc = ctypes.CDLL(None, use_errno=True)


def checked(function, *args) -> int:
    result = function(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int) -> None:
    checked(libc.prctl, option, value, 0, 0, 0)
