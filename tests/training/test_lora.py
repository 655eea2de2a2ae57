"""`lora_config` over all families: PEFT accepts it, and exactly what it promises learns."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from test_wrappers import remote_model
from tiny import MODEL_TYPES, set_prices, tiny_batch, tiny_model
from training import make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import hf_phibalance as phb
from hf_phibalance.maths.pricing import routing_probs
from hf_phibalance.routers.discovery import find_routers


COEF = 2.0
BALANCED = [model_type for model_type in MODEL_TYPES if model_type != "doge"]
# what no adapter can reach, with the module that reads the weights of another
OUT_OF_REACH = {("dbrx", "experts"): "DbrxExperts", ("longcat_flash", "router"): "LongcatFlashTopkRouter"}
WRAPPER = re.compile(r"base_model\.model\.|base_layer\.|modules_to_save\.default\.|\.default\b")


def adapted(model, **policy):
    """`model`, patched and with adapters that already do something."""
    model = get_peft_model(model, phb.lora_config(model, **policy))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    phb.patch(model.train(), {"coef": COEF})
    set_prices(model)
    return model


def learning(model):
    """Names of the weights, as in the plain model, that learn; those of an adapter as `lora ...`."""
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


def assert_all_learn(model):
    """Every trainable parameter gets a gradient from one step of task and prices."""
    model(**tiny_batch(model, batch=4, seq=16)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
    phb.get_balancer(model).step()


@pytest.mark.parametrize("model_type", BALANCED)
def test_lora_on_everything(model_type):
    plain = tiny_model(model_type)
    routers, experts = router_matrices(plain), matrices(plain, r"experts\.(gate_up|gate|up|down)_proj$")
    attention = matrices(
        plain, r"attn\.(\d\.)?([qkvo]_proj(\.linear)?|q_[ab]_proj|Wqkv)\.weight$|self_attention\.kv_proj\.weight$"
    )
    shared = matrices(plain, r"(shared_experts?|shared_mlp)\.(gate_proj|up_proj|down_proj)\.weight$")
    outside = {"targets": None}
    if (model_type, "experts") in OUT_OF_REACH:
        outside, experts = {"targets": "attention"}, []
    policy = "lora"
    if (model_type, "router") in OUT_OF_REACH:
        policy, routers = "frozen", []
    model = adapted(plain, router=policy, **outside)
    names = learning(model)
    assert attention or model_type == "nemotron_h"
    for name in [*routers, *experts, *attention, *shared]:
        assert adapts(names, name), name
    assert not [
        name
        for name in names
        if re.search(r"layernorm|\bnorm\.|embed|lm_head|vision|\bindexer|shared_expert_gate", name)
    ]
    assert all(name.startswith("lora ") for name in names)
    assert_all_learn(model)


@pytest.mark.parametrize("model_type", BALANCED)
def test_full_routers_beside_the_experts_or_attention(model_type):
    """One of the two, in turn, so that every family has one and every kind has many."""
    targets = "attention" if (model_type, "experts") in OUT_OF_REACH or len(model_type) % 2 else "experts"
    plain = tiny_model(model_type)
    routers = {name for site in find_routers(plain) for name in matrices(plain, rf"^{re.escape(site.name)}\.")}
    attention = matrices(plain, r"self_attn\.([qkvo]_proj|q_[ab]_proj)\.weight$")
    experts = matrices(plain, r"experts\.(gate_up|gate|up|down)_proj$")
    model = adapted(plain, router="full", targets=targets)
    names = learning(model)
    assert routers <= names
    for name in attention:
        assert adapts(names, name) == (targets == "attention"), name
    for name in experts:
        assert adapts(names, name) == (targets == "experts"), name
    assert_all_learn(model)


# ---------------------------------------------------------------------- what balancing reaches


def gradients_of(model, name, wanted):
    """By autograd: the gradient of COEF · mean over counted tokens of ⟨q, p⟩ of router `name` alone, at `wanted`."""
    balancer, noted = phb.get_balancer(model), {}
    site = next(site for site in balancer.sites if site.name == name)
    module = site.modules[-1]

    def note(module, args, output):
        noted.update(hidden=args[0], logits=output[site.kind.index])

    handle = module.register_forward_hook(note)
    batch = tiny_batch(model)
    model(**batch)
    handle.remove()
    balancer.discard_step()
    mask = batch["attention_mask"].reshape(-1).float()
    term = ((routing_probs(noted["logits"], site.scoring) * balancer.prices()[name]).sum(-1) * mask).sum()
    inner = [noted["logits"], noted["hidden"]]
    if not noted["logits"].requires_grad:
        return [None] * (len(inner) + len(wanted))
    learning = [tensor for tensor in [*inner, *wanted] if tensor.requires_grad]
    grads = iter(torch.autograd.grad(COEF * term / mask.sum(), learning, allow_unused=True))
    return [next(grads) if tensor.requires_grad else None for tensor in [*inner, *wanted]]


def measured(model):
    """The report after the first forward with prices."""
    assert all(row.at_logits is None for row in phb.learning_report(model).rows)
    model(**tiny_batch(model))  # without prices: as many steps as the state says, none
    phb.get_balancer(model).step()
    assert all(row.at_logits is None for row in phb.learning_report(model).rows)
    set_prices(model)  # known ones
    phb.get_balancer(model)._duals.steps = 1
    model(**tiny_batch(model))
    report = phb.learning_report(model)
    phb.get_balancer(model).discard_step()
    return report


POLICIES = {
    "whole model": None,
    "lora": {"router": "lora"},
    "full": {"router": "full", "targets": "experts"},
    "frozen": {"targets": "attention"},
    "router-only": {"router": "router-only"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "jetmoe", "gemma4_text"])
def test_report_agrees_with_autograd(model_type, policy):
    plain = tiny_model(model_type).train()
    model = phb.patch(plain, {"coef": COEF}) if POLICIES[policy] is None else adapted(plain, **POLICIES[policy])
    report = measured(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [row.name for row in report.rows] == phb.get_balancer(model).layer_names
    for row in report.rows:
        logits, hidden, *grads = gradients_of(model, row.name, [p for _, p in trained])
        assert logits is None or row.at_logits == pytest.approx(float(logits.norm()), rel=1e-4)
        reached = [(WRAPPER.sub("", name), p) for (name, p), g in zip(trained, grads) if g is not None]
        own = [p.numel() for name, p in reached if name.startswith(f"{row.name}.")]
        scale = (
            8 if model_type == "gemma4_text" and row.how == "full" else 0
        )  # of the experts' outputs, after the logits
        assert row.parameters == sum(own) + scale
        if model_type != "gemma4_text" or policy != "whole model":  # it has embeddings of its own for every layer
            assert row.below == len(reached) - len(own)
        weight = f"{row.name}.weight"
        if model_type in ("mixtral", "deepseek_v3"):
            if hidden is not None:
                assert row.at_input == pytest.approx(float(hidden.norm()), rel=1e-4)
            if row.how == "full":
                (gradient,) = [g for (n, _), g in zip(trained, grads) if WRAPPER.sub("", n) == weight]
                assert row.at_weight == pytest.approx(float(gradient.norm()), rel=1e-4)
        else:  # their weights lie deeper
            assert row.at_weight is None
    expected = {"whole model": "full", "router-only": "lora"}.get(policy, policy)
    assert {row.how for row in report.rows} == {expected}
    first = "model.layers.0.self_attention.experts.router"  # below it only the embeddings
    assert report.unmoved == ([first] if model_type == "jetmoe" and policy == "frozen" else [])
    assert all(f"{row.name}: " in str(report) for row in report.rows)


@pytest.mark.parametrize("layers", [3, 40])
def test_report_names_what_is_lost_and_stays_short(layers):
    model = phb.patch(tiny_model("mixtral", num_hidden_layers=layers).train(), {"coef": COEF})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.self_attn" in name)
    report = phb.learning_report(model)
    assert report.unmoved == ["model.layers.0.mlp.gate"] and all(row.how == "frozen" for row in report.rows)
    text = str(report)
    assert "model.layers.0.mlp.gate: frozen, (not measured) at its logits, nothing below it learns: its prices" in text
    assert f"model.layers.{layers - 1}.mlp.gate: frozen, (not measured) at its logits, (not measured) to 4" in text
    assert len(text.splitlines()) == (4 if layers == 3 else 18) and ("(24 more in" in text) == (layers == 40)


@pytest.mark.parametrize("policy", ["whole model", "router-only", "frozen"])
def test_trainer_reports_once(policy, warned, tmp_path):
    model = phb.patch(tiny_model("mixtral"), {"coef": COEF})
    if POLICIES[policy] is not None:
        model = get_peft_model(model, phb.lora_config(model, **POLICIES[policy]))
    rows = [{name: tensor[0] for name, tensor in tiny_batch(model, 1, 8, seed=i).items()} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, args, train_dataset=rows)
    phb.attach(trainer)
    trainer.train()
    messages = warned.about("Balancing gradient")
    assert len(messages) == (0 if policy == "whole model" else 1)
    assert not any("not measured" in message for message in messages)
    assert "e-" in str(phb.learning_report(model)) and "not measured" not in str(phb.learning_report(model))


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
    ],
)
def test_what_would_do_nothing_or_fail_later_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        phb.lora_config(tiny_model("mixtral"), **options)


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


def test_a_model_with_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"MixtralForCausalLM already carries an adapter \(at 'model.layers.0"):
        phb.lora_config(adapted(tiny_model("mixtral"), targets="experts"))


@pytest.mark.parametrize("policy", ["lora", "full", "router-only"])
def test_gate_of_remote_code(policy):
    """`MoEGate` with a list of linear experts in the layer itself, and no attention."""
    model = remote_model("moonlight")
    with pytest.raises(ValueError, match="RemoteForCausalLM has no attention that an adapter could train"):
        phb.lora_config(model, router="lora")
    targets = None if policy == "router-only" else "experts"
    model = adapted(model, router=policy, targets=targets, task_type=None)  # it cannot generate
    names = learning(model)
    experts = {f"lora model.layers.{i}.experts.{j}" for i in range(2) for j in range(8)}
    routers = {f"{'' if policy == 'full' else 'lora '}model.layers.{i}.gate" for i in range(2)}
    routers = {f"{name}.weight" for name in routers} if policy == "full" else routers
    assert names == routers | (set() if policy == "router-only" else experts)
    assert_all_learn(model)


# ---------------------------------------------------------------------- adapters on disk, merged, several


def trained_adapter(base, policy, steps=2, **config):
    """A patched model from the folder `base` whose adapter and duals have moved."""
    model = phb.AutoModelForCausalLM.from_pretrained(base, phi_balance={"coef": COEF, "ema_rate": 0.5, **config})
    model = get_peft_model(model, phb.lora_config(model, **policy)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for seed in range(steps):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        phb.get_balancer(model).step()
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def assert_same_duals(left, right):
    left, right = phb.get_balancer(left).state_dict(), phb.get_balancer(right).state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("policy", ["lora", "full", "router-only"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_adapter_comes_back_with_its_duals(model_type, policy, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    model = trained_adapter(tmp_path / "base", POLICIES[policy], bias_coef=0.1)
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(tiny_model(model_type)))
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    for flag in ({}, {"phi_balance": True}, {"phi_balance": {"coef": 0.0, "bias_coef": 0.1}}):
        loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **flag)
        if "phi_balance" not in flag or flag["phi_balance"] is True:
            assert phb.get_balancer(loaded).config == phb.get_balancer(model).config
            assert_same_duals(loaded, model)
        assert torch.equal(logits_of(loaded), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = phb.patch(PeftModel.from_pretrained(plain, tmp_path / "adapter"), phb.get_balancer(model).config)
    phb.get_balancer(loaded).load(tmp_path / "adapter")
    assert_same_duals(loaded, model)
    assert torch.equal(logits_of(loaded), expected)
    ordinary = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", phi_balance=False)
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(ordinary)

    merged = model.merge_and_unload()  # an ordinary checkpoint with duals
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_duals(loaded, merged)
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_adapter_of_a_model_that_was_never_patched(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, phb.lora_config(model)).save_pretrained(tmp_path / "adapter")
    plain = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(plain)
    flagged = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", phi_balance=True)
    assert phb.get_balancer(flagged).steps == 0


def test_one_balancer_for_several_adapters(tmp_path):
    """A second adapter joins, learns and is saved; the first is as before; unpatching leaves both."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    model = trained_adapter(tmp_path / "base", {"router": "lora"})
    first, balancer = logits_of(model), phb.get_balancer(model)
    plain = tiny_model("mixtral")
    model.add_adapter("second", phb.lora_config(plain, router="lora"))
    model.set_adapter("second")
    torch.testing.assert_close(logits_of(model), logits_of(plain))
    model.train()(**tiny_batch(model)).loss.backward()
    balancer.step()
    assert phb.get_balancer(model) is balancer and balancer.steps == 3
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all(".second." in name for name in grads)
    assert any(grad.any() for name, grad in grads.items() if ".gate." in name)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    phb.unpatch(model)
    assert torch.equal(logits_of(model), first)
    phb.patch(model, {"coef": COEF}).save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "adapters")
    assert torch.equal(logits_of(loaded), first)


@pytest.mark.parametrize("policy", ["lora", "full"])
def test_resumed_run_of_an_adapter_equals_the_uninterrupted_one(policy, tmp_path):
    def run(folder, resume=None, **arguments):
        model = phb.patch(tiny_model("deepseek_v3"), {"coef": COEF, "bias_coef": 0.1})
        torch.manual_seed(0)
        model = get_peft_model(model, phb.lora_config(model, **POLICIES[policy]))
        trainer = make_trainer(model, tmp_path / folder, optim="adamw_torch", save_strategy="steps", **arguments)
        phb.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run("whole", save_steps=2)
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), save_steps=2)
    assert_same_duals(resumed, whole)
    left, right = (dict(model.named_parameters()) for model in (resumed, whole))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert phb.get_balancer(whole).steps == 4


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
    model = adapted(prepare_model_for_kbit_training(model), **POLICIES[policy])
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
        assert_all_learn(adapted(prepare_model_for_kbit_training(model), **options))
