"""One optimizer step of φ-balancing: counting and charging the tokens of its forwards, then moving the duals.

Data flows one way: routers -> statistics (`observe`) -> duals (`step`) -> price gradient (`observe` again) -> metrics.
Shapes: E experts, T tokens of a micro-batch, k experts per token.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..maths.metrics import model_metrics
from ..maths.pricing import SCORINGS, ChargePrices, ChargeProbs, routing_probs, sequence_price
from ..maths.quantile import BINS, margin_histogram
from ..routers.discovery import RouterSite, find_routers
from ..routers.inside import Softmax
from .duals import Duals
from .learning import LINEAR, LearningReport, describe_router, gradient_norms
from .tally import Tally, add_load, add_probs
from .tokens import OptimizerStep, Tokens, count_mask


logger = logging.get_logger(__name__)
CACHES = ("cache", "past_key_values")  # the argument in which a model takes its cache
LOGIT_WIDTH = 16.0  # span that is resolved of scores that are no probabilities, by quantile balancing


class PhiBalancer:
    """
    Prices, means and biases of all routers of a model; made by [`patch`], found by [`get_balancer`].

    A raw training loop brackets each optimizer step:

    ```python
    balancer = phb.get_balancer(model)
    for micro_batches in steps:
        balancer.begin_step(micro_batches)      # so that each token's share of the step is known
        for batch in micro_batches:
            model(**batch).loss.backward()
        optimizer.step(); optimizer.zero_grad()
        balancer.step()                         # statistics -> means -> prices and biases
    ```

    A step of one micro-batch in one process needs no `begin_step`.
    """

    def __init__(self, root: nn.Module, config: PhiBalanceConfig, sites: Sequence[RouterSite]) -> None:
        self.root = root
        self.config = config
        self.sites = list(sites)
        self.process_group: dist.ProcessGroup | None = None
        self._duals = Duals(config, self.sites)
        self._spans = self._duals.layout.spans
        sizes = self._duals.layout.sizes
        self._tally = Tally(sizes, BINS if config.rules.bias_rule == "quantile" else 0)
        self._last = Tally(sizes)  # of the last step, over all ranks
        self._eval_tally: Tally | None = None
        self._bad_steps = torch.zeros(())
        self._checked = False
        self._charged_price = torch.zeros(self._duals.layout.total)  # the prices of the last step
        self._forwarding = False
        self._tokens: Tokens | None = None  # of the forward under way
        self._latest: Tokens | None = None  # of the latest training forward, which its backward may run again
        self._labels: Tensor | None = None
        self._before_forward: Tensor | None = None  # the tally when the forward under way began, where needed
        self._norms: dict[int, Tensor] | None = None  # of the balancing gradient, once there are prices
        self._measuring = False
        self.softmax: Softmax | None = None  # noted in the router that is about to be observed
        self._step = OptimizerStep()

    # ------------------------------------------------------------------ what users read

    @property
    def layer_names(self) -> list[str]:
        """Names of the routers, as in `model.named_modules()` of the unwrapped model."""
        return list(self._duals.layout.names)

    @property
    def steps(self) -> int:
        """Optimizer steps that have moved the duals."""
        return self._duals.steps

    @property
    def has_bias(self) -> bool:
        """Whether a selection bias is in force."""
        return self._duals.has_bias

    def means(self, statistic: str | None = None) -> dict[str, Tensor]:
        """
        EMA m of the routing distribution by layer name, each `(E,)` fp32.

        Args:
            statistic (`str`, *optional*): `"probs"` or `"load"`, as far as kept; `config.track` unless said.
        """
        statistic = statistic or self.config.track
        if statistic not in self._duals.means:
            raise ValueError(
                f"`statistic` must be one of {sorted(self._duals.means)}, which are kept, got {statistic!r}."
            )
        return self._duals.layout.by_layer(self._duals.means[statistic])

    def prices(self) -> dict[str, Tensor]:
        """Centred dual prices q behind the gradient by layer name, each `(E,)` fp32."""
        return self._duals.layout.by_layer(self._duals.price)

    def biases(self) -> dict[str, Tensor]:
        """Selection biases b by layer name, each `(E,)` fp32."""
        self._duals.read_native_biases()
        return self._duals.layout.by_layer(self._duals.bias)

    def loads(self) -> dict[str, Tensor]:
        """Top-k assignments per expert in the last step, over all ranks, by layer name, each `(E,)` fp32."""
        return self._duals.layout.by_layer(self._last.load)

    def metrics(self, per_layer: int = 16) -> dict[str, float]:
        """
        Balance of the last optimizer step as plain numbers; reads them off the device, so call it when logging.

        Args:
            per_layer (`int`, *optional*, defaults to `16`): At most so many layers, evenly spaced, are shown on their own.
        """
        values = self._load_metrics(self._last, per_layer)
        values["price_range"] = max(float(price.max() - price.min()) for price in self.prices().values())
        if self.has_bias:
            values["bias_range"] = max(float(bias.max() - bias.min()) for bias in self.biases().values())
        if self.config.coef > 0:
            values["balance_loss"] = float(self._balance_loss())
        return values

    def _balance_loss(self) -> Tensor:
        """Value of the price gradient's term in the last step."""
        if self.config.price_from == "previous":
            return self._duals.charged(self._last.probs, self._charged_price)
        return self._last.paid / self._last.tokens.clamp(min=1)

    def learning_report(self) -> LearningReport:
        """
        Whether each router learns, and how much balancing gradient reaches what. The norms are those of the first
        training forward that had prices, so of the second optimizer step; reads them off the device.
        """
        rows = [describe_router(site.name, self.root) for site in self.sites]
        for index, norms in (self._norms or {}).items():
            at_logits, at_weight, at_input, error = norms.tolist()
            is_linear = error < LINEAR
            rows[index] = dataclasses.replace(
                rows[index],
                at_logits=at_logits,
                at_weight=at_weight if is_linear else None,
                at_input=at_input if is_linear else None,
            )
        return LearningReport(self.config.coef, rows)

    def _load_metrics(self, tally: Tally, per_layer: int) -> dict[str, float]:
        loads = self._duals.layout.by_layer(tally.load.cpu())
        tokens = float(tally.tokens)
        values = model_metrics(loads, [site.top_k for site in self.sites], max(tokens, 1.0), per_layer)
        return {**values, "tokens": tokens}

    # ------------------------------------------------------------------ one optimizer step

    def begin_step(self, micro_batches: Sequence[Mapping[str, Any]] | int, loss_scale: float | Tensor = 1.0) -> None:
        """
        Opens an optimizer step. Every data-parallel rank must call it.

        Args:
            micro_batches (`Sequence[Mapping]` or `int`):
                This rank's batches of the step, as they will be passed to the model: their tokens are counted, which
                makes the step exactly invariant to the split. A number instead says only how many there will be; each
                is then charged its own mean divided by that number.
            loss_scale (`float` or `torch.Tensor`, *optional*, defaults to `1.0`):
                What gradients are divided by before the optimizer sees them, i.e. the scale of a `GradScaler`.

        Raises:
            RuntimeError: if the previous step was trained on but never closed with `step()`.
            ValueError: if there is no micro-batch.
        """
        if self._step.announced and self._step.trained:
            raise RuntimeError(
                "begin_step() was called twice without step() in between, so the prices would never move. Call "
                "balancer.step() after optimizer.step(), or let phb.attach(trainer) do both. After a step that was "
                "given up (an error, a skipped batch), call balancer.discard_step()."
            )
        count = micro_batches if isinstance(micro_batches, int) else len(micro_batches)
        if count < 1:
            raise ValueError(f"`micro_batches` must hold at least one micro-batch, got {micro_batches!r}.")
        self.discard_step()
        self._step = OptimizerStep(announced=True, micro_batches=count, loss_scale=loss_scale)
        if isinstance(micro_batches, int):
            return
        masks = [mask for batch in micro_batches if (mask := count_mask(batch, self.config.token_mask)) is not None]
        if len(masks) < count:
            logger.warning_once(
                f"The micro-batches do not hold what token_mask={self.config.token_mask!r} needs; each will be "
                "charged its own mean instead of its exact share of the step's tokens."
            )
            return
        device = self._move_to_model()
        total = torch.stack([mask.sum().to(device) for mask in masks]).sum().float()
        if self._world_size > 1:
            dist.all_reduce(total, group=self.process_group)
        self._step.tokens = total

    def step(self) -> None:
        """
        Closes an optimizer step: reduces its statistics over the ranks, moves means, prices and biases. Every
        data-parallel rank must call it, once, after `optimizer.step()`.

        Raises:
            RuntimeError: if no training forward has run since the last step.
            ValueError: at the first step, if a router was never called or the price gradient reaches nothing.
        """
        if not self._step.trained:
            raise RuntimeError("step() was called before any training forward of the patched model.")
        tally = self._tally
        if self._world_size > 1:
            dist.all_reduce(tally.flat, group=self.process_group)
        if not self._checked:
            self.find_copies()
            self._check_first_step(tally)
        self._last.flat.copy_(tally.flat[: len(self._last.flat)])
        finite = torch.isfinite(tally.flat).all()
        self._bad_steps += ~finite
        if self.config.coef > 0:
            self._charged_price.copy_(self._duals.price)
        self._duals.update(tally, finite)
        tally.flat.zero_()
        self._step = OptimizerStep()

    def discard_step(self) -> None:
        """Forgets what has been counted since the last step: of a skipped optimizer step, or of an interrupted run."""
        self._tally.flat.zero_()
        self._step = OptimizerStep()

    def check_finite(self) -> None:
        """Warns once if steps had non-finite statistics, which were left out; reads the device."""
        bad = int(self._bad_steps)
        if bad:
            logger.warning_once(
                f"The routing statistics of {bad} step(s) were not finite (the loss or the router logits diverged); "
                "they were left out of the means and prices. Lower the learning rate or check the data."
            )

    # ------------------------------------------------------------------ called by the hooks

    @property
    def is_idle(self) -> bool:
        """Whether the routers run outside training and evaluation, so that there is nothing to do."""
        return self._current is None

    @property
    def _current(self) -> Tokens | None:
        # what is only written between forwards, and never read, costs torch.compile no guard and no recompilation
        return self._tokens if self._forwarding else self._latest

    @property
    def is_open(self) -> bool:
        """Whether `begin_step` has announced the step under way."""
        return self._step.announced

    @property
    def is_evaluating(self) -> bool:
        """Whether an [`~PhiBalancer.evaluation`] is open."""
        return self._eval_tally is not None

    @contextmanager
    def labels_of(self, labels: Tensor | None) -> Iterator[None]:
        """While open, forwards of the backbone belong to these `labels (B, S)`."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def open_forward(self, inputs: Mapping[str, Any], training: bool) -> None:
        """A forward of the backbone starts: decides who counts and who pays. `inputs` by argument name."""
        self._forwarding, self._tokens = True, None
        training = training and torch.is_grad_enabled()
        cached = any(inputs.get(name) is not None for name in CACHES)
        evaluating = self._eval_tally is not None and not training and not cached
        if not (training or evaluating):
            return
        if self.config.token_mask == "labels":
            inputs = {**inputs, "labels": self._labels}
        mask_BS = count_mask(inputs, self.config.token_mask)
        if mask_BS is None and evaluating:
            return  # a second forward of the same batch, for its logits only
        if mask_BS is None:
            raise ValueError(
                f"token_mask={self.config.token_mask!r}, but this forward received no "
                f"{'labels' if self.config.token_mask == 'labels' else 'input_ids or inputs_embeds'}. Pass them to the "
                "model, or set another token_mask in PhiBalanceConfig."
            )
        mask = mask_BS.reshape(-1).to(self._move_to_model(), torch.float32)
        if evaluating and self._eval_tally is not None:
            self._eval_tally.tokens.add_(mask.sum())
            self._tokens = Tokens(mask, mask, trains=False)
            return
        if not self._step.announced:
            self._open_implicitly()
        self._step.trained = True
        self._tally.tokens.add_(mask.sum())
        self._tokens = Tokens(mask, self._rate(mask), len(mask_BS))
        if self.config.rules.pooled:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"method={self.config.method!r} prices a layer by those after it, which torch.compile cannot "
                    "follow. Train without it, or use method='switch'."
                )
            self._tokens.toll = torch.zeros_like(self._duals.toll)
            self._before_forward = self._tally.flat.clone()
        if not torch.compiler.is_compiling() and self._norms is None and self.config.coef > 0 and self.steps > 0:
            self._norms, self._measuring = {}, True

    def close_forward(self) -> None:
        """The forward of the backbone has ended, also by an exception."""
        if not torch.compiler.is_compiling():
            self._measuring = False
        if self._tokens is not None and self._tokens.trains:
            if self._tokens.toll is not None:
                self._set_pooled_toll(self._tokens.toll)
            self._tokens.in_forward = False
            self._latest = self._tokens
        self._forwarding, self._tokens = False, None

    @torch.no_grad()
    def _set_pooled_toll(self, toll: Tensor) -> None:
        """Fills in what the forward that has just ended charges, before its backward."""
        now = copy.copy(self._tally)
        now.flat = now.flat.clone() if self._before_forward is None else now.flat - self._before_forward
        toll.copy_(self._duals.pooled_toll(now.load))
        self._tally.paid.add_((now.probs * toll).sum())

    def _open_implicitly(self) -> None:
        """A training forward without `begin_step`: fine for a step of one micro-batch in one process."""
        probe = next((p for p in self.root.parameters() if p.requires_grad), None)
        if self._step.trained and self.config.is_on and probe is not None:
            remedy = "phb.attach(trainer) or PhiBalanceCallback does that inside a Trainer."
            if probe._version != self._step.weights_version:
                raise RuntimeError(
                    "The optimizer has stepped without balancer.step() after it, so the prices would never move. Call "
                    f"phb.get_balancer(model).step() after optimizer.step(); {remedy}"
                )
            if probe.grad is not None:
                raise RuntimeError(
                    "A second training forward on top of unused gradients, without balancer.begin_step(micro_batches): "
                    "each token's share of the optimizer step is unknown. Call begin_step with all micro-batches of "
                    f"the step before the first one; {remedy}"
                )
        if self._step.trained:
            self.discard_step()  # nothing came of the earlier forward
        if self._world_size > 1 and self.config.charges:
            raise RuntimeError(
                f"{self._world_size} data-parallel ranks need balancer.begin_step(micro_batches) on every rank before "
                "the first forward of an optimizer step; phb.attach(trainer) does that inside a Trainer."
            )
        self._step.weights_version = -1 if probe is None else probe._version

    def _rate(self, mask: Tensor) -> Tensor:
        """Weight of each token, so that the optimizer receives 1/N of its gradient whatever happens in between."""
        if self._step.tokens is not None:
            # gradients are averaged over the ranks afterwards
            per_token = self._world_size / self._step.tokens.clamp(min=1)
        else:
            per_token = 1 / (self._step.micro_batches * mask.sum().clamp(min=1))
        return mask * (per_token * self._step.loss_scale)

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """
        Counts what router `index` did and charges it; returns `carrier`, through which the charge will be paid.

        Args:
            logits (`torch.Tensor` of shape `(T, E)`), selected (`torch.Tensor` of shape `(..., k)`),
            carrier (`torch.Tensor`): any differentiable output of the router.
        """
        tokens, softmax = self._current, self._take_softmax(logits)
        if tokens is None:
            return carrier
        site = self.sites[index]
        if not tokens.in_forward:
            if not tokens.deferred:
                return self._replay(index, logits, softmax, carrier)
            self._check_recomputed(tokens)
        if logits.shape != (tokens.mask.numel(), site.num_experts):
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)} where the token mask and the "
                f"patch expect {(tokens.mask.numel(), site.num_experts)}; this model routes something else than its "
                "(batch x sequence) tokens. Patching after changing the number of experts may help."
            )
        pays = self.config.charges and tokens.trains
        probs = None
        with torch.no_grad():
            if pays or (tokens.trains and "probs" in self.config.statistics):
                probs = routing_probs(logits, site.scoring) if softmax is None else softmax.probs.detach()
            if tokens.in_forward:
                self._count(index, logits, probs, selected, tokens)
        if not pays:
            return carrier
        if not torch.is_grad_enabled():
            if not tokens.deferred:
                tokens.deferred = True
                self._step.deferred.append(tokens)
            return carrier
        if not logits.requires_grad:
            return carrier
        site.charged = True
        price = self._toll(index, probs, selected, tokens).to(logits.device)
        rate = tokens.rate.to(logits.device)
        if softmax is not None and self._carries(site, softmax, carrier):
            softmax.probs.register_hook(ChargeProbs(price, rate))
            return carrier
        return self._charge(site, carrier, logits, probs, price, rate, tokens)

    def wants_softmax(self, index: int) -> bool:
        """Whether to note the softmax of router `index`, so that it need not be computed again."""
        tokens = None if torch.compiler.is_compiling() else self._current
        return tokens is not None and tokens.trains and self.sites[index].scoring == "softmax"

    def _take_softmax(self, logits: Tensor) -> Softmax | None:
        """The softmax that the router at hand took of its `logits`, in full precision, if it did."""
        if torch.compiler.is_compiling():
            return None
        softmax, self.softmax = self.softmax, None
        usable = softmax is not None and softmax.is_of(logits) and softmax.probs.element_size() >= 4
        return softmax if usable else None

    def _carries(self, site: RouterSite, softmax: Softmax, carrier: Tensor) -> bool:
        """Whether the softmax of `site` can be charged itself: the task gradient comes by, and only prices are due."""
        if self.config.z_loss_coef > 0 or self.config.sequence_coef > 0:
            return False
        if site.softmax_carries is None:
            site.softmax_carries = softmax.leads_to(carrier)
        return site.softmax_carries

    def _charge(
        self,
        site: RouterSite,
        carrier: Tensor,
        logits: Tensor,
        probs: Tensor | None,
        price: Tensor,
        rate: Tensor,
        tokens: Tokens | None = None,
    ) -> Tensor:
        sequence = None
        if tokens is not None and self.config.sequence_coef > 0:
            mask_BS = tokens.mask.to(logits.device).view(tokens.batch_size, -1)
            with torch.no_grad():
                sequence = sequence_price(logits, site.scoring, site.top_k, mask_BS) * self.config.sequence_coef
        return ChargePrices.apply(carrier, logits, probs, price, sequence, rate, site.scoring, self.config.z_loss_coef)

    def _toll(self, index: int, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> Tensor:
        """coef · q, `(E,)`, that router `index` charges the tokens at hand."""
        if tokens.toll is not None:
            return tokens.toll[self._spans[index]]
        if self.config.price_from == "previous" or self.config.coef == 0:
            return self._duals.toll[self._spans[index]]
        with torch.no_grad():
            return self._toll_now(index, probs, selected, tokens)

    def _toll_now(self, index: int, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> Tensor:
        """The same where the price is not that of the previous step; notes what is paid."""
        now = Tally([self.sites[index].num_experts])
        now.flat = now.flat.to(selected.device)
        self._add(now, 0, probs, selected, tokens)
        tracked_E = getattr(now, self.config.track)
        if self.config.price_from == "global":
            own = self._tally.probs_of if self.config.track == "probs" else self._tally.load_of
            tracked_E = own(index).to(tracked_E.device, copy=True)
            if self._world_size > 1:
                dist.all_reduce(tracked_E, group=self.process_group)
        toll = self._duals.current_toll(index, tracked_E)
        self._tally.paid.add_((now.probs * toll).sum().to(self._tally.flat.device))
        return toll

    def _count(self, index: int, logits: Tensor, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> None:
        tally = self._tally if tokens.trains else self._eval_tally
        assert tally is not None
        self._add(tally, index, probs, selected, tokens)
        site = self.sites[index]
        if self.needs_scores and site.native_bias:
            ranks_logits = site.kind.traits.biases == "logits"
            self.observe_scores(index, logits if ranks_logits else SCORINGS[site.scoring].score(logits.float()))

    @staticmethod
    def _add(tally: Tally, index: int, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> None:
        chosen = selected.reshape(-1)
        add_load(tally.load_of(index), chosen, tokens.weights(chosen).to(chosen.device))
        if probs is not None:
            add_probs(tally.probs_of(index), probs, tokens.mask.to(probs.device))

    @property
    def needs_scores(self) -> bool:
        """Whether the method wants to see the scores that the routers rank."""
        return self._tally.bins > 0

    @torch.no_grad()
    def observe_scores(self, index: int, scores: Tensor) -> None:
        """Notes what router `index` ranks, `scores (T, E)` without the bias, where the method needs it."""
        tokens = self._current
        if not self.needs_scores or tokens is None or not (tokens.in_forward and tokens.trains):
            return
        site, scores = self.sites[index], scores.detach().reshape(tokens.mask.numel(), -1).float()
        if site.score_width is None:  # once, so the one read of the device does not matter
            site.score_width = 1.0 if bool(((scores >= 0) & (scores <= 1)).all()) else LOGIT_WIDTH
        bias_E = self._duals.bias[self._spans[index]].to(scores.device)
        mask = tokens.mask.to(scores.device)
        histogram = margin_histogram(scores, bias_E, site.top_k, mask, site.score_width)
        self._tally.margins_of(index).add_(histogram.to(self._tally.flat.device))

    @property
    def is_measuring(self) -> bool:
        """Whether this forward is the one whose balancing gradient [`~PhiBalancer.learning_report`] shows."""
        return not torch.compiler.is_compiling() and self._measuring

    @torch.no_grad()
    def measure(self, index: int, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        """Notes the norms of the balancing gradient of router `index`, called as `module(hidden, ...)`."""
        if self._tokens is None or self._norms is None:
            return
        mask = self._tokens.mask.to(logits.device)
        rate = mask / mask.sum().clamp(min=1)
        price = self._duals.toll[self._spans[index]].to(logits.device)
        self._norms[index] = gradient_norms(hidden, module, logits, price, rate, self.sites[index].scoring)

    def _replay(self, index: int, logits: Tensor, softmax: Softmax | None, carrier: Tensor) -> Tensor:
        """
        A router runs again under non-reentrant checkpointing, which wants the same tensors saved and nothing else: its
        first run pays. Other forwards may have come in between, so the tokens at hand need not be this router's.
        """
        if not self.config.charges or not torch.is_grad_enabled() or not logits.requires_grad:
            return carrier
        site = self.sites[index]
        if softmax is not None and self._carries(site, softmax, carrier):
            return carrier
        price = self._duals.toll[self._spans[index]].to(logits.device)
        with torch.no_grad():
            probs = routing_probs(logits, site.scoring) if softmax is None else softmax.probs
        return self._charge(site, carrier, logits, probs, price, logits.new_zeros(len(logits)))

    def _check_recomputed(self, tokens: Tokens) -> None:
        """Reentrant checkpointing recomputes the latest forward; refuses to guess if an earlier one is still due."""
        tokens.recomputing = True
        if not all(other.recomputing for other in self._step.deferred):
            raise RuntimeError(
                "Several forwards ran before one backward under reentrant gradient checkpointing, so a recomputation "
                "cannot tell whose tokens it recomputes. Use gradient_checkpointing_kwargs={'use_reentrant': False}, "
                "or run backward after each forward."
            )

    def selection_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that the selection of router `index` has to add, `None` if it has none or adds it itself."""
        if not self.has_bias or self.sites[index].native_bias:
            return None
        return self._duals.bias[self._spans[index]]

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that was in force in the selection of router `index`, wherever it is kept."""
        return self.sites[index].read_native_bias() if self.sites[index].native_bias else self.selection_bias(index)

    # ------------------------------------------------------------------ evaluation

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """
        While open, forwards in eval mode are counted apart, for [`~PhiBalancer.eval_metrics`]. Those with a cache are
        not, so that generation does not count (it does with `use_cache=False`).
        """
        self._move_to_model()  # an evaluation may come before the first training step
        outer, self._eval_tally = self._eval_tally, Tally(self._duals.layout.sizes)
        self._eval_tally.flat = torch.zeros_like(self._last.flat)
        try:
            yield
        finally:
            self._eval_tally = outer

    def eval_metrics(self, per_layer: int = 16) -> dict[str, float]:
        """Balance over everything forwarded inside the open [`~PhiBalancer.evaluation`], over all ranks."""
        if self._eval_tally is None:
            raise RuntimeError("eval_metrics() is to be called inside `with balancer.evaluation():`.")
        tally = copy.copy(self._eval_tally)
        tally.flat = self._eval_tally.flat.clone()
        if self._world_size > 1:
            dist.all_reduce(tally.flat, group=self.process_group)
        return self._load_metrics(tally, per_layer) if float(tally.tokens) else {}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Means and biases by `"{layer name}.{mean_probs | mean_load | bias}"`, and the number of steps."""
        return self._duals.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Restores what [`~PhiBalancer.state_dict`] returned; nothing is changed if it does not fit.

        Raises:
            ValueError: if a tensor is missing, of another shape, not finite, or belongs to no router of this model.
        """
        self.find_copies()
        self._duals.load_state_dict(state)

    def take_over(self, other: PhiBalancer) -> None:
        """Goes on from the duals of `other`, a balancer of the same routers, as far as this method keeps them."""
        self._duals.take_over(other._duals)

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.safetensors` into `directory` (made if missing) and returns its path."""
        return self._duals.save(directory)

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restores what [`~PhiBalancer.save`] wrote, from the file or from its directory.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or belongs to another model; the state is then as before.
        """
        self.find_copies()
        self._duals.load(directory)

    # ------------------------------------------------------------------ plumbing

    def find_copies(self) -> None:
        """Looks for the routers again: PEFT's `modules_to_save` trains copies, which need the native bias as well."""
        found = {site.name: site for site in find_routers(self.root)}
        for site in self.sites:
            if site.name in found:
                site.modules, site.native_bias = found[site.name].modules, found[site.name].native_bias
                for owner, name in site.native_bias:  # PEFT would train them, but selections have no gradient
                    getattr(owner, name).requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to this process or to the step under way."""
        fleeting = {"process_group": None, "_forwarding": False, "_tokens": None, "_latest": None, "_labels": None}
        fleeting["softmax"] = None
        return {**vars(self), **fleeting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._step = OptimizerStep()

    @property
    def _world_size(self) -> int:
        return dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1

    def _move_to_model(self) -> torch.device:
        """Moves the state to the device of the model, if that has changed."""
        present = self._tally.flat.device
        device = next((p.device for p in self.root.parameters() if p.device.type != "meta"), present)
        if device != present:
            self._duals.to(device)
            for tally in (self._tally, self._last):
                tally.flat = tally.flat.to(device)
            self._bad_steps, self._charged_price = self._bad_steps.to(device), self._charged_price.to(device)
        return device

    def _check_first_step(self, tally: Tally) -> None:
        """Refuses set-ups in which balancing would silently do nothing; reads the device, once."""
        load, tokens = tally.load, float(tally.tokens)
        if not tokens:
            return
        uncalled = [site.name for site, span in zip(self.sites, self._spans) if not float(load[span].sum())]
        if uncalled:
            raise ValueError(
                f"{len(uncalled)} of {len(self.sites)} patched routers were never called in the first step: "
                f"{', '.join(uncalled[:4])}. Something bypasses them (a fused kernel, `use_kernels=True`, layers that "
                "this model does not run). Switch that off, or unpatch the model."
            )
        trained = [
            site.name for site in self.sites for m in site.modules if any(p.requires_grad for p in m.parameters())
        ]
        if self.config.rules.freezes and trained:
            raise ValueError(
                f"method={self.config.method!r}, but router(s) {', '.join(trained[:4])} are trained: something has made "
                "them trainable since the patch. Patch after adding an adapter, or leave the routers out of it."
            )
        announced = self._step.tokens
        if announced is not None and float(announced) != tokens:
            logger.warning(
                f"begin_step() counted {float(announced):.0f} tokens, the routers saw {tokens:.0f}: the price "
                "gradient of such a step is scaled by their ratio. Pass begin_step() the batches as the model gets them."
            )
        silent = [site.name for site in self.sites if not site.charged]
        strengths = {name: getattr(self.config, name) for name in ("coef", "z_loss_coef", "sequence_coef")}
        given = ", ".join(f"{name}={value}" for name, value in strengths.items() if value > 0)
        if self.config.charges and len(silent) == len(self.sites):
            raise ValueError(
                f"{given} but no gradient path leads from any router to a trainable parameter (frozen "
                f"routers under LoRA?), so this does nothing. Train the routers, e.g. with "
                f"LoraConfig(target_parameters=['{self.sites[0].name.split('.', 3)[-1]}.weight', ...]), or set it to 0 "
                "and bias_coef > 0, which needs no gradient."
            )
        if self.config.charges and silent:
            logger.warning(
                f"The price gradient reaches no trainable parameter from router(s) {', '.join(silent[:4])}."
            )
        self._checked = True
