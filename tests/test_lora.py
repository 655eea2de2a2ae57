"""`lora_config` over all families: PEFT accepts it, and exactly what it promises learns."""

import re

import pytest
import torch
from peft import get_peft_model
from tiny import MODEL_TYPES, set_prices, tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import hf_phibalance as phb
from hf_phibalance.pricing import routing_probs
from hf_phibalance.routers import find_routers


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
        plain, r"attn\.(\d\.)?([qkvo]_proj|q_[ab]_proj|Wqkv)\.weight$|self_attention\.kv_proj\.weight$"
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
