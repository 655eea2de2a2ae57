"""The process that judges: it executes the checks, and calls the functions of a program that it never sees."""

from __future__ import annotations

import builtins
import json
import os
import signal
import types
from typing import Any

from .isolation import set_limits
from .linux import PR_SET_DUMPABLE, prctl
from .messages import MAX_REASON, decode, describe, encode, receive, send
from .processes import keep_only


class ProgramEnded(BaseException):
    """The program is gone before the checks were done with it."""


class ProgramRaised(BaseException):
    """The program raised an exception while it was loaded, or did what it must not."""


def be_judge(job: dict, ask: int, replies: int, tell: int) -> None:
    """Reads the checks from standard input, judges, and tells the verdict."""
    prctl(PR_SET_DUMPABLE, 0)
    tests = receive(0)
    keep_only(ask, replies, tell)
    os.setsid()
    set_limits(job, None)
    verdict = judge(tests, ask, replies)
    os.write(tell, json.dumps(verdict).encode())
    os.close(tell)
    signal.pause()  # the program would end with the pipes; the supervisor looks first at what it has left running


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
