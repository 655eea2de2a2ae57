"""The definition, written out: what one optimizer step has to add to the gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hf_phibalance as phb

from .inputs import AUX_COEF, COEF, LONGEST, build_model, build_rows, collate


@dataclass(frozen=True)
class Reference:
    """Duals, and the gradients of one forward over all rows as flat vectors over all parameters."""

    duals: dict[str, Tensor]
    phi: Tensor
    built_in: Tensor
    is_router: Tensor  # (number of parameters,) which entries belong to routers


@functools.cache
def reference(model_type: str, token_mask: str = "attention") -> Reference:
    """The definition at random prices: autograd on the unpatched model, from the logits that its routers return."""
    model = build_model(model_type)
    duals, prices = random_duals(model)
    scoring = phb.supported_families()[model_type].scoring
    logits: dict[str, Tensor] = {}
    recorder = model._can_record_outputs["router_logits"]
    index = getattr(recorder, "index", 0)
    for name in prices:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, output, name=name: logits.update({name: output[index]}))
    batch = collate(build_rows(), LONGEST)
    model(**batch)
    mask = {
        "attention": batch["attention_mask"],
        "labels": batch["labels"] != -100,
        "all": torch.ones_like(batch["labels"]),
    }[token_mask]
    counted = mask.reshape(-1).bool()
    term = torch.zeros(())
    for name, price in prices.items():
        scores = logits[name].softmax(-1) if scoring == "softmax" else logits[name].sigmoid()
        probs = scores / scores.sum(-1, keepdim=True)
        term = term + (probs[counted] @ price).mean()
    term.backward()
    phi = flat_gradient(model)
    is_router = torch.cat(
        [torch.full((p.numel(),), name.rpartition(".")[0] in prices) for name, p in model.named_parameters()]
    )
    return Reference(duals, phi, built_in_gradient(model_type, batch), is_router)


def random_duals(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Duals of a patched `model` with non-zero prices, and these prices; `model` is left unpatched."""
    phb.patch(model, {"coef": COEF})
    balancer = phb.get_balancer(model)
    generator = torch.Generator().manual_seed(0)
    duals = balancer.state_dict()
    for name, value in duals.items():
        duals[name] = torch.tensor(1) if name == "steps" else torch.randn(value.shape, generator=generator).softmax(-1)
    balancer.load_state_dict(duals)
    prices = balancer.prices()
    phb.unpatch(model)
    return duals, prices


def built_in_gradient(model_type: str, batch: dict[str, Tensor]) -> Tensor:
    """Gradient of the model's own auxiliary loss, its coefficient included; zero if the family has none."""
    model = build_model(model_type, built_in=True)
    loss = getattr(model(**batch), "aux_loss", None)
    if loss is not None:
        (AUX_COEF * loss).backward()
    return flat_gradient(model)


def flat_gradient(model: nn.Module) -> Tensor:
    """Gradients of all parameters in one fp64 vector, gathered where they are sharded; those without one count as zero."""
    return torch.cat([_whole_gradient(parameter).reshape(-1).double() for parameter in model.parameters()])


def _whole_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return getattr(gradient, "full_tensor", lambda: gradient)().detach()
