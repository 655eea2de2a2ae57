"""The state of φ-balancing and its one update per optimizer step.

Shapes: L routers, E experts, T tokens of a micro-batch, k experts per token. All routers live in flat fp32 buffers, so
that an optimizer step costs one all-reduce and a handful of kernels however many layers there are; `_runs` views a
stretch of routers with the same number of experts as `(L, E)`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from . import metrics
from .config import PhiBalanceConfig, package_version
from .potentials import centred_price
from .pricing import ChargePrices, routing_probs
from .routers import RouterSite


logger = logging.get_logger(__name__)
STATE_NAME = "phi_balance.safetensors"


@dataclass
class Tokens:
    """The tokens of one forward: which ones count, and what each pays per unit of price."""

    mask: Tensor  # (T,) 1.0 for the tokens that count
    rate: Tensor  # (T,) coefficient of ⟨q, p_t⟩ in the gradient of the optimizer step
    trains: bool = True  # False for a forward of an evaluation, which counts apart and never pays
    in_forward: bool = True  # False during a recomputation, which pays but is not counted again
    deferred: bool = False  # its routers ran without autograd, reentrant checkpointing will run them again
    recomputing: bool = False  # and has begun to


def count_mask(inputs: Mapping[str, Any], token_mask: str) -> Tensor | None:
    """
    Which tokens of a batch count, `(B, S)` as 0/1, or `None` if `inputs` does not tell.

    Raises:
        ValueError: if `token_mask="attention"` and the attention mask is not a `(B, S)` tensor.
    """
    hidden = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if token_mask == "labels":
        labels = inputs.get("labels")
        return None if labels is None else labels != -100
    mask = inputs.get("attention_mask") if token_mask == "attention" else None
    if mask is None:
        return None if hidden is None else torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"token_mask='attention' needs an attention_mask of shape (batch, sequence), got {kind}: the padding "
            "cannot be read off it. Set token_mask='labels' or token_mask='all' in PhiBalanceConfig."
        )
    return (mask if hidden is None else mask[:, -hidden.shape[1] :]) != 0


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
        self.steps = 0
        self._potential = config.build_potential()
        bounds = list(itertools.accumulate((site.num_experts for site in self.sites), initial=0))
        self._slices = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        size = bounds[-1]
        uniform = torch.cat([torch.full((site.num_experts,), 1 / site.num_experts) for site in self.sites])
        self._means = {name: uniform.clone() for name in config.statistics}
        self._price = torch.zeros(size)
        self._bias = self._read_native_biases()
        self._biased = config.bias_coef > 0
        self._sums = torch.zeros(2 * size + 1)  # probs, load, tokens: one buffer, one all-reduce
        self._last = torch.zeros(2 * size + 1)  # the same of the last step, over all ranks
        self._eval_sums: Tensor | None = None
        self._bad_steps = torch.zeros(())
        self._checked = False
        self._paid = torch.zeros(())
        self._tokens: Tokens | None = None
        self._outer: Tokens | None = None
        self._labels: Tensor | None = None
        self._clear_step()

    # ------------------------------------------------------------------ what users read

    @property
    def layer_names(self) -> list[str]:
        """Names of the routers, as in `model.named_modules()` of the unwrapped model."""
        return [site.name for site in self.sites]

    def means(self, statistic: str | None = None) -> dict[str, Tensor]:
        """EMA m of the routing distribution by layer name, each `(E,)` fp32; of `config.track` unless said."""
        statistic = statistic or self.config.track
        if statistic not in self._means:
            raise ValueError(f"statistic {statistic!r} is not kept; this configuration keeps {sorted(self._means)}.")
        return self._by_layer(self._means[statistic])

    def prices(self) -> dict[str, Tensor]:
        """Centred dual prices q behind the gradient by layer name, each `(E,)` fp32."""
        return self._by_layer(self._price)

    def biases(self) -> dict[str, Tensor]:
        """Selection biases b by layer name, each `(E,)` fp32."""
        return self._by_layer(self._bias)

    def loads(self) -> dict[str, Tensor]:
        """Top-k assignments per expert in the last step, over all ranks, by layer name, each `(E,)` fp32."""
        return self._by_layer(self._split(self._last)[1])

    def metrics(self, per_layer: int = 16) -> dict[str, float]:
        """
        Balance of the last optimizer step as plain numbers; reads them off the device, so call it when logging.

        Args:
            per_layer (`int`, *optional*, defaults to `16`):
                At most so many layers, evenly spaced, get a `max_vio` of their own.
        """
        probs, load, tokens = self._split(self._last)
        values = self._load_metrics(load, tokens, per_layer)
        price = self._price.cpu()
        values["price_range"] = max(float(price[s].max() - price[s].min()) for s in self._slices)
        if self._biased:
            bias = self._bias.cpu()
            values["bias_range"] = max(float(bias[s].max() - bias[s].min()) for s in self._slices)
        if self.config.coef > 0:
            values["balance_loss"] = float(self._paid)
        values["tokens"] = float(tokens)
        return values

    def _load_metrics(self, load: Tensor, tokens: Tensor, per_layer: int) -> dict[str, float]:
        columns: dict[str, list[float]] = {}
        load = load.cpu()
        count = max(float(tokens), 1.0)
        for span, layers, experts in self._runs():
            load_LE = load[span].view(layers, experts)
            for name, value_L in metrics.summarise(load_LE).items():
                columns.setdefault(name, []).extend(value_L.tolist())
        values = {name: _reduce(name, column) for name, column in columns.items()}
        values["max_vio_worst_layer"] = max(columns["max_vio"])
        floors = [metrics.noise_floor(site.num_experts, site.top_k, count) for site in self.sites]
        values["noise_floor"] = float(sum(floors) / len(floors))
        shown = range(len(self.sites))
        if len(shown) > per_layer:
            shown = sorted({round(i * (len(shown) - 1) / max(per_layer - 1, 1)) for i in range(per_layer)})
        for i in shown:
            values[f"max_vio/{self.sites[i].name}"] = columns["max_vio"][i]
        return values

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
        if self._trained:
            raise RuntimeError(
                "begin_step() was called twice without step() in between, so the prices would never move. Call "
                "balancer.step() after optimizer.step(), or let phb.attach(trainer) do both."
            )
        self._clear_step()
        self._opened = True
        self._loss_scale = loss_scale
        self._expected = micro_batches if isinstance(micro_batches, int) else len(micro_batches)
        if self._expected < 1:
            raise ValueError(f"`micro_batches` must hold at least one micro-batch, got {micro_batches!r}.")
        if isinstance(micro_batches, int):
            return
        masks = [count_mask(batch, self.config.token_mask) for batch in micro_batches]
        if any(mask is None for mask in masks):
            logger.warning_once(
                f"The micro-batches do not hold what token_mask={self.config.token_mask!r} needs; each will be "
                "charged its own mean instead of its exact share of the step's tokens."
            )
            return
        device = self._move_to_model()
        total = torch.stack([mask.sum().to(device) for mask in masks]).sum().float()
        if self._world_size > 1:
            dist.all_reduce(total, group=self.process_group)
        self._step_tokens = total

    def step(self) -> None:
        """
        Closes an optimizer step: reduces its statistics over the ranks, moves means, prices and biases. Every
        data-parallel rank must call it, once, after `optimizer.step()`.

        Raises:
            RuntimeError: if no training forward has run since the last step.
            ValueError: at the first step, if a router was never called or the price gradient reaches nothing.
        """
        if not self._trained:
            raise RuntimeError("step() was called before any training forward of the patched model.")
        sums = self._sums
        if self._world_size > 1:
            dist.all_reduce(sums, group=self.process_group)
        if not self._checked:
            self._check_first_step(sums)
        self._last.copy_(sums)
        probs, load, _ = self._split(sums)
        finite = torch.isfinite(sums).all()
        self._bad_steps += ~finite
        if self.config.coef > 0:
            self._paid = self._step_value(probs)
        for name, mean in self._means.items():
            self._fold(mean, probs if name == "probs" else load, finite)
        self._refresh_price()
        if self.config.bias_coef > 0:
            self._bias -= self.config.bias_coef * self._priced(self._means[self.config.bias_track]) * finite
            self._write_native_biases()
        self.steps += 1
        sums.zero_()
        self._clear_step()

    def discard_step(self) -> None:
        """Forgets what has been counted since the last step: of a skipped optimizer step, or of an interrupted run."""
        self._sums.zero_()
        self._clear_step()

    def check_finite(self) -> None:
        """Warns once if steps had non-finite statistics, which were left out; reads the device."""
        bad = int(self._bad_steps)
        if bad:
            logger.warning_once(
                f"The routing statistics of {bad} step(s) were not finite (the loss or the router logits diverged); "
                "they were left out of the means and prices. Lower the learning rate or check the data."
            )

    def _fold(self, mean: Tensor, sums: Tensor, finite: Tensor) -> None:
        """m <- (1 - η) m + η s per router, s the normalised statistic; routers that saw no token keep their m."""
        rate = self.config.ema_rate
        for span, layers, experts in self._runs():
            sums_LE = sums[span].view(layers, experts)
            total_L1 = sums_LE.sum(dim=-1, keepdim=True)
            mean_LE = mean[span].view(layers, experts)
            new_LE = (1 - rate) * mean_LE + rate * (sums_LE / total_L1)
            mean_LE.copy_(torch.where((total_L1 > 0) & finite, new_LE, mean_LE))

    def _priced(self, mean: Tensor) -> Tensor:
        """Centred prices of all routers at `mean`, flat."""
        price = torch.empty_like(mean)
        for span, layers, experts in self._runs():
            price[span] = centred_price(self._potential, mean[span].view(layers, experts)).reshape(-1)
        return price

    def _refresh_price(self) -> None:
        self._price.copy_(self._priced(self._means[self.config.track]))

    def _step_value(self, probs: Tensor) -> Tensor:
        """coef · Σ_layers ⟨q, mean p⟩: the value of the term whose gradient this step received."""
        value = torch.zeros((), device=probs.device)
        for span, layers, experts in self._runs():
            probs_LE = probs[span].view(layers, experts)
            share_LE = probs_LE / probs_LE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            value = value + (share_LE * self._price[span].view(layers, experts)).sum()
        return self.config.coef * value

    def _clear_step(self) -> None:
        self._opened = False
        self._expected = 1
        self._step_tokens: Tensor | None = None
        self._loss_scale: float | Tensor = 1.0
        self._trained = False
        self._deferred: list[Tokens] = []
        self._probed_version = -1
        self._paying = [False] * len(self.sites)

    # ------------------------------------------------------------------ called by the hooks

    @property
    def is_idle(self) -> bool:
        """Whether the routers run outside training and evaluation, so that there is nothing to do."""
        return self._tokens is None

    @property
    def is_open(self) -> bool:
        """Whether `begin_step` has announced the step under way."""
        return self._opened

    @property
    def is_evaluating(self) -> bool:
        """Whether an [`~PhiBalancer.evaluation`] is open."""
        return self._eval_sums is not None

    @property
    def has_bias(self) -> bool:
        """Whether a selection bias is in force."""
        return self._biased

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
        self._outer, self._tokens = self._tokens, None
        training = training and torch.is_grad_enabled()
        evaluating = self._eval_sums is not None and not training and inputs.get("past_key_values") is None
        if not (training or evaluating):
            return
        if self.config.token_mask == "labels":
            inputs = {**inputs, "labels": self._labels}
        mask_BS = count_mask(inputs, self.config.token_mask)
        if mask_BS is None:
            raise ValueError(
                f"token_mask={self.config.token_mask!r}, but this forward received no "
                f"{'labels' if self.config.token_mask == 'labels' else 'input_ids or inputs_embeds'}. Pass them to the "
                "model, or set another token_mask in PhiBalanceConfig."
            )
        mask = mask_BS.reshape(-1).to(self._move_to_model(), torch.float32)
        if evaluating:
            self._eval_sums[-1] += mask.sum()
            self._tokens = Tokens(mask, mask, trains=False)
            return
        if not self._opened:
            self._open_implicitly()
        self._trained = True
        self._sums[-1] += mask.sum()
        self._tokens = Tokens(mask, self._rate(mask))

    def close_forward(self) -> None:
        """The forward of the backbone has ended, also by an exception."""
        if self._tokens is not None and self._tokens.trains:
            self._tokens.in_forward = False  # kept for the recomputations that its backward may need
        else:
            self._tokens = self._outer
        self._outer = None

    def _open_implicitly(self) -> None:
        """A training forward without `begin_step`: fine for a step of one micro-batch in one process."""
        probe = next((p for p in self.root.parameters() if p.requires_grad), None)
        if self._trained and self.config.is_on and probe is not None:
            remedy = "phb.attach(trainer) or PhiBalanceCallback does that inside a Trainer."
            if probe._version != self._probed_version:
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
        if self._trained:
            self.discard_step()  # nothing came of the earlier forward
        if self._world_size > 1 and self.config.coef > 0:
            raise RuntimeError(
                f"{self._world_size} data-parallel ranks need balancer.begin_step(micro_batches) on every rank before "
                "the first forward of an optimizer step; phb.attach(trainer) does that inside a Trainer."
            )
        self._probed_version = -1 if probe is None else probe._version

    def _rate(self, mask: Tensor) -> Tensor:
        """Coefficient of ⟨q, p_t⟩ for each token, so that the optimizer receives coef/N whatever happens in between."""
        if self._step_tokens is not None:
            # gradients are averaged over the ranks afterwards
            per_token = self.config.coef * self._world_size / self._step_tokens.clamp(min=1)
        else:
            per_token = self.config.coef / (self._expected * mask.sum().clamp(min=1))
        return mask * (per_token * self._loss_scale)

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """
        Counts what router `index` did and charges it; returns `carrier`, through which the charge will be paid.

        Args:
            logits (`torch.Tensor` of shape `(T, E)`), selected (`torch.Tensor` of shape `(..., k)`),
            carrier (`torch.Tensor`): any differentiable output of the router.
        """
        tokens = self._tokens
        if tokens is None:
            return carrier
        site = self.sites[index]
        if logits.shape != (tokens.mask.numel(), site.num_experts):
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)} where the token mask and the "
                f"patch expect {(tokens.mask.numel(), site.num_experts)}; this model routes something else than its "
                "(batch x sequence) tokens. Patching after changing the number of experts may help."
            )
        mask, rate = tokens.mask.to(logits.device), tokens.rate.to(logits.device)
        pays = self.config.coef > 0 and tokens.trains
        from_current = pays and self.config.price_from == "current"
        price = self._price[self._slices[index]]
        if tokens.in_forward or from_current:
            probs_E, load_E = self._statistics(site, logits, selected, mask)
            if tokens.in_forward:
                self._add(index, probs_E, load_E)
            if from_current:
                price = self._current_price(index, probs_E if self.config.track == "probs" else load_E)
        if not pays:
            return carrier
        if not torch.is_grad_enabled():
            if not tokens.deferred:
                tokens.deferred = True
                self._deferred.append(tokens)
            return carrier
        if not logits.requires_grad:
            return carrier
        if tokens.deferred:
            self._check_recomputed(tokens)
        self._paying[index] = True
        return ChargePrices.apply(carrier, logits, price.to(logits.device), rate, site.scoring)

    def _check_recomputed(self, tokens: Tokens) -> None:
        """Reentrant checkpointing recomputes the latest forward; refuses to guess if an earlier one is still due."""
        tokens.recomputing = True
        if not all(other.recomputing for other in self._deferred):
            raise RuntimeError(
                "Several forwards ran before one backward under reentrant gradient checkpointing, so a recomputation "
                "cannot tell whose tokens it recomputes. Use gradient_checkpointing_kwargs={'use_reentrant': False}, "
                "or run backward after each forward."
            )

    @torch.no_grad()
    def _statistics(self, site: RouterSite, logits: Tensor, selected: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor]:
        """Sums over the counted tokens of p, `(E,)` (`None` where nothing needs it), and of the top-k assignments."""
        probs_E = None
        if self._eval_sums is None and ("probs" in self._means or self.config.coef > 0):
            probs_E = (routing_probs(logits, site.scoring) * mask.unsqueeze(-1)).sum(dim=0).float()
        chosen = selected.reshape(mask.numel(), -1)  # (T, k)
        weight = mask.unsqueeze(-1).expand_as(chosen).reshape(-1)
        load_E = torch.zeros(site.num_experts, device=logits.device).scatter_add_(0, chosen.reshape(-1), weight)
        return probs_E, load_E

    @torch.no_grad()
    def _add(self, index: int, probs_E: Tensor | None, load_E: Tensor) -> None:
        probs, load, _ = self._split(self._sums if self._eval_sums is None else self._eval_sums)
        load[self._slices[index]] += load_E.to(load.device)
        if probs_E is not None:
            probs[self._slices[index]] += probs_E.to(probs.device)

    @torch.no_grad()
    def _current_price(self, index: int, sums_E: Tensor) -> Tensor:
        rate = self.config.ema_rate
        mean = self._means[self.config.track][self._slices[index]].to(sums_E.device)
        return centred_price(self._potential, (1 - rate) * mean + rate * sums_E / sums_E.sum().clamp(min=1e-30))

    def selection_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that the selection of router `index` has to add, `None` if it has none or adds it itself."""
        if not self._biased or self.sites[index].native_bias:
            return None
        return self._bias[self._slices[index]]

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that was in force in the selection of router `index`, wherever it is kept."""
        site = self.sites[index]
        return site.read_native_bias() if site.native_bias else self.selection_bias(index)

    # ------------------------------------------------------------------ evaluation

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """While open, forwards in eval mode are counted apart, for [`~PhiBalancer.eval_metrics`]."""
        outer, self._eval_sums = self._eval_sums, torch.zeros_like(self._sums)
        try:
            yield
        finally:
            self._eval_sums = outer

    def eval_metrics(self, per_layer: int = 16) -> dict[str, float]:
        """Balance over everything forwarded inside the open [`~PhiBalancer.evaluation`], over all ranks."""
        if self._eval_sums is None:
            raise RuntimeError("eval_metrics() is to be called inside `with balancer.evaluation():`.")
        sums = self._eval_sums.clone()
        if self._world_size > 1:
            dist.all_reduce(sums, group=self.process_group)
        _, load, tokens = self._split(sums)
        return {**self._load_metrics(load, tokens, per_layer), "tokens": float(tokens)} if float(tokens) else {}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Means and biases by `"{layer name}.{mean_probs | mean_load | bias}"`, and the number of steps."""
        state = {"steps": torch.tensor(self.steps)}
        for statistic, mean in self._means.items():
            state |= {f"{name}.mean_{statistic}": m.cpu().clone() for name, m in self._by_layer(mean).items()}
        if self._biased:
            state |= {f"{name}.bias": b.cpu().clone() for name, b in self.biases().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Restores what [`~PhiBalancer.state_dict`] returned; nothing is changed if it does not fit.

        Raises:
            ValueError: if a tensor is missing, of another shape, not finite, or belongs to no router of this model.
        """
        kinds = [f"mean_{statistic}" for statistic in self._means]
        biased = any(key.endswith(".bias") for key in state)
        kinds += ["bias"] if biased else []
        for key, tensor in state.items():
            layer, _, kind = key.rpartition(".")
            if key != "steps" and (layer not in self.layer_names or kind not in ("mean_probs", "mean_load", "bias")):
                raise ValueError(
                    f"the φ-balance state holds {key!r}, but the routers of this {type(self.root).__name__} are "
                    f"{self.layer_names[0]!r} ... {self.layer_names[-1]!r}: it belongs to another model."
                )
        for site, kind in itertools.product(self.sites, kinds):
            tensor = state.get(f"{site.name}.{kind}")
            if tensor is None:
                raise ValueError(
                    f"the φ-balance state has no {site.name}.{kind}: it was written with other `track`/`bias_track` "
                    "settings or for another model. Use the configuration beside it, or start with fresh duals."
                )
            if tensor.shape != (site.num_experts,):
                raise ValueError(
                    f"{site.name}.{kind} has shape {tuple(tensor.shape)}, this model's router has "
                    f"{site.num_experts} experts: the φ-balance state belongs to another model."
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{site.name}.{kind} in the φ-balance state is not finite; use an earlier checkpoint.")
        for site, span in zip(self.sites, self._slices):
            for statistic, mean in self._means.items():
                mean[span] = state[f"{site.name}.mean_{statistic}"].to(mean)
            if biased:
                self._bias[span] = state[f"{site.name}.bias"].to(self._bias)
        if biased:
            self._biased = True
            self._write_native_biases()
        self.steps = int(state.get("steps", 0))
        if self.steps:
            self._refresh_price()
        else:
            self._price.zero_()

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.safetensors` into `directory` (made if missing) and returns its path."""
        path = Path(directory) / STATE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "version": package_version(), "config": json.dumps(self.config.to_dict())}
        partial = path.with_suffix(".partial")  # a kill while writing must not leave half a file under the real name
        save_file(self.state_dict(), partial, metadata=header)
        os.replace(partial, path)
        return path

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restores what [`~PhiBalancer.save`] wrote, from the file or from its directory.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or belongs to another model; the state is then as before.
        """
        path = Path(directory)
        path = path / STATE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no φ-balance state at {path}; was the model saved while patched?")
        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}); copy it again from where it was written, or delete it to start with "
                "fresh duals."
            ) from error
        self.load_state_dict(state)

    # ------------------------------------------------------------------ plumbing

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to this process or to the step under way."""
        fleeting = {"process_group": None, "_tokens": None, "_outer": None, "_labels": None, "_potential": None}
        return {**vars(self), **fleeting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._potential = self.config.build_potential()
        self._clear_step()

    @property
    def _world_size(self) -> int:
        return dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self._slices[-1].stop
        return flat[:size], flat[size : 2 * size], flat[-1]

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        return {site.name: flat[span].clone() for site, span in zip(self.sites, self._slices)}

    def _runs(self) -> Iterator[tuple[slice, int, int]]:
        """Stretches of routers with the same number of experts: their span in the flat buffers, L and E."""
        start = 0
        for experts, group in itertools.groupby(site.num_experts for site in self.sites):
            layers = len(list(group))
            yield slice(start, start + layers * experts), layers, experts
            start += layers * experts

    def _move_to_model(self) -> torch.device:
        """Moves the state to the device of the model, if that has changed."""
        device = next((p.device for p in self.root.parameters() if p.device.type != "meta"), self._sums.device)
        if device != self._sums.device:
            self._means = {name: mean.to(device) for name, mean in self._means.items()}
            for name in ("_price", "_bias", "_sums", "_last", "_bad_steps"):
                setattr(self, name, getattr(self, name).to(device))
        return device

    def _read_native_biases(self) -> Tensor:
        zeros = (torch.zeros(site.num_experts) for site in self.sites)
        return torch.cat([s.read_native_bias().cpu().float() if s.native_bias else z for s, z in zip(self.sites, zeros)])

    def _write_native_biases(self) -> None:
        for site, span in zip(self.sites, self._slices):
            site.write_native_bias(self._bias[span])

    def _check_first_step(self, sums: Tensor) -> None:
        """Refuses set-ups in which balancing would silently do nothing; reads the device, once."""
        _, load, tokens = self._split(sums)
        if not float(tokens):
            return
        uncalled = [s.name for s, span in zip(self.sites, self._slices) if not float(load[span].sum())]
        if uncalled:
            raise ValueError(
                f"{len(uncalled)} of {len(self.sites)} patched routers were never called in the first step: "
                f"{', '.join(uncalled[:4])}. Something bypasses them (a fused kernel, `use_kernels=True`, layers that "
                "this model does not run). Switch that off, or unpatch the model."
            )
        announced = self._step_tokens
        if announced is not None and float(announced) != float(tokens):
            logger.warning(
                f"begin_step() counted {float(announced):.0f} tokens, the routers saw {float(tokens):.0f}: the price "
                "gradient of such a step is scaled by their ratio. Pass begin_step() the batches as the model gets them."
            )
        if self.config.coef > 0 and not any(self._paying):
            raise ValueError(
                f"coef={self.config.coef} but no gradient path leads from any router to a trainable parameter (frozen "
                f"routers under LoRA?), so the price gradient does nothing. Train the routers, e.g. with "
                f"LoraConfig(target_parameters=['{self.sites[0].name.split('.', 3)[-1]}.weight', ...]), or set coef=0 "
                "and bias_coef > 0, which needs no gradient."
            )
        silent = [site.name for site, paying in zip(self.sites, self._paying) if not paying]
        if self.config.coef > 0 and silent:
            logger.warning(f"The price gradient reaches no trainable parameter from router(s) {', '.join(silent[:4])}.")
        self._checked = True


def _reduce(name: str, column: list[float]) -> float:
    """One number for all layers: the extreme of extremes, the sum of counts, the mean of everything else."""
    if name.startswith("min_"):
        return min(column)
    if name.startswith("max_load"):
        return max(column)
    return sum(column) if name == "dead_experts" else sum(column) / len(column)
