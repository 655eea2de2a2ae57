"""What balancing can move in a model: which routers learn, and how much of the balancing gradient reaches what.

The gradient of the balancing term of a router with logits z = x Wᵀ is g = coef/N · ∂⟨q, p⟩/∂z at its logits. From there it
goes to the router's own weight, as gᵀ x, and to what lies below the router, as g W. Both are lost where nothing learns.
Shapes: T tokens, E experts, H hidden units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..maths import price_gradient
from ..routers import canonical_name


SHOWN = 16  # routers in the text of a report
MIXES_TOKENS = re.compile(r"attn|attention|mamba|conv|input_layernorm")
EXPERTS = re.compile(r"(^|\.)(?!share)\w*experts?\.")
LINEAR = 0.05  # greatest relative distance between the logits and what a linear router would compute


@dataclass(frozen=True)
class RouterLearning:
    """
    How one router learns.

    Args:
        name (`str`): name of the router.
        how (`str`): `"full"` (its own weights), `"lora"` (an adapter on them) or `"frozen"`.
        parameters (`int`): numbers of the router that are trained, those of an adapter on it included.
        below (`int`): trained parameter tensors below the router, which its balancing gradient flows on to.
        at_logits (`float`, *optional*):
            Norm of the balancing gradient at the logits, of one forward taken as a whole optimizer step; `None` before
            there were prices, and where nothing was measured (under `torch.compile`).
        at_weight (`float`, *optional*): the same at the router's weight; `None` also if the router is not linear.
        at_input (`float`, *optional*): the same at the hidden states that enter the router.
        experts (`str`, *optional*): how the experts that it chooses among learn, as `how`; `None` where they were not found.
    """

    name: str
    how: str
    parameters: int
    below: int
    at_logits: float | None = None
    at_weight: float | None = None
    at_input: float | None = None
    experts: str | None = None


@torch.no_grad()
def gradient_norms(
    hidden: Tensor, router: nn.Module, logits: Tensor, price: Tensor, rate: Tensor, scoring: str
) -> Tensor:
    """
    Norms `(4,)` of the balancing gradient at the logits, the weight and the input of a router, and how far its logits are
    from `hidden @ weight.T` (relative; infinite if they cannot be that).

    Args:
        hidden (`torch.Tensor` of shape `(..., H)`): what the router received.
        logits (`torch.Tensor` of shape `(T, E)`), price (`torch.Tensor` of shape `(E,)`),
        rate (`torch.Tensor` of shape `(T,)`): as for `ChargePrices`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _gradient_norms(hidden, router, logits, price_gradient(logits, price, rate, scoring))


def _gradient_norms(hidden: Tensor, router: nn.Module, logits: Tensor, gradient_TE: Tensor) -> Tensor:
    at_logits = gradient_TE.norm()
    weight, bias = getattr(router, "weight", None), getattr(router, "bias", None)
    hidden_TH = hidden.reshape(-1, hidden.shape[-1]).float()
    if (
        weight is None
        or weight.is_meta
        or weight.shape != (logits.shape[-1], hidden_TH.shape[-1])
        or len(hidden_TH) != len(logits)
    ):
        unknown = torch.zeros_like(at_logits)
        return torch.stack([at_logits, unknown, unknown, torch.full_like(at_logits, float("inf"))])
    weight_EH = weight.to(hidden_TH)
    linear = F.linear(hidden_TH, weight_EH, None if bias is None else bias.to(hidden_TH))
    error = (linear - logits).norm() / logits.float().norm()
    return torch.stack([at_logits, (gradient_TE.T @ hidden_TH).norm(), (gradient_TE @ weight_EH).norm(), error])


def describe_router(name: str, root: nn.Module) -> RouterLearning:
    """What is trained of router `name` of `root`, below it, and of its experts."""
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
    experts = _experts_learn(name, root)
    return RouterLearning(
        name, "full" if own else "lora" if adapter else "frozen", own + adapter, below, experts=experts
    )


def _experts_learn(router: str, root: nn.Module) -> str | None:
    block = f"{router.rpartition('.')[0]}."
    inside = [(canonical_name(name), parameter) for name, parameter in root.named_parameters()]
    inside = [(name, p) for name, p in inside if name.startswith(block) and not name.startswith(f"{router}.")]
    owners = {  # modules named so, or whose parameter has a matrix for each expert
        f"{name.rpartition('.')[0]}."
        for name, parameter in inside
        if EXPERTS.search(name.removeprefix(block)) or parameter.ndim == 3
    }
    learning = [name for name, parameter in inside if parameter.requires_grad and name.startswith(tuple(owners))]
    if not owners:
        return None
    return "frozen" if not learning else "lora" if all(".lora_" in name for name in learning) else "full"


def _is_below(parameter: str, router: str) -> bool:
    """Whether `parameter` belongs to an earlier layer, or to what mixes the tokens before the router in the same one."""
    layer = re.compile(r"(.*?\.)(\d+)\.(.*)")
    here, there = layer.match(f"{router}."), layer.match(parameter)
    if here is None or there is None or here[1] != there[1]:
        return False
    if here[2] != there[2]:
        return int(there[2]) < int(here[2])
    if here[3].split(".")[0] == there[3].split(".")[0]:
        return False  # the router's own block
    first = (
        "input_layernorm" if MIXES_TOKENS.search(router) else MIXES_TOKENS
    )  # jetmoe routes inside its attention too
    return re.search(first, there[3].rpartition(".")[0]) is not None


@dataclass(frozen=True)
class LearningReport:
    """What [`learning_report`] returns: `rows` (`list[RouterLearning]`); as text, at most 16 of them, evenly spaced."""

    coef: float
    rows: list[RouterLearning] = field(default_factory=list)

    @property
    def all_in_full(self) -> bool:
        """Whether all routers and experts are trained whole, as they are without an adapter."""
        return all(row.how == "full" and row.experts in ("full", None) for row in self.rows)

    @property
    def unmoved(self) -> list[str]:
        """Routers whose balancing gradient reaches nothing that learns."""
        return [row.name for row in self.rows if not row.parameters and not row.below]

    def __str__(self) -> str:
        routers, experts = _kinds([row.how for row in self.rows]), _kinds([row.experts for row in self.rows])
        lines = [
            f"Balancing gradient (coef={self.coef}) of {len(self.rows)} routers ({routers})"
            f"{f', experts ({experts})' if experts else ''}; norms of one forward taken as a whole step:"
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
    parts = [f"{row.name}: {kind}", f"{_number(row.at_logits)} at its logits"]
    if row.parameters:
        parts.append(f"{_number(row.at_weight)} at its weight ({row.parameters:,} trained numbers)")
    parts.append(
        f"{_number(row.at_input)} to {row.below} trained tensors below" if row.below else "nothing below it learns"
    )
    return ", ".join(parts) + ("" if row.parameters or row.below else ": its prices move nothing")


def _number(value: float | None) -> str:
    return "(not measured)" if value is None else f"{value:.1e}"
