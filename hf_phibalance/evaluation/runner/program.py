"""
Runs the untrusted program and answers calls of its functions.

The program can change everything in this process. So nothing here can turn the verdict in its favour.
"""

from __future__ import annotations

import builtins
import os
import re
import sys
import types
from contextlib import suppress
from typing import BinaryIO

from .messages import Crossing, describe, receive, send
from .start import start


# Audit events that change files. The last argument of the relative ones is a folder's descriptor.
RELATIVE = {
    "os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.chmod", "os.chown", "os.utime"
}  # fmt: skip
CHANGES = {"open", "os.truncate", "shutil.rmtree", *RELATIVE}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
COMMANDS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname")


def main() -> None:
    """Runs the program when the judge is ready, then answers calls of its functions until the judge is gone."""
    job = start()
    for name in ("cpu_count", "process_cpu_count"):
        setattr(os, name, lambda: 2)  # so that a pool does not start more processes than the limit allows
    if sys.version_info >= (3, 14):
        import multiprocessing

        multiprocessing.set_start_method("fork")  # other workers could not import the program
    module = types.ModuleType("program")
    sys.modules["program"] = module
    with open(job["requests"], "rb") as requests, open(job["replies"], "wb") as replies:
        send(replies, "ready")
        receive(requests)
        refuse_harm(job["folder"], job["walls"], replies)
        try:
            exec(compile(job["program"], "<program>", "exec"), module.__dict__)
            send(replies, {})
        except BaseException as error:
            send(replies, {"end": describe(error)})
        with suppress(EOFError):
            while True:
                answer(module, receive(requests), replies)
    os._exit(0)


def answer(module: types.ModuleType, call: dict, replies: BinaryIO) -> None:
    """Calls a function of the program, and sends its value and the arguments that it has changed, or its exception."""
    crossing = Crossing()
    try:
        function = getattr(module, call["name"], None)
        if not callable(function):
            raise NameError(f"the program defines no function {call['name']!r}")
        args, kwargs = crossing.decode(call["arguments"])
        arguments = [*crossing.objects]
        before = [crossing.contents(argument) for argument in arguments]
        reply = {"value": crossing.encode(function(*args, **kwargs)), "changed": []}
        with suppress(TypeError, RecursionError):  # an argument now holds something that cannot cross
            after = [crossing.contents(argument) for argument in arguments]
            reply["changed"] = [(n, now) for n, now in enumerate(after) if now != before[n]]
        send(replies, reply)
    except BaseException as error:
        cls = type(error)
        kind = next((base.__name__ for base in cls.__mro__ if getattr(builtins, base.__name__, None) is base), "")
        send(replies, {"raised": (kind, describe(error))})


def refuse_harm(folder: str, walls: bool, replies: BinaryIO) -> None:
    """
    Ends the program if its Python code tries to change a file elsewhere, to signal another process or to use the
    network, even if it would catch the error. This is for the verdict. The walls protect.
    """
    places = ["/tmp", "/dev"] if walls else ["/dev/shm", "/dev/null"]

    def hook(event: str, args: tuple) -> None:
        if event in CHANGES:
            if (event == "open" and not (args[2] or 0) & WRITING) or (event in RELATIVE and args[-1] >= 0):
                return
            for path in args[1:2] if event.endswith("link") else args[:2] if event == "os.rename" else args[:1]:
                is_path = isinstance(path, (str, bytes, os.PathLike))
                if is_path and not may_change(event, os.path.realpath(os.fsdecode(path))):
                    end(f"tried to change a file outside of its folder ({event} {path!r})")
        elif event in COMMANDS:
            for path in re.findall(r"(?<![^\s'\"=])/[^\s'\",;]+", " ".join(map(str, args[:2]))):
                if not os.path.lexists(os.path.dirname(path)):
                    end(f"named a file outside of its folder ({event} {path})")
        elif event in ("os.kill", "os.killpg") and not is_own(args[0]):
            end(f"tried to send a signal ({event} {args[0]})")
        elif event in LOOKUPS or (event in CONNECTIONS and isinstance(args[1], tuple)):
            end(f"tried to use the network ({event} {args[0] if event in LOOKUPS else args[1]})")

    def may_change(event: str, path: str) -> bool:
        own, *shared = [os.path.commonpath((path, place)) == place for place in (folder, *places)]
        # a path below a folder that does not exist here may point to a real file outside
        return own or (any(shared) and (event == "os.mkdir" or os.path.lexists(os.path.dirname(path))))

    def is_own(process: int) -> bool:
        if process > 0 and process != os.getpid() and hasattr(os, "waitid"):  # which macOS may lack
            try:
                os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
        return process > 0

    def end(reason: str) -> None:
        try:
            send(replies, {"end": f"the program {reason}"})
        finally:
            os._exit(1)

    sys.addaudithook(hook)
