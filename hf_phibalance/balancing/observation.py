"""
Forwards of a patched model that count no training step, add no gradient and leave everything as it was; and calibration by them.

Shapes: B sequences, S long; T = B·S tokens; E experts, k of them chosen.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import quoted
from ..maths import max_vio, price_of_load, score_slope, selection_threshold, step_within
from ..routers import find_backbone, image_tokens, mask_of, reading, unwrap
from .counts import Counts
from .duals import LOGIT_WIDTH
from .patching import get_balancer
from .tokens import count_mask, refuse_virtual_tokens


Batch = Mapping[str, Any]
OF_TRAINING = ("labels", "num_items_in_batch")  # in a batch, but no arguments of the backbone
ITERATIONS = 12  # of a calibration of the biases
FAINT = 1e-8  # slopes below are taken for this
RATE, FASTER, SLOWER = 0.3, 1.4, 0.5  # of an ascent
ENOUGH = 1.2  # times the MaxVio that is wanted
WIDEST = 8.0  # farthest that an expert is shifted: a factor of e^8 in its probability


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode inside it; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class RandomState:
    """A snapshot of the random number generators of this process."""

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


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of `model` are spread over ranks: by FSDP, tensor parallelism or DeepSpeed."""
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in unwrap(model))
    return flat or any(hasattr(p, "device_mesh") or hasattr(p, "ds_shape") for p in model.parameters())


def repeatable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Returns `batches`, or a list of them if they can be gone through only once."""
    return list(batches) if iter(batches) is batches else batches


@dataclass
class Measurement:
    """
    Loads and loss of a variant of a model, compared with the first variant.

    Attributes:
        loads (`dict[str, Tensor]`): assignments per expert by layer name, `(E,)`.
        changed (`dict[str, float]`): share of a layer's assignments that the first variant does not make.
        loss (`float`, *optional*):
            Mean over the tokens to be predicted, if it was asked for. Of a classifier, the mean cross-entropy of its predictions
            against those of the first variant; of a model with one score, the mean squared distance from that variant's.
        tokens (`int`): tokens that count.
    """

    loads: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    tokens: int = 0

    @property
    def max_vio(self) -> dict[str, float]:
        """MaxVio over all batches together, by layer name."""
        return {name: float(max_vio(load_E[None])) for name, load_E in self.loads.items()}

    @property
    def max_vio_global(self) -> float:
        """Mean MaxVio over the layers."""
        return statistics.fmean(self.max_vio.values())

    @property
    def changed_share(self) -> float:
        """Share of all assignments that the first variant does not make."""
        return statistics.fmean(self.changed.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as plain numbers, without the loads."""
        figures = {"loss": self.loss, "max_vio_global": self.max_vio_global}
        return {**figures, "changed": self.changed_share, "tokens": self.tokens}


class Observation:
    """
    Reads the routers of a patched model; made by [`observing`].

    Attributes:
        mask (`torch.Tensor` of shape `(T,)`):
            Which tokens of the current forward count, as booleans; [`~Observation.mask_of`] returns those that reach a router.
        on_choice (`Callable[[int, Tensor, Tensor], None]`, *optional*):
            Called with the number of a router, its logits `(T, E)` and its choice `(T, k)`.
        hidden (`dict[int, Tensor]`): by number, the last input of each router, or of its experts.
    """

    is_idle = False

    def __init__(self, model: nn.Module) -> None:
        self.balancer = get_balancer(model)
        self.root, self.sites = self.balancer.root, self.balancer.sites
        self._model = model
        # a sharded model has to be entered from outside
        self._headless = model if is_sharded(model) else find_backbone(self.root, self.sites)
        self.mask = torch.zeros(0, dtype=torch.bool)
        self._image: Tensor | None = None
        self.on_choice: Callable[[int, Tensor, Tensor], None] | None = None
        self.hidden: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return next(p.device for p in self.root.parameters() if p.device.type != "meta")

    def forward(self, batch: Batch, with_head: bool = False) -> Any:
        """Runs the model on `batch`, without its labels; `with_head`: up to the logits of the vocabulary."""
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"`batches` must be batches as the model gets them, such as {{'input_ids': ...}}, but one of them is "
                f"{quoted(batch)}. If you have a single batch, pass [batch]."
            )
        batch = {name: part.to(self.device) if isinstance(part, Tensor) else part for name, part in batch.items()}
        kind = self.balancer.config.token_mask
        mask_BS = count_mask(batch, kind)
        if mask_BS is None:
            raise ValueError(
                f"a batch holds {sorted(batch)}, which does not tell the tokens that count (token_mask={kind!r}): give batches "
                f"with input_ids{', and labels' if kind == 'labels' else ''}, as the model gets them."
            )
        self.mask, self._image = mask_BS.reshape(-1), image_tokens(batch, self.sites)
        self.hidden.clear()
        inputs = {name: part for name, part in batch.items() if name not in OF_TRAINING}
        with self.balancer.forwards.labels_of(batch.get("labels")):
            return (self._model if with_head else self._headless)(**inputs, use_cache=False)

    def mask_of(self, index: int, routed: int) -> Tensor:
        """Returns which of the `routed` vectors that reach router `index` count, `(routed,)` as booleans."""
        mask_T = mask_of(self.sites[index], self.mask, self._image, routed)
        if mask_T.numel() != routed:
            raise ValueError(
                f"router {self.sites[index].name!r} routed {routed} vectors where {mask_T.numel()} tokens were expected: this "
                "model routes something else than its tokens."
            )
        return mask_T

    # called by the hooks, as a `RouterReader`

    @property
    def owner(self) -> nn.Module:
        return self.root

    def choice_bias(self, index: int) -> Tensor | None:
        return self.balancer.forwards.choice_bias(index)

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        if hidden is not None:
            self.hidden[index] = hidden
        if self.on_choice is not None:
            self.on_choice(index, logits, selected.reshape(len(logits), -1))
        return carrier


@contextmanager
def observing(model: nn.Module) -> Iterator[Observation]:
    """
    Context manager: yields an [`Observation`], whose forwards run in eval mode and uncompiled, without gradients. Restores the
    random numbers. Raises `ValueError` if the model is not patched, or PEFT puts virtual tokens in front of its batches.
    """
    balancer = get_balancer(model)
    if balancer.is_trained_on:
        raise RuntimeError(
            "an optimizer step is under way, whose gradients belong to the routers as they are: call this between two "
            "steps, after balancer.step()."
        )
    refuse_virtual_tokens(model)
    observed, before = Observation(model), RandomState()
    try:
        with evaluating(balancer.root), torch.no_grad(), torch.compiler.set_stance("force_eager"), reading(observed):
            yield observed
    finally:
        before.restore()


# ---------------------------------------------------------------------- calibration


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Batch], bias: bool = False, *, iterations: int = ITERATIONS
) -> Measurement:
    """
    Sets the running means of a patched model, and so its prices, to those of `batches`, instead of beginning uniform. Weights,
    gradients, random numbers and the number of steps stay. With `bias`, also finds the selection bias under which the loads
    of these batches are even.

    ```python
    phb.patch(model, {"coef": 0.01, "bias_coef": 0.003})
    phb.calibrate(model, [next(batches) for _ in range(8)], bias=True)
    ```

    Args:
        model (`torch.nn.Module`): the patched model.
        batches (`Iterable[Mapping]`):
            Arguments of the model, as it will be trained. With several ranks each passes its own, and all tokens have the same
            weight.
        bias (`bool`, *optional*, defaults to `False`): whether to set the selection bias as well.
        iterations (`int`, *optional*, defaults to `12`): passes over `batches` that this takes.

    Returns:
        `Measurement`: the loads of `batches` over all ranks under the new means and biases, with their MaxVio.

    Raises:
        ValueError: if the model is not patched, `batches` hold no token that counts, or there is no bias to set.
        RuntimeError: in the middle of an optimizer step.
    """
    balancer = get_balancer(model)
    if bias and not balancer.config.bias_coef:
        raise ValueError(
            "bias=True, but `bias_coef` is 0: nothing would move the bias afterwards. Patch the model with bias_coef > 0 "
            "(0.003, or the method's own), or leave the bias out."
        )
    if bias:
        batches = repeatable(batches)
        _even_out(model, batches, iterations)
    counts, _ = _count(model, batches)
    balancer.duals.set_means(counts.sums)
    loads = {site.name: row[: site.num_experts].double().cpu() for site, row in zip(balancer.sites, counts.load)}
    return Measurement(loads=loads, tokens=int(counts.tokens))


def _count(model: nn.Module, batches: Iterable[Batch], with_slopes: bool = False) -> tuple[Counts, list[float]]:
    """
    Counts `batches` in an evaluation, over all ranks. With slopes: also returns how steep each router's scores are at its selection
    threshold, in the geometric mean over the tokens, since a few sure tokens must not set the pace.
    """
    with observing(model) as observed, observed.balancer.evaluation() as counts:
        exact = torch.float32 if observed.device.type == "mps" else torch.float64
        log_slopes = torch.zeros(len(observed.sites), dtype=exact, device=observed.device)

        def add_slopes(index: int, scores: Tensor) -> None:
            site, bias_E = observed.sites[index], observed.choice_bias(index)
            scores_TE = scores.reshape(-1, site.num_experts).float()
            scores_NE = scores_TE[observed.mask_of(index, len(scores_TE)).to(scores.device)]
            biased_NE = scores_NE if bias_E is None else scores_NE + bias_E.to(scores_NE)
            bounded = bool(((scores_NE >= 0) & (scores_NE <= 1)).all())
            ranked = ("sigmoid" if site.scoring == "sigmoid" else "probs") if bounded else "logits"
            slope_N1 = score_slope(selection_threshold(biased_NE, site.top_k), ranked)
            log_slopes[index] += slope_N1.clamp(min=FAINT).log().sum().to(log_slopes)

        with observed.balancer.forwards.showing_scores(add_slopes) if with_slopes else nullcontext():
            for batch in batches:
                observed.forward(batch)
        observed.balancer.sum_over_ranks(counts.flat)
        observed.balancer.sum_over_ranks(log_slopes)
    if not counts.tokens:
        raise ValueError("there is nothing to calibrate on: `batches` hold no token that counts.")
    routed = [load_E.sum() / site.top_k for load_E, site in zip(counts.load, observed.sites)]
    return counts, [float((total / number.clamp(min=1)).exp()) for total, number in zip(log_slopes, routed)]


def _even_out(model: nn.Module, batches: Iterable[Batch], iterations: int) -> None:
    """Moves the biases from where they are to where the loads of `batches` are even."""
    balancer = get_balancer(model)
    start, sites = balancer.biases(), balancer.sites
    ascent = Ascent([site.num_experts for site in sites])
    slopes: list[float] = []  # change of what the router ranks, per change of its logits

    def move(shifts: Sequence[Tensor]) -> None:
        biases = {}
        for (name, bias_E), site, slope, shift_E in zip(start.items(), sites, slopes, shifts):
            reach_E = torch.full_like(bias_E, site.score_width or LOGIT_WIDTH)
            biases[name] = step_within(bias_E[None], (slope * shift_E).to(bias_E)[None], reach_E[None])[0]
        balancer.set_biases(biases)

    for _ in range(iterations):
        counts, found = _count(model, batches, with_slopes=not slopes)
        slopes = slopes or found
        ascent.tell([row[: site.num_experts] for row, site in zip(counts.load, sites)])
        move(ascent.ask())
    move(ascent.best)


class Ascent:
    """
    Dual ascent by counting alone: finds the shifts of each layer's logits under which its experts get the wanted load.

    The load of an expert grows with its shift, but how fast is unknown. So each expert has a rate of its own, which grows while
    its price keeps its sign and shrinks when that turns (as in Rprop), and each layer ends with its best shifts. A layer that is
    nearly as even as wanted stays where it is.

    Args:
        sizes (`Sequence[int]`): number of experts of each layer.
        wanted (`Sequence[torch.Tensor]`, *optional*): the wanted loads `(E,)`; even ones unless given.
    """

    def __init__(self, sizes: Sequence[int], wanted: Sequence[Tensor] | None = None) -> None:
        self._wanted = None if wanted is None else [load_E.double().cpu() for load_E in wanted]
        self.best = [torch.zeros(size, dtype=torch.float64) for size in sizes]  # shifts (E,)
        self._spread = [float("inf")] * len(sizes)  # of the prices there
        self._shift = list(self.best)  # asked for last
        self._price = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self._rate = [torch.full((size,), RATE, dtype=torch.float64) for size in sizes]

    def tell(self, loads: Sequence[Tensor]) -> None:
        """Takes the loads `(E,)` under the shifts that were asked for last, at first under none."""
        for layer, load_E in enumerate(loads):
            load_E = load_E.double().cpu()
            wanted_E = torch.ones_like(load_E) if self._wanted is None else self._wanted[layer]
            price_E, last_E = price_of_load(load_E, wanted_E), self._price[layer]
            spread = float(price_E.square().mean())
            if spread < self._spread[layer]:
                self.best[layer], self._spread[layer] = self._shift[layer], spread
            turns = price_E * last_E
            self._rate[layer] *= torch.where(turns > 0, FASTER, torch.where(turns < 0, SLOWER, 1.0))
            is_enough = float(max_vio(load_E)) <= ENOUGH * float(max_vio(wanted_E))
            self._price[layer] = torch.zeros_like(price_E) if is_enough else price_E

    def ask(self) -> list[Tensor]:
        """Returns the shifts to try next, `(E,)` of each layer."""
        steps = zip(self._shift, self._rate, self._price)
        self._shift = [(shift_E - rate_E * price_E).clamp(-WIDEST, WIDEST) for shift_E, rate_E, price_E in steps]
        return self._shift
