"""Executes the checks, and calls the functions of the program in the other process."""

from __future__ import annotations

import builtins
import signal
import types
from typing import Any, BinaryIO

from .messages import Crossing, describe, receive, send
from .start import start


class ProgramFailed(BaseException):
    """The program has ended, did not load, sent a malformed message or tried something forbidden."""


class Program:
    """
    The program at the other end of two pipes.

    Args:
        requests (`BinaryIO`): Where it reads.
        replies (`BinaryIO`): Where it answers.
    """

    def __init__(self, requests: BinaryIO, replies: BinaryIO):
        self.requests, self.replies = requests, replies
        self.failure: str | None = None  # kept, since the checks may catch everything

    def ask(self, message: Any) -> dict:
        """Sends a message and returns the reply."""
        try:
            send(self.requests, message)
            reply = receive(self.replies)
            if "end" in reply:
                self.failure = str(reply["end"])
        except (EOFError, OSError, ValueError, TypeError, RecursionError) as error:
            self.failure = ""
            raise ProgramFailed from error
        if self.failure is not None:
            raise ProgramFailed
        return reply

    def function(self, name: str):
        """Returns a stand-in for the program's function of that name."""

        def call(*args, **kwargs):
            crossing = Crossing()
            message = {"name": name, "arguments": crossing.encode((args, kwargs))}
            arguments = [*crossing.objects]
            reply = self.ask(message)
            try:
                if "raised" not in reply:
                    value = crossing.decode(reply["value"])
                    for number, content in reply["changed"]:
                        crossing.fill(arguments[number], content)
                    return value
                error = _exception(*reply["raised"])
            except Exception as wrong:
                self.failure = "the program sent a malformed answer"
                raise ProgramFailed from wrong
            raise error

        call.__name__ = call.__qualname__ = name
        return call


def main() -> None:
    """Reports when both processes are ready, and then the verdict."""
    job = start()
    with (
        open(job["requests"], "wb") as requests,
        open(job["replies"], "rb") as replies,
        open(job["report"], "wb", buffering=0) as report,
    ):
        receive(replies)
        report.write(b"+")
        send(report, judge(job, Program(requests, replies)))
        signal.pause()  # keeps the pipes open while `sandbox` looks at what the program has left running


def judge(job: dict, program: Program) -> dict:
    """
    Executes the checks against the program.

    Returns:
        `dict`: Whether it `passed`, and the `reason` if not; an empty one if the program is gone.
    """
    names: dict[str, object] = {"__name__": "checks"}
    try:
        checks = compile(job["checks"], "<checks>", "exec")
    except (SyntaxError, ValueError) as error:
        return {"passed": False, "reason": f"the checks cannot be compiled: {describe(error)}"}
    if "random" in job["checks"]:
        import random

        random.seed(0)
    reason = ""
    try:
        program.ask("load")
        try:
            exec(compile(job["context"], "<context>", "exec"), names)
        except SyntaxError:  # only the beginning of a program
            names = {"__name__": "checks"}
        for name in {*job["entry_points"], *_unknown_names(checks, names)}:
            names[name] = program.function(name)
        exec(checks, names)
    except BaseException as error:
        reason = _explain(error, job["checks"])
    if program.failure is not None:
        reason = program.failure
    return {"passed": not reason and program.failure is None, "reason": reason[:300]}


def _exception(kind: str, text: str) -> BaseException:
    """Rebuilds an exception of the program from its built-in type; other types become `RuntimeError`."""
    cls = getattr(builtins, str(kind), None)
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        cls = RuntimeError
    try:
        error = cls(text)
    except TypeError:  # those of Unicode want more
        error = RuntimeError(text)
    error.description = str(text)  # type: ignore[attr-defined]
    return error


def _unknown_names(code: types.CodeType, names: dict) -> set[str]:
    """Returns the names in the code, attributes included, that are neither in `names` nor built in."""
    unknown = {name for name in code.co_names if name not in names and not hasattr(builtins, name)}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            unknown |= _unknown_names(constant, names)
    return unknown


def _explain(error: BaseException, checks: str) -> str:
    """Returns what went wrong, and the line of the checks where it did."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<checks>":
            line = step.tb_lineno
        step = step.tb_next
    what = getattr(error, "description", None) or describe(error)
    lines = checks.splitlines()
    return f"{what} at `{lines[line - 1].strip()}`" if 0 < line <= len(lines) else what
