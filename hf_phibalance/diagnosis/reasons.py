"""Explains why a step received another coefficient of the built-in loss than was declared: one finding for each reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .report import PRECISE, ROUGH, Check, Coefficient, DoctorReport, Status
from .stock import StockRecorder


LARGE = 0.1  # coefficients that models were published with are mostly between 0.0001 and 0.02
HIDDEN = 0.5  # share of the mean imbalance of the layers that the pooled loss must show
UNEVEN = 0.1  # imbalance of the layers, relative to top_k, below which there is nothing to hide
VERDICTS = {
    "ok": "As declared.",
    "warning": "Read the remedies.",
    "problem": "The declared coefficient does not arrive.",
}
PATCH = "phb.patch(model, {'coef': 0.01})"
TRAIN_ROUTERS = "train the routers, for example by phb.lora_config(model, router='lora')"
REASONS: dict[str, tuple[Status, str]] = {  # with the remedy
    "switched off": ("warning", "from_pretrained(..., output_router_logits=True)"),
    "router logits": ("problem", f"{PATCH}, which needs no router logits from the model"),
    "checkpointing": ("problem", "gradient_checkpointing_kwargs={'use_reentrant': False}"),
    "gradient path": ("problem", TRAIN_ROUTERS),
    "dropped": ("problem", f"add coefficient * outputs.aux_loss in compute_loss, or {PATCH}"),
    "two sources": ("problem", "set one of them to 0: model.router_aux_loss_coef, or the trainer's argument"),
    "copied": ("problem", "from_pretrained(..., router_aux_loss_coef=...), or set model.router_aux_loss_coef"),
    "accumulation and ranks": (
        "problem",
        "correct the coefficient by this factor, or use a trainer that does (SFTTrainer of TRL)",
    ),
    "scale": ("problem", f"{PATCH}, whose coefficient does not depend on the loop"),
    "default": ("warning", "router_aux_loss_coef=... in its arguments; 0.0 switches it off"),
    "size": ("warning", "router_aux_loss_coef=0.001 or so, where it is declared"),
    "padding": ("warning", "give the model the attention_mask of each batch"),
    "counts": ("warning", f"larger micro-batches, or {PATCH}, which averages loads over steps"),
    "other losses": ("warning", "look for another loss of the router logits, such as a z-loss"),
    "routers that learn": ("warning", TRAIN_ROUTERS),
    "pooled layers": ("warning", f"phibalance inspect shows each layer; {PATCH} balances each by itself"),
}


@dataclass(frozen=True)
class Declared:
    """Where a coefficient of the built-in loss is declared, and by what kind of training."""

    by_model: float  # the coefficient that the model multiplies its loss by
    is_on: bool  # the config's `output_router_logits`
    sources: dict[str, float]  # by where it is written; the first one counts
    by_trainer: float | None = None  # coefficient of a loss that the trainer adds
    is_default: bool = False  # nobody set it, and the trainer switched the loss on
    trainer: str = "the loop"  # name of its class
    model: str = "the model"  # name of its class

    @property
    def coefficient(self) -> float:
        return next(iter(self.sources.values()), 0.0)


@dataclass(frozen=True)
class AuditReport(DoctorReport):
    """
    The report of [`audit`]; `print` it. Has what a [`DoctorReport`] has, and:

    Args:
        declared (`float`): the coefficient that was declared; 0 if there is none.
        received (`float`): the coefficient that arrived at the routers' logits.
        sources (`dict[str, float]`): where a coefficient is written, and its value. The first one is `declared`.
        pooled (`float`): the built-in loss of the step's tokens, with all layers pooled. `top_k` is balance.
        layers (`dict[str, float]`): the same loss of each layer alone.
    """

    declared: float = 0.0
    received: float = 0.0
    sources: dict[str, float] = field(default_factory=dict)
    pooled: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    title, verdicts = "Auxiliary loss", VERDICTS

    @property
    def ratio(self) -> float | None:
        """Received over declared coefficient; `None` if none is declared."""
        return None if self.coefficient is None else self.coefficient.ratio

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        own = ("declared", "received", "ratio", "sources", "pooled", "layers")
        return super().to_dict() | {name: getattr(self, name) for name in own}


def explain(seen: StockRecorder, declared: Declared, measured: str) -> AuditReport:
    """Returns the report of a step: what it received, and every reason why that is not what was declared."""
    model = {"class": declared.model, "model_type": getattr(seen.root.config, "model_type", None)}
    coefficient, wanted = None, declared.coefficient
    if wanted:
        where = "the logits of the routers"
        coefficient = Coefficient(wanted, seen.received / wanted, seen.residual, {}, where, seen.is_precise)
    written = ", ".join(f"{name}={value:g}" for name, value in declared.sources.items()) or "no coefficient"
    checks = [Check("declared", "ok", written), _judge(seen, declared, coefficient)]
    checks += [Check(name, REASONS[name][0], finding, REASONS[name][1]) for name, finding in _reasons(seen, declared)]
    checks += _figures(seen)
    values = seen.received, declared.sources, seen.pooled, seen.layers
    return AuditReport(checks, measured, coefficient, model, wanted, *values)


def _judge(seen: StockRecorder, declared: Declared, coefficient: Coefficient | None) -> Check:
    if coefficient is None and seen.received:
        return Check("coefficient", "warning", f"no coefficient is declared, but {seen.received:.3g} arrives")
    if coefficient is None:
        return Check("coefficient", "ok", "no coefficient is declared, and none arrives")
    is_exact = abs(coefficient.ratio - 1) <= coefficient.tolerance
    is_off = seen.received == 0 and not declared.is_on and declared.by_trainer is None
    found = f"{seen.received:.6g} received of {coefficient.declared:g} declared, ratio {coefficient.ratio:.4f}"
    return Check("coefficient", "ok" if is_exact else "warning" if is_off else "problem", found)


def _figures(seen: StockRecorder) -> Iterator[Check]:
    """Yields what is as it should be in the loss that arrives."""
    if seen.received and seen.padding and seen.on_padding <= 1e-6:
        yield Check("padding", "ok", f"not counted: {seen.padding:,} of {seen.positions:,} positions")
    if seen.received and seen.is_of_step:
        yield Check("counts", "ok", f"taken from the whole step, {seen.forwards * seen.ranks} micro-batches")


def _reasons(seen: StockRecorder, declared: Declared) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each finding."""
    wanted, parts = declared.coefficient, seen.forwards * seen.ranks
    if seen.received == 0 and (wanted or (declared.is_on and not seen.computes)):
        yield _missing(seen, declared)
    elif wanted and abs(seen.received / wanted - 1) > (PRECISE if seen.is_precise else ROUGH):
        yield from _factors(seen, declared)
    if seen.received and declared.is_default:
        yield "default", f"{declared.trainer} switched the loss on by itself, with {wanted:g}: no argument sets it"
    if seen.received and abs(wanted) >= LARGE:
        models = "most models were trained with 0.0001 to 0.02. GPT-OSS has 0.9 in its config"
        yield "size", f"{wanted:g} is large: {models}"
    if seen.received and seen.padding and seen.on_padding > 1e-6:
        share = f"{seen.padding / seen.positions:.1%} of the positions are padding"
        yield "padding", f"counted: {share}, and {seen.on_padding:.1%} of the squared gradient is there"
    if seen.received and parts > 1 and not seen.is_of_step:
        alone = f"about {seen.positions / parts:,.0f} positions each, the step has {seen.positions:,}"
        yield "counts", f"taken from each micro-batch alone ({alone}), so each is balanced by itself"
    if seen.residual > 0.05:
        yield "other losses", f"{seen.residual:.0%} of the gradient that losses add at the logits is not from this one"
    if seen.received and not seen.learns:
        yield "routers that learn", "all routers are frozen, so the loss reaches only what lies below them"
    worst = max(seen.layers, key=lambda name: seen.layers[name])
    mean = sum(seen.layers.values()) / len(seen.layers)
    pooled, each = (value / seen.top_k - 1 for value in (seen.pooled, mean))
    if seen.received and each > UNEVEN and pooled < HIDDEN * each:
        alone = f"{mean:.4g} for a layer alone on average, and {seen.layers[worst]:.4g} for {worst}"
        together = f"the loss is {seen.pooled:.4g} for all layers together, but {alone}"
        yield "pooled layers", f"they hide imbalance: {together}. {seen.top_k} is balance"


def _missing(seen: StockRecorder, declared: Declared) -> tuple[str, str]:
    """Returns why nothing arrives."""
    if not seen.computes and not declared.is_on and declared.by_trainer is None:
        return "switched off", "the model computes no auxiliary loss, because output_router_logits=False in its config"
    if not seen.computes:
        return "router logits", f"{declared.model} returns no router logits to a loss, and computes no auxiliary loss"
    if seen.is_reentrant and not seen.aux_has_path:
        first = "reentrant checkpointing runs the routers without gradients first"
        return "checkpointing", f"{first}, and the auxiliary loss is computed from these logits"
    if not seen.aux_has_path:
        return "gradient path", "the auxiliary loss has none: the routers, and all layers below them, are frozen"
    return "dropped", f"the model computes the auxiliary loss, but {declared.trainer} trains on a loss without it"


def _factors(seen: StockRecorder, declared: Declared) -> Iterator[tuple[str, str]]:
    """Yields the factors between the received and the declared coefficient."""
    tolerance = 10 * (PRECISE if seen.is_precise else ROUGH)
    wanted, forwards, ranks = declared.coefficient, seen.forwards, seen.ranks
    by_model = seen.from_loss * declared.by_model
    by_trainer = seen.from_aux - by_model
    if seen.computes and min(abs(by_model), abs(by_trainer)) > 0.01 * abs(seen.from_aux):
        parts = f"{declared.model} {by_model:.3g} in its loss, {declared.trainer} {by_trainer:.3g} on top"
        yield "two sources", f"both add it: {parts}"
        wanted *= seen.from_aux / by_model
    elif by_model and abs(declared.by_model / wanted - 1) > tolerance:
        copied = "which it copied when it was built; later changes of its config do nothing"
        yield "copied", f"the model multiplies by {declared.by_model:g}, {copied}"
        wanted = declared.by_model
    left = seen.received / wanted
    sizes = {f"{forwards} micro-batches": forwards, f"{ranks} ranks": ranks}
    sizes[" and ".join(sizes)] = forwards * ranks
    for name, size in sizes.items():
        if size > 1 and math.isclose(left, size, rel_tol=tolerance):
            added = "the loss of each micro-batch is added in full and then summed over"
            yield "accumulation and ranks", f"times {size}: {added} {name}"
            return
        if size > 1 and math.isclose(left, 1 / size, rel_tol=tolerance):
            yield "accumulation and ranks", f"divided by {size}: the loss is averaged once more over {name}"
            return
    if abs(left - 1) > tolerance:
        yield "scale", f"times {left:.4g}, for a reason that was not found"
