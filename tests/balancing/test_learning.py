"""The learning report: which routers learn, and what the balancing gradient reaches, by autograd."""

import pytest
import torch
from adapters import POLICIES, WRAPPER, balanced
from charging import COEF
from peft import get_peft_model
from tiny import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs


pytestmark = pytest.mark.slow


EXPERTS = {
    "whole model": "full",
    "lora": "lora",
    "full": "lora",
    "frozen": "frozen",
    "router-only": "frozen",
}  # of POLICIES


def reached_from(model, name):
    """By autograd: the trained parameters that a loss on the probabilities of router `name` alone reaches."""
    site = next(site for site in phb.get_balancer(model).sites if site.name == name)
    noted = []
    handle = site.modules[-1].register_forward_hook(lambda module, args, output: noted.append(output[site.kind.index]))
    model(**tiny_batch(model))
    handle.remove()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not noted[0].requires_grad:
        return []
    probs = routing_probs(noted[0], site.scoring)
    grads = torch.autograd.grad((probs * torch.randn(8)).sum(), trained.values(), allow_unused=True)
    return [(WRAPPER.sub("", n), p) for (n, p), grad in zip(trained.items(), grads) if grad is not None]


def unmoved(report):
    """Routers whose balancing gradient reaches no trained parameter."""
    return [row.name for row in report.rows if not row.parameters and not row.below]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "jetmoe", "gemma4_text"])
def test_report_agrees_with_autograd(model_type, policy):
    plain = tiny_model(model_type).train()
    model = phb.patch(plain, {"coef": COEF}) if POLICIES[policy] is None else balanced(plain, **POLICIES[policy])
    report = phb.learning_report(model)
    assert [row.name for row in report.rows] == phb.get_balancer(model).layer_names
    for row in report.rows:
        reached = reached_from(model, row.name)
        own = [p.numel() for name, p in reached if name.startswith(f"{row.name}.")]
        # of the experts' outputs, after the logits
        scale = 8 if model_type == "gemma4_text" and row.how == "full" else 0
        assert row.parameters == sum(own) + scale
        if model_type != "gemma4_text" or policy != "whole model":  # it has embeddings of its own for every layer
            assert row.below == len(reached) - len(own)
    expected = {"whole model": "full", "router-only": "lora"}.get(policy, policy)
    assert {row.how for row in report.rows} == {expected}
    assert {row.experts for row in report.rows} == {EXPERTS[policy]}
    assert f"routers ({len(report.rows)} {expected}), experts ({len(report.rows)} {EXPERTS[policy]}):" in str(report)
    first = "model.layers.0.self_attention.experts.router"  # below it only the embeddings
    assert unmoved(report) == ([first] if model_type == "jetmoe" and policy == "frozen" else [])
    assert all(f"{row.name}: " in str(report) for row in report.rows)


@pytest.mark.parametrize("layers", [3, 40])
def test_report_names_what_is_lost_and_stays_short(layers):
    model = phb.patch(tiny_model("mixtral", num_hidden_layers=layers).train(), {"coef": COEF})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.self_attn" in name)
    report = phb.learning_report(model)
    assert unmoved(report) == ["model.layers.0.mlp.gate"] and all(row.how == "frozen" for row in report.rows)
    text = str(report)
    assert "model.layers.0.mlp.gate: frozen, nothing below it learns: its prices move nothing" in text
    assert f"model.layers.{layers - 1}.mlp.gate: frozen, reaches 4 trained tensors below" in text
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
    assert all(message == str(phb.learning_report(model)) for message in messages)
