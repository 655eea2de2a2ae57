"""
Folds a selection bias into the router weights, so that a plain load routes almost as in training. Compares variants of
a model on the same batches.

Families without a bias of their own lose it when served without this package. `maths/folding.py` explains the maths.

Shapes: B sequences, S positions; T tokens, N in the mask; H router inputs; E experts, k selected; V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..balancing import Ascent, Batch, Measurement, Observation, PhiBalancer, get_balancer, observing, repeatable
from ..files import layer_labels
from ..maths import FoldedShift, ShiftMoments, fold_shift, logit_shift, selection_threshold
from ..routers import RouterLinear, find_linear, has_adapter, predicts_tokens, ranked_of


Variant = Callable[[], AbstractContextManager]  # makes a context manager: inside it, the model is that variant
Values = list[tuple[Tensor, Tensor | None]]  # weight and bias of each router
LINEAR = 0.1  # largest distance of the ranked scores from those of the router's matrix; rounding is far below


@dataclass(frozen=True)
class FoldReport:
    """
    What [`fold`] did, by layer name where it is a dictionary.

    Attributes:
        r2 (`dict[str, float]`):
            How well a direction of the router's inputs replaces the constant 1 (see `maths/folding.py`). 1 is best; 1
            if the router has a bias of its own.
        explained (`dict[str, float]`): share of the shifts of the logits that the new weight explains.
        biased (`Measurement`): the model with its bias.
        dropped (`Measurement`): the model without its bias, as a plain load was before.
        folded (`Measurement`): the model as it is now.
        held_out (`bool`): whether these three were measured on other batches than the fitted ones.
    """

    r2: dict[str, float]
    explained: dict[str, float]
    biased: Measurement
    dropped: Measurement
    folded: Measurement
    held_out: bool

    def __str__(self) -> str:
        where = "other batches" if self.held_out else "the same batches"
        lines = [
            f"The selection bias of {len(self.r2)} routers is in their weights. MaxVio on {where} "
            f"({self.folded.tokens:,} tokens): {self.biased.max_vio_global:.3f} with the bias, "
            f"{self.dropped.max_vio_global:.3f} without, {self.folded.max_vio_global:.3f} folded. "
            f"{self.folded.changed_share:.1%} of the assignments differ from those with the bias "
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
    Folds the selection bias of a patched model into the weights of its routers, in place. Runs only forwards.
    Afterwards the bias is zero, and a plain load routes like this model. The report says how many choices change.

    For families without a bias of their own (`phb.supported_families()`: "re-selected"). Nothing else changes:
    training can continue with the same optimizer.

    ```python
    report = phb.fold(model, [{"input_ids": ids} for ids in some_texts])
    print(report)
    ```

    Args:
        model (`torch.nn.Module`): the patched model, whole in this process.
        batches (`Iterable[Mapping]`):
            Arguments of the model (`input_ids`, and `attention_mask` if there is padding): some ten thousand tokens of
            texts like those that it will see. Each rank passes its own batches. All ranks get the same weights, and
            each gets the figures of its own batches.
        rebalance (`int`, *optional*, defaults to `0`):
            Number of passes over `batches` that move the loads of the folded routers nearer to those with the bias. A
            few more choices change. 3 are enough; more raise the loss where r² is low.
        held_out (`Iterable[Mapping]`, *optional*):
            Batches to measure on. The default, `batches`, gives figures that are too good.

    Returns:
        `FoldReport`: how good the fold is.

    Raises:
        ValueError: if there is no bias to fold, the family already keeps it in the weights, or the router weights
            cannot be written to (quantised, sharded, offloaded, under an adapter). The model is then unchanged.
        RuntimeError: if called in the middle of an optimizer step.
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
    Fits replacements for the bias of a patched model. Until `keep` is called, the model changes only inside the
    contexts of `variants`. Arguments and errors are those of [`fold`].

    Attributes:
        variants (`dict[str, Callable]`):
            Make context managers; inside one, the model is that variant: `"biased"` (as it is), `"dropped"`,
            `"folded"`, and with `rebalance` also `"rebalanced"`.
        r2 (`dict[str, float]`), explained (`dict[str, float]`): as in a [`FoldReport`].
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Iterable[Batch], rebalance: int = 0) -> None:
        self._balancer = balancer = get_balancer(model)
        self._linears = _foldable(model, balancer)
        self._original: Values = [
            (linear.weight.clone(), None if linear.bias is None else linear.bias.clone()) for linear in self._linears
        ]
        batches = repeatable(batches)
        shifts = _regress(model, self._linears, batches)
        self.r2 = {name: shift.r2 for name, shift in zip(balancer.layer_names, shifts)}
        self.explained = {name: shift.explained for name, shift in zip(balancer.layer_names, shifts)}
        self._values = {"dropped": self._original, "folded": self._shifted(shifts)}
        if rebalance:
            self._values["rebalanced"] = self._even_out(model, shifts, batches, rebalance)
        self.variants: dict[str, Variant] = {"biased": nullcontext}
        for name, values in self._values.items():
            self.variants[name] = partial(self._without_bias, values)

    @torch.no_grad()
    def keep(self, variant: str) -> None:
        """Leaves the model as `variant`, with a bias of zero."""
        self._write(self._values[variant])
        biases = self._balancer.biases()
        self._balancer.set_biases({name: torch.zeros_like(bias) for name, bias in biases.items()})

    def _shifted(self, shifts: list[FoldedShift], constants: Sequence[Tensor] | None = None) -> Values:
        """Returns the original weights plus `shifts`, plus `constants (E,)` along each router's constant direction."""
        values: Values = []
        for index, ((weight, bias), shift) in enumerate(zip(self._original, shifts)):
            exact, added = weight.to(shift.weight) + shift.weight, shift.bias
            if constants is not None:
                constant_E = constants[index].to(exact)
                exact = exact + torch.outer(constant_E, shift.constant)
                added = None if added is None else added + constant_E
            own = None if bias is None or added is None else (bias.to(added) + added).to(bias)
            values.append((exact.to(weight), own))
        return values

    def _write(self, values: Values) -> None:
        for linear, (weight, bias) in zip(self._linears, values):
            linear.weight.copy_(weight)
            if bias is not None and linear.bias is not None:
                linear.bias.copy_(bias)

    @contextmanager
    def _without_bias(self, values: Values) -> Iterator[None]:
        """Context manager: inside it the routers have the weights `values`, and no selection bias is added."""
        with torch.no_grad():
            self._write(values)
        try:
            with self._balancer.without_bias():
                yield
        finally:
            with torch.no_grad():
                self._write(self._original)

    def _even_out(
        self, model: nn.Module, shifts: list[FoldedShift], batches: Iterable[Batch], iterations: int
    ) -> Values:
        """Returns folded routers, moved along their constant directions towards the loads with the bias."""
        sizes = [site.num_experts for site in self._balancer.sites]

        def loads_of(variant: Variant) -> Sequence[Tensor]:
            loads = compare(model, batches, {"it": variant})["it"].loads
            summed = torch.cat(list(loads.values())).to(self._linears[0].weight.device, torch.float32)
            return self._balancer.sum_over_ranks(summed).split(sizes)

        ascent = Ascent(sizes, wanted=loads_of(nullcontext))
        values = self._shifted(shifts)
        for _ in range(iterations):
            ascent.tell(loads_of(partial(self._without_bias, values)))
            values = self._shifted(shifts, ascent.ask())
        return self._shifted(shifts, ascent.best)


def _foldable(model: nn.Module, balancer: PhiBalancer) -> list[RouterLinear]:
    """Returns the linear layer of each router. Raises `ValueError` if there is no bias or it cannot be folded."""
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
            f"bias_coef={balancer.config.bias_coef}). A plain load routes the same way."
        )
    if has_adapter(model):
        raise ValueError(
            "the model carries an adapter of PEFT, whose file could not hold the folded routers. Merge it first: "
            "model = model.merge_and_unload(), then fold."
        )
    return [find_linear(site) for site in balancer.sites]


# ---------------------------------------------------------------------- the regression


class _Regression:
    """Sums for each router the moments of its inputs and of the logit shifts that replace its bias."""

    def __init__(self, observed: Observation, linears: list[RouterLinear]) -> None:
        self.observed, self.linears = observed, linears
        self.biases = [bias.float() for bias in observed.balancer.biases().values()]
        self.moments: list[ShiftMoments | None] = [None] * len(linears)
        self._ranked: list[str | None] = [None] * len(linears)
        self._received: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager: forwards inside it add to the moments."""
        with ExitStack() as stack:
            for index, linear in enumerate(self.linears):
                hook = linear.owner.register_forward_pre_hook(partial(self._receive, index))
                stack.callback(hook.remove)
            stack.enter_context(self.observed.balancer.forwards.showing_scores(self._rank))
            yield

    def _receive(self, index: int, module: nn.Module, args: tuple) -> None:
        self._received[index] = args[0]

    def _rank(self, index: int, scores: Tensor) -> None:
        """Adds a call of router `index`, which ranks `scores` plus its bias."""
        site = self.observed.sites[index]
        # in transformers before 5.14 some blocks read the weight of their router instead of calling it
        received = self._received.pop(index) if index in self._received else self.observed.hidden[index]
        scores_TE = scores.reshape(-1, scores.shape[-1])
        mask_T = self.observed.mask_of(index, len(scores_TE)).to(scores.device)
        x_NH = received.reshape(-1, received.shape[-1]).to(scores.device)[mask_T].float()
        scores_NE = scores_TE[mask_T].float()
        if not len(x_NH):
            return
        ranked = self._ranked[index] = self._ranked[index] or self._checked(index, x_NH, scores_NE)
        bias_E = self.biases[index].to(scores.device)
        biased_NE = (scores_NE + bias_E).masked_fill(scores_NE == float("-inf"), float("-inf"))
        moments = self.moments[index]
        if moments is None:
            moments = self.moments[index] = ShiftMoments.zeros(x_NH.shape[-1], len(bias_E), x_NH)
        moments.add(x_NH, logit_shift(bias_E, selection_threshold(biased_NE, site.top_k), ranked))

    def _checked(self, index: int, x_NH: Tensor, scores_NE: Tensor) -> str:
        """Returns what router `index` ranks. Raises `ValueError` if that does not follow from its matrix."""
        site = self.observed.sites[index]
        ranked, distance = ranked_of(self.linears[index], x_NH, scores_NE)
        if distance > LINEAR:
            raise ValueError(
                f"router {site.name!r} ({site.kind.target.__name__}) ranks neither the logits of its matrix nor their "
                f"softmax or sigmoid ({ranked!r} miss by {distance:.0%} of their spread), so a shift of the logits cannot "
                "stand for the bias. Serve it with this package, or drop the bias."
            )
        return ranked


def _regress(model: nn.Module, linears: list[RouterLinear], batches: Iterable[Batch]) -> list[FoldedShift]:
    """Returns for each router the shift that best replaces its bias on the tokens of `batches`."""
    with observing(model) as observed:
        regression = _Regression(observed, linears)
        with regression.watching():
            for batch in batches:
                observed.forward(batch)
    shifts = []
    for site, linear, moments in zip(observed.sites, linears, regression.moments):
        if moments is None:
            moments = ShiftMoments.zeros(linear.weight.shape[1], site.num_experts, linear.weight)
        observed.balancer.sum_over_ranks(moments.flat)
        if not moments.parts()[-1]:
            raise ValueError(
                f"router {site.name!r} ranked nothing: `batches` hold no token that counts, or something bypasses the router."
            )
        shifts.append(fold_shift(moments, linear.bias is not None))
        moments.flat = moments.flat.new_zeros(0)  # frees a matrix of H² numbers
    return shifts


# ---------------------------------------------------------------------- comparison


def compare(
    model: nn.Module, batches: Iterable[Batch], variants: Mapping[str, Variant], with_loss: bool = False
) -> dict[str, Measurement]:
    """
    Measures variants of a patched model on the same batches: expert load, and how many top-k choices differ from the
    first variant's. With `with_loss`, also the loss of the labels in the batches (for classifiers see
    [`Measurement`]). Raises `ValueError` if the token masks are empty.
    """
    counts = {name: _Counts() for name in variants}
    with observing(model) as observed:
        for batch in batches:
            first: dict[int, Tensor] = {}
            expected: Tensor | None = None
            # batches in the outer loop, so that only the choices of one batch are kept
            for name, variant in variants.items():
                counted = counts[name]
                observed.on_choice = partial(counted.add, observed, first)
                with variant():
                    output = observed.forward(batch, with_head=with_loss)
                counted.tokens += int(observed.mask.sum())
                if with_loss and predicts_tokens(model):
                    counted.add_loss(output.logits, batch["labels"])
                elif with_loss:
                    expected = output.logits if expected is None else expected
                    counted.add_distance(output.logits, expected, observed.mask)
    if not any(counted.tokens for counted in counts.values()):
        raise ValueError("there is nothing to measure on: `batches` hold no token that counts.")
    return {name: counted.figures(observed) for name, counted in counts.items()}


class _Counts:
    def __init__(self) -> None:
        self.loads: dict[int, Tensor] = {}  # (E,) by number of the router
        self.kept: dict[int, Tensor] = {}  # assignments that the first variant makes too
        self.loss, self.predicted, self.tokens = 0.0, 0, 0

    def add(
        self, observed: Observation, first: dict[int, Tensor], index: int, logits_TE: Tensor, chosen_Tk: Tensor
    ) -> None:
        """Adds the choices of router `index`. The first variant stores its choices in `first`."""
        mask_T = observed.mask_of(index, len(logits_TE)).to(chosen_Tk.device)
        chosen_Nk, first_Nk = chosen_Tk[mask_T], first.setdefault(index, chosen_Tk)[mask_T]
        load_E = torch.bincount(chosen_Nk.reshape(-1), minlength=logits_TE.shape[-1])
        kept = (chosen_Nk.unsqueeze(-1) == first_Nk.unsqueeze(-2)).any(-1).sum()
        self.loads[index] = self.loads.get(index, 0) + load_E
        self.kept[index] = self.kept.get(index, 0) + kept

    def add_loss(self, logits_BSV: Tensor, labels_BS: Tensor) -> None:
        wanted = labels_BS[:, 1:].to(logits_BSV.device).reshape(-1)
        logits = logits_BSV[:, :-1].flatten(0, 1).float()
        self.loss += float(nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"))
        self.predicted += int((wanted != -100).sum())

    def add_distance(self, logits: Tensor, expected: Tensor, mask_T: Tensor) -> None:
        """Adds how far predictions of a classifier are from `expected`; both `(B, labels)` or `(B, S, labels)`."""
        if logits.ndim == 3:
            logits, expected = (part.flatten(0, 1)[mask_T.to(part.device)] for part in (logits, expected))
        logits, expected = logits.float(), expected.float()
        if logits.shape[-1] == 1:
            self.loss += float((logits - expected).square().sum())
        else:
            self.loss += float(nn.functional.cross_entropy(logits, expected.softmax(-1), reduction="sum"))
        self.predicted += len(logits)

    def figures(self, observed: Observation) -> Measurement:
        names = {index: observed.sites[index].name for index in sorted(self.loads)}
        loads = {name: self.loads[index].double().cpu() for index, name in names.items()}
        changed = {name: 1 - float(self.kept[i]) / max(float(loads[name].sum()), 1.0) for i, name in names.items()}
        return Measurement(loads, changed, self.loss / self.predicted if self.predicted else None, self.tokens)
