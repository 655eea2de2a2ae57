"""The duals by themselves: they move between models, survive a kill, and a bad file changes nothing."""

import os
import subprocess
import sys

import pytest
import torch
from checks import assert_same, is_patched
from paths import HELPERS
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model
from trained import BIAS, GRADIENT, duals, logits_of, trained

import hf_phibalance as phb
from hf_phibalance.balancing import STATE_NAME


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
    balancer = phb.get_balancer(trained("mixtral", BIAS))
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
    for tensor in state.values():
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


# ---------------------------------------------------------------------- bad sidecars


def rewrite(path, change):
    """Applies `change` to the tensors of a sidecar."""
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved, patched Mixtral, and its sidecar as bytes."""
    folder = tmp_path_factory.mktemp("saved")
    trained("mixtral", BIAS).save_pretrained(folder)
    return folder, (folder / STATE_NAME).read_bytes()


def refused(model, path, remedy):
    """`path` is refused by `balancer.load` with `remedy` in the message, and the model is as before."""
    balancer = phb.get_balancer(model)
    before, logits = duals(model), logits_of(model)
    with pytest.raises(ValueError, match=remedy) as error:
        balancer.load(path)
    assert_same(duals(model), before)
    assert torch.equal(logits_of(model), logits)
    return str(error.value)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.3, 0.5, 0.9, -16, -1])
def test_truncated_sidecar(kept, model_type, tmp_path):
    model = trained(model_type, BIAS)
    path = phb.get_balancer(model).save(tmp_path)
    content = path.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    path.write_bytes(content[:length])
    assert str(path) in refused(model, tmp_path, "damaged.*(copy it again|delete it)")


@pytest.mark.parametrize("content", [b"not a sidecar", b"\xff" * 64, b"\0" * 64, b'{"steps": 3}' * 10])
def test_garbage_sidecar(content, tmp_path):
    (tmp_path / STATE_NAME).write_bytes(content)
    refused(trained("mixtral", BIAS), tmp_path, "damaged.*(copy it again|delete it)")


def test_bad_sidecar_through_from_pretrained(saved, tmp_path, warned):
    folder, content = saved
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / STATE_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_patched(phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=False))
    assert not warned.about(STATE_NAME)
    (tmp_path / STATE_NAME).unlink()  # the remedy: fresh duals
    assert phb.get_balancer(phb.AutoModelForCausalLM.from_pretrained(tmp_path)).steps == 0
    assert len(warned.about("start anew")) == 1


@pytest.mark.parametrize(
    ("other", "overrides", "remedy"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 0, "num_hidden_layers": 4}, "another model"),  # one more layer
        ("gpt_oss", {}, "another model"),  # other names
        ("mixtral", {"num_local_experts": 4}, "4.*8 experts.*another model"),
        ("mixtral", {"num_hidden_layers": 2}, "no model.layers.2"),
        ("mixtral", {"num_hidden_layers": 4}, "another model"),
    ],
)
def test_sidecar_of_another_model(other, overrides, remedy, tmp_path):
    phb.get_balancer(trained(other, BIAS, **overrides)).save(tmp_path)
    refused(trained("mixtral", BIAS), tmp_path, remedy)


def test_damaged_values(saved, tmp_path):
    model = trained("mixtral", BIAS)
    name = "model.layers.1.mlp.gate"

    def nan(state):
        state[f"{name}.mean_probs"][3] = float("nan")

    def infinite_bias(state):
        state[f"{name}.bias"][0] = float("inf")

    for change, remedy in (
        (nan, "mean_probs.*not finite.*earlier checkpoint"),
        (infinite_bias, "bias.*not finite.*earlier checkpoint"),
        (lambda state: state.pop(f"{name}.mean_load"), "no .*mean_load.*(configuration beside it|fresh duals)"),
        (lambda state: state.pop(f"{name}.bias"), "no .*bias.*(configuration beside it|fresh duals)"),
        (
            lambda state: state.update({"model.extra.mean_load": torch.ones(8)}),
            "'model.extra.mean_load'.*another model",
        ),
        (lambda state: state.update({f"{name}.variance": torch.ones(8)}), "variance"),
    ):
        path = tmp_path / STATE_NAME
        path.write_bytes(saved[1])
        rewrite(path, change)
        refused(model, path, remedy)


def test_sidecar_without_the_tracked_statistic(tmp_path):
    phb.get_balancer(trained("mixtral", {"track": "load"})).save(tmp_path)
    model = trained("mixtral", {"track": "probs"})
    assert "track" in refused(model, tmp_path, "mean_probs.*configuration beside it")


def test_no_sidecar_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="saved while patched"):
        phb.get_balancer(trained("mixtral", GRADIENT)).load(tmp_path)
