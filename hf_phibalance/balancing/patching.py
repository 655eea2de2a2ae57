"""Putting φ-balancing into a model and taking it out again."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..files import STATE_NAME, find_state
from ..routers import (
    arguments_by_name,
    canonical_name,
    check_module,
    find_backbone,
    find_routers,
    forget_compiled_code,
    hook_adapters,
    install_hooks,
    remove_hooks,
    unwrap,
)
from . import process
from .adapters import virtual_tokens
from .balancer import PhiBalancer
from .built_in_loss import announce_switched_off, switch_off_built_in_loss
from .duals import NAME, Duals
from .learning import LearningReport
from .precision import raise_precision, restore_precision
from .refusals import refuse_impossible
from .undo import Undo, WrappedMethod, wrap_method


logger = logging.get_logger(__name__)
PATCH = "_phi_balance_patch"  # attribute of a patched backbone


@dataclass
class Patch:
    """What `unpatch` has to restore: attributes, the model's own auxiliary loss, frozen routers."""

    undo: Undo = field(default_factory=Undo)
    built_in: Undo = field(default_factory=Undo)
    frozen: list[str] = field(default_factory=list)  # names of the router parameters that were frozen
    others: list[str] = field(default_factory=list)  # names of the other parameters that were trained then

    def freeze(self, balancer: PhiBalancer) -> None:
        """Freezes the routers if the method asks for that."""
        if balancer.config.rules.freezes:
            own = {id(p) for site in balancer.sites for m in site.modules for p in m.parameters() if p.requires_grad}
            for name, parameter in balancer.root.named_parameters():
                if id(parameter) in own:
                    parameter.requires_grad_(False)
                    self.frozen.append(canonical_name(name))
            self.others = [canonical_name(n) for n, p in balancer.root.named_parameters() if p.requires_grad]

    def thaw(self, balancer: PhiBalancer) -> None:
        """Lets the routers be trained again, unless the whole model was frozen since (by PEFT, for instance)."""
        parameters = {canonical_name(name): p for name, p in balancer.root.named_parameters()}
        if not self.others or any(parameters[name].requires_grad for name in self.others if name in parameters):
            for name in self.frozen:
                parameters[name].requires_grad_(True)
        self.frozen = []


def find_balancers(model: nn.Module) -> list[PhiBalancer]:
    """
    Returns the balancers of all patched models inside `model`, which may be wrapped.

    Raises:
        TypeError: if `model` is no module of torch's.
    """
    check_module(model)
    found = []
    for backbone in model.modules():
        duals = backbone._modules.get(NAME)
        if isinstance(duals, Duals):
            balancer: PhiBalancer = duals.balancer
            root = _find_root(model, backbone) if balancer.backbone is not backbone or not balancer.has_root else None
            balancer.bind(backbone)
            if root is not None:
                _adopt(balancer, root)
            in_front = virtual_tokens(model)
            balancer.virtual_tokens = balancer.virtual_tokens if in_front is None else in_front
            found.append(balancer)
    process.follow_peft()
    return found


def _find_root(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """Returns the outermost transformers model in `model` that holds `backbone`."""
    for module in unwrap(model)[-1].modules():
        if isinstance(module, PreTrainedModel) and any(inner is backbone for inner in module.modules()):
            return module
    return backbone


def find_balancer(model: nn.Module) -> PhiBalancer | None:
    """
    Returns the balancer of a patched model, which may be wrapped; `None` if it is not patched.

    Raises:
        ValueError: if `model` holds several patched models of which more than one is trained.
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

    Raises:
        ValueError: if the model is not patched.
    """
    return get_balancer(model).learning_report()


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
    if present is not None and _has_other_experts(present):
        logger.warning("Experts or layers were added or removed since the model was patched: balancing begins anew.")
        unpatch(model)
        present = None
    if present is None:
        present = _install(_find_target(model), config)
        get_balancer(model)
    else:
        _follow_root(present, model)
        _reconfigure(present, config)
    if config.fp32_routers:
        raise_precision(present.sites)
    else:
        restore_precision(present.root)
    if config.is_on and switch_off_built_in_loss(present.root, _patch_of(present).built_in):
        announce_switched_off()
    return model


def _find_target(model: nn.Module) -> nn.Module:
    """Returns the transformers model in `model` that has routers: `model` without wrappers, if that is one."""
    inner = unwrap(model)[-1]
    if isinstance(inner, PreTrainedModel):
        return inner
    outermost: list[nn.Module] = []
    for module in inner.modules():
        inside = any(module is child for other in outermost for child in other.modules())
        if isinstance(module, PreTrainedModel) and not inside:
            outermost.append(module)
    balanceable = []
    for module in outermost:
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
    balancer = PhiBalancer(config, sites, duals, _prefix_of(backbone, root))
    patch = Patch()
    vars(backbone)[PATCH] = patch
    balancer.bind(backbone, root)
    give_own_config(root)
    patch.freeze(balancer)
    install_hooks(balancer.forwards)
    backbone._modules = {NAME: duals, **backbone._modules}  # first, so that PEFT unloads it before its own layers
    backbone.register_load_state_dict_pre_hook(_before_loading)
    wrap_method(backbone, "forward", _forward_of_backbone, patch.undo)
    _mark(balancer)
    forget_compiled_code()
    return balancer


def _prefix_of(backbone: nn.Module | None, root: nn.Module) -> str:
    """Returns the path of `backbone` in `root`, with a dot at its end, or `""`."""
    name = canonical_name(next(name for name, module in root.named_modules() if module is backbone))
    return f"{name}." if name else ""


def _mark(balancer: PhiBalancer) -> None:
    """Makes the model around the backbone pass on its labels, and save the configuration."""
    root, undo = balancer.root, _patch_of(balancer).undo
    if root is not balancer.backbone:
        root.register_forward_pre_hook(_push_labels, with_kwargs=True)
        root.register_forward_hook(_pop_labels, always_call=True)
        wrap_method(root, "forward", _forward_with_labels, undo)  # PEFT calls it around the hooks
    if hasattr(root, "config"):
        undo.set(root.config, "phi_balance", balancer.config.to_dict())


def _adopt(balancer: PhiBalancer, root: nn.Module) -> None:
    """Binds `balancer` to the transformers model `root`: another one around the same backbone, or a copy."""
    backbone = balancer.backbone
    balancer.rename(_prefix_of(backbone, root))
    balancer.bind(cast(nn.Module, backbone), root)
    if root is not backbone and not isinstance(vars(root).get("forward"), WrappedMethod):
        _mark(balancer)


def _follow_root(balancer: PhiBalancer, model: nn.Module) -> None:
    """Binds `balancer` to the transformers model in `model`, if that is another one around the backbone."""
    inner = unwrap(model)[-1]
    if isinstance(inner, PreTrainedModel) and inner not in (balancer.backbone, balancer.root):
        _adopt(balancer, inner)


def _reconfigure(balancer: PhiBalancer, config: PhiBalanceConfig) -> None:
    """Changes the configuration, and hooks the modules that wrappers have added since."""
    balancer.find_copies()
    hook_adapters(balancer.forwards)
    backbone = balancer.backbone
    assert backbone is not None
    if not isinstance(vars(backbone).get("forward"), WrappedMethod):  # accelerate has put its own back
        wrap_method(backbone, "forward", _forward_of_backbone, _patch_of(balancer).undo)
    if config == balancer.config:
        return
    refuse_impossible(balancer.root, balancer.sites, config)
    balancer.set_config(config)
    patch = _patch_of(balancer)
    patch.thaw(balancer)
    patch.freeze(balancer)
    if not config.is_on:
        patch.built_in.restore()
    if hasattr(balancer.root, "config"):
        vars(balancer.root.config)["phi_balance"] = config.to_dict()
    forget_compiled_code()


def _has_other_experts(balancer: PhiBalancer) -> bool:
    """Whether experts or layers were added or removed since the model was patched."""
    now, then = ({(s.name, s.num_experts, s.top_k) for s in x} for x in (find_routers(balancer.root), balancer.sites))
    return now != then


def _patch_of(balancer: PhiBalancer) -> Patch:
    return vars(balancer.backbone)[PATCH]


def unpatch(model: nn.Module) -> nn.Module:
    """
    Takes φ-balancing out of `model`: restores hooks, attributes and config as before [`patch`]. Weights stay as trained. A
    family's own selection bias stays too, the base model's if an adapter was trained. Our selection bias is removed. Does
    nothing to a model that is not patched.

    Returns:
        `torch.nn.Module`: `model` itself.
    """
    for balancer in find_balancers(model):
        backbone = balancer.backbone
        assert backbone is not None
        balancer.follow_adapter()
        balancer.duals.use_adapter(None)
        patch = _patch_of(balancer)
        remove_hooks(balancer.root, _push_labels, _pop_labels)
        restore_precision(balancer.root)
        forget_compiled_code()
        patch.built_in.restore()
        patch.undo.restore()
        patch.thaw(balancer)
        hooks: dict[int, Any] = backbone._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if hook.hook is _before_loading:
                del hooks[key]
        del vars(backbone)[PATCH], backbone._modules[NAME]
        process.forget(balancer)
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
    ours: WrappedMethod = vars(backbone)["forward"]
    ours.own = WrappedMethod(backbone, "forward", wrapper, ours.own)


def _push_labels(root: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-forward hook of a model with a head: stores its labels, which the backbone does not get."""
    duals = _duals_below(root)
    if duals is not None:
        duals.balancer.forwards.push_labels(arguments_by_name(root, args, kwargs).get("labels"))


def _pop_labels(root: nn.Module, args: tuple, output: Any) -> None:
    duals = _duals_below(root)
    if duals is not None:
        duals.balancer.forwards.pop_labels()


def _forward_with_labels(root: nn.Module, inner: Callable, *args, **kwargs) -> Any:
    """Does the same around the model's forward, which PEFT calls without its hooks."""
    duals = _duals_below(root)
    if duals is None:
        return inner(*args, **kwargs)
    duals.balancer.forwards.push_labels(arguments_by_name(root, args, kwargs).get("labels"))
    try:
        return inner(*args, **kwargs)
    finally:
        duals.balancer.forwards.pop_labels()


def _duals_below(root: nn.Module) -> Any:
    """Returns the duals of the backbone of `root` if `token_mask="labels"`, else `None`."""
    duals: Any = getattr(root, "base_model", root)._modules.get(NAME)
    return duals if duals is not None and duals.balancer.config.token_mask == "labels" else None


def _before_loading(backbone: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Resets our selection bias before weights of the routers are loaded that have none."""
    duals: Any = backbone._modules.get(NAME)
    if duals is None or any(key.startswith(f"{prefix}{NAME}.") for key in state_dict):
        return
    first = duals.balancer._own_names()[0]
    others = ("lora_", "modules_to_save")  # of an adapter
    keys = (key for key in state_dict if first.rpartition(".")[2] in key and not any(part in key for part in others))
    if any(canonical_name(key).startswith(f"{canonical_name(prefix)}{first}.") for key in keys):
        duals.forget_bias()


def _save_with_state(root: PreTrainedModel, inner: Callable, *args, **kwargs) -> Any:
    """`save_pretrained`: writes the state next to the weights. These have no bias, and the config is as without balancing."""
    balancer = find_balancer(root)
    if balancer is None:
        return inner(*args, **kwargs)
    _follow_root(balancer, root)
    if _has_other_experts(balancer):
        balancer = get_balancer(patch(root))
    given = inspect.signature(inner).bind(*args, **kwargs).arguments
    if given.get("is_main_process", True) and not (dist.is_initialized() and dist.get_rank()):
        balancer.save(given["save_directory"])
        _warn_about_plain_load(balancer)
    bias, saving = f"{_prefix_of(balancer.backbone, root)}{NAME}.bias", Undo()
    saving.set(root, "_keys_to_ignore_on_save", {*(root._keys_to_ignore_on_save or ()), bias})
    try:
        with _patch_of(balancer).built_in.suspended():
            return inner(*args, **kwargs)
    finally:
        saving.restore()


def _warn_about_plain_load(balancer: PhiBalancer) -> None:
    """Warns once that a plain load loses the selection bias; once more, with figures, after an evaluation."""
    biases = balancer.biases()
    lost = [site.name for site in balancer.sites if not site.native_bias and bool(biases[site.name].any())]
    if balancer.has_bias and lost:
        found, figures = balancer.evaluated, ""
        if found:
            figures = (
                f" (MaxVio {found['plain_max_vio']:.3f} instead of {found['max_vio']:.3f} in the last evaluation)"
            )
        logger.warning_once(
            f"The selection bias of {len(lost)} routers ({lost[0]!r}, ...) is kept in {STATE_NAME}, not in the weights: "
            f"loading this model without the phi_balance flag loses it and routes some tokens to other experts{figures}. "
            "For engines that do not know it: phb.fold(model, batches) puts it into the weights, `phibalance export` (phb.export) "
            "writes a checkpoint and measures what that costs."
        )


def _save_with_adapter(model: Any, folder: str | os.PathLike) -> None:
    """Called before `PeftModel.save_pretrained`: writes a state next to each adapter that has one."""
    balancer = find_balancer(model)
    if balancer is None or (dist.is_initialized() and dist.get_rank()):
        return
    balancer.follow_adapter()
    for name in [balancer.duals.adapter, *(other for other in balancer.duals.by_adapter if other is not None)]:
        with balancer.using_adapter(name):
            balancer.save(folder if name in (None, "default") else Path(folder, name))
    if balancer.has_bias and any(bool(bias.any()) for bias in balancer.biases().values()):
        logger.warning_once(
            f"The selection bias that was trained with this adapter is in {STATE_NAME} beside it, not in the adapter: an engine, or "
            "PeftModel on a base that was loaded without phi_balance=True, routes without it. Load it with "
            "from_pretrained of phb's auto classes (phb.AutoModelForCausalLM, ...), or make a checkpoint of it with `phibalance export`."
        )


def _load_with_adapter(model: Any, source: str, name: str, **kwargs: Any) -> None:
    """Called after `PeftModel.load_adapter`: loads the state that was saved next to the adapter."""
    path = find_state(source, kwargs)
    if path is None:
        return
    balancer = find_balancer(model)
    if balancer is None:
        logger.warning(
            f"{source} has a {STATE_NAME}: the adapter was trained φ-balanced, and a selection bias in that file is lost on this "
            "base. Load the base with phi_balance=True."
        )
        return
    with balancer.using_adapter(name):
        balancer.load(path)


process.around_save.append(_save_with_state)
process.on_peft_save.append(_save_with_adapter)
process.on_peft_load.append(_load_with_adapter)
