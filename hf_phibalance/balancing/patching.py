"""Putting φ-balancing into a model and taking it out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..routers import (
    arguments_by_name,
    find_backbone,
    find_copies,
    find_routers,
    forget_compiled_code,
    hook_adapters,
    install_hooks,
    remove_hooks,
    unwrap,
)
from ..sidecar import STATE_NAME
from .balancer import PhiBalancer
from .built_in_loss import announce_switched_off, switch_off_built_in_loss
from .learning import LearningReport
from .refusals import refuse_impossible
from .undo import Undo, wrap_method


logger = logging.get_logger(__name__)
PATCH_ATTRIBUTE = "_phi_balance_patch"


@dataclass
class Patch:
    """What a patched model carries: its balancer, and how to take everything back."""

    balancer: PhiBalancer
    undo: Undo = field(default_factory=Undo)
    undo_built_in: Undo = field(default_factory=Undo)  # the auxiliary loss that is off meanwhile
    frozen: list[nn.Parameter] = field(default_factory=list)  # of the routers, to be trained again afterwards
    beside: list[nn.Parameter] = field(default_factory=list)  # what else was trained when these were frozen

    def thaw(self) -> None:
        """Lets the routers be trained again, unless whoever came since (PEFT, for instance) has frozen the whole model."""
        if not self.beside or any(parameter.requires_grad for parameter in self.beside):
            for parameter in self.frozen:
                parameter.requires_grad_(True)


def find_patch(model: nn.Module) -> Patch | None:
    """What a patched model (wrapped or not) carries, or `None`."""
    return vars(unwrap(model)[-1]).get(PATCH_ATTRIBUTE)


def get_balancer(model: nn.Module) -> PhiBalancer:
    """
    The [`PhiBalancer`] of a patched model, which may be wrapped by PEFT, DDP or `torch.compile`.

    Raises:
        ValueError: if the model is not patched.
    """
    present = find_patch(model)
    if present is None:
        raise ValueError(f"{type(unwrap(model)[-1]).__name__} is not φ-balanced; call phb.patch(model) first.")
    for wrapper in unwrap(model):  # those added since patching keep the state as well
        _keep_state_beside_weights(wrapper, present.undo)
    return present.balancer


def learning_report(model: nn.Module) -> LearningReport:
    """
    Whether each router of a patched model learns (in full, by LoRA, or not at all), and how much balancing gradient
    reaches its weight and the layers below; measured in the first training forward that has prices, which is in the
    second optimizer step. `print` it for the text that training logs once.

    Raises:
        ValueError: if the model is not patched.
    """
    return get_balancer(model).learning_report()


def patch(model: nn.Module, config: PhiBalanceConfig | dict | bool | None = None) -> nn.Module:
    """
    φ-balances every router of `model`, in place.

    Args:
        model (`torch.nn.Module`):
            A transformers MoE model, possibly wrapped by PEFT, DDP, FSDP or `torch.compile`.
        config (`PhiBalanceConfig`, `dict` or `bool`, *optional*):
            `True` or nothing stands for the defaults, or for the present configuration of a patched model. A patched
            model may be given another configuration; it keeps its duals where that configuration needs the same ones.

    Returns:
        `torch.nn.Module`: `model` itself.

    Raises:
        ValueError: if the configuration is invalid, or if the model's routers cannot be balanced (none found, a
            refused family, a kernel that bypasses them); the model is then untouched.
    """
    chain = unwrap(model)
    present = find_patch(model)
    if present is not None and (config is None or config is True):
        config = present.balancer.config
    config = PhiBalanceConfig.from_any(config)
    if present is None or present.balancer.config != config:
        sites = find_routers(chain[-1])
        refuse_impossible(chain[-1], sites, config)
        balancer = PhiBalancer(chain[-1], config, sites)
        if present is not None:
            balancer.take_over(present.balancer)
            unpatch(model)
        present = _install(balancer)
    else:
        find_copies(chain[-1], present.balancer.sites)
        hook_adapters(present.balancer.meter)
    for wrapper in chain:
        _keep_state_beside_weights(wrapper, present.undo)
    if config.token_mask == "labels":
        _hand_labels_to_balancer(chain[-1], present.undo)
    if config.is_on and switch_off_built_in_loss(chain[-1], present.undo_built_in):
        announce_switched_off()
    return model


def _install(balancer: PhiBalancer) -> Patch:
    root, present = balancer.root, Patch(balancer)
    if balancer.config.rules.freezes:
        parameters = [p for site in balancer.sites for module in site.modules for p in module.parameters()]
        present.frozen = [p for p in parameters if p.requires_grad]
        for parameter in present.frozen:
            parameter.requires_grad_(False)
        present.beside = [p for p in root.parameters() if p.requires_grad]
    install_hooks(balancer.meter, find_backbone(root, balancer.sites))
    forget_compiled_code()
    present.undo.set(root, PATCH_ATTRIBUTE, present)
    if hasattr(root, "config"):
        present.undo.set(root.config, "phi_balance", balancer.config.to_dict())
    return present


def unpatch(model: nn.Module) -> nn.Module:
    """
    Takes φ-balancing out of `model`: hooks, attributes and config are as before [`patch`]. Weights, and a family's own
    selection bias, stay as trained; a selection bias of ours goes. Without effect on a model that is not patched.

    Returns:
        `torch.nn.Module`: `model` itself.
    """
    present = find_patch(model)
    if present is not None:
        remove_hooks(present.balancer.root)
        forget_compiled_code()
        present.undo_built_in.restore()
        present.undo.restore()
        present.thaw()
    return model


# ---------------------------------------------------------------------- what a patched model does besides


def _keep_state_beside_weights(model: nn.Module, undo: Undo) -> None:
    """Lets `model.save_pretrained` write the state as well, and the config of the ordinary model it is."""
    if hasattr(type(model), "save_pretrained"):
        wrap_method(model, "save_pretrained", _save_with_state, undo)


def _save_with_state(model: nn.Module, inner: Callable, *args, **kwargs) -> Any:
    present = find_patch(model)
    if present is None:
        return inner(*args, **kwargs)
    given = inspect.signature(inner).bind(*args, **kwargs).arguments
    if given.get("is_main_process", True) and not (dist.is_initialized() and dist.get_rank()):
        present.balancer.save(given["save_directory"])
        _warn_about_plain_load(present.balancer)
    with present.undo_built_in.suspended():
        return inner(*args, **kwargs)


def _warn_about_plain_load(balancer: PhiBalancer) -> None:
    """Says once, or once more with figures after an evaluation, what a plain load would lose."""
    biases = balancer.biases()
    lost = [site.name for site in balancer.sites if not site.native_bias and bool(biases[site.name].any())]
    if balancer.has_bias and lost:
        found = balancer.evaluated
        figures = (
            f" (MaxVio {found['plain_max_vio']:.3f} instead of {found['max_vio']:.3f} in the last evaluation)"
            if found
            else ""
        )
        logger.warning_once(
            f"The selection bias of {len(lost)} routers ({lost[0]!r}, ...) is kept in {STATE_NAME}, not in the weights: "
            f"loading this model without the phi_balance flag loses it and routes some tokens to other experts{figures}. "
            "For engines that do not know it: phb.fold(model, batches) puts it into the weights, `phibalance export` (phb.export) "
            "writes a checkpoint and measures what that costs."
        )


def _hand_labels_to_balancer(root: nn.Module, undo: Undo) -> None:
    """For `token_mask="labels"`: the backbone never sees the labels, and PEFT calls `root.forward` around its hooks."""
    wrap_method(root, "forward", _forward_with_labels, undo)


def _forward_with_labels(root: nn.Module, inner: Callable, *args, **kwargs) -> Any:
    present = find_patch(root)
    if present is None:
        return inner(*args, **kwargs)
    with present.balancer.labels_of(arguments_by_name(root, args, kwargs).get("labels")):
        return inner(*args, **kwargs)
