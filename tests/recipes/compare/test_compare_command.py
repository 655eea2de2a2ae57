"""The command of the comparison from end to end."""

import json
import os
import signal
import threading
import time

import psutil


PLAN = """
defaults: {models: [mixtral], streams: [mixed], steps: 12, rows: 3, window: 16, vocab_size: 300, validation_windows: 12}
plans:
  micro:
    question: Does it run?
    seeds: [0, 1]
    methods: [{label: φ bias, coef: 0.0, bias_coef: 0.01}]
"""


def test_micro_plan_whose_worker_is_killed(house, tmp_path, monkeypatch, capsys):
    """The command from end to end: its worker is killed in the first run; then nothing is left to do."""
    compare, workers, documents = house["command"], house["workers"], house["documents"]
    sources = documents._python_sources
    monkeypatch.setattr(documents, "_python_sources", lambda: sources()[:40])  # less to read
    (tmp_path / "plans.yaml").write_text(PLAN)
    killed = []
    array = workers.RawArray

    def watched(kind, count):
        steps_done = array(kind, count)

        def kill():
            while not any(steps_done):
                time.sleep(0.01)
            for child in psutil.Process().children(recursive=True):
                if child.ppid() != os.getpid():  # the server that forks the workers is ours, they are its children
                    killed.append(child.pid)
                    os.kill(child.pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        return steps_done

    monkeypatch.setattr(workers, "RawArray", watched)
    command = [str(tmp_path / "plans.yaml"), "--data", "built-in", "--output_dir", str(tmp_path / "out")]
    assert compare.main(command) == 0
    assert len(killed) == 1
    said = capsys.readouterr().out
    assert "2 runs, 0 of them finished" in said and "A worker was killed" in said
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["seed"] for line in lines] == [0, 1]
    table = (tmp_path / "out" / "micro.md").read_text()
    assert table.startswith("# Does it run?") and "| φ bias | 2 |" in table
    for name in ("frontier", "curves", "experts"):
        assert (tmp_path / "out" / f"micro-mixtral-{name}.png").stat().st_size > 5000

    monkeypatch.setattr(workers, "RawArray", None)  # no pool is needed any more
    assert compare.main(command) == 0
    assert "2 of them finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.jsonl").read_text().splitlines() == lines
    (tmp_path / "out" / "micro.md").unlink()
    monkeypatch.setattr(house["corpus"], "read_documents", None)  # tables need no text
    assert compare.main([*command, "--tables", "--seeds", "1"]) == 0
    assert "| φ bias | 1 |" in (tmp_path / "out" / "micro.md").read_text()
