"""A selection bias folded into the routers' weights, so that a plain load routes nearly as training did.

Families without a bias slot lose the bias of [`PhiBalancer`] wherever the model is served without this package. How it
becomes a part of the weight, and why that is possible at all, is told in `maths/folding.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import Ascent, Batch, Look, Measurement, PhiBalancer, get_balancer, looking, repeatable
from ..files import layer_labels
from ..maths import FoldedShift, ShiftMoments, fold_shift, logit_shift, selection_threshold
from ..routers import RouterLinear, find_linear, has_adapter, ranked_of
from .comparison import Variant, compare


LINEAR = 0.1  # greatest distance between what a router ranks and what its matrix makes, beyond all rounding


@dataclass(frozen=True)
class FoldReport:
    """
    What [`fold`] did.

    Attributes:
        r2 (`dict[str, float]`): by layer name, how constant the inputs of its router can be made by one direction, which
            is what a bias in the weight lives on; 1 where the router has a bias of its own.
        explained (`dict[str, float]`): share of the shifts, which depend on the token, that the new weight explains.
        biased (`Measurement`), dropped (`Measurement`), folded (`Measurement`):
            with the bias; without it, as a plain load was before; and as the model is now.
        held_out (`bool`): whether these were measured on other batches than those that were fitted.
    """

    r2: dict[str, float]
    explained: dict[str, float]
    biased: Measurement
    dropped: Measurement
    folded: Measurement
    held_out: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        layers = {
            name: {
                "r2": self.r2[name],
                "explained": self.explained[name],
                "changed": self.folded.changed[name],
                **{
                    f"max_vio_{variant}": getattr(self, variant).max_vio[name]
                    for variant in ("biased", "dropped", "folded")
                },
            }
            for name in self.r2
        }
        figures = {variant: getattr(self, variant).to_dict() for variant in ("biased", "dropped", "folded")}
        return {**figures, "held_out": self.held_out, "layers": layers}

    def __str__(self) -> str:
        where = "other batches" if self.held_out else "the same batches"
        lines = [
            f"The selection bias of {len(self.r2)} routers is in their weights. MaxVio on {where} "
            f"({self.folded.tokens:,} tokens): {self.biased.max_vio_global:.3f} with the bias, "
            f"{self.dropped.max_vio_global:.3f} without, {self.folded.max_vio_global:.3f} folded; "
            f"{self.folded.changed_share:.1%} of the assignments are others than with the bias "
            f"({self.dropped.changed_share:.1%} without it)."
        ]
        for name, label in zip(self.r2, layer_labels(list(self.r2))):
            lines.append(
                f"  {label}: r² {self.r2[name]:.3f}, MaxVio {self.biased.max_vio[name]:.3f} -> "
                f"{self.folded.max_vio[name]:.3f}, {self.folded.changed[name]:.1%} changed"
            )
        return "\n".join(lines)


@torch.no_grad()
def fold(
    model: nn.Module, batches: Iterable[Batch], rebalance: int = 0, *, held_out: Iterable[Batch] | None = None
) -> FoldReport:
    """
    Folds the selection bias of a patched model into the weights of its routers, in place, by forwards alone: the bias is
    zero afterwards, and a plain load routes as the model does now. The choice is not quite that of the bias, see
    `FoldReport`. For families without a bias of their own (`phb.supported_families()`: "re-selected").

    Nothing else changes: training may go on, also with the same optimizer.

    ```python
    report = phb.fold(model, [{"input_ids": ids} for ids in some_texts])
    print(report)
    ```

    Args:
        model (`torch.nn.Module`): the patched model, whole in this process.
        batches (`Iterable[Mapping]`):
            What the model takes (`input_ids`, and `attention_mask` where there is padding), of texts as it will see them;
            some ten thousand tokens. With several ranks each gives its own; all get the same weights, and figures of their own
            batches.
        rebalance (`int`, *optional*, defaults to `0`):
            Passes over `batches` that bring the loads of the folded routers nearer to those with the bias, which takes their
            choices a little farther away from it; 3 are enough, more cost loss where r² is low.
        held_out (`Iterable[Mapping]`, *optional*): batches to measure on; `batches` unless given, which flatters.

    Returns:
        `FoldReport`: how good it is.

    Raises:
        ValueError: if there is no bias to fold, the family keeps it in the weights already, or the routers' weights cannot be
            written to (quantised, sharded, offloaded, under an adapter); the model is then untouched.
        RuntimeError: in the middle of an optimizer step.
    """
    batches = repeatable(batches)
    folding = Folding(model, batches, rebalance)
    kept = "rebalanced" if rebalance else "folded"
    variants = {name: folding.variants[name] for name in ("biased", "dropped", kept)}
    biased, dropped, folded = compare(model, batches if held_out is None else held_out, variants).values()
    folding.keep(kept)
    return FoldReport(folding.r2, folding.explained, biased, dropped, folded, held_out is not None)


class Folding:
    """
    Ways for a patched model to do without its bias, fitted on `batches`. The model stays as it is, but inside the contexts of
    `variants`, until one is kept. Arguments and errors are those of [`fold`].

    Attributes:
        variants (`dict[str, Callable]`):
            What makes a context in which the model is that variant: `"biased"`, as it is; `"dropped"`; `"folded"`; and
            `"rebalanced"`, if that was asked for.
        r2 (`dict[str, float]`), explained (`dict[str, float]`): as in a [`FoldReport`].
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Iterable[Batch], rebalance: int = 0) -> None:
        self._balancer = balancer = get_balancer(model)
        self._weights = weights = _Weights(_foldable(model, balancer))
        batches = repeatable(batches)
        shifts = _regress(model, balancer, weights.linears, batches)
        self.r2 = {name: shift.r2 for name, shift in zip(balancer.layer_names, shifts)}
        self.explained = {name: shift.explained for name, shift in zip(balancer.layer_names, shifts)}
        self._values = {"dropped": weights.original, "folded": weights.shifted(shifts)}
        if rebalance:
            self._values["rebalanced"] = _even_out(model, balancer, weights, shifts, batches, rebalance)
        self.variants: dict[str, Variant] = {"biased": nullcontext}
        for name, values in self._values.items():
            self.variants[name] = partial(weights.without_bias, balancer, values)

    @torch.no_grad()
    def keep(self, variant: str) -> None:
        """Leaves the model as `variant`, with a bias of zero, unless that is `"biased"`."""
        if variant != "biased":
            self._weights.write(self._values[variant])
            biases = self._balancer.biases()
            self._balancer.set_biases({name: torch.zeros_like(bias) for name, bias in biases.items()})


def _foldable(model: nn.Module, balancer: PhiBalancer) -> list[RouterLinear]:
    """The linear layers of all routers, if there is something to fold and it can be."""
    kind = type(balancer.root).__name__
    native = [site.name for site in balancer.sites if site.native_bias]
    if native:
        raise ValueError(
            f"there is nothing to fold: {kind} has a selection bias of its own ({native[0]!r}, ...), so it is in the weights "
            "and a plain load keeps it."
        )
    if not balancer.has_bias:
        raise ValueError(
            f"there is nothing to fold: {kind} has no selection bias ({balancer.config.method!r} with "
            f"bias_coef={balancer.config.bias_coef}). A plain load routes as it does."
        )
    if has_adapter(model):
        raise ValueError(
            "the model carries an adapter of PEFT, whose file could not hold the folded routers. Merge it first: "
            "model = model.merge_and_unload(), then fold."
        )
    return [find_linear(site) for site in balancer.sites]


# ---------------------------------------------------------------------- the regression


class _Regression:
    """Gathers what each router receives and by how much its logits have to be shifted."""

    def __init__(self, look: Look, linears: list[RouterLinear]) -> None:
        self.look, self.linears = look, linears
        self.biases = [bias.float() for bias in look.balancer.biases().values()]
        self.moments: list[ShiftMoments | None] = [None] * len(linears)
        self.ranked: list[str | None] = [None] * len(linears)
        self._received: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, forwards add to the moments."""
        with ExitStack() as stack:
            for index, linear in enumerate(self.linears):
                hook = linear.owner.register_forward_pre_hook(self._receive(index))
                stack.callback(hook.remove)
            stack.enter_context(self.look.balancer.forwards.showing_scores(self._rank))
            yield

    def _receive(self, index: int) -> Any:
        def note(module: nn.Module, args: tuple) -> None:
            self._received[index] = args[0]

        return note

    def _rank(self, index: int, scores: Tensor) -> None:
        """Router `index` ranks `scores`, its bias added: the last that is seen of it in a forward."""
        site = self.look.sites[index]
        # in transformers before 5.14 some blocks read the weight of their router instead of calling it
        received = self._received.pop(index) if index in self._received else self.look.hidden[index]
        device = scores.device
        scores_TE = scores.reshape(-1, scores.shape[-1])
        mask_T = self.look.mask_of(index, len(scores_TE)).to(device)
        x_NH = received.reshape(-1, received.shape[-1]).to(device)[mask_T].float()
        scores_NE = scores_TE[mask_T].float()
        if not len(x_NH):
            return
        ranked = self.ranked[index] or self._checked(index, x_NH, scores_NE)
        bias_E = self.biases[index].to(device)
        biased_NE = (scores_NE + bias_E).masked_fill(scores_NE == float("-inf"), float("-inf"))
        threshold_N1 = selection_threshold(biased_NE, site.top_k)
        moments = self.moments[index]
        if moments is None:
            moments = self.moments[index] = ShiftMoments.zeros(x_NH.shape[-1], len(bias_E), x_NH)
        moments.add(x_NH, logit_shift(bias_E, threshold_N1, ranked))

    def _checked(self, index: int, x_NH: Tensor, scores_NE: Tensor) -> str:
        """What router `index` ranks."""
        site = self.look.sites[index]
        ranked, distance = ranked_of(self.linears[index], x_NH, scores_NE)
        if distance > LINEAR:
            raise ValueError(
                f"router {site.name!r} ({site.kind.target.__name__}) ranks neither the logits of its matrix nor their "
                f"softmax or sigmoid ({ranked!r} miss by {distance:.0%} of their spread), so a shift of the logits cannot "
                "stand for the bias. Serve it with this package, or drop the bias."
            )
        self.ranked[index] = ranked
        return ranked


def _regress(
    model: nn.Module, balancer: PhiBalancer, linears: list[RouterLinear], batches: Iterable[Batch]
) -> list[FoldedShift]:
    """The shift of each router that stands best for its bias on the tokens of `batches`."""
    with looking(model) as look:
        regression = _Regression(look, linears)
        with regression.watching():
            for batch in batches:
                look.forward(batch)
    shifts = []
    for site, linear, moments in zip(balancer.sites, linears, regression.moments):
        if moments is None:
            moments = ShiftMoments.zeros(linear.weight.shape[1], site.num_experts, linear.weight)
        balancer.sum_over_ranks(moments.flat)
        if not moments.parts()[-1]:
            raise ValueError(
                f"router {site.name!r} ranked nothing: `batches` hold no token that counts, or something bypasses the router."
            )
        shifts.append(fold_shift(moments, linear.bias is not None))
        moments.flat = moments.flat.new_zeros(0)  # a matrix of H² numbers
    return shifts


Values = list[tuple[Tensor, Tensor | None]]  # weight and bias of each router


class _Weights:
    """The routers' weights, which may be others for a while."""

    def __init__(self, linears: list[RouterLinear]) -> None:
        self.linears = linears
        self.original: Values = [
            (linear.weight.clone(), None if linear.bias is None else linear.bias.clone()) for linear in linears
        ]

    def shifted(self, shifts: list[FoldedShift], constants: Sequence[Tensor] | None = None) -> Values:
        """The original ones with `shifts`, and with `constants (E,)` along the directions in which those are constant."""
        values: Values = []
        for index, ((weight, bias), shift) in enumerate(zip(self.original, shifts)):
            exact, added = weight.to(shift.weight) + shift.weight, shift.bias
            if constants is not None:
                constant_E = constants[index].to(exact)
                exact = exact + torch.outer(constant_E, shift.constant)
                added = None if added is None else added + constant_E
            values.append(
                (exact.to(weight), None if bias is None or added is None else (bias.to(added) + added).to(bias))
            )
        return values

    def write(self, values: Values) -> None:
        """Puts `values` into the model."""
        for linear, (weight, bias) in zip(self.linears, values):
            linear.weight.copy_(weight)
            if bias is not None and linear.bias is not None:
                linear.bias.copy_(bias)

    @contextmanager
    def without_bias(self, balancer: PhiBalancer, values: Values) -> Iterator[None]:
        """While open, the model has these weights, and no selection bias of ours."""
        with torch.no_grad():
            self.write(values)
        try:
            with balancer.without_bias():
                yield
        finally:
            with torch.no_grad():
                self.write(self.original)


def _even_out(
    model: nn.Module,
    balancer: PhiBalancer,
    weights: _Weights,
    shifts: list[FoldedShift],
    batches: Iterable[Batch],
    iterations: int,
) -> Values:
    """The folded routers, moved along their constant directions to where `batches` are loaded as with the bias."""
    sizes = [site.num_experts for site in balancer.sites]

    def loads_of(variant: Variant) -> Sequence[Tensor]:
        loads = compare(model, batches, {"it": variant})["it"].loads
        summed = torch.cat(list(loads.values())).to(weights.linears[0].weight.device, torch.float32)
        return balancer.sum_over_ranks(summed).split(sizes)

    ascent = Ascent(sizes, wanted=loads_of(nullcontext))
    values = weights.shifted(shifts)
    for _ in range(iterations):
        ascent.tell(loads_of(partial(weights.without_bias, balancer, values)))
        values = weights.shifted(shifts, ascent.ask())
    return weights.shifted(shifts, ascent.best)
