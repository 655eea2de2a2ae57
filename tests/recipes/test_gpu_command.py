"""The command that is ready for a GPU, at the size of a toy on a CPU."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from paths import ROOT


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_command", ROOT / "recipes" / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_timed_and_balanced_where_it_says_so(gpu, monkeypatch, tmp_path, capsys):
    arguments = ["--device", "cpu", "--small", "--no-compile", "--rounds", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    made = []
    original = gpu.Variant.__init__

    def kept(self, name, compiled, args):
        original(self, name, compiled, args)
        made.append((name, self))

    monkeypatch.setattr(gpu.Variant, "__init__", kept)
    assert gpu.main() == 0
    rounds = json.loads((tmp_path / "steps.json").read_text())["rounds"]
    assert list(rounds) == list(gpu.VARIANTS) and all(len(values) == 3 for values in rounds.values())
    rows = re.findall(r"^\| ([a-z -]+) \| [\d.]+ \| ([\d.]+) \(", (tmp_path / "steps.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(gpu.VARIANTS) and rows[0][1] == "1.000"
    for name, variant in made:
        assert (variant.balancer is None) == (name in ("unpatched", "built-in loss"))
        assert variant.balancer is None or variant.balancer.steps == 7  # four before it is timed
        assert variant.model.config.output_router_logits == (name == "built-in loss")
    assert torch.equal(made[0][1].batch["input_ids"], made[3][1].batch["input_ids"])


def test_ratios_are_those_of_the_same_round(gpu):
    found = {"unpatched": [(10.0, 5.0), (20.0, 5.0), (30.0, 5.0)], "price": [(11.0, 6.0), (22.0, 6.0), (60.0, 6.0)]}
    assert "| price | 22.00 | 1.100 (1.100 to 2.000) | 4,545 | 6 |" in gpu.table(found, 100)
