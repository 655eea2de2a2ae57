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
from ..maths import BINS, max_vio, model_metrics
from ..routers import RouterSite, find_copies
from . import adapters, process
from .counts import Counts
from .duals import LOGIT_WIDTH, Duals
from .forwards import Evaluation, Forwards
from .learning import LearningReport, describe_router
from .ranks import Ranks, count_copies
from .refusals import check_first_step, check_ranks
from .state import check_model, check_state, describe_model, fit_names, read_state, save_state
from .step import OptimizerStep, check_numbers
from .tokens import announced_masks


logger = logging.get_logger(__name__)
SILENT = 8  # optimizer steps without a backward through the routers, after which that is said


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
        self._ranks = Ranks()
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
        self._owners: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._is_checked = False
        self.idle_steps = 0  # of optimizers that own parameters, since the last backward through the routers
        self._unseen_steps, self._version = 0, -1  # changes of the weights by no optimizer of torch's
        self._now: OptimizerStep | None = None  # made when asked for: in the middle of a copy there are no duals yet
        self._last: Counts | None = None
        self._noticed = self._faults = torch.zeros(2)  # steps with wrong N, and not finite
        self._said = [0, 0]

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "config",
            "sites",
            "duals",
            "prefix",
            "forwards",
            "_ranks",
            "evaluated",
            "virtual_tokens",
            "pad_token_id",
        )
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.ignores_bias = False
        self._begin()

    @property
    def now(self) -> OptimizerStep:
        """The optimizer step under way."""
        if self._now is None:
            self._now = OptimizerStep(Counts(self.duals.shape, self.duals.values.device, self._bins), self.ranks)
        return self._now

    @property
    def last(self) -> Counts:
        """What was counted in the last step, over all ranks."""
        if self._last is None:
            self._last = Counts(self.duals.shape, self.duals.values.device, self._bins)
        return self._last

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
            self._ranks.copies = count_copies(root)
            config = getattr(root, "config", None)
            self.pad_token_id = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)

    def set_config(self, config: PhiBalanceConfig) -> None:
        """Goes on with another configuration, in the middle of a step too."""
        bins = self._bins
        self.config, self._is_checked = config, False
        self.duals.set_config(config)
        if self._bins != bins:
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
        return self._ranks.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._ranks.group = group

    @property
    def ranks(self) -> int:
        """How many data-parallel ranks share a step."""
        return self._ranks.count

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` summed over the data-parallel ranks, in place."""
        self._ranks.sum_(values)
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
        number = micro_batches if isinstance(micro_batches, int) else len(micro_batches)
        if number < 1:
            raise ValueError(f"`micro_batches` must hold at least one micro-batch, got {micro_batches!r}.")
        if self.now.settled == 0:
            self._now = None
        elif self._is_given_up():
            self._give_up()
        elif self.now.number is not None:
            logger.warning_once(
                "begin_step() came again, but no optimizer of the model has stepped since the last one. The step goes on, over "
                "the end of a pass (epoch) through the data perhaps, and its coefficient is shared. If the optimizer is not "
                "one of torch's, call balancer.step() after it has stepped; after a step that was given up, discard_step()."
            )
        parts = None if isinstance(micro_batches, int) else [self._tokens_of(batch) for batch in micro_batches]
        if parts is None or any(part is None for part in parts):
            if parts is not None:
                logger.warning_once(
                    f"The micro-batches do not hold what token_mask={self.config.token_mask!r} needs; each will get the mean "
                    "over its own tokens instead of its exact share of the step's."
                )
            self.now.announce(number, loss_scale=loss_scale, share=share)
            return
        counted = [part for part in parts if part is not None]
        tokens = self._ranks.sum(torch.stack(counted).sum())
        self.now.announce(number, tokens, counted if by_part else None, loss_scale, share)

    def _tokens_of(self, batch: Any) -> Tensor | None:
        """Tokens of a micro-batch that count, `()`; `None` if it does not tell."""
        masks = announced_masks(batch, self.config.token_mask, self.pad_token_id)
        if not masks:
            return None
        device = self.duals.values.device
        number = torch.stack([mask.sum(dtype=torch.float32).to(device) for mask in masks]).sum()
        in_front = self.virtual_tokens if self.virtual_tokens and self.config.token_mask != "labels" else 0
        return number + in_front * sum(len(mask) for mask in masks)

    def step(self, skipped: bool | None = None) -> None:
        """
        Ends the optimizer step: its statistics are summed over the ranks and move means, prices and biases. Torch's optimizers
        end it by themselves, and a call after that does nothing; call it in loops with another kind of optimizer, on every rank.

        Args:
            skipped (`bool`, *optional*): whether the optimizer step was skipped, so that nothing is to move.

        Raises:
            ValueError: at the first step, if a router was never called or the price gradient reaches nothing.
        """
        self._end(skipped=skipped)

    def discard_step(self) -> None:
        """Forgets what has been counted since the last step: of a step that was given up, or an interrupted run."""
        self._now = None

    @contextmanager
    def step_aside(self) -> Iterator[None]:
        """While open, another step is under way; afterwards the present one goes on."""
        step, idle, self._now = self._now, self.idle_steps, None
        try:
            yield
        finally:
            self._now, self.idle_steps = step, idle

    def reset(self) -> None:
        """Begins anew, with even means, no prices and no bias of ours; a family's own bias stays."""
        self.duals.reset()
        self.duals.has_bias = self.config.bias_coef > 0
        self.discard_step()
        self._last = None

    @property
    def _bins(self) -> int:
        """Bins of the histograms that the method wants of each expert."""
        return BINS if self.config.rules.bias_rule == "quantile" and self.config.bias_coef > 0 else 0

    def continue_or_begin(self) -> None:
        """A training forward begins: in the step under way, or in a new one."""
        if self.now.counts.flat.device != self.duals.values.device:
            self._now = self._last = None
        elif self.now.settled and self.now.number is None and self._is_given_up():
            self._give_up()
        probe = next((p for p in self.root.parameters() if p.requires_grad), None)
        self._version = -1 if probe is None else probe._version

    def _give_up(self) -> None:
        """Forgets a step of whose gradients nothing is left; says if it looks as if an optimizer that is not torch's took it."""
        self._now = None
        probe = next((p for p in self.root.parameters() if p.requires_grad), None)
        self._unseen_steps += probe is None or (probe._version != self._version and not process.is_stepping)
        if self._unseen_steps == SILENT and probe is None:
            logger.warning(
                f"{type(self.root).__name__} trains nothing itself, so its means and biases do not move. If PEFT trains prompts in front "
                "of it, call phb.get_balancer(model) with the PEFT model."
            )
        elif self._unseen_steps == SILENT:
            logger.warning(
                f"The weights of {type(self.root).__name__} have changed {SILENT} times, but no optimizer of torch's has stepped, so "
                "the prices never move. Call phb.get_balancer(model).step() after the optimizer has stepped."
            )

    def _is_given_up(self) -> bool:
        """Whether nothing is left of the gradients of the step under way."""
        trained = [p for p in self.root.parameters() if p.requires_grad]
        if not trained:  # no optimizer will end its steps, but one of prompts
            return self.virtual_tokens is None
        return all(p.grad is None for p in trained)

    def _end(self, skipped: Tensor | bool | None = None) -> None:
        """
        Ends the step under way, on all ranks. `skipped` says if the optimizer has skipped it on this rank; a tensor, if only the
        device knows.
        """
        step, shared = self.now, self.ranks > 1
        if not step.settled and not (step.tokens is not None and shared):
            return
        self._now = None
        if skipped is True and not shared:
            return
        counts = step.counts
        if skipped is not None:
            counts.skipped.copy_((torch.as_tensor(skipped) != 0).any())
        if not self._is_checked:
            check_ranks(self.config, self.sites, self._ranks, counts)
        self.sum_over_ranks(counts.flat)
        if not self._is_checked:
            self.find_copies()
            self._is_checked = check_first_step(self.config, self.sites, counts, step.added, step.second_order)
        if self.config.adds_gradient and any(step.members) and not all(step.members):
            logger.warning_once(
                "A training forward that was alive during the backward got none of it, and was counted all the same, so the step received "
                "less than its coefficient. Run forwards for metrics under torch.no_grad(), or drop what they returned."
            )
        if step.second_order and not step.added and self.config.adds_gradient:
            logger.warning_once(
                "The backward of an optimizer step was run with create_graph=True alone, so the price gradient was not added in "
                "it; the means have moved."
            )
        self._unseen_steps = 0
        self._notice_faults(step, counts)
        self.duals.use_adapter(step.adapter)  # a reference may have run since, with the adapter off
        may_be_skipped = shared or isinstance(skipped, Tensor)
        self.duals.update(counts, may_be_skipped)
        self.follow_adapter()
        if may_be_skipped:  # what a skipped step counted is not shown
            counts.flat.copy_(torch.where(counts.skipped > 0, self.last.flat, counts.flat))
        self._last = counts

    def _notice_faults(self, step: OptimizerStep, counts: Counts) -> None:
        """Says if announced tokens were wrong, or statistics not finite, without waiting for the device: a step later."""
        if complaint := check_numbers(step):
            logger.warning_once(complaint)
        wrong = (
            torch.zeros_like(counts.tokens) if step.expected is None else (counts.tokens - step.expected).abs() > 0.5
        )
        bad = ~torch.isfinite(counts.flat).all()
        self._say_faults()
        self._faults = self._faults.to(counts.flat.device) + torch.stack(
            [wrong.to(torch.float32), bad.to(torch.float32)]
        )
        self._noticed = self._faults.to("cpu", non_blocking=True)

    def _say_faults(self) -> None:
        for index, (number, text) in enumerate(zip(self._noticed.tolist(), (WRONG_NUMBER, NOT_FINITE))):
            if number >= max(1, 2 * self._said[index]):  # at the first, then whenever it has doubled
                self._said[index] = int(number)
                logger.warning(text.format(int(number)))

    def check_finite(self) -> None:
        """Says if steps had non-finite statistics or other tokens than announced; reads the device."""
        self._noticed = self._faults.cpu()
        self._say_faults()

    # ------------------------------------------------------------------ what happens in the loop

    def is_owned_by(self, optimizer: Any) -> bool:
        """Whether `optimizer` has parameters of the model."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        number, owns = self._owners.get(optimizer, (-1, False))
        if number != len(parameters):
            own = {id(p) for p in self.root.parameters()}
            owns = any(id(p) in own for p in parameters)
            self._owners[optimizer] = len(parameters), owns
        return owns

    def optimizer_has_stepped(self, optimizer: Any, skipped: Tensor | None) -> None:
        """Ends the step that `optimizer` has made. With prompt learning the model trains nothing itself, so any optimizer does."""
        if not self.is_owned_by(optimizer) and not (self.now.settled and self.virtual_tokens is not None):
            return
        if self.now.settled == 0:
            self._say_silence()
        self._end(skipped)

    def scaler_has_updated(self, scaler: Any) -> None:
        """A `GradScaler` is done with its step; where no optimizer has ended ours, it was skipped."""
        if self.now.scaler is scaler:
            self._end(skipped=True)

    def _say_silence(self) -> None:
        self.idle_steps += 1
        if self.idle_steps != SILENT:
            return
        root = self.root
        if not any(p.requires_grad for site in self.sites for m in site.modules for p in m.parameters()):
            reason = "its routers are frozen, and nothing that lies below them is trained"
        elif self.backbone is not None and not self.backbone.training:
            reason = "it is in eval mode: call model.train() before training"
        else:
            reason = (
                f"no training forward of {type(root).__name__} had a backward: its layers run without it (a stage of "
                "torch.distributed.pipelining, which φ-balancing does not support), or under torch.no_grad()"
            )
        logger.warning(
            f"An optimizer of {type(root).__name__} has stepped {SILENT} times, and no gradient came back through its routers, so "
            f"nothing is balanced: {reason}."
        )

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


WRONG_NUMBER = (
    "{} optimizer step(s) so far had other tokens than begin_step() was told, so they received another coefficient than the "
    "configured one. Pass begin_step() the batches as the model gets them, or announce nothing where a step has one backward."
)
NOT_FINITE = (
    "The routing statistics of {} step(s) were not finite (the loss or the router logits diverged); they were left out of the "
    "means and prices. Lower the learning rate or check the data."
)
