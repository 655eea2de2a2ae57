"""The object of a patched model: prices, loads and biases to read, optimizer steps, evaluations, and the state to save."""

from __future__ import annotations

import os
import statistics
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..config import STATISTICS, PhiBalanceConfig
from ..maths import max_vio, model_metrics
from ..routers import RouterSite, find_copies
from . import adapters, process
from .counts import Counts
from .duals import LOGIT_WIDTH, Duals
from .forwards import Evaluation, Forwards
from .learning import LearningReport, describe_router
from .loop import Loop
from .ranks import Ranks, count_copies
from .state import check_model, check_state, describe_model, fit_names, read_state, save_state
from .step import OptimizerStep


logger = logging.get_logger(__name__)


class PhiBalancer:
    """
    Balances the routers of a model; made by [`patch`], found by [`get_balancer`].

    A raw training loop needs no call: an optimizer step ends when a torch optimizer that owns parameters of the model has
    stepped. Only accumulated steps are announced, so that each token's share of the step is known:

    ```python
    balancer = phb.get_balancer(model)
    for micro_batches in steps:
        balancer.begin_step(micro_batches)
        for batch in micro_batches:
            (model(**batch).loss / len(micro_batches)).backward()
        optimizer.step(); optimizer.zero_grad()
    ```

    Args:
        config (`PhiBalanceConfig`): its configuration.
        sites (`Sequence[RouterSite]`): the routers, by their names in the model.
        duals (`Duals`): means, prices and biases; a submodule of the backbone.
        prefix (`str`): path of the backbone in the model, with a dot at its end, or `""`.
    """

    LOGIT_WIDTH = LOGIT_WIDTH

    def __init__(self, config: PhiBalanceConfig, sites: Sequence[RouterSite], duals: Duals, prefix: str) -> None:
        self.config, self.sites, self.duals, self.prefix = config, list(sites), duals, prefix
        duals.balancer = self
        self.forwards = Forwards(self)
        self.group = Ranks()
        self.evaluated: dict[str, float] = {}  # MaxVio of the last evaluation, with and without a bias of ours
        self.ignores_bias = False
        self.virtual_tokens: int | None = None  # that prompt learning of PEFT puts in front of each row
        self.pad_token_id: int | None = None
        self._begin()

    def _begin(self) -> None:
        """As without any step, and not yet in a model."""
        self._backbone: weakref.ref[nn.Module] | None = None
        self._root: weakref.ref[nn.Module] | None = None
        self._adapter_layer: weakref.ref[nn.Module] | None = None
        self._adapter_names: tuple[str, ...] = ()
        self._is_held = False
        self.loop = Loop(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            "config",
            "sites",
            "duals",
            "prefix",
            "forwards",
            "group",
            "evaluated",
            "virtual_tokens",
            "pad_token_id",
        }
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.ignores_bias = False
        self._begin()

    @property
    def now(self) -> OptimizerStep:
        """The optimizer step under way."""
        return self.loop.now

    @property
    def last(self) -> Counts:
        """What was counted in the last step, over all ranks."""
        return self.loop.last

    # ------------------------------------------------------------------ its model

    @property
    def backbone(self) -> nn.Module | None:
        """The body of the model, which gets the batch; `None` once it is gone."""
        return None if self._backbone is None else self._backbone()

    @property
    def root(self) -> nn.Module:
        """The transformers model that was patched, or its backbone where only that is there."""
        root = None if self._root is None else self._root()
        found = self.backbone if root is None else root
        if found is None:
            raise RuntimeError("the model of this balancer is gone.")
        return found

    @property
    def has_root(self) -> bool:
        """Whether the model around the backbone is known and alive."""
        return self._root is not None and self._root() is not None

    def rename(self, prefix: str) -> None:
        """Names the routers as in a model that has its backbone at `prefix`."""
        for site in self.sites:
            site.name = f"{prefix}{site.name.removeprefix(self.prefix)}"
        self.prefix = prefix

    def bind(self, backbone: nn.Module, root: nn.Module | None = None) -> None:
        """Belongs to `backbone` from now on, as a copy does."""
        if self.backbone is not backbone:
            self._backbone = weakref.ref(backbone)
            find_copies(backbone, self.sites, self.prefix)
            self._adapter_layer = adapters.find_layer(backbone, is_new=True)
            process.follow(self)
        if root is not None and (self._root is None or self._root() is not root):
            self._root = weakref.ref(root)
            self.group.copies = count_copies(root)
            config = getattr(root, "config", None)
            self.pad_token_id = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)

    def set_config(self, config: PhiBalanceConfig) -> None:
        """Goes on with another configuration, in the middle of a step too."""
        bins = self.loop.bins
        self.config = config
        self.duals.set_config(config)
        self.loop.is_checked = False
        if self.loop.bins != bins:
            self.discard_step()

    def find_copies(self) -> None:
        """Looks for the routers' modules again."""
        if self.backbone is not None:
            find_copies(self.backbone, self.sites, self.prefix)

    def follow_adapter(self) -> None:
        """The bias that acts is that of the adapter which is switched on."""
        if self._is_held:
            return
        names = tuple(getattr(self.root, "peft_config", ()))
        if names != self._adapter_names:  # PEFT may have copied routers
            self._adapter_names = names
            self.find_copies()
        self._adapter_layer = adapters.find_layer(self.root, self._adapter_layer)
        self.duals.use_adapter(adapters.active(self._adapter_layer))

    @contextmanager
    def using_adapter(self, adapter: str | None) -> Iterator[None]:
        """While open, the bias is that of `adapter`, whichever is switched on."""
        self.follow_adapter()
        self._is_held = True
        self.duals.use_adapter(adapter)
        try:
            yield
        finally:
            self._is_held = False
            self.follow_adapter()

    # ------------------------------------------------------------------ what users read

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """
        The ranks whose gradients are averaged in an optimizer step, and whose tokens differ; `None` for all, of which those that
        share their tokens since transformers has split the model over them (`tp_plan`, `DistributedConfig`) count once.

        Ranks that step each for themselves and average weights only now and then (DiLoCo, local SGD) are groups of one:
        `balancer.process_group = torch.distributed.new_subgroups(1)[0]`. Average what `state_dict()` returns with the
        weights, and give it to `load_state_dict()`.
        """
        return self.group.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self.group.group = group

    @property
    def ranks(self) -> int:
        """How many data-parallel ranks share a step."""
        return self.group.count

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` summed over the data-parallel ranks, in place."""
        self.group.sum_(values)
        return values

    @property
    def layer_names(self) -> list[str]:
        """Names of the routers, as in `model.named_modules()` of the unwrapped model."""
        return [site.name for site in self.sites]

    @property
    def steps(self) -> int:
        """Optimizer steps that have moved the duals."""
        return self.duals.steps

    @property
    def coef(self) -> float:
        """Strength of the price gradient in the step under way, by the schedule of the configuration."""
        return self.config.coef_at(self.duals.begun)

    @property
    def has_bias(self) -> bool:
        """Whether a selection bias is in force."""
        return self.duals.has_bias

    def means(self, statistic: str | None = None) -> dict[str, Tensor]:
        """
        EMA m of the routing distribution by layer name, each `(E,)` fp32.

        Args:
            statistic (`str`, *optional*): `"probs"` or `"load"`; `config.track` unless said.
        """
        statistic = statistic or self.config.track
        if statistic not in STATISTICS:
            raise ValueError(f"`statistic` must be one of {STATISTICS}, got {statistic!r}.")
        return self._by_layer(self.duals.mean(statistic))

    def prices(self) -> dict[str, Tensor]:
        """Centred dual prices q behind the gradient by layer name, each `(E,)` fp32."""
        return self._by_layer(self.duals.price)

    def biases(self) -> dict[str, Tensor]:
        """Selection biases b by layer name, each `(E,)` fp32."""
        self.follow_adapter()
        self.duals.read_native()
        return self._by_layer(self.duals.biases)

    def loads(self) -> dict[str, Tensor]:
        """Top-k assignments per expert in the last step, over all ranks, by layer name, each `(E,)` fp32."""
        return self._by_layer(self.last.load)

    def _by_layer(self, rows_LE: Tensor) -> dict[str, Tensor]:
        return {site.name: row[: site.num_experts].clone() for site, row in zip(self.sites, rows_LE)}

    def metrics(self, per_layer: int = 16) -> dict[str, float]:
        """
        Balance of the last optimizer step as plain numbers; reads them off the device, so call it when logging. Those of routers
        for images only, or in a vision tower, are apart: `vision/max_vio`, ..., and `vision/tokens`, what each of them routed.

        Args:
            per_layer (`int`, *optional*, defaults to `16`): At most so many layers, evenly spaced, are shown on their own.
        """
        values = self._load_metrics(self.last, per_layer)
        values["price_range"] = max(float(price.max() - price.min()) for price in self.prices().values())
        if self.has_bias:
            values["bias_range"] = max(float(bias.max() - bias.min()) for bias in self.biases().values())
        if self.config.coef > 0:
            values["balance_loss"] = float(self.last.balance / self.last.tokens.clamp(min=1))
        if self.config.schedule != "constant":
            values["coef"] = self.coef
        return values

    def _load_metrics(self, counts: Counts, per_layer: int) -> dict[str, float]:
        loads = self._by_layer(counts.load.cpu())
        tokens = float(counts.tokens)
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

    def learning_report(self) -> LearningReport:
        """Which routers and experts learn, and what the balancing gradient reaches."""
        return LearningReport(self.config.coef, [describe_router(site.name, self.root) for site in self.sites])

    # ------------------------------------------------------------------ one optimizer step

    def begin_step(
        self,
        micro_batches: Sequence[Any] | int,
        loss_scale: float | Tensor = 1.0,
        *,
        by_part: bool = False,
        share: float = 1.0,
    ) -> None:
        """
        Announces an optimizer step that has several micro-batches. Every data-parallel rank must call it.

        Args:
            micro_batches (`Sequence[Mapping]` or `int`):
                This rank's batches of the step, as they will be passed to the model: their tokens are counted, which
                makes the step exactly invariant to the split. A number instead says only how many there will be; each
                then gets the mean over its own tokens, divided by that number.
            loss_scale (`float` or `torch.Tensor`, *optional*, defaults to `1.0`):
                What gradients are divided by before the optimizer sees them, for scalers that are not torch's; the scale of
                a `GradScaler` is found without it.
            by_part (`bool`, *optional*, defaults to `False`): for trainers, whose forwards say which micro-batch they belong to.
            share (`float`, *optional*, defaults to `1.0`): of the coefficient, if more micro-batches will be announced.

        Raises:
            ValueError: if there is no micro-batch.
        """
        self.loop.begin(micro_batches, loss_scale, by_part, share)

    def step(self, skipped: bool | None = None) -> None:
        """
        Ends the optimizer step: its statistics are summed over the ranks and move means, prices and biases. Torch's optimizers
        end it by themselves, and a call after that does nothing; call it in loops with another kind of optimizer, on every rank.

        Args:
            skipped (`bool`, *optional*): whether the optimizer step was skipped, so that nothing is to move.

        Raises:
            ValueError: at the first step, if a router was never called or the price gradient reaches nothing.
        """
        self.loop.end(skipped)

    def check_finite(self) -> None:
        """Says if steps had non-finite statistics or other tokens than announced; reads the device."""
        self.loop.say_faults()

    def discard_step(self) -> None:
        """Forgets what has been counted since the last step: of a step that was given up, or an interrupted run."""
        self.loop.discard()

    def reset(self) -> None:
        """Begins anew, with even means, no prices and no bias of ours; a family's own bias stays."""
        self.duals.reset()
        self.duals.has_bias = self.config.bias_coef > 0
        self.loop = Loop(self)

    @property
    def is_open(self) -> bool:
        """Whether `begin_step` has announced the step under way."""
        return self.now.number is not None

    @property
    def is_trained_on(self) -> bool:
        """Whether a backward of the step under way has run."""
        return self.now.settled > 0

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
        return self.forwards.replaying()

    # ------------------------------------------------------------------ evaluation

    @property
    def is_evaluating(self) -> bool:
        """Whether an [`~PhiBalancer.evaluation`] is open."""
        return self.forwards.evaluation is not None

    @contextmanager
    def evaluation(self, generation: bool = False, eos_token_id: int | Sequence[int] | None = None) -> Iterator[None]:
        """
        While open, forwards that do not train are counted apart, for [`~PhiBalancer.eval_metrics`].

        Args:
            generation (`bool`, *optional*, defaults to `False`):
                Whether forwards with a cache are counted too, as in `model.generate`: each token of a prompt and each new
                token once; padding and rows that have ended never. Without it, forwards with a cache are not counted.
            eos_token_id (`int` or `Sequence[int]`, *optional*): ends a row; that of the model's generation config unless given.
        """
        end = None
        if generation:
            settings: Any = getattr(self.root, "generation_config", None)
            found = getattr(settings, "eos_token_id", None) if eos_token_id is None else eos_token_id
            end = [] if found is None else [found] if isinstance(found, int) else list(found)
        counts = Counts(self.duals.shape, self.duals.values.device, extra=1)
        outer, self.forwards.evaluation = self.forwards.evaluation, Evaluation(counts, end)
        try:
            yield
        finally:
            self.forwards.evaluation = outer

    def eval_metrics(self, per_layer: int = 16) -> dict[str, float]:
        """
        Balance over everything forwarded inside the open [`~PhiBalancer.evaluation`], over all ranks; with a selection bias of
        ours also `plain_max_vio`, MaxVio of what the routers would choose without it, as after a plain load.
        """
        if self.forwards.evaluation is None:
            raise RuntimeError("eval_metrics() is to be called inside `with balancer.evaluation():`.")
        counts = self.forwards.evaluation.counts.like()
        counts.flat.copy_(self.forwards.evaluation.counts.flat)
        self.sum_over_ranks(counts.flat)
        if not float(counts.tokens):
            return {}
        values = self._load_metrics(counts, per_layer)
        plain = self._by_layer(counts.extra[..., 0]).values()
        if self.has_bias and all(bool(load.any()) for load in plain):
            values["plain_max_vio"] = statistics.fmean(float(max_vio(load[None])) for load in plain)
            self.evaluated = {name: values[name] for name in ("max_vio", "plain_max_vio", "tokens") if name in values}
        return values

    # ------------------------------------------------------------------ set from outside, between steps

    @contextmanager
    def without_bias(self) -> Iterator[None]:
        """While open, selection biases that are ours do not act, as after a plain load; a family's own do."""
        had, self.ignores_bias = self.ignores_bias, True
        try:
            yield
        finally:
            self.ignores_bias = had

    def set_means(self, sums: Mapping[str, Mapping[str, Tensor]]) -> None:
        """
        Sets the means, and so the prices.

        Args:
            sums (`Mapping[str, Mapping[str, Tensor]]`):
                For `"probs"` and `"load"` the sum over tokens by layer name, each `(E,)`. A router without any keeps its mean.
        """
        self.duals.set_means({statistic: self._rows(by_layer) for statistic, by_layer in sums.items()})

    def set_biases(self, biases: Mapping[str, Tensor]) -> None:
        """Sets the selection biases by layer name, each `(E,)`; a family's own where it has one."""
        self.follow_adapter()
        self.duals.set_biases(self._rows(biases))

    def _rows(self, by_layer: Mapping[str, Tensor]) -> Tensor:
        rows = torch.zeros_like(self.duals.biases)
        for row, site in zip(rows, self.sites):
            row[: site.num_experts] = by_layer[site.name].to(row)
        return rows

    # ------------------------------------------------------------------ state

    def _own_names(self) -> list[str]:
        """Names of the routers relative to the backbone."""
        return [name.removeprefix(self.prefix) for name in self.layer_names]

    def state_dict(self) -> dict[str, Tensor]:
        """
        Means and biases by `"{router}.{mean_probs | mean_load | bias}"`, and the number of steps. Routers are named relative to
        the backbone, so that a model with a head and one without share their state.
        """
        self.follow_adapter()
        self.duals.read_native()
        state = {"steps": torch.tensor(self.steps)}
        for index, (name, site) in enumerate(zip(self._own_names(), self.sites)):
            for statistic in STATISTICS:
                state[f"{name}.mean_{statistic}"] = self.duals.mean(statistic)[index, : site.num_experts].cpu().clone()
            if self.has_bias:
                state[f"{name}.bias"] = self.duals.biases[index, : site.num_experts].cpu().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Restores what [`~PhiBalancer.state_dict`] returned; nothing is changed if it does not fit. A state without biases sets
        those that are ours to 0.

        Raises:
            ValueError: if a tensor is missing, of another type or shape, not finite, no distribution where it has to be one,
                or belongs to no router of this model.
        """
        self.find_copies()
        self.follow_adapter()
        state = fit_names(state, self._own_names())
        check_state(state, dict(zip(self._own_names(), (site.num_experts for site in self.sites))))
        biased = any(key.endswith(".bias") for key in state)
        duals = self.duals
        with torch.no_grad():
            for index, (name, site) in enumerate(zip(self._own_names(), self.sites)):
                for statistic in STATISTICS:
                    row = duals.mean(statistic)[index, : site.num_experts]
                    row.copy_(state[f"{name}.mean_{statistic}"])
                if biased or not site.has_native_bias:
                    duals.biases[index, : site.num_experts] = state[f"{name}.bias"].to(row) if biased else 0.0
        duals.has_bias = biased or self.config.bias_coef > 0
        if biased:
            duals.write_native()
        duals.steps = int(state.get("steps", 0))
        duals._set_price()

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.state` into `directory` (made if missing) and returns its path."""
        description = describe_model(self.root, self.sites, self._own_names())
        return save_state(self.state_dict(), self.config, description, directory)

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restores what [`~PhiBalancer.save`] wrote, from the file or from its directory.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or belongs to another model; the state is then as before.
        """
        self.load_state_dict(self._read(directory))

    def check(self, directory: str | os.PathLike) -> int:
        """
        Whether [`~PhiBalancer.load`] would take what is there, which raises what it would; changes nothing. Returns the number
        of optimizer steps behind it.
        """
        state = fit_names(self._read(directory), self._own_names())
        check_state(state, dict(zip(self._own_names(), (site.num_experts for site in self.sites))))
        return int(state["steps"]) if "steps" in state else 0

    def _read(self, directory: str | os.PathLike) -> dict[str, Tensor]:
        self.find_copies()
        found = read_state(directory)
        check_model(found.model, describe_model(self.root, self.sites, self._own_names()))
        return found.tensors
