"""What a patched model carries: one object to read prices and loads off, to close optimizer steps with, and to save.

The work is done by its parts: `step` (an optimizer step), `meter` (a forward), `charging` (the gradient), `duals` (means,
prices, biases), `state` (the file).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import PhiBalanceConfig
from ..maths import max_vio, model_metrics
from ..routers import RouterSite, find_copies
from .duals import Duals
from .learning import LINEAR, LearningReport, describe_router
from .meter import Meter
from .ranks import Ranks, count_copies
from .rehearsal import Rehearsal
from .state import check_model, describe_model, read_state, save_state
from .step import Steps
from .tally import Tally


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
        self._ranks = Ranks(count_copies(root))
        self._duals = Duals(config, self.sites)
        self._steps = Steps(root, config, self.sites, self._duals, self._ranks)
        self.evaluated: dict[str, float] = {}  # what the last evaluation says of a plain load
        self.meter = Meter(root, config, self.sites, self._duals, self._steps)  # what the hooks talk to

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """
        The ranks whose gradients are averaged in an optimizer step, and whose tokens differ; `None` for all, of which those that
        share their tokens since transformers has split the model over them (`tp_plan`, `DistributedConfig`) count once.

        Ranks that step each for themselves and average weights only now and then (DiLoCo, local SGD) are groups of one:
        `balancer.process_group = torch.distributed.new_subgroups(1)[0]`. Average what `state_dict()` returns with the
        weights, and give it to `load_state_dict()`.
        """
        return self._ranks.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._ranks.group = group

    @property
    def ranks(self) -> int:
        """How many data-parallel ranks share a step."""
        return self._ranks.count

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
        return self._duals.layout.by_layer(self._steps.last.load)

    def metrics(self, per_layer: int = 16) -> dict[str, float]:
        """
        Balance of the last optimizer step as plain numbers; reads them off the device, so call it when logging. Those of routers
        for images only, or in a vision tower, are apart: `vision/max_vio`, ..., and `vision/tokens`, what each of them routed.

        Args:
            per_layer (`int`, *optional*, defaults to `16`): At most so many layers, evenly spaced, are shown on their own.
        """
        values = self._load_metrics(self._steps.last, per_layer)
        values["price_range"] = max(float(price.max() - price.min()) for price in self.prices().values())
        if self.has_bias:
            values["bias_range"] = max(float(bias.max() - bias.min()) for bias in self.biases().values())
        if self.config.coef > 0:
            values["balance_loss"] = float(self._balance_loss())
        return values

    def _balance_loss(self) -> Tensor:
        """Value of the price gradient's term in the last step."""
        last, paid = self._steps.last, self._steps.last.paid
        if self.config.price_from == "previous":
            if all(site.sees_all for site in self.sites):
                return self._duals.charged(last.probs, self._steps.last_price)
            paid = self.config.coef * last.probs @ self._steps.last_price  # its share of the step's tokens only
        return paid / last.tokens.clamp(min=1)

    def learning_report(self) -> LearningReport:
        """
        Whether each router learns, and how much balancing gradient reaches what. The norms are those of the first
        training forward that had prices, so of the second optimizer step; reads them off the device.
        """
        rows = [describe_router(site.name, self.root) for site in self.sites]
        for index, norms in (self.meter.norms or {}).items():
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
        values: dict[str, float] = {}
        for modality in sorted({site.modality for site in self.sites}):
            sites = [site for site in self.sites if site.modality == modality]
            top_k = [site.top_k for site in sites]
            own = {site.name: loads[site.name] for site in sites}
            routed = tokens
            if not all(site.sees_all for site in sites):
                routed = float(sum(map(torch.sum, own.values()))) / sum(top_k)
            prefix = "" if modality == "text" else f"{modality}/"
            found = model_metrics(own, top_k, max(routed, 1.0), per_layer)
            values |= {f"{prefix}{name}": value for name, value in found.items()}
            if prefix:
                values[f"{prefix}tokens"] = routed
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
        self._steps.begin(micro_batches, loss_scale)

    def step(self, skipped: bool | None = None) -> None:
        """
        Closes an optimizer step: reduces its statistics over the ranks, moves means, prices and biases. Every
        data-parallel rank must call it, once, after `optimizer.step()`.

        Args:
            skipped (`bool`, *optional*):
                With a `GradScaler`, whether this rank's optimizer step was skipped. If that of any rank was, nothing moves on
                any; costs one more scalar all-reduce. Leave it out where no step can be skipped.

        Raises:
            RuntimeError: if no training forward has run since the last step.
            ValueError: at the first step, if a router was never called or the price gradient reaches nothing.
        """
        self._steps.close(skipped)

    def discard_step(self) -> None:
        """Forgets what has been counted since the last step: of a skipped optimizer step, or of an interrupted run."""
        self._steps.discard()

    def check_finite(self) -> None:
        """Warns once if steps had non-finite statistics, which were left out; reads the device."""
        self._steps.check_finite()

    @property
    def is_open(self) -> bool:
        """Whether `begin_step` has announced the step under way."""
        return self._steps.now.announced

    @property
    def is_trained_on(self) -> bool:
        """Whether a training forward of the step under way has run."""
        return self._steps.now.trained

    def labels_of(self, labels: Tensor | None) -> AbstractContextManager[None]:
        """While open, forwards of the backbone, which never sees labels, belong to these `labels (B, S)`."""
        return self.meter.labels_of(labels)

    def replaying(self) -> AbstractContextManager[None]:
        """
        While open, the routers are told from outside what to choose, as reinforcement learning does that replays the experts
        of its rollout: the router's forward returns indices that are not its own top-k. What is returned counts as load, the
        price acts on the probabilities as ever, and the selection bias, which has no part in such a choice, neither acts
        nor moves in that optimizer step. Only the forwards of the update belong inside, not those of the rollout:

        ```python
        class ReplayingTrainer(GRPOTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                with phb.get_balancer(model).replaying(), replay(model, inputs["routed_experts"]):
                    return super().compute_loss(model, inputs, *args, **kwargs)
        ```

        with `replay` the trainer's own way of making the routers return these experts and their weights. If any data-parallel rank
        replays any micro-batch of a step, the biases hold on all.
        """
        return self.meter.replaying()

    def rehearsal(self) -> Rehearsal:
        """A context in which optimizer steps can be tried out, between two steps: afterwards the balancer is as before."""
        return Rehearsal(self)

    # ------------------------------------------------------------------ evaluation

    @property
    def is_evaluating(self) -> bool:
        """Whether an [`~PhiBalancer.evaluation`] is open."""
        return self.meter.eval_tally is not None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """
        While open, forwards in eval mode are counted apart, for [`~PhiBalancer.eval_metrics`]. Those with a cache are
        not, so that generation does not count (it does with `use_cache=False`).
        """
        self._steps.move_to_model()  # an evaluation may come before the first training step
        outer, self.meter.eval_tally = self.meter.eval_tally, Tally(self._duals.layout.sizes)
        self.meter.eval_tally.flat = torch.zeros_like(self._steps.last.flat)
        try:
            yield
        finally:
            self.meter.eval_tally = outer

    def eval_metrics(self, per_layer: int = 16) -> dict[str, float]:
        """
        Balance over everything forwarded inside the open [`~PhiBalancer.evaluation`], over all ranks; with a selection bias of
        ours also `plain_max_vio`, MaxVio of what the routers would choose without it, as after a plain load.
        """
        if self.meter.eval_tally is None:
            raise RuntimeError("eval_metrics() is to be called inside `with balancer.evaluation():`.")
        tally = copy.copy(self.meter.eval_tally)
        tally.flat = self.meter.eval_tally.flat.clone()
        self._ranks.sum_(tally.flat)
        if not float(tally.tokens):
            return {}
        values = self._load_metrics(tally, per_layer)
        plain = torch.stack([load.sum() for load in map(tally.plain_load_of, range(len(self.sites)))])
        if self.has_bias and bool((plain > 0).all()):
            each = [float(max_vio(tally.plain_load_of(index)[None])) for index in range(len(self.sites))]
            values["plain_max_vio"] = statistics.fmean(each)
            self.evaluated = {name: values[name] for name in ("max_vio", "plain_max_vio", "tokens") if name in values}
        return values

    # ------------------------------------------------------------------ set from outside, between steps

    @contextmanager
    def without_bias(self) -> Iterator[None]:
        """While open, selection biases that are ours do not act, as after a plain load; a family's own do."""
        had, self._duals.has_bias = self._duals.has_bias, False
        try:
            yield
        finally:
            self._duals.has_bias = had

    def set_means(self, sums: Mapping[str, Tensor]) -> None:
        """
        Sets the means, and so the prices.

        Args:
            sums (`Mapping[str, Tensor]`): for each statistic that is kept its sum over tokens, of all routers one after the
                other. A router without any keeps its mean.
        """
        self._steps.move_to_model()
        self._duals.set_means(sums)

    def set_biases(self, biases: Mapping[str, Tensor]) -> None:
        """Sets the selection biases by layer name, each `(E,)`; a family's own where it has one."""
        self._steps.move_to_model()
        self._duals.set_biases(biases)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` summed over the data-parallel ranks, in place."""
        self._ranks.sum_(values)
        return values

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Means and biases by `"{layer name}.{mean_probs | mean_load | bias}"`, and the number of steps."""
        return self._duals.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Restores what [`~PhiBalancer.state_dict`] returned; nothing is changed if it does not fit.

        Raises:
            ValueError: if a tensor is missing, of another type or shape, not finite, no distribution where it has to be one,
                or belongs to no router of this model.
        """
        find_copies(self.root, self.sites)
        self._duals.load_state_dict(state)

    def take_over(self, other: PhiBalancer) -> None:
        """Goes on from the duals of `other`, a balancer of the same routers, as far as this method keeps them."""
        self._duals.take_over(other._duals)

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.state` into `directory` (made if missing) and returns its path."""
        return save_state(self.state_dict(), self.config, describe_model(self.root, self.sites), directory)

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restores what [`~PhiBalancer.save`] wrote, from the file or from its directory.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or belongs to another model; the state is then as before.
        """
        self._duals.load_state_dict(self._read(directory))

    def check(self, directory: str | os.PathLike) -> int:
        """
        Whether [`~PhiBalancer.load`] would take what is there, which raises what it would; changes nothing. Returns the number
        of optimizer steps behind it.
        """
        state = self._read(directory)
        self._duals.check_state_dict(state)
        return int(state["steps"]) if "steps" in state else 0

    def _read(self, directory: str | os.PathLike) -> dict[str, Tensor]:
        find_copies(self.root, self.sites)
        found = read_state(directory)
        if found.model is not None:
            check_model(found.model, describe_model(self.root, self.sites))
        return found.tensors
