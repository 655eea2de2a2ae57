"""
Checks of a patched model: what cannot be balanced is refused at the patch or at the first step, instead of silently doing nothing;
what is balanced in vain is warned of; and a report says which routers learn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..maths import noise_floor
from ..routers import RouterSite, canonical_name, count_groups
from .changes import LOW
from .counts import Counts


logger = logging.get_logger(__name__)
EVEN = 0.02  # probabilities closer than this to their mean, relatively, are called even
SHOWN = 16  # routers in the text of a report
MIXES_TOKENS = re.compile(r"attn|attention|mamba|conv|input_layernorm")
EXPERTS = re.compile(r"(^|\.)(?!share)\w*experts?\.")
LAYER = re.compile(r"(.*?\.)(\d+)\.(.*)")


# ---------------------------------------------------------------------- when a model is patched


def refuse_impossible(root: nn.Module, sites: Sequence[RouterSite], config: PhiBalanceConfig) -> None:
    """Refuses a `config` that the routers `sites` of `root` cannot follow. Raises `ValueError` with the reason and the remedy."""
    _refuse_model(root)
    for site in sites:
        kernel = getattr(type(site.parent), "kernel_layer_name", None)
        if kernel is not None and getattr(root, "use_kernels", False):
            raise ValueError(
                f"use_kernels=True replaces the forward of {type(site.parent).__name__} by the kernel {kernel!r}, which "
                f"never calls its router {site.name!r}: nothing could be balanced. Load the model with use_kernels=False."
            )
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


def _refuse_model(root: nn.Module) -> None:
    config, stage, name = getattr(root, "config", None), getattr(root, "_pp_stage", None), type(root).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} cannot be φ-balanced: it has an encoder and a decoder, whose routers see different tokens, "
            "and one token mask cannot tell which count in each. Balance a decoder-only model."
        )
    if stage is not None:
        raise ValueError(
            f"pp_size={stage.pp_size} leaves on each rank a part of the routers of {name}, and the pipeline of "
            "transformers returns no loss to train on. Load the model without pp_size (DistributedConfig(fsdp_size=...) or "
            "tp_size=... spread it over the ranks as well)."
        )
    # expert-parallel plans of transformers 5.20 and older; can go with their support
    splits_experts = getattr(getattr(config, "distributed_config", None), "enable_expert_parallel", False)
    styles = sorted({style for style in (getattr(root, "_ep_plan", None) or {}).values() if style.endswith("_router")})
    if styles and splits_experts and getattr(root, "_device_mesh", None) is not None:
        raise ValueError(
            f"this version of transformers spreads the experts of {name} by {styles[0]!r}, which numbers a router's "
            "choice anew on each rank and gives it a part of its gradient: neither loads nor coefficient would be right. "
            "Upgrade to transformers 5.23, or load the model without enable_expert_parallel."
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
    in_groups = any(count_groups(owner) > 1 for owner in (*site.modules, site.parent) if owner is not None)
    if config.rules.bias_rule == "quantile" and (in_groups or site.top_k >= site.num_experts):
        raise ValueError(
            f"method={config.method!r} is not possible for {site.name!r}, which chooses {site.top_k} of "
            f"{site.num_experts} experts, {'within groups' if in_groups else 'all of them'}: a fair share is then no quantile of "
            "the scores. Use method='phi' or 'loss_free'."
        )


# ---------------------------------------------------------------------- at the first step


def check_first_step(
    config: PhiBalanceConfig, sites: Sequence[RouterSite], counts: Counts, added: set[int], second_order: bool
) -> bool:
    """
    Refuses set-ups in which balancing would silently do nothing. Reads the device once. Returns whether any token counted, so that
    there was something to check.

    `counts` are those of the step over all ranks; `added` are the routers that have added a gradient. A backward with
    `create_graph` is of `second_order`: no router adds one in it.
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
    silent = [site.name for index, (site, seen) in enumerate(zip(sites, called)) if seen and index not in added]
    must_add = config.adds_gradient and not second_order
    if must_add and not added:
        strengths = {name: getattr(config, name) for name in ("coef", "z_loss_coef", "sequence_coef")}
        given = ", ".join(f"{name}={value}" for name, value in strengths.items() if value > 0)
        raise ValueError(
            f"{given} but no gradient path leads from any router to a trainable parameter (frozen "
            f"routers under LoRA?), so this does nothing. Train the routers, e.g. with "
            f"LoraConfig(target_parameters=['{sites[0].name.split('.', 3)[-1]}.weight', ...]), or set it to 0 "
            "and bias_coef > 0, which needs no gradient."
        )
    _warn_of_even_probabilities(config, sites, counts)
    if must_add and silent:
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


def warn_of_rounded_routers(sites: Iterable[RouterSite]) -> None:
    """Warns once if routers are trained in 16 bits, where small steps of the optimizer are rounded away."""
    weights = [p for site in sites for m in site.modules for p in m.parameters() if p.requires_grad]
    low = [p for p in weights if p.dtype in LOW]
    if low:
        dtype = str(low[0].dtype).removeprefix("torch.")
        step = 2.0 ** -(8 if low[0].dtype == torch.bfloat16 else 11)
        logger.warning_once(
            f"Routers are trained in {dtype}: a step of less than about {step:.2%} of a weight is rounded away, so at small learning "
            "rates they hardly move. Keep their weights in float32, by PhiBalanceConfig(fp32_routers=True); if that is set, the "
            "model was cast since: call phb.patch(model) again."
        )


# ---------------------------------------------------------------------- which routers learn


@dataclass(frozen=True)
class RouterLearning:
    """
    How one router learns: in full, by an adapter (`"lora"`), or not at all (`"frozen"`). `parameters` is the number of its trained
    weights; `below` the number of trained parameter tensors below it, which its balancing gradient reaches.
    """

    name: str
    how: str
    parameters: int
    below: int
    experts: str | None = None  # how its experts learn; None if they were not found

    def __str__(self) -> str:
        kind = {"full": "learns in full", "lora": "learns by LoRA", "frozen": "frozen"}[self.how]
        own = [f"{self.parameters:,} numbers of its own"] if self.parameters else []
        below = f"reaches {self.below} trained tensors below" if self.below else "nothing below it learns"
        lost = "" if self.parameters or self.below else ": its prices move nothing"
        return ", ".join([f"{self.name}: {kind}", *own, below]) + lost


def describe_router(name: str, root: nn.Module) -> RouterLearning:
    """Describes which parameters are trained in router `name` of `root`, below it, and in its experts."""
    parameters = [(canonical_name(full), parameter) for full, parameter in root.named_parameters()]
    embeddings = getattr(root, "get_input_embeddings", lambda: None)()
    first = {id(p) for p in embeddings.parameters()} if isinstance(embeddings, nn.Module) else set()
    own, adapter, below = 0, 0, 0
    for path, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if path.startswith(f"{name}."):
            own += 0 if ".lora_" in path else parameter.numel()
            adapter += parameter.numel() if ".lora_" in path else 0
        else:
            below += id(parameter) in first or _is_below(path, name)
    block = f"{name.rpartition('.')[0]}."
    inside = [(path, p) for path, p in parameters if path.startswith(block) and not path.startswith(f"{name}.")]
    owners = tuple(  # modules named like experts, or with a parameter that stacks one matrix per expert
        f"{path.rpartition('.')[0]}." for path, p in inside if EXPERTS.search(path.removeprefix(block)) or p.ndim == 3
    )
    learning = [path for path, p in inside if p.requires_grad and path.startswith(owners)]
    experts = "frozen" if not learning else "lora" if all(".lora_" in path for path in learning) else "full"
    how = "full" if own else "lora" if adapter else "frozen"
    return RouterLearning(name, how, own + adapter, below, experts if owners else None)


def _is_below(parameter: str, router: str) -> bool:
    """Whether `parameter` is in an earlier layer, or mixes tokens before the router in the same layer (attention, ...)."""
    here, there = LAYER.match(f"{router}."), LAYER.match(parameter)
    if here is None or there is None or here[1] != there[1]:
        return False
    if here[2] != there[2]:
        return int(there[2]) < int(here[2])
    if here[3].split(".")[0] == there[3].split(".")[0]:
        return False  # the router's own block
    before = "input_layernorm" if MIXES_TOKENS.search(router) else MIXES_TOKENS  # jetmoe routes in its attention too
    return re.search(before, there[3].rpartition(".")[0]) is not None


@dataclass(frozen=True)
class LearningReport:
    """Result of [`learning_report`]: `rows` (`list[RouterLearning]`). Its text shows at most 16 of them, evenly spaced."""

    coef: float
    rows: list[RouterLearning] = field(default_factory=list)

    @property
    def all_in_full(self) -> bool:
        """Whether all routers and experts are trained in full, as without an adapter."""
        return all(row.how == "full" and row.experts in ("full", None) for row in self.rows)

    def __str__(self) -> str:
        routers, experts = _kinds([row.how for row in self.rows]), _kinds([row.experts for row in self.rows])
        lines = [
            f"Balancing gradient (coef={self.coef}) of {len(self.rows)} routers ({routers})"
            f"{f', experts ({experts})' if experts else ''}:"
        ]
        step = max(len(self.rows) - 1, 1) / (SHOWN - 1) if len(self.rows) > SHOWN else 1
        shown = sorted({round(i * step) for i in range(min(SHOWN, len(self.rows)))})
        lines += [f"  {self.rows[i]}" for i in shown]
        if len(shown) < len(self.rows):
            lines.append(f"  ({len(self.rows) - len(shown)} more in phb.learning_report(model).rows)")
        return "\n".join(lines)


def _kinds(values: list[str | None]) -> str:
    return ", ".join(f"{values.count(how)} {how}" for how in ("full", "lora", "frozen") if how in values)
