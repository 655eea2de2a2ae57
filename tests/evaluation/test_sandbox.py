"""Generated code: hostile programs fail, in time, and leave no process and no file; honest ones pass."""

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hf_phibalance.evaluation import CodeExecutionError, run_program, sandbox
from hf_phibalance.evaluation.runner.processes import descendants, processes


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated code is only run on Linux")

CHECKS = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\ncheck(add)"
HONEST = "def add(x):\n    return x + 1\n"

# Each does its harm and then, if it still can, answers rightly. The places of the harm: {folder}, {caller}.
HOSTILE = {
    "endless loop": "while True:\n    pass\n" + HONEST,
    "endless loop in the call": "def add(x):\n    while True:\n        pass\n",
    "endless loop that catches all": "def add(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n",
    "sleep": "import time\ntime.sleep(3600)\n" + HONEST,
    "input": "input()\n" + HONEST,
    "fork bomb": "import os\nwhile True:\n    os.fork()\n" + HONEST,
    "fork bomb that catches": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError: pass\n",
    "fork bomb that leaves its session": "import os\nfor _ in range(100):\n    try:\n        if os.fork() == 0:\n            os.setsid()\n    except OSError: pass\n"
    "import time\ntime.sleep(60)\n",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()\n",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n" + HONEST,
    "large file": "import os\nwith open('x', 'wb') as file:\n    for _ in range(1024):\n        file.write(bytes(1 << 20))\n"
    + HONEST,
    "many files": "for i in range(1 << 20):\n    with open(str(i), 'wb') as file:\n        file.write(bytes(1 << 20))\n"
    + HONEST,
    "1 GB of output": "for _ in range(1024):\n    print('x' * (1 << 20))\n" + HONEST,
    "1 GB of output that catches": "import os\nfor _ in range(1024):\n    try:\n        os.write(1, b'x' * (1 << 20))\n    except OSError: pass\n"
    + HONEST,
    "1 GB of errors": "import sys\nfor _ in range(1024):\n    sys.stderr.write('x' * (1 << 20))\n" + HONEST,
    "1 GB of answer": "def add(x):\n    return 'x' * (1 << 30)\n",
    "deletes a file": "import os\ntry:\n    os.remove({victim!r})\nexcept OSError: pass\n" + HONEST,
    "deletes a folder": "import shutil\nshutil.rmtree({folder!r}, ignore_errors=True)\n" + HONEST,
    "deletes with a shell": "import os\nif os.system('rm -rf ' + {folder!r}):\n    raise OSError\n" + HONEST,
    "overwrites a file": "try:\n    open({victim!r}, 'w').close()\nexcept OSError: pass\n" + HONEST,
    "overwrites by the system call": "import ctypes\nc = ctypes.CDLL(None)\nfd = c.open({victim!r}.encode(), 1)\n"
    "assert fd >= 0\nc.ftruncate(fd, 0)\n" + HONEST,
    "os._exit": "import os\nos._exit(0)\n",
    "os._exit in the call": "import os\ndef add(x):\n    os._exit(0)\n",
    "sys.exit": "import sys\nsys.exit(0)\n",
    "sys.exit in the call": "import sys\ndef add(x):\n    sys.exit(0)\n",
    "sys.exit at the end": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)\n",
    "KeyboardInterrupt": "def add(x):\n    raise KeyboardInterrupt\n",
    "redefines check": "def add(x):\n    return 0\ndef check(candidate):\n    pass\n",
    "redefines assert's error": "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = Quiet\n"
    "builtins.exec = builtins.compile = lambda *a, **k: None\ndef add(x):\n    return 0\n",
    "redefines __eq__": "class Same:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def add(x):\n    return Same()\n",
    "redefines __eq__ of an int": "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def add(x):\n    return Same(0)\n",
    "redefines __class__": "class Same:\n    __class__ = int\n    def __eq__(self, other): return True\n"
    "def add(x):\n    return Same()\n",
    "patches the runner": "import sys\n"
    "for runner in [module for name, module in sys.modules.items() if name.split('.')[0] == 'runner']:\n"
    "    runner.judge = runner.be_judge = lambda *a: {{'status': 'passed', 'reason': ''}}\n"
    "    runner.encode = lambda value: {{'tuple': []}}\ndef add(x):\n    return 0\n",
    "writes to every descriptor": 'import os\nword = b\'{{"status": "passed", "reason": "", "seconds": 0, "missing": []}}\'\n'
    "for fd in range(64):\n    for text in (word, len(word).to_bytes(4, 'big') + word):\n"
    "        try: os.write(fd, text)\n        except OSError: pass\nos._exit(0)\n",
    "forges the frames of its caller": "import sys, gc\ndef add(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_locals.update(passed=True, status='passed', result=2)\n        frame = frame.f_back\n"
    "    for o in gc.get_objects():\n        if type(o) is dict and 'status' in o: o['status'] = 'passed'\n    return 0\n",
    "signals the parent": "import os, signal\ntry:\n    os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError: pass\n"
    + HONEST,
    "signals the caller": "import os, signal\ntry:\n    os.kill({caller}, signal.SIGKILL)\nexcept OSError: pass\n"
    + HONEST,
    "signals by the system call": "import ctypes\nc = ctypes.CDLL(None)\nassert c.kill({caller}, 9) == 0\n" + HONEST,
    "stops itself": "import ctypes, os\nctypes.CDLL(None).kill(os.getpid(), 19)\n" + HONEST,
    "kills itself": "import ctypes, os\nctypes.CDLL(None).kill(os.getpid(), 9)\n" + HONEST,
    "daemon thread": "import threading\ndef spin():\n    while True: pass\n"
    "threading.Thread(target=spin, daemon=True).start()\n" + HONEST,
    "daemon process": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(3600)\n"
    "    os._exit(0)\n" + HONEST,
    "background command": "import subprocess\n"
    "subprocess.Popen(['sleep', '3600'], start_new_session=True, env={{}})\n" + HONEST,
    "recursion": "def add(x):\n    return add(x)\n",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef add(x):\n    return add(x)\n",
    "crash": "import ctypes\nctypes.string_at(0)\n" + HONEST,
    "ignores signals": "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True:\n    pass\n",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n" + HONEST,
}
# Those that may go on until the time is up.
SLOW = ("endless", "sleep", "fork bomb that", "thread bomb", "stops itself", "ignores signals", "recursion without")


def others():
    """Processes that a program could have left: below this one, or of the users that programs run as."""
    found = {*descendants(os.getpid())}
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid >= 1 << 30:
                found.add(int(entry.name))
        except OSError:  # it has ended
            pass
    return found


def left_since(before):
    """Those that are new and stay; tests that run at the same time have some for a moment."""
    left, deadline = others() - before, time.monotonic() + 10
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left &= others()
    return left


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for the sandbox's own folders, and one with something to destroy beside it."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "precious").mkdir(mode=0o777)
    victim = tmp_path / "precious" / "file"
    victim.write_text("still here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return victim


@pytest.fixture(params=["namespaces", "no namespaces"])
def isolation(request, monkeypatch):
    monkeypatch.setattr(sandbox, "_NAMESPACES", request.param == "namespaces")
    return request.param


def run(program, checks=CHECKS, **kwargs):
    return run_program(program, checks, **{"timeout": 5.0, "allow_code_execution": True, **kwargs})


# Without namespaces again: all that the kernel has to stop.
AGAIN = (
    "sleep", "fork bomb", "fork bomb that leaves its session", "thread bomb", "memory bomb", "many files",
    "1 GB of output", "deletes a file", "deletes with a shell", "overwrites by the system call", "signals the caller",
    "signals by the system call", "daemon thread", "daemon process", "background command", "os._exit", "network",
)  # fmt: skip


@pytest.mark.parametrize(
    "name, isolation",
    [(name, "namespaces") for name in HOSTILE] + [(name, "no namespaces") for name in AGAIN],
    indirect=["isolation"],
)
def test_hostile_programs_fail_and_leave_nothing(name, isolation, place):
    import socket

    before = others()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        values = {"victim": str(place), "folder": str(place.parent), "caller": os.getpid()}
        program = (
            HOSTILE[name].format(**values, port=server.getsockname()[1]) if "{" in HOSTILE[name] else HOSTILE[name]
        )
        timeout = 0.5 if name.startswith(SLOW) else 5.0
        start = time.monotonic()
        verdict = run(program, timeout=timeout, memory_limit=256 << 20)
        seconds = time.monotonic() - start
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not verdict.passed and verdict.reason, verdict
    assert seconds < timeout + 5  # the interpreters' start on a busy machine included
    assert place.read_text() == "still here"
    assert not list(Path(tempfile.gettempdir()).iterdir())
    assert not left_since(before)
    if name.startswith(("endless", "sleep", "ignores signals")):
        assert verdict.status == "timed out", verdict


HONEST_PROGRAMS = {
    "plain": (HONEST, CHECKS),
    "prints": ("print('hello')\n" + HONEST, CHECKS),
    "writes a file": ("open('notes', 'w').write('x')\n" + HONEST, CHECKS),
    "temporary file": (
        "import tempfile\nwith tempfile.TemporaryDirectory() as f:\n    open(f + '/x', 'w').close()\n" + HONEST,
        CHECKS,
    ),
    "threads that end": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def add(x):\n    with ThreadPoolExecutor(2) as p:\n        return list(p.map(lambda y: y + 1, [x]))[0]\n",
        CHECKS,
    ),
    "a command that ends": ("import subprocess\nassert subprocess.run(['true']).returncode == 0\n" + HONEST, CHECKS),
    "standard library": ("import dataclasses, json, re, collections, heapq, random, statistics\n" + HONEST, CHECKS),
    "no checks": (HONEST, ""),
    "changes its argument": (
        "def f(x):\n    x.sort()\n    x.append(9)\n",
        "x = [3, 1]\nassert f(x) is None\nassert x == [1, 3, 9]",
    ),
    "raises as asked": (
        "def f(x):\n    raise KeyError(x)\n",
        "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ),
    "keyword arguments": ("def f(a, *, b):\n    return a - b\n", "assert f(5, b=3) == 2"),
    "module name": ("if __name__ == '__main__':\n    raise SystemExit\n" + HONEST, CHECKS),
}


@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_honest_programs_pass(name, place, isolation):
    verdict = run(*HONEST_PROGRAMS[name], timeout=20.0)
    assert verdict.passed and verdict.status == "passed" and verdict.reason == "", verdict
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize(
    "program, checks, reason",
    [
        ("def add(x):\n    return x\n", CHECKS, "AssertionError at `assert candidate(1) == 2`"),
        ("def add(x):\n", CHECKS, "IndentationError"),
        ("1 / 0", "", "ZeroDivisionError: division by zero"),
        ("", CHECKS, "NameError: the program defines no function 'add'"),
        ("def add(x):\n    return object()\n", CHECKS, "type object, which is not plain data"),
        ("def add(x):\n    raise ValueError('no')\n", CHECKS, "ValueError: no at `assert candidate(1) == 2`"),
        (HONEST, "assert (", "the checks cannot be compiled"),
    ],
)
def test_a_failure_says_why(program, checks, reason):
    verdict = run(program, checks)
    assert verdict.status == "failed"
    assert reason in verdict.reason


def test_limits_hold(place, isolation):
    limits = "import resource\ndef f(name):\n    return resource.getrlimit(getattr(resource, name))[1]\n"
    checks = (
        "assert f('RLIMIT_AS') == 300 << 20 and f('RLIMIT_CPU') == 5 and f('RLIMIT_CORE') == 0\n"
        "assert f('RLIMIT_FSIZE') == 1 << 20"
    )
    verdict = run(limits, checks, timeout=4.0, memory_limit=300 << 20, file_limit=1 << 20)
    assert verdict.passed, verdict
    spawn = "import os\ndef f():\n    pids = [os.fork() for _ in range({})]\n    return len(pids)\n"
    verdict = run(spawn.format(5), "assert f() == 5", timeout=1.0, max_processes=2)
    assert verdict.status == "failed" and "BlockingIOError" in verdict.reason


def test_the_environment_is_empty_and_the_folder_too(place, isolation, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = (
        "import os, sys\n"
        "def f():\n    return sorted(os.environ), os.listdir(), sys.stdin.read(), sys.path, os.getcwd(), sys.argv\n"
        "def fds():\n    return sorted(os.listdir('/proc/self/fd'))\n"
    )
    checks = (
        "names, files, text, path, cwd, argv = f()\n"
        "assert 'HF_TOKEN' not in names and len(names) <= 8, names\n"
        f"assert files == [] and text == '' and cwd.startswith({tempfile.gettempdir()!r}), (files, text, cwd)\n"
        f"assert {str(Path(sandbox.__file__).parent)!r} not in path and '' not in path, path"
    )
    verdict = run(program, checks)
    assert verdict.passed, verdict


def test_a_program_sees_the_runner_but_cannot_import_more_of_it():
    program = (
        "import importlib, sys\n"
        "def loaded():\n    return sorted(name for name in sys.modules if name.split('.')[0] == 'runner')\n"
        "def found(name):\n"
        "    try:\n        return importlib.import_module(name) is not None\n    except ImportError:\n        return False\n"
    )
    folder = Path(sandbox.__file__).parent
    inside = {path.stem for path in (folder / "runner").glob("[!_]*.py")}
    beside = {path.stem for path in folder.iterdir() if path.stem[0].isalpha()} - {"runner"}
    strange = sorted({*inside, *beside, "evaluation", "runner.runner"} - {"program"})  # the program's own name
    checks = (
        f"assert loaded() == {sorted(['runner', *(f'runner.{name}' for name in inside)])}, loaded()\n"
        f"assert [name for name in {strange} if found(name)] == []"
    )
    verdict = run(program, checks)
    assert verdict.passed, verdict


def test_a_program_is_another_user_without_capabilities_if_the_caller_is_root(place, isolation):
    if os.geteuid() != 0:
        pytest.skip("only root can change the user")
    program = "import os\ndef f():\n    return os.getresuid(), os.getgroups(), open('/proc/self/status').read()\n"
    checks = (
        "users, groups, status = f()\n"
        "assert len({*users}) == 1 and users[0] >= 1 << 30 and groups == []\n"
        "fields = dict(line.split(':', 1) for line in status.splitlines())\n"
        "assert int(fields['CapEff'], 16) & ~4 == int(fields['CapPrm'], 16) & ~4 == 0, fields\n"
        "assert fields['NoNewPrivs'].strip() == '1'"
    )
    verdict = run(program, checks)
    assert verdict.passed, verdict


def test_what_is_missing_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "_NAMESPACES", False)
    sandbox._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_phibalance"):
        run(HONEST)
        run(HONEST)
    lines = [record.getMessage() for record in caplog.records if "isolation" in record.getMessage()]
    assert len(lines) == 1 and "no process and network namespaces" in lines[0]
    sandbox._warn_once.cache_clear()


def test_off_unless_allowed(monkeypatch, tmp_path):
    monkeypatch.delenv(sandbox.CODE_EVAL_VARIABLE, raising=False)
    for word in (None, "", "0", "no"):
        if word is not None:
            monkeypatch.setenv(sandbox.CODE_EVAL_VARIABLE, word)
        with pytest.raises(CodeExecutionError, match=r"HF_ALLOW_CODE_EVAL=1 or pass allow_code_execution=True"):
            run_program(HONEST)
    monkeypatch.setenv(sandbox.CODE_EVAL_VARIABLE, "1")
    assert run_program(HONEST).passed
    with pytest.raises(CodeExecutionError):
        run_program(HONEST, allow_code_execution=False)


@pytest.mark.parametrize("name", ["timeout", "memory_limit", "max_processes", "file_limit"])
def test_limits_have_to_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0: a limit has to be positive"):
        run(HONEST, **{name: 0})


def test_nothing_outlives_the_caller(place):
    """A caller that is killed takes its programs along."""
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(3600)\n"
    package = str(Path(sandbox.__file__).parent.parent)  # on the path, so that it starts without importing torch
    code = f"import sys\nsys.path.append({package!r})\nfrom evaluation import run_program\n"
    code += f"run_program({program!r}, timeout=60, allow_code_execution=True)"
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": tempfile.gettempdir()})
    try:
        deadline = time.monotonic() + 60
        while len(others_below := {*descendants(caller.pid)}) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(others_below) >= 5  # supervisor, judge, keeper, two of the program
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 5
    while (left := others_below & {*processes()}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_a_name_of_the_context_is_the_programs_only_where_asked():
    context = "def helper(x):\n    return x * 2\ndef add(x):\n    '''Adds one.'''\n"
    program = "def helper(x):\n    return 0\n" + HONEST
    checks = "assert helper(3) == 6\nassert add(1) == 2"
    assert run(program, checks, context=context, entry_points=["add"]).passed
    assert "assert helper(3) == 6" in run(program, "assert helper(3) == 6", context="def unfinished(").reason
