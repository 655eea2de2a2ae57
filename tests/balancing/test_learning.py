"""The learning report: which routers learn, and what the balancing gradient reaches, by autograd."""

import pytest
import torch
from adapters import POLICIES, WRAPPER, balanced
from charging import COEF
from peft import get_peft_model
from tiny import set_prices, tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs


EXPERTS = {
    "whole model": "full",
    "lora": "lora",
    "full": "lora",
    "frozen": "frozen",
    "router-only": "frozen",
}  # of POLICIES


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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "jetmoe", "gemma4_text"])
def test_report_agrees_with_autograd(model_type, policy):
    plain = tiny_model(model_type).train()
    model = phb.patch(plain, {"coef": COEF}) if POLICIES[policy] is None else balanced(plain, **POLICIES[policy])
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
    assert {row.experts for row in report.rows} == {EXPERTS[policy]}
    assert f"routers ({len(report.rows)} {expected}), experts ({len(report.rows)} {EXPERTS[policy]});" in str(report)
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
