"""
The state of φ-balancing: means, prices and selection biases of all routers, and how a step moves them.

Shapes: L routers, E experts of the widest one; a router with fewer experts leaves the rest at 0.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import STATISTICS, PhiBalanceConfig
from ..maths import bias_step, centred_price, step_within
from ..routers import RouterSite
from .counts import Counts
from .process import wrap_imported


logger = logging.get_logger(__name__)
NAME = "phi_balance"  # of the submodule of the backbone
LOGIT_WIDTH = 16.0  # assumed span of scores that are logits
PRICE, BIAS = len(STATISTICS), len(STATISTICS) + 1  # rows after those of the means


class Duals(nn.Module):
    """
    The submodule `phi_balance` of a backbone. Holds two means m, prices q = ∇φ(E·m) and selection biases b in one fp32 buffer
    `(4, L, E)`. The buffer follows the backbone to another device, into a copy or into an average of models. The state dict has
    only the bias, if there is one, because the bias changes what the model computes.

    After any steps all values are finite, and each mean is a distribution over the experts of its router. No step moves a bias
    farther from its router's mean bias than the span of the scores it is added to: 1 for probabilities, [`LOGIT_WIDTH`] for
    logits. Only a checkpoint can bring a larger one.
    """

    values: Tensor
    weight = None  # PEFT hands it on when it unloads an adapter

    def __init__(self, config: PhiBalanceConfig, sites: Sequence[RouterSite], device: torch.device) -> None:
        super().__init__()
        self.sites = list(sites)
        self.balancer: Any = None  # set by its owner
        self.begun = 0  # optimizer steps, skipped ones included
        self._skipped: Tensor | None = None  # () number of steps skipped on the device
        self.adapter: str | None = None  # the bias in force belongs to it; None: to the model itself
        self.by_adapter: dict[str | None, Tensor] = {}  # biases of the other adapters, (L, E)
        self.has_bias = False
        self.register_buffer("values", self._initial(device), persistent=False)
        self.set_config(config)

    def set_config(self, config: PhiBalanceConfig) -> None:
        """Changes the configuration; means and biases stay."""
        self.config, self.potential = config, config.build_potential()
        self.has_bias |= config.bias_coef > 0
        if self.begun:
            self.set_price()
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
        elif self.values is not before:  # rounded by `.to(torch.bfloat16)`, or left empty by `to_empty`
            self.values = before.to(self.values.device)
        return self

    # ------------------------------------------------------------------ what it holds

    @property
    def steps(self) -> int:
        """Optimizer steps that have moved the duals. Reads the device if a step may have been skipped there."""
        return self.begun if self._skipped is None else self.begun - int(self._skipped)

    @steps.setter
    def steps(self, number: int) -> None:
        self.begun, self._skipped = number, None

    @property
    def shape(self) -> tuple[int, int]:
        """L, E."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def price(self) -> Tensor:
        """Prices of the gradient, `(L, E)`."""
        return self.values[PRICE]

    @property
    def biases(self) -> Tensor:
        """Selection biases in force, `(L, E)`."""
        return self.values[BIAS]

    def mean(self, statistic: str) -> Tensor:
        """EMA of `"probs"` or `"load"`, `(L, E)`."""
        return self.values[STATISTICS.index(statistic)]

    @property
    def own_bias(self) -> bool:
        """Whether there is a selection bias outside the family's own tensors."""
        return self.has_bias and not all(site.has_native_bias for site in self.sites)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Yields runs of neighbouring routers with the same number of experts: their rows, and E."""
        start = 0
        for experts, group in itertools.groupby(site.num_experts for site in self.sites):
            stop = start + len(list(group))
            yield slice(start, stop), experts
            start = stop

    # ------------------------------------------------------------------ how it moves

    @torch.no_grad()
    def update(self, counts: Counts, may_be_skipped: bool = False) -> None:
        """
        Moves the duals by one step: m <- (1 - η) m + η s, where s is each expert's share of the counts; q = ∇φ(E·m), centred; b by
        the rule of the method, for φ b <- b - bias_coef · q (arXiv 2605.15403, Algorithm 1).

        A router without tokens stays. Biases stay if any selection came from outside. Everything stays if a sum is not finite or a
        rank has skipped the step. `may_be_skipped`: whether only the device knows if it has.
        """
        was_skipped = counts.skipped > 0
        moves = torch.isfinite(counts.flat).all() & ~was_skipped
        if may_be_skipped:
            self._skipped = was_skipped.long() if self._skipped is None else self._skipped + was_skipped
        total = counts.sums.sum(dim=-1, keepdim=True)  # (2, L, 1)
        means = self.values[:PRICE]
        means.lerp_(torch.where((total > 0) & moves, counts.sums / total, means), self.config.ema_rate)
        self.set_price()
        if self.config.bias_coef > 0:
            self.read_native()
            self._move_biases(counts, moves & (counts.replayed == 0))
            self.write_native()
        self.begun += 1

    def set_price(self) -> None:
        """Computes the prices from the means."""
        for rows, experts in self.blocks():
            self.price[rows, :experts] = self._priced(self.config.track, rows, experts)

    def _priced(self, statistic: str, rows: slice, experts: int) -> Tensor:
        return centred_price(self.potential, self.mean(statistic)[rows, :experts])

    def _move_biases(self, counts: Counts, moves: Tensor) -> None:
        for rows, experts in self.blocks():
            bias_LE, load_LE = self.biases[rows, :experts], counts.load[rows, :experts]
            width_L1 = self._column([site.score_width or LOGIT_WIDTH for site in self.sites[rows]])
            step_LE = bias_step(
                self.config.rules.bias_rule,
                self.config.bias_coef,
                bias_LE,
                self._priced(self.config.bias_track, rows, experts),
                load_LE,
                counts.extra[rows, :experts],
                self._column([site.top_k for site in self.sites[rows]]),
                width_L1,
            )
            if any(site.has_native_bias for site in self.sites[rows]):
                # A family adds its own bias to a score of 0 too, and would choose such experts in the end. So experts of
                # probability 0, which are masked, get no step, and that of the others is centred over them.
                open_LE = counts.probs[rows, :experts] > 0
                mean_L1 = (step_LE * open_LE).sum(-1, keepdim=True) / open_LE.sum(-1, keepdim=True).clamp(min=1)
                step_LE = torch.where(open_LE.all(-1, keepdim=True), step_LE, (step_LE - mean_L1) * open_LE)
            moved_LE = step_within(bias_LE, step_LE, width_L1.expand_as(bias_LE))
            bias_LE.copy_(torch.where(moves & (load_LE.sum(-1, keepdim=True) > 0), moved_LE, bias_LE))

    def _column(self, numbers: Sequence[float]) -> Tensor:
        """Returns `numbers` as a tensor `(L, 1)`."""
        return torch.tensor(numbers, dtype=torch.float32).unsqueeze(-1).to(self.values.device, non_blocking=True)

    @torch.no_grad()
    def set_means(self, sums: Tensor) -> None:
        """Sets the means to the shares of `sums (2, L, E)`, those of [`Counts`]. A router with sum 0 keeps its mean."""
        total, means = sums.sum(-1, keepdim=True), self.values[:PRICE]
        means.copy_(torch.where(total > 0, sums / total, means))
        self.set_price()

    @torch.no_grad()
    def set_biases(self, biases_LE: Tensor) -> None:
        """Sets the selection biases `(L, E)`, a family's own included."""
        self.biases.copy_(biases_LE)
        self.has_bias |= bool(biases_LE.any())
        self.write_native()

    @torch.no_grad()
    def reset(self) -> None:
        """Resets everything to before the first step. A family's own bias stays as it is."""
        self.values.copy_(self._initial(self.values.device))
        self.steps, self.adapter, self.by_adapter = 0, None, {}
        self.has_bias = self.config.bias_coef > 0
        self.read_native()

    # ------------------------------------------------------------------ a family's own selection bias

    @torch.no_grad()
    def read_native(self) -> None:
        """Reads the families' own biases, which others may have set. Our fp32 value stays where it rounds to the same number."""
        for bias_E, site in self._native():
            native = site.read_native_bias()
            if native is not None:
                native = native.to(bias_E.device)
                bias_E.copy_(torch.where(bias_E.to(native.dtype) == native, bias_E, native.float()))

    @torch.no_grad()
    def write_native(self) -> None:
        """Writes the biases in force into the families' own tensors, which are kept in fp32 while they move."""
        for bias_E, site in self._native():
            site.write_native_bias(bias_E, keep_fp32=self.config.bias_coef > 0)

    def keep_native_fp32(self) -> None:
        """Keeps a family's own bias that moves in fp32, also after `model.to(torch.bfloat16)`."""
        tensors = (getattr(owner, name) for _, site in self._native() for owner, name in site.native_bias)
        if self.config.bias_coef > 0 and any(tensor.dtype != torch.float32 for tensor in tensors):
            self.write_native()

    def _native(self) -> Iterator[tuple[Tensor, RouterSite]]:
        for index, site in enumerate(self.sites):
            if site.has_native_bias:
                yield self.biases[index, : site.num_experts], site

    # ------------------------------------------------------------------ PEFT adapters, each with the bias it was trained with

    @torch.no_grad()
    def use_adapter(self, adapter: str | None) -> None:
        """Puts the bias of `adapter` (`None`: of the model itself) in force. A new adapter begins with the present bias."""
        if adapter == self.adapter:
            return
        self.read_native()
        self.by_adapter[self.adapter] = self.biases.clone()
        self.biases.copy_(self.by_adapter.pop(adapter, self.biases))
        self.adapter = adapter
        self.write_native()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> Duals:
        """Called by PEFT before it unloads its adapters. Keeps the bias of a merged adapter, else restores the model's own."""
        backbone = self.balancer.backbone
        if backbone is None:
            raise RuntimeError(
                "this φ-balanced model was unpickled and has not been used since. Call phb.get_balancer(model) before its adapter is "
                "merged or unloaded."
            )
        self.balancer.bind(backbone)  # a copy may not have been used yet
        layer = find_adapter_layer(backbone)  # still there, since this module is the first in the backbone
        self.use_adapter(next(iter(adapter_names or ()), active_adapter(layer, even_disabled=True)) if merge else None)
        self.adapter, self.by_adapter = None, {}
        return self

    # ------------------------------------------------------------------ weights with our bias among them

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.own_bias:
            destination[f"{prefix}bias"] = self.biases.detach().clone()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if bias is not None and bias.shape != self.biases.shape:
            errors.append(f"{prefix}bias has shape {tuple(bias.shape)}, the routers need {tuple(self.biases.shape)}.")
        elif bias is not None:
            with torch.no_grad():
                self.biases.copy_(bias)
            self.has_bias = True

    def forget_bias(self) -> None:
        """Sets our selection bias to 0, after weights without one have been loaded."""
        if self.own_bias:
            logger.warning_once("These weights hold no selection bias of φ-balancing: the one in force is set to 0.")
            for index, site in enumerate(self.sites):
                if not site.has_native_bias:
                    self.biases[index].zero_()


def find_adapter_layer(module: nn.Module) -> weakref.ref[nn.Module] | None:
    """Returns the first PEFT layer in `module`, for [`active_adapter`]; `None` if there is none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return None
    wrap_imported()  # PEFT may have been imported since
    return next((weakref.ref(layer) for layer in module.modules() if isinstance(layer, tuners.BaseTunerLayer)), None)


def active_adapter(layer: weakref.ref[nn.Module] | None, even_disabled: bool = False) -> str | None:
    """Returns the adapter that is switched on in the PEFT `layer`; `None` if there is none, or if it is disabled."""
    found: Any = None if layer is None else layer()
    if found is None or (found.disable_adapters and not even_disabled):
        return None
    return next(iter(found.active_adapters), None)
