"""What the trial of a step shows: tokens, routers that ran, the coefficient, what precision and a lost bias change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..balancing import Forward, PhiBalancer, Rehearsal, Routed
from ..routers import unwrap
from .coefficient import TRIES, Compared, count_tokens, flat, measure_coefficient
from .report import Coefficient
from .trial import Kept, Step


LOW = (torch.bfloat16, torch.float16)


@dataclass
class Observation:
    """
    What was seen; of this rank where nothing else is said.

    Args:
        what (`str`): what was run.
        error (`str`, *optional*): what ended it.
        forwards (`list[Forward]`): its training forwards.
        announced (`float`, *optional*): tokens that the step was announced with, over all ranks.
        tokens (`float`): tokens that counted, over all ranks.
        loads (`dict[str, float]`): choices of each router.
        charged (`list[str]`): routers from which a gradient path leads to something that learns.
        coefficient (`Coefficient`, *optional*): what the step received.
        lowered (`bool`): whether the loss scale had to be lowered, since gradients overflowed.
        rounded (`float`, *optional*): share of choices that are others than in fp32, where routers compute in less.
        unbiased (`float`, *optional*): share of choices that are others without the selection biases that are ours.
    """

    what: str
    error: str | None = None
    forwards: list[Forward] = field(default_factory=list)
    announced: float | None = None
    tokens: float = 0.0
    loads: dict[str, float] = field(default_factory=dict)
    charged: list[str] = field(default_factory=list)
    coefficient: Coefficient | None = None
    lowered: bool = False
    rounded: float | None = None
    unbiased: float | None = None


def observe(model: nn.Module, balancer: PhiBalancer, step: Step, measures: bool = True) -> Observation:
    """
    Tries `step` out. What stops a training stops it here, with its message in `error`.

    Args:
        model (`torch.nn.Module`): the model as it is trained.
        balancer (`PhiBalancer`): its balancer.
        step (`Step`): the step.
        measures (`bool`, *optional*, defaults to `True`): whether to measure the coefficient.
    """
    seen = Observation(step.what)
    with Kept(model) as kept, balancer.rehearsal() as rehearsal:
        try:
            _observe(seen, model, rehearsal, step, kept, measures and balancer.config.coef > 0)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            seen.error = f"{type(error).__name__}: {error}"
    return seen


def _observe(
    seen: Observation, model: nn.Module, rehearsal: Rehearsal, step: Step, kept: Kept, measures: bool
) -> None:
    sites = rehearsal.sites
    compared = Compared(rehearsal.balancer.root, [site.name for site in sites])
    for site in sites:
        site.charged = False
    with _eager(model), rehearsal.recording() as forwards:
        _run_unpriced(rehearsal, step)
    seen.forwards, seen.announced = forwards, rehearsal.announced_tokens
    seen.tokens, seen.loads = count_tokens(rehearsal, forwards), rehearsal.loads()
    seen.charged = [site.name for site in sites if site.charged]
    if measures:
        for _ in range(TRIES):
            if is_compiled(model):  # what was recorded ran without the compiler
                kept.rewind()
                kept.clear_gradients()
                _run_unpriced(rehearsal, step)
            seen.coefficient = measure_coefficient(
                rehearsal, step, kept, forwards, compared.gradients(step.loss_scale), compared
            )
            finite = torch.isfinite(flat(compared.gradients())).all()
            if finite or not step.lower_loss_scale():
                break
            seen.lowered = True
            kept.rewind()
            kept.clear_gradients()
            _run_unpriced(rehearsal, step)
    kept.clear_gradients()
    if forwards:
        _compare_choices(seen, rehearsal, forwards[0])


def _run_unpriced(rehearsal: Rehearsal, step: Step) -> None:
    rehearsal.announce(step.lowered)
    rehearsal.set_prices(None)
    step.run()


@torch.no_grad()
def _compare_choices(seen: Observation, rehearsal: Rehearsal, forward: Forward) -> None:
    """What the routers would choose in fp32, and without the selection biases that a plain load leaves out."""
    lost = any(not site.native_bias for site in rehearsal.sites) and rehearsal.balancer.has_bias
    routed = _route(rehearsal, forward)
    masks = {s.name: forward.mask_of(s, len(routed[s.name].logits)) for s in rehearsal.sites if s.name in routed}
    seen.rounded = _share(routed, masks, _in_fp32(rehearsal, routed))
    if lost:
        rehearsal.drop_bias()
        seen.unbiased = _share(routed, masks, {name: r.selected for name, r in _route(rehearsal, forward).items()})


def _route(rehearsal: Rehearsal, forward: Forward) -> dict[str, Routed]:
    rehearsal.announce()
    with torch.enable_grad(), rehearsal.watching() as routed:  # without gradients, nothing would count as training
        forward.run()
    for found in routed.values():
        found.logits = found.logits.detach()
    return routed


def _in_fp32(rehearsal: Rehearsal, routed: Mapping[str, Routed]) -> dict[str, Tensor]:
    """The top-k by linear routers in fp32 instead of what they computed in less; compared with the top-k of their logits."""
    found: dict[str, Tensor] = {}
    for site in rehearsal.sites:
        router, module = routed.get(site.name), site.modules[0]
        weight = getattr(module, "weight", None)
        if router is None or router.hidden is None or weight is None or weight.dtype not in (*LOW, torch.float32):
            continue
        hidden = router.hidden.reshape(-1, router.hidden.shape[-1]).float()
        if weight.shape != (site.num_experts, hidden.shape[-1]) or len(hidden) != len(router.logits):
            continue
        if torch.float32 == weight.dtype == router.logits.dtype and not _is_rounded(router.logits):
            continue
        bias = getattr(module, "bias", None)
        exact = F.linear(hidden, weight.float(), None if bias is None else bias.float())
        if float((exact - router.logits.float()).norm()) > 0.05 * float(exact.norm()):
            continue  # it computes something else
        found[site.name] = exact.topk(site.top_k).indices
        router.selected = router.logits.float().topk(site.top_k).indices
    return found


def _is_rounded(logits: Tensor) -> bool:
    """Whether fp32 `logits` have been less in between, as they are under autocast."""
    return any(torch.equal(logits.to(dtype).float(), logits) for dtype in LOW)


def _share(routed: Mapping[str, Routed], masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float | None:
    """Share of the choices of counted tokens that are not among `others`."""
    missing = total = 0
    for name, other in others.items():
        mask = masks[name].to(other.device)
        mine, theirs = routed[name].selected[mask], other[mask]
        missing += int((mine.unsqueeze(-1) != theirs.unsqueeze(-2)).all(-1).sum())
        total += mine.numel()
    return missing / total if total else None


def is_compiled(model: nn.Module) -> bool:
    """Whether `model`, or a part of it, is compiled."""
    modules = [*unwrap(model), *model.modules()]
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules)


def _eager(model: nn.Module):
    """Without the compiler, which a hook would disturb."""
    set_stance: Callable = torch.compiler.set_stance
    return set_stance("force_eager") if is_compiled(model) else nullcontext()


def labels_in(batches: Sequence[Mapping[str, Tensor]]) -> int | None:
    """Tokens of `batches` that have labels, `None` if they do not say."""
    found = [batch["labels"] for batch in batches if isinstance(batch.get("labels"), Tensor)]
    return sum(int((labels != -100).sum()) for labels in found) if found and len(found) == len(batches) else None
