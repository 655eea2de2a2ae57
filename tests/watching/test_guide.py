"""The code of recipes/guides/WATCHING.md runs, and its table of keys is that of `moe.jsonl`."""

import re

import torch
from paths import ROOT
from tiny import tiny_batch, tiny_model
from training import make_trainer

import hf_phibalance as phb
from hf_phibalance.watching import alerts, read_records


GUIDE = (ROOT / "recipes/guides/WATCHING.md").read_text()


def test_the_code_runs_and_the_tables_are_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one_line, thresholds, loop = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    model = tiny_model("mixtral").train()
    scope = {"phb": phb, "trainer": make_trainer(model, tmp_path / "trainer")}
    for code in (one_line, thresholds):
        exec(code, scope)
        scope["watch"].stop()
    scope |= {
        "model": model,
        "batches": [tiny_batch(model, seed=seed) for seed in range(10)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(loop, scope)
    assert "moe/max_vio" in capsys.readouterr().out
    (row,) = read_records("out").rows
    keys, kinds = (
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", part, re.MULTILINE)))
        for part in GUIDE.split("## Alerts")
    )
    assert set(keys) == set(row["layers"]["model.layers.0.mlp.gate"])
    assert set(kinds) == set(re.findall(r"^\| `(\w+)` \|", alerts.__doc__, re.MULTILINE))
