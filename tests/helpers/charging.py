"""Compares what the prices add to the gradient of a patched model with what they should add, in one step."""

import torch
import torch.nn.functional as F
from tiny import set_prices, tiny_model

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs


COEF = 2.0  # large, so that float32 resolves what is added to the task gradient


def priced(model_type="mixtral", config=None, **overrides):
    model = phb.patch(tiny_model(model_type, **overrides).train(), {"coef": COEF, **(config or {})})
    set_prices(model)
    return model


def collect(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(model, batch):
    """Returns the gradient of each trainable parameter after one forward and backward, by its name in `model`."""
    model.zero_grad()
    torch.manual_seed(0)  # some routers sample
    model(**batch).loss.backward()
    return collect(model)


def by_definition(model, batch):
    """Returns the gradient of COEF · Σ_layers mean over counted tokens of ⟨q, p⟩, by autograd on router outputs."""
    balancer = phb.get_balancer(model)
    logits, handles = {}, []
    for site in balancer.sites:
        for module in site.modules:

            def note(module, args, output, name=site.name, index=site.kind.index):
                logits[name] = output[index] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(note))
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch)
    for handle in handles:
        handle.remove()
    balancer.discard_step()
    mask = batch["attention_mask"].reshape(-1).float()
    term = sum(
        ((routing_probs(logits[site.name], site.scoring) * balancer.prices()[site.name]).sum(-1) * mask).sum()
        for site in balancer.sites
    )
    (COEF * term / mask.sum()).backward()
    return collect(model)


def by_weights(model, batch, gates, scoring):
    """
    The same gradient of an unpatched model, from the inputs of modules and the weights of their routers.

    `gates` are `(module with the router's input, weight (E, H), price (E,))`, `scoring` is "softmax" or "sigmoid".
    """
    mask, terms, handles = batch["attention_mask"].reshape(-1).float(), [], []
    for module, weight, price in gates:

        def note(module, args, weight=weight, price=price):
            logits = F.linear(args[0].reshape(-1, args[0].shape[-1]), weight)
            scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
            probs = scores / scores.sum(-1, keepdim=True)
            terms.append(((probs @ price) * mask).sum() / mask.sum())

        handles.append(module.register_forward_pre_hook(note))
    model.zero_grad()
    model(**batch)
    for handle in handles:
        handle.remove()
    (COEF * sum(terms)).backward()
    return collect(model)


def assert_charged_as_defined(model, batch):
    """Asserts that the gradient with prices minus the one without equals the definition's."""
    charged = gradients(model, batch)
    phb.patch(model, {"coef": 0.0})
    task = gradients(model, batch)
    phb.get_balancer(model).discard_step()
    expected = by_definition(model, batch)
    phb.patch(model, {"coef": COEF})
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5)
