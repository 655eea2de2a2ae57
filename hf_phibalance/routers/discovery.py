"""
Finds the routers of a model: the modules that transformers declares, else modules with the structure of a router.

Such a module has one matrix of E rows and a sibling with E experts, and it or its block takes a top-k. It returns

    forward(hidden_states) -> router_logits (T, E), topk_weights (T, k), topk_indices (T, k), in any order

or, before transformers 5.14, only logits. Then the block does the top-k, and we read the selection where it calls the
experts. transformers before 5.20 does not declare every router. Remove the search by structure ([`_by_structure`])
when 5.20 is the oldest supported version.

Shapes: T tokens of a forward, B rows, S positions, E experts, k experts per token.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn

from .families import (
    NATIVE_BIAS_NAMES,
    REMOTE_TRAITS,
    TRAITS,
    RouterKind,
    RouterTraits,
    declared_kinds,
    returned_values,
    takes_top_k,
)
from .modules import WRAPPER_PARTS, canonical_name, expert_count, experts_beside, router_matrix, unwrap_layer


INDEX_TYPES = (torch.int64, torch.int32)
OTHER_MODALITIES = re.compile(r"(?:^|[._])(vision|visual|image|audio)(?:[._]|$)")


class Reading(NamedTuple):
    """Positions in the outputs of a router, or in the arguments of its experts. `None` if missing."""

    logits: int | None  # (T, E)
    chosen: int | None  # (T, k)
    carrier: int | None  # a differentiable output, through which the task's gradient reaches the router


@dataclass
class RouterSite:
    """One router of a model: its name, how to read its outputs, and weak references to the modules that compute it."""

    name: str
    kind: RouterKind
    num_experts: int
    top_k: int
    scoring: str
    score_width: float | None = None  # span of the ranked scores, once known
    not_logits: tuple[int, ...] = ()  # positions of other outputs with E columns
    stored_logits: Tensor | None = None  # until the block calls its experts
    has_native_bias: bool = False  # whether the family has a selection bias of its own
    modality: str = field(init=False)  # "vision" or "audio" if it routes nothing else, otherwise "text"
    _modules: list[weakref.ref[nn.Module]] = field(default_factory=list, repr=False)
    _parent: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    _experts: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    _native: list[tuple[weakref.ref[nn.Module], str]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.modality = modality_of(self.name)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that compute this router. There are several if PEFT keeps a trainable copy."""
        return [module for module in (reference() for reference in self._modules) if module is not None]

    @property
    def parent(self) -> nn.Module | None:
        """The block that calls the router."""
        return None if self._parent is None else self._parent()

    @property
    def experts(self) -> nn.Module | None:
        """The experts, if the block does the top-k instead of the router."""
        return None if self._experts is None else self._experts()

    @property
    def router(self) -> nn.Module:
        """The module that the block calls as its router."""
        return self.modules[-1] if self.parent is None else getattr(self.parent, self.name.rpartition(".")[2])

    @property
    def native_bias(self) -> list[tuple[nn.Module, str]]:
        """Owner and name of the family's own selection bias."""
        owners = ((reference(), name) for reference, name in self._native)
        return [(owner, name) for owner, name in owners if owner is not None]

    @property
    def in_tower(self) -> bool:
        """Whether it routes image patches or audio frames in a tower, not the tokens of the sequence."""
        return self.modality != "text" and self.kind.traits.parted_by is None

    @property
    def sees_all(self) -> bool:
        """Whether it routes every token of the sequence."""
        return self.modality == "text" and self.kind.traits.parted_by is None

    def read(self, parts: Sequence[Any]) -> Reading:
        """Finds logits, selection and carrier in `parts` by type and shape, because their order differs."""
        floats = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.is_floating_point()]
        wide = [i for i in floats if parts[i].shape[-1:] == (self.num_experts,) and i not in self.not_logits]
        indices = (i for i, x in enumerate(parts) if isinstance(x, Tensor) and x.dtype in INDEX_TYPES and x.ndim > 1)
        if len(wide) > 1 and self.kind.index not in wide:
            raise ValueError(
                f"router {self.name!r} ({self.kind.target.__name__} of transformers {transformers.__version__}) returns "
                f"{len(wide)} tensors as wide as its {self.num_experts} experts, and nothing says which of them holds the logits."
            )
        logits = self.kind.index if self.kind.index in wide else next(iter(wide), None)
        chosen = next(indices, None) if self.kind.traits.returns_choice else None
        return Reading(logits, chosen, next((i for i in floats if i != logits), None))

    def place(self, parent: nn.Module | None) -> None:
        """Sets the parent block, and the experts if the block does the top-k. Clears the modules."""
        name = self.name.rpartition(".")[2]
        experts = experts_beside(parent, name, self.num_experts) if parent is not None and self.kind.block else None
        self._parent = None if parent is None else weakref.ref(parent)
        self._experts = None if experts is None else weakref.ref(experts)
        self._modules, self._native = [], []

    def add(self, module: nn.Module) -> None:
        """Adds a module that computes this router, and the selection bias in it."""
        self._modules.append(weakref.ref(module))
        bias = _native_bias(module, self.parent, self.num_experts)
        if bias is not None and not any(owner is bias[0] for owner, _ in self.native_bias):
            self.has_native_bias = True
            self._native.append((weakref.ref(bias[0]), bias[1]))
            if self.kind.traits.biases == "scores" and self.scoring in ("sigmoid", "softmax"):
                self.score_width = 1.0

    def write_native_bias(self, bias: Tensor, keep_fp32: bool = False) -> None:
        """Copies `bias (E,)` into the family's own selection bias. `keep_fp32` first converts the latter to fp32."""
        for owner, name in self.native_bias:
            tensor = getattr(owner, name)
            if keep_fp32 and tensor.dtype != torch.float32:
                tensor.data = tensor.data.float()
            tensor.data.copy_(bias.view(tensor.shape))

    def read_native_bias(self) -> Tensor | None:
        """Returns the family's own selection bias `(E,)`, or `None` if there is none or accelerate offloaded it."""
        native = self.native_bias
        bias = getattr(*native[0]).detach().reshape(-1) if native else None
        return None if bias is None or bias.is_meta else bias

    def __getstate__(self) -> dict[str, Any]:
        # a copy searches for its own modules
        return {**vars(self), "stored_logits": None, "_modules": [], "_parent": None, "_experts": None, "_native": []}


def find_routers(root: nn.Module) -> list[RouterSite]:
    """
    Returns the routers inside `root`, in the order of its modules.

    Raises:
        ValueError: If there is none, or the family cannot be balanced.
    """
    sites: dict[str, RouterSite] = {}
    names = {id(module): canonical_name(name) for name, module in root.named_modules()}
    parents = {id(child): module for module in root.modules() for child in module.children()}
    for name, module, kind in _matches(root):
        if kind.traits.refused:
            raise ValueError(
                f"{type(root).__name__} cannot be φ-balanced: {kind.traits.refused} ({kind.target.__name__})."
            )
        canonical = canonical_name(name)
        if canonical not in sites:
            parent = parents.get(id(module))
            while parent is not None and names[id(parent)] == canonical:  # a wrapper of the router
                parent = parents.get(id(parent))
            sites[canonical] = _new_site(canonical, module, parent, kind)
        sites[canonical].add(module)
    if not sites:
        raise ValueError(
            f"{type(root).__name__} has no router: transformers {transformers.__version__} declares none "
            "(`_can_record_outputs['router_logits']`), and no module of it is one by its contract (one matrix of E rows, "
            "beside E experts, where a top-k is taken), so there is nothing to balance. "
            "`hf_phibalance.supported_families()` lists the model types that have one."
        )
    return list(sites.values())


def _new_site(name: str, module: nn.Module, parent: nn.Module | None, kind: RouterKind) -> RouterSite:
    num_experts = expert_count(module, kind.traits.experts)
    if not num_experts:
        raise ValueError(f"{type(module).__name__}: cannot tell the number of experts; add it to routers.TRAITS.")
    experts = None if parent is None else experts_beside(parent, name.rpartition(".")[2], num_experts)
    if parent is not None and not takes_top_k(module) and takes_top_k(parent, experts):
        kind = replace(kind, block=type(parent))
    returned = enumerate(returned_values(cast(Hashable, kind.target)))
    site = RouterSite(name, kind, num_experts, _top_k(module, parent), kind.scoring_of(module))
    site.not_logits = tuple(i for i, how in returned if how == "scatter")
    site.place(parent)
    return site


def find_copies(root: nn.Module, sites: Sequence[RouterSite], prefix: str = "") -> None:
    """
    Finds the modules of `sites` in `root` again, by name, after a wrapper replaced them or `root` was copied. Names in
    `sites` start with `prefix`, names in `root` do not.
    """
    modules: dict[str, list[nn.Module]] = {}
    for name, module in root.named_modules():
        modules.setdefault(f"{prefix}{canonical_name(name)}", []).append(module)
    for site in sites:
        site.place(next(reversed(modules.get(site.name.rpartition(".")[0], [])), None))
        for module in modules.get(site.name, []):
            if isinstance(module, site.kind.target):
                site.add(module)
        for owner, name in site.native_bias:
            getattr(owner, name).requires_grad_(False)  # PEFT makes it trainable, but it gets no gradient


def _matches(root: nn.Module) -> list[tuple[str, nn.Module, RouterKind]]:
    """Returns the declared routers of `root` plus those found by structure: only in towers if some are declared."""
    found = list(_declared(root))
    routers = {id(module) for _, module, _ in found}
    blocks = {  # declared modules that contain the router
        id(module)
        for _, module, _ in found
        if any(id(inner) in routers for inner in module.modules() if inner is not module) or any(_by_structure(module))
    }
    kept = [match for match in found if id(match[1]) not in blocks]
    known = {id(module) for _, module, _ in kept}
    rest = [match for match in _by_structure(root) if id(match[1]) not in known]
    return [*kept, *(match for match in rest if modality_of(match[0]) != "text")] if kept else rest


def _declared(root: nn.Module) -> Iterator[tuple[str, nn.Module, RouterKind]]:
    """Yields the routers that the transformers classes inside `root` declare, and the gates of remote code."""
    kinds = {
        (kind.target, kind.layer_name): kind for module in root.modules() for kind in declared_kinds(type(module))
    }
    for name, module in root.named_modules():
        for kind in kinds.values():
            # compare the end of the name: adapters put layers into a router that is a linear layer
            layer_name_fits = kind.layer_name is None or f".{canonical_name(name)}".endswith(f".{kind.layer_name}")
            if isinstance(module, kind.target) and layer_name_fits:
                yield name, module, kind
                break
        else:
            traits = REMOTE_TRAITS.get(type(module).__name__)
            if traits is not None and all(hasattr(module, a) for a in ("weight", "top_k", "n_routed_experts")):
                yield name, module, RouterKind(type(module), traits=traits)


def _by_structure(root: nn.Module) -> Iterator[tuple[str, nn.Module, RouterKind]]:
    """Yields the modules of `root` that have the structure of a router."""
    for block_name, block in root.named_modules():
        if any(WRAPPER_PARTS.search(f".{name}") for name, _ in block.named_children()):
            continue  # a wrapper, perhaps of a router
        for name, child in block.named_children():
            router = unwrap_layer(child)
            count = 0 if router_matrix(router) is None else expert_count(router)
            experts = experts_beside(block, name, count) if count > 1 else None
            if experts is None or not takes_top_k(router, block, experts):
                continue
            target: type[nn.Module] = next(
                c for c in type(router).__mro__ if not c.__name__.startswith(("Parametrized", "FSDP"))
            )
            kind = RouterKind(target, traits=TRAITS.get(target.__name__, RouterTraits()))
            path = f"{block_name}.{name}".lstrip(".")
            for inner, module in child.named_modules(prefix=path):
                if isinstance(module, target) and canonical_name(inner) == canonical_name(path):
                    yield inner, module, kind


def _top_k(router: nn.Module, parent: nn.Module | None) -> int:
    for module in (router, parent):
        for name in ("top_k", "num_experts_per_tok", "moe_top_k"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    config: Any = getattr(router, "config", None)
    return int(getattr(config, "top_k_experts", 0) or getattr(config, "num_experts_per_tok", 1))


def _native_bias(router: nn.Module, parent: nn.Module | None, num_experts: int) -> tuple[nn.Module, str] | None:
    """Returns owner and name of the family's own selection bias: in the router, inside it, or in its block."""
    for owner in (*router.modules(), *([parent] if parent is not None else [])):
        for name in NATIVE_BIAS_NAMES:
            tensor = getattr(owner, name, None)
            if isinstance(tensor, Tensor) and tensor.numel() == num_experts:
                return owner, name
    return None


# ---------------------------------------------------------------------- routers that see only some tokens


def modality_of(name: str) -> str:
    """Returns `"vision"` or `"audio"` if the module name contains a part that says so, otherwise `"text"`."""
    found = OTHER_MODALITIES.search(name)
    return "text" if found is None else "audio" if found[1] == "audio" else "vision"


def image_tokens(inputs: Mapping[str, Any], sites: Iterable[RouterSite]) -> Tensor | None:
    """
    Returns a mask `(T,)` of the tokens that a forward of `inputs` sends to the image routers. Returns `None` if all
    tokens go to the text routers, or the model has no image routers.
    """
    for name in {site.kind.traits.parted_by for site in sites} - {None}:
        modality_BS = inputs.get(str(name))
        if isinstance(modality_BS, Tensor):
            return modality_BS.reshape(-1) != 0
    return None


def mask_of(site: RouterSite, mask_T: Tensor, image_T: Tensor | None, routed: int) -> Tensor:
    """
    Returns the token mask of the `routed` vectors that reach `site`: all tokens, image tokens or text tokens. In a
    tower it is 1 everywhere, because patches are never padding.
    """
    if site.in_tower:
        return torch.ones(routed, dtype=mask_T.dtype, device=mask_T.device)
    if site.kind.traits.parted_by is None or image_T is None:
        return mask_T
    image_T = image_T.to(mask_T.device)
    return mask_T[image_T if site.modality != "text" else ~image_T]
