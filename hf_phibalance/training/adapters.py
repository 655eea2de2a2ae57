"""
Makes a `peft.LoraConfig` for any MoE family from two options: `router` and `targets`.

Module names are found in the model, not listed by hand. Inside the stack of decoder layers with routers,

- a *router* is a module found by [`find_routers`], with its submodules;
- *experts* are the feed-forward weights: routed experts, shared experts, and the dense MLPs that some families have in
  their first layers or beside the experts;
- *attention* are the linear layers that mix tokens: attention, linear attention, state-space or convolution layers.

The rest is left alone: embeddings, the output head, norms, biases, convolutions, the indexers of sparse attention (no gradient
reaches them), gates with a single output, hash routers, hyper-connections, projectors, and (by default) vision towers.

Some modules read the weight of a submodule without calling it. An adapter on that submodule would silently do nothing.
In attention it is skipped (`out_proj` of Mamba). In routers and experts it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..balancing import find_balancer
from ..compat import names_rewritten_by_peft
from ..models import HEADS, find_auto_class
from ..routers import NATIVE_BIAS_NAMES, RouterSite, class_source, find_routers, modality_of, unwrap


if TYPE_CHECKING:
    from peft import LoraConfig


ROUTER_POLICIES = ("frozen", "lora", "full", "router-only")
TARGETS = ("all", "experts", "attention")
# parts of a module's path inside its layer
ATTENTION = re.compile(r"(^|_)(attn|attention|mamba|mixer|conv)$")
FEED_FORWARD = re.compile(r"(^|_)(mlps?|ffn|feed_forward|moe|experts?)$|shared")
LEFT_ALONE = re.compile(r"indexer|layernorm|hyper_connection")
# In some families PEFT mistakes these module names for the experts of transformers 4, see `names_rewritten_by_peft`
NAMES_OF_V4 = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# Values allowed for parameters without a linear layer of their own; the first is PEFT's default
FOR_PARAMETERS: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0.0,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian"),
}
OTHER_CHOICE = {
    "router": "router='full' or 'frozen'",
    "experts": "targets='attention'",
    "attention": "targets='experts'",
}


def lora_config(
    model: nn.Module,
    router: str = "frozen",
    targets: str | None = None,
    r: int = 8,
    lora_alpha: int = 32,
    vision: bool = False,
    **kwargs: Any,
) -> LoraConfig:
    """
    Returns the LoRA configuration that trains the chosen parts of `model`, whatever its family calls them.

    ```python
    model = phb.AutoModelForCausalLM.from_pretrained("Qwen/Qwen1.5-MoE-A2.7B", phi_balance={"coef": 0.01})
    model = get_peft_model(model, phb.lora_config(model, router="lora", targets="all"))
    ```

    Args:
        model (`torch.nn.Module`): a transformers MoE model, patched or not, before `get_peft_model`.
        router (`str`, *optional*, defaults to `"frozen"`):
            `"frozen"`: the routers do not learn. If nothing below a router learns either, set `coef=0` and balance by `bias_coef`,
            which needs no gradient. `"lora"`: low-rank updates of the routers' weights. `"full"`: the routers are trained whole and
            stored with the adapter (`modules_to_save`). `"router-only"`: as `"lora"`, and nothing else learns.
        targets (`str`, *optional*, defaults to `"all"`):
            `"experts"`, `"attention"` or `"all"` for both. Not with `router="router-only"`.
        r (`int`, *optional*, defaults to `8`): rank; of each expert where all experts are one parameter.
        lora_alpha (`int`, *optional*, defaults to `32`): the update is scaled by `lora_alpha / r`.
        vision (`bool`, *optional*, defaults to `False`):
            Whether the layers and routers of a vision tower are trained too. Experts for images in the language model's own layers
            (ERNIE 4.5 VL) are trained in any case.
        kwargs:
            further fields of `peft.LoraConfig`. The routers of `"full"` are added to `modules_to_save`. `task_type`
            defaults to that of the model's class. It makes PEFT also train and save the head of a classifier.

    Returns:
        `peft.LoraConfig`: for `get_peft_model(model, ...)` or a trainer's `peft_config`.

    Raises:
        ValueError: if an option is unknown, has no effect, or PEFT does not support it for parameters (`lora_dropout`,
            `init_lora_weights="pissa"`); if the model has no router or no module of the chosen kind; if a parameter to
            train is quantised; if routers should train that `method="frozen"` freezes; or if the model already has an
            adapter.
    """
    from peft import LoraConfig

    root = unwrap(model)[-1]
    _check_options(root, router, targets, kwargs)
    chosen: tuple[str, ...] = TARGETS[1:] if targets in (None, "all") else (str(targets),)
    chosen = () if router == "router-only" else chosen
    chosen = (*chosen, "router") if router in ("lora", "router-only") else chosen
    sites = [site for site in find_routers(root) if vision or not site.in_tower]
    parts = _find_parts(root, _Layers(root, sites, _towers(root) if vision else []))
    for part in chosen:
        _refuse_out_of_reach(root, part, *parts[part])
    modules = [name for part in chosen for name in parts[part][0]]
    parameters = [name for part in chosen for name in parts[part][1]]
    whole = [site.name for site in sites] if router == "full" else []
    _refuse_for_parameters(root, parameters, kwargs)
    _refuse_quantised(root, [*parameters, *(parts["router"][1] if whole else [])])
    every_module = [name for name, _ in root.named_modules()]
    every_parameter = [name for name, _ in root.named_parameters()]
    saved = [*_endings(whole, every_module), *(kwargs.pop("modules_to_save", None) or [])]
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_endings(modules, every_module),
        target_parameters=_endings(parameters, every_parameter) or None,
        modules_to_save=saved or None,
        **{"task_type": _task_type(root), **kwargs},
    )


def _task_type(root: nn.Module) -> str | None:
    """Returns PEFT's task type for a model; `None` for a class that transformers does not know."""
    config: Any = getattr(root, "config", None)
    auto_class = config and find_auto_class(config.model_type, [cls.__name__ for cls in type(root).__mro__])
    return HEADS[auto_class][1] if auto_class else None


# ---------------------------------------------------------------------- what is refused


def _check_options(root: nn.Module, router: str, targets: str | None, kwargs: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if router not in ROUTER_POLICIES:
        raise ValueError(f"`router` must be one of {', '.join(ROUTER_POLICIES)}, got {router!r}.")
    if targets is not None and targets not in TARGETS:
        raise ValueError(f"`targets` must be one of {', '.join(TARGETS)}, got {targets!r}.")
    if router == "router-only" and targets is not None:
        raise ValueError(
            f"router='router-only' trains nothing but the routers, so targets={targets!r} would do nothing. Leave "
            "`targets` out, or choose router='lora' or 'full'."
        )
    given = sorted({"target_modules", "target_parameters", "layers_to_transform"} & kwargs.keys())
    if given:
        raise ValueError(
            f"{', '.join(given)}: lora_config finds the names itself. Choose by `router` and `targets`, or write a "
            "peft.LoraConfig by hand."
        )
    for name, module in root.named_modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            raise ValueError(
                f"{type(root).__name__} already carries an adapter (at {name!r}), which hides the names of what it "
                "wraps. Make the configuration before get_peft_model, or unload the adapter first."
            )
    balancer = find_balancer(root)
    if router != "frozen" and balancer is not None and balancer.config.rules.freezes:
        raise ValueError(
            f"router={router!r} would train the routers that method={balancer.config.method!r} holds still. Choose "
            "router='frozen', or patch the model with another method."
        )


def _refuse_out_of_reach(root: nn.Module, part: str, modules: list[str], parameters: list[str]) -> None:
    others = OTHER_CHOICE[part]
    if not modules and not parameters:
        raise ValueError(
            f"{type(root).__name__} has no {part} that an adapter could train. Choose {others}, or write a "
            "peft.LoraConfig by hand."
        )
    for name in parameters:
        owner, _, parameter = name.rpartition(".")
        block = type(root.get_submodule(owner.rpartition(".")[0])).__name__
        if _is_read_from_outside(root, owner, parameter):
            raise ValueError(
                f"the {part} of {type(root).__name__} cannot be adapted: {block} reads {name!r} without calling the "
                f"module that owns it, so the adapter would never be applied. Choose {others}."
            )
        if part == "router" and any(_is_read_from_outside(root, owner, bias) for bias in NATIVE_BIAS_NAMES):
            raise ValueError(
                f"the router of {type(root).__name__} cannot be adapted with this version of transformers: {block} reads the "
                f"selection bias of {owner!r}, which PEFT's wrapper hides. Choose {others}, or transformers >= 5.14."
            )


def _refuse_for_parameters(root: nn.Module, parameters: list[str], kwargs: dict[str, Any]) -> None:
    for name, possible in FOR_PARAMETERS.items():
        if parameters and kwargs.get(name, possible[0]) not in possible:
            raise ValueError(
                f"{name}={kwargs[name]!r} is not possible for parameters without a linear layer of their own, here "
                f"{parameters[0]!r} of {type(root).__name__}: PEFT only adds a low-rank update to the weight, before there is "
                f"any input. Leave {name} out, or adapt only linear layers (targets='attention' with router='frozen' or "
                "'full')."
            )


def _refuse_quantised(root: nn.Module, parameters: list[str]) -> None:
    packed = [name for name in parameters if not root.get_parameter(name).is_floating_point()]
    if packed:
        owners = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in packed})
        raise ValueError(
            f"{packed[0]!r} of {type(root).__name__} is quantised ({root.get_parameter(packed[0]).dtype}), and what is "
            "adapted as a parameter or trained whole must be a matrix of numbers. Leave these modules unquantised, with "
            f"BitsAndBytesConfig(llm_int8_skip_modules={owners}), or choose targets='attention' and router='frozen'."
        )


# ---------------------------------------------------------------------- finding the parts


def _towers(root: nn.Module) -> list[str]:
    """Returns the names of the stacks of layers in the vision tower of `root`."""
    lists = [name for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name in lists if modality_of(name) == "vision" and not re.search(r"\.\d+\.", name)]
    if not found:
        raise ValueError(f"{type(root).__name__} has no vision tower that could be trained. Leave vision=True out.")
    return found


def _find_parts(root: nn.Module, layers: _Layers) -> dict[str, tuple[list[str], list[str]]]:
    """Returns the full names of the linear modules and of the bare parameters of `"router"`, `"experts"` and `"attention"`."""
    parts: dict[str, tuple[list[str], list[str]]] = {part: ([], []) for part in OTHER_CHOICE}
    rewritten, plain = names_rewritten_by_peft(root, NAMES_OF_V4), _plain_forwards()
    for name, module in root.named_modules():
        part = layers.part_of(name)
        if part is None or isinstance(module, nn.modules.conv._ConvNd):
            continue
        modules, parameters = parts[part]
        if part != "router" and type(module).forward in plain and name.rpartition(".")[2] not in rewritten:
            if module.out_features > 1 and not _is_read_from_outside(root, name, "weight"):
                modules.append(name)
        elif part != "attention" or isinstance(module, nn.Linear):
            for matrix in _matrices(module):
                if part != "attention" or not _is_read_from_outside(root, name, matrix):
                    parameters.append(f"{name}.{matrix}")
    return parts


class _Layers:
    """Maps modules of the decoder layers and of `towers` to their part: router, experts or attention."""

    def __init__(self, root: nn.Module, sites: list[RouterSite], towers: list[str]) -> None:
        self._classes = {name: type(module).__name__ for name, module in root.named_modules()}
        names = {id(module): name for name, module in root.named_modules()}
        routers = [site.name for site in sites]
        # name prefixes: of the layers (without their numbers), of the routers, and of the routers' parents
        self._stacks = {match[1] for name in routers if (match := re.match(r"(.*?\.)\d+\.", name))}
        self._stacks |= {f"{tower}." for tower in towers}
        self._routers = tuple(f"{name}." for name in routers)
        self._router_paths = {self._path(name) for name in routers}
        blocks = {names[id(site.parent)] for site in sites if site.parent is not None}
        self._blocks = tuple(f"{name}." for name in blocks if self._path(name))  # in gemma4 the parent is the layer

    def _path(self, name: str) -> tuple[str, ...]:
        """Returns the components of `name` below its layer; `()` for the layer itself and outside the layers."""
        stack = next((stack for stack in self._stacks if name.startswith(stack)), None)
        return tuple(name.removeprefix(stack).split(".")[1:]) if stack else ()

    def part_of(self, name: str) -> str | None:
        """Returns `"router"`, `"experts"`, `"attention"`, or `None` for modules that are left alone."""
        path = self._path(name)
        if f"{name}.".startswith(self._routers):
            return "router"
        if path in self._router_paths or any(LEFT_ALONE.search(step) for step in path):
            return None  # left alone, or the same path in another layer is a router (here a hash router)
        if f"{name}.".startswith(self._blocks):
            return "experts"
        for length, step in enumerate(path, start=1):
            if ATTENTION.search(step):  # nemotron_h calls every kind of layer a mixer
                mixer = self._classes[".".join(name.split(".")[: name.count(".") + 1 - len(path) + length])]
                return "experts" if "MLP" in mixer else "attention"
        return "experts" if any(FEED_FORWARD.search(step) for step in path) else None


def _plain_forwards() -> set[Any]:
    """Returns the forwards of linear layers to which PEFT can add a low-rank path."""
    forwards: set[Any] = {nn.Linear.forward}
    try:
        import bitsandbytes as bnb
    except ImportError:
        return forwards
    return forwards | {bnb.nn.Linear4bit.forward, bnb.nn.Linear8bitLt.forward}


def _matrices(module: nn.Module) -> Iterator[str]:
    """Yields the names of the module's own parameters that are one matrix, or one matrix per expert."""
    for name, parameter in module.named_parameters(recurse=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 `shape` is empty between forwards
        if len(shape) == 3 or (len(shape) == 2 and shape[0] > 1 and not name.endswith("bias")):
            yield name


def _is_read_from_outside(root: nn.Module, name: str, parameter: str) -> bool:
    """True if the parent of `name` reads its `parameter` (not just dtype or shape) without calling `name`."""
    outer, _, leaf = name.rpartition(".")
    try:
        source = class_source(cast(Hashable, type(root.get_submodule(outer))))
    except (OSError, TypeError):  # no source: defined in a notebook or at run time
        return False
    return re.search(rf"\bself\.{leaf}\.{parameter}\b(?!\.(dtype|device|shape|size|ndim)\b)", source) is not None


def _endings(wanted: list[str], names: list[str]) -> list[str]:
    """Returns short name endings, sorted, that match all of `wanted` and nothing else in `names`."""
    exact, found = set(wanted), set()
    for name in wanted:
        steps = name.split(".")
        shortest = 1 if len(steps) == 1 or steps[-2].isdigit() else 2
        for length in range(shortest, len(steps) + 1):
            ending = ".".join(steps[-length:])
            if ending in found or all(other in exact for other in names if other.endswith(ending)):
                found.add(ending)
                break
    return sorted(found)
