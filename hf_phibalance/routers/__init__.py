"""
Routers: where they are in a model, what they return, and how to look and act inside them. Knows modules, not steps.

| module | what it holds |
|---|---|
| `discovery` | the routers of a model, and what is what among their outputs |
| `traits` | how a router class scores, and the table of those that depart from the rule |
| `contract` | routers that the installed transformers does not declare |
| `parts` | routers that do not see every token |
| `sources` | what the source of a class says of it |
| `families` | the model types that have routers |
| `inside` | the selection bias inside a router's forward |
| `linear` | the matrix of a router, to be written to |
| `hooks` | hooks that show what routers do, and add to it |
| `wrapping` | what models come wrapped in |
"""

from .contract import router_matrix
from .discovery import RouterSite, find_copies, find_routers
from .families import Family, supported_families
from .hooks import (
    RouterBalancer,
    RouterHook,
    RouterReader,
    arguments_by_name,
    count_groups,
    forget_compiled_code,
    hook_adapters,
    install_hooks,
    reading,
    remove_hooks,
)
from .inside import BiasedTopK, rank_scores
from .linear import RouterLinear, find_linear, has_adapter, ranked_of
from .parts import image_tokens, mask_of, modality_of
from .sources import class_source
from .traits import NATIVE_BIAS_NAMES, REMOTE_TRAITS
from .wrapping import canonical_name, check_module, find_backbone, predicts_tokens, unwrap


__all__ = [
    "NATIVE_BIAS_NAMES",
    "REMOTE_TRAITS",
    "BiasedTopK",
    "Family",
    "RouterBalancer",
    "RouterHook",
    "RouterLinear",
    "RouterReader",
    "RouterSite",
    "arguments_by_name",
    "canonical_name",
    "check_module",
    "class_source",
    "count_groups",
    "find_backbone",
    "find_copies",
    "find_linear",
    "find_routers",
    "forget_compiled_code",
    "has_adapter",
    "hook_adapters",
    "image_tokens",
    "install_hooks",
    "mask_of",
    "modality_of",
    "predicts_tokens",
    "rank_scores",
    "ranked_of",
    "reading",
    "remove_hooks",
    "router_matrix",
    "supported_families",
    "unwrap",
]
