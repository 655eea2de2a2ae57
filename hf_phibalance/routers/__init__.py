"""
Routers: finds them in a model, reads their outputs, changes gradient and selection. Knows modules, not training steps.

| module | contents |
|---|---|
| `families` | how each router class scores its experts, and which model types have routers |
| `modules` | wrappers around modules, the number of experts, the matrix of a router |
| `discovery` | the routers of a model, and the order of their outputs |
| `selection` | the selection bias inside a router's forward |
| `hooks` | hooks that read routers, and add to gradient and selection |
"""
# ruff: noqa: F401

from .discovery import RouterSite, find_copies, find_routers, image_tokens, mask_of, modality_of
from .families import NATIVE_BIAS_NAMES, REMOTE_TRAITS, Family, class_source, supported_families
from .hooks import (
    RouterBalancer,
    RouterHook,
    RouterReader,
    arguments_by_name,
    count_groups,
    hook_adapters,
    install_hooks,
    reading,
    remove_hooks,
)
from .modules import (
    RouterLinear,
    canonical_name,
    check_module,
    find_backbone,
    find_linear,
    has_adapter,
    predicts_tokens,
    ranked_of,
    router_matrix,
    unwrap,
)
from .selection import BiasedTopK, rank_scores
