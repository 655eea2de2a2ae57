"""Runs code in a new process without importing everything again: forks it from a process that has the imports."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from invariance import IMPORTED


def run_script(script, *arguments, cwd=None, env=None, timeout=300):
    """Like `subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)`, but faster."""
    return call(_run, str(script), [*map(str, arguments)], cwd=cwd, env=env, timeout=timeout)


def call(function, *args, cwd=None, env=None, timeout=300):
    """Runs `function(*args)` of an importable module. Returns its process's exit code and output."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        place = [*map(str, files)], str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        process = multiprocessing.get_context("forkserver").Process(target=_begin, args=(*place, function, args))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(function.__name__, timeout)
        written = [file.read_text(errors="replace") if file.is_file() else "" for file in files]
    return subprocess.CompletedProcess([function.__name__, *args], process.exitcode, *written)


def _begin(files, cwd, env, function, args):
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    function(*args)


def _run(script, arguments):
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
