"""
The state of φ-balancing: means, prices and selection biases of all routers, and how a step moves them.

Shapes: L routers, E experts of the widest one; a router with fewer experts leaves the rest at 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import STATISTICS, PhiBalanceConfig
from ..maths import centred_price, step_within
from ..methods import bias_step
from ..routers import RouterSite
from .adapters import active, find_layer
from .counts import Counts


logger = logging.get_logger(__name__)
NAME = "phi_balance"  # of the submodule of the backbone
LOGIT_WIDTH = 16.0  # span that is taken for that of scores which are no probabilities
PRICE, BIAS = len(STATISTICS), len(STATISTICS) + 1  # rows behind the means


class Duals(nn.Module):
    """
    The submodule `phi_balance` of a backbone, which holds nothing but tensors: two means m, prices q = ∇φ(E·m) and selection
    biases b, as one fp32 buffer `(4, L, E)`.

    A buffer goes where the backbone goes: to another device, into a copy, into an average of models. Only the bias enters a
    state dict, and only where there is one, because it belongs to what the model computes.

    Whatever steps have come, all is finite; each mean is a distribution over the experts of its router; and no bias is
    farther from the mean of its router's than the scores that it is added to can be from each other (1 for probabilities,
    [`LOGIT_WIDTH`] for logits), or than a checkpoint has brought it.

    Args:
        config (`PhiBalanceConfig`): potential, EMA rate, tracked statistics, step of the bias.
        sites (`Sequence[RouterSite]`): the routers.
        device (`torch.device`): of the buffer.
    """

    values: Tensor
    weight = None  # PEFT hands it on when it unloads an adapter

    def __init__(self, config: PhiBalanceConfig, sites: Sequence[RouterSite], device: torch.device) -> None:
        super().__init__()
        self.sites = list(sites)
        self.balancer: Any = None  # set by its owner
        self.begun = 0  # optimizer steps, ...
        self._skipped: Tensor | None = None  # () ... of which so many were skipped on the device
        self.adapter: str | None = None  # that the bias in force belongs to; None: the model itself
        self.by_adapter: dict[str | None, Tensor] = {}  # biases of the others, (L, E)
        self.has_bias = False
        self.register_buffer("values", self._initial(device), persistent=False)
        self.set_config(config)

    def set_config(self, config: PhiBalanceConfig) -> None:
        """Goes on with another configuration, from the same means and biases."""
        self.config, self.potential = config, config.build_potential()
        self.has_bias |= config.bias_coef > 0
        if self.begun:
            self._set_price()
        self.read_native()

    def _initial(self, device: torch.device) -> Tensor:
        sizes = [site.num_experts for site in self.sites]
        with torch.inference_mode(False):
            values = torch.zeros(BIAS + 1, len(sizes), max(sizes), dtype=torch.float32, device=device)
            for index, size in enumerate(sizes):
                values[:PRICE, index, :size] = 1 / size
        return values

    def _apply(self, fn: Any, recurse: bool = True) -> Duals:
        before = self.values
        super()._apply(fn, recurse)
        if before.is_meta and not self.values.is_meta:  # after `to_empty`
            self.values = self._initial(self.values.device)
        elif self.values.dtype != torch.float32:  # after `.to(torch.bfloat16)`, which would round it
            self.values = before.to(self.values.device)
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps that have moved the duals; reads the device if one may have been skipped there."""
        return self.begun if self._skipped is None else self.begun - int(self._skipped)

    @steps.setter
    def steps(self, number: int) -> None:
        self.begun, self._skipped = number, None

    # ------------------------------------------------------------------ rows

    @property
    def shape(self) -> tuple[int, int]:
        """L, E."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def price(self) -> Tensor:
        """Prices behind the gradient, `(L, E)`."""
        return self.values[PRICE]

    @property
    def biases(self) -> Tensor:
        """Selection biases in force, `(L, E)`."""
        return self.values[BIAS]

    def mean(self, statistic: str) -> Tensor:
        """EMA of `"probs"` or `"load"`, `(L, E)`."""
        return self.values[STATISTICS.index(statistic)]

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Stretches of routers with equally many experts: their rows, and E."""
        start = 0
        for experts, group in itertools.groupby(site.num_experts for site in self.sites):
            stop = start + len(list(group))
            yield slice(start, stop), experts
            start = stop

    # ------------------------------------------------------------------ one step

    @torch.no_grad()
    def update(self, counts: Counts, may_be_skipped: bool = False) -> None:
        """
        m <- (1 - η) m + η s; q = ∇φ(E·m), centred; b by the rule of the method, for φ b <- b - bias_coef · q
        (arXiv 2605.15403, Algorithm 1).

        Args:
            counts (`Counts`):
                Sums over the step's tokens, whose share is s. A router that saw no token stays; if any choice came from
                outside, the biases do; if anything is not finite, or any rank has skipped the step, all does.
            may_be_skipped (`bool`, *optional*, defaults to `False`): whether the host does not know that.
        """
        was_skipped = counts.skipped > 0
        moves = torch.isfinite(counts.flat).all() & ~was_skipped
        if may_be_skipped:
            self._skipped = was_skipped.long() if self._skipped is None else self._skipped + was_skipped
        total = counts.sums.sum(dim=-1, keepdim=True)  # (2, L, 1)
        means = self.values[:PRICE]
        means.lerp_(torch.where((total > 0) & moves, counts.sums / total, means), self.config.ema_rate)
        self._set_price()
        if self.config.bias_coef > 0:
            self.read_native()
            self._move_biases(counts, moves & (counts.replayed == 0))
            self.write_native()
        self.begun += 1

    def _set_price(self) -> None:
        for rows, experts in self.blocks():
            self.price[rows, :experts] = self._priced(self.config.track, rows, experts)

    def _priced(self, statistic: str, rows: slice, experts: int) -> Tensor:
        return centred_price(self.potential, self.mean(statistic)[rows, :experts])

    def _move_biases(self, counts: Counts, moves: Tensor) -> None:
        for rows, experts in self.blocks():
            bias_LE, load_LE = self.biases[rows, :experts], counts.load[rows, :experts]
            width_L1 = self._by_router([site.score_width or LOGIT_WIDTH for site in self.sites[rows]])
            step_LE = bias_step(
                self.config.rules.bias_rule,
                self.config.bias_coef,
                bias_LE,
                self._priced(self.config.bias_track, rows, experts),
                load_LE,
                counts.extra[rows, :experts],
                self._by_router([site.top_k for site in self.sites[rows]]),
                width_L1,
            )
            step_LE = self._held_where_masked(step_LE, counts.probs[rows, :experts], self.sites[rows])
            moved_LE = step_within(bias_LE, step_LE, width_L1.expand_as(bias_LE))
            bias_LE.copy_(torch.where(moves & (load_LE.sum(-1, keepdim=True) > 0), moved_LE, bias_LE))

    def _held_where_masked(self, step_LE: Tensor, probs_LE: Tensor, sites: Sequence[RouterSite]) -> Tensor:
        """
        `step_LE`, in which experts that no token could choose, having no probability, keep their place among the others. Only
        where the selection is the family's own: it adds the bias to their score of 0 too, and would choose them in the end.
        """
        if not any(site.has_native_bias for site in sites):
            return step_LE
        open_LE = probs_LE > 0
        mean_L1 = (step_LE * open_LE).sum(-1, keepdim=True) / open_LE.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(open_LE.all(-1, keepdim=True), step_LE, (step_LE - mean_L1) * open_LE)

    def _by_router(self, numbers: Sequence[float]) -> Tensor:
        return (
            torch.tensor(numbers, dtype=torch.float32).unsqueeze(-1).to(self.values.device, non_blocking=True)
        )  # (L, 1)

    # ------------------------------------------------------------------ a family's own bias

    @torch.no_grad()
    def read_native(self) -> None:
        """Takes over native biases that others have set; ours keep what rounding to a shorter type would lose."""
        for bias_E, site in self._native():
            native = site.read_native_bias()
            if native is not None:
                native = native.to(bias_E.device)
                bias_E.copy_(torch.where(bias_E.to(native.dtype) == native, bias_E, native.float()))

    @torch.no_grad()
    def write_native(self) -> None:
        """Writes the biases in force into the families' own, which are kept in fp32 while they move."""
        for bias_E, site in self._native():
            site.write_native_bias(bias_E, keep_fp32=self.config.bias_coef > 0)

    def keep_native_fp32(self) -> None:
        """A family's own bias that moves stays in fp32, also after `model.to(torch.bfloat16)`."""
        moves = self.config.bias_coef > 0
        if moves and any(
            getattr(owner, name).dtype != torch.float32
            for _, site in self._native()
            for owner, name in site.native_bias
        ):
            self.write_native()

    def _native(self) -> Iterator[tuple[Tensor, RouterSite]]:
        for index, site in enumerate(self.sites):
            if site.has_native_bias:
                yield self.biases[index, : site.num_experts], site

    # ------------------------------------------------------------------ adapters

    @torch.no_grad()
    def use_adapter(self, adapter: str | None) -> None:
        """Puts the bias of `adapter` in force; `None` for that of the model itself. A new one begins with the present bias."""
        if adapter == self.adapter:
            return
        self.read_native()
        self.by_adapter[self.adapter] = self.biases.clone()
        self.biases.copy_(self.by_adapter.pop(adapter, self.biases))
        self.adapter = adapter
        self.write_native()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> Duals:
        """PEFT is about to unload its adapters: with the one that is merged goes its bias, else the model's own comes back."""
        layer = find_layer(self.balancer.root)  # still there, since this module is the first in the backbone
        self.use_adapter(next(iter(adapter_names or ()), active(layer, even_disabled=True)) if merge else None)
        self.adapter, self.by_adapter = None, {}
        return self

    # ------------------------------------------------------------------ set from outside

    @torch.no_grad()
    def set_means(self, sums: Mapping[str, Tensor]) -> None:
        """Sets the means to the shares of `sums`, each `(L, E)`; a router without any keeps its mean."""
        for statistic in STATISTICS:
            total = sums[statistic].sum(-1, keepdim=True)
            share = sums[statistic] / total.clamp(min=1e-30)
            mean = self.mean(statistic)
            mean.copy_(torch.where(total > 0, share.to(mean), mean))
        self._set_price()

    @torch.no_grad()
    def set_biases(self, biases_LE: Tensor) -> None:
        """Sets the selection biases `(L, E)`, a family's own included."""
        self.biases.copy_(biases_LE)
        self.has_bias |= bool(biases_LE.any())
        self.write_native()

    @torch.no_grad()
    def reset(self) -> None:
        """As before the first step; a family's own bias stays as it is."""
        self.values.copy_(self._initial(self.values.device))
        self.steps, self.adapter, self.by_adapter = 0, None, {}
        self.read_native()

    # ------------------------------------------------------------------ with the weights

    @property
    def own_bias(self) -> bool:
        """Whether there is a selection bias that no tensor of the family holds."""
        return self.has_bias and not all(site.has_native_bias for site in self.sites)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.own_bias:
            destination[f"{prefix}bias"] = self.biases.detach().clone()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if bias is None:
            return
        if bias.shape != self.biases.shape:
            errors.append(f"{prefix}bias has shape {tuple(bias.shape)}, the routers need {tuple(self.biases.shape)}.")
            return
        with torch.no_grad():
            self.biases.copy_(bias)
        self.has_bias = True

    def forget_bias(self) -> None:
        """Weights without a selection bias have been loaded: what was loaded is what is there."""
        if self.own_bias:
            logger.warning_once("These weights hold no selection bias of φ-balancing: the one in force is set to 0.")
            for index, site in enumerate(self.sites):
                if not site.has_native_bias:
                    self.biases[index].zero_()
