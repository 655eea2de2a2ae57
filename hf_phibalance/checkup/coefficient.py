"""The coefficient that an optimizer step received: what balancing added to its gradient, against the definition.

One step is run three times on the same tokens with the same random numbers: as it will be, without prices; with known
prices, as it will be; and, by autograd from the logits that the routers return, only

    coef · Σ_layers mean_tokens ⟨q, p⟩.

Shapes: E experts, T tokens of a forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..balancing import Forward, PhiBalancer, Rehearsal
from ..maths import routing_probs
from ..routers import canonical_name
from .report import Coefficient
from .trial import Kept, Step, without_reentrant_checkpointing


MOST = 1 << 24  # numbers of the parameters below the routers that are compared, where no router learns
TRIES = 3  # lower loss scales after an overflow


class Compared:
    """
    The parameters at which gradients are compared: those of the routers, what adapters add to them included; where none
    learns, as many of the others as fit into memory easily.

    Args:
        root (`torch.nn.Module`): the model.
        names (`Sequence[str]`): names of its routers.
    """

    def __init__(self, root: nn.Module, names: Sequence[str]) -> None:
        trained = {canonical_name(name): p for name, p in root.named_parameters() if p.requires_grad}
        routers = {router: [p for name, p in trained.items() if name.startswith(f"{router}.")] for router in names}
        self.by_router = {router: found for router, found in routers.items() if found}
        self.parameters = [p for found in self.by_router.values() for p in found]
        self.what = f"the parameters of {len(self.by_router)} routers"
        if not self.parameters:
            total = 0
            for parameter in sorted(trained.values(), key=Tensor.numel):
                total += parameter.numel()
                if total <= MOST:
                    self.parameters.append(parameter)
            self.what = f"{len(self.parameters)} trained tensors below the routers, of which none learns"

    def gradients(self, scale: float = 1.0) -> list[Tensor]:
        """The present gradients over `scale`, in fp32."""
        return [_whole(p.grad).float() / scale if p.grad is not None else _zeros(p) for p in self.parameters]

    def of_router(self, gradients: Sequence[Tensor], router: str) -> Tensor:
        """Those of `gradients` that belong to `router`, flat."""
        own = {id(p) for p in self.by_router[router]}
        return flat([g for p, g in zip(self.parameters, gradients) if id(p) in own])


def known_prices(balancer: PhiBalancer) -> dict[str, Tensor]:
    """Centred prices by layer name, each `(E,)`, uneven and the same in every process."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(price.shape, generator=generator) for name, price in balancer.prices().items()}
    return {name: price - price.mean() for name, price in drawn.items()}


def measure_coefficient(
    rehearsal: Rehearsal,
    step: Step,
    kept: Kept,
    forwards: Sequence[Forward],
    unpriced: Sequence[Tensor],
    compared: Compared,
) -> Coefficient:
    """
    Args:
        rehearsal (`Rehearsal`), step (`Step`), kept (`Kept`): of the trial.
        forwards (`Sequence[Forward]`): the forwards of `step`.
        unpriced (`Sequence[Tensor]`): gradients of the parameters that are compared, of `step` without prices.
        compared (`Compared`): these.
    """
    balancer = rehearsal.balancer
    prices = known_prices(balancer)
    expected = definition(rehearsal, forwards, prices, compared)
    size, other = float(flat(expected).norm()), float(flat(unpriced).norm())
    if size == 0:
        return Coefficient(balancer.config.coef, math.nan, math.nan, {}, compared.what, True)
    # as large as the rest of the gradient, so that rounding hides neither
    strength = other / size if other > 0 and math.isfinite(other) else 1.0
    prices = {name: strength * price for name, price in prices.items()}
    kept.rewind()
    kept.clear_gradients()
    rehearsal.announce(step.lowered)
    rehearsal.set_prices(prices)
    step.run()
    rehearsal.set_prices(None)
    added = [priced - plain for priced, plain in zip(compared.gradients(step.loss_scale), unpriced)]
    expected = [strength * gradient for gradient in expected]
    ratio, residual = compare(flat(added), flat(expected))
    partial = {site.name for site in balancer.sites if not site.sees_all}
    by_router = {
        name: compare(compared.of_router(added, name), compared.of_router(expected, name))[0]
        for name in compared.by_router
        if name not in partial
        or compared.of_router(expected, name).any()  # without images, those for images have nothing to do
    }
    dtypes = {p.dtype for p in balancer.root.parameters()} | {f.autocast_dtype for f in forwards if f.autocast_dtype}
    precise = not dtypes & {torch.bfloat16, torch.float16}
    return Coefficient(balancer.config.coef, ratio, residual, by_router, compared.what, precise)


def definition(
    rehearsal: Rehearsal, forwards: Sequence[Forward], prices: Mapping[str, Tensor], compared: Compared
) -> list[Tensor]:
    """Gradient of the definition over all `forwards` of all ranks, by autograd; on the device of the parameters, in fp32."""
    balancer = rehearsal.balancer
    sites = {site.name: site for site in balancer.sites}
    total = [_zeros(parameter) for parameter in compared.parameters]
    rehearsal.set_prices(None)
    with without_reentrant_checkpointing(balancer.root), torch.enable_grad():
        for forward in forwards:
            rehearsal.announce(loss_scale=0.0)  # nothing is charged, extra losses neither
            with rehearsal.watching() as routed:
                forward.run()
            term: Tensor | None = None
            for name, found in routed.items():
                probs_TE = routing_probs(found.logits, sites[name].scoring)
                mask = forward.mask_of(sites[name], len(probs_TE)).to(probs_TE.device)
                paid = (probs_TE @ prices[name].to(probs_TE))[mask].sum()
                term = paid if term is None else term + paid.to(term.device)
            if term is None or not term.requires_grad:
                continue
            gradients = torch.autograd.grad(term, compared.parameters, allow_unused=True)
            for sum_, gradient in zip(total, gradients):
                if gradient is not None:
                    sum_.add_(_whole(gradient))
    for sum_ in total:
        rehearsal.sum_over_ranks(sum_)
    tokens = count_tokens(rehearsal, forwards)
    return [balancer.config.coef / max(tokens, 1.0) * sum_ for sum_ in total]


def count_tokens(rehearsal: Rehearsal, forwards: Sequence[Forward]) -> float:
    """Tokens of `forwards` that count, over all ranks."""
    device = forwards[0].mask.device if forwards else torch.device("cpu")
    own = torch.tensor(float(sum(int(forward.mask.sum()) for forward in forwards)), device=device)
    return float(rehearsal.sum_over_ranks(own))


def compare(added: Tensor, expected: Tensor) -> tuple[float, float]:
    """Projection of `added` on `expected`, and the norm of what is left, relative to `expected`."""
    square = float(expected @ expected)
    if square == 0:
        return math.nan, math.nan
    ratio = float(added @ expected) / square
    return ratio, float((added - ratio * expected).norm()) / math.sqrt(square)


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """All of `gradients` in one fp64 vector on the CPU."""
    return torch.cat([gradient.detach().reshape(-1).double().cpu() for gradient in gradients] or [torch.zeros(0)])


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, device=parameter.device)
