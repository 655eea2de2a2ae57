"""Ten kills by tests/helpers/crash.py: the runs end as the untouched one, bit for bit."""

import json
import os
import subprocess
import sys

from paths import ROOT


def test_killed_runs_end_as_the_untouched_one(tmp_path):
    """One process and two, each killed once in a step, before the duals move, and while files are written; a full disk."""
    moments = ["backward", "update", "checkpoint", "state", "disk"]
    script = [
        sys.executable,
        ROOT / "tests/helpers/crash.py",
        "--kills",
        "1",
        "--json",
        tmp_path / "tallies.json",
    ]
    process = subprocess.run(
        [*script, "--moments", *moments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    tallies = json.loads((tmp_path / "tallies.json").read_text())
    assert [(tally["moment"], tally["ranks"]) for tally in tallies] == [
        (m, ranks) for ranks in (1, 2) for m in moments
    ]
    assert [(tally["kills"], tally["faults"]) for tally in tallies] == [(1, [])] * 10
    assert all(tally["identical"] == tally["runs"] >= 1 for tally in tallies)
    assert any(tally["unfinished"] for tally in tallies)
