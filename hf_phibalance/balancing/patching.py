"""Patches a model, finds the balancer of a patched one, and takes the patch out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..files import STATE_NAME
from ..routers import (
    arguments_by_name,
    canonical_name,
    check_module,
    find_backbone,
    find_routers,
    hook_adapters,
    install_hooks,
    remove_hooks,
    unwrap,
)
from . import process
from .balancer import PhiBalancer, prefix_of
from .changes import (
    Undo,
    WrappedForward,
    announce_switched_off,
    raise_precision,
    restore_precision,
    switch_off_built_in_loss,
    wrap_forward,
)
from .checks import LearningReport, refuse_impossible
from .duals import NAME, Duals
from .tokens import virtual_tokens


logger = logging.get_logger(__name__)
PATCH = "_phi_balance_patch"  # attribute of a patched backbone


@dataclass
class Patch:
    """What `unpatch` has to restore: attributes, the model's own auxiliary loss, frozen routers."""

    undo: Undo = field(default_factory=Undo)
    built_in: Undo = field(default_factory=Undo)
    frozen: list[str] = field(default_factory=list)  # names of the router parameters that were frozen
    others: list[str] = field(default_factory=list)  # names of the other parameters that were trained then

    @staticmethod
    def of(balancer: PhiBalancer) -> Patch:
        return vars(balancer.backbone)[PATCH]

    def freeze(self, balancer: PhiBalancer) -> None:
        """Freezes the routers if the method asks for that."""
        if balancer.config.rules.freezes:
            own = {id(p) for site in balancer.sites for m in site.modules for p in m.parameters()}
            for name, parameter in balancer.root.named_parameters():
                if parameter.requires_grad and id(parameter) in own:
                    parameter.requires_grad_(False)
                    self.frozen.append(canonical_name(name))
                elif parameter.requires_grad:
                    self.others.append(canonical_name(name))

    def unfreeze(self, balancer: PhiBalancer) -> None:
        """Lets the routers be trained again, unless the whole model was frozen since (by PEFT, for instance)."""
        parameters = {canonical_name(name): p for name, p in balancer.root.named_parameters()}
        if not self.others or any(parameters[name].requires_grad for name in self.others if name in parameters):
            for name in self.frozen:
                parameters[name].requires_grad_(True)
        self.frozen, self.others = [], []


# ---------------------------------------------------------------------- finding


def find_balancers(model: nn.Module) -> list[PhiBalancer]:
    """Returns the balancers of all patched models inside `model`, which may be wrapped."""
    check_module(model)
    found = []
    for backbone in model.modules():
        duals = backbone._modules.get(NAME)
        if isinstance(duals, Duals):
            balancer: PhiBalancer = duals.balancer
            is_new = balancer.backbone is not backbone or not balancer.has_root
            balancer.bind(backbone)
            if is_new:
                holders = (m for m in unwrap(model)[-1].modules() if isinstance(m, PreTrainedModel))
                root = next((m for m in holders if any(inner is backbone for inner in m.modules())), backbone)
                bind_root(balancer, root)
            in_front = virtual_tokens(model)
            balancer.virtual_tokens = balancer.virtual_tokens if in_front is None else in_front
            found.append(balancer)
    process.wrap_imported()
    return found


def find_balancer(model: nn.Module) -> PhiBalancer | None:
    """
    Returns the balancer of a patched model, which may be wrapped; `None` if it is not patched. Of several patched models it takes
    the one that is trained, or raises `ValueError`.
    """
    found = find_balancers(model)
    if len(found) > 1:
        trained = [b for b in found if any(p.requires_grad for p in b.root.parameters())]
        if len(trained) != 1:
            raise ValueError(
                f"{type(model).__name__} holds {len(found)} φ-balanced models; ask for the balancer of one of them."
            )
        found = trained
    return found[0] if found else None


def get_balancer(model: nn.Module) -> PhiBalancer:
    """
    Returns the [`PhiBalancer`] of a patched model, which PEFT, DDP, Fabric, `torch.compile` or your own module may wrap.

    Raises:
        ValueError: if the model is not patched, or holds several that are.
    """
    found = find_balancer(model)
    if found is None:
        raise ValueError(f"{type(unwrap(model)[-1]).__name__} is not φ-balanced; call phb.patch(model) first.")
    found.follow_adapter()
    return found


def learning_report(model: nn.Module) -> LearningReport:
    """
    Reports how each router of a patched model learns (in full, by LoRA, or not at all), and which parameters its balancing
    gradient reaches. `print` it for the text that training logs once.
    """
    return get_balancer(model).learning_report()


# ---------------------------------------------------------------------- patching


def patch(model: nn.Module, config: PhiBalanceConfig | dict | bool | None = None) -> nn.Module:
    """
    φ-balances every router of `model`, in place.

    Args:
        model (`torch.nn.Module`):
            A transformers MoE model, possibly wrapped by PEFT, DDP, FSDP, `torch.compile` or your own module.
        config (`PhiBalanceConfig`, `dict` or `bool`, *optional*):
            `True` or nothing means the defaults, or the present configuration of a patched model. A patched model may be
            given another configuration at any time; it keeps its balancer and its duals.

    Returns:
        `torch.nn.Module`: `model` itself.

    Raises:
        ValueError: if the configuration is invalid, or if the model's routers cannot be balanced (none found, a
            refused family, a kernel that bypasses them); the model is then untouched.
    """
    present = find_balancer(model)
    if config is None or config is True:
        config = PhiBalanceConfig() if present is None else present.config
    config = PhiBalanceConfig.from_any(config, "`config`")
    if config is None:
        raise ValueError(
            "`config` is False, but patch balances: leave out the call, or undo it by phb.unpatch(model)."
        )
    if present is not None and has_other_experts(present):
        logger.warning("Experts or layers were added or removed since the model was patched: balancing begins anew.")
        unpatch(model)
        present = None
    if present is None:
        present = _install(_find_target(model), config)
        get_balancer(model)
    else:
        follow_root(present, model)
        _reconfigure(present, config)
    if config.fp32_routers:
        raise_precision(present.sites)
    else:
        restore_precision(present.root)
    if config.is_on and switch_off_built_in_loss(present.root, Patch.of(present).built_in):
        announce_switched_off()
    return model


def _find_target(model: nn.Module) -> nn.Module:
    """Returns the transformers model in `model` that has routers: `model` without wrappers, if that is one."""
    inner = unwrap(model)[-1]
    if isinstance(inner, PreTrainedModel):
        return inner
    inside: set[nn.Module] = set()  # modules of the outermost transformers models
    balanceable = []
    for module in inner.modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            try:
                find_routers(module)
            except ValueError:
                continue
            balanceable.append(module)
    if len(balanceable) > 1:
        raise ValueError(
            f"{type(inner).__name__} holds {len(balanceable)} models with routers, {type(balanceable[0]).__name__} and others. "
            "Patch the one that is trained."
        )
    return balanceable[0] if balanceable else inner


def _install(root: nn.Module, config: PhiBalanceConfig) -> PhiBalancer:
    sites = find_routers(root)
    refuse_impossible(root, sites, config)
    if getattr(getattr(root, "config", None), "phi_balance", None):
        logger.warning(
            f"{type(root).__name__} was saved while φ-balanced, but loaded without its {STATE_NAME}: it begins with fresh duals, and a "
            "selection bias is lost. from_pretrained of phb's auto classes (phb.AutoModelForCausalLM, ...) loads both."
        )
    backbone = find_backbone(root, sites)
    devices = (p.device for m in sites[0].modules for p in m.parameters() if p.device.type != "meta")
    duals = Duals(config, sites, next(devices, torch.device("cpu")))
    balancer = PhiBalancer(sites, duals, prefix_of(backbone, root))
    patch = vars(backbone)[PATCH] = Patch()
    balancer.bind(backbone, root)
    give_own_config(root)
    patch.freeze(balancer)
    install_hooks(balancer.forwards)
    backbone._modules = {NAME: duals, **backbone._modules}  # first, so that PEFT unloads it before its own layers
    backbone.register_load_state_dict_pre_hook(_before_loading)
    wrap_forward(backbone, _forward_of_backbone, patch.undo)
    _mark(balancer)
    torch.compiler.reset()  # compiled code does not notice hooks
    return balancer


def _mark(balancer: PhiBalancer) -> None:
    """Makes the model around the backbone pass on its labels, and save the configuration."""
    root, undo = balancer.root, Patch.of(balancer).undo
    if root is not balancer.backbone:
        root.register_forward_pre_hook(_push_labels, with_kwargs=True)
        root.register_forward_hook(_pop_labels, always_call=True)
        wrap_forward(root, _forward_with_labels, undo)  # PEFT calls it around the hooks
    if hasattr(root, "config") and balancer.is_saved:
        undo.set(root.config, "phi_balance", balancer.config.to_dict())


def bind_root(balancer: PhiBalancer, root: nn.Module) -> None:
    """Binds `balancer` to the transformers model `root`: another one around the same backbone, or a copy."""
    backbone = balancer.backbone
    assert backbone is not None
    balancer.bind(backbone, root)
    if root is not backbone and not isinstance(vars(root).get("forward"), WrappedForward):
        _mark(balancer)


def follow_root(balancer: PhiBalancer, model: nn.Module) -> None:
    """Binds `balancer` to the transformers model in `model`, if that is another one around the backbone."""
    inner = unwrap(model)[-1]
    if isinstance(inner, PreTrainedModel) and inner not in (balancer.backbone, balancer.root):
        bind_root(balancer, inner)


def _reconfigure(balancer: PhiBalancer, config: PhiBalanceConfig) -> None:
    """Changes the configuration, and hooks the modules that wrappers have added since."""
    balancer.find_copies()
    hook_adapters(balancer.forwards)
    patch, backbone = Patch.of(balancer), balancer.backbone
    assert backbone is not None
    wrap_forward(backbone, _forward_of_backbone, patch.undo)  # accelerate may have put its own back
    if config == balancer.config:
        return
    refuse_impossible(balancer.root, balancer.sites, config)
    balancer.set_config(config)
    patch.unfreeze(balancer)
    patch.freeze(balancer)
    if not config.is_on:
        patch.built_in.restore()
    if hasattr(balancer.root, "config"):
        if balancer.is_saved:
            patch.undo.set(balancer.root.config, "phi_balance", config.to_dict())
        else:
            vars(balancer.root.config).pop("phi_balance", None)
    torch.compiler.reset()  # compiled code does not notice hooks


def has_other_experts(balancer: PhiBalancer) -> bool:
    """Whether experts or layers were added or removed since the model was patched."""
    now, then = ({(s.name, s.num_experts, s.top_k) for s in x} for x in (find_routers(balancer.root), balancer.sites))
    return now != then


def unpatch(model: nn.Module) -> nn.Module:
    """
    Takes φ-balancing out of `model`: restores hooks, attributes and config as before [`patch`]. Weights stay as trained. A
    family's own selection bias stays too, the base model's if an adapter was trained. Our selection bias is removed. Does
    nothing to a model that is not patched.

    Returns:
        `torch.nn.Module`: `model` itself.
    """
    for balancer in find_balancers(model):
        patch, backbone = Patch.of(balancer), balancer.backbone
        assert backbone is not None
        balancer.follow_adapter()
        balancer.duals.use_adapter(None)
        remove_hooks(balancer.root, _push_labels, _pop_labels)
        restore_precision(balancer.root)
        torch.compiler.reset()  # compiled code does not notice hooks
        patch.built_in.restore()
        patch.undo.restore()
        patch.unfreeze(balancer)
        hooks: dict[int, Any] = backbone._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.hook is _before_loading]:
            del hooks[key]
        del vars(backbone)[PATCH], backbone._modules[NAME]
        process.forget(balancer)
        balancer.watcher = None
    return model


def give_own_config(root: nn.Module) -> None:
    """Gives `root` a copy of its config, which other models may share."""
    config = getattr(root, "config", None)
    if config is None:
        return
    twins: dict[int, Any] = {}
    copy.deepcopy(config, twins)
    for module in root.modules():
        own = twins.get(id(vars(module).get("config")))
        if own is not None:
            module.config = own


# ---------------------------------------------------------------------- what runs in a patched model


def _forward_of_backbone(backbone: nn.Module, inner: Callable, *args, **kwargs) -> Any:
    """The forward of a patched backbone."""
    duals: Any = backbone._modules.get(NAME)
    if duals is None:
        return inner(*args, **kwargs)
    balancer = duals.balancer
    if not torch.compiler.is_compiling():
        if getattr(backbone, "_is_replica", False):
            raise RuntimeError(
                "the threads of torch.nn.DataParallel would count into the same statistics at once. Start one process "
                "per GPU (torchrun, DistributedDataParallel), or use one GPU."
            )
        balancer.bind(backbone)
        balancer.follow_adapter()
    return balancer.forwards.run(backbone, inner, arguments_by_name(backbone, args, kwargs), args, kwargs)


def wrap_below(balancer: PhiBalancer, wrapper: Callable) -> None:
    """Replaces the backbone's own forward, which ours calls, by `wrapper(backbone, inner, ...)`."""
    backbone = balancer.backbone
    assert backbone is not None
    ours: WrappedForward = vars(backbone)["forward"]
    ours.own = WrappedForward(backbone, wrapper, ours.own)


def _push_labels(root: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-forward hook of a model with a head: stores its labels, which the backbone does not get."""
    duals = _labelled_duals(root)
    if duals is not None:
        duals.balancer.forwards.push_labels(arguments_by_name(root, args, kwargs).get("labels"))


def _pop_labels(root: nn.Module, args: tuple = (), output: Any = None) -> None:
    duals = _labelled_duals(root)
    if duals is not None:
        duals.balancer.forwards.pop_labels()


def _forward_with_labels(root: nn.Module, inner: Callable, *args, **kwargs) -> Any:
    """Does the same around the model's forward, which PEFT calls without its hooks."""
    _push_labels(root, args, kwargs)
    try:
        return inner(*args, **kwargs)
    finally:
        _pop_labels(root)


def _labelled_duals(root: nn.Module) -> Any:
    """Returns the duals of the backbone of `root` if `token_mask="labels"`, else `None`."""
    duals: Any = getattr(root, "base_model", root)._modules.get(NAME)
    return duals if duals is not None and duals.balancer.config.token_mask == "labels" else None


def _before_loading(backbone: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Resets our selection bias before weights of the routers are loaded that have none."""
    duals: Any = backbone._modules.get(NAME)
    if duals is None or any(key.startswith(f"{prefix}{NAME}.") for key in state_dict):
        return
    first = duals.balancer.names_in_backbone()[0]
    others = ("lora_", "modules_to_save")  # of an adapter
    keys = (key for key in state_dict if first.rpartition(".")[2] in key and not any(part in key for part in others))
    if any(canonical_name(key).startswith(f"{canonical_name(prefix)}{first}.") for key in keys):
        duals.forget_bias()
