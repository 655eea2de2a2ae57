"""
Files of earlier versions load with the values that those versions gave them.

`written_by_0_1_0/` was written by hf_phibalance 0.1.0 (torch 2.13, transformers 5.24): `phi_balance.json` by
`PhiBalanceConfig.save`, and of two models of `tiny_model`, after three steps on `tiny_batch` with SGD at 0.05, the
config.json and the duals of their `save_pretrained`. `expected.json` beside each holds what that version said was in it.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from checks import assert_same
from safetensors.torch import load_file
from transformers import AutoConfig

import hf_phibalance as phb
from hf_phibalance.balancing import config_in
from hf_phibalance.sidecar import EARLIER_STATE_NAME


WRITTEN = Path(__file__).parent / "written_by_0_1_0"
MODELS = ["mixtral", "deepseek_v3"]


def expected_of(folder):
    return json.loads((folder / "expected.json").read_text())


def tensors(by_layer):
    return {name: torch.tensor(values) for name, values in by_layer.items()}


def test_a_config_loads_and_makes_the_round_trip(tmp_path):
    config = phb.PhiBalanceConfig.load(WRITTEN)
    assert dataclasses.asdict(config) == expected_of(WRITTEN)
    assert phb.PhiBalanceConfig.load(config.save(tmp_path)) == config
    earlier, now = (json.loads((folder / "phi_balance.json").read_text()) for folder in (WRITTEN, tmp_path))
    assert earlier | {"version": now["version"]} == now


@pytest.mark.parametrize("model_type", MODELS)
def test_config_json_and_duals_load_and_make_the_round_trip(model_type, tmp_path):
    folder = WRITTEN / model_type
    expected = expected_of(folder)
    model = phb.AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    balancer = phb.get_balancer(model)
    assert dataclasses.asdict(balancer.config) == expected["config"]
    assert phb.PhiBalanceConfig.from_dict(config_in(folder / EARLIER_STATE_NAME)) == balancer.config
    balancer.load(folder)
    assert balancer.steps == expected["steps"] == 3
    for statistic, means in expected["means"].items():
        assert_same(balancer.means(statistic), tensors(means))
    assert_same(balancer.biases(), tensors(expected["biases"]))
    torch.testing.assert_close(balancer.prices(), tensors(expected["prices"]), rtol=1e-6, atol=1e-6)  # computed
    if model_type == "deepseek_v3":
        for site in balancer.sites:
            assert torch.equal(site.read_native_bias(), balancer.biases()[site.name])
    assert_same(load_file(balancer.save(tmp_path)), load_file(folder / EARLIER_STATE_NAME))
