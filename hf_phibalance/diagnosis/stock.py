"""
Measures the coefficient of the built-in auxiliary loss that one optimizer step receives, on an unpatched model.

Hooks see the gradient of the routers' logits. The part that comes from a router's own output belongs to the task. The rest,
g, is projected on the declared gradient, which autograd computes from transformers' `load_balancing_loss_func` (all layers
pooled: E · Σ_e f_e P_e, with f the top-k counts and P the mean probabilities), as the mean over the step's forwards:

    received = F · Σ ⟨g, d⟩ / Σ ⟨d, d⟩         d: gradient of the loss of one forward; F: forwards of the step on this rank

The gradients are averaged over R ranks, as data parallelism does. The same is fitted with the counts f of the whole step,
which needs no second pass: the gradient of Σ_e f_e p_e at a token is J f, J = diag(p) - p pᵀ, so u = Σ J g and Q = Σ J² suffice.

Shapes: L calls of routers in a forward, T = B x S tokens, E experts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ..routers import arguments_by_name, find_routers, reading, unwrap
from .recorder import LOW, follow


@dataclass
class Call:
    """One call of a router in a forward."""

    index: int  # of the router
    logits: Tensor  # (T, E)
    foreign: Tensor | None = None  # (T, E) gradient of the logits that does not come from the router's output


@dataclass
class Forward:
    """One training forward of the model."""

    given_BS: Tensor | None  # attention mask that the model received
    tokens_BS: Tensor  # True for tokens, False for padding
    calls: list[Call] = field(default_factory=list)
    is_reached: bool = False  # by a backward
    from_loss: float = 0.0  # gradient of the model's `loss`
    from_aux: float | None = None  # gradient of the model's `aux_loss`; `None` if it computes none
    has_path: bool = False  # `aux_loss` has a gradient path


class StockRecorder:
    """
    A `RouterReader` that records the forwards of an optimizer step of `model`.

    Args:
        model (`torch.nn.Module`): a MoE model of transformers, possibly wrapped.
        pad_token_id (`int`, *optional*): finds padding in batches without an attention mask.
    """

    owner, is_idle = None, False

    def __init__(self, model: nn.Module, pad_token_id: int | None = None) -> None:
        self.root: Any = unwrap(model)[-1]
        self.sites = find_routers(self.root)
        self.experts = max(site.num_experts for site in self.sites)
        self.is_precise = all(p.dtype not in LOW for p in self.root.parameters())
        self.forwards = 0
        self.positions, self.padding = 0, 0
        self.is_reentrant = False
        self.aux_path: list[bool] = []  # by forward: whether `aux_loss` has a gradient path
        self.from_loss: list[float] = []
        self.from_aux: list[float] = []
        # Σ ⟨g, d⟩ and Σ ⟨d, d⟩ without padding and with it, Σ ⟨g, g⟩ of all positions and of padding
        self.products = torch.zeros(6, dtype=torch.float64)
        # counts and probabilities by router, tokens by router
        self.sums = torch.zeros(2, len(self.sites), self.experts, dtype=torch.float64)
        self.tokens = torch.zeros(len(self.sites), dtype=torch.float64)
        self.u, self.q = (torch.zeros(self.experts, *more, dtype=torch.float64) for more in ((), (self.experts,)))
        self._pad = pad_token_id
        self._now: Forward | None = None
        self._open: list[Forward] = []
        self._loss = _loss_of(self.root)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: inside it, forwards of the model with gradients are recorded."""
        handles = [
            self.root.register_forward_pre_hook(self._begins, with_kwargs=True),
            self.root.register_forward_hook(self._ends),
        ]
        try:
            with reading(self):
                yield
        finally:
            self._now = None
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ called by the forwards of the model

    def choice_bias(self, index: int) -> Tensor | None:
        return self.sites[index].read_native_bias()

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        if self._now is None:  # the recomputation of checkpointing, which is outside the model's own forward
            return carrier
        call = Call(index, logits.detach().reshape(-1, logits.shape[-1]))
        self._now.calls.append(call)
        self.is_reentrant |= not torch.is_grad_enabled()  # though the model's forward began with gradients
        self.is_precise &= logits.dtype not in LOW and not torch.is_autocast_enabled(logits.device.type)
        if logits.requires_grad:
            own: list[Tensor] = []
            follow(carrier, logits, own)

            def arrives(gradient: Tensor) -> None:
                call.foreign = (gradient.float() - sum(part.float() for part in own)).reshape(call.logits.shape)

            logits.register_hook(arrives)
        return carrier

    def _begins(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not (torch.is_grad_enabled() and module.training):
            self._now = None
            return
        inputs = arguments_by_name(module, args, kwargs)
        ids, given = inputs.get("input_ids"), inputs.get("attention_mask")
        ids = inputs["inputs_embeds"][..., 0] if ids is None else ids
        given = given if isinstance(given, Tensor) and given.shape == ids.shape else None
        tokens = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        if given is None and self._pad is not None and not ids.is_floating_point():
            other = ids != self._pad  # padding is a run of pad tokens at an end of a row
            tokens = (other.cumsum(1) > 0) & (other.flip(1).cumsum(1).flip(1) > 0)
        self._now = Forward(given, tokens)
        self._open.append(self._now)

    def _ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward, self._now = self._now, None
        if forward is None:
            return

        def reached(gradient: Tensor | None) -> None:
            forward.is_reached |= gradient is not None

        for part in output.values() if isinstance(output, Mapping) else output:
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(reached)
        loss, aux = getattr(output, "loss", None), getattr(output, "aux_loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda gradient: setattr(forward, "from_loss", _number(gradient)))
        if isinstance(aux, Tensor):
            forward.from_aux, forward.has_path = 0.0, aux.requires_grad
            if aux.requires_grad:
                aux.register_hook(lambda gradient: setattr(forward, "from_aux", _number(gradient)))

    # ------------------------------------------------------------------ after backwards

    def settle(self) -> None:
        """Adds up the forwards whose backward has run, and forgets their tensors. Call it after each micro-batch."""
        while self._open:
            self._add(self._open.pop())

    def _add(self, forward: Forward) -> None:
        mask = forward.tokens_BS.reshape(-1)
        calls = [call for call in forward.calls if call.logits.shape == (mask.numel(), self.experts)]
        if not calls or not forward.is_reached:
            return
        self.forwards += 1
        self.positions, self.padding = self.positions + mask.numel(), self.padding + int((~mask).sum())
        if forward.from_aux is not None:
            self.from_aux.append(forward.from_aux)
            self.aux_path.append(forward.has_path)
            self.from_loss.append(forward.from_loss)
        device = calls[0].logits.device
        mask = mask.to(device)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            logits = [call.logits.to(device, torch.float32).requires_grad_() for call in calls]
            top_k = self.sites[calls[0].index].top_k
            values = [
                self._loss(tuple(logits), self.experts, top_k, rows)
                for rows in (forward.tokens_BS.long().to(device), None)
            ]
            declared = [torch.autograd.grad(value, logits) for value in values]
        for call, z, with_mask, without in zip(calls, logits, *declared):
            z = z.detach()
            g = torch.zeros_like(z) if call.foreign is None else call.foreign.to(device)
            pairs = (
                (g, with_mask),
                (with_mask, with_mask),
                (g, without),
                (without, without),
                (g, g),
                (g[~mask], g[~mask]),
            )
            self.products += torch.stack([(a * b).sum().cpu().double() for a, b in pairs])
            rows = mask if forward.given_BS is not None else torch.ones_like(mask)
            p, g = z[rows].softmax(-1), g[rows]
            chosen = torch.bincount(p.topk(top_k).indices.reshape(-1), minlength=self.experts)
            for sum_, part in zip(self.sums, (chosen, p.sum(0))):
                sum_[call.index] += part.cpu().double()
            self.tokens[call.index] += len(p)
            square = p.square()
            cross = p.T @ square
            self.u += (p * (g - (g * p).sum(-1, keepdim=True))).sum(0).cpu().double()
            jacobian = square.sum(0).diag() - cross - cross.T + (p * square.sum(-1, keepdim=True)).T @ p
            self.q += jacobian.cpu().double()

    @torch.no_grad()
    def finish(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums, loss_scale: float = 1.0) -> Stock:
        """
        Returns what the step received.

        Args:
            reduce: sums a tensor over the data-parallel ranks, all of which call it.
            loss_scale (`float`): of mixed precision, by which all gradients are multiplied.
        """
        self.settle()
        own = torch.tensor([1, self.forwards, self.positions, self.padding, sum(self.from_aux)], dtype=torch.float64)
        ranks, forwards, positions, padding, from_aux = reduce(own).tolist()
        if not forwards:
            raise ValueError(
                "no router ran in a training step: either there is no data, or something bypasses the routers (a fused kernel?). "
                "Load the model with use_kernels=False."
            )
        sums, tokens, u, q, products = map(reduce, (self.sums, self.tokens, self.u, self.q, self.products))
        products[[0, 2]] /= loss_scale
        products[4:] /= loss_scale**2
        *_, g_g, on_padding = products.tolist()
        total, called = tokens.sum(), tokens > 0
        load, scale = sums[0].sum(0) / total, self.experts / total
        step = _Fit(scale * u @ load / loss_scale, scale**2 * load @ q @ load)
        best = max(_Fit(*products[:2]), _Fit(*products[2:4]), key=lambda fit: fit.explained)
        received, counts = best.coefficient * self.forwards, "micro-batch"
        if forwards > 1 and step.explained > best.explained + 1e-3 * g_g:
            best, received, counts = step, step.coefficient / ranks, "step"
        if not self.is_precise and from_aux:  # at the logits, much of it is lost in rounding
            received = from_aux / (loss_scale * ranks)
        load_LE, prob_LE = (part[called] / tokens[called, None] for part in sums)
        names = [site.name for site, is_called in zip(self.sites, called) if is_called]
        return Stock(
            received=received,
            residual=max(0.0, 1 - best.explained / g_g) ** 0.5 if g_g and self.is_precise else 0.0,
            counts=counts,
            forwards=self.forwards,
            ranks=int(ranks),
            positions=int(positions),
            padding=int(padding),
            on_padding=on_padding / g_g if g_g else 0.0,
            is_reentrant=self.is_reentrant,
            computes=bool(self.from_aux),
            aux_has_path=any(self.aux_path),
            from_loss=sum(self.from_loss) / loss_scale,
            from_aux=sum(self.from_aux) / loss_scale,
            pooled=float(scale * (load * sums[1].sum(0)).sum()),
            layers=dict(zip(names, (self.experts * (load_LE * prob_LE).sum(-1)).tolist())),
            top_k=self.sites[0].top_k,
            learns=any(p.requires_grad for site in self.sites for p in site.router.parameters()),
            is_precise=self.is_precise,
        )


@dataclass(frozen=True)
class _Fit:
    """A projection on a declared gradient d: ⟨g, d⟩ and ⟨d, d⟩."""

    g_d: Any
    d_d: Any

    @property
    def coefficient(self) -> float:
        return float(self.g_d / self.d_d) if self.d_d > 0 else 0.0

    @property
    def explained(self) -> float:
        """The part of ⟨g, g⟩ that the projection explains."""
        return float(self.g_d**2 / self.d_d) if self.d_d > 0 else 0.0


@dataclass(frozen=True)
class Stock:
    """What one optimizer step received of the built-in loss."""

    received: float  # coefficient at the logits
    residual: float  # norm of the foreign gradient outside the projection, relative to all of it
    counts: str  # "micro-batch" or "step": the tokens whose counts the loss takes
    forwards: int  # on this rank
    ranks: int
    positions: int  # in the forwards of all ranks
    padding: int
    on_padding: float  # share of the squared foreign gradient on padding
    is_reentrant: bool  # the routers ran without gradients, and again in the backward
    computes: bool  # the model returned an `aux_loss`
    aux_has_path: bool  # ... with a gradient path
    from_loss: float  # gradient of the model's `loss`, summed over the forwards of this rank
    from_aux: float  # the same of its `aux_loss`
    pooled: float  # the loss over the step, all layers pooled; top_k is balance
    layers: dict[str, float]  # the same loss of each router alone
    top_k: int
    learns: bool  # some router has trainable parameters
    is_precise: bool


def _number(gradient: Tensor | None) -> float:
    """Returns the gradient of a scalar; 0 for an output that DDP passes on and nobody uses."""
    return 0.0 if gradient is None else float(gradient)


def _loss_of(root: nn.Module) -> Callable[..., Any]:
    """Returns the family's own `load_balancing_loss_func` if it takes the usual arguments, otherwise Mixtral's."""
    own = getattr(sys.modules.get(type(root).__module__), "load_balancing_loss_func", load_balancing_loss_func)
    usual = inspect.signature(load_balancing_loss_func).parameters
    return own if list(inspect.signature(own).parameters) == list(usual) else load_balancing_loss_func
