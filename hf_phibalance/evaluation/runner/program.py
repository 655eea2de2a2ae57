"""
The process that runs the untrusted program and answers the calls of its functions.

It closes itself in before the first line of the program, and all that it holds from then on, the program can change: so
nothing here decides about the verdict, except against the program.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
import types
from typing import Any

from .isolation import drop_privileges, restrict_with_landlock, set_limits
from .linux import PR_SET_PDEATHSIG, prctl
from .messages import MAX_REASON, decode, describe, encode, receive, send
from .processes import keep_only


# Audit events of changes to the file system, with the positions of the paths and of their folders' descriptors.
FILE_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, None),),
}
SIGNAL_EVENTS = ("os.kill", "os.killpg", "signal.pthread_kill")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def be_program(
    job: dict, user: int | None, processes: int, requests: int, answer: int, writing: int, output: int
) -> None:
    """Closes itself in, says with which version of Landlock, and becomes the program."""
    os.setsid()
    set_limits(job, processes)
    landlock = restrict_with_landlock(job["folder"])
    drop_privileges(user)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # forgotten when the user changed
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    send(writing, landlock)
    source, folder = job["program"], job["folder"]
    job.clear()
    os.dup2(output, 1)
    os.dup2(output, 2)
    keep_only(1, 2, requests, answer)
    forbid_harm(folder, answer)
    serve(source, requests, answer)
    os._exit(0)


def forbid_harm(folder: str, replies: int) -> None:
    """
    Ends the program at once if it tries to signal a process or to change a file outside of `folder`, even where the
    system would stop it and the program would carry on. This is for the verdict; it is the kernel that protects.
    """
    folder = os.path.realpath(folder)

    def hook(event: str, args: tuple) -> None:
        if event in SIGNAL_EVENTS:
            give_up(f"tried to send a signal ({event})")
        places = FILE_EVENTS.get(event)
        if places is None or (event == "open" and not (args[2] or 0) & WRITING):
            return
        for at, folder_at in places:
            path = resolve(args[at], -1 if folder_at is None or folder_at >= len(args) else args[folder_at])
            if path is not None and path != os.devnull and os.path.commonpath((path, folder)) != folder:
                give_up(f"tried to change a file outside of its folder ({event} {path})")

    def resolve(path: Any, descriptor: Any) -> str | None:
        try:
            base = f"/proc/self/fd/{descriptor}" if isinstance(descriptor, int) and descriptor >= 0 else "."
            return os.path.realpath(os.path.join(base, os.fsdecode(path)))
        except (TypeError, ValueError, OSError):  # a descriptor, or no path
            return None

    def give_up(reason: str) -> None:
        try:
            send(replies, {"raised": ["", f"the program {reason}"[:MAX_REASON]], "end": True})
        finally:
            os._exit(1)

    sys.addaudithook(hook)


def serve(source: str, requests: int, replies: int) -> None:
    """Executes the program, then answers calls of its functions until the judge is content."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        send(replies, {"raised": _raised(error)})
        return
    send(replies, {"value": None})
    while True:
        try:
            call = receive(requests)
        except EOFError:
            return
        send(replies, _answer(module, call))


def _answer(module: types.ModuleType, call: dict) -> dict:
    try:
        function = getattr(module, call["name"], None)
        if not callable(function):
            raise NameError(f"the program defines no function {call['name']!r}")
        args, kwargs = decode(call["args"]), decode(call["kwargs"])
        reply = {"value": encode(function(*args, **kwargs))}
    except BaseException as error:
        return {"raised": _raised(error)}
    try:
        after = encode(args)
        if after != call["args"]:
            reply["args"] = after  # arguments that were changed in place
    except BaseException:
        pass
    return reply


def _raised(error: BaseException) -> list[str]:
    kind = next((cls.__name__ for cls in type(error).__mro__ if getattr(builtins, cls.__name__, None) is cls), "")
    return [kind, describe(error)]
