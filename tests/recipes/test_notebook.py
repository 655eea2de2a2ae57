"""`recipes/notebooks/quickstart.ipynb` runs as it stands and shows what it promises."""

import json

import matplotlib
import pytest
import transformers
from paths import ROOT

import hf_phibalance as phb


NOTEBOOK = ROOT / "recipes" / "notebooks" / "quickstart.ipynb"
pytestmark = pytest.mark.slow


def test_the_notebook_runs_and_the_loads_become_even(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "strip the outputs before a commit"
            exec("".join(cell["source"]), names)
    before, after = names["before"], names["after"]
    assert after["eval_moe/max_vio"] < 0.3 < 0.8 < before["eval_moe/max_vio"]
    assert after["eval_loss"] < before["eval_loss"]
    assert "100 steps of balancing are remembered" in capsys.readouterr().out
    assert names["report"].kept == "folded" and names["report"].loss_increase() <= 0.01
    assert isinstance(names["plain"], transformers.MixtralForCausalLM)
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(names["plain"])
