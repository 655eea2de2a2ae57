"""Putting φ-balancing into a model and taking it out again, by hooks alone: no class, parameter or buffer changes.

Forward hooks see a router wherever its forward may hide (in its class, in an instance that accelerate dispatched, in a
parametrisation of PEFT, inside FSDP or DDP), keep `isinstance` and state-dict keys, and can be removed without trace.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..routers.discovery import REMOTE_TRAITS, RouterSite, find_routers
from ..routers.inside import RouterMode, rank_scores
from .balancer import PhiBalancer
from .duals import STATE_NAME
from .learning import LearningReport


logger = logging.get_logger(__name__)
PATCH_ATTRIBUTE = "_phi_balance_patch"
BUILT_IN_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
# Stands for 0 where remote code computes its loss only `if alpha > 0` and then uses it in any case.
VANISHING = 1e-300


class MISSING:
    """Stands for an attribute that was not there; a class, because copies and pickles keep its identity."""


# ---------------------------------------------------------------------- hooks


class _Hook:
    """A removable hook that follows its balancer when the whole model is copied, and shares it when a router alone is."""

    def __init__(self, balancer: PhiBalancer) -> None:
        self.balancer = balancer

    def __deepcopy__(self, memo: dict) -> _Hook:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if id(self.balancer.root) in memo:
            twin.balancer = copy.deepcopy(self.balancer, memo)
        return twin


class RouterHook(_Hook):
    """Forward hook of one router: statistics out, price gradient in."""

    def __init__(self, balancer: PhiBalancer, index: int) -> None:
        super().__init__(balancer)
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        balancer, traits = self.balancer, self.balancer.sites[self.index].kind.traits
        if balancer.is_idle:
            return None
        logits = traits.logits(output, module, args, balancer.sites[self.index].kind.index)
        if balancer.is_measuring and args:
            balancer.measure(self.index, module, args[0], logits)
        chosen = self._choice(logits) if traits.selected is None else output[traits.selected]
        if traits.carrier is None:
            return balancer.observe(self.index, logits, chosen, logits)
        paid = balancer.observe(self.index, logits, chosen, output[traits.carrier])
        return (*output[: traits.carrier], paid, *output[traits.carrier + 1 :])

    def _choice(self, logits: Tensor) -> Tensor:
        """The selection `(T, k)` of a router that does not return it."""
        site, bias = self.balancer.sites[self.index], self.balancer.choice_bias(self.index)
        scores = torch.softmax(logits, -1, dtype=logits.dtype) if site.kind.traits.ranks == "probs" else logits
        ranked = scores if bias is None else rank_scores(scores, bias)
        return torch.ops.aten.topk(ranked, site.top_k)[1]  # the operator itself: `RouterMode` may be active


class InsideHook(_Hook):
    """Before and after the forward that selects: in between, its softmax is noted and the selection bias in force."""

    def __init__(self, balancer: PhiBalancer, index: int, before: bool, sees_router: bool) -> None:
        super().__init__(balancer)
        self.index = index
        self.before = before
        self.sees_router = sees_router  # and not only the forward that ranks what the router has returned

    def __call__(self, module: nn.Module, args: tuple, output: Any = None) -> None:
        bias = self.balancer.selection_bias(self.index)
        notes = self.sees_router and self.balancer.wants_softmax(self.index)
        if bias is None and not notes:
            return
        experts = self.balancer.sites[self.index].num_experts
        if self.before:
            RouterMode(experts, bias, zero_is_masked=_groups(module) > 1, notes_softmax=notes).__enter__()
        elif torch.compiler.is_compiling():
            RouterMode(experts, bias).__exit__(None, None, None)  # leaves the mode entered last
        elif (mode := RouterMode.innermost()) is not None:  # else a hook before ours has raised
            mode.__exit__(None, None, None)
            self.balancer.softmax = mode.softmax
            if mode.scores is not None:
                self.balancer.observe_scores(self.index, mode.scores)


def _groups(router: nn.Module) -> int:
    """Groups of experts to which a router first limits its choice; 1 if it does not."""
    return getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1


class BackboneHook(_Hook):
    """Before and after the forward of the model that holds all routers: its attention mask tells which tokens count."""

    def __init__(self, balancer: PhiBalancer, before: bool) -> None:
        super().__init__(balancer)
        self.before = before

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        if self.before:
            if getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "the threads of torch.nn.DataParallel would count into the same statistics at once. Start one process "
                    "per GPU (torchrun, DistributedDataParallel), or use one GPU."
                )
            if not torch.compiler.is_compiling():
                RouterMode.leave_interrupted()
            self.balancer.open_forward(_by_name(module, args, kwargs), module.training)
        else:
            self.balancer.close_forward()


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call of `module` by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def _install_hooks(balancer: PhiBalancer, backbone: nn.Module) -> None:
    for index, site in enumerate(balancer.sites):
        for module in site.modules:
            module.register_forward_hook(RouterHook(balancer, index), prepend=True)
            in_parent = site.kind.traits.selects_in_parent and site.parent is not None
            selecting = site.parent if in_parent and site.parent else module
            selecting.register_forward_pre_hook(InsideHook(balancer, index, True, sees_router=not in_parent))
            selecting.register_forward_hook(
                InsideHook(balancer, index, False, sees_router=not in_parent), prepend=True, always_call=True
            )
    backbone.register_forward_pre_hook(BackboneHook(balancer, before=True), with_kwargs=True)
    backbone.register_forward_hook(BackboneHook(balancer, before=False), with_kwargs=True, always_call=True)


def _remove_hooks(root: nn.Module) -> None:
    """Removes every hook of ours, found by its type: copies that PEFT made have no handle."""
    for module in root.modules():
        tables: list[list[dict[int, Any]]] = [
            [module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
            [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        ]
        for hooks, *flags in tables:
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                for table in (hooks, *flags):
                    table.pop(key, None)


def _forget_compiled_code() -> None:
    """`torch.compile` does not look whether hooks have come or gone since: it would go on without them, or with them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ---------------------------------------------------------------------- what patch changes besides


def _unwrap(model: nn.Module) -> list[nn.Module]:
    """`model` and what it wraps, outermost first: compiled, data-parallel and PEFT models down to the transformers one."""
    chain = [model]
    while True:
        inner = extract_model_from_parallel(chain[-1], keep_torch_compile=False)
        if inner is chain[-1] and callable(to_base := getattr(inner, "get_base_model", None)):
            inner = to_base()
        if inner is chain[-1]:
            return chain
        chain.append(inner)


def _backbone(root: nn.Module, sites: list[RouterSite]) -> nn.Module:
    """The outermost transformers model *inside* `root` that holds all routers: heads and trainers call it, not `root`."""
    routers = {id(module) for site in sites for module in site.modules}
    holders = [
        module
        for module in root.modules()
        if isinstance(module, PreTrainedModel) and routers <= {id(child) for child in module.modules()}
    ]
    return holders[1] if len(holders) > 1 else root


class Undo:
    """Attribute changes that can be taken back in reverse order, exactly: absence is restored as well."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        name = getattr(type(target), "attribute_map", {}).get(name, name)
        self._changes.append((target, name, vars(target).get(name, MISSING), value))
        setattr(target, name, value)

    def has_changed(self, name: str) -> bool:
        """Whether an attribute called `name` is changed at present."""
        return any(name == changed for _, changed, _, _ in self._changes)

    def restore(self) -> None:
        while self._changes:
            target, name, old, value = self._changes.pop()
            if callable(value) and vars(target).get(name) is not value:
                continue  # somebody has wrapped our method since; it does nothing any more
            if old is MISSING:
                vars(target).pop(name, None)
            else:
                setattr(target, name, old)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The original values, for the duration."""
        changes = list(self._changes)
        self.restore()
        try:
            yield
        finally:
            for target, name, _, value in changes:
                self.set(target, name, value)


@dataclass
class Patch:
    """What a patched model carries: its balancer, and how to take everything back."""

    balancer: PhiBalancer
    undo: Undo = field(default_factory=Undo)
    undo_built_in: Undo = field(default_factory=Undo)  # the auxiliary loss that is off meanwhile
    frozen: list[nn.Parameter] = field(default_factory=list)  # of the routers, to be trained again afterwards


def _switch_off_built_in_loss(root: nn.Module, undo: Undo) -> bool:
    """Sets every coefficient of the family's own auxiliary loss to 0; returns whether one was on."""
    was_on = False
    whole: Any = getattr(root, "config", None)
    for config in {id(c): c for c in (whole, whole.get_text_config())}.values() if whole is not None else ():
        was_on |= bool(getattr(config, "output_router_logits", False))
        for name, off in (("output_router_logits", False), *((name, 0.0) for name in BUILT_IN_COEFFICIENTS)):
            if getattr(config, name, off) != off:
                undo.set(config, name, off)
    for module in root.modules():
        for name in BUILT_IN_COEFFICIENTS:
            if isinstance(module, PreTrainedModel) and vars(module).get(name):
                undo.set(module, name, 0.0)
        if type(module).__name__ in REMOTE_TRAITS and (getattr(module, "alpha", None) or 0.0) > VANISHING:
            was_on = True
            undo.set(module, "alpha", VANISHING)  # coefficient of the gate's own auxiliary loss
    return was_on


def _keep_state_beside_weights(model: nn.Module, undo: Undo) -> None:
    """Lets `model.save_pretrained` write the state as well, and the config of the ordinary model it is."""
    if hasattr(type(model), "save_pretrained"):
        _wrap_method(model, "save_pretrained", _save_with_state, undo)


def _wrap_method(model: nn.Module, name: str, wrapper: Callable, undo: Undo) -> None:
    """Lets `model.name(...)` be `wrapper(model, inner, ...)`, once, in a way that copies and pickles of `model` keep."""
    inner = getattr(model, name)
    if getattr(inner, "func", None) is not wrapper:
        undo.set(model, name, functools.update_wrapper(functools.partial(wrapper, model, inner), inner))


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
    lost = [site.name for site in balancer.sites if not site.native_bias]
    if balancer.has_bias and lost:
        logger.warning_once(
            f"The selection bias of {len(lost)} routers ({lost[0]!r}, ...) is kept in {STATE_NAME}, not in the weights: "
            "loading this model without the phi_balance flag loses it and routes some tokens to other experts."
        )


def _hand_labels_to_balancer(root: nn.Module, undo: Undo) -> None:
    """For `token_mask="labels"`: the backbone never sees the labels, and PEFT calls `root.forward` around its hooks."""
    _wrap_method(root, "forward", _forward_with_labels, undo)


def _forward_with_labels(root: nn.Module, inner: Callable, *args, **kwargs) -> Any:
    present = find_patch(root)
    if present is None:
        return inner(*args, **kwargs)
    with present.balancer.labels_of(_by_name(root, args, kwargs).get("labels")):
        return inner(*args, **kwargs)


def _refuse_bypassed(root: nn.Module, sites: list[RouterSite]) -> None:
    if not getattr(root, "use_kernels", False):
        return
    for site in sites:
        kernel = getattr(type(site.parent), "kernel_layer_name", None)
        if kernel is not None:
            raise ValueError(
                f"use_kernels=True replaces the forward of {type(site.parent).__name__} by the kernel {kernel!r}, which "
                f"never calls its router {site.name!r}: nothing could be balanced. Load the model with use_kernels=False."
            )


# ---------------------------------------------------------------------- public


def find_patch(model: nn.Module) -> Patch | None:
    """What a patched model (wrapped or not) carries, or `None`."""
    return vars(_unwrap(model)[-1]).get(PATCH_ATTRIBUTE)


def get_balancer(model: nn.Module) -> PhiBalancer:
    """
    The [`PhiBalancer`] of a patched model, which may be wrapped by PEFT, DDP or `torch.compile`.

    Raises:
        ValueError: if the model is not patched.
    """
    present = find_patch(model)
    if present is None:
        raise ValueError(f"{type(_unwrap(model)[-1]).__name__} is not φ-balanced; call phb.patch(model) first.")
    for wrapper in _unwrap(model):  # those added since patching keep the state as well
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
    chain = _unwrap(model)
    present = find_patch(model)
    if present is not None and (config is None or config is True):
        config = present.balancer.config
    config = PhiBalanceConfig.from_any(config)
    if present is None or present.balancer.config != config:
        balancer = _prepare(chain[-1], config)
        if present is not None:
            balancer.take_over(present.balancer)
            unpatch(model)
        present = _install(balancer)
    else:
        present.balancer.find_copies()
    for wrapper in chain:
        _keep_state_beside_weights(wrapper, present.undo)
    if config.token_mask == "labels":
        _hand_labels_to_balancer(chain[-1], present.undo)
    if config.is_on and _switch_off_built_in_loss(chain[-1], present.undo_built_in):
        announce_switched_off()
    return model


def announce_switched_off() -> None:
    """One notice, whoever computes the loss: the trainers of TRL do so themselves, and note it in the model's config."""
    logger.warning_once(
        "φ-balancing is on: the auxiliary loss of the model or of its trainer (router_aux_loss_coef, "
        "output_router_logits) has been switched off. phb.unpatch(model) restores the model's."
    )


def _prepare(root: nn.Module, config: PhiBalanceConfig) -> PhiBalancer:
    sites = find_routers(root)
    _refuse_bypassed(root, sites)
    for site in sites:
        if config.bias_coef > 0:
            _refuse_unbiasable(site, config)
        if config.z_loss_coef > 0 and site.scoring == "probs":
            raise ValueError(
                f"z_loss_coef={config.z_loss_coef} is not possible for {site.kind.target.__name__}: it returns "
                "probabilities, and the z-loss is one of logits. Set z_loss_coef=0."
            )
    if config.rules.pooled and len({(site.num_experts, site.top_k) for site in sites}) > 1:
        raise ValueError(
            f"method={config.method!r} pools the layers of a model, but those of {type(root).__name__} have different "
            "numbers of experts. Use method='switch'."
        )
    return PhiBalancer(root, config, sites)


def _refuse_unbiasable(site: RouterSite, config: PhiBalanceConfig) -> None:
    if site.kind.traits.no_bias:
        raise ValueError(
            f"bias_coef={config.bias_coef} is not possible for {site.kind.target.__name__}: "
            f"{site.kind.traits.no_bias}. Set bias_coef=0 and use the price gradient (coef > 0)."
        )
    if site.native_bias and site.read_native_bias() is None:
        raise ValueError(
            f"bias_coef={config.bias_coef} is not possible while the selection bias of {site.name!r} is "
            "offloaded. Set bias_coef=0, or load the model without offloading to CPU or disk."
        )
    owners = [*site.modules, site.parent]
    if config.rules.bias_rule == "quantile":
        in_groups = any(_groups(owner) > 1 for owner in owners if owner is not None)
        if in_groups or site.top_k >= site.num_experts:
            why = "within groups" if in_groups else "all of them"
            raise ValueError(
                f"method={config.method!r} is not possible for {site.name!r}, which chooses {site.top_k} of "
                f"{site.num_experts} experts, {why}: a fair share is then no quantile of the scores. Use method='phi' "
                "or 'loss_free'."
            )


def _install(balancer: PhiBalancer) -> Patch:
    root, present = balancer.root, Patch(balancer)
    if balancer.config.rules.freezes:
        parameters = [p for site in balancer.sites for module in site.modules for p in module.parameters()]
        present.frozen = [p for p in parameters if p.requires_grad]
        for parameter in present.frozen:
            parameter.requires_grad_(False)
    _install_hooks(balancer, _backbone(root, balancer.sites))
    _forget_compiled_code()
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
        _remove_hooks(present.balancer.root)
        _forget_compiled_code()
        present.undo_built_in.restore()
        present.undo.restore()
        for parameter in present.frozen:
            parameter.requires_grad_(True)
    return model
