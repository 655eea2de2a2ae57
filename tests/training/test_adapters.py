"""`lora_config` over all families: PEFT accepts the configuration, and exactly the promised parameters learn."""

import re

import pytest
import torch
import transformers
from adapters import POLICIES, WRAPPER, assert_all_learn, balanced, fill
from charging import COEF
from checks import assert_same, assert_same_duals
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from remote import remote_model
from tiny import MODEL_TYPES, tiny_config, tiny_model
from tiny_vlm import image_batch, tiny_image_model
from trained import logits_of
from training import make_trainer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_phibalance as phb
from hf_phibalance.routers import find_routers


pytestmark = pytest.mark.slow


BALANCED = [model_type for model_type in MODEL_TYPES if model_type != "doge"]
# No adapter can reach these; with the module that reads the weights of another
OUT_OF_REACH = {("dbrx", "experts"): "DbrxExperts", ("longcat_flash", "router"): "LongcatFlashTopkRouter"}


def learning(model):
    """Names of the weights that learn, as in the plain model; those of an adapter as `lora ...`."""
    names = {WRAPPER.sub("", name) for name, p in model.named_parameters() if p.requires_grad}
    return {f"lora {name.partition('.lora_')[0]}" if ".lora_" in name else name for name in names}


def adapts(learning, parameter):
    """Whether the matrix `parameter` has an adapter: the wrappers of the parameters of one module are nested."""
    return f"lora {parameter.rpartition('.')[0]}" in learning


def matrices(model, pattern):
    """Names of the matrices (one, or one per expert) of `model` that match `pattern`."""
    return [n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias") and re.search(pattern, n)]


def router_matrices(model):
    return [name for site in find_routers(model) for name in matrices(model, rf"^{re.escape(site.name)}\.")]


@pytest.mark.parametrize("model_type", BALANCED)
def test_lora_on_everything(model_type):
    plain = tiny_model(model_type)
    routers, experts = router_matrices(plain), matrices(plain, r"experts\.(gate_up|gate|up|down)_proj$")
    attention = r"attn\.(\d\.)?([qkvo]_proj(\.linear)?|q_[ab]_proj|Wqkv)\.weight$|self_attention\.kv_proj\.weight$"
    attention = matrices(plain, attention)
    shared = matrices(plain, r"(shared_experts?|shared_mlp)\.(gate_proj|up_proj|down_proj)\.weight$")
    policy, targets = "lora", None
    if (model_type, "experts") in OUT_OF_REACH:
        targets, experts = "attention", []
    if (model_type, "router") in OUT_OF_REACH:
        policy, routers = "frozen", []
    model = balanced(plain, router=policy, targets=targets)
    names = learning(model)
    assert attention or model_type == "nemotron_h"
    for name in [*routers, *experts, *attention, *shared]:
        assert adapts(names, name), name
    left_alone = re.compile(r"layernorm|\bnorm\.|embed|lm_head|vision|\bindexer|shared_expert_gate")
    assert not [name for name in names if left_alone.search(name)]
    assert all(name.startswith("lora ") for name in names)
    assert_all_learn(model)


@pytest.mark.parametrize("model_type", BALANCED)
def test_full_routers_beside_the_experts_or_attention(model_type):
    """One of the two for each family, chosen by its name."""
    targets = "attention" if (model_type, "experts") in OUT_OF_REACH or len(model_type) % 2 else "experts"
    plain = tiny_model(model_type)
    routers = set(router_matrices(plain))
    attention = matrices(plain, r"self_attn\.([qkvo]_proj|q_[ab]_proj)\.weight$")
    experts = matrices(plain, r"experts\.(gate_up|gate|up|down)_proj$")
    model = balanced(plain, router="full", targets=targets)
    names = learning(model)
    assert routers <= names
    assert all(adapts(names, name) == (targets == "attention") for name in attention)
    assert all(adapts(names, name) == (targets == "experts") for name in experts)
    assert_all_learn(model)


@pytest.mark.parametrize("policy", ["lora", "full"])
def test_gate_of_remote_code(policy):
    """`MoEGate` with a list of linear experts in the layer itself, and no attention."""
    model = remote_model("moonlight")
    with pytest.raises(ValueError, match="RemoteForCausalLM has no attention that an adapter could train"):
        phb.lora_config(model, router="lora")
    model = balanced(model, router=policy, targets="experts", task_type=None)  # it cannot generate
    gates = {f"model.layers.{i}.gate" for i in range(2)}
    routers = {f"{gate}.weight" for gate in gates} if policy == "full" else {f"lora {gate}" for gate in gates}
    assert learning(model) == routers | {f"lora model.layers.{i}.experts.{j}" for i in range(2) for j in range(8)}
    assert_all_learn(model)


# ---------------------------------------------------------------------- options


def test_defaults_are_those_of_the_paper():
    config = phb.lora_config(tiny_model("mixtral"))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (8, 32, 0.0, "CAUSAL_LM")
    assert config.target_modules == {f"self_attn.{x}_proj" for x in "qkvo"} and config.modules_to_save is None
    assert sorted(config.target_parameters) == ["experts.down_proj", "experts.gate_up_proj"]
    config = phb.lora_config(tiny_model("mixtral"), "full", "attention", r=4, lora_alpha=8, lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.modules_to_save == ["mlp.gate"] and config.target_parameters is None
    config = phb.lora_config(tiny_model("mixtral"), "full", "attention", modules_to_save=["embed_tokens"])
    assert config.modules_to_save == ["mlp.gate", "embed_tokens"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "lora", "lora_dropout": 0.1}, r"lora_dropout=0.1 is not possible for parameters.*'attention'"),
        ({"use_dora": True}, r"use_dora=True is not possible for parameters"),
        ({"router": "router-only", "targets": "all"}, r"targets='all' would do nothing"),
        ({"router": "Lora"}, r"`router` must be one of frozen, lora, full, router-only, got 'Lora'"),
        ({"targets": "mlp"}, r"`targets` must be one of all, experts, attention, got 'mlp'"),
        ({"target_modules": ["q_proj"]}, r"target_modules: lora_config finds the names itself"),
        ({"vision": True}, r"no vision tower"),
        *(
            ({"init_lora_weights": start}, rf"init_lora_weights='{start}' is not possible for parameters.*'attention'")
            for start in ("pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "loftq", "corda")
        ),
    ],
)
def test_what_would_do_nothing_or_fail_later_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        phb.lora_config(tiny_model("mixtral"), **options)


def test_other_initialisations_are_possible():
    balanced(tiny_model("mixtral"), init_lora_weights="gaussian")
    balanced(tiny_model("mixtral"), router="full", targets="attention", init_lora_weights="pissa")


@pytest.mark.parametrize(
    "name, task, head",
    [
        ("AutoModelForCausalLM", "CAUSAL_LM", None),
        ("AutoModelForSequenceClassification", "SEQ_CLS", "score"),
        ("AutoModelForTokenClassification", "TOKEN_CLS", "score"),
        ("AutoModelForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ("AutoModel", "FEATURE_EXTRACTION", None),
    ],
)
def test_the_task_is_that_of_the_class(name, task, head):
    model = getattr(transformers, name).from_config(tiny_config("mixtral"))
    config = phb.lora_config(model)
    assert config.task_type == task and phb.lora_config(model, task_type=None).task_type is None
    names = learning(get_peft_model(model, config))
    assert {name.partition(".")[0] for name in names if not name.startswith("lora ")} == ({head} if head else set())


@pytest.mark.parametrize(
    "model_type, options, message",
    [
        ("dbrx", {"targets": "experts"}, r"experts of DbrxForCausalLM cannot be adapted: DbrxExperts reads"),
        ("longcat_flash", {"router": "lora"}, r"router of LongcatFlash.*LongcatFlashTopkRouter reads.*router='full'"),
        ("doge", {}, r"DogeForCausalLM cannot be φ-balanced"),
    ],
)
def test_out_of_reach_is_refused_by_name(model_type, options, message):
    with pytest.raises(ValueError, match=message):
        phb.lora_config(tiny_model(model_type), **options)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(
    "how, by_hand", [("lora", {"target_parameters": ["gate.weight"]}), ("full", {"modules_to_save": ["gate"]})]
)
def test_an_adapter_on_frozen_routers_is_refused(how, by_hand, attached, tmp_path):
    """By `lora_config`; where it is made by hand, before the first step, and by the doctor."""
    model = phb.patch(tiny_model("mixtral").train(), {"method": "frozen"})
    with pytest.raises(ValueError, match=rf"router='{how}' would train the routers that method='frozen' holds still"):
        phb.lora_config(model, router=how)
    model = get_peft_model(model, LoraConfig(target_modules=["o_proj"], r=2, **by_hand))
    (check,) = (check for check in phb.doctor(model).problems if check.name == "routers that learn")
    assert "method='frozen', but 3 routers are trained" in check.finding and "router='frozen'" in check.remedy
    trainer = make_trainer(model, tmp_path, callbacks=[] if attached else [phb.PhiBalanceCallback()], max_steps=1)
    if attached:
        phb.attach(trainer)
    before = weights(model)
    with pytest.raises(
        ValueError, match=rf"method='frozen', but 3 of 3 routers are trained: .*gate \({how}\).*router='frozen'"
    ):
        trainer.train()
    assert_same(weights(model), before)


def test_a_model_with_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"MixtralForCausalLM already carries an adapter \(at 'model.layers.0"):
        phb.lora_config(balanced(tiny_model("mixtral"), targets="experts"))


# ---------------------------------------------------------------------- quantised base models


def quantised(model_type, folder, sizes=None, **config):
    """A tiny model, saved to `folder`, with its linear layers in 4 bits."""
    pytest.importorskip("bitsandbytes")
    tiny_model(model_type, **(sizes or {})).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **config)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("policy", ["lora", "full", "frozen", "router-only"])
def test_qlora(policy, tmp_path):
    """bitsandbytes packs linear layers only: experts and router of a Mixtral are parameters, and stay as they are."""
    # on processors with bfloat16 instructions, bitsandbytes runs a packed matrix only if its rows are blocks of 64
    sizes = {"hidden_size": 64, "num_attention_heads": 8}
    model = quantised("mixtral", tmp_path / "base", sizes)
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(3) for x in "qkvo"}
    model = balanced(prepare_model_for_kbit_training(model), **POLICIES[policy])
    assert not any(p.dtype == torch.uint8 for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        assert_all_learn(model)
        model.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised("mixtral", tmp_path / "base", sizes), tmp_path / "adapter")
    phb.patch(loaded, {"coef": COEF})
    phb.get_balancer(loaded).load(tmp_path / "adapter")
    assert_same_duals(loaded, model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-3, atol=1e-3)


def test_packed_matrices_are_refused_with_a_remedy_that_works(tmp_path):
    """The shared experts of DeepSeek are adapted as parameters, the router of afmoe is a linear layer."""
    for model_type, options in (("deepseek_v3", {"targets": "experts"}), ("afmoe", {"router": "full"})):
        model = quantised(model_type, tmp_path / model_type)
        with pytest.raises(ValueError, match=r"is quantised \(torch.uint8\).*llm_int8_skip_modules") as error:
            phb.lora_config(model, **options)
        skipped = re.findall(r"'(\w+)'", str(error.value).partition("llm_int8_skip_modules=")[2].partition("]")[0])
        model = quantised(model_type, tmp_path / model_type, llm_int8_skip_modules=skipped)
        assert_all_learn(balanced(prepare_model_for_kbit_training(model), **options))


# ---------------------------------------------------------------------- models for images


TOWERS = ("vision_tower", "visual", "vision_model")


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe", "dots3_note"])
def test_what_learns_of_a_model_for_images(model_type, vision):
    model = tiny_image_model(model_type)
    routers = {name for name, _ in model.named_modules() if name.endswith((".gate", "_moe.gate"))}
    in_tower = {name for name in routers if any(tower in name for tower in TOWERS)}
    config = phb.lora_config(model, router="lora", vision=vision, r=2)
    model = get_peft_model(model, config)
    fill(model, "lora_B", 0.1)
    phb.patch(model.train(), {"coef": 0.5})
    batches = [
        image_batch(model.get_base_model(), ((24, 16),), seed=0),
        image_batch(model.get_base_model(), (None,), seed=1),
    ]
    report = phb.doctor(model, batches)
    assert report.coefficient.ratio == pytest.approx(1, abs=1e-3), report
    phb.get_balancer(model).begin_step(batches)
    for batch in batches:
        model(**batch).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all("lora_" in name for name in learning)
    assert any(tower in name for name in learning for tower in TOWERS) is vision
    for router in routers - (set() if vision else in_tower):
        assert any(router in name for name in learning), router
    assert any("experts" in name for name in learning) and any("self_attn" in name for name in learning)


def test_a_frozen_tower_is_counted_and_nothing_else():
    """Its routers get no gradient, but their loads are reported. The language model is balanced."""
    model = tiny_image_model("dots3_note").train()
    model.model.vision_tower.requires_grad_(False)
    balancer = phb.get_balancer(phb.patch(model, {"coef": 0.5}))
    for seed in range(2):
        batch = image_batch(model, seed=seed)
        balancer.begin_step([batch])
        model(**batch).loss.backward()
        balancer.step()
    gate = model.model.vision_tower.blocks[1].mlp.gate
    assert gate.weight.grad is None and balancer.metrics()["vision/tokens"] == len(batch["pixel_values"])
    assert torch.isfinite(model.model.language_model.layers[1].mlp.gate.weight.grad).all()
