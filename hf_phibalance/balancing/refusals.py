"""Refuses what cannot be balanced, when a model is patched or at its first step, instead of silently doing nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..maths import noise_floor
from ..routers import RouterSite, count_groups
from .counts import Counts
from .ranks import Ranks


logger = logging.get_logger(__name__)
EVEN = 0.02  # probabilities closer than this to their mean, relatively, are called even


def refuse_impossible(root: nn.Module, sites: Sequence[RouterSite], config: PhiBalanceConfig) -> None:
    """
    Refuses a `config` that the routers `sites` of `root` cannot follow.

    Raises:
        ValueError: naming the router, the reason and the remedy.
    """
    _refuse_encoder_decoder(root)
    _refuse_pipeline(root)
    _refuse_local_choices(root)
    _refuse_bypassed(root, sites)
    for site in sites:
        if config.bias_coef > 0:
            _refuse_unbiasable(site, config)
        if config.z_loss_coef > 0 and site.scoring == "probs":
            raise ValueError(
                f"z_loss_coef={config.z_loss_coef} is not possible for {site.kind.target.__name__}: it returns "
                "probabilities, and the z-loss is one of logits. Set z_loss_coef=0."
            )
    parts = [site.name for site in sites if not site.sees_all]
    if parts and (config.rules.pooled or config.sequence_coef > 0):
        what, instead = f"sequence_coef={config.sequence_coef} balances", "sequence_coef=0"
        if config.rules.pooled:
            what, instead = f"method={config.method!r} pools", "method='switch'"
        raise ValueError(f"{what} whole sequences, but {parts[0]!r} sees only a part of them. Use {instead}.")
    if config.rules.pooled and len({(site.num_experts, site.top_k) for site in sites}) > 1:
        raise ValueError(
            f"method={config.method!r} pools the layers of a model, but those of {type(root).__name__} have different "
            "numbers of experts. Use method='switch'."
        )


def _refuse_encoder_decoder(root: nn.Module) -> None:
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(root).__name__} cannot be φ-balanced: it has an encoder and a decoder, whose routers see different tokens, "
            "and one token mask cannot tell which count in each. Balance a decoder-only model."
        )


def _refuse_pipeline(root: nn.Module) -> None:
    stage = getattr(root, "_pp_stage", None)
    if stage is not None:
        raise ValueError(
            f"pp_size={stage.pp_size} leaves on each rank a part of the routers of {type(root).__name__}, and the pipeline of "
            "transformers returns no loss to train on. Load the model without pp_size (DistributedConfig(fsdp_size=...) or "
            "tp_size=... spread it over the ranks as well)."
        )


def _refuse_local_choices(root: nn.Module) -> None:
    """Refuses expert-parallel plans of transformers 5.20 and older; can go with their support."""
    sizes = getattr(getattr(root, "config", None), "distributed_config", None)
    plan = getattr(root, "_ep_plan", None) or {}
    styles = sorted({style for style in plan.values() if style.endswith("_router")})
    if styles and getattr(root, "_device_mesh", None) is not None and getattr(sizes, "enable_expert_parallel", False):
        raise ValueError(
            f"this version of transformers spreads the experts of {type(root).__name__} by {styles[0]!r}, which numbers a router's "
            "choice anew on each rank and gives it a part of its gradient: neither loads nor coefficient would be right. "
            "Upgrade to transformers 5.23, or load the model without enable_expert_parallel."
        )


def _refuse_bypassed(root: nn.Module, sites: Sequence[RouterSite]) -> None:
    if not getattr(root, "use_kernels", False):
        return
    for site in sites:
        kernel = getattr(type(site.parent), "kernel_layer_name", None)
        if kernel is not None:
            raise ValueError(
                f"use_kernels=True replaces the forward of {type(site.parent).__name__} by the kernel {kernel!r}, which "
                f"never calls its router {site.name!r}: nothing could be balanced. Load the model with use_kernels=False."
            )


def _refuse_unbiasable(site: RouterSite, config: PhiBalanceConfig) -> None:
    if site.kind.traits.no_bias:
        raise ValueError(
            f"bias_coef={config.bias_coef} is not possible for {site.kind.target.__name__}: "
            f"{site.kind.traits.no_bias}. Set bias_coef=0 and use the price gradient (coef > 0)."
        )
    if site.native_bias and site.read_native_bias() is None:
        raise ValueError(
            f"bias_coef={config.bias_coef} is not possible while the selection bias of {site.name!r} is offloaded or on the "
            "meta device. Set bias_coef=0, or patch the model with all its weights loaded and none offloaded to CPU or disk."
        )
    owners = [*site.modules, site.parent]
    if config.rules.bias_rule == "quantile":
        in_groups = any(count_groups(owner) > 1 for owner in owners if owner is not None)
        if in_groups or site.top_k >= site.num_experts:
            why = "within groups" if in_groups else "all of them"
            raise ValueError(
                f"method={config.method!r} is not possible for {site.name!r}, which chooses {site.top_k} of "
                f"{site.num_experts} experts, {why}: a fair share is then no quantile of the scores. Use method='phi' "
                "or 'loss_free'."
            )


def check_ranks(config: PhiBalanceConfig, sites: Sequence[RouterSite], ranks: Ranks, counts: Counts) -> None:
    """Raises `ValueError` on every rank if routers or configuration are not the same on all of them."""
    names = [site.name for site in sites]
    mine = f"{[(site.name, site.num_experts) for site in sites]} {config.to_dict()}"
    if not ranks.agree(mine, counts.flat.device):
        raise ValueError(
            f"the ranks of this optimizer step have different routers or configurations. This one has {len(names)} "
            f"router(s), {', '.join(names[:2])}, ..., and {config}. Patch the whole model with the same configuration on "
            "every rank; stages of a pipeline, which hold some of the layers, cannot be balanced."
        )


def check_first_step(
    config: PhiBalanceConfig, sites: Sequence[RouterSite], counts: Counts, added: set[int], second_order: bool
) -> bool:
    """
    Refuses set-ups in which balancing would silently do nothing. Reads the device once.

    Args:
        counts (`Counts`): of the step, over all ranks.
        added (`set[int]`): routers that have added a gradient.
        second_order (`bool`): whether a backward was run with `create_graph`, in which no router adds one.

    Returns:
        `bool`: whether any token counted, so that there was something to check.
    """
    if not float(counts.tokens):
        return False
    called = (counts.load.sum(-1) > 0).tolist()
    uncalled = [site.name for site, seen in zip(sites, called) if site.sees_all and not seen]
    if uncalled:
        raise ValueError(
            f"{len(uncalled)} of {len(sites)} patched routers were never called in the first step: "
            f"{', '.join(uncalled[:4])}. Something bypasses them (a fused kernel, `use_kernels=True`, layers that "
            "this model does not run). Switch that off, or unpatch the model."
        )
    trained = [site.name for site in sites for m in site.modules if any(p.requires_grad for p in m.parameters())]
    if config.rules.freezes and trained:
        raise ValueError(
            f"method={config.method!r}, but router(s) {', '.join(trained[:4])} are trained: something has made "
            "them trainable since the patch. Patch after adding an adapter, or leave the routers out of it."
        )
    strengths = {name: getattr(config, name) for name in ("coef", "z_loss_coef", "sequence_coef")}
    given = ", ".join(f"{name}={value}" for name, value in strengths.items() if value > 0)
    silent = [site.name for index, (site, seen) in enumerate(zip(sites, called)) if seen and index not in added]
    if config.adds_gradient and not added and not second_order:
        raise ValueError(
            f"{given} but no gradient path leads from any router to a trainable parameter (frozen "
            f"routers under LoRA?), so this does nothing. Train the routers, e.g. with "
            f"LoraConfig(target_parameters=['{sites[0].name.split('.', 3)[-1]}.weight', ...]), or set it to 0 "
            "and bias_coef > 0, which needs no gradient."
        )
    _warn_of_even_probabilities(config, sites, counts)
    if config.adds_gradient and silent and not second_order:
        logger.warning(f"The price gradient reaches no trainable parameter from router(s) {', '.join(silent[:4])}.")
    return True


def _warn_of_even_probabilities(config: PhiBalanceConfig, sites: Sequence[RouterSite], counts: Counts) -> None:
    """Warns if probabilities are even but loads are not, as in new or upcycled routers: then the price has no effect."""
    if config.coef == 0 or config.track != "probs" or config.bias_coef > 0:
        return
    for index, site in enumerate(sites):
        probs, load = (rows[index, : site.num_experts].double() for rows in (counts.probs, counts.load))
        even = float((probs / probs.mean().clamp(min=1e-30) - 1).abs().max())
        uneven = float(load.max() / load.mean().clamp(min=1e-30)) - 1
        expected = noise_floor(site.num_experts, site.top_k, max(float(load.sum()) / site.top_k, 1.0))
        if even < EVEN and uneven > 0.5 + 3 * expected:
            logger.warning(
                f"The probabilities of router {site.name!r} are even (to {even:.1%}) while its loads are not (MaxVio {uneven:.2f}), as in "
                "routers that are new: the price on probabilities has nothing to act on. Set track='load', or bias_coef=0.003."
            )
            return
