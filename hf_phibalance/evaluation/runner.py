"""
The program inside the sandbox. `sandbox.run_program` starts an interpreter with it.

The judge executes the checks. Its child runs the untrusted program and calls its functions for the judge. They
exchange lines of JSON over two pipes. The child can change everything in its own process, and nothing in the judge's.
Standard library only.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any, BinaryIO


MAX_MESSAGE = 64 << 20  # bytes
LINGER = 25  # hundredths of a second, for threads and processes that are about to end
PR_SET_DUMPABLE = 4

# ---------------------------------------------------------------------- messages

MUTABLE: tuple[Any, ...] = (list, dict, set, deque, bytearray)
# Types that can be sent besides None, numbers and text: the type, its parts, and how to build it from them.
PLAIN: dict[str, tuple[Any, Callable, Callable]] = {
    **{kind.__name__: (kind, iter, kind) for kind in (list, set, deque, bytearray, tuple, frozenset, bytes)},
    "dict": (dict, dict.items, dict),
    "complex": (complex, lambda value: (value.real, value.imag), lambda parts: complex(*parts)),
    "range": (range, lambda value: (value.start, value.stop, value.step), lambda parts: range(*parts)),
    "Decimal": (Decimal, lambda value: (str(value),), lambda parts: Decimal(*parts)),
    "Fraction": (Fraction, lambda value: (str(value),), lambda parts: Fraction(*parts)),
    "keys": (type({}.keys()), iter, lambda parts: dict.fromkeys(parts).keys()),
    "values": (type({}.values()), iter, lambda parts: dict(enumerate(parts)).values()),
    "items": (type({}.items()), iter, lambda parts: dict(parts).items()),
    "iterator": (Iterator, iter, iter),
}


class Codec:
    """
    Encodes and decodes the values of one call and its answer.

    `decode` builds only built-in types, so a program can answer wrongly but cannot cheat. A subclass becomes its
    built-in type, and a scalar of numpy becomes a number.

    Both sides number mutable containers in the order of sending. So the judge can repeat changes to an argument.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        """Returns `value` as JSON types. Raises `TypeError` if a part of it is not plain data."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if id(value) in self.numbers:
            return {"same": self.numbers[id(value)]}
        for name, (kind, parts, _) in PLAIN.items():
            if isinstance(value, kind):
                if kind in MUTABLE:
                    self._number(value)
                return {name: [self.encode(part) for part in parts(value)]}
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.encode(value.item())
        raise TypeError(f"a value of type {type(value).__name__}, which is not plain data that the checks can compare")

    def content(self, container: Any) -> list:
        """Returns the parts of a mutable container, encoded."""
        return [self.encode(part) for part in (container.items() if isinstance(container, dict) else container)]

    def decode(self, data: Any) -> Any:
        """Inverse of `encode`. Raises any `Exception` if `data` was not made by it."""
        if not isinstance(data, dict):
            return data
        ((name, parts),) = data.items()
        if name == "same":
            return self.objects[parts]
        kind, _, build = PLAIN[name]
        if kind not in MUTABLE:
            return build([self.decode(part) for part in parts])
        self._number(value := kind())
        self.fill(value, parts)
        return value

    def fill(self, container: Any, parts: list) -> None:
        """Replaces the content of a mutable container by encoded parts."""
        items = [self.decode(part) for part in parts]
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(items)

    def _number(self, value: Any) -> None:
        self.numbers[id(value)] = len(self.objects)
        self.objects.append(value)


def send(file: BinaryIO, message: Any) -> None:
    """Writes a message. Raises `ValueError` if it is too long."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > MAX_MESSAGE:
        raise ValueError(f"a value of {len(line)} bytes is more than the {MAX_MESSAGE} that can cross")
    file.write(line)
    file.flush()


def receive(file: BinaryIO) -> Any:
    """Reads the next message. Raises `EOFError` if there is none, `ValueError` if it is not JSON."""
    line = file.readline(MAX_MESSAGE)
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def describe(error: BaseException) -> str:
    """Returns an exception's type and text."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


# ---------------------------------------------------------------------- the judge


class ProgramFailed(BaseException):
    """The program did not load, has ended, sent a malformed answer or tried something forbidden."""


class Program:
    """The program behind two pipes. `failure` keeps why it failed, because checks may catch every exception."""

    def __init__(self, process: int, requests: BinaryIO, replies: BinaryIO) -> None:
        self.process, self.requests, self.replies = process, requests, replies
        self.failure = ""

    def ask(self, message: Any) -> dict:
        """Sends a message and returns the reply."""
        try:
            send(self.requests, message)
            reply = receive(self.replies)
            self.failure = self.failure or str(reply.get("end", ""))
        except (EOFError, OSError):
            self.failure = self.failure or self.how_it_ended()
        except Exception:
            self.failure = "the program sent a malformed answer"
        if self.failure:
            raise ProgramFailed
        return reply

    def function(self, name: str) -> Callable:
        """Returns a stand-in for the program's function of that name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            codec = Codec()
            message = {"name": name, "arguments": codec.encode((args, kwargs))}
            arguments = [*codec.objects]
            reply = self.ask(message)
            try:
                if "raised" in reply:
                    error = _exception(*reply["raised"])
                else:
                    value = codec.decode(reply["value"])
                    for number, parts in reply["changed"]:
                        codec.fill(arguments[number], parts)
                    return value
            except Exception as wrong:
                self.failure = "the program sent a malformed answer"
                raise ProgramFailed from wrong
            raise error

        return call

    def how_it_ended(self) -> str:
        for _ in range(LINGER):
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                code = os.waitstatus_to_exitcode(status)
                how = {entry.value: entry.name for entry in signal.Signals}.get(-code, f"exit status {code}")
                return f"the program ended before the checks were done ({how})"
            time.sleep(0.01)
        return "the program broke off the checks"

    def is_busy(self) -> bool:
        """Returns whether more than the program's main thread runs. Behind walls, `/proc` lists only the sandbox."""
        for process in {*filter(str.isdigit, os.listdir("/proc"))} - {"1", str(os.getpid())}:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                threads = len(os.listdir(f"/proc/{process}/task"))
                with open(f"/proc/{process}/stat") as file:
                    has_ended = file.read().rpartition(")")[2].split()[0] == "Z"
                # a zombie with several threads is a process whose main thread alone has ended
                if threads > 1 or not (has_ended or int(process) == self.process):
                    return True
        return False


class Names(dict):
    """Global variables of the checks. A name that nothing defines is a function of the program."""

    def __init__(self, program: Program) -> None:
        super().__init__(__name__="checks")
        self.program = program

    def __missing__(self, name: str) -> Callable:
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        return self.program.function(name)


def judge(job: dict, program: Program) -> str:
    """Executes the checks. Returns why the program fails them, or an empty string if it passes."""
    random.seed(0)  # the same verdict every time
    names = Names(program)
    try:
        program.ask(job["program"])
        with suppress(SyntaxError):  # it may be the beginning of a program
            exec(compile(job["context"], "<context>", "exec"), names)
        for name in job["entry_points"]:
            names[name] = program.function(name)
        exec(compile(job["checks"], "<checks>", "exec"), names)
    except BaseException as error:
        return program.failure or _explain(error, job["checks"])
    return program.failure


def _exception(kind: str, text: str) -> BaseException:
    """Rebuilds an exception of the program from its built-in type. Other types become `RuntimeError`."""
    cls = getattr(builtins, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        cls = RuntimeError
    try:
        error = cls(text)
    except TypeError:  # Unicode errors need more arguments
        error = RuntimeError(text)
    error.description = str(text)  # type: ignore[attr-defined]
    return error


def _explain(error: BaseException, checks: str) -> str:
    """Returns what went wrong, and in which line of the checks."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<checks>":
            line = step.tb_lineno
        step = step.tb_next
    what = getattr(error, "description", None) or describe(error)
    return f"{what} at `{checks.splitlines()[line - 1].strip()}`" if line else what


# ---------------------------------------------------------------------- the program


def serve(requests: BinaryIO, replies: BinaryIO, settings: dict) -> None:
    """Runs the program, then calls its functions until the judge is gone."""
    for name in ("cpu_count", "process_cpu_count"):
        setattr(os, name, lambda: 2)  # so that a pool does not start more processes than the limit allows
    if sys.version_info >= (3, 14):
        import multiprocessing

        multiprocessing.set_start_method("fork")  # other workers could not import the program
    module = sys.modules["program"] = types.ModuleType("program")
    source = receive(requests)

    def hook(event: str, args: tuple) -> None:
        if (harm := find_harm(event, args, settings["folder"], settings["walls"])) is not None:
            try:
                send(replies, {"end": f"the program {harm}"})
            finally:
                os._exit(1)  # an exception could be caught

    sys.addaudithook(hook)
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
        send(replies, {})
    except BaseException as error:
        send(replies, {"end": describe(error)})
    with suppress(EOFError):
        while True:
            send(replies, answer(module, receive(requests)))  # if it cannot be sent, the program has failed


def answer(module: types.ModuleType, call: dict) -> dict:
    """Calls a function of the program. Returns its value and the arguments that it has changed, or its exception."""
    codec = Codec()
    try:
        function = getattr(module, call["name"], None)
        if not callable(function):
            raise NameError(f"the program defines no function {call['name']!r}")
        args, kwargs = codec.decode(call["arguments"])
        arguments = [*codec.objects]
        before = [codec.content(argument) for argument in arguments]
        reply = {"value": codec.encode(function(*args, **kwargs)), "changed": []}
        with suppress(TypeError, RecursionError):  # an argument now holds something that cannot be sent
            after = [codec.content(argument) for argument in arguments]
            reply["changed"] = [(n, now) for n, now in enumerate(after) if now != before[n]]
        return reply
    except BaseException as error:
        kinds = [base.__name__ for base in type(error).__mro__ if getattr(builtins, base.__name__, None) is base]
        return {"raised": (kinds[0], describe(error))}


CHANGES = {"open", "os.remove", "os.rmdir", "os.rename", "os.truncate", "os.chmod", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
COMMANDS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
CONNECTIONS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname"}


def find_harm(event: str, args: tuple, folder: str, walls: bool) -> str | None:
    """
    Returns what an audit event does wrong: change a file elsewhere, signal another process or use the network; else
    `None`. This is only for the verdict. The walls protect the machine.
    """
    if event in CHANGES:
        if event == "open":
            args = args[:1] if (args[2] or 0) & WRITING else ()
        for path in args[:2]:
            if isinstance(path, (str, bytes, os.PathLike)) and not _may_change(path, folder, walls):
                return f"tried to change a file outside of its folder ({event} {path!r})"
    elif event in COMMANDS:
        for path in re.findall(r"(?<![^\s'\"=])/[^\s'\",;]+", " ".join(map(str, args[:2]))):
            if not os.path.lexists(os.path.dirname(path)):
                return f"named a file outside of its folder ({event} {path})"
    elif event in ("os.kill", "os.killpg") and not _is_own(args[0]):
        return f"tried to send a signal ({event} {args[0]})"
    elif event in LOOKUPS or (event in CONNECTIONS and isinstance(args[1], tuple)):
        return f"tried to use the network ({event} {args[0] if event in LOOKUPS else args[1]})"
    return None


def _may_change(path: Any, folder: str, walls: bool) -> bool:
    path = os.path.realpath(os.fsdecode(path))
    if os.path.commonpath((path, folder)) == folder or path == os.devnull:
        return True
    return walls and any(os.access(place, os.W_OK) for place in (path, os.path.dirname(path)))


def _is_own(process: int) -> bool:
    if process > 0 and process != os.getpid() and hasattr(os, "waitid"):  # which macOS may lack
        try:
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
    return process > 0


# ---------------------------------------------------------------------- start


def limit(settings: dict) -> None:
    """Sets the limits of both processes and gives up root."""
    sys.path[:] = [path for path in sys.path if path] + settings["packages"]
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    os.chdir(settings["folder"])
    user = settings["user"]
    limits = {"CPU": math.ceil(settings["timeout"]) + 1, "AS": settings["memory_limit"]}
    limits |= {"FSIZE": settings["file_limit"], "NOFILE": 256, "CORE": 0}
    if settings["walls"]:  # the judge counts too, and for an ordinary user the inner `bwrap`
        limits |= {"NPROC": settings["max_processes"] + (2 if user is None else 1), "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, value in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is already set, or macOS lacks it
            spare = name == "CPU"  # a second between SIGXCPU and SIGKILL
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(value), int(value) + spare))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)  # also drops every capability


def main() -> None:
    """Starts the program's process. Writes to standard output that both are ready and, at the end, the verdict."""
    settings = json.loads(sys.argv.pop())
    limit(settings)
    report = os.dup(1)
    os.dup2(2, 1)
    (asked, ask), (answers, reply) = os.pipe(), os.pipe()
    process = os.fork()  # before the checks are read, so that the program's memory does not hold them
    if process == 0:
        for end in (0, report, ask, answers):
            os.close(end)
        os.open(os.devnull, os.O_RDONLY)  # becomes standard input
        with open(asked, "rb") as requests, open(reply, "wb") as replies:
            serve(requests, replies, settings)
        os._exit(0)
    for end in (asked, reply):
        os.close(end)
    # The program has the same user id. From now on the kernel lets it neither read nor trace this process.
    if settings["walls"] and ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0):
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that the program cannot interrupt the judge
    with open(0, "rb") as file, open(ask, "wb") as requests, open(answers, "rb") as replies:
        job = json.load(file)
        os.write(report, b"+")
        program = Program(process, requests, replies)
        reason = judge(job, program)
        for _ in range(LINGER):
            if reason or not settings["walls"] or not program.is_busy():
                break
            time.sleep(0.01)
        else:
            reason = "the program left threads or processes running"
        if not reason and os.fstat(2).st_size >= settings["file_limit"]:
            reason = f"the program printed {settings['file_limit']} bytes or more"
        os.write(report, json.dumps(reason[:300]).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
