"""Finds out which routers and experts of a model learn, and which parameters the balancing gradient reaches."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from ..routers import canonical_name


SHOWN = 16  # routers in the text of a report
MIXES_TOKENS = re.compile(r"attn|attention|mamba|conv|input_layernorm")
EXPERTS = re.compile(r"(^|\.)(?!share)\w*experts?\.")


@dataclass(frozen=True)
class RouterLearning:
    """
    How one router learns.

    Args:
        name (`str`): name of the router.
        how (`str`): `"full"` (its own weights), `"lora"` (an adapter on them) or `"frozen"`.
        parameters (`int`): number of trained weights of the router, including an adapter on it.
        below (`int`): number of trained parameter tensors below the router, which its balancing gradient reaches.
        experts (`str`, *optional*): how its experts learn, in the words of `how`; `None` if they were not found.
    """

    name: str
    how: str
    parameters: int
    below: int
    experts: str | None = None


def describe_router(name: str, root: nn.Module) -> RouterLearning:
    """Describes which parameters are trained in router `name` of `root`, below it, and in its experts."""
    own, adapter, below = 0, 0, 0
    embeddings = getattr(root, "get_input_embeddings", lambda: None)()
    first = {id(p) for p in embeddings.parameters()} if isinstance(embeddings, nn.Module) else set()
    for parameter_name, parameter in root.named_parameters():
        if not parameter.requires_grad:
            continue
        canonical = canonical_name(parameter_name)
        if canonical.startswith(f"{name}."):
            own += 0 if ".lora_" in canonical else parameter.numel()
            adapter += parameter.numel() if ".lora_" in canonical else 0
        elif id(parameter) in first or _is_below(canonical, name):
            below += 1
    how = "full" if own else "lora" if adapter else "frozen"
    return RouterLearning(name, how, own + adapter, below, _experts_learn(name, root))


def _experts_learn(router: str, root: nn.Module) -> str | None:
    block = f"{router.rpartition('.')[0]}."
    inside = [(canonical_name(name), parameter) for name, parameter in root.named_parameters()]
    inside = [(name, p) for name, p in inside if name.startswith(block) and not name.startswith(f"{router}.")]
    owners = {  # modules named like experts, or with a parameter that stacks one matrix per expert
        f"{name.rpartition('.')[0]}."
        for name, parameter in inside
        if EXPERTS.search(name.removeprefix(block)) or parameter.ndim == 3
    }
    learning = [name for name, parameter in inside if parameter.requires_grad and name.startswith(tuple(owners))]
    if not owners:
        return None
    return "frozen" if not learning else "lora" if all(".lora_" in name for name in learning) else "full"


def _is_below(parameter: str, router: str) -> bool:
    """Whether `parameter` is in an earlier layer, or mixes tokens before the router in the same layer (attention, ...)."""
    layer = re.compile(r"(.*?\.)(\d+)\.(.*)")
    here, there = layer.match(f"{router}."), layer.match(parameter)
    if here is None or there is None or here[1] != there[1]:
        return False
    if here[2] != there[2]:
        return int(there[2]) < int(here[2])
    if here[3].split(".")[0] == there[3].split(".")[0]:
        return False  # the router's own block
    before = (
        "input_layernorm" if MIXES_TOKENS.search(router) else MIXES_TOKENS
    )  # jetmoe routes inside its attention too
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

    @property
    def unmoved(self) -> list[str]:
        """Routers whose balancing gradient reaches no trained parameter."""
        return [row.name for row in self.rows if not row.parameters and not row.below]

    def __str__(self) -> str:
        routers, experts = _kinds([row.how for row in self.rows]), _kinds([row.experts for row in self.rows])
        lines = [
            f"Balancing gradient (coef={self.coef}) of {len(self.rows)} routers ({routers})"
            f"{f', experts ({experts})' if experts else ''}:"
        ]
        step = max(len(self.rows) - 1, 1) / (SHOWN - 1) if len(self.rows) > SHOWN else 1
        shown = sorted({round(i * step) for i in range(min(SHOWN, len(self.rows)))})
        lines += [f"  {_sentence(self.rows[i])}" for i in shown]
        if len(shown) < len(self.rows):
            lines.append(f"  ({len(self.rows) - len(shown)} more in phb.learning_report(model).rows)")
        return "\n".join(lines)


def _kinds(values: list[str | None]) -> str:
    return ", ".join(f"{values.count(how)} {how}" for how in ("full", "lora", "frozen") if how in values)


def _sentence(row: RouterLearning) -> str:
    kind = {"full": "learns in full", "lora": "learns by LoRA", "frozen": "frozen"}[row.how]
    parts = [f"{row.name}: {kind}"]
    if row.parameters:
        parts.append(f"{row.parameters:,} numbers of its own")
    parts.append(f"reaches {row.below} trained tensors below" if row.below else "nothing below it learns")
    return ", ".join(parts) + ("" if row.parameters or row.below else ": its prices move nothing")
