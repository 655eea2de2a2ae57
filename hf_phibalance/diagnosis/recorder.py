"""
Records one real optimizer step, and measures the coefficient that it received.

`Forwards` calls the recorder when a router has run, when tokens get their weight, and when the auxiliary gradient is added. A hook
on the logits sees the gradient itself. With reentrant checkpointing these are the logits of the recomputation. The declared
gradient is computed independently, by autograd of

    coef / N · Σ_tokens ⟨q, p⟩                 N: tokens of all forwards of the step, over all ranks.

Shapes: L routers, T tokens of a call, E experts, H hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import PhiBalancer, auxiliary_gradient
from ..maths import routing_probs
from ..routers import find_linear
from .report import PRECISE, ROUGH, Coefficient


LOW = (torch.bfloat16, torch.float16)
NEGLIGIBLE = 0.05  # share of the price gradient


@dataclass
class Call:
    """The first call of a router in the step."""

    mask: Tensor  # (T,) whether each token counts
    selected: Tensor  # (T, k) experts
    computed: Tensor | None = None  # (T, k) top-k of the logits
    exact: Tensor | None = None  # (T, k) top-k of logits computed in fp32


@dataclass
class Weight:
    """The weight `(E, H)` of a router that is one linear layer, and its expected gradient: Σ gᵀx over the step."""

    owner: nn.Module
    name: str
    gradient: Tensor
    error: float = 0.0  # squared rounding error to expect in the real gradient, from inputs and partial sums

    @property
    def parameter(self) -> Any:
        return getattr(self.owner, self.name)

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Adds gᵀx, of the `gradient (T, E)` of the logits and the router's input `(..., H)`."""
        g_TE, x_TH = gradient.float(), hidden.reshape(-1, hidden.shape[-1]).float()
        self.gradient.addmm_(g_TE.t(), x_TH)
        squares = g_TE.square().sum(-1) @ x_TH.square().sum(-1) + self.gradient.square().sum()
        eps = max(torch.finfo(kind).eps for kind in (gradient.dtype, self.parameter.dtype))
        self.error += float(squares) * (eps / 4) ** 2


def follow(output: Tensor, logits: Tensor, own: list[Tensor]) -> None:
    """Makes the backward fill `own` with the gradients of `logits` that come from the router's `output`, prices included."""
    seen: set[Any] = set()
    frontier: set[Any] = {output.grad_fn} - {logits.grad_fn}
    while frontier and len(seen) < 50:
        for node in frontier:
            slots = [i for i, (after, _) in enumerate(node.next_functions) if after is logits.grad_fn]
            if slots:
                node.register_hook(lambda found, _, at=slots: own.extend(found[i] for i in at if found[i] is not None))
        seen |= frontier
        frontier = {after for node in frontier for after, _ in node.next_functions} - seen - {None, logits.grad_fn}


class StepRecorder:
    """
    Records an optimizer step between [`~StepRecorder.start`] and [`~StepRecorder.finish`], without changing it. Call `finish`
    after the last backward and before gradients are clipped.

    Args:
        balancer (`PhiBalancer`): of the model.
        what (`str`): names the step in the report.
    """

    def __init__(self, balancer: PhiBalancer, what: str = "") -> None:
        self.balancer, self.what = balancer, what
        self._keeps_prices = balancer.config.price_from == "previous"  # those of the last step, not of its own tokens
        self.batches: list[Mapping[str, Any]] = []  # micro-batches as the loop has them; the caller fills this
        self.error: str | None = None  # exception that ended the step; the caller sets this
        self.forwards: list[Any] = []  # `Tokens` of the step's training forwards
        self.tokens = 0.0  # counted tokens, over all ranks
        self.announced: float | None = None  # tokens announced for the step, over all ranks
        self.goes_on = False  # announced in several parts, because the epoch ends within the step
        self.by_part = False  # each micro-batch is weighted by its announced share
        self.loads: dict[str, float] = {}  # selections of each router on this rank
        self.added: list[str] = []  # routers that added a gradient on this rank
        self.sums = torch.empty(0)  # probabilities and loads over all ranks (2, L, E)
        self.coefficient: Coefficient | None = None
        self.unmeasured = ""  # why there is no coefficient
        self.is_early = False  # ... since there are no prices yet
        self.is_finite = True  # gradients of the logits and of the weights
        # By router: the gradient at the logits that comes neither from the router's output nor from balancing,
        # relative to that of balancing. Leaves out negligible values and rounding. `None` if not measured.
        self.foreign: dict[str, float] | None = None
        self.kept: dict[str, float] = {}  # final gradient of each weight, projected on its gradient in the backward
        self._calls: dict[int, Call] = {}
        self._plain: dict[int, Tensor] = {}  # top-k without the selection bias (T, k), of the first call
        self._weights: dict[int, Weight] = {}
        self._is_precise = self._is_followed = True
        # (forward, router): weights and price that it adds, kept until the gradient of its logits arrives
        self._due: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._done: set[tuple[int, int]] = set()
        # Σ a², a·d, d², r², e² by router: a is the gradient added at the logits, d the declared one (without coef /
        # N), r the rest, e the rounding in f
        self._products = torch.zeros(len(balancer.sites), 5, dtype=torch.float64)
        # Σ f, Σ a over the tokens, by router: f is the part of r that does not come from the router's output
        self._sums = torch.zeros(len(balancer.sites), 2, balancer.duals.shape[1], dtype=torch.float64)

    def start(self) -> StepRecorder:
        self.balancer.forwards.recorder, self.balancer.forwards.watch = self, self._ranked
        return self

    def stop(self) -> None:
        self.balancer.forwards.recorder = self.balancer.forwards.watch = None

    # ------------------------------------------------------------------ called by the forwards of the model

    follow = staticmethod(follow)

    def record_router(
        self, forward: Any, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, own: list[Tensor]
    ) -> None:
        """
        Called when router `index` has computed `logits (T, E)` from `hidden`, in `forward` or its recomputation.
        [`follow`] fills `own`.
        """
        if index not in self._calls:
            self._calls[index] = self._record_call(forward, index, hidden, logits, selected)
        if logits.requires_grad:
            inputs = hidden.detach() if hidden is not None and index in self._weights else None
            # detached: a hook that holds its own tensor is a cycle, which would keep the forward alive
            logits.register_hook(functools.partial(self._reached, forward, index, inputs, logits.detach(), own))

    def settles(self, forward: Any) -> None:
        """Called when a backward has reached `forward`, which then belongs to the step."""
        self.forwards.append(forward.tokens)

    def adds(self, forward: Any, index: int, weight_T: Tensor, price_E: Tensor) -> None:
        """Called when router `index` adds the gradient of Σ_t weight_t ⟨price, p_t⟩ in the running backward."""
        self._due[forward.key, index] = weight_T, price_E

    def _ranked(self, index: int, scores: Tensor) -> None:
        """Called when router `index` has ranked `scores (..., E)` plus its selection bias."""
        if index not in self._plain:
            site = self.balancer.sites[index]
            self._plain[index] = torch.ops.aten.topk(scores.reshape(-1, site.num_experts), site.top_k)[1]

    def _record_call(self, forward: Any, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor) -> Call:
        """Records the first call: its selections, and the weight if the logits are one linear layer of `hidden`."""
        site = self.balancer.sites[index]
        call = Call(forward.tokens.mask_at(site, len(logits)) != 0, selected.detach().reshape(len(logits), -1))
        self._is_precise &= logits.dtype not in LOW and not torch.is_autocast_enabled(logits.device.type)
        if hidden is None or hasattr(hidden, "full_tensor"):
            return call
        hidden_TH = hidden.detach().reshape(-1, hidden.shape[-1])
        try:
            linear = find_linear(site)
        except (ValueError, StopIteration):  # not one linear layer, not whole in this process, or made by an adapter
            return call
        weight = linear.weight
        if (*hidden_TH.shape, logits.shape[-1]) != (len(logits), *reversed(weight.shape)):
            return call
        with torch.autocast(logits.device.type, enabled=False):
            exact = linear.logits(hidden_TH)
        if float((exact - logits.float()).norm()) > 0.05 * float(exact.norm()):
            return call  # the router is more than one linear layer
        if any(torch.equal(logits.to(dtype).float(), logits.float()) for dtype in LOW) or weight.dtype in LOW:
            call.computed, call.exact = (
                torch.ops.aten.topk(z, site.top_k)[1] for z in (logits.detach().float(), exact)
            )
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            shared = next((w for w in self._weights.values() if w.parameter is weight), None)
            name = next(name for name, p in linear.owner.named_parameters(recurse=False) if p is weight)
            gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            self._weights[index] = shared or Weight(linear.owner, name, gradient)
        return call

    def _reached(
        self, forward: Any, index: int, hidden: Tensor | None, logits: Tensor, own: list[Tensor], gradient: Tensor
    ) -> None:
        """Compares the whole gradient `(T, E)` of the logits of router `index` with the declared one."""
        if torch.is_grad_enabled():
            return  # nothing is added in a backward with create_graph
        key = forward.key, index
        with torch.autocast(logits.device.type, enabled=False):
            found = self._due.pop(key, None)
            if key not in self._done:  # a router that is called twice in a forward adds its gradient once
                self._done.add(key)
                scoring = self.balancer.sites[index].scoring
                added = torch.zeros_like(logits) if found is None else auxiliary_gradient(logits, *found, scoring)
                declared = self._declared(forward, index, logits)
                rest = gradient.float() - added
                foreign = gradient.float() - sum(part.float() for part in own) if own else torch.zeros_like(rest)
                error = torch.finfo(gradient.dtype).eps * gradient.float() * (len(own) > 1)  # rounding of the sum
                self._is_followed &= found is None or bool(own)
                for sum_, values in zip(self._sums[index], (foreign, added)):
                    sum_[: values.shape[-1]] += values.sum(0).cpu()
                pairs = (added, added), (added, declared), (declared, declared), (rest, rest), (error, error)
                self._products[index] += torch.stack([(a.cpu().double() * b.cpu().double()).sum() for a, b in pairs])
            if hidden is not None:
                self._weights[index].add(gradient, hidden)

    def _declared(self, forward: Any, index: int, logits: Tensor) -> Tensor:
        """Returns the gradient of Σ_tokens ⟨q, p⟩ at the logits, by autograd, `(T, E)` in fp32."""
        site = self.balancer.sites[index]
        prices = self.balancer.duals.price if self._keeps_prices else forward.price / self.balancer.coef
        price_E = prices[index, : site.num_experts].to(logits.device)
        mask = forward.tokens.mask_at(site, len(logits)).to(logits.device)
        with torch.enable_grad():
            z = logits.detach().float().requires_grad_()
            term = (routing_probs(z, site.scoring) @ price_E * mask).sum()
            return torch.autograd.grad(term, z)[0]

    # ------------------------------------------------------------------ the end of the step

    @torch.no_grad()
    def finish(self, loss_scale: float | None = None) -> StepRecorder:
        """Ends the recording and measures. All ranks must call it. The loop will divide gradients by `loss_scale`."""
        balancer, step, names = self.balancer, self.balancer.now, self.balancer.layer_names
        self.stop()
        self.goes_on = step.first > 0
        self.announced = None if step.tokens is None or self.goes_on else float(step.tokens)
        self.by_part = step.parts is not None
        self.loads = dict(zip(names, step.counts.load.sum(-1).tolist()))
        self.added = [name for index, name in enumerate(names) if index in step.added]
        self.sums = balancer.sum_over_ranks(step.counts.sums.clone()).cpu()
        own = torch.tensor(float(self.counted), device=step.counts.flat.device)
        self.tokens = float(balancer.sum_over_ranks(own))
        if balancer.config.coef != 0:
            self._measure(float(step.loss_scale) if loss_scale is None else loss_scale)
        if self.error is not None:
            self.coefficient = None
        return self

    def _measure(self, loss_scale: float) -> None:
        balancer, device = self.balancer, self.balancer.duals.values.device
        products, sums = (balancer.sum_over_ranks(own.to(device)).cpu() for own in (self._products, self._sums))
        precise = self._is_precise and not any(p.dtype in LOW for p in balancer.root.parameters())
        loop, left = self._compare_weights(products, 5 * (PRECISE if precise else ROUGH))
        self.is_finite = bool(torch.isfinite(products).all() and torch.isfinite(loop).all())
        if not self._calls and self._due:
            self.unmeasured = "the routers run compiled, so their logits cannot be seen"
        elif balancer.coef == 0:
            self.unmeasured = f"schedule={balancer.config.schedule!r} is over, and coef is 0"
        elif self._keeps_prices and not bool(balancer.duals.price.any()):
            self.is_early, self.unmeasured = True, "all prices are 0 before the first step has ended"
        if self.unmeasured:
            return
        if self._is_followed:
            sizes = zip(balancer.layer_names, *sums.norm(dim=-1).t().tolist(), products[:, 4].sqrt().tolist())
            self.foreign = {name: f / a for name, f, a, error in sizes if f > max(NEGLIGIBLE * a, 6 * error) and a > 0}
        strength = balancer.coef / max(self.tokens, 1.0)
        scale = loop / (loss_scale * balancer.ranks)
        aa, ad, dd = products[:, 0] * scale**2, products[:, 1] * scale * strength, products[:, 2] * strength**2
        ratio = residual = math.nan
        if float(dd.sum()):
            ratio = float(ad.sum() / dd.sum())
            square = float((aa.sum() - 2 * ratio * ad.sum() + ratio**2 * dd.sum()) / dd.sum())
            residual = math.hypot(math.sqrt(max(square, 0.0)), left)
        by_router = {name: float(a / d) for name, a, d in zip(balancer.layer_names, ad, dd) if d > 0}
        others = len(dd) - len(self.kept)
        where = [f"the weights of {len(self.kept)} routers"] if self.kept else []
        if others:
            where.append(f"the logits of {others} (frozen, adapted, not one linear layer, or lost in rounding)")
        self.coefficient = Coefficient(balancer.coef, ratio, residual, by_router, " and ".join(where), precise)

    def _compare_weights(self, products: Tensor, rounding: float) -> tuple[Tensor, float]:
        """
        Compares the gradient of each weight with Σ gᵀx, both averaged over the ranks. Skips weights whose gradients
        cancel so much that their rounding error exceeds `rounding`, relative to Σ gᵀx.

        Returns:
            The projection of the first on the second for each router `(L,)`, 1 if not compared; and the largest norm
            of the difference, relative to Σ gᵀx.
        """
        balancer, device = self.balancer, self.balancer.duals.values.device
        loop, left = torch.ones(len(products), dtype=torch.float64), 0.0
        is_plain = torch.zeros(len(products), device=device)
        for index, weight in self._weights.items():
            gradient = weight.parameter.grad
            is_lost = weight.error > float(weight.gradient.norm() * rounding) ** 2
            is_plain[index] = float(gradient is not None and gradient.shape == weight.gradient.shape and not is_lost)
        is_plain = balancer.sum_over_ranks(is_plain) == balancer.ranks
        # no gradient of the task: the model does not use these logits
        has_task = products[:, 3] > 1e-6 * products[:, 0]
        for index in (is_plain.cpu() & (has_task | products.isnan().any(-1))).nonzero().flatten().tolist():
            weight = self._weights[index]
            received = weight.parameter.grad
            received = (received.full_tensor() if hasattr(received, "full_tensor") else received).float().clone()
            received, expected = (
                balancer.sum_over_ranks(g).double().cpu() for g in (received, weight.gradient.clone())
            )
            square = expected.square().sum()
            loop[index] = (received * expected).sum() / square if square != 0 else 1.0
            left = max(left, float((received - loop[index] * expected).norm() / square.sqrt().clamp(min=1e-300)))
            self.kept[balancer.layer_names[index]] = float(loop[index])
        return loop, left

    # ------------------------------------------------------------------ for the checks

    @property
    def has_run(self) -> bool:
        """True if a training forward was seen."""
        return bool(self._calls or self.forwards)

    @property
    def positions(self) -> int:
        """Number of positions in the forwards on this rank."""
        return sum(tokens.mask.numel() for tokens in self.forwards)

    @property
    def counted(self) -> int:
        """Number of positions in the forwards on this rank that count as tokens."""
        return sum(int(tokens.mask.sum()) for tokens in self.forwards)

    @property
    def is_cut(self) -> bool:
        """True if the model saw another number of tokens than announced."""
        return self.announced not in (None, self.tokens)

    @property
    def rounded(self) -> float | None:
        """Share of selections that would be different in fp32; `None` if routers compute in fp32."""
        return _differing((call.mask, call.computed, call.exact) for call in self._calls.values())

    @property
    def unbiased(self) -> float | None:
        """Share of selections that would be different without our selection biases, which a plain load leaves out."""
        return _differing((call.mask, call.selected, self._plain.get(i)) for i, call in self._calls.items())


def _differing(calls: Any) -> float | None:
    missing = total = 0
    for mask, mine, other in calls:
        if mine is None or other is None:
            continue
        mine, other = mine[mask.to(mine.device)].cpu(), other[mask.to(other.device)].cpu()
        missing += int((mine.unsqueeze(-1) != other.unsqueeze(-2)).all(-1).sum())
        total += mine.numel()
    return missing / total if total else None
