"""The first DeepSeek-MoE without remote code, against its published definition, from a checkpoint in its layout."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_phibalance as phb
from hf_phibalance.models import deepseek_moe


# the keys of the published config.json, with small sizes
CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 96,
}


@pytest.fixture(autouse=True)
def registered():
    deepseek_moe.register()
    deepseek_moe.register()  # a second call has no effect


def published_weights():
    """Random weights under the names of the published checkpoint, with one tensor per expert."""
    generator = torch.Generator().manual_seed(0)
    hidden, layers = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm():
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    def feed_forward(prefix, size):
        return {
            f"{prefix}.gate_proj.weight": matrix(size, hidden),
            f"{prefix}.up_proj.weight": matrix(size, hidden),
            f"{prefix}.down_proj.weight": matrix(hidden, size),
        }

    weights = {
        "model.embed_tokens.weight": matrix(CONFIG["vocab_size"], hidden),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(CONFIG["vocab_size"], hidden),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"}
        weights |= {f"{layer}.input_layernorm.weight": norm(), f"{layer}.post_attention_layernorm.weight": norm()}
        if i < CONFIG["first_k_dense_replace"]:
            weights |= feed_forward(f"{layer}.mlp", CONFIG["intermediate_size"])
            continue
        size = CONFIG["moe_intermediate_size"]
        weights[f"{layer}.mlp.gate.weight"] = matrix(CONFIG["n_routed_experts"], hidden) * 3
        weights |= feed_forward(f"{layer}.mlp.shared_experts", size * CONFIG["n_shared_experts"])
        for expert in range(CONFIG["n_routed_experts"]):
            weights |= feed_forward(f"{layer}.mlp.experts.{expert}", size)
    return weights


def naive_logits(weights, ids):
    """The published model, written out for one sequence `ids (T,)`."""
    heads, hidden = CONFIG["num_attention_heads"], CONFIG["hidden_size"]
    size, length = hidden // heads, len(ids)

    def rms(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt()

    def feed_forward(x, prefix):
        gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    angles = torch.arange(length)[:, None] / CONFIG["rope_theta"] ** (torch.arange(0, size, 2) / size)

    def rotate(x):  # (heads, T, size): the halves of a head are the two coordinates
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = rms(x, weights[f"{layer}.input_layernorm.weight"])
        q, k, v = (
            (normed @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).view(length, heads, size).transpose(0, 1)
            for name in "qkv"
        )
        scores = rotate(q) @ rotate(k).transpose(1, 2) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, hidden)
        x = x + attended @ weights[f"{layer}.self_attn.o_proj.weight"].T
        normed = rms(x, weights[f"{layer}.post_attention_layernorm.weight"])
        if i < CONFIG["first_k_dense_replace"]:
            x = x + feed_forward(normed, f"{layer}.mlp")
            continue
        routed = []
        for token in normed:
            probs = (weights[f"{layer}.mlp.gate.weight"] @ token).softmax(-1)
            chosen = probs.argsort(descending=True)[: CONFIG["num_experts_per_tok"]]
            routed.append(sum(probs[e] * feed_forward(token, f"{layer}.mlp.experts.{e}") for e in chosen))
        x = x + torch.stack(routed) + feed_forward(normed, f"{layer}.mlp.shared_experts")
    return rms(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(published_weights(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_published_checkpoint_gives_the_published_function(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model.eval()(ids, labels=ids, output_router_logits=True)
    expected = torch.stack([naive_logits(published_weights(), row) for row in ids])
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4)
    assert [logits.shape for logits in output.router_logits] == [(24, 8), (24, 8)]


def test_generation_uses_the_cache(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.randint(3, CONFIG["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.slow
def test_balances_and_saves_as_published(checkpoint, tmp_path):
    model = phb.AutoModelForCausalLM.from_pretrained(checkpoint, phi_balance={"coef": 0.5, "bias_coef": 0.01})
    assert list(phb.get_balancer(model).loads()) == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        phb.get_balancer(model).begin_step([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        model.train()(ids, labels=ids).loss.backward()
        phb.get_balancer(model).step()
    assert all(price.abs().sum() > 0 for price in phb.get_balancer(model).prices().values())
    model.save_pretrained(tmp_path / "saved")
    again = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert phb.get_balancer(again).steps == 2
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert saved.model_type == "deepseek" and saved.mlp_layer_types == ["dense", "sparse", "sparse"]


def test_another_router_is_refused():
    for change in ({"norm_topk_prob": True}, {"scoring_func": "sigmoid"}):
        with pytest.raises(ValueError, match="the published DeepSeek-MoE has False and 'softmax'"):
            CONFIG_MAPPING["deepseek"](**{**CONFIG, **change})
