"""
vLLM serves tiny models with a large selection bias as transformers computes them with our patch.

Needs the CPU build of vLLM, which computes in float32: `nox -f recipes/environments/noxfile.py -s "tool(vllm)"`, or pytest in an
environment that has it. Without vLLM: `test_vllm_choice`.
"""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM pins versions of its own: see recipes/environments")

from paths import HELPERS
from served import GREEDY
from transformers import AutoModelForCausalLM

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME
from hf_phibalance.integrations import vllm as plugin
from hf_phibalance.models import train_tokenizer
from hf_phibalance.models.tiny import build_model


ALLOWED = 1e-3  # between log-probabilities
SHAPE = {
    "hidden_size": 128,  # heads of 64, which vLLM's attention has kernels for
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": False},
}
# Mixtral is one file: then vLLM takes every weight file in the folder. The other family has an index.
SHARDS = {"mixtral": "1GB", "qwen3_moe": "100KB"}


def answers_of(model, rows):
    """What `served.py` writes, by transformers."""
    answers = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False)
            logprobs = model(whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[:, 0]
        answers.append({"tokens": whole[0, len(row) :].tolist(), "logprobs": logprobs.tolist()})
    return answers


def choices_of(model, rows):
    """Returns the experts of the first layer, whose input does not depend on a bias."""
    chosen = []
    router = phb.get_balancer(model).sites[0].router
    handle = router.register_forward_hook(lambda module, args, output: chosen.append(output[-1].sort(-1).values))
    with torch.no_grad():
        model(torch.tensor(rows))
    handle.remove()
    return chosen[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """By family: the folder, and the answers of transformers with the bias and without."""
    made = {}
    tokenizer = train_tokenizer(["the selection bias of a router"], vocab_size=320)
    draw = random.Random(0)
    rows = [[draw.randrange(3, 250) for _ in range(24)] for _ in range(4)]
    for family, fields in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        model = phb.patch(build_model(family, SHAPE | fields, tokenizer).eval(), {"coef": 0.01})
        model.generation_config.eos_token_id = None
        plain, unbiased = answers_of(model, rows), choices_of(model, rows)
        balancer = phb.get_balancer(model)
        balancer.set_biases({site.name: torch.linspace(-0.5, 0.5, 8)[torch.randperm(8)] for site in balancer.sites})
        changed = (choices_of(model, rows) != unbiased).any(-1).float().mean()
        assert changed > 0.5, "the bias changes too few choices to be missed"
        model.save_pretrained(folder, max_shard_size=SHARDS[family])
        tokenizer.save_pretrained(folder)
        (folder / "rows.json").write_text(json.dumps(rows))
        made[family] = folder, answers_of(model, rows), plain
    return made


def serve(*folders, **environment):
    """Makes vLLM answer. Returns its output."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, str(HELPERS / "served.py"), *map(str, folders)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folders[0], env=environment, text=True, **output)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def difference(found, expected):
    """Returns the largest difference of log-probabilities of the rows' own tokens."""
    pairs = [
        zip(a["logprobs"][:-GREEDY], b["logprobs"][:-GREEDY], strict=True)
        for a, b in zip(found, expected, strict=True)
    ]
    return max(abs(a - b) for pair in pairs for a, b in pair)


def test_served_with_its_bias(served):
    folders = [folder for folder, _, _ in served.values()]
    assert (folders[1] / "model.safetensors.index.json").is_file() and not (
        folders[0] / "model.safetensors.index.json"
    ).exists()
    said = serve(*folders)
    assert said.count("2 MoE layers choose with the selection bias") == 2
    for folder, expected, plain in served.values():
        found = json.loads((folder / "answers.json").read_text())
        assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in expected]
        for answer, wanted in zip(found, expected, strict=True):
            assert answer["logprobs"] == pytest.approx(wanted["logprobs"], abs=ALLOWED)
        assert difference(found, plain) > 100 * ALLOWED


def test_without_the_plugin_it_is_the_ordinary_model(served):
    """vLLM does not take the state for a part of the weights, be they one file or several."""
    said = serve(*(folder for folder, _, _ in served.values()), VLLM_PLUGINS="")
    assert "selection bias" not in said
    for folder, expected, plain in served.values():
        found = json.loads((folder / "answers.json").read_text())
        assert difference(found, plain) < ALLOWED
        assert difference(found, expected) > 100 * ALLOWED


# ---------------------------------------------------------------------- left alone, and refused


def config_of(folder, family, **changes):
    """The fields of vLLM's `ModelConfig` that the plugin reads."""
    model = SimpleNamespace(model_type=family, phi_balance=None)
    fields = {"model": str(folder), "revision": None, "runner_type": "generate", "get_num_experts": lambda: 8}
    return SimpleNamespace(**fields | {"hf_config": model, "hf_text_config": model} | changes)


def test_checkpoints_without_a_bias_are_left_alone(served, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(plugin.logger, "handlers", [caplog.handler])
    folder = served["mixtral"][0]
    assert plugin.find_biases(config_of(folder, "mixtral"), None).model["type"] == "mixtral"
    assert plugin.find_biases(config_of(folder, "mixtral", runner_type="draft"), None) is None
    assert plugin.find_biases(config_of(folder, "mixtral", get_num_experts=lambda: 0), None) is None
    assert plugin.find_biases(config_of(tmp_path, "mixtral"), None) is None
    balancer = phb.get_balancer(phb.patch(AutoModelForCausalLM.from_pretrained(folder), {"coef": 0.01}))
    balancer.save(tmp_path)
    assert plugin.find_biases(config_of(tmp_path, "mixtral"), None) is None
    assert not [record for record in caplog.records if record.name.startswith("vllm")]


def test_a_lost_file_is_missed_and_a_damaged_one_refused(served, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(plugin.logger, "handlers", [caplog.handler])
    config = config_of(tmp_path, "mixtral")
    config.hf_config.phi_balance = {"bias_coef": 0.001}
    assert plugin.find_biases(config, None) is None
    assert "trained with a selection bias, which is lost: there is no phi_balance.state" in caplog.text
    content = bytearray((served["mixtral"][0] / STATE_NAME).read_bytes())
    content[-1] ^= 1
    (tmp_path / STATE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        plugin.find_biases(config, None)


def test_other_families_are_refused_by_name_and_those_with_a_bias_of_their_own_left_alone(served):
    from vllm.model_executor.layers.fused_moe import layer

    options = {"top_k": 2, "global_num_experts": 8}
    with plugin.choosing_with_bias(config_of(served["mixtral"][0], "jamba")):
        with pytest.raises(
            ValueError, match=r"has not been tried in vLLM with 'jamba', only with .*`phibalance export`"
        ):
            layer.create_fused_moe_router(**options)
        bias = torch.zeros(8)
        router = layer.create_fused_moe_router(**options, e_score_correction_bias=bias)
        assert router.e_score_correction_bias is bias
    assert not isinstance(layer.create_fused_moe_router(**options).custom_routing_function, plugin.BiasedChoice)


@pytest.fixture
def layers(served):
    """A state, and stand-ins for MoE layers of vLLM with the attributes that the plugin reads."""
    from vllm.model_executor.layers.fused_moe import MoERunner

    class Runner(MoERunner):
        is_monolithic = False
        _quant_method = None

        def __init__(self, index):
            torch.nn.Module.__init__(self)
            self.layer_name = f"model.layers.{index}.mlp.experts"
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.router = SimpleNamespace(custom_routing_function=plugin.BiasedChoice("probs"))
            self.moe_config = SimpleNamespace(num_logical_experts=8, experts_per_token=2)
            self.routed_experts = SimpleNamespace(e_score_correction_bias=None)

    config = config_of(served["mixtral"][0], "mixtral")
    return plugin.find_biases(config, None), config, torch.nn.ModuleList(map(Runner, range(2)))


def test_every_layer_gets_the_bias_of_its_own(layers):
    state, config, model = layers
    plugin.hand_out(state, model, config, stages=1)
    for index, runner in enumerate(model):
        assert torch.equal(runner.router.custom_routing_function.bias, state.tensors[f"layers.{index}.mlp.gate.bias"])
        assert "selection_bias" in dict(runner.named_buffers()) and "selection_bias" not in runner.state_dict()
    plugin.hand_out(state, torch.nn.ModuleList([model[1]]), config, stages=2)  # the second half of a pipeline
    for runner in model:
        runner.routed_experts.e_score_correction_bias = torch.zeros(8)
    plugin.hand_out(state, torch.nn.ModuleList([model[1]]), config, stages=1)  # its biases are not ours


def test_layers_that_would_choose_without_a_bias_are_refused(layers):
    state, config, model = layers
    with pytest.raises(ValueError, match=r"for the layers \[0, 1\], but vLLM has MoE layers at \[1\]"):
        plugin.hand_out(state, torch.nn.ModuleList([model[1]]), config, stages=1)
    model[1].moe_config.num_logical_experts = 16
    with pytest.raises(ValueError, match=r"was written for 8 experts in 'model.layers.1.mlp.gate', which has 16"):
        plugin.hand_out(state, model, config, stages=1)
    model[1].is_monolithic = True
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts would choose its experts inside a kernel"):
        plugin.hand_out(state, model, config, stages=1)
    model[0].router.custom_routing_function = None
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts would choose its experts inside a kernel"):
        plugin.hand_out(state, model, config, stages=1)
