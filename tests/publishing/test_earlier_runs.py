"""
The results folder of an earlier version loads with its figures.

`written_by_0_1_0/` was written by `Run.save` of hf_phibalance 0.1.0 after four steps of a tiny Mixtral of two layers;
`expected.json` beside it holds what that version said of it.
"""

import json
from pathlib import Path

from hf_phibalance.publishing import Run


WRITTEN = Path(__file__).parent / "written_by_0_1_0"


def test_a_run_loads_and_makes_the_round_trip(tmp_path):
    expected = json.loads((WRITTEN / "expected.json").read_text())
    run = Run.load(WRITTEN)
    assert run.name == expected["name"] and run.layers() == expected["layers"]
    assert run.series("moe/max_vio") == [tuple(point) for point in expected["max_vio"]]
    assert run.summary["held_out"] == expected["held_out"]
    run.save(tmp_path)
    for name in ("metrics.json", "history.json"):
        assert (tmp_path / name).read_text() == (WRITTEN / name).read_text()
