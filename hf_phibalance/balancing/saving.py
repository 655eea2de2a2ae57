"""Saves and loads the state with the weights or the adapter it belongs to: what the package's wrappers in transformers and PEFT do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging

from ..files import STATE_NAME, find_state
from .balancer import PhiBalancer, prefix_of
from .changes import Undo
from .duals import NAME
from .patching import Patch, find_balancer, follow_root, get_balancer, has_other_experts, patch
from .process import balancers, wraps


logger = logging.get_logger(__name__)


@wraps("transformers", "PreTrainedModel", "save_pretrained")
def _save_model(inner: Callable, root: Any, *args: Any, **kwargs: Any) -> Any:
    """Writes the state next to the weights. These have no bias, and the config is as without balancing."""
    balancer = find_balancer(root)
    if balancer is None or not balancer.is_saved:
        return inner(root, *args, **kwargs)
    follow_root(balancer, root)
    if has_other_experts(balancer):
        balancer = get_balancer(patch(root))
    given = inspect.signature(inner).bind(root, *args, **kwargs).arguments
    if given.get("is_main_process", True) and not (dist.is_initialized() and dist.get_rank()):
        balancer.save(given["save_directory"])
        _warn_about_plain_load(balancer)
    bias, saving = f"{prefix_of(balancer.backbone, root)}{NAME}.bias", Undo()
    saving.set(root, "_keys_to_ignore_on_save", {*(root._keys_to_ignore_on_save or ()), bias})
    try:
        with Patch.of(balancer).built_in.suspended():
            return inner(root, *args, **kwargs)
    finally:
        saving.restore()


@wraps("transformers.utils", "PushToHubMixin", "_get_files_timestamps")
def _files_before(inner: Callable, saved: Any, folder: Any) -> dict[str, float]:
    """Lists the files that `save_pretrained(push_to_hub=True)` need not upload. The state is not one: it was just written."""
    times = inner(saved, folder)
    if any(balancer.root is saved for balancer in balancers()):
        times.pop(STATE_NAME, None)
    return times


def _warn_about_plain_load(balancer: PhiBalancer) -> None:
    """Warns once that a plain load loses the selection bias; once more, with figures, after an evaluation."""
    biases, found, figures = balancer.biases(), balancer.evaluated, ""
    lost = [site.name for site in balancer.sites if not site.native_bias and bool(biases[site.name].any())]
    if not balancer.has_bias or not lost:
        return
    if found:
        figures = f" (MaxVio {found['plain_max_vio']:.3f} instead of {found['max_vio']:.3f} in the last evaluation)"
    logger.warning_once(
        f"The selection bias of {len(lost)} routers ({lost[0]!r}, ...) is kept in {STATE_NAME}, not in the weights: "
        f"loading this model without the phi_balance flag loses it and routes some tokens to other experts{figures}. "
        "For engines that do not know it: phb.fold(model, batches) puts it into the weights, `phibalance export` (phb.export) "
        "writes a checkpoint and measures what that costs."
    )


@wraps("peft", "PeftModel", "save_pretrained")
def _save_adapters(inner: Callable, model: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    """Writes a state next to each adapter that has one."""
    balancer = find_balancer(model) if kwargs.get("is_main_process", True) else None
    if balancer is not None and balancer.is_saved and not (dist.is_initialized() and dist.get_rank()):
        balancer.follow_adapter()
        names = [balancer.duals.adapter, *(other for other in balancer.duals.by_adapter if other is not None)]
        selected = kwargs.get("selected_adapters")
        for name in names if selected is None else [name for name in names if (name or "default") in selected]:
            with balancer.using_adapter(name):
                balancer.save(save_directory if name in (None, "default") else Path(save_directory, name))
        if balancer.has_bias and any(bool(bias.any()) for bias in balancer.biases().values()):
            logger.warning_once(
                f"The selection bias that was trained with this adapter is in {STATE_NAME} beside it, not in the adapter: an engine, or "
                "PeftModel on a base that was loaded without phi_balance=True, routes without it. Load it with "
                "from_pretrained of phb's auto classes (phb.AutoModelForCausalLM, ...), or make a checkpoint of it with `phibalance export`."
            )
    return inner(model, save_directory, *args, **kwargs)


@wraps("peft", "PeftModel", "load_adapter")
def _load_adapter(inner: Callable, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    result = inner(model, model_id, adapter_name, *args, **kwargs)
    _load_state_of_adapter(model, model_id, adapter_name, **kwargs)
    return result


@wraps("transformers.integrations", "PeftAdapterMixin", "load_adapter")
def _load_adapter_into(inner: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    result = inner(model, *args, **kwargs)
    given = inspect.signature(inner).bind(model, *args, **kwargs).arguments
    if given.get("peft_model_id") is not None:
        _load_state_of_adapter(model, given["peft_model_id"], given.get("adapter_name") or "default")
    return result


def _load_state_of_adapter(model: Any, source: str, name: str, **kwargs: Any) -> None:
    """Loads the state that was saved next to the adapter."""
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
