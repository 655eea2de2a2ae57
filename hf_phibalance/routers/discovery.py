"""Where the routers of a model are: found through what transformers itself declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .traits import NATIVE_BIAS_NAMES, REMOTE_TRAITS, RouterKind, RouterTraits, declared_kinds
from .wrapping import canonical_name


@dataclass
class RouterSite:
    """One router of a model: its name, the module(s) that compute it, and how to read their outputs."""

    name: str
    kind: RouterKind
    num_experts: int
    top_k: int
    scoring: str
    modules: list[nn.Module] = field(default_factory=list)  # several where PEFT keeps a trainable copy
    parent: nn.Module | None = None
    native_bias: list[tuple[nn.Module, str]] = field(default_factory=list)
    charged: bool = False  # whether a price gradient has gone through it
    softmax_carries: bool | None = None  # whether the task gradient goes back through its softmax, once seen
    score_width: float | None = None  # the span of the scores that it ranks, once known

    def write_native_bias(self, bias: Tensor) -> None:
        """Copies `bias (E,)` into the family's own selection bias, in place."""
        for owner, name in self.native_bias:
            target = getattr(owner, name).data
            target.copy_(bias.view(target.shape))

    def read_native_bias(self) -> Tensor | None:
        """The family's own selection bias `(E,)`; `None` if it has none, or while accelerate has offloaded it."""
        bias = getattr(*self.native_bias[0]).detach().reshape(-1) if self.native_bias else None
        return None if bias is None or bias.is_meta else bias


def find_routers(root: nn.Module) -> list[RouterSite]:
    """
    The routers inside `root`, in the order of its modules.

    Raises:
        ValueError: if there is none, or if the family is one that cannot be balanced.
    """
    sites: dict[str, RouterSite] = {}
    parents = {id(child): module for _, module in root.named_modules() for child in module.children()}
    for name, module, kind in _matches(root):
        if kind.traits.refused:
            raise ValueError(
                f"{type(root).__name__} cannot be φ-balanced: {kind.traits.refused} ({kind.target.__name__})."
            )
        canonical = canonical_name(name)
        parent = parents.get(id(module))
        while parent is not None and canonical_name(_name_of(root, parent)) == canonical:
            parent = parents.get(id(parent))  # step over wrappers of the router itself
        site = sites.get(canonical)
        if site is None:
            site = sites[canonical] = RouterSite(
                canonical,
                kind,
                _num_experts(module, kind.traits),
                _top_k(module, parent),
                kind.scoring_of(module),
                parent=parent,
            )
        site.modules.append(module)
        bias = _native_bias(module, parent, site.num_experts)
        if bias is not None and not any(owner is bias[0] for owner, _ in site.native_bias):
            site.native_bias.append(bias)
            if kind.traits.biases == "scores" and site.scoring in ("sigmoid", "softmax"):
                site.score_width = 1.0
    if not sites:
        raise ValueError(
            f"{type(root).__name__} has no router that transformers declares (`_can_record_outputs['router_logits']`), "
            "so there is nothing to balance. `hf_phibalance.supported_families()` lists the model types that have."
        )
    return list(sites.values())


def find_copies(root: nn.Module, sites: Sequence[RouterSite]) -> None:
    """Looks for the routers again: PEFT's `modules_to_save` trains copies, which need the native bias as well."""
    found = {site.name: site for site in find_routers(root)}
    for site in sites:
        if site.name in found:
            site.modules, site.native_bias = found[site.name].modules, found[site.name].native_bias
            for owner, name in site.native_bias:  # PEFT would train them, but selections have no gradient
                getattr(owner, name).requires_grad_(False)


def _matches(root: nn.Module) -> Iterator[tuple[str, nn.Module, RouterKind]]:
    """Modules of `root` that are routers by a declaration of any transformers model class inside `root`."""
    kinds = {
        (kind.target, kind.layer_name): kind for module in root.modules() for kind in declared_kinds(type(module))
    }
    for name, module in root.named_modules():
        for kind in kinds.values():
            layer_name_fits = kind.layer_name is None or f".{kind.layer_name}." in f".{canonical_name(name)}."
            if isinstance(module, kind.target) and layer_name_fits and not kind.traits.ignored:
                yield name, module, kind
                break
        else:
            traits = REMOTE_TRAITS.get(type(module).__name__)
            if traits is not None and all(hasattr(module, a) for a in ("weight", "top_k", "n_routed_experts")):
                yield name, module, RouterKind(type(module), traits=traits)


def _name_of(root: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in root.named_modules() if module is wanted), "")


def _num_experts(router: nn.Module, traits: RouterTraits) -> int:
    for name in (traits.experts or "num_experts", "n_routed_experts", "num_local_experts"):
        if isinstance(getattr(router, name, None), int):
            return getattr(router, name)
    weights = [p for name, p in router.named_parameters() if p.ndim == 2 and ".lora_" not in name]
    if len(weights) != 1:
        raise ValueError(f"{type(router).__name__}: cannot tell the number of experts; add it to routers.TRAITS.")
    return weights[0].shape[0]


def _top_k(router: nn.Module, parent: nn.Module | None) -> int:
    for module in (router, parent):
        for name in ("top_k", "num_experts_per_tok", "moe_top_k"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    config: Any = getattr(router, "config", None)
    return int(getattr(config, "top_k_experts", 0) or getattr(config, "num_experts_per_tok", 1))


def _native_bias(router: nn.Module, parent: nn.Module | None, num_experts: int) -> tuple[nn.Module, str] | None:
    """Owner and name of the family's own selection bias, looked for in the router, inside it, and in its block."""
    owners = [*router.modules(), *([parent] if parent is not None else [])]
    for owner in owners:
        for name in NATIVE_BIAS_NAMES:
            tensor = getattr(owner, name, None)
            if isinstance(tensor, Tensor) and tensor.numel() == num_experts:
                return owner, name
    return None
