"""The duals by themselves: they move between models, survive a kill, and a bad file changes nothing."""

import subprocess
import sys

import pytest
import torch
from checks import assert_same
from paths import HELPERS
from tiny import tiny_batch, tiny_model
from trained import BIAS, duals, logits_of, trained

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_state_moves_to_another_model_of_the_same_shape(model_type, tmp_path):
    model = trained(model_type, BIAS, steps=3)
    balancer = phb.get_balancer(model)
    other = phb.patch(tiny_model(model_type, seed=5), BIAS)
    phb.get_balancer(other).load_state_dict(balancer.state_dict())
    assert_same(duals(other), duals(model))
    third = phb.patch(tiny_model(model_type, seed=6), BIAS)
    balancer.save(tmp_path / "made" / "on the way")
    phb.get_balancer(third).load(tmp_path / "made" / "on the way")
    assert_same(duals(third), duals(model))
    fourth = phb.patch(tiny_model(model_type, seed=6), BIAS)
    phb.get_balancer(fourth).load(tmp_path / "made" / "on the way" / STATE_NAME)
    assert_same(duals(fourth), duals(model))
    if model_type == "deepseek_v3":
        for site in phb.get_balancer(third).sites:
            assert torch.equal(site.read_native_bias(), balancer.biases()[site.name])


def test_state_dict_is_a_copy():
    model = trained("mixtral", BIAS)
    balancer = phb.get_balancer(model)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    for value in balancer.state_dict().values():
        value.zero_()
    for by_layer in (balancer.means(), balancer.prices(), balancer.biases(), balancer.loads()):
        for value in by_layer.values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in balancer.state_dict().items())


def test_bias_that_was_set_in_the_model_is_the_one_that_is_kept(tmp_path):
    """A native bias is part of the weights: whoever loads other weights gets their bias, in the sidecar as well."""
    model = trained("deepseek_v3", BIAS)
    balancer = phb.get_balancer(model)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    best_biases = balancer.biases()
    model.train()(**tiny_batch(model, seed=9)).loss.backward()
    balancer.step()
    assert any(not torch.equal(bias, best_biases[name]) for name, bias in balancer.biases().items())
    model.load_state_dict(best)  # as load_best_model_at_end does
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model.eval()))
    for name, bias in phb.get_balancer(loaded).biases().items():
        assert torch.equal(bias, best_biases[name])


KILLED_WRITERS = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)  # threads do not survive a fork
sys.path.insert(0, sys.argv[2])
from tiny import tiny_model
import hf_phibalance as phb

# many experts, so that a save mostly writes
model = tiny_model("mixtral", hidden_size=8, intermediate_size=2, num_hidden_layers=2, num_local_experts=20_000)
balancer = phb.get_balancer(phb.patch(model, {"coef": 0.1, "bias_coef": 0.1}))
state = balancer.state_dict()
ready, begun = os.pipe()
for attempt in range(30):
    for name, tensor in state.items():
        if name.endswith(".bias"):
            tensor += 1
    writer = os.fork()
    if not writer:
        balancer.load_state_dict(state)
        balancer.save(sys.argv[1])
        os.write(begun, b".")
        while True:
            balancer.save(sys.argv[1])
    os.read(ready, 1)
    time.sleep(0.0003 * attempt)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    balancer.load(sys.argv[1])
    for layer, bias in balancer.biases().items():
        assert torch.equal(bias, torch.full_like(bias, attempt + 1.0)), layer
"""


def test_a_kill_never_leaves_half_a_file(tmp_path):
    """SIGKILL at 30 moments in the life of processes that save without pause: whatever is there, is whole."""
    script = [sys.executable, "-c", KILLED_WRITERS, tmp_path, HELPERS]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
