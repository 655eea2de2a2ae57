"""The balancer of a patched model: prices, loads and biases to read, optimizer steps, evaluations, and the state to save."""

from __future__ import annotations

import copy
import os
import statistics
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import STATISTICS, PhiBalanceConfig
from ..files import quoted
from ..maths import max_vio
from ..routers import RouterSite, canonical_name, find_copies
from . import process
from .checks import LearningReport, describe_router
from .counts import Counts, Figures
from .duals import Duals, active_adapter, find_adapter_layer
from .forwards import Evaluation, Forwards
from .loop import Loop
from .state import check_model, check_state, describe_model, fit_names, read_state, save_state
from .step import OptimizerStep


class PhiBalancer:
    """
    Balances the routers of a model. [`patch`] makes it, [`get_balancer`] finds it.

    A raw training loop needs no call: an optimizer step ends when a torch optimizer that owns parameters of the model has
    stepped. Only gradient accumulation needs `begin_step`, so that the weight of each token is known:

    ```python
    balancer = phb.get_balancer(model)
    for micro_batches in steps:
        balancer.begin_step(micro_batches)
        for batch in micro_batches:
            (model(**batch).loss / len(micro_batches)).backward()
        optimizer.step(); optimizer.zero_grad()
    ```

    Args:
        sites (`Sequence[RouterSite]`): the routers, by their names in the model.
        duals (`Duals`): means, prices and biases; a submodule of the backbone.
        prefix (`str`): path of the backbone in the model, with a dot at its end, or `""`.
    """

    def __init__(self, sites: Sequence[RouterSite], duals: Duals, prefix: str) -> None:
        self.sites, self.duals, self.prefix = list(sites), duals, prefix
        duals.balancer = self
        self.forwards = Forwards(self)
        self.copies = 1  # this many ranks hold the same tokens, which count once
        self.evaluated: dict[str, float] = {}  # MaxVio of the last evaluation, with and without our own bias
        self.virtual_tokens: int | None = None  # tokens that PEFT's prompt learning puts in front of each row
        self.pad_token_id: int | None = None
        self._begin()

    def _begin(self) -> None:
        """Sets the state of a balancer without a model and without steps."""
        self.ignores_bias = False
        self._group: dist.ProcessGroup | None = None
        self._backbone: weakref.ref[nn.Module] | None = None
        self._is_bound = False
        self._root: weakref.ref[nn.Module] | None = None
        self._adapter_layer: weakref.ref[nn.Module] | None = None
        self._adapter_names: tuple[str, ...] = ()
        self._is_held = False
        self.watcher: Callable[[Counts], None] | None = None  # called with the counts of each optimizer step
        self.measures_confidence = False  # whether forwards also sum how sure the routers are
        self.loop = Loop(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"sites", "duals", "prefix", "forwards", "copies", "evaluated", "virtual_tokens", "pad_token_id"}
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> PhiBalancer:
        """Returns the balancer of the copy that is being made of the model. It is bound when the copy is first used."""
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        backbone = memo.get(id(self.backbone))
        twin._backbone = None if backbone is None else weakref.ref(backbone)
        return twin

    @property
    def config(self) -> PhiBalanceConfig:
        """The configuration. [`patch`] changes it."""
        return self.duals.config

    @config.setter
    def config(self, config: Any) -> None:
        raise AttributeError(
            "The configuration of a balancer is not set: phb.patch(model, config) changes it and all that follows from it."
        )

    def set_config(self, config: PhiBalanceConfig) -> None:
        """Changes the configuration, also in the middle of a step. For [`patch`], which checks it first."""
        bins = self.loop.bins
        self.duals.set_config(config)
        self.loop.is_checked = False
        if self.loop.bins != bins:
            self.discard_step()

    # ------------------------------------------------------------------ its model

    @property
    def backbone(self) -> nn.Module | None:
        """The model without its head; `None` once it is gone."""
        return None if self._backbone is None else self._backbone()

    @property
    def root(self) -> nn.Module:
        """The transformers model that was patched, or its backbone if the model around it is gone."""
        root = None if self._root is None else self._root()
        found = self.backbone if root is None else root
        if found is None:
            raise RuntimeError(
                "the model of this balancer is gone. Keep a variable that holds it, as long as you use the balancer."
            )
        return found

    @property
    def has_root(self) -> bool:
        """Whether the model around the backbone is known and alive."""
        return self._root is not None and self._root() is not None

    def bind(self, backbone: nn.Module, root: nn.Module | None = None) -> None:
        """Makes this the balancer of `backbone` in the transformers model `root`. A copied balancer is not bound yet."""
        if self.backbone is not backbone or not self._is_bound:
            self._backbone, self._is_bound = weakref.ref(backbone), True
            find_copies(backbone, self.sites, self.prefix)
            self._adapter_layer = find_adapter_layer(backbone)
            process.follow(self)
        if root is not None and (self._root is None or self._root() is not root):
            self._root = weakref.ref(root)
            prefix = prefix_of(backbone, root)
            for site in self.sites:
                site.name = f"{prefix}{site.name.removeprefix(self.prefix)}"
            self.prefix = prefix
            self.copies = count_copies(root)
            config = getattr(root, "config", None)
            self.pad_token_id = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)

    def find_copies(self) -> None:
        """Searches the backbone again for the modules of the routers."""
        if self.backbone is not None:
            find_copies(self.backbone, self.sites, self.prefix)

    def follow_adapter(self) -> None:
        """Puts the selection bias of the active adapter in force."""
        if self._is_held:
            return
        names = tuple(getattr(self.root, "peft_config", ()))
        if names != self._adapter_names:  # PEFT may have copied routers
            self._adapter_names = names
            self.find_copies()
        if names and (self._adapter_layer is None or self._adapter_layer() is None):
            self._adapter_layer = find_adapter_layer(self.root)
        self.duals.use_adapter(active_adapter(self._adapter_layer))

    @contextmanager
    def using_adapter(self, adapter: str | None) -> Iterator[None]:
        """Context manager: inside it the selection bias of `adapter` is in force, whichever adapter is switched on."""
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
        The data-parallel ranks, which average gradients and hold different tokens. `None` for all ranks. Ranks over which
        transformers has split one model (`tp_plan`, `DistributedConfig`) hold the same tokens and count once.

        In DiLoCo or local SGD each rank steps alone and weights are averaged only now and then. Set
        `balancer.process_group = torch.distributed.new_subgroups(1)[0]`, average `state_dict()` together with the weights, and
        pass the average to `load_state_dict()`.
        """
        return self._group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"`process_group` must be a torch.distributed.ProcessGroup, got {quoted(group)}. Of a DeviceMesh take "
                "mesh.get_group(name of the data-parallel dimension)."
            )
        self._group = group

    @property
    def world_size(self) -> int:
        """Number of ranks in the process group."""
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def ranks(self) -> int:
        """Number of data-parallel ranks: those that hold different tokens."""
        return self.world_size // self.copies if self._group is None and self.world_size > 1 else self.world_size

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sums `values` over the data-parallel ranks, in place, and returns them."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._group)
        return values.div_(self.world_size // self.ranks) if self.ranks < self.world_size else values

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
        """Coefficient of the price gradient in the current step, by the schedule of the configuration."""
        return self.config.coef_at(self.duals.begun)

    @property
    def has_bias(self) -> bool:
        """Whether a selection bias is in force."""
        return self.duals.has_bias

    @property
    def is_saved(self) -> bool:
        """Whether the model is saved with a state. One that only counts, and has no selection bias of ours, has none."""
        return self.has_bias or not self.config.only_counts

    def means(self, statistic: str | None = None) -> dict[str, Tensor]:
        """EMA m of the routing distribution, of `"probs"` or `"load"` (default: `config.track`), by layer name, each `(E,)` fp32."""
        statistic = statistic or self.config.track
        if statistic not in STATISTICS:
            raise ValueError(f"`statistic` must be one of {STATISTICS}, got {statistic!r}.")
        return self._by_layer(self.duals.mean(statistic))

    def prices(self) -> dict[str, Tensor]:
        """Centred prices q of the gradient by layer name, each `(E,)` fp32."""
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

    def figures(self) -> Figures:
        """Returns the balance of the last optimizer step, on the device. A sum over steps can be given to [`~PhiBalancer.metrics`]."""
        return Figures.of(self.last, self.sites)

    def metrics(self, per_layer: int = 0, figures: Figures | None = None) -> dict[str, float]:
        """
        Returns the balance of the last optimizer step as plain numbers; the table in `counts.py` says which. Reads the device, so
        call it only when logging. Routers for images, or in a vision tower, have their own: `vision/max_vio`, `vision/tokens`, ...

        Args:
            per_layer (`int`, *optional*, defaults to `0`): at most this many layers, evenly spaced, get metrics of their own.
            figures (`Figures`, *optional*): sum of the figures of several steps, to get their mean.
        """
        figures = figures or self.figures()
        values = figures.means(self.sites, per_layer)
        if self.config.coef > 0:
            values["balance_loss"] = float(figures.totals[1]) / figures.steps
            values["price_range"] = max(float(price.max() - price.min()) for price in self.prices().values())
        if self.has_bias:
            values["bias_range"] = max(float(bias.max() - bias.min()) for bias in self.biases().values())
        if self.config.schedule != "constant":
            values["coef"] = self.coef
        return values

    def learning_report(self) -> LearningReport:
        """Reports which routers and experts learn, and which parameters the balancing gradient reaches."""
        return LearningReport(self.config.coef, [describe_router(site.name, self.root) for site in self.sites])

    # ------------------------------------------------------------------ one optimizer step

    @property
    def now(self) -> OptimizerStep:
        """The current optimizer step."""
        return self.loop.now

    @property
    def last(self) -> Counts:
        """Counts of the last step, over all ranks."""
        return self.loop.last

    def begin_step(self, micro_batches: Sequence[Any] | int, *, by_part: bool = False, share: float = 1.0) -> None:
        """
        Announces an optimizer step that has several micro-batches. Every data-parallel rank must call it.

        Args:
            micro_batches (`Sequence[Mapping]` or `int`):
                This rank's batches of the step, as they will be passed to the model. Their tokens are counted, so the gradient
                does not depend on the split into micro-batches. If only their number is given, each gets the mean over its own
                tokens, divided by that number.
            by_part (`bool`, *optional*, defaults to `False`): for trainers, whose forwards say which micro-batch they belong to.
            share (`float`, *optional*, defaults to `1.0`): share of the coefficient, if more micro-batches will be announced.

        Raises:
            ValueError: if there is no micro-batch.
        """
        self.loop.begin(micro_batches, by_part, share)

    def step(self, skipped: bool | None = None) -> None:
        """
        Ends the optimizer step: sums its statistics over the ranks and moves means, prices and biases; nothing if it was `skipped`.
        Torch's optimizers call it by themselves, and a second call does nothing. With any other optimizer call it after each
        step, on every rank.

        Raises:
            ValueError: at the first step, if a router was never called or the price gradient reaches nothing.
        """
        self.loop.end(skipped)

    def check_finite(self) -> None:
        """Warns of steps that had non-finite statistics or other tokens than announced. Reads the device."""
        self.loop.say_faults()

    def discard_step(self) -> None:
        """Discards the counts since the last step, after a step that was given up or a run that was interrupted."""
        self.loop.discard()

    def reset(self) -> None:
        """Resets to uniform means, zero prices and no selection bias. A family's own bias stays."""
        self.duals.reset()
        self.loop = Loop(self)

    @property
    def is_open(self) -> bool:
        """Whether `begin_step` has announced the current step."""
        return self.now.number is not None

    @property
    def is_trained_on(self) -> bool:
        """Whether a backward of the current step has run."""
        return self.now.settled > 0

    def replaying(self) -> AbstractContextManager[None]:
        """
        Context manager for forwards whose experts are chosen from outside, as in reinforcement learning that replays the experts
        of its rollout: there the router returns indices that are not its own top-k. They count as load, and the price acts on the
        probabilities as always. The selection bias does not act here, and does not move in this optimizer step. Run only the
        forwards of the update inside, not those of the rollout:

        ```python
        class ReplayingTrainer(GRPOTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                with phb.get_balancer(model).replaying(), replay(model, inputs["routed_experts"]):
                    return super().compute_loss(model, inputs, *args, **kwargs)
        ```

        Here `replay` is the trainer's own way to make the routers return these experts and their weights. If any data-parallel
        rank replays any micro-batch of a step, the biases stay the same on all ranks.
        """
        return self.forwards.replaying()

    # ------------------------------------------------------------------ evaluation

    @contextmanager
    def evaluation(self, generation: bool = False) -> Iterator[Counts]:
        """
        Context manager: counts forwards without gradients inside it, for [`~PhiBalancer.eval_metrics`]. Yields this rank's counts.

        Args:
            generation (`bool`, *optional*, defaults to `False`):
                Whether to count forwards with a cache too, as in `model.generate`: each token of a prompt and each new token once,
                padding and rows that have ended never.
        """
        end = None
        if generation:
            found: Any = getattr(getattr(self.root, "generation_config", None), "eos_token_id", None)
            end = [] if found is None else [found] if isinstance(found, int) else list(found)
        counts = Counts(self.duals.shape, self.duals.values.device, extra=1)
        outer, self.forwards.evaluation = self.forwards.evaluation, Evaluation(counts, end)
        try:
            yield counts
        finally:
            self.forwards.evaluation = outer

    def eval_metrics(self, per_layer: int = 0) -> dict[str, float]:
        """
        Returns the balance of all forwards in the open [`~PhiBalancer.evaluation`], over all ranks. With a selection bias of
        ours it includes `plain_max_vio`: MaxVio without this bias, as after a plain load.
        """
        if self.forwards.evaluation is None:
            raise RuntimeError("eval_metrics() is to be called inside `with balancer.evaluation():`.")
        counts = self.forwards.evaluation.counts.like()
        counts.flat.copy_(self.forwards.evaluation.counts.flat)
        self.sum_over_ranks(counts.flat)
        if not float(counts.tokens):
            return {}
        values = Figures.of(counts, self.sites).means(self.sites, per_layer)
        plain = self._by_layer(counts.extra[..., 0]).values()
        if self.has_bias and all(bool(load.any()) for load in plain):
            values["plain_max_vio"] = statistics.fmean(float(max_vio(load[None])) for load in plain)
            self.evaluated = {name: values[name] for name in ("max_vio", "plain_max_vio", "tokens") if name in values}
        return values

    @contextmanager
    def without_bias(self) -> Iterator[None]:
        """Context manager: inside it our selection biases do not act, as after a plain load. A family's own do."""
        had, self.ignores_bias = self.ignores_bias, True
        try:
            yield
        finally:
            self.ignores_bias = had

    def set_biases(self, biases: Mapping[str, Tensor]) -> None:
        """Sets the selection biases by layer name, each `(E,)`, in the family's own tensor where it has one."""
        self.follow_adapter()
        self.duals.set_biases(self._rows(biases))

    def _rows(self, by_layer: Mapping[str, Tensor]) -> Tensor:
        rows_LE = torch.zeros_like(self.duals.biases)
        for row, site in zip(rows_LE, self.sites):
            row[: site.num_experts] = by_layer[site.name].to(row)
        return rows_LE

    # ------------------------------------------------------------------ state

    def names_in_backbone(self) -> list[str]:
        """Names of the routers relative to the backbone."""
        return [name.removeprefix(self.prefix) for name in self.layer_names]

    def _state_rows(self) -> Iterator[tuple[str, RouterSite, Tensor]]:
        """Yields the name in the state, the router and the row `(E,)` of the duals, of each mean and each bias."""
        rows = {f"mean_{statistic}": self.duals.mean(statistic) for statistic in STATISTICS} | {
            "bias": self.duals.biases
        }
        for kind, rows_LE in rows.items():
            for name, site, row in zip(self.names_in_backbone(), self.sites, rows_LE):
                yield f"{name}.{kind}", site, row[: site.num_experts]

    def state_dict(self) -> dict[str, Tensor]:
        """
        Returns means and biases as `"{router}.{mean_probs | mean_load | bias}"`, and the number of steps. Names are relative to
        the backbone, so the state fits a model with and without a head.
        """
        self.follow_adapter()
        self.duals.read_native()
        rows = {
            key: row.cpu().clone() for key, _, row in self._state_rows() if self.has_bias or not key.endswith(".bias")
        }
        return {"steps": torch.tensor(self.steps), **rows}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Restores the state of [`~PhiBalancer.state_dict`]. Without biases in it, our selection biases become 0. Changes nothing and
        raises `ValueError` if a tensor is missing, of another type or shape, not finite, no distribution where it has to be one, or
        belongs to no router of this model.
        """
        self.find_copies()
        self.follow_adapter()
        state = self._fitted(state)
        has_bias = any(key.endswith(".bias") for key in state)
        for key, site, row in self._state_rows():
            if key in state:
                row.copy_(state[key])
            elif not site.has_native_bias:
                row.zero_()
        self.duals.has_bias = has_bias or self.config.bias_coef > 0
        if has_bias:
            self.duals.write_native()
        self.duals.steps = int(state.get("steps", 0))
        self.duals.set_price()

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.state` into `directory` (made if missing) and returns its path."""
        description = describe_model(self.root, self.sites, self.names_in_backbone())
        return save_state(self.state_dict(), self.config, description, directory)

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restores the file that [`~PhiBalancer.save`] wrote, given its path or its directory. Changes nothing and raises
        `FileNotFoundError` without a file, or `ValueError` if it is damaged or belongs to another model.
        """
        self.load_state_dict(self._read(directory))

    def check(self, directory: str | os.PathLike) -> int:
        """Raises what [`~PhiBalancer.load`] would raise, changes nothing, and returns the number of steps in the file."""
        return int(self._fitted(self._read(directory)).get("steps", 0))

    def _fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns `state` under this model's names; raises `ValueError` if it does not fit."""
        names = self.names_in_backbone()
        state = fit_names(state, names)
        check_state(state, dict(zip(names, (site.num_experts for site in self.sites))))
        return state

    def _read(self, directory: str | os.PathLike) -> dict[str, Tensor]:
        self.find_copies()
        found = read_state(directory)
        check_model(found.model, describe_model(self.root, self.sites, self.names_in_backbone()))
        return found.tensors


def prefix_of(backbone: nn.Module | None, root: nn.Module) -> str:
    """Returns the path of `backbone` in `root`, with a dot at its end, or `""`."""
    name = canonical_name(next(name for name, module in root.named_modules() if module is backbone))
    return f"{name}." if name else ""


def count_copies(root: nn.Module) -> int:
    """Returns how many ranks get the same tokens because transformers has split `root` over them."""
    if getattr(root, "_device_mesh", None) is None:
        return 1
    sizes = getattr(getattr(root, "config", None), "distributed_config", None)  # transformers 5.16 has it only there
    return getattr(root, "_tp_size", None) or getattr(sizes, "tp_size", None) or 1
