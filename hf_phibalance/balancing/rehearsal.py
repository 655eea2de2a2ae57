"""An optimizer step that is tried out: forwards and backwards run as they will, and afterwards nothing has happened.

Nothing of a balancer is different after a rehearsal: duals, sums, the step that was announced, what it knows of its
routers. Weights, gradients and trainers are the business of whoever rehearses.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..routers import RouterReader, RouterSite, arguments_by_name, find_backbone, image_tokens, mask_of, reading
from .meter import Meter
from .step import OptimizerStep
from .tokens import count_mask


if TYPE_CHECKING:
    from .balancer import PhiBalancer
    from .meter import Meter


class RandomState:
    """The random number generators of this process, as they are when this is made."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._device: Any = None if accelerator is None else torch.get_device_module(accelerator)
        self._on_device = None if self._device is None else self._device.get_rng_state()

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._device is not None:
            self._device.set_rng_state(self._on_device)


@dataclass(frozen=True)
class Forward:
    """
    A training forward of the backbone, to be run again as it was: with the same arguments and random numbers.

    Args:
        backbone (`torch.nn.Module`): what was called.
        args (`tuple`), kwargs (`dict`): with what.
        mask (`torch.Tensor` of shape `(B, S)`): the tokens that count, by `token_mask`.
        masked (`bool`): whether it received an attention mask.
        labels (`torch.Tensor` of shape `(B, S)`, *optional*): that belong to it, where these tell which tokens count.
    """

    backbone: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    mask: Tensor
    masked: bool
    labels: Tensor | None
    _meter: Meter = field(repr=False)
    _random: RandomState = field(repr=False)
    _autocast: tuple[str, bool, torch.dtype] = field(repr=False)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type that autocast computes in, `None` without it."""
        return self._autocast[2] if self._autocast[1] else None

    def mask_of(self, site: RouterSite, routed: int) -> Tensor:
        """`mask` of the `routed` vectors that reach router `site`."""
        inputs = arguments_by_name(self.backbone, self.args, self.kwargs)
        return mask_of(site, self.mask.reshape(-1), image_tokens(inputs, [site]), routed)

    def run(self) -> None:
        """Runs it again; leaves the random numbers where they then are."""
        kind, enabled, dtype = self._autocast
        self._random.restore()
        with torch.autocast(kind, dtype=dtype, enabled=enabled), self._meter.labels_of(self.labels):
            self.backbone(*self.args, **self.kwargs)


@dataclass
class Routed:
    """What one router did in a forward that was watched: what it received, its logits, what it chose."""

    hidden: Tensor | None
    logits: Tensor
    selected: Tensor


class _Watcher(RouterReader):
    """Notes the first call of each router; later ones are recomputations."""

    is_idle = False
    is_measuring = True

    def __init__(self, root: nn.Module, sites: Sequence[RouterSite], meter: Meter) -> None:
        self.root, self.sites, self._meter = root, sites, meter
        self.found: dict[str, Routed] = {}
        self._hidden: Tensor | None = None  # of the router that is about to be observed

    def measure(self, index: int, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        self._hidden = hidden.detach()

    def choice_bias(self, index: int) -> Tensor | None:
        return self._meter.choice_bias(index)

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        hidden, self._hidden = self._hidden, None
        chosen = selected.detach().reshape(len(logits), -1)
        self.found.setdefault(self.sites[index].name, Routed(hidden, logits, chosen))
        return carrier


class Rehearsal:
    """
    Tries out optimizer steps of `balancer`, see [`PhiBalancer.rehearsal`]. To be used as a context.

    Args:
        balancer (`PhiBalancer`): of the model that is trained.
    """

    def __init__(self, balancer: PhiBalancer) -> None:
        self.balancer, self.sites = balancer, balancer.sites
        self._steps, self._duals, self._meter = balancer._steps, balancer._duals, balancer.meter
        self._backbone = find_backbone(balancer.root, self.sites)
        self._announced = self._steps.now
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._values: list[tuple[Any, dict[str, Any]]] = []

    def __enter__(self) -> Rehearsal:
        self._steps.move_to_model()
        steps, duals = self._steps, self._duals
        tensors = (steps.tally.flat, steps.last.flat, steps.last_price, duals.price, duals.toll)
        self._tensors = [(tensor, tensor.clone()) for tensor in tensors]
        self._announced = steps.now
        for owner, names in (
            (steps, ("now", "_checked")),
            (duals, ("has_bias",)),
            (self._meter, ("norms", "_latest", "softmax")),
            (self._meter.charging, ("rehearsed",)),
            *((site, ("charged", "softmax_carries", "score_width")) for site in self.sites),
        ):
            self._values.append((owner, {name: getattr(owner, name) for name in names}))
        return self

    def __exit__(self, *exception: object) -> None:
        for tensor, kept in self._tensors:
            tensor.copy_(kept)
        for owner, values in self._values:
            for name, value in values.items():
                setattr(owner, name, value)

    @property
    def announced_tokens(self) -> float | None:
        """Tokens that the step was announced with, over all ranks; `None` if it was announced by a number of forwards."""
        tokens = self._steps.now.tokens
        return None if tokens is None else float(tokens)

    def announce(self, loss_scale: float | None = None) -> None:
        """Opens the step anew as it was announced last, with another `loss_scale` than at first if one is given."""
        self._steps.tally.flat.zero_()
        self._steps.now = dataclasses.replace(
            self._steps.now,
            trained=False,
            deferred=[],
            weights_version=OptimizerStep.weights_version,
            loss_scale=self._announced.loss_scale if loss_scale is None else loss_scale,
        )

    def set_prices(self, prices: Mapping[str, Tensor] | None) -> None:
        """
        Prices q in force from now on, `(E,)` by layer name; `None` for none. They go the way of all prices where these are
        those of the previous step; else they stand for what the method makes of the batch at hand.
        """
        duals, config = self._duals, self.balancer.config
        for name, span in zip(duals.layout.names, duals.layout.spans):
            duals.price[span] = 0.0 if prices is None else prices[name].to(duals.price)
        torch.mul(duals.price, config.coef, out=duals.toll)
        own = config.price_from == "previous" and not config.rules.pooled
        self._meter.charging.rehearsed = None if own else duals.toll

    def loads(self) -> dict[str, float]:
        """Choices that this rank has counted since the step was opened, by layer name."""
        return {
            name: float(self._steps.tally.load[span].sum())
            for name, span in zip(self._duals.layout.names, self._duals.layout.spans)
        }

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` summed over those who share the step, in place."""
        self._steps.ranks.sum_(values)
        return values

    @contextmanager
    def recording(self) -> Iterator[list[Forward]]:
        """Notes the training forwards that run meanwhile."""
        forwards: list[Forward] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = {**arguments_by_name(module, args, kwargs), "labels": self._meter._labels}
            mask = count_mask(inputs, self.balancer.config.token_mask)
            if not module.training or not torch.is_grad_enabled() or mask is None:
                return
            kind = mask.device.type
            autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            masked = inputs.get("attention_mask") is not None
            called = module, _detached(args), _detached(kwargs)
            forwards.append(Forward(*called, mask, masked, self._meter._labels, self._meter, RandomState(), autocast))

        handle = self._backbone.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield forwards
        finally:
            handle.remove()

    @contextmanager
    def watching(self) -> Iterator[dict[str, Routed]]:
        """Notes what the routers do meanwhile, by layer name, with the autograd graph of their logits."""
        watcher = _Watcher(self.balancer.root, self.sites, self._meter)
        with reading(watcher):
            yield watcher.found

    def drop_bias(self) -> None:
        """Leaves out, until the rehearsal ends, the selection biases that are ours: as a plain load does."""
        self._duals.has_bias = False


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(entry) for entry in value)
    return {name: _detached(entry) for name, entry in value.items()} if type(value) is dict else value
