"""
Measures the coefficient of the built-in auxiliary loss that one optimizer step receives, on an unpatched model.

Hooks see the gradient of the routers' logits. The part that comes from a router's own output belongs to the task. The rest,
g, is projected on the declared gradient, which autograd computes from transformers' `load_balancing_loss_func` (all layers
pooled: E · Σ_e f_e P_e, with f the top-k counts and P the mean probabilities), as the mean over the step's forwards:

    received = F · Σ ⟨g, d⟩ / Σ ⟨d, d⟩         d: gradient of the loss of one forward; F: forwards of the step on this rank

The gradients are averaged over R ranks, as data parallelism does. The same is fitted with the counts f of the whole step,
which needs no second pass: the gradient of Σ_e f_e p_e at a token is J f, J = diag(p) - p pᵀ, so u = Σ J g and Q = Σ J² suffice.

Shapes: L routers, T = B x S tokens, E experts.
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

    has_mask: bool  # the model received an attention mask
    tokens_BS: Tensor  # True for tokens, False for padding
    calls: list[Call] = field(default_factory=list)
    is_reached: bool = False  # by a backward
    computes: bool = False  # the model returned an `aux_loss`
    has_path: bool = False  # ... with a gradient path
    from_loss: float = 0.0  # gradient of the model's `loss`
    from_aux: float = 0.0  # gradient of the model's `aux_loss`


class StockRecorder:
    """
    A `RouterReader` that records the forwards of an optimizer step of `model`, and measures what the step received.

    Args:
        model (`torch.nn.Module`): a MoE model of transformers, possibly wrapped.
        pad_token_id (`int`, *optional*): finds padding in batches without an attention mask.
    """

    owner, is_idle = None, False

    def __init__(self, model: nn.Module, pad_token_id: int | None = None) -> None:
        self.root: Any = unwrap(model)[-1]
        self.sites = find_routers(self.root)
        self.experts, self.top_k = max(site.num_experts for site in self.sites), self.sites[0].top_k
        self.is_precise = all(p.dtype not in LOW for p in self.root.parameters())
        self.forwards = 0  # on this rank
        self.positions = self.padding = 0  # in the forwards of all ranks
        self.is_reentrant = False  # the routers ran without gradients, and again in the backward
        self.computes = self.aux_has_path = False  # the model returned an `aux_loss`; with a gradient path
        self.from_loss = self.from_aux = (
            0.0  # gradients of `loss` and `aux_loss`, summed over the forwards of this rank
        )
        # set by `finish`
        self.ranks = 1
        self.received = 0.0  # coefficient at the logits
        self.residual = 0.0  # norm of the foreign gradient outside the projection, relative to all of it
        self.is_of_step = False  # the loss takes its counts from the whole step, not from each micro-batch
        self.on_padding = 0.0  # share of the squared foreign gradient on padding
        self.pooled = 0.0  # the loss over the step, all layers pooled; top_k is balance
        self.layers: dict[str, float] = {}  # the same loss of each router alone
        # Σ ⟨g, d⟩ and Σ ⟨d, d⟩ without padding and with it, Σ ⟨g, g⟩ of all positions and of padding
        self._products = torch.zeros(6, dtype=torch.float64)
        self._sums = torch.zeros(2, len(self.sites), self.experts, dtype=torch.float64)  # counts and probabilities
        self._tokens = torch.zeros(len(self.sites), dtype=torch.float64)  # by router
        self._u, self._q = self._sums.new_zeros(self.experts), self._sums.new_zeros(self.experts, self.experts)
        self._pad = pad_token_id
        self._now: Forward | None = None
        self._open: list[Forward] = []
        self._loss = _loss_of(self.root)

    @property
    def learns(self) -> bool:
        """True if some router has trainable parameters."""
        return any(p.requires_grad for site in self.sites for p in site.router.parameters())

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
        self._now = None
        if not (torch.is_grad_enabled() and module.training):
            return
        inputs = arguments_by_name(module, args, kwargs)
        ids, given = inputs.get("input_ids"), inputs.get("attention_mask")
        ids = inputs["inputs_embeds"][..., 0] if ids is None else ids
        given = given if isinstance(given, Tensor) and given.shape == ids.shape else None
        tokens = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        if given is None and self._pad is not None and not ids.is_floating_point():
            other = ids != self._pad  # padding is a run of pad tokens at an end of a row
            tokens = (other.cumsum(1) > 0) & (other.flip(1).cumsum(1).flip(1) > 0)
        self._now = Forward(given is not None, tokens)
        self._open.append(self._now)

    def _ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward, self._now = self._now, None
        if forward is None:
            return

        def reached(gradient: Tensor | None) -> None:
            forward.is_reached |= gradient is not None

        def kept(name: str) -> Callable[[Tensor | None], None]:
            # DDP passes on outputs that nobody uses, and gives them no gradient
            return lambda gradient: setattr(forward, name, 0.0 if gradient is None else float(gradient))

        for part in output.values() if isinstance(output, Mapping) else output:
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(reached)
        loss, aux = getattr(output, "loss", None), getattr(output, "aux_loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(kept("from_loss"))
        if isinstance(aux, Tensor):
            forward.computes, forward.has_path = True, aux.requires_grad
            if aux.requires_grad:
                aux.register_hook(kept("from_aux"))

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
        self.computes, self.aux_has_path = self.computes | forward.computes, self.aux_has_path | forward.has_path
        if forward.computes:
            self.from_loss, self.from_aux = self.from_loss + forward.from_loss, self.from_aux + forward.from_aux
        device = calls[0].logits.device
        mask = mask.to(device)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            logits = [call.logits.to(device, torch.float32).requires_grad_() for call in calls]
            masks = forward.tokens_BS.long().to(device), None
            losses = [self._loss(tuple(logits), self.experts, self.top_k, rows) for rows in masks]
            declared = [torch.autograd.grad(loss, logits) for loss in losses]
        for call, z, with_mask, without in zip(calls, logits, *declared):
            z = z.detach()
            g = torch.zeros_like(z) if call.foreign is None else call.foreign.to(device)
            pairs = [pair for d in (with_mask, without) for pair in ((g, d), (d, d))]
            pairs += [(g, g), (g[~mask], g[~mask])]
            self._products += torch.stack([(a * b).sum().cpu().double() for a, b in pairs])
            rows = mask if forward.has_mask else torch.ones_like(mask)
            p, g = z[rows].softmax(-1), g[rows]
            chosen = torch.bincount(p.topk(self.top_k).indices.reshape(-1), minlength=self.experts)
            self._sums[:, call.index] += torch.stack([chosen, p.sum(0)]).cpu().double()
            self._tokens[call.index] += len(p)
            square = p.square()
            cross = p.T @ square
            self._u += (p * (g - (g * p).sum(-1, keepdim=True))).sum(0).cpu().double()
            jacobian = square.sum(0).diag() - cross - cross.T + (p * square.sum(-1, keepdim=True)).T @ p
            self._q += jacobian.cpu().double()

    @torch.no_grad()
    def finish(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums, loss_scale: float = 1.0) -> StockRecorder:
        """
        Ends the recording and measures.

        Args:
            reduce: sums a tensor over the data-parallel ranks, all of which call it.
            loss_scale (`float`): of mixed precision, by which all gradients are multiplied.
        """
        self.settle()
        self.from_loss, self.from_aux = self.from_loss / loss_scale, self.from_aux / loss_scale
        own = torch.tensor([1, self.forwards, self.positions, self.padding, self.from_aux], dtype=torch.float64)
        *integers, from_aux = reduce(own).tolist()
        self.ranks, forwards, self.positions, self.padding = map(int, integers)
        if not forwards:
            raise ValueError(
                "no router ran in a training step: either there is no data, or something bypasses the routers (a fused kernel?). "
                "Load the model with use_kernels=False."
            )
        sums, tokens, u, q, products = map(reduce, (self._sums, self._tokens, self._u, self._q, self._products))
        products[[0, 2]] /= loss_scale
        products[4:] /= loss_scale**2
        *_, g_g, on_padding = products.tolist()
        total, called = tokens.sum(), tokens > 0
        load, scale = sums[0].sum(0) / total, self.experts / total
        explained, received = max(_fit(*products[:2]), _fit(*products[2:4]))
        of_step = _fit(scale * u @ load / loss_scale, scale**2 * load @ q @ load)
        self.received = received * self.forwards
        self.is_of_step = forwards > 1 and of_step[0] > explained + 1e-3 * g_g
        if self.is_of_step:
            explained, self.received = of_step[0], of_step[1] / self.ranks
        if not self.is_precise and from_aux:  # at the logits, much of it is lost in rounding
            self.received = from_aux / self.ranks
        if g_g:
            self.residual = max(0.0, 1 - explained / g_g) ** 0.5 if self.is_precise else 0.0
            self.on_padding = on_padding / g_g
        self.pooled = float(scale * (load * sums[1].sum(0)).sum())
        load_LE, prob_LE = sums[:, called] / tokens[called, None]
        names = [site.name for site, is_called in zip(self.sites, called) if is_called]
        self.layers = dict(zip(names, (self.experts * (load_LE * prob_LE).sum(-1)).tolist()))
        return self


def _fit(g_d: Tensor, d_d: Tensor) -> tuple[float, float]:
    """Projects g on d by ⟨g, d⟩ and ⟨d, d⟩. Returns how much of ⟨g, g⟩ that explains, and the coefficient."""
    return (float(g_d**2 / d_d), float(g_d / d_d)) if d_d > 0 else (0.0, 0.0)


def _loss_of(root: nn.Module) -> Callable[..., Any]:
    """Returns the family's own `load_balancing_loss_func` if it takes the usual arguments, otherwise Mixtral's."""
    own = getattr(sys.modules.get(type(root).__module__), "load_balancing_loss_func", load_balancing_loss_func)
    usual = inspect.signature(load_balancing_loss_func).parameters
    return own if list(inspect.signature(own).parameters) == list(usual) else load_balancing_loss_func
