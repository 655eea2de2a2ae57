"""Generated code: hostile programs fail, in time, and leave no process and no file; right ones pass."""

import collections
import decimal
import fractions
import importlib.util
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from hf_phibalance.evaluation import CodeExecutionError, require_sandbox, run_program, sandbox
from hf_phibalance.evaluation.runner import Codec


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated code is only run on Linux")

CHECKS = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(41) == 42\ncheck(add)"
HONEST = "def add(x):\n    return x + 1\n"
CTYPES = "import ctypes, os, threading, time\nc = ctypes.CDLL(None)\n"
CTYPES += "EXIT, KEYCTL, TRACE = (60, 250, 101) if os.uname().machine == 'x86_64' else (93, 219, 117)\n"

# Each does harm to {victim}, {folder} or {caller}. Those that do not define `add` then answer rightly, if they still can.
HOSTILE = {
    "endless loop": "while True:\n    pass\n",
    "endless loop in the call": "def add(x):\n    while True:\n        pass\n",
    "endless loop that catches all": "def add(x):\n    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass\n",
    "sleep": "import time\ntime.sleep(3600)\n",
    "input": "input()\n",
    "fork bomb": "import os\nwhile True:\n    os.fork()\n",
    "fork bomb that catches": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError: pass\n",
    "fork bomb that leaves its session": "import os\nfor _ in range(100):\n    try:\n        if os.fork() == 0:\n            os.setsid()\n"
    "    except OSError: pass\nimport time\ntime.sleep(60)\n",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()\n",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n",
    "large file": "import os\nwith open('x', 'wb') as file:\n    for _ in range(1024):\n        file.write(bytes(1 << 20))\n",
    "many files": "for i in range(1 << 20):\n    with open(str(i), 'wb') as file:\n        file.write(bytes(1 << 20))\n",
    "1 GB of output": "for _ in range(1024):\n    print('x' * (1 << 20))\n",
    "1 GB of output that catches": "import os\nfor _ in range(1024):\n    try:\n        os.write(1, b'x' * (1 << 20))\n"
    "    except OSError: pass\n",
    "1 GB of errors": "import sys\nfor _ in range(1024):\n    sys.stderr.write('x' * (1 << 20))\n",
    "1 GB of answer": "def add(x):\n    return 'x' * (1 << 30)\n",
    "deletes a file": "import os\ntry:\n    os.remove({victim!r})\nexcept OSError: pass\n",
    "deletes a folder": "import shutil\nshutil.rmtree({folder!r}, ignore_errors=True)\n",
    "deletes with a shell": "import os\nif os.system('rm -rf ' + {folder!r}):\n    raise OSError\n",
    "overwrites a file": "try:\n    open({victim!r}, 'w').close()\nexcept OSError: pass\n",
    "overwrites by the system call": "import ctypes\nc = ctypes.CDLL(None)\nfd = c.open({victim!r}.encode(), 1)\nassert fd >= 0\n"
    "c.ftruncate(fd, 0)\n",
    "os._exit": "import os\nos._exit(0)\n",
    "os._exit in the call": "import os\ndef add(x):\n    os._exit(0)\n",
    "sys.exit": "import sys\nsys.exit(0)\n",
    "sys.exit in the call": "import sys\ndef add(x):\n    sys.exit(0)\n",
    "sys.exit at the end": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)\n",
    "KeyboardInterrupt": "def add(x):\n    raise KeyboardInterrupt\n",
    "redefines check": "def add(x):\n    return 0\ndef check(candidate):\n    pass\n",
    "redefines assert's error": "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = Quiet\n"
    "builtins.exec = builtins.compile = lambda *a, **k: None\ndef add(x):\n    return 0\n",
    "redefines __eq__": "class Same:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef add(x):\n    return Same()\n",
    "redefines __eq__ of an int": "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef add(x):\n"
    "    return Same(0)\n",
    "redefines __class__": "class Same:\n    __class__ = int\n    def __eq__(self, other): return True\ndef add(x):\n    return Same()\n",
    "patches the runner": "import sys\nrunner = sys.modules['__main__']\nrunner.judge = lambda *a: ''\n"
    "runner.Codec.encode = lambda *a: {{'tuple': []}}\ndef add(x):\n    return 0\n",
    "writes to every descriptor": "import os\nfor fd in range(64):\n    try: os.write(fd, b'\"\"')\n    except OSError: pass\nos._exit(0)\n",
    "forges the frames of its caller": "import sys, gc\ndef add(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_locals.update(passed=True, reason='', result=2)\n        frame = frame.f_back\n"
    "    for o in gc.get_objects():\n        if type(o) is dict and 'reason' in o: o['reason'] = ''\n"
    "    return 0\n",
    "signals the parent": "import os, signal\ntry:\n    os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError: pass\n",
    "signals the caller": "import os, signal\ntry:\n    os.kill({caller}, signal.SIGKILL)\nexcept OSError: pass\n",
    "signals by the system call": "import ctypes\nc = ctypes.CDLL(None)\nassert c.kill({caller}, 9) == 0\n",
    "stops itself": "import ctypes, os\nctypes.CDLL(None).kill(os.getpid(), 19)\n",
    "kills itself": "import ctypes, os\nctypes.CDLL(None).kill(os.getpid(), 9)\n",
    "daemon thread": "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()\n",
    "daemon process": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(3600)\n"
    "    os._exit(0)\n",
    "background command": "import subprocess\nsubprocess.Popen(['sleep', '3600'], start_new_session=True, env={{}})\n",
    "recursion": "def add(x):\n    return add(x)\n",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef add(x):\n    return add(x)\n",
    "crash": "import ctypes\nctypes.string_at(0)\n",
    "ignores signals": "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True:\n    pass\n",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n",
    "network, caught": "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError: pass\n",
    "network by name, caught": "import socket\ntry: socket.create_connection(('example.com', 80), 1)\nexcept OSError: pass\n",
    "main thread ends by its system call": CTYPES
    + "threading.Thread(target=time.sleep, args=(3600,)).start()\nc.syscall(EXIT, 0)\n",
    "main thread ends, another answers": CTYPES + "def answer():\n    time.sleep(0.2)\n    for fd in range(3, 300):\n"
    "        try: os.write(fd, b'{{}}\\n' + b''.join(b'{{\"value\": %d, \"changed\": []}}\\n' % n for n in (2, 42)))\n"
    "        except OSError: pass\n    time.sleep(3600)\nthreading.Thread(target=answer).start()\n"
    "c.syscall(EXIT, 0)\n",
    "child traces the program": CTYPES
    + "pid = os.getpid()\nif os.fork() == 0:\n    c.ptrace(16, pid, 0, 0)\n    time.sleep(3600)\ntime.sleep(0.2)\n",
    "child stops the program": CTYPES
    + "pid = os.getpid()\nif os.fork() == 0:\n    c.kill(pid, 19)\n    os._exit(0)\ntime.sleep(0.2)\n",
    "System V shared memory": CTYPES + "assert c.shmget(0, 384 << 20, 0o1600) >= 0\n",
    "memfd": "import os\nos.truncate(os.memfd_create('x'), 190 << 20)\n",
    "session keyring": CTYPES + "assert c.syscall(KEYCTL, 0, -3, 0) >= 0\n",
    "a socket that no namespace holds": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n",
    "reads the judge's memory": CTYPES + "name = b'/proc/%d/' % os.getppid()\n"
    "assert max(c.open(name + end, mode) for end in (b'mem', b'maps', b'environ') for mode in (0, 2)) >= 0\n",
    "writes to the judge's descriptors": CTYPES
    + "name = b'/proc/%d/fd/%d'\nassert max(c.open(name % (os.getppid(), fd), 1) for fd in range(64)) >= 0\n",
    "traces the judge": CTYPES + "assert c.syscall(TRACE, 16, os.getppid(), 0, 0) == 0\n",
    "kills the judge": CTYPES + "c.kill(os.getppid(), 9)\ntime.sleep(3600)\n",
    "interrupts the judge": CTYPES + "c.kill(os.getppid(), 2)\n",
    "stops the judge": CTYPES + "c.kill(os.getppid(), 19)\n",
    "new user namespace": CTYPES + "assert c.unshare(0x10000000) == 0\n",
    "memory of its first process": CTYPES + "assert c.open(b'/proc/1/mem', 2) >= 0\n",
    "writes beside its folders": CTYPES
    + "assert max(c.open(path, 0o101, 0o600) for path in (b'/x', b'/dev/x', b'/usr/x', b'/runner/x', b'/root/x')) >= 0\n",
    "reads a file of the caller": "assert open({victim!r}).read()\n",
    "becomes root": "import os\nos.setuid(0)\n",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n",
    "70 MB of answer": "def add(x):\n    return 'x' * (70 << 20)\n",
    "half an answer": "import os, time\nfor fd in range(3, 300):\n    try: os.write(fd, b'{{')\n    except OSError: pass\n"
    "time.sleep(3600)\n",
    "no JSON": "import os\nfor fd in range(3, 300):\n    try: os.write(fd, b'[' * 50000 + b'\\n')\n"
    "    except OSError: pass\n",
    "a deep answer": "def add(x):\n    for _ in range(1 << 20): x = [x]\n    return x\n",
    "a surrogate": "raise ValueError(chr(0xd800))\n",
    "a surrogate in the source": "x = '\ud800'\n",
    "escapes and newlines": "raise ValueError('\\x1b[31m\\n\\r\\u2028' + 'x' * (1 << 20))\n",
    "an exception without words": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E\n",
}
# Those that may go on until the time is up.
SLOW = (
    "endless", "sleep", "fork bomb that", "thread bomb", "stops", "ignores signals", "recursion without",
    "main thread ends by", "child stops", "half an answer",
)  # fmt: skip


def others():
    """Processes that a program could have left: below this one, or of the users that programs run as."""
    found = {process.pid for process in psutil.Process().children(recursive=True)}
    everything = psutil.process_iter(["uids"])
    return found | {
        process.pid for process in everything if process.info["uids"] and process.info["uids"].real >= 1 << 30
    }


def left_since(before):
    """Those that are new and stay; tests that run at the same time have some for a moment."""
    left, deadline = others() - before, time.monotonic() + 10
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left &= others()
    return left


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A file to destroy, in a folder that all may change, and another folder for the sandbox's own files."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious").chmod(0o777)
    victim = tmp_path / "precious" / "file"
    victim.write_text("still here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return victim


def run(program, checks=CHECKS, **kwargs):
    return run_program(program, checks, **{"timeout": 5.0, "allow_code_execution": True, **kwargs})


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_and_leave_nothing(name, victim):
    before = others()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        values = {"victim": str(victim), "folder": str(victim.parent), "caller": os.getpid()}
        program = HOSTILE[name]
        program += "" if "def add(" in program else HONEST
        if "{" in program:
            program = program.format(**values, port=server.getsockname()[1])
        timeout = 0.5 if name.startswith(SLOW) else 5.0
        start = time.monotonic()
        verdict = run(program, timeout=timeout, memory_limit=256 << 20)
        seconds = time.monotonic() - start
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not verdict.passed and verdict.reason, verdict
    assert len(verdict.reason) <= 200 and verdict.reason.isprintable() and json.dumps(verdict.to_dict()).encode()
    assert seconds < timeout + 5  # the interpreters' start on a busy machine included
    assert victim.read_text() == "still here"
    assert not list(Path(tempfile.gettempdir()).iterdir())
    assert not left_since(before)
    if name.startswith(("endless", "sleep", "ignores signals", "main thread ends by")):
        assert verdict.status == "timed out", verdict
    if name == "kills itself":
        assert "SIGKILL" in verdict.reason


HONEST_PROGRAMS = {
    "plain": (HONEST, CHECKS),
    "prints": ("print('hello')\n" + HONEST, CHECKS),
    "writes files": (
        "import os, pathlib, tempfile\nopen('notes', 'w').write('x')\n"
        "with tempfile.TemporaryDirectory() as f:\n    open(f + '/x', 'w').close()\n"
        "for p in ('/tmp/x', '/dev/shm/x', '/dev/null'):\n    open(p, 'w').write('x')\nos.remove('/tmp/x')\n"
        "pathlib.Path.home().joinpath('a/b').mkdir(parents=True)\n" + HONEST,
        CHECKS,
    ),
    "threads that end": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def add(x):\n    with ThreadPoolExecutor() as p:\n        return list(p.map(lambda y: y + 1, [x] * 9))[0]\n",
        CHECKS,
    ),
    "multiprocessing.Pool": (
        "from multiprocessing import Pool\ndef more(x):\n    return x + 1\n"
        "def add(x):\n    with Pool() as p:\n        return p.map(more, [x])[0]\n",
        CHECKS,
    ),
    "subprocess with a time-out": (
        "import subprocess\ndef add(x):\n    try:\n        subprocess.run(['sleep', '60'], timeout=0.1)\n"
        "    except subprocess.TimeoutExpired:\n        return x + 1\n",
        CHECKS,
    ),
    "a command that ends": ("import subprocess\nassert subprocess.run(['true']).returncode == 0\n" + HONEST, CHECKS),
    "standard library": ("import dataclasses, json, re, collections, heapq, random, sqlite3, ssl\n" + HONEST, CHECKS),
    "pandas": ("import pandas\ndef add(x):\n    return pandas.Series([x, 1]).sum()\n", CHECKS),
    "sklearn": ("import sklearn.linear_model\n" + HONEST, CHECKS),
    "no checks": (HONEST, ""),
    "changes its argument": (
        "def f(x):\n    x.sort()\n    x.append(9)\n",
        "x = [3, 1]\nassert f(x) is None\nassert x == [1, 3, 9]",
    ),
    "changes its arguments by keyword and nested": (
        "def f(a, *, b):\n    a[0]['x'].append(1)\n    b.add(2)\n    return a\n",
        "x = []\na = ({'x': x}, x)\nb = set()\nassert f(a, b=b)[1] is x\nassert x == [1] and b == {2}",
    ),
    "leaves its arguments": (
        "def f(a):\n    a.pop(0)\n",
        "x, y = [1], [2]\na = [x, y]\nf(a)\nassert a[0] is y and (x, y) == ([1], [2])",
    ),
    "raises as asked": (
        "def f(x):\n    raise KeyError(x)\n",
        "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ),
    "keyword arguments": ("def f(a, *, b):\n    return a - b\n", "assert f(5, b=3) == 2"),
    "module name": ("if __name__ == '__main__':\n    raise SystemExit\n" + HONEST, CHECKS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST_PROGRAMS)
def test_honest_programs_pass(name, victim):
    if name in ("pandas", "sklearn") and not importlib.util.find_spec(name):
        pytest.skip(f"needs {name}")
    verdict = run(*HONEST_PROGRAMS[name], timeout=30.0)
    assert verdict.passed and verdict.status == "passed" and verdict.reason == "", verdict
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.slow
def test_an_ordinary_user_gets_the_same():
    """The tests above again, by a user that is not root."""
    if os.geteuid() != 0:
        pytest.skip("the tests above were run by such a user")
    base = Path(sys.base_prefix)
    command = [shutil.which("bwrap"), "--dev-bind", "/", "/", "--die-with-parent", "--cap-add", "ALL"]
    if closed := [parent for parent in reversed(base.parents) if not parent.stat().st_mode & 0o001]:
        command += ["--perms", "0755", "--tmpfs", str(closed[0])]
        for folder in base.parents[-1 - len(closed[0].parents) :: -1]:
            command += ["--dir", str(folder)]
        command += ["--ro-bind", str(base), str(base)]
    command += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", sys.executable]
    trial = subprocess.run([*command, "-c", "import pytest, psutil, hf_phibalance.evaluation"], capture_output=True)
    if trial.returncode:
        pytest.skip(f"no ordinary user can run this here: {trial.stderr.decode()[-300:]}")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        options = ["-qp", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/own", "-k", "hostile or honest"]
        done = subprocess.run([*command, "-m", "pytest", *options, __file__], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(HOSTILE) + len(HONEST_PROGRAMS)} passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, checks, reason",
    [
        ("def add(x):\n    return x\n", CHECKS, "AssertionError at `assert candidate(1) == 2`"),
        ("def add(x):\n", CHECKS, "IndentationError"),
        ("1 / 0", "", "ZeroDivisionError: division by zero"),
        ("", CHECKS, "NameError: the program defines no function 'add'"),
        ("def add(x):\n    return object()\n", CHECKS, "type object, which is not plain data"),
        ("def add(x):\n    raise ValueError('no')\n", CHECKS, "ValueError: no at `assert candidate(1) == 2`"),
        (HONEST, "assert (", "SyntaxError: '(' was never closed (<checks>, line 1)"),
        ("import os\nos._exit(3)", "try:\n    add(1)\nexcept:\n    pass", "checks were done (exit status 3)"),
    ],
)
def test_a_failure_says_why(program, checks, reason):
    verdict = run(program, checks)
    assert verdict.status == "failed"
    assert reason in verdict.reason


@pytest.mark.slow
def test_limits_hold(victim):
    limits = "import resource\ndef f(name):\n    return resource.getrlimit(getattr(resource, name))[0]\n"
    checks = (
        "assert f('RLIMIT_AS') == 300 << 20 and f('RLIMIT_CPU') == 5 and f('RLIMIT_CORE') == 0\n"
        "assert f('RLIMIT_FSIZE') == 1 << 20"
    )
    verdict = run(limits, checks, timeout=4.0, memory_limit=300 << 20, file_limit=1 << 20)
    assert verdict.passed, verdict
    spawn = (
        "import os, time\ndef f(n):\n    for _ in range(n):\n        if os.fork() == 0:\n            time.sleep(9)\n"
    )
    for number, error in ((3, "left threads or processes"), (4, "BlockingIOError")):
        verdict = run(spawn, f"f({number})", timeout=2.0, max_processes=4)
        assert verdict.status == "failed" and error in verdict.reason
    fill = "import os\nfor n in range(9):\n    open({!r} + str(n), 'wb').write(bytes(300_000))\n"
    for folder in ("/tmp/", "/dev/shm/", ""):
        assert "No space left" in run(fill.format(folder), file_limit=1 << 20).reason


def test_the_environment_is_empty_and_the_folder_too(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = (
        "import os, sys\n"
        "def f():\n    return sorted(os.environ), os.listdir(), sys.stdin.read(), sys.path, os.getcwd(), sys.argv\n"
        "def files():\n    return [os.path.realpath('/proc/self/fd/' + n) for n in os.listdir('/proc/self/fd')]\n"
    )
    checks = (
        "names, files_there, text, path, cwd, argv = f()\n"
        "assert 'HF_TOKEN' not in names and len(names) <= 10, names\n"
        "assert files_there == [] and text == '' and cwd.startswith('/tmp/'), (files_there, text, cwd)\n"
        f"assert {str(Path(sandbox.__file__).parent)!r} not in path and '/' not in path and '' not in path, path\n"
        "assert len([name for name in files() if name.startswith('/proc')]) <= 3, files()  # pipes and the folder itself"
    )
    verdict = run(program, checks)
    assert verdict.passed, verdict


def test_nothing_can_be_read_but_the_interpreter(tmp_path):
    """Neither private files, nor the checks in the metric's files, nor homes, nor this project."""
    private = tmp_path / "private"
    private.write_text("secret")
    private.chmod(0o600)
    places = [str(private), str(tmp_path), __file__, sandbox.__file__, str(Path.home() / ".bashrc"), "/etc/passwd"]
    program = "import os\ndef f(path):\n    return os.path.exists(path)\n"
    verdict = run(program, f"seen = [path for path in {places} if f(path)]\nassert seen == [], seen")
    assert verdict.passed, verdict


def test_a_program_is_another_user_without_capabilities():
    program = "import os\ndef f():\n    return os.getresuid(), os.getgroups(), open('/proc/self/status').read()\n"
    users = "users[0] >= 1 << 30 and groups == []" if os.geteuid() == 0 else "users[0] == 65534"
    checks = (
        f"users, groups, status = f()\nassert len({{*users}}) == 1 and {users}\n"
        "fields = dict(line.split(':', 1) for line in status.splitlines())\n"
        "assert int(fields['CapEff'], 16) == int(fields['CapPrm'], 16) == 0, fields\n"
        "assert fields['NoNewPrivs'].strip() == '1' and fields['Seccomp'].strip() == '2'"
    )
    verdict = run(program, checks)
    assert verdict.passed, verdict


def test_off_unless_allowed(monkeypatch):
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


@pytest.fixture
def untried():
    sandbox._try_sandbox.cache_clear()
    yield
    sandbox._try_sandbox.cache_clear()


@pytest.mark.parametrize(
    "fake, reason",
    [
        (None, "there is no `bwrap`"),
        ("echo bwrap: No permissions to create new namespace >&2; exit 1", "No permissions to create new namespace"),
    ],
)
def test_without_bubblewrap_nothing_is_run(fake, reason, tmp_path, monkeypatch, untried):
    if fake:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{fake}\n")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (require_sandbox, lambda **kwargs: run_program(HONEST, **kwargs)):
        with pytest.raises(CodeExecutionError, match=f"{reason}(.|\n)*apt install bubblewrap(.|\n)*sysctl"):
            call(allow_code_execution=True)


def test_walls_that_do_not_limit_processes_are_refused(monkeypatch, untried):
    if os.geteuid() != 0:
        pytest.skip("only root is not limited where its user stays the same")
    monkeypatch.setattr(sandbox, "_unused_user", lambda: None)
    with pytest.raises(CodeExecutionError, match="with a limit of 4 processes 9 could run"):
        require_sandbox(allow_code_execution=True)


@pytest.mark.parametrize("system, name", [("darwin", "macOS"), ("win32", "Windows")])
def test_other_systems_are_named(system, name, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(CodeExecutionError, match=name):
        require_sandbox(allow_code_execution=True)
    if name == "Windows":
        with pytest.raises(CodeExecutionError, match=name):
            require_sandbox(allow_code_execution=True, unsafe=True)


@pytest.mark.slow
def test_unsafe_has_limits_on_time_and_memory_and_a_loud_warning(victim, caplog):
    sandbox._warn_of_no_sandbox.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_phibalance"):
        for name in ("plain", "multiprocessing.Pool", "changes its argument"):
            assert run(*HONEST_PROGRAMS[name], timeout=30.0, unsafe=True).passed
        for name in ("endless loop in the call", "main thread ends by its system call", "child stops the program"):
            assert run(HOSTILE[name], timeout=0.5, unsafe=True).status == "timed out"
        assert "MemoryError" in run(HOSTILE["memory bomb"], memory_limit=256 << 20, unsafe=True).reason
        nested = "import os\nfor _ in range(1100):\n    os.mkdir('x')\n    os.chdir('x')\n"
        assert run(nested, "", unsafe=True).passed
    assert [record.levelname for record in caplog.records if "UNSAFE" in record.getMessage()] == ["WARNING"]
    assert not list(Path(tempfile.gettempdir()).iterdir())
    with pytest.raises(CodeExecutionError, match="HF_ALLOW_CODE_EVAL"):
        run(HONEST, allow_code_execution=False, unsafe=True)


@pytest.mark.parametrize("name", ["timeout", "memory_limit", "max_processes", "file_limit"])
def test_limits_have_to_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0: a limit has to be positive"):
        run(HONEST, **{name: 0})


PACKAGE = str(Path(sandbox.__file__).parent.parent)  # on the path, so that `evaluation` starts without torch


@pytest.mark.slow
def test_nothing_outlives_the_caller(victim):
    """A caller that is killed takes its programs along."""
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(3600)\n"
    code = f"import sys\nsys.path.append({PACKAGE!r})\nfrom evaluation import require_sandbox, run_program\n"
    code += f"require_sandbox(True)\nprint('tried', flush=True)\nrun_program({program!r}, timeout=60, allow_code_execution=True)"
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    caller = psutil.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert caller.stdout.readline() == b"tried\n"
    try:
        deadline = time.monotonic() + 60
        while len(below := caller.children(recursive=True)) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(below) == 5  # two of bwrap, the judge, the program and its child
    finally:
        caller.kill()
        caller.wait()
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_it_can_be_imported_where_these_modules_do_not_exist():
    code = f"import psutil, os, sys\nsys.path.append({PACKAGE!r})\nsys.modules.update(fcntl=None, resource=None, pwd=None)\n"
    code += "del os.sched_getaffinity\nsys.platform = 'win32'\nimport evaluation\nevaluation.require_sandbox"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_of_the_context_is_the_programs_only_where_asked():
    context = "def helper(x):\n    return x * 2\ndef add(x):\n    '''Adds one.'''\n"
    program = "def helper(x):\n    return 0\n" + HONEST
    checks = "assert helper(3) == 6\nassert add(1) == 2"
    assert run(program, checks, context=context, entry_points=["add"]).passed
    assert "assert helper(3) == 6" in run(program, "assert helper(3) == 6", context="def unfinished(").reason


# ---------------------------------------------------------------------- values on their way to the checks


def cross(value):
    return Codec().decode(json.loads(json.dumps(Codec().encode(value))))


def test_values_cross_unchanged():
    values = [
        None, True, 0, -(1 << 63), 1 << 200, -0.0, 1e-308, math.inf, "ü\ud800\0", b"\0\xff", bytearray(b"x"), 1 + 2j,
        [], [1, [2.5, "x"]], (), (1, (2,)), {1, 2}, frozenset("ab"), {(1, 2): {"x": [None]}, 3: 4}, range(1, 9, 3),
        collections.deque([1, 2]), decimal.Decimal("1.10"), fractions.Fraction(1, 3),
    ]  # fmt: skip
    for value in values:
        again = cross(value)
        assert again == value and type(again) is type(value)
        # -0.0 == 0.0 and True == 1, so what is printed must agree too; a set prints its members in any order.
        assert isinstance(value, (set, frozenset)) or repr(again) == repr(value)
    assert math.isnan(cross(math.nan))
    for lazy in (iter([1, 2]), (x for x in [1, 2]), map(int, "12"), {1: 0, 2: 0}.keys(), {0: 1, 1: 2}.values()):
        assert list(cross(lazy)) == [1, 2]
    assert type(cross(collections.Counter("aab"))) is dict
    with pytest.raises(TypeError, match="type object"):
        cross([object()])
    shared = [1]
    shared.append(shared)
    first, second = cross((shared, {"x": shared}))
    assert second["x"] is first and first[1] is first


@pytest.mark.parametrize(
    "forged", [{"same": 0}, {"eval": ["1"]}, {"list": 1}, {"set": [{"list": []}]}, {}, {"a": 1, "b": 2}]
)
def test_what_nobody_encoded_is_refused(forged):
    with pytest.raises((LookupError, TypeError, ValueError)):
        Codec().decode(forged)
